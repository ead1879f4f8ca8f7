"""A lab as it takes part in a run: its images, their split, its budget, what it keeps.

N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytofed.arrays import Parts, parts_sha256
from cytofed.client.app import Lab, Memory
from cytofed.client.budget import LedgerBudget, ledger_order
from cytofed.client.cache import default_cache_dir
from cytofed.client.cells import Cells, open_cells
from cytofed.client.check import near_duplicate_groups
from cytofed.client.outbox import Outbox, SameUpdate
from cytofed.client.policy import ledger_federation
from cytofed.client.secure import SecureLab
from cytofed.client.settings import Settings
from cytofed.client.split import hold_out, image_keys, test_split, units
from cytofed.documents import Offer
from cytofed.encoder import Given, is_shipped, refuse_seen, shipped
from cytofed.errors import InputError, VerificationError
from cytofed.labels import Scheme, load_map, load_scheme
from cytofed.messages import Order, Update
from cytofed.plan import Plan
from cytofed.privacy.ledger import Ledger, Limits
from cytofed.start import START_FILE, model_of, read_start, write_start


def absent_classes(plan: Plan, scheme: Scheme, train: Cells) -> npt.NDArray[np.bool_]:
    """Classes masked in a lab's loss, (C,).

    ``missing``: without differential privacy those without a training image; with it, as with
    ``declared``, only what the label maps declare, because the data itself must not decide.
    """
    if plan.train.mask_absent == "none":
        return np.zeros(len(scheme.codes), dtype=bool)
    if plan.train.mask_absent == "missing" and plan.privacy.unit == "none":
        return np.asarray(~train.targets_NC.any(axis=0))
    used = [train.sources[number].listing.absent for number in np.unique(train.source_N)]
    declared = frozenset.intersection(*used) if used else frozenset()
    return np.array([code in declared for code in scheme.codes])


@dataclass(frozen=True)
class LimitedBudget(LedgerBudget):
    """A budget under the lab's own limits, which it may have lowered since it approved."""

    limits: Limits = field(default_factory=Limits)

    @contextmanager
    def _open(self) -> Iterator[Ledger]:
        opened = Ledger.open(self.path, pool=self.pool, unit=self.unit, limits=self.limits)
        with opened as book:
            yield book

    def release(self, order: Order, parts: Parts) -> None:
        """Name what may leave; ``settle`` says that it has."""
        with self._open() as book:
            book.release(self._entry(order), parts_sha256(parts))

    def settle(self, order: Order) -> None:
        """The order was answered. Settling twice changes nothing."""
        with self._open() as book:
            book.settle(self._entry(order))


@dataclass(frozen=True)
class OutboxUpdates:
    """The outbox as the place where a round's update is kept for a second attempt."""

    outbox: Outbox = field(repr=False)
    federation: str
    private: bool
    """an update is paid for, so it may not be lost"""

    def load(self, order: Order) -> Update | None:
        found = self.outbox.take(ledger_order(order, self.federation))
        if not isinstance(found, SameUpdate):
            return None
        header: dict[str, Any] = dict(found.header)
        return Update(**header, parts=found.parts)

    def save(self, order: Order, update: Update) -> None:
        header: dict[str, int | float | str] = {
            "lab": update.lab,
            "run": update.run,
            "round": update.round,
            "weight": update.weight,
            "loss": update.loss,
            "train_s": update.train_s,
        }
        mine = ledger_order(order, self.federation)
        self.outbox.keep_update(mine, header, update.parts, durable=self.private)


@dataclass(frozen=True)
class Images:
    """A lab's images for one plan, split."""

    train: Cells = field(repr=False)
    test: Cells = field(repr=False)
    calibration: Cells = field(repr=False)


def kept_for_calibration(train: Cells, plan: Plan) -> npt.NDArray[np.bool_]:
    """Which of the images that are not for the test stay out of training too, (N,).

    Patients and images that look the same are on one side; of data that cannot be divided so,
    nothing is kept.
    """
    fraction = plan.evaluation.calibration
    unit_N = units(train.dhash_N, train.patients_N)
    if fraction == 0 or len(np.unique(unit_N)) < 2:
        return np.zeros(len(train), dtype=bool)
    return test_split(
        train.class_N,
        unit_N,
        image_keys(train.paths(), train.dhash_N),
        fraction=fraction,
        seed=plan.train.seed,
    )


