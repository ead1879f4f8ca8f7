"""Virtual labs: a data set cut into labs, and the app that stands for all of them.

N images, C classes, K labs. ``cut`` decides who holds what; the result is saved once and opened by
every worker process. Besides the labs there is ``central``, which holds all training images: the
baseline that a federation is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from cytofed.arrays import Parts
from cytofed.client.app import Lab, OnStep, lab_app
from cytofed.client.budget import LedgerBudget
from cytofed.client.cells import Cells, load_cells
from cytofed.client.memory import FolderMemory
from cytofed.client.opening import absent_classes, kept_for_calibration
from cytofed.files import write_atomically
from cytofed.labels import Scheme, load_scheme
from cytofed.messages import ERROR_CODE, Order, Update, pack_update, read_parts, unpack_order
from cytofed.plan import (
    Plan,
    SecureAggregation,
    StrategySpec,
    from_dict,
    load_plan,
    to_dict,
    with_baseline_train,
)
from cytofed.privacy.noise import SimulatedRandomness
from cytofed.privacy.terms import declared_of, terms_of
from cytofed.secure_round import public_bound
from cytofed.simulations.partitions import Partition, Stain
from cytofed.simulations.population import fate as fate_of
from cytofed.simulations.secure import open_secure_lab
from cytofed.start import START_FILE, read_start, write_start

FEDERATION = "federation"
CENTRAL = "central"


@dataclass(frozen=True, eq=False)
class StainedCells(Cells):
    """Cells whose images have the stain of their lab."""

    lab_N: npt.NDArray[np.int64]
    stains: tuple[Stain | None, ...]

    @property
    def as_cached(self) -> bool:
        return all(self.stains[lab] is None for lab in np.unique(self.lab_N).tolist())

    def take(self, index: npt.NDArray[Any]) -> StainedCells:
        return stained(super().take(index), self.lab_N[index], self.stains)

    def images(self, index: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        pixels_BHWC: npt.NDArray[np.uint8] = super().images(index)
        lab_B = self.lab_N[index]
        for lab in np.unique(lab_B).tolist():
            stain = self.stains[lab]
            if stain is not None:
                pixels_BHWC[lab_B == lab] = stain.apply(pixels_BHWC[lab_B == lab])
        return pixels_BHWC


def stained(
    cells: Cells, lab_N: npt.NDArray[np.int64], stains: tuple[Stain | None, ...]
) -> StainedCells:
    """The same selection, seen through each lab's stain."""
    return StainedCells(
        cells.sources,
        cells.source_N,
        cells.row_N,
        cells.targets_NC,
        cells.patients_N,
        cells.size_px,
        lab_N,
        stains,
    )


