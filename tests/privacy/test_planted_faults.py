"""Every way in which differential privacy is known to fail, planted through a seam and caught.

A ``Fault`` names a failure, the claim that it breaks, and how it is planted. Each claim holds on
what ships, and fails with the fault in place. The claims are short; the tests in full are here:

======================================================  ==========================================
failure                                                 in full
======================================================  ==========================================
noise off, halved, divided twice, not Gaussian, frozen  test_selfcheck (OPTIMIZER_FAULTS)
seeded or shared noise in production                    test_noise, test_selfcheck, and in a lab
                                                        simulations/test_private_evaluation
clipping after averaging, a patient split               test_selfcheck, test_gradients
denominator that moves with N                           test_selfcheck, test_gradients
empty batch skipped                                     test_selfcheck, test_gradients
shuffled, cyclic or sticky batches as if Poisson        test_selfcheck, test_sampling
NaN sample                                              test_gradients
buffers that move or are sent                           test_selfcheck, test_gradients
trainable parameters outside clip and noise             test_gradients
masks, priors, weights, statistics of private data      test_selfcheck, test_terms
local layer or control variate outside the noise        test_selfcheck, test_gradients
DP switched off silently by a config                    test_gradients, test_accounting, test_plan,
                                                        test_terms
sigma calibrated by epochs                              test_accounting, test_terms
ledger reset (restart, round, run, plan), rollback      test_ledger
a retry that releases twice                             test_ledger
second federation or moved folder with a fresh budget   test_ledger
the same patient at two labs                            test_accounting
example-count weighting                                 only here
scores without noise, unclipped, or not paid for        test_evaluation
======================================================  ==========================================

Shapes: N images, C classes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cytofed import models, plan_check
from cytofed.client import app as lab_half
from cytofed.client import opening, private, training
from cytofed.client.budget import LedgerBudget
from cytofed.client.cells import Cells, Source
from cytofed.client.reader import Listing
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.labels import load_scheme
from cytofed.messages import Order
from cytofed.metrics import Tally
from cytofed.plan import Plan, load_plan
from cytofed.privacy import accounting, evaluation, gradients, ledger, selfcheck, terms
from cytofed.privacy.accounting import Guarantee, PlanUse, SubsampledGaussian, price
from cytofed.privacy.gradients import Mechanism, PatientOptimizer, Step
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.noise import SimulatedRandomness, SystemRandomness
from cytofed.privacy.sampling import Draw
from cytofed.privacy.terms import Terms, terms_of
from cytofed.strategies import make_strategy

torch.set_num_threads(1)  # more would spin, and these nets are tiny

SCHEME = load_scheme("pbc-8")
CLASSES = len(SCHEME.codes)
PLAN = load_plan(
    "demo",
    [
        "labels.scheme=pbc-8",
        "model.width=8",
        "train.optimizer=sgd",
        "train.schedule=constant",
        "train.warmup=0",
        "train.lr=1",
        "train.momentum=0",
        "train.weight_decay=0",
        "train.ema=0",
        "train.label_smoothing=0",
        "train.precision=float32",
        "train.augment.stain=0",
        "train.augment.shift=0",
        "train.augment.scale=0",
        "train.augment.rotate=false",
        "train.augment.flip=false",
        "privacy.unit=patient",
        "privacy.sigma=2",
    ],
)
DECLARED = 4
MAX_NORM = 0.5


def terms_with(sigma: float) -> Terms:
    """One step over all patients: what a lab releases is then a sum over patients, and noise."""
    return Terms(
        training=SubsampledGaussian("patient", 1.0, sigma, 1),
        rounds=1,
        delta=1e-3,
        max_norm=MAX_NORM,
        cells_per_unit=4,
        guarantee=Guarantee(math.inf, 1e-3, "patient", "RDP"),
    )


def cells(patients: tuple[int, ...], *, cells_each: int = 3, field: int = 16) -> Cells:
    """A lab with these patients, some with two classes; some classes only one patient has."""
    rng = np.random.default_rng(0)
    pixels_PNHWC = rng.integers(0, 255, (6, cells_each, field, field, 3)).astype(np.uint8)
    rows = np.array(patients, dtype=int)
    pixels: Any = pixels_PNHWC[rows].reshape(-1, field, field, 3)
    class_N = (np.repeat(rows, cells_each) + np.tile(np.arange(cells_each), len(rows)) % 2) // 2
    targets_NC = np.eye(CLASSES, dtype=bool)[class_N].reshape(-1, CLASSES)
    patients_N = np.array([f"p{patient}" for patient in np.repeat(rows, cells_each)], dtype=str)
    count = len(class_N)
    listing = Listing(
        root=Path("made-up"),
        paths=tuple(f"{i:03}.png" for i in range(count)),
        targets_NC=targets_NC,
        patients=tuple(patients_N.tolist()),
        columns={},
        field_um=None,
        absent=frozenset(),
        excluded={},
        problems=(),
        map_name="none",
    )
    source = Source(
        listing, pixels, np.zeros(count, np.uint64), np.zeros((count, 3), np.float32), Path("none")
    )
    where = np.zeros(count, np.int16), np.arange(count, dtype=np.int32)
    return Cells((source,), *where, targets_NC, patients_N, field)


def net() -> models.Classifier:
    return models.build(PLAN.model, CLASSES, seed=0)


def trained(patients: tuple[int, ...], *, sigma: float) -> np.ndarray:
    """How far one private step moves the weights of a lab, by the code that trains."""
    model, held = net(), cells(patients)
    manifest = models.manifest(model, "all")
    before_P = models.flatten(model, manifest).copy()
    private.train_privately(
        model,
        held,
        PLAN,
        terms_with(sigma),
        declared_patients=DECLARED,
        randomness=SimulatedRandomness(0, "planted"),
        progress_start=0.5,
        progress_end=0.5,
        absent_C=opening.absent_classes(PLAN, SCHEME, held),
        device="cpu",
    )
    return before_P - models.flatten(model, manifest)


# --- claims


def self_checks_pass(_: Path) -> None:
    selfcheck.check_production_path()


def scores_pass_their_check(_: Path) -> None:
    evaluation.check_release(SystemRandomness)


def one_patient_moves_training_by_its_own_bounded_part(_: Path) -> None:
    """Through ``train_privately``: all that a lab derives from its images is derived in there."""
    everyone = (0, 1, 2, 3, 4)
    none_P, all_P = trained((), sigma=1e-9), trained(everyone, sigma=1e-9)
    for patient in (1, 4):  # 1 has two classes
        rest_P = trained(tuple(p for p in everyone if p != patient), sigma=1e-9)
        change_P = all_P - rest_P
        assert np.linalg.norm(change_P) <= MAX_NORM / DECLARED * 1.001
        alone_P = trained((patient,), sigma=1e-9) - none_P
        assert np.linalg.norm(change_P - alone_P) <= 1e-3 * MAX_NORM / DECLARED


def every_weight_of_a_lab_without_patients_has_its_noise(_: Path) -> None:
    moved_P = trained((), sigma=3.0) / (3.0 * MAX_NORM / DECLARED)
    assert (moved_P != 0).mean() > 0.999
    for start in range(0, len(moved_P), 2000):
        assert 0.8 < moved_P[start : start + 2000].std() < 1.2


def a_patient_without_finite_gradient_adds_nothing(_: Path) -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = PatientOptimizer(
        inner, model, mechanism=Mechanism(1.0, 1.0, 1.0, 4), randomness=SimulatedRandomness(0)
    )
    optimizer.add_patient(0, torch.cat([p.flatten() for p in model.parameters()]).sum() * torch.nan)
    optimizer.finish()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def running_statistics_are_refused(_: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="'1'"):
        _optimizer(model, list(model.parameters()))


def tensors_outside_the_optimizer_are_refused(_: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(InputError, match="not in the private optimizer"):
        _optimizer(model, list(model[0].parameters()))


def _optimizer(model: nn.Module, tensors: list[nn.Parameter]) -> PatientOptimizer:
    inner = torch.optim.SGD(tensors, lr=1.0)
    mechanism = Mechanism(1.0, 1.0, 1.0, 4)
    return PatientOptimizer(inner, model, mechanism=mechanism, randomness=SystemRandomness())


def no_setting_switches_noise_or_clipping_off(_: Path) -> None:
    for values in ((0.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InputError):
            Mechanism(values[0], values[1], 0.5, 9)


def an_epsilon_without_a_unit_is_refused(_: Path) -> None:
    for named in ("privacy.epsilon=3", "privacy.sigma=3"):
        with pytest.raises(InputError, match="no noise would be added"):
            plan_check.check_plan(load_plan("demo", [named]))


def class_counts_in_a_plan_are_refused(_: Path) -> None:
    for balance in ("sampler", "weights", "logits"):
        unbalanced = replace(PLAN, train=replace(PLAN.train, balance=balance))
        with pytest.raises(InputError, match=balance):
            plan_check.check_plan(unbalanced)


def a_plan_costs_no_more_than_it_says(_: Path) -> None:
    """All steps that labs run, at the sigma that they get, by an accountant of their own."""
    asked = load_plan("demo", ["privacy.unit=patient", "privacy.epsilon=2", "train.local_epochs=3"])
    found = terms_of(asked)
    assert found is not None
    steps = 12 * asked.train.rounds  # local_epochs 3 at a sampling rate of 1/4
    run = SubsampledGaussian("patient", 0.25, found.training.sigma, steps)
    assert found.steps == steps
    assert price([run], found.delta).epsilon <= 2.0


def a_patient_at_two_labs_pays_at_both(_: Path) -> None:
    labs = [Guarantee(2.0, 1e-3, "patient", "PRV")] * 2
    assert accounting.across_labs(labs, "may_overlap").epsilon == 4.0


TERMS = terms_of(PLAN)
assert TERMS is not None
ROUND = TERMS.training


def order(number: int, *, plan: str = "a" * 64, run: str = "run-1") -> Order:
    parts = {"weights": np.full(3, number, np.float32)}
    return Order("train", run, number, plan, parts)


def answer(budget: LedgerBudget, asked: Order) -> None:
    budget.reserve(asked)
    budget.release(asked, {"weights": np.full(3, 0.5, np.float32)})


def budget_in(folder: Path, federation: str = "marrow") -> LedgerBudget:
    return LedgerBudget(folder / "ledger.sqlite", "patients", federation, "patient")


def spent(budget: LedgerBudget) -> float:
    with budget._open() as book:
        return book.balance().spent.epsilon


def all_rounds_together(rounds: int) -> float:
    assert TERMS is not None
    whole = replace(ROUND, steps=ROUND.steps * rounds)
    return price([whole], TERMS.delta, accountant="RDP").epsilon


def nothing_is_forgotten_over_rounds_runs_plans_and_restarts(folder: Path) -> None:
    assert TERMS is not None
    rounds = (("a", 1), ("a", 2), ("b", 1))
    for plan, number in rounds:
        budget = budget_in(folder)  # a new one each time: a restart
        budget.approve(plan * 64, TERMS, DECLARED)
        answer(budget, order(number, plan=plan * 64, run=f"run-{plan}"))
    assert spent(budget_in(folder)) == pytest.approx(all_rounds_together(3))


def a_second_federation_finds_what_the_first_has_spent(folder: Path) -> None:
    assert TERMS is not None
    for federation in ("marrow", "blood"):
        budget = budget_in(folder, federation)
        budget.approve("a" * 64, TERMS, DECLARED)
        answer(budget, order(1))
    assert spent(budget) == pytest.approx(all_rounds_together(2))


def a_moved_folder_keeps_what_was_spent(folder: Path) -> None:
    assert TERMS is not None
    before = budget_in(folder / "here")
    before.approve("a" * 64, TERMS, DECLARED)
    answer(before, order(1))
    shutil.move(folder / "here", folder / "there")
    assert spent(budget_in(folder / "there")) == pytest.approx(all_rounds_together(1))


def a_round_releases_one_update(folder: Path) -> None:
    assert TERMS is not None
    budget = budget_in(folder)
    budget.approve("a" * 64, TERMS, DECLARED)
    answer(budget, order(1))
    answer(budget, order(1))
    with pytest.raises(VerificationError, match="another update"):
        budget.release(order(1), {"weights": np.full(3, 0.7, np.float32)})


def nothing_is_trained_that_is_not_approved(folder: Path) -> None:
    Ledger.create(folder / "ledger.sqlite")
    with pytest.raises(CytofedError, match="not approved"):
        _outcome(folder, cells((0, 1)), budget_in(folder))


def what_an_update_says_of_a_lab_is_public(folder: Path) -> None:
    """Weights of labs are declared; numbers of images, loss and time stay."""
    few, many = (_outcome(folder, held) for held in (cells((0,)), cells((0, 1, 2, 3, 4))))
    assert (few.weight, few.train_s) == (many.weight, many.train_s) == (DECLARED, 0.0)
    assert math.isnan(few.loss)
    assert math.isnan(many.loss)


class _Paid:
    """A budget that pays for everything: not what is tested."""

    def reserve(self, order: Order) -> None: ...

    def release(self, order: Order, parts: Mapping[str, Any]) -> None: ...


class _NoMemory:
    def load(self, run: str, round_: int) -> dict[str, Any]:
        return {}

    def save(self, run: str, round_: int, parts: Mapping[str, Any]) -> None: ...


def _outcome(folder: Path, held: Cells, budget: Any = None) -> Any:
    lab = lab_half.Lab(
        name="leeds",
        plan=replace(PLAN, train=replace(PLAN.train, steps_per_round=1)),
        scheme=SCHEME,
        train=held,
        test=held,
        absent_C=np.zeros(CLASSES, bool),
        start=folder / "start",
        memory=_NoMemory(),
        budget=budget or _Paid(),
        declared_patients=DECLARED,
    )
    model = net()
    manifest = models.manifest(model, "all")
    ready = lab_half._Net(model, manifest, make_strategy(PLAN.strategy), torch.device("cpu"))
    start_P = models.flatten(model, manifest).copy()
    asked = Order("train", "run-1", 1, lab.plan.sha256, {"weights": start_P})
    return lab_half._train(asked, lab, ready, None)


# --- faults


Plant = Callable[[pytest.MonkeyPatch], None]
REAL_NOISE = PatientOptimizer.add_noise
REAL_CLIP = PatientOptimizer.clip_and_accumulate
REAL_SCALE = PatientOptimizer.scale_grad
REAL_FINISH = PatientOptimizer.finish
REAL_ADD = PatientOptimizer.add_patient


def method(name: str, fault: Callable[..., Any]) -> Plant:
    """A method of the optimizer that trains, replaced."""
    return lambda patch: patch.setattr(PatientOptimizer, name, fault)


def attribute(target: Any, name: str, fault: Any) -> Plant:
    return lambda patch: patch.setattr(target, name, fault)


def halved(self: PatientOptimizer) -> None:
    self.noise_multiplier = self.mechanism.sigma / 2
    REAL_NOISE(self)


def divided_twice(self: PatientOptimizer) -> None:
    self.noise_multiplier = self.mechanism.sigma / self.expected_batch_size
    REAL_NOISE(self)


def unclipped(self: PatientOptimizer) -> None:
    self.max_grad_norm = 1e9
    REAL_CLIP(self)
    self.max_grad_norm = self.mechanism.max_norm


def clip_after_averaging(patch: pytest.MonkeyPatch) -> None:
    def clip_the_mean(self: PatientOptimizer) -> None:
        patients = max(len(self._seen), 1)
        norm = float(self.summed_P.norm()) / patients
        self.summed_P.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
        REAL_NOISE(self)

    patch.setattr(PatientOptimizer, "clip_and_accumulate", unclipped)
    patch.setattr(PatientOptimizer, "add_noise", clip_the_mean)


def private_denominator(self: PatientOptimizer) -> None:
    self.expected_batch_size = max(len(self._seen), 1)
    REAL_SCALE(self)


def skipped_when_empty(self: PatientOptimizer, correction: Any = None) -> Step:
    return REAL_FINISH(self, correction) if self._seen else Step(0, 0)


def split_patient(self: PatientOptimizer) -> None:
    REAL_CLIP(self)
    REAL_CLIP(self)


def not_looked_at(self: PatientOptimizer) -> None:
    """Clipping as Opacus does it: a NaN norm gives a NaN factor."""
    gradients_ = [self._get_flat_grad_sample(t).squeeze(0) for t in self._tensors]
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients_]))
    factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for view, gradient in zip(self._views, gradients_, strict=True):
        view.add_(gradient * factor)


def local_layer(self: PatientOptimizer, patient: int, loss: Tensor) -> None:
    """A layer of the lab's own, trained on the raw gradient as the patient comes by."""
    head = self._tensors[-1]
    (raw,) = torch.autograd.grad(loss, [head], retain_graph=True)
    with torch.no_grad():
        head.sub_(raw)
    REAL_ADD(self, patient, loss)


