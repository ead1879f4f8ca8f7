"""The self-checks pass on what ships, and stop each planted fault."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cytofed.errors import VerificationError
from cytofed.privacy import gradients
from cytofed.privacy.faults import NoiseHalved, NoiseOff, NotClipped
from cytofed.privacy.gradients import (
    ClippedSum,
    Correction,
    Mechanism,
    PatientOptimizer,
    Step,
    clipped_head_sum,
)
from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness
from cytofed.privacy.sampling import Draw, Rows, Units, draw
from cytofed.privacy.selfcheck import (
    Setup,
    check_noise,
    check_production_path,
    check_sampling,
    check_sensitivity,
)

torch.set_num_threads(1)  # more would spin, and these nets are tiny


@pytest.mark.parametrize(
    "mechanism",
    [None, Mechanism(0.3, 3.0, 0.01, 945), Mechanism(20.0, 1.0, 1.0, 5)],
)
def test_what_ships_passes(mechanism: Mechanism | None) -> None:
    result = check_production_path(mechanism=mechanism)
    assert 0.2 < result.sensitivity <= 1.001
    assert 0.95 < result.noise_ratio < 1.05


def test_simulated_rounds_of_labs_pass() -> None:
    numbers = count()
    check_production_path(new_randomness=lambda: SimulatedRandomness(0, "lab-1", next(numbers)))


def test_the_check_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    check_production_path()
    assert torch.equal(before, torch.random.get_rng_state())


# Faults of the optimizer. Each was seen in some implementation, or is one edit away.


class NoiseDividedTwice(PatientOptimizer):
    def add_noise(self) -> None:
        self.noise_multiplier = self.mechanism.sigma / self.expected_batch_size
        super().add_noise()


class NoiseUniform(PatientOptimizer):
    """The right standard deviation, the wrong tails."""

    def add_noise(self) -> None:
        uniform = self._randomness.uniforms(len(self.summed_P)) - 0.5
        noise_P = torch.from_numpy(uniform * 12**0.5).float()
        self.summed_P.add_(noise_P, alpha=self.noise_multiplier * self.max_grad_norm)


class NoiseFrozen(PatientOptimizer):
    """A seed set in every step."""

    def add_noise(self) -> None:
        self._randomness = SimulatedRandomness(0)
        super().add_noise()


class ClippedAfterAveraging(NotClipped):
    def add_noise(self) -> None:
        norm = float(self.summed_P.norm())
        self.summed_P.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
        super().add_noise()


class DividedByPrivateCount(PatientOptimizer):
    def scale_grad(self) -> None:
        self.expected_batch_size = max(len(self._seen), 1)
        super().scale_grad()


class NoiseScaledByPrivateCount(PatientOptimizer):
    """One per cent a patient: too little to exceed max_norm."""

    def add_noise(self) -> None:
        self.noise_multiplier = self.mechanism.sigma * (1 + 0.01 * len(self._seen))
        super().add_noise()


class EmptyStepSkipped(PatientOptimizer):
    def finish(self, correction: Correction | None = None) -> Step:
        return super().finish(correction) if self._seen else Step(0, 0)


class HeadOutsideNoise(PatientOptimizer):
    """A local layer that is trained on its own gradient."""

    def add_noise(self) -> None:
        head = [view.clone() for view in self._views[-2:]]
        super().add_noise()
        for view, clean in zip(self._views[-2:], head, strict=True):
            view.copy_(clean)


class SplitOverBatches(PatientOptimizer):
    """Two physical batches of one patient, each clipped on its own: sensitivity 2 max_norm."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        super().clip_and_accumulate()


OPTIMIZER_FAULTS: dict[type[PatientOptimizer], str] = {
    NoiseOff: r"standard deviation is 0\.000",
    NoiseHalved: r"standard deviation is 0\.(49|50)",
    NoiseDividedTwice: r"standard deviation is 0\.(09|10)",
    NoiseUniform: "not Gaussian",
    NoiseFrozen: "same noise",
    NotClipped: "more than max_norm",
    ClippedAfterAveraging: "more than max_norm|changes the others' part",
    DividedByPrivateCount: "more than max_norm|changes the others' part",
    NoiseScaledByPrivateCount: "more than max_norm|noise scale or the denominator",
    EmptyStepSkipped: "empty step adds noise",
    HeadOutsideNoise: "standard deviation",
    SplitOverBatches: "more than max_norm",
}


