"""Shadow models: a run's training again and again, each on a random half of its patients.

What membership inference compares a released model with (``cytofed.simulations.membership``).
They are cheap on purpose, and ``Recipe.reduced`` says how: one training over all labs' images
instead of rounds, fewer steps, and a small net instead of a large one.

Started as ``python -m cytofed.simulations.shadows RUN FIRST STEP``: scores of the released model
(number 0) and of shadows 1 to ``SHADOWS``, of which this process makes FIRST, FIRST + STEP, ...
Each is written when it is done and is not made again, so that an interrupted audit goes on. All
randomness comes from the plan's seed.

Shapes: N images asked about, U patients, S shadows, C classes, F features.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

import cytofed
from cytofed.arrays import Float32
from cytofed.canonical import digest
from cytofed.client.cells import Cells
from cytofed.client.check import near_duplicate_groups
from cytofed.client.opening import absent_classes
from cytofed.client.split import image_keys
from cytofed.errors import InputError
from cytofed.files import write_atomically
from cytofed.plan import Model, Plan, load_plan
from cytofed.privacy.noise import SimulatedRandomness
from cytofed.privacy.terms import Terms, terms_of
from cytofed.seeds import derive
from cytofed.simulations.split import generator, pseudo_patients, units
from cytofed.simulations.virtual import VirtualLabs, stained

if TYPE_CHECKING:
    from cytofed.models import Classifier

SHADOWS = 16
SUBJECTS = 1000
"""images asked about, members and others in equal numbers where there are so many"""
PASSES = 10_000
"""images that one shadow net is trained on, each as often as it comes"""
HEAD_STEPS = 4_000
"""steps of one shadow head, which cost little"""
_WIDEST = 24
"""a wider net, or one of another kind, has this file's small net in its stead"""
_SMALL = Model(arch="cytonet", width=16)
_USUAL_PX = 48

Bools = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Subjects:
    """The images asked about: whose they are, which were trained on, which shadow has which."""

    plan: Plan
    labs: VirtualLabs
    cells: Cells
    patients_N: Texts
    member_N: Bools
    pseudo: bool
    """patients are made up, since the data names none"""

    @cached_property
    def names_U(self) -> Texts:
        return np.unique(self.patients_N)

    @cached_property
    def patient_N(self) -> npt.NDArray[np.int64]:
        """Number of each image's patient in ``names_U``."""
        return np.searchsorted(self.names_U, self.patients_N)

    @cached_property
    def in_SU(self) -> Bools:
        """Whether shadow s trains on patient u: each patient is in exactly half of the shadows."""
        rng = generator(self.plan.train.seed, "shadow halves")
        drawn_SU = rng.random((SHADOWS, len(self.names_U)))
        half_SU: Bools = drawn_SU.argsort(axis=0).argsort(axis=0) < SHADOWS // 2
        return half_SU


def subjects_of(run_dir: Path) -> Subjects:
    """The images of a simulated run. Errors: InputError where the folder no longer says."""
    private = run_dir / "checkpoints"
    if not (private / "labs.json").is_file():
        raise InputError(
            "the run does not say which images were trained on: membership inference needs "
            "a simulation's folder with its checkpoints",
            hint="run the plan with `cytofed simulate`, and audit that run",
        )
    labs = VirtualLabs.load(private)
    plan = load_plan(run_dir / "plan.yaml")
    patients_N, pseudo = _patients(labs, plan)
    rows = _chosen(labs, patients_N, plan.train.seed)
    cells = stained(replace(labs.cells, patients_N=patients_N), labs.lab_N, labs.stains).take(rows)
    return Subjects(plan, labs, cells, patients_N[rows], labs.side_N[rows] == 1, pseudo)


def _patients(labs: VirtualLabs, plan: Plan) -> tuple[Texts, bool]:
    """Patients (N,) of all images: as the run has them, else made up as a private run would."""
    cells = labs.cells
    if cells.patients_N is not None:
        named_N = cells.patients_N
        alone_N = np.array([f"image {row}" for row in range(len(cells))])
        made_up = all(name.startswith("pseudo-") for name in named_N[:1].tolist())
        return np.where(named_N == "", alone_N, named_N), made_up
    key_N = image_keys(cells.paths(), cells.dhash_N)
    unit_N = units(near_duplicate_groups(cells.dhash_N, images=cells.images), None)
    made_up_N = pseudo_patients(
        2 * labs.lab_N + (labs.side_N == 2),
        unit_N,
        key_N,
        cells=plan.simulation.pseudo_patient_cells,
        seed=plan.train.seed,
    )
    return made_up_N, True


