"""A lab of made-up patients with a coordinator of its own, in a temporary folder.

What it runs is the daemon: its offers, its ledger and outbox, its orders, sealed and opened. Only
the network is missing. Whoever asks it sees what a coordinator would see, and nothing else.

Shapes: H W pixels.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from cytofed.arrays import Float32, Parts
from cytofed.client.daemon import Daemon
from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import EgressLog
from cytofed.documents import COORDINATOR, Member, Offer, Roster
from cytofed.documents import Start as StartOfRun
from cytofed.errors import VerificationError
from cytofed.files import write_atomically
from cytofed.labels import load_scheme
from cytofed.messages import (
    BadMessage,
    Kind,
    Order,
    Update,
    new_message,
    pack_order,
    unpack_evaluation,
    unpack_update,
)
from cytofed.plan import Plan
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.noise import Randomness, SimulatedRandomness
from cytofed.privacy.sealing import Context as Place
from cytofed.privacy.sealing import Direction, seal, unseal
from cytofed.sealed_message import (
    REFUSAL,
    Parcel,
    pack_content,
    pack_parcel,
    text_of,
    unpack_content,
    unpack_parcel,
)
from cytofed.start import Start, read_start, write_start
from cytofed.strategies import make_strategy

FEDERATION = "rehearsal"
SCHEME = "pbc-8"
UNLABELLED = "any"
"""a label that allows every class: no gradient comes of it, and no score counts it"""
_SIDE_PX = 16
_MEMORY = "/dev/shm"
"""a folder in memory, where there is one: each order waits for the disk many times"""
_BUDGET = 1e12
"""epsilon: nothing that is made up is spent"""


@dataclass(frozen=True)
class Patient:
    """A made-up patient: images of noise with one label."""

    name: str
    label: str
    cells: int


@dataclass(frozen=True)
class MadeUp:
    """A temporary folder with a coordinator, images and labs. Made by ``made_up``."""

    root: Path
    declared: int
    _stack: ExitStack = field(repr=False)
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)
    """no lab answers another order once it is set: ``Stopped`` instead"""
    coordinator: Identity = field(default_factory=lambda: Identity.generate(COORDINATOR))
    _identities: dict[str, Identity] = field(default_factory=dict, repr=False)
    _starts: dict[str, Start] = field(default_factory=dict, repr=False)
    _folders: list[Path] = field(default_factory=list, repr=False)
    _open_labs: list[MadeUpLab] = field(default_factory=list, repr=False)

    def lab(
        self,
        patients: Sequence[Patient],
        *,
        name: str = "lab-1",
        randomness: Callable[[Order], Randomness] | None = None,
    ) -> MadeUpLab:
        """A lab with these patients, at work. Labs of one name have the same keys."""
        identity = self._identities.setdefault(name, Identity.generate(name))
        root = self._new_folder()
        data = root / "images"
        data.mkdir(parents=True)
        for patient in patients:
            (data / patient.name).symlink_to(self._images(patient))
        _write_directory(root, identity, self.coordinator, data, self._labels, self.declared)
        return self._open(root, identity, randomness)

    def restarted(self, lab: MadeUpLab) -> MadeUpLab:
        """A lab with a copy of all that the other has on its disk."""
        root = self._new_folder()
        shutil.copytree(lab.root, root, symlinks=True)
        yaml = root / "client.yaml"
        yaml.write_text(yaml.read_text().replace(str(lab.root), str(root)))
        return self._open(root, lab.identity, None)

    def start(self, plan: Plan) -> Start:
        """The start model of a plan, as any coordinator makes it."""
        if plan.sha256 not in self._starts:
            folder = self.root / f"start-{len(self._starts)}"
            folder.mkdir()
            write_start(plan, folder)
            found = read_start(folder)
            assert found is not None
            self._starts[plan.sha256] = found
        return self._starts[plan.sha256]

    def _new_folder(self) -> Path:
        self._folders.append(self.root / f"lab-{len(self._folders)}")
        return self._folders[-1]

    def _open(
        self, root: Path, identity: Identity, randomness: Callable[[Order], Randomness] | None
    ) -> MadeUpLab:
        lab = MadeUpLab(self, root, identity, randomness)
        self._stack.enter_context(lab.daemon.at_work())
        self._open_labs.append(lab)
        return lab

    def _images(self, patient: Patient) -> Path:
        """The patient's folder, the same for all labs that have him."""
        folder = self.root / "patients" / f"{patient.name}-{patient.label}-{patient.cells}"
        if not folder.is_dir():
            (folder / patient.label).mkdir(parents=True)
            numbers = SimulatedRandomness(0, "made-up patient", patient.name)
            uniform = numbers.uniforms(patient.cells * _SIDE_PX * _SIDE_PX * 3)
            pixels_NHW3 = (256 * uniform).astype(np.uint8).reshape(-1, _SIDE_PX, _SIDE_PX, 3)
            for number, pixels_HW3 in enumerate(pixels_NHW3):
                path = folder / patient.label / f"{number:03}.png"
                Image.fromarray(pixels_HW3).save(path, compress_level=0)
        return folder

    @property
    def orders(self) -> int:
        """Orders that its labs have answered."""
        return sum(lab.orders for lab in self._open_labs)

    @property
    def _labels(self) -> Path:
        """A label map with the scheme's own codes, and one label that says nothing."""
        codes = load_scheme(SCHEME).codes
        lines = [f"scheme: {SCHEME}", "labels:", *(f"  {code}: {code}" for code in codes)]
        path = self.root / "labels.yaml"
        if path.is_file():
            return path
        path.write_text("\n".join([*lines, f"  {UNLABELLED}: [{', '.join(codes)}]", ""]))
        return path