@pytest.mark.parametrize("fault", OPTIMIZER_FAULTS, ids=lambda fault: fault.__name__)
def test_optimizer_fault_is_caught(fault: type[PatientOptimizer]) -> None:
    with pytest.raises(VerificationError, match=OPTIMIZER_FAULTS[fault]):
        check_production_path(optimizer_type=fault)


def test_a_seed_shared_by_two_labs_is_caught() -> None:
    with pytest.raises(VerificationError, match="same noise"):
        check_production_path(new_randomness=lambda: SimulatedRandomness(0))


# Faults of the sampling.


def shuffled() -> Callable[[Units, float, Randomness], Draw]:
    """Batches of one size, without return until all were drawn: accounted as if Poisson."""
    left: list[int] = []

    def draw_batch(units: Units, rate: float, randomness: Randomness) -> Draw:
        if not left:
            left.extend(randomness.choose(len(units), len(units)).tolist())
        size = int(rate * len(units))
        batch, left[:] = left[:size], left[size:]
        return Draw(tuple(batch), tuple(units.rows[u] for u in batch))

    return draw_batch


def fixed_size(units: Units, rate: float, randomness: Randomness) -> Draw:
    chosen = randomness.choose(len(units), int(rate * len(units))).tolist()
    return Draw(tuple(chosen), tuple(units.rows[u] for u in chosen))


def rounded_rate(units: Units, rate: float, randomness: Randomness) -> Draw:
    """Opacus rounds the rate to 1/len(loader)."""
    return draw(units, sampling_rate=rate * 0.8, cells_per_unit=2, randomness=randomness)


def sticky() -> Callable[[Units, float, Randomness], Draw]:
    """A draw used twice: right rate, right sizes, and not independent."""
    drawn: list[Draw] = []

    def draw_twice(units: Units, rate: float, randomness: Randomness) -> Draw:
        if drawn:
            return drawn.pop()
        drawn.append(draw(units, sampling_rate=rate, cells_per_unit=2, randomness=randomness))
        return drawn[0]

    return draw_twice


@pytest.mark.parametrize(
    ("fault", "caught_as"),
    [
        (shuffled(), "spread of sizes|independence"),
        (fixed_size, "spread of sizes"),
        (rounded_rate, "the rate"),
        (sticky(), "independence of draws"),
    ],
    ids=["shuffled", "fixed size", "rounded rate", "draw used twice"],
)
def test_sampling_fault_is_caught(
    fault: Callable[[Units, float, Randomness], Draw], caught_as: str
) -> None:
    with pytest.raises(VerificationError, match=caught_as):
        check_sampling(fault, 0.25, SystemRandomness())


# Faults of what a lab derives from its data: losses, masks, layers with state.

MECHANISM = Mechanism(1.0, 1.0, 0.5, 12)
FEATURES = torch.from_numpy(SimulatedRandomness(5).normals(24 * 6)).view(24, 6)
CLASSES = torch.arange(24) % 3
CLASSES[16:] = torch.arange(8) // 2  # rows p, p + 8, p + 16 are patient p's; class 3: 6 and 7


def lab(
    patients: tuple[int, ...],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    net: nn.Module | None = None,
    mechanism: Mechanism = MECHANISM,
) -> Setup:
    """A lab with these of 8 patients. ``loss(net, rows, rows of the whole lab)``."""
    rows_of = {patient: np.arange(patient, 24, 8) for patient in patients}
    held = torch.from_numpy(np.concatenate([np.arange(0), *rows_of.values()])).long()
    if net is None:
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
    optimizer = PatientOptimizer(
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0),
        net,
        mechanism=mechanism,
        randomness=SimulatedRandomness(0),
    )

    def patient_loss(rows_K: Rows) -> Tensor:
        return loss(net, torch.from_numpy(rows_K), held)

    return Setup(net, optimizer, Draw(patients, tuple(rows_of.values())), patient_loss)


def own_loss(net: nn.Module, rows: Tensor, _: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(FEATURES[rows]), CLASSES[rows])


def class_weights(net: nn.Module, rows: Tensor, held: Tensor) -> Tensor:
    counts = torch.bincount(CLASSES[held], minlength=4)
    return nn.functional.cross_entropy(net(FEATURES[rows]), CLASSES[rows], weight=1 / (1 + counts))