def _chosen(labs: VirtualLabs, patients_N: Texts, seed: int) -> npt.NDArray[np.int64]:
    """Whole patients of either side in random order, ``SUBJECTS`` images in all."""
    held = {side: np.flatnonzero(labs.side_N == side) for side in (1, 2)}
    if not len(held[1]) or not len(held[2]):
        raise InputError(
            "membership inference needs images that were trained on and images that were not",
            hint="run again with evaluation.fraction above 0",
        )
    parts = []
    for side, other in ((1, 2), (2, 1)):
        rows = held[side]
        most = max(SUBJECTS // 2, SUBJECTS - len(held[other]))
        names, patient = np.unique(patients_N[rows], return_inverse=True)
        order = generator(seed, "membership", side).permutation(len(names))
        before_U = np.cumsum(np.bincount(patient)[order])
        taken = order[: max(1, int(np.searchsorted(before_U, most, side="right")))]
        parts.append(rows[np.isin(patient, taken)])
    return np.sort(np.concatenate(parts))


# --- what a shadow is


@dataclass(frozen=True)
class Recipe:
    """How one shadow is trained."""

    plan: Plan
    terms: Terms | None
    """of the whole training, as one round; None without differential privacy"""
    on_features: bool
    own_net: bool
    """the run's net from the run's start; else a small one"""
    reduced: tuple[str, ...] = field(default=())

    @staticmethod
    def of(subjects: Subjects) -> Recipe:
        plan, labs = subjects.plan, subjects.labs
        told = [f"one training over all {len(labs.names)} labs' images instead of rounds"]
        held, asked = int((labs.side_N == 1).sum()), len(subjects.cells)
        told.append(f"on about {asked // 2} images instead of {held}")
        on_features = plan.model.arch == "encoder+head" or plan.model.trainable == "head"
        own_net = on_features or (plan.model.arch == "cytonet" and plan.model.width <= _WIDEST)
        if not own_net:
            plan = replace(plan, model=_SMALL)
            told.append(f"a cytonet of width {_SMALL.width} instead of {subjects.plan.model.arch}")
        terms = terms_of(plan)
        wanted, most = _steps(subjects, terms, on_features)
        steps = min(wanted, most)
        if steps < wanted:
            told.append(f"{steps} steps instead of {wanted}")
        plan = replace(plan, train=replace(plan.train, rounds=1, steps_per_round=steps))
        if terms is not None:
            # The mean of K labs' noised steps has sqrt(K) times the noise of one over all images.
            sigma = terms.training.sigma * len(labs.names) ** 0.5
            terms = replace(terms, training=replace(terms.training, steps=steps, sigma=sigma))
        return Recipe(plan, terms, on_features, own_net, tuple(told))


def _steps(subjects: Subjects, terms: Terms | None, on_features: bool) -> tuple[int, int]:
    """Steps that show each image as often as the run did, and the most that there is time for."""
    plan, train = subjects.plan, subjects.plan.train
    images = max(1, len(subjects.cells) // 2)
    area = (plan.labels.scale.size_px / _USUAL_PX) ** 2
    if terms is not None:
        cells = min(terms.cells_per_unit, images / max(1, len(subjects.names_U) // 2))
        step_images = terms.training.sampling_rate * cells * len(subjects.names_U) / 2
        most = HEAD_STEPS if on_features else int(PASSES / max(1.0, step_images * area))
        return terms.steps, max(1, most)
    epochs = float(train.rounds * train.local_epochs)
    if train.steps_per_round is not None:
        held = int((subjects.labs.side_N == 1).sum())
        drawn = train.rounds * train.steps_per_round * train.batch * len(subjects.labs.names)
        epochs = drawn / max(1, held)
    wanted = max(1, round(epochs * images / min(train.batch, images)))
    most = HEAD_STEPS if on_features else int(PASSES / (min(train.batch, images) * max(1.0, area)))
    return wanted, max(1, most)


# --- training and scoring (torch from here on)


class _Bench:
    """A process's subjects and recipe, and of a frozen encoder the features of all images."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.subjects = subjects_of(run_dir)
        self.recipe = Recipe.of(self.subjects)

    @cached_property
    def start(self) -> Classifier:
        from cytofed import models

        if self.recipe.own_net:
            return models.load_model(self.subjects.labs.folder / "start.safetensors")[0]
        classes = self.subjects.cells.targets_NC.shape[1]
        seed = derive(self.recipe.plan.train.seed, "shadow start")
        return models.build(self.recipe.plan.model, classes, seed=seed)

    @cached_property
    def features_NF(self) -> Float32 | None:
        """A frozen encoder's features of all images; None where it is trained."""
        import torch

        from cytofed.client.features import frozen_features

        if not self.recipe.on_features:
            return None
        place, cells = torch.device("cpu"), self.subjects.cells
        return frozen_features(self.start, cells, place, self.recipe.plan.train)

    def released(self) -> Float32:
        """Scores (N,) of the model that the run released."""
        from cytofed import models

        return self._scores(models.load_model(self.run_dir / "model.safetensors")[0])

    def shadow(self, number: int) -> Float32:
        """Scores (N,) of shadow ``number``, from 1, after its training."""
        from cytofed.client import private, training

        recipe, subjects = self.recipe, self.subjects
        mine = np.flatnonzero(subjects.in_SU[number - 1][subjects.patient_N])
        cells = subjects.cells.take(mine)
        absent_C = absent_classes(recipe.plan, subjects.labs.scheme, cells)
        net = copy.deepcopy(self.start)
        seed = derive(recipe.plan.train.seed, "shadow", number)
        if recipe.terms is not None:
            unit = recipe.plan.privacy.unit
            patients = len(np.unique(subjects.patient_N[mine]))
            declared = patients if unit == "patient" else len(cells)
            private.train_privately(
                net,
                cells,
                recipe.plan,
                recipe.terms,
                declared_patients=declared,
                randomness=SimulatedRandomness(seed, "shadow"),
                progress_start=0.0,
                progress_end=1.0,
                absent_C=absent_C,
                features_NF=None if self.features_NF is None else self.features_NF[mine],
                device="cpu",
            )
        else:
            training.train(
                net,
                cells,
                recipe.plan,
                progress_start=0.0,
                progress_end=1.0,
                absent_C=absent_C,
                features_NF=None if self.features_NF is None else self.features_NF[mine],
                seed=seed,
                device="cpu",
            )
        return self._scores(net)

    def _scores(self, net: Classifier) -> Float32:
        from cytofed.client import training

        cells = self.subjects.cells
        with training.steady(self.recipe.plan.train.threads):
            probs_NC = training.predict(
                net, cells, features_NF=self.features_NF, device="cpu", precision="float32"
            )
        return logit_confidence(probs_NC, cells.targets_NC)


def logit_confidence(probs_NC: Float32, targets_NC: Bools) -> Float32:
    """log(p / (1 - p)) of the probability p of an image's label (N,): nearly a Gaussian.

    Both sums are taken apart, so that a p near 1 keeps its digits.
    """
    right_N = np.where(targets_NC, probs_NC, 0.0).sum(axis=1)
    wrong_N = np.where(targets_NC, 0.0, probs_NC).sum(axis=1)
    scores_N: Float32 = (
        np.log(np.maximum(right_N, 1e-30)) - np.log(np.maximum(wrong_N, 1e-30))
    ).astype(np.float32)
    return scores_N


# --- files


def folder_of(run_dir: Path) -> Path:
    """Where scores are kept: beside what else is not to publish."""
    return run_dir / "checkpoints" / "membership"


def read_scores(run_dir: Path, number: int) -> Float32 | None:
    """Scores (N,) of the released model (0) or a shadow; None where there are none of this run."""
    try:
        with np.load(_file(run_dir, number), allow_pickle=False) as archive:
            if archive["key"].tobytes() != _key(run_dir, number):
                return None
            scores_N: Float32 = archive["scores"]
            return scores_N
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def make_scores(
    run_dir: Path, *, first: int = 0, step: int = 1, tell: Callable[[int], None] = lambda _: None
) -> None:
    """Make what is missing of numbers ``first``, ``first + step``, ... up to ``SHADOWS``."""
    missing = [n for n in range(first, SHADOWS + 1, step) if read_scores(run_dir, n) is None]
    if not missing:
        return
    folder_of(run_dir).mkdir(mode=0o700, exist_ok=True)
    bench = _Bench(run_dir)
    for number in missing:
        scores_N = bench.shadow(number) if number else bench.released()
        buffer = io.BytesIO()
        key = np.frombuffer(_key(run_dir, number), np.uint8)
        np.savez(buffer, allow_pickle=False, key=key, scores=scores_N)
        write_atomically(_file(run_dir, number), buffer.getvalue(), mode=0o600)
        tell(number)


def _file(run_dir: Path, number: int) -> Path:
    return folder_of(run_dir) / (f"shadow-{number:02d}.npz" if number else "released.npz")


def _key(run_dir: Path, number: int) -> bytes:
    """What scores depend on: with another plan, data, model or version they are made anew."""
    facts = [cytofed.__version__, SHADOWS, SUBJECTS, PASSES, HEAD_STEPS, number]
    names = ["plan.yaml", "checkpoints/data.sha256", *(() if number else ("model.safetensors",))]
    files = [run_dir / name for name in names]
    hashes = [hashlib.sha256(f.read_bytes() if f.is_file() else b"").digest() for f in files]
    return digest("cytofed/1/shadow", json.dumps(facts), hashes)


def end_with(parent: int) -> None:
    """End this process when ``parent`` is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    run_dir, first, step = sys.argv[1:]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    make_scores(Path(run_dir), first=int(first), step=int(step))


if __name__ == "__main__":
    main()
