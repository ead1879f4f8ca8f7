"""A lab as it takes part in a run: its images, their split, its budget, what it keeps.

N images, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
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
from cytofed.client.reader import fitting_map, patient_columns
from cytofed.client.secure import SecureLab
from cytofed.client.settings import Settings
from cytofed.client.split import Bools, hold_out, hold_out_alone, image_keys, test_split, units
from cytofed.documents import Offer
from cytofed.encoder import Given, is_shipped, refuse_seen, shipped
from cytofed.errors import InputError, VerificationError
from cytofed.labels import Scheme, load_map, load_scheme
from cytofed.messages import Order, Update
from cytofed.plan import Model, Plan
from cytofed.privacy.ledger import Ledger, Limits
from cytofed.start import START_FILE, model_of, read_start, write_start

_log = logging.getLogger("cytofed.lab")


def absent_classes(plan: Plan, scheme: Scheme, train: Cells) -> npt.NDArray[np.bool_]:
    """Classes masked in a lab's loss, (C,).

    ``missing``: without differential privacy those without a training image; with it, as with
    ``declared``, only what the label maps declare, because the data itself must not decide.
    """
    if plan.train.mask_absent == "none":
        return np.zeros(len(scheme.codes), dtype=bool)
    if plan.train.mask_absent == "missing" and plan.privacy.unit == "none":
        return np.asarray(~train.targets_NC.any(axis=0))
    # Where no image is left, the maps still say the same: no patient decides about the mask.
    used = np.unique(train.source_N) if len(train) else np.arange(len(train.sources))
    declared = frozenset.intersection(*(train.sources[k].listing.absent for k in used.tolist()))
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

    def check_images(self, plan_sha256: str, images: Images) -> None:
        """That no patient has more images than the price of a plan counts on.

        Errors: InputError, of which the coordinator is told the kind alone: not how many they are.
        """
        with self._open() as book:
            holds = [
                hold
                for hold in book.holds()
                if (hold.federation, hold.plan_sha256) == (self.federation, plan_sha256)
                and hold.state == "active"
            ]
        found = images.largest_patient
        for most in [hold.cost.images_per_patient for hold in holds]:
            if most is not None and (found is None or found > most):
                raise InputError(
                    f"a patient here has {found or 'nobody knows how many'} images, the price of "
                    f"plan {plan_sha256[:12]} counts on images_per_patient={most} at most",
                    hint="correct images_per_patient in client.yaml, reject the plan and approve "
                    "it anew",
                )

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

    @property
    def largest_patient(self) -> int | None:
        """Images of the patient who has most; None where nobody knows whose they are."""
        parts = [part.patients_N for part in (self.train, self.test, self.calibration)]
        known = [part_N for part_N in parts if part_N is not None]
        if len(known) < len(parts):
            return None
        counts = np.unique(np.concatenate(known), return_counts=True)[1]
        return int(counts.max(initial=0))


def kept_for_calibration(train: Cells, plan: Plan) -> npt.NDArray[np.bool_]:
    """Which of the images that are not for the test stay out of training too, (N,).

    Patients and images that look the same are on one side; of data that cannot be divided so,
    nothing is kept. Under differential privacy nothing is: a temperature is not released.
    """
    fraction = plan.evaluation.calibration if plan.privacy.unit == "none" else 0.0
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


def indivisible(cells: Cells, plan: Plan) -> npt.NDArray[np.int64]:
    """Number of each image's unit, (N,): what is never divided between sides or virtual labs.

    Under differential privacy a patient alone (an image, where that is the unit); else patients and
    images that look the same.
    """
    if _each_alone(cells, plan):
        whose_N = cells.patients_N if plan.privacy.unit == "patient" else None
        return units(np.arange(len(cells)), whose_N)
    return units(near_duplicate_groups(cells.dhash_N, images=cells.images), cells.patients_N)


def held_out(
    cells: Cells, plan: Plan, unit_N: npt.NDArray[np.int64], *, exact: bool = False
) -> Bools:
    """Which images are kept for scores, (N,). ``unit_N``: of ``indivisible``.

    Without privacy whole units by class quotas. With it each patient (each image where that is the
    unit) is decided by its own identifier alone, and nobody is held out where no scores are
    released: they would be lost to training. ``exact``: scores are told whatever the plan releases,
    as a simulation does.
    """
    settings, seed = plan.evaluation, plan.train.seed
    if not _each_alone(cells, plan):
        return hold_out(
            cells.class_N,
            unit_N,
            cells.paths(),
            cells.dhash_N,
            cells.source_N,
            fraction=settings.fraction,
            fold=settings.fold,
            seed=seed,
        )
    if not (plan.releases_scores or exact):
        return np.zeros(len(cells), dtype=np.bool_)
    owner_N = cells.own_patients() if plan.privacy.unit == "patient" else cells.file_sha256()
    return hold_out_alone(owner_N, fraction=settings.fraction, fold=settings.fold, seed=seed)


def _each_alone(cells: Cells, plan: Plan) -> bool:
    """Whether there is somebody to protect; pseudo-patients are made up after the split."""
    unit = plan.privacy.unit
    return unit == "image" or (unit == "patient" and cells.patients_N is not None)


def open_images(plan: Plan, settings: Settings, folder: Path) -> Images:
    """Read (or find cached) all images of the lab and hold out the plan's share of them.

    ``folder``: the lab's place for the run's files, with the start model where one was given.

    Guarantees: under differential privacy, what becomes of one patient's images (whether they are
    used, for what, and their pixels) depends on no image, file or row of another patient.
    Errors: InputError for data that cannot be used, with what to do.
    """
    private = plan.privacy.unit != "none"
    if private and settings.labels is None:  # guard: declared-labels
        raise InputError(
            "labels is empty in client.yaml: under differential privacy the label map is declared, "
            "or one patient's folders would choose the map, and the scale, of all others",
            hint=_map_to_set(settings.data),
        )
    cells = open_cells(
        (settings.data,),
        load_scheme(plan.labels.scheme),
        maps=None if settings.labels is None else [load_map(settings.labels)],
        patients=settings.patients,
        size_px=plan.labels.scale.size_px,
        field_um=plan.labels.scale.field_um,
        cache_dir=settings.cache or default_cache_dir(),
        alone=private,
    )
    if plan.privacy.unit == "patient" and cells.patients_N is None:  # guard: whose-images
        raise InputError(
            "the plan protects patients, and the data does not say which image is whose",
            hint=_patients_to_set(settings.data),
        )
    if private and not len(cells):
        _log.warning("no image below %s can be used: this lab gives noise alone", settings.data)
    if private:
        refuse_seen(model_of(plan, folder).start, cells.file_sha256())
    test_N = held_out(cells, plan, indivisible(cells, plan))
    train = cells.take(np.flatnonzero(~test_N))
    kept_N = kept_for_calibration(train, plan)
    return Images(
        train=train.take(np.flatnonzero(~kept_N)),
        test=cells.take(np.flatnonzero(test_N)),
        calibration=train.take(np.flatnonzero(kept_N)),
    )


def _map_to_set(data: Path) -> str:
    fits = fitting_map(data)
    return f"set labels: {fits}" if fits else "name the map of your labels, or write one"


def _patients_to_set(data: Path) -> str:
    columns = (*patient_columns(data), "patient")
    return f"set patients in client.yaml, for example patients: column:{columns[0]}"


def parameters_of(plan: Plan) -> int:
    """P: how many numbers of the plan's net are trained. Builds, reads and writes nothing.

    Errors: InputError for a plan that starts from a file (plans open no files at a lab), or for a
    net that no lab could train.
    """
    start = plan.model.start
    if start != "random" and not is_shipped(start) and Given.named(start) is None:
        raise InputError(
            f"plan {plan.sha256[:12]} starts from {start!r:.60}, a file and no name",
            hint=f"labs start from random weights or a shipped encoder: {', '.join(shipped())}",
        )
    return _size_of(plan.model, len(load_scheme(plan.labels.scheme).codes))


def numbers_of(plan: Plan) -> int:
    """How many numbers a model file of the plan's net has. Errors: as ``parameters_of``."""
    return _numbers_of(plan.model, len(load_scheme(plan.labels.scheme).codes))


@lru_cache(64)
def _numbers_of(model: Model, classes: int) -> int:
    from cytofed import models

    return models.numbers(model, classes)


@lru_cache(64)
def _size_of(model: Model, classes: int) -> int:
    from cytofed import models

    return models.shapes(model, classes).size


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
        "patient",
        settings.limits.of_ledger(),
    )
    if plan.privacy.unit == "image":
        budget.check_images(plan.sha256, images)
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
        budget=budget,
        declared_patients=settings.patients_declared if private else None,
        secure=secure,
        updates=OutboxUpdates(outbox, federation, private),
    )