def open_images(plan: Plan, settings: Settings, folder: Path) -> Images:
    """Read (or find cached) all images of the lab and hold out the plan's share of them.

    ``folder``: the lab's place for the run's files, with the start model where one was given.

    Errors: InputError for data that cannot be used, with what to do.
    """
    cells = open_cells(
        (settings.data,),
        load_scheme(plan.labels.scheme),
        maps=None if settings.labels is None else [load_map(settings.labels)],
        patients=settings.patients,
        size_px=plan.labels.scale.size_px,
        field_um=plan.labels.scale.field_um,
        cache_dir=default_cache_dir(),
    )
    if plan.privacy.unit == "patient" and cells.patients_N is None:
        raise InputError(
            "the plan protects patients, and the data does not say which image is whose",
            hint="set patients in client.yaml, for example patients: column:patient",
        )
    if plan.privacy.unit != "none":
        refuse_seen(model_of(plan, folder).start, cells.file_sha256())
    groups_N = near_duplicate_groups(cells.dhash_N, images=cells.images)
    test_N = hold_out(
        cells.class_N,
        units(groups_N, cells.patients_N),
        cells.paths(),
        cells.dhash_N,
        cells.source_N,
        fraction=plan.evaluation.fraction,
        fold=plan.evaluation.fold,
        seed=plan.train.seed,
    )
    train = cells.take(np.flatnonzero(~test_N))
    kept_N = kept_for_calibration(train, plan)
    return Images(
        train=train.take(np.flatnonzero(~kept_N)),
        test=cells.take(np.flatnonzero(test_N)),
        calibration=train.take(np.flatnonzero(kept_N)),
    )


def parameters_of(plan: Plan) -> int:
    """P: how many numbers of the plan's net are trained. Builds, reads and writes nothing.

    Errors: InputError for a plan that starts from a file (plans open no files at a lab), or for a
    net that no lab could train.
    """
    from cytofed import models

    start = plan.model.start
    if start != "random" and not is_shipped(start) and Given.named(start) is None:
        raise InputError(
            f"plan {plan.sha256[:12]} starts from {start!r:.60}, a file and no name",
            hint=f"labs start from random weights or a shipped encoder: {', '.join(shipped())}",
        )
    return models.shapes(plan.model, len(load_scheme(plan.labels.scheme).codes)).size


def make_start(plan: Plan, folder: Path, *, parameters: int) -> None:
    """The start model of an approved plan, written to ``folder`` the first time.

    Errors: RefusedError where the file that the plan names has not come yet; VerificationError for
    one of another size than was approved.
    """
    model_of(plan, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = read_start(folder)
    if start is None:
        write_start(plan, folder)
        start = read_start(folder)
        assert start is not None
    if start.manifest.size != parameters:
        raise VerificationError(
            f"from the start model {start.manifest.size} parameters are trained, {parameters} "
            "were approved"
        )


def open_lab(
    offer: Offer,
    settings: Settings,
    images: Images,
    *,
    name: str,
    folder: Path,
    outbox: Outbox,
    memory: Memory,
    secure: SecureLab | None,
) -> Lab:
    """The lab as it takes part in an approved run. ``folder``: its place for the run's files, with
    the start model that ``make_start`` wrote."""
    plan = offer.plan
    scheme: Scheme = load_scheme(plan.labels.scheme)
    federation = ledger_federation(offer.federation, name)
    budget = LimitedBudget(
        settings.ledger,
        settings.pool,
        federation,
        plan.privacy.unit,
        settings.limits.of_ledger(),
    )
    private = plan.privacy.unit != "none"
    return Lab(
        name=name,
        plan=plan,
        scheme=scheme,
        train=images.train,
        test=images.test,
        calibration=images.calibration,
        absent_C=absent_classes(plan, scheme, images.train),
        start=folder / START_FILE,
        memory=memory,
        budget=budget if private else None,
        declared_patients=settings.patients_declared if private else None,
        secure=secure,
        updates=OutboxUpdates(outbox, federation, private),
    )