def control_variate(self: PatientOptimizer, _correction: Any = None) -> Step:
    """A correction by the sum before its noise."""
    clean_P = self.summed_P / self.expected_batch_size
    return REAL_FINISH(self, lambda noised_P: clean_P - noised_P)


def moving_buffer(patch: pytest.MonkeyPatch) -> None:
    class Counting(nn.ReLU):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, features: Tensor) -> Tensor:
            self.seen += len(features)
            return super().forward(features)

    patch.setattr(nn, "ReLU", Counting)


def fixed_size(units: Any, *, sampling_rate: float, randomness: Any, **_: Any) -> Draw:
    chosen = randomness.choose(len(units), int(sampling_rate * len(units))).tolist()
    return Draw(tuple(chosen), tuple(units.rows[u] for u in chosen))


def masked_by_private_data(_plan: Plan, _scheme: Any, train: Cells) -> Any:
    return ~train.targets_NC.any(axis=0)


def weighted_by_private_data(patch: pytest.MonkeyPatch) -> None:
    real_step, real_objective = private._make_step, training.Objective

    def make_step(model: nn.Module, held: Cells, *others: Any) -> Any:
        counts_C = torch.from_numpy(held.targets_NC.sum(0)).float()

        def weighted(*settings: Any) -> Any:
            return replace(real_objective(*settings), weight_C=1 / (1 + counts_C))

        patch.setattr(private, "Objective", weighted)
        return real_step(model, held, *others)

    patch.setattr(private, "_make_step", make_step)


