"""Self-checks of the private path: run when a daemon starts, in tests and by the audit.

They look at what the production code releases, not at its attributes: the same randomness on data
with and without one patient (sensitivity, and that nothing else depends on that patient), the
head's closed form against a pass a patient, steps without patients (the noise), and many draws (the
sampling). Each takes milliseconds, raises
VerificationError, and has a false alarm in less than one of 10^8 runs.

Shapes: R releases, P trainable parameters, U patients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cytofed.errors import VerificationError
from cytofed.privacy.gradients import (
    Mechanism,
    PatientLoss,
    PatientOptimizer,
    private_head_step,
    private_step,
)
from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness
from cytofed.privacy.sampling import Draw, Rows, Units, draw

_LARGEST_Z = 6.5
"""standard errors that count as chance: one in 10^10"""

Floats = npt.NDArray[np.float64]
DrawPatients = Callable[[Units, float, Randomness], Draw]


@dataclass(frozen=True)
class Setup:
    """One step of a lab, about to run. ``net`` is the one that ``optimizer`` trains."""

    net: nn.Module
    optimizer: PatientOptimizer
    draw: Draw
    patient_loss: PatientLoss


SetupOf = Callable[[tuple[int, ...]], Setup]
"""patients -> the step of a lab that has only these, all drawn; the same start weights and the
same simulated randomness every time. All that a lab derives from its data is derived in here."""


@dataclass(frozen=True)
class SelfCheck:
    """What was observed; every value has passed."""

    sensitivity: float
    """largest change of the sum by one patient, as a fraction of max_norm"""
    noise_ratio: float
    """standard deviation of the noise over what was promised"""
    correlation: float
    """largest absolute correlation between two releases' noise"""
    seconds: float

    def __str__(self) -> str:
        return (
            f"sensitivity {self.sensitivity:.3f} of max_norm, noise {self.noise_ratio:.3f} of "
            f"sigma, largest correlation {self.correlation:.3f}, in {self.seconds * 1e3:.0f} ms"
        )


def check_production_path(
    *,
    mechanism: Mechanism | None = None,
    optimizer_type: type[PatientOptimizer] = PatientOptimizer,
    draw_patients: DrawPatients | None = None,
    new_randomness: Callable[[], Randomness] = SystemRandomness,
) -> SelfCheck:
    """All checks on a small net, through the classes that train. The arguments are test seams.

    ``new_randomness`` is what a round of a lab starts with.
    Errors: VerificationError naming the check that failed.
    """
    start_s = time.perf_counter()
    mechanism = mechanism or Mechanism(1.5, 0.7, 0.25, 40)
    sensitivity = replay_small_lab(mechanism, optimizer_type)
    check_head(mechanism, optimizer_type)
    ratio, correlation = noise_of_small_labs(mechanism, optimizer_type, new_randomness)
    check_sampling(draw_patients or _draw, 0.25, new_randomness())
    return SelfCheck(sensitivity, ratio, correlation, time.perf_counter() - start_s)


def replay_small_lab(mechanism: Mechanism, optimizer_type: type[PatientOptimizer]) -> float:
    """``check_sensitivity`` on a small net. Errors: VerificationError."""
    lab = _SmallLab(mechanism, optimizer_type)
    return check_sensitivity(lab.setup, lab.patients, mechanism)


def noise_of_small_labs(
    mechanism: Mechanism,
    optimizer_type: type[PatientOptimizer],
    new_randomness: Callable[[], Randomness],
) -> tuple[float, float]:
    """``check_noise`` on two rounds of two labs with a small net. Errors: VerificationError."""
    lab = _SmallLab(mechanism, optimizer_type)
    releases_RP = [
        release
        for _lab in range(2)
        for _round in range(2)
        for release in empty_steps(lab.optimizer(new_randomness()), steps=3)
    ]
    return check_noise(np.array(releases_RP), mechanism)