class Stopped(Exception):
    """The rehearsal was ended before its end, and says nothing."""


@contextmanager
def made_up(*, declared: int, stopping: threading.Event | None = None) -> Iterator[MadeUp]:
    """``declared``: patients that every lab states, whatever it has."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    prefix = "cytofed-rehearsal-"
    with TemporaryDirectory(prefix=prefix, dir=memory) as folder, ExitStack() as stack:
        yield MadeUp(Path(folder), declared, stack, stopping or threading.Event())


class MadeUpLab:
    """One lab, as its coordinator meets it."""

    def __init__(
        self,
        world: MadeUp,
        root: Path,
        identity: Identity,
        randomness: Callable[[Order], Randomness] | None,
    ) -> None:
        self.root, self.identity, self.orders = root, identity, 0
        self._world = world
        self._starts: dict[str, tuple[Offer, bytes]] = {}
        self.daemon = Daemon(
            ClientDirectory(root), note=lambda _text: None, rehearsal=True, randomness=randomness
        )

    def approve(self, plan: Plan) -> None:
        """Have a plan offered, approved by the lab's own rule, and its run started."""
        self._started(plan)

    def train(self, plan: Plan, round_: int, **changed: Float32) -> Update:
        """The update of a round; ``changed``: parts that are not as at the start."""
        start = self._world.start(plan)
        up = make_strategy(plan.strategy).lab.up
        content = self._ask(plan, "train", round_, self._parts(plan, round_, changed))
        try:
            return unpack_update(_message(content), parts=up, size=start.manifest.size)
        except BadMessage as error:
            raise VerificationError(f"rehearsal ({plan.name}): {error.message}") from None

    def scores(self, plan: Plan, round_: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The confusion matrix of a round, all counts in one row."""
        content = self._ask(plan, "evaluate", round_, self._parts(plan, round_, {}))
        classes = len(load_scheme(plan.labels.scheme).codes)
        found = unpack_evaluation(_message(content), classes=classes, noised=True)
        return np.asarray(found.tally.confusion_CC.ravel())

    def _parts(self, plan: Plan, round_: int, changed: Mapping[str, Float32]) -> Parts:
        """Weights of a round that differ from those of another by next to nothing."""
        weights_P = self._world.start(plan).weights_P
        weights_P[-1] += np.float32(1e-5 * (round_ - 1))
        strategy = make_strategy(plan.strategy)
        zeros = {name: np.zeros_like(weights_P) for name in strategy.down if name != "weights"}
        return {"weights": weights_P, **zeros, **changed}

    def _started(self, plan: Plan) -> tuple[Offer, bytes]:
        if plan.sha256 not in self._starts:
            world = self._world
            member = Member(self.identity.public, "0" * 64, world.declared)
            offer = Offer(plan.name.replace(" ", "-"), plan, Roster(FEDERATION, 1, (member,)))
            content = RecordDict(
                {"offer": ConfigRecord({"document": offer.signed(world.coordinator)})}
            )
            told = self._answered(_message(content, "query.offer"), plan).get("answer")
            decision = told.get("decision") if isinstance(told, ConfigRecord) else None
            if not isinstance(decision, bytes) or not decision:
                raise VerificationError(f"rehearsal ({plan.name}): the plan was not approved")
            start = StartOfRun(
                offer.run, plan.sha256, offer.roster.sha256, {self.identity.name: decision}
            )
            self._starts[plan.sha256] = offer, start.signed(world.coordinator)
        return self._starts[plan.sha256]

    def _ask(self, plan: Plan, kind: Kind, round_: int, parts: Parts) -> RecordDict:
        """The content of the answer to an order, opened by the coordinator."""
        offer, start = self._started(plan)
        if self._world.stopping.is_set():
            raise Stopped
        self.orders += 1
        order = Order(kind, offer.run, round_, plan.sha256, parts)
        manifest, payload = pack_content(pack_order(order))
        sealed = seal(
            payload,
            self._place(offer, round_, kind, to_lab=True),
            sender=self._world.coordinator,
            receiver=self.identity.public,
            manifest=manifest,
        )
        parcel = pack_parcel(Parcel(offer.run, round_, 0, kind, sealed, start))
        answer = self._answered(_message(parcel, kind, group=str(round_)), plan)
        got = unpack_parcel(_message(answer))
        opened = unseal(
            got.sealed,
            self._place(offer, round_, got.content, to_lab=False),
            sender=self.identity.public,
            receiver=self._world.coordinator,
        )
        content = unpack_content(opened.manifest, opened.payload)
        if got.content == REFUSAL:
            reason = text_of(content, "reason")
            raise VerificationError(f"rehearsal ({plan.name}): the order was refused: {reason}")
        return content

    def _answered(self, message: Message, plan: Plan) -> RecordDict:
        """Errors: VerificationError where the lab refuses."""
        answer = self.daemon.respond(message)
        if answer is None or answer.content is None:
            reason = answer.reason if answer is not None else "no answer"
            raise VerificationError(f"rehearsal ({plan.name}): the order was refused: {reason}")
        answer.sent()
        return answer.content

    def _place(self, offer: Offer, round_: int, content: str, *, to_lab: bool) -> Place:
        lab = self.identity.name
        return Place(
            federation=offer.federation,
            run=offer.run,
            plan_sha256=offer.plan.sha256,
            roster_sha256=offer.roster.sha256,
            round=round_,
            slot=0,
            sender=COORDINATOR if to_lab else lab,
            receiver=lab if to_lab else COORDINATOR,
            direction=Direction.TO_LAB if to_lab else Direction.TO_COORDINATOR,
            content=content,
        )


def _message(content: RecordDict, kind: str = "train", *, group: str = "") -> Message:
    return new_message(content, kind=kind, node=0, group=group, ttl_s=60.0)


def _write_directory(
    root: Path,
    identity: Identity,
    coordinator: Identity,
    data: Path,
    labels: Path,
    declared: int,
) -> None:
    """A lab's directory as ``join`` leaves it, but for what only the network needs."""
    settings = {
        "data": str(data),
        "labels": str(labels),
        "patients": "folder:1",
        "patients_declared": declared,
        "ledger": str(root / "ledger.sqlite"),
        "cache": str(root.parent / "cache"),
        "limits": {"max_epsilon": _BUDGET},
        "auto_approve": {
            "enabled": True,
            "max_epsilon": _BUDGET,
            "secure_aggregation": False,
            "known_labs_only": False,
        },
    }
    membership = {
        "federation": FEDERATION,
        "lab": identity.name,
        "address": "made-up:0",
        "fingerprint": coordinator.public.fingerprint,
    }
    write_atomically(root / "client.yaml", json.dumps(settings))  # JSON is YAML
    write_atomically(root / "identity.key", identity.to_bytes(), mode=0o600)
    write_atomically(root / "storage.key", os.urandom(32), mode=0o600)
    write_atomically(root / "coordinator.cbor", coordinator.public.to_bytes())
    write_atomically(root / "federation.json", json.dumps(membership))
    for sub in ("plans", "runs", "models", "outbox"):
        (root / sub).mkdir(mode=0o700, exist_ok=True)
    EgressLog.create(root / "egress.log", identity)
    Ledger.create(root / "ledger.sqlite")