def class_prior(net: nn.Module, rows: Tensor, held: Tensor) -> Tensor:
    prior = torch.bincount(CLASSES[held], minlength=4) + 1.0
    return nn.functional.cross_entropy(net(FEATURES[rows]) + prior.log(), CLASSES[rows])


def absent_mask(net: nn.Module, rows: Tensor, held: Tensor) -> Tensor:
    absent = torch.bincount(CLASSES[held], minlength=4) == 0
    logits = net(FEATURES[rows]).masked_fill(absent, -1e4)
    return nn.functional.cross_entropy(logits, CLASSES[rows])


def normalised(net: nn.Module, rows: Tensor, held: Tensor) -> Tensor:
    centre = FEATURES[held].mean(0)
    return nn.functional.cross_entropy(net(FEATURES[rows] - centre), CLASSES[rows])


def test_a_loss_of_the_patient_alone_passes() -> None:
    assert 0 < check_sensitivity(lambda p: lab(p, own_loss), range(8), MECHANISM) <= 1.001


@pytest.mark.parametrize(
    "loss", [class_weights, class_prior, normalised], ids=lambda loss: loss.__name__
)
def test_what_is_derived_from_other_patients_is_caught(
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(VerificationError, match=r"others' part|more than max_norm"):
        check_sensitivity(lambda p: lab(p, loss), range(8), MECHANISM)


def test_a_mask_of_absent_classes_from_private_data_is_caught() -> None:
    """Patients 6 (class 3) and 0: without patient 6 the class is absent at this lab."""
    with pytest.raises(VerificationError, match=r"others' part|more than max_norm"):
        check_sensitivity(lambda p: lab(p, absent_mask), (6, 0), MECHANISM)


def test_a_denominator_from_the_private_count_is_caught() -> None:
    def setup(patients: tuple[int, ...]) -> Setup:
        counted = Mechanism(1.0, 1.0, 0.5, max(len(patients), 1))
        return lab(patients, own_loss, mechanism=counted)

    with pytest.raises(VerificationError, match=r"max_norm|denominator"):
        check_sensitivity(setup, range(8), MECHANISM)


class Counting(nn.Module):
    """A layer with a buffer that takes in private data, and no batch normalisation."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, features: Tensor) -> Tensor:
        self.seen += features.detach().sum(0)
        logits: Tensor = self.linear(features)
        return logits


def test_a_buffer_that_moves_is_caught() -> None:
    with pytest.raises(VerificationError, match="moved in a step"):
        check_sensitivity(lambda p: lab(p, own_loss, Counting()), range(8), MECHANISM)


def test_a_frozen_layer_trained_behind_the_optimizer_is_caught() -> None:
    def local_layer(net: nn.Module, rows: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            next(net.parameters()).add_(FEATURES[rows].mean())
        return own_loss(net, rows, _)

    def setup(patients: tuple[int, ...]) -> Setup:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 4))
        return lab(patients, local_layer, net)

    with pytest.raises(VerificationError, match="moved in a step"):
        check_sensitivity(setup, range(8), MECHANISM)


def unclipped(*args: Any, **settings: Any) -> ClippedSum:
    return clipped_head_sum(*args, **{**settings, "max_norm": 1e9})


def of_cells(head: nn.Linear, drawn: Draw, *others: Any, **settings: Any) -> ClippedSum:
    """Each cell clipped on its own: a patient then counts as often as it has cells."""
    rows = tuple(np.array([row]) for own in drawn.rows for row in own)
    return clipped_head_sum(head, Draw(tuple(range(len(rows))), rows), *others, **settings)


@pytest.mark.parametrize("fault", [unclipped, of_cells])
def test_a_closed_form_that_clips_in_another_way_is_caught(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "clipped_head_sum", fault)
    with pytest.raises(VerificationError, match="head self-test"):
        check_production_path()


def test_noise_of_another_sigma_is_caught() -> None:
    releases = np.array([SystemRandomness().normals(2000) for _ in range(4)], np.float64)
    check_noise(releases, Mechanism(2.0, 1.0, 1.0, 2))
    with pytest.raises(VerificationError, match=r"standard deviation is 1\.1"):
        check_noise(releases * 1.15, Mechanism(2.0, 1.0, 1.0, 2))