def check_sensitivity(
    setup_of: SetupOf, patients: Sequence[int], mechanism: Mechanism, *, remove: int = 3
) -> float:
    """Replay a step with and without one patient, for ``remove`` patients.

    What is released must change by at most ``max_norm / denominator``, and by exactly what a lab
    with that patient alone releases more than an empty one: then clipping, noise scale and
    denominator are the same with and without, and no other patient's gradient has changed.
    Returns the largest change, as a fraction of the bound.
    Errors: VerificationError.
    """
    scale = mechanism.denominator
    all_P = released(setup_of(tuple(patients))) * scale
    none_P = released(setup_of(())) * scale
    # float32 rounds the noise that cancels between two releases.
    rounding = 4e-7 * mechanism.sigma * mechanism.max_norm * math.sqrt(len(all_P))
    tolerance = 1e-3 * mechanism.max_norm + rounding
    largest = 0.0
    for removed in patients[:remove]:
        rest = tuple(patient for patient in patients if patient != removed)
        change_P = all_P - released(setup_of(rest)) * scale
        alone_P = released(setup_of((removed,))) * scale - none_P
        change = float(np.linalg.norm(change_P))
        if not change <= mechanism.max_norm + tolerance:
            raise VerificationError(
                f"sensitivity replay: one patient changes the sum by {change:.4g}, "
                f"more than max_norm {mechanism.max_norm:g}"
            )
        apart = float(np.linalg.norm(change_P - alone_P))
        if not apart <= tolerance:
            raise VerificationError(
                f"sensitivity replay: one patient changes the others' part, the noise scale or "
                f"the denominator (by {apart:.4g} in norm, expected 0)"
            )
        largest = max(largest, change / mechanism.max_norm)
    return largest


def released(setup: Setup) -> Floats:
    """The gradient_P that a step hands to the inner optimizer.

    Errors: VerificationError when a buffer or a frozen tensor of the net moves in the step, or
    when the step does not happen.
    """
    trained = {id(tensor) for tensor in setup.net.parameters() if tensor.requires_grad}
    others = [t for t in (*setup.net.buffers(), *setup.net.parameters()) if id(t) not in trained]
    before = [tensor.detach().clone() for tensor in others]
    seen: list[Tensor] = []

    def capture(_: object) -> None:
        gradients = [t.grad for t in setup.net.parameters() if t.requires_grad]
        if any(gradient is None for gradient in gradients):
            raise VerificationError("a trainable tensor got no noised gradient in a step")
        seen.append(torch.cat([g.detach().flatten() for g in gradients if g is not None]).cpu())

    setup.optimizer.attach_step_hook(capture)
    private_step(setup.optimizer, setup.draw, setup.patient_loss)
    if len(seen) != 1:
        raise VerificationError(
            f"a step of {len(setup.draw)} patients released {len(seen)} gradients, expected 1: "
            "an empty step adds noise and counts as any other"
        )
    if any(not torch.equal(a, b) for a, b in zip(before, others, strict=True)):
        raise VerificationError(
            "a buffer or frozen tensor of the net moved in a step, outside clip and noise"
        )
    return seen[0].numpy().astype(np.float64)


def check_head(mechanism: Mechanism, optimizer_type: type[PatientOptimizer]) -> None:
    """A head's step in closed form is its step by one backward pass a patient, to rounding.

    What the sensitivity replay says of clipping, noise and denominator then holds for it too.
    Errors: VerificationError.
    """
    numbers = SimulatedRandomness(0, "self-check head")
    features_NF = torch.from_numpy(numbers.normals(21 * 32)).view(21, 32)
    features_NF *= torch.arange(21)[:, None] % 7  # some gradients are clipped, some are not
    class_N = torch.arange(21) % 5
    drawn = Draw(tuple(range(7)), tuple(np.arange(patient, 21, 7) for patient in range(7)))
    moved_P = []
    for closed in (False, True):
        with torch.device("meta"):  # draws nothing from torch's own generator
            head = nn.Linear(32, 5)
        head = head.to_empty(device="cpu")
        for tensor in head.parameters():
            nn.init.zeros_(tensor)
        randomness = SimulatedRandomness(0, "self-check noise")
        inner = torch.optim.SGD(head.parameters(), lr=1.0)
        optimizer = optimizer_type(inner, head, mechanism=mechanism, randomness=randomness)
        if closed:
            targets_NC = nn.functional.one_hot(class_N, 5).bool()
            private_head_step(optimizer, drawn, head, features_NF, targets_NC)
        else:
            private_step(optimizer, drawn, _head_loss(head, features_NF, class_N))
        moved_P.append(torch.cat([tensor.detach().flatten() for tensor in head.parameters()]))
    scale = mechanism.denominator
    apart = float((moved_P[0] - moved_P[1]).norm()) * scale
    rounding = 4e-7 * scale * float(moved_P[0].norm())
    if not apart <= 1e-3 * mechanism.max_norm + rounding:
        raise VerificationError(
            f"head self-test: the closed form differs from one backward pass a patient by "
            f"{apart:.4g} in norm, max_norm is {mechanism.max_norm:g}"
        )