def counted_denominator(patch: pytest.MonkeyPatch) -> None:
    real = private.train_privately

    def counting(model: Any, held: Cells, plan: Plan, *others: Any, **settings: Any) -> Any:
        counted = max(private.count_units(plan, held), 1)
        return real(model, held, plan, *others, **{**settings, "declared_patients": counted})

    patch.setattr(private, "train_privately", counting)


def forgetful_restart(patch: pytest.MonkeyPatch) -> None:
    real = LedgerBudget.approve

    def approve(self: LedgerBudget, *args: Any) -> None:
        self.path.unlink(missing_ok=True)
        real(self, *args)

    patch.setattr(LedgerBudget, "approve", approve)


def pool_per(text: Callable[[LedgerBudget], str]) -> Plant:
    """A pool that is derived, where the lab has named one."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = Ledger.open.__func__  # type: ignore[attr-defined]

        def opened(self: LedgerBudget) -> Any:
            return real(Ledger, self.path, pool=text(self), unit=self.unit)

        patch.setattr(LedgerBudget, "_open", opened)

    return plant


def last_round_only(self: Any, *_: Any, **__: Any) -> dict[str, Any]:
    """The reset bug: a new accountant each round."""
    last = [known.event for known in self.rounds.values()][-1:]
    return {"": PlanUse.all_of(last)}


def weighted_by_images(patch: pytest.MonkeyPatch) -> None:
    real = lab_half._train_privately

    def counting(asked: Order, lab: lab_half.Lab, *others: Any) -> Any:
        return replace(real(asked, lab, *others), weight=float(len(lab.train)))

    patch.setattr(lab_half, "_train_privately", counting)


def loss_is_told(patch: pytest.MonkeyPatch) -> None:
    real = lab_half._train_privately

    def telling(asked: Order, lab: lab_half.Lab, *others: Any) -> Any:
        return replace(real(asked, lab, *others), loss=1.5)

    patch.setattr(lab_half, "_train_privately", telling)


def calibrated_by_epochs(patch: pytest.MonkeyPatch) -> None:
    real = accounting.sigma_for
    patch.setattr(terms, "sigma_for", lambda e, d, q, steps: real(e, d, q, steps - steps // 12))


def maximum(labs: list[Guarantee], _patients: str) -> Guarantee:
    return max(labs, key=lambda found: found.epsilon)


def nothing(*_: Any, **__: Any) -> None:
    """A step that is left out: noise, a refusal, a check."""


def scores_as_they_are(confusion_CC: Any, *_: Any) -> Tally:
    return Tally(np.rint(confusion_CC).astype(np.int64), Tally.empty(len(confusion_CC)).bins_B3)


@dataclass(frozen=True)
class Fault:
    name: str
    claim: Callable[[Path], None]
    plant: Plant


STEP = one_patient_moves_training_by_its_own_bounded_part
NOISE = every_weight_of_a_lab_without_patients_has_its_noise
FAULTS = [
    Fault("noise off", self_checks_pass, method("add_noise", nothing)),
    Fault("noise off, as a lab trains", NOISE, method("add_noise", nothing)),
    Fault("noise halved", self_checks_pass, method("add_noise", halved)),
    Fault("noise halved, as a lab trains", NOISE, method("add_noise", halved)),
    Fault("noise divided twice", self_checks_pass, method("add_noise", divided_twice)),
    Fault(
        "noise seeded", self_checks_pass, attribute(SystemRandomness, "_key", lambda _: bytes(32))
    ),
    Fault(
        "noise off in scores",
        scores_pass_their_check,
        attribute(evaluation, "noised_tally", scores_as_they_are),
    ),
    Fault("no clipping", STEP, method("clip_and_accumulate", unclipped)),
    Fault("clipping after averaging", self_checks_pass, clip_after_averaging),
    Fault("clipping after averaging, as a lab trains", STEP, clip_after_averaging),
    Fault("denominator from the draw", self_checks_pass, method("scale_grad", private_denominator)),
    Fault("denominator from the lab's count", STEP, counted_denominator),
    Fault("empty batch skipped", self_checks_pass, method("finish", skipped_when_empty)),
    Fault("empty batch skipped, as a lab trains", NOISE, method("finish", skipped_when_empty)),
    Fault(
        "patient split over batches", self_checks_pass, method("clip_and_accumulate", split_patient)
    ),
    Fault("patient split, as a lab trains", STEP, method("clip_and_accumulate", split_patient)),
    Fault("buffer that moves", self_checks_pass, moving_buffer),
    Fault(
        "buffers that are sent",
        running_statistics_are_refused,
        attribute(gradients, "refuse_batch_statistics", nothing),
    ),
    Fault(
        "NaN sample",
        a_patient_without_finite_gradient_adds_nothing,
        method("clip_and_accumulate", not_looked_at),
    ),
    Fault(
        "fixed batches as if Poisson", self_checks_pass, attribute(selfcheck, "draw", fixed_size)
    ),
    Fault(
        "mask of absent classes from the data",
        STEP,
        attribute(opening, "absent_classes", masked_by_private_data),
    ),
    Fault("class weights from the data", STEP, weighted_by_private_data),
    Fault(
        "class weights in a plan",
        class_counts_in_a_plan_are_refused,
        attribute(plan_check, "_check_private", lambda _: []),
    ),
    Fault("local layer outside the noise", STEP, method("add_patient", local_layer)),
    Fault("control variate outside the noise", NOISE, method("finish", control_variate)),
    Fault(
        "parameters outside clip and noise",
        tensors_outside_the_optimizer_are_refused,
        attribute(gradients, "_refuse_other_tensors", nothing),
    ),
    Fault(
        "switched off by a config",
        no_setting_switches_noise_or_clipping_off,
        attribute(Mechanism, "__post_init__", nothing),
    ),
    Fault(
        "switched off by a unit that is left out",
        an_epsilon_without_a_unit_is_refused,
        attribute(plan_check, "_refuse_noise_for_nobody", nothing),
    ),
    Fault("calibrated by epochs", a_plan_costs_no_more_than_it_says, calibrated_by_epochs),
    Fault(
        "ledger reset by a restart",
        nothing_is_forgotten_over_rounds_runs_plans_and_restarts,
        forgetful_restart,
    ),
    Fault(
        "ledger reset by a round",
        nothing_is_forgotten_over_rounds_runs_plans_and_restarts,
        attribute(ledger._State, "uses", last_round_only),
    ),
    Fault(
        "ledger by federation",
        a_second_federation_finds_what_the_first_has_spent,
        pool_per(lambda b: f"{b.pool} {b.federation}"),
    ),
    Fault(
        "ledger by folder",
        a_moved_folder_keeps_what_was_spent,
        pool_per(lambda b: str(b.path.parent)),
    ),
    Fault(
        "retry that releases twice",
        a_round_releases_one_update,
        attribute(Ledger, "release", nothing),
    ),
    Fault(
        "training without approval",
        nothing_is_trained_that_is_not_approved,
        attribute(LedgerBudget, "reserve", nothing),
    ),
    Fault(
        "weights by number of images", what_an_update_says_of_a_lab_is_public, weighted_by_images
    ),
    Fault("loss of private images", what_an_update_says_of_a_lab_is_public, loss_is_told),
    Fault(
        "same patient at two labs",
        a_patient_at_two_labs_pays_at_both,
        attribute(accounting, "across_labs", maximum),
    ),
]

CLAIMS = list(dict.fromkeys(fault.claim for fault in FAULTS))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_claim_holds_on_what_ships(claim: Callable[[Path], None], tmp_path: Path) -> None:
    claim(tmp_path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fault.plant(monkeypatch)
    with pytest.raises((AssertionError, CytofedError, pytest.fail.Exception)):
        fault.claim(tmp_path)