@dataclass(frozen=True)
class VirtualLabs:
    """All labs of a simulation. ``lab_N`` says whose an image is, ``side_N`` what it is for."""

    plan: Plan
    names: tuple[str, ...]
    cells: Cells
    lab_N: npt.NDArray[np.int64]
    side_N: npt.NDArray[np.int8]
    """0: left out by +missing, 1: training, 2: test, 3: kept for calibration"""
    stains: tuple[Stain | None, ...]
    folder: Path
    """where the start model and the labs' memories lie"""

    def save(self) -> None:
        """Write what ``load`` needs to ``folder``; holds file names, so for this user only."""
        self.cells.save(self.folder / "cells.npz")
        table = {
            "plan": to_dict(self.plan),
            "names": self.names,
            "lab": self.lab_N.tolist(),
            "side": self.side_N.tolist(),
            "stains": [None if s is None else [s.gain_3, s.bias_3] for s in self.stains],
        }
        write_atomically(self.folder / "labs.json", json.dumps(table), mode=0o600)

    @staticmethod
    def load(folder: Path) -> VirtualLabs:
        """The labs that ``save`` wrote."""
        table = json.loads((folder / "labs.json").read_text())
        return VirtualLabs(
            plan=from_dict(table["plan"]),
            names=tuple(table["names"]),
            cells=load_cells(folder / "cells.npz"),
            lab_N=np.asarray(table["lab"], dtype=np.int64),
            side_N=np.asarray(table["side"], dtype=np.int8),
            stains=tuple(
                None if s is None else Stain(tuple(s[0]), tuple(s[1])) for s in table["stains"]
            ),
            folder=folder,
        )

    @cached_property
    def scheme(self) -> Scheme:
        return load_scheme(self.plan.labels.scheme)

    def rows(self, lab: int, side: int) -> npt.NDArray[np.int64]:
        """Images of one lab on one side; of all labs for ``central``, whose number is K."""
        held_N = self.side_N == side
        return np.flatnonzero(held_N if lab == len(self.names) else held_N & (self.lab_N == lab))

    def counts_KC(self, side: int) -> npt.NDArray[np.int64]:
        """Exactly labelled images of each lab and class on one side."""
        exact = self.cells.class_N
        rows = np.flatnonzero((self.side_N == side) & (exact >= 0))
        classes = self.cells.targets_NC.shape[1]
        flat = np.bincount(
            self.lab_N[rows] * classes + exact[rows], minlength=len(self.names) * classes
        )
        return flat.reshape(len(self.names), classes)

    def lab(self, number: int, run: str = FEDERATION) -> Lab:
        """Lab ``number`` of K, or ``central`` for K itself, as it takes part in ``run``."""
        plan = self.plan if run == FEDERATION else baseline_plan(self.plan)
        name = CENTRAL if number == len(self.names) else self.names[number]
        cells = stained(self.cells, self.lab_N, self.stains)
        train = cells.take(self.rows(number, 1))
        return Lab(
            name=name,
            plan=plan,
            scheme=self.scheme,
            train=train,
            test=cells.take(self.rows(number, 2)),
            calibration=cells.take(self.rows(number, 3)),
            absent_C=absent_classes(plan, self.scheme, train),
            start=self.folder / START_FILE,
            memory=FolderMemory(self.folder / "memory", name),
            # Without privacy nothing is counted: these patients are of public images, or made up.
            budget=None
            if plan.privacy.unit == "none"
            else VirtualBudget(self.ledger_of(name), plan, self.declared(number)),
            declared_patients=self.declared(number),
            secure=open_secure_lab(self.folder, plan, name),
            randomness=lambda order: SimulatedRandomness(
                self.plan.train.seed, order.run, name, order.kind, order.round
            ),
            stream=FEDERATION if run == FEDERATION else "baseline",
        )

    def weights(self) -> dict[str, float]:
        """What each lab declares in public, by name: its patients, or its images roughly."""
        found = {}
        for k, name in enumerate(self.names):
            declared = self.declared(k)
            images = public_bound([float(len(self.rows(k, 1)))])
            found[name] = images if declared is None else float(declared)
        return found

    def ledger_of(self, name: str) -> Path:
        """The ledger file of one lab: a machine of its own would have its own."""
        return self.folder / "ledgers" / f"{name}.sqlite"

    def declared(self, number: int) -> int | None:
        """What a lab declares: the plan's figure, else its training patients (or images)."""
        if self.plan.privacy.unit == "none":
            return None
        rows = self.rows(number, 1)
        if number < len(self.names):
            declared = declared_of(self.plan, self.names[number])
            if declared is not None:
                return declared
        if self.plan.privacy.unit == "image" or self.cells.patients_N is None:
            return len(rows)
        return len(np.unique(self.cells.patients_N[rows]))

    @property
    def patients(self) -> int | None:
        """What all labs declare together; None without privacy."""
        declared = [self.declared(number) for number in range(len(self.names))]
        return sum(count or 0 for count in declared) or None


def baseline_plan(plan: Plan) -> Plan:
    """The plan of the central model and the labs' own: as many epochs, nothing federated.

    Rounds that are shorter than an epoch last one here: nobody waits to be averaged.
    ``simulation.baseline_train`` may say otherwise.
    """
    train = plan.train
    if train.steps_per_round is None and train.local_epochs < 1:
        epochs = train.rounds * train.local_epochs
        rounds = max(1, round(epochs))
        train = replace(train, rounds=rounds, local_epochs=epochs / rounds)
    plan = replace(plan, train=train, strategy=StrategySpec())
    return with_baseline_train(replace(plan, secure_aggregation=SecureAggregation()))