def _head_loss(head: nn.Linear, features_NF: Tensor, class_N: Tensor) -> PatientLoss:
    def patient_loss(rows_K: Rows) -> Tensor:
        chosen = torch.from_numpy(rows_K)
        return nn.functional.cross_entropy(head(features_NF[chosen]), class_N[chosen])

    return patient_loss


def check_noise(releases_RP: Floats, mechanism: Mechanism) -> tuple[float, float]:
    """Releases of steps without patients, from several steps, rounds and labs.

    Chi-square on the standard deviation against sigma max_norm / denominator, Kolmogorov and
    Smirnov on the shape, correlation of each two releases against 0.
    Returns the ratio of standard deviations and the largest absolute correlation.
    Errors: VerificationError.
    """
    promised = mechanism.sigma * mechanism.max_norm / mechanism.denominator
    standard_RP = releases_RP / promised
    count = standard_RP.size
    ratio = math.sqrt(float(np.mean(standard_RP**2)))
    z = (ratio**2 - 1) * math.sqrt(count / 2)
    if not abs(z) <= _LARGEST_Z:
        raise VerificationError(
            f"noise self-test: its standard deviation is {ratio:.3f} of sigma x max_norm / "
            f"denominator = {promised:.3g} ({z:+.0f} standard errors)"
        )
    sorted_ = np.sort(standard_RP, axis=None)
    cdf = 0.5 * torch.erfc(torch.from_numpy(-sorted_ / math.sqrt(2))).numpy()
    distance = float(np.max(np.abs(cdf - (np.arange(count) + 0.5) / count))) * math.sqrt(count)
    if not distance <= 3.4:  # 2 exp(-2 x 3.4^2) = 2e-10
        raise VerificationError(
            f"noise self-test: the noise is not Gaussian (Kolmogorov distance {distance:.1f})"
        )
    above_diagonal = np.triu_indices(len(standard_RP), 1)
    largest = float(np.max(np.abs(np.asarray(np.corrcoef(standard_RP))[above_diagonal])))
    if not largest * math.sqrt(standard_RP.shape[1]) <= _LARGEST_Z:
        raise VerificationError(
            f"noise self-test: two releases have the same noise (correlation {largest:.3f}); "
            "their difference is noiseless"
        )
    return ratio, largest


def check_sampling(
    draw_patients: DrawPatients, sampling_rate: float, randomness: Randomness
) -> None:
    """400 draws of a lab of 40 patients are Poisson draws: independent, at the declared rate.

    Shuffled batches have one size, cyclic ones return in a pattern; both are accounted as if they
    were four times as private as they are.
    Errors: VerificationError.
    """
    patients, draws = 40, 400
    units = Units("patient", tuple(np.arange(3) + 3 * patient for patient in range(patients)))
    drawn_DU = np.zeros((draws, patients))
    for index in range(draws):
        drawn_DU[index, list(draw_patients(units, sampling_rate, randomness).units)] = 1
    variance = sampling_rate * (1 - sampling_rate)
    if variance == 0:
        if not drawn_DU.all():
            raise VerificationError("sampling self-test: rate 1 left a patient out")
        return
    centred_DU = (drawn_DU - sampling_rate) / math.sqrt(variance)
    sizes_D = centred_DU.sum(1) / math.sqrt(patients)
    sizes_variance = 2 + (1 - 6 * variance) / (patients * variance)  # of sizes_D squared
    # Successive draws of one patient, and sizes of draws: means of independent products.
    scores = {
        "the rate": centred_DU.sum() / math.sqrt(centred_DU.size),
        "the spread of sizes": (np.mean(sizes_D**2) - 1) * math.sqrt(draws / sizes_variance),
        "independence of draws": np.mean(centred_DU[1:] * centred_DU[:-1])
        * math.sqrt((draws - 1) * patients),
    }
    for what, z in scores.items():
        if not abs(z) <= _LARGEST_Z:
            raise VerificationError(
                f"sampling self-test: {what} is {z:+.0f} standard errors from Poisson sampling "
                f"at {sampling_rate:g}; the accountant holds for no other"
            )


class _SmallLab:
    """Seven patients and a small net with GroupNorm; some gradients are clipped, some are not."""

    def __init__(self, mechanism: Mechanism, optimizer_type: type[PatientOptimizer]) -> None:
        self.mechanism = mechanism
        self.optimizer_type = optimizer_type
        self.patients = tuple(range(7))
        numbers = SimulatedRandomness(0, "self-check data")
        self.pixels_NF = torch.from_numpy(numbers.normals(21 * 32)).view(21, 32)
        self.pixels_NF *= torch.arange(21)[:, None] % 7  # patient 0's gradient: biases only
        self.classes_N = torch.arange(21) % 5
        shapes = [(24, 32), (24,), (24,), (24,), (5, 24), (5,)]
        self.start = [torch.from_numpy(numbers.normals(math.prod(s))).view(s) / 5 for s in shapes]

    def optimizer(self, randomness: Randomness) -> PatientOptimizer:
        return self._build(randomness)[1]

    def setup(self, patients: tuple[int, ...]) -> Setup:
        net, optimizer = self._build(SimulatedRandomness(0, "self-check noise"))
        rows = tuple(np.arange(patient, 21, 7) for patient in patients)

        def patient_loss(rows_K: Rows) -> Tensor:
            chosen = torch.from_numpy(rows_K)
            logits_KC = net(self.pixels_NF[chosen])
            # Of gradients' norms 0.2 to 1.1: some are clipped, some are not, at every max_norm.
            scale = self.mechanism.max_norm / 0.7
            return scale * nn.functional.cross_entropy(logits_KC, self.classes_N[chosen])

        return Setup(net, optimizer, Draw(patients, rows), patient_loss)

    def _build(self, randomness: Randomness) -> tuple[nn.Module, PatientOptimizer]:
        # On "meta", no weights are drawn: torch's own generator stays where it was.
        with torch.device("meta"):
            layers = nn.Linear(32, 24), nn.GroupNorm(4, 24), nn.ReLU(), nn.Linear(24, 5)
        model = nn.Sequential(*layers).to_empty(device="cpu")
        with torch.no_grad():
            for tensor, start in zip(model.parameters(), self.start, strict=True):
                tensor.copy_(start)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        return model, self.optimizer_type(
            inner, model, mechanism=self.mechanism, randomness=randomness
        )


def empty_steps(optimizer: PatientOptimizer, *, steps: int) -> list[Floats]:
    """What ``steps`` steps without patients release. Errors: VerificationError for none."""
    seen: list[Floats] = []

    def capture(_: object) -> None:
        gradients = [t.grad for group in optimizer.param_groups for t in group["params"]]
        flat = torch.cat([g.detach().flatten() for g in gradients if g is not None])
        seen.append(flat.cpu().numpy().astype(np.float64))

    optimizer.attach_step_hook(capture)
    for _ in range(steps):
        private_step(optimizer, Draw((), ()), _no_loss)
    if len(seen) != steps:
        raise VerificationError(
            f"noise self-test: {steps} steps without patients released {len(seen)} gradients: "
            "an empty step adds noise and counts as any other"
        )
    return seen


def _no_loss(_: Rows) -> Tensor:
    raise VerificationError("a loss was computed in a step without patients")


def _draw(units: Units, sampling_rate: float, randomness: Randomness) -> Draw:
    return draw(units, sampling_rate=sampling_rate, cells_per_unit=2, randomness=randomness)