def cut(plan: Plan, cells: Cells, partition: Partition, test_N: Any, folder: Path) -> VirtualLabs:
    """The labs of a partition; what ``+missing`` took away stays out of training."""
    side_N = np.where(test_N, 2, np.where(partition.keep_N, 1, 0)).astype(np.int8)
    if plan.evaluation.calibration:
        for lab in range(len(partition.labs)):
            rows = np.flatnonzero((side_N == 1) & (partition.lab_N == lab))
            side_N[rows[kept_for_calibration(cells.take(rows), plan)]] = 3
    return VirtualLabs(
        plan, partition.labs, cells, partition.lab_N, side_N, partition.stains, folder
    )


@dataclass(frozen=True)
class VirtualBudget:
    """A virtual lab's ledger; the simulation approves its own plan, once per run.

    Runs (the federation, a baseline) are alternatives, not successive releases: each draws on a
    pool of its own.
    """

    path: Path
    plan: Plan
    declared_patients: int | None

    def reserve(self, order: Order) -> None:
        terms = terms_of(self.plan)
        assert terms is not None
        assert self.declared_patients is not None
        book = self._of(order)
        if not book.approved(order.plan_sha256):
            book.approve(order.plan_sha256, terms, self.declared_patients)
        book.reserve(order)

    def release(self, order: Order, parts: Parts) -> None:
        self._of(order).release(order, parts)

    def _of(self, order: Order) -> LedgerBudget:
        return LedgerBudget(self.path, order.run, "simulation", self.plan.privacy.unit)


def warm_up(plan_file: Path, folder: Path) -> None:
    """What a worker can do before the labs are cut: import torch, build the start model."""
    import torch

    plan = load_plan(plan_file)
    torch.set_num_threads(plan.train.threads)
    if read_start(folder) is None:
        write_start(plan, folder)  # workers that do so at the same time write the same bytes


def open_app(folder: Path, *, on_step: OnStep | None = None) -> ClientApp:
    """The app of the virtual labs that were saved in ``folder``."""
    return virtual_app(VirtualLabs.load(folder), on_step=on_step)


def virtual_app(labs: VirtualLabs, *, on_step: OnStep | None = None) -> ClientApp:
    """The app of all virtual labs; a context's ``partition-id`` says which one answers."""

    def number_of(context: Context) -> int:
        return int(context.node_config["partition-id"])

    opened: dict[tuple[int, bool], Lab] = {}

    def open_lab(context: Context, run: str) -> Lab:
        key = (number_of(context), run == FEDERATION)
        if key not in opened:
            while len(opened) >= 64:  # bounded: there may be thousands of labs
                del opened[next(iter(opened))]
            opened[key] = labs.lab(key[0], run)
        return opened[key]

    def fail_on_purpose(
        message: Message, context: Context, call_next: Callable[[Message, Context], Message]
    ) -> Message:
        if message.metadata.message_type != "train":
            return call_next(message, context)
        order = unpack_order(message)
        if order.run != FEDERATION:
            return call_next(message, context)
        plan, name = labs.plan, labs.names[number_of(context)]
        fate = fate_of(plan.simulation.population, order.round, labs.names, plan.train.seed)
        if name in fate.gone:
            return Message(Error(ERROR_CODE, "dropped out (simulated)"), reply_to=message)
        reply = call_next(message, context)
        if name in fate.late:
            return Message(Error(ERROR_CODE, "late (simulated straggler)"), reply_to=message)
        if name in fate.nan and reply.has_content():
            return Message(_with_nan(reply), reply_to=message)
        return reply

    return lab_app(open_lab, mods=[fail_on_purpose], on_step=on_step, tell_exact=True)


def _with_nan(reply: Message) -> RecordDict:
    header, parts = read_parts(reply, np.float32)
    broken = {name: np.full_like(values, np.nan) for name, values in parts.items()}
    values: dict[str, Any] = dict(header)
    return pack_update(Update(**values, parts=broken))
