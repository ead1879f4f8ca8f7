"""One-run audit: what canaries in a single training run prove about epsilon, from below.

Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023,
arXiv:2305.08846. Each canary is a patient whose gradient is orthogonal to all others' and longer
than ``max_norm``. A coin decides who takes part; all go through the optimizer that trains, and
the auditor, who sees every noised step, guesses the coins by the privacy loss of each canary's
coordinate. Two lower bounds come of the guesses:

* *Steinke*: of the number of right guesses, whatever the mechanism. Weak, and vacuous when delta
  times canaries reaches 1, so it is at a delta of at most 1e-5.
* *Gaussian*: of false alarms and misses (Clopper-Pearson intervals). Among Gaussian mechanisms of
  the declared sampling rate and steps, those with more noise than a certain sigma would not let
  anyone guess so well. Close to the truth, and true only of that family.

A bound above the claim, for two sets of canaries, is a violation. A bound below it proves nothing:
"no violation found".

Shapes: M canaries, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from cytofed.errors import VerificationError
from cytofed.privacy.gradients import Mechanism, PatientOptimizer, private_step
from cytofed.privacy.losses import Floats, LossLaw, Steps, loss_law, loss_of
from cytofed.privacy.noise import Randomness, SystemRandomness
from cytofed.privacy.sampling import Rows, Units, draw

CANARIES = 2000
CONFIDENCE = 0.95
LARGEST_DELTA = 1e-5
"""of the Steinke bound"""
_LONGER = 10.0
"""norm of a canary's gradient over max_norm: unclipped, it would stand out"""
_MOST_GRADIENTS = 50_000
"""canaries x steps x rate / 2; above it there are fewer canaries, so that it takes seconds"""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bound:
    """A lower bound of epsilon at ``delta`` and the claim that it is held against."""

    name: str
    assumes: str
    claimed: float
    delta: float
    lower: float

    @property
    def violated(self) -> bool:
        return self.lower > self.claimed


@dataclass(frozen=True)
class Strategy:
    """How the auditor guesses, fixed before any release is seen: of the claimed mechanism alone.

    ``most_like_in``, ``least_like_in``: how many canaries of the largest and the smallest losses
    are guessed as in and as out (Steinke); ``threshold``: losses above it are guessed as in
    (Gaussian).
    """

    most_like_in: int
    least_like_in: int
    threshold: float


@dataclass(frozen=True)
class Guesses:
    """How the auditor fared. ``right`` of ``made`` guesses; alarms and misses at the threshold."""

    canaries: int
    made: int
    right: int
    alarms: int
    out: int
    misses: int
    in_: int


@dataclass(frozen=True)
class OneRun:
    """The outcome of a one-run audit."""

    guesses: Guesses
    steinke: Bound
    gaussian: Bound

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        return self.steinke, self.gaussian


@dataclass(frozen=True)
class FalseAlarms:
    """How many bounds were above the claim, of ``audits`` looks at a correct mechanism."""

    audits: int
    steinke: int
    gaussian: int


@dataclass(frozen=True)
class Claim:
    """What is claimed of ``steps`` steps of ``mechanism``: epsilon at delta.

    ``law`` is that of the mechanism; the auditor plans with it and takes epsilons at other deltas
    from it.
    """

    mechanism: Mechanism
    steps: int
    epsilon: float
    delta: float
    law: LossLaw

    @staticmethod
    def of(mechanism: Mechanism, steps: int, epsilon: float, delta: float) -> Claim:
        law = loss_law([Steps(mechanism.sampling_rate, mechanism.sigma, steps)])
        return Claim(mechanism, steps, epsilon, delta, law)

    @property
    def small_delta(self) -> float:
        return min(self.delta, LARGEST_DELTA)

    @property
    def epsilon_at_small_delta(self) -> float:
        """The same claim at ``small_delta``; never below the claim itself."""
        if self.small_delta == self.delta:
            return self.epsilon
        return max(self.epsilon, self.law.epsilon(self.small_delta))

    @property
    def canaries(self) -> int:
        most = 2 * _MOST_GRADIENTS / (self.steps * self.mechanism.sampling_rate)
        return int(min(CANARIES, max(200, most)))


def audit_one_run(
    claim: Claim,
    *,
    optimizer_type: type[PatientOptimizer] = PatientOptimizer,
    new_randomness: Callable[[], Randomness] = SystemRandomness,
    coins: np.random.Generator | None = None,
) -> OneRun:
    """Canaries through the optimizer that trains, and both bounds. The types are test seams.

    Where a bound is above the claim, all is done again with new canaries, and that is what counts:
    of a correct mechanism every few hundredth bound is above it (``calibrate``).
    """
    coins = coins or np.random.default_rng()
    plan, randomness = plan_guesses(claim), new_randomness()

    def look() -> OneRun:
        took_part_M = coins.random(claim.canaries) < 0.5
        loss_M = canary_losses(claim, took_part_M, optimizer_type, randomness)
        return bounds(claim, count(loss_M, took_part_M, plan))

    first = look()
    return look() if any(bound.violated for bound in first.bounds) else first


def canary_losses(
    claim: Claim,
    took_part_M: Bools,
    optimizer_type: type[PatientOptimizer],
    randomness: Randomness,
) -> Floats:
    """Each canary's privacy loss over all steps of a run, as the auditor computes it.

    Errors: VerificationError when a step releases nothing.
    """
    mechanism, canaries = claim.mechanism, len(took_part_M)
    net = _OneWeightEach(canaries)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = optimizer_type(inner, net, mechanism=mechanism, randomness=randomness)
    to_norm = mechanism.denominator / mechanism.max_norm
    released: list[Floats] = []

    def capture(_: object) -> None:
        assert net.weight_M.grad is not None
        released.append(net.weight_M.grad.detach().numpy().astype(np.float64) * to_norm)

    optimizer.attach_step_hook(capture)
    lab = Units("patient", tuple(np.flatnonzero(took_part_M)[:, None]))
    loss_M = np.zeros(canaries)
    for step in range(1, claim.steps + 1):
        drawn = draw(
            lab, sampling_rate=mechanism.sampling_rate, cells_per_unit=1, randomness=randomness
        )
        private_step(optimizer, drawn, lambda rows: net(rows, _LONGER * mechanism.max_norm))
        if len(released) != 1:
            raise VerificationError(f"canaries: step {step} released {len(released)} gradients")
        loss_M += loss_of(released.pop(), mechanism.sampling_rate, mechanism.sigma)
    return loss_M


class _OneWeightEach(nn.Module):
    """A weight for each canary: a gradient of its own, orthogonal to all others."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.weight_M = nn.Parameter(torch.zeros(canaries))

    def forward(self, rows_1: Rows, norm: float) -> Tensor:
        return norm * self.weight_M[int(rows_1[0])]


def plan_guesses(claim: Claim) -> Strategy:
    """The numbers of guesses from which a correct mechanism would let most be proved."""
    law, canaries = claim.law, claim.canaries
    in_B, out_B = np.cumsum(law.in_B), np.cumsum(law.out_B)
    below_B = (in_B + out_B) / 2
    best, chosen = -1.0, (canaries // 20, 0)
    for share in (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.5):
        top = int(np.searchsorted(below_B, 1 - share))
        bottom = int(np.searchsorted(below_B, share))
        guesses = max(1, int(share * canaries))
        hits = canaries * (1 - in_B[min(top, len(in_B) - 1)]) / 2
        rejections = canaries * out_B[bottom] / 2
        for least_like_in, right in ((0, hits), (guesses, hits + rejections)):
            made = guesses + least_like_in
            if made > canaries:
                continue
            found = steinke_bound(
                canaries, made, int(min(right, made)), claim.small_delta, 1 - CONFIDENCE
            )
            if found > best:
                best, chosen = found, (guesses, least_like_in)
    return Strategy(*chosen, law.balanced_threshold())


def count(loss_M: Floats, took_part_M: Bools, strategy: Strategy) -> Guesses:
    """Guess by ``strategy`` and look at the coins. Errors: VerificationError for a loss of NaN."""
    if not np.isfinite(loss_M).all():
        raise VerificationError("canaries: a released gradient is not finite")
    order_M = np.argsort(loss_M, kind="stable")
    least = order_M[: strategy.least_like_in]
    most = order_M[len(order_M) - strategy.most_like_in :]
    right = int(took_part_M[most].sum()) + int((~took_part_M[least]).sum())
    above_M = loss_M > strategy.threshold
    return Guesses(
        canaries=len(loss_M),
        made=len(most) + len(least),
        right=right,
        alarms=int((above_M & ~took_part_M).sum()),
        out=int((~took_part_M).sum()),
        misses=int((~above_M & took_part_M).sum()),
        in_=int(took_part_M.sum()),
    )


def bounds(claim: Claim, found: Guesses) -> OneRun:
    """Both lower bounds, each at ``CONFIDENCE``."""
    wrong = 1 - CONFIDENCE
    steinke = steinke_bound(found.canaries, found.made, found.right, claim.small_delta, wrong)
    sigma = gaussian_sigma(claim, *_rates(found))
    gaussian = 0.0
    if math.isfinite(sigma):
        law = loss_law([Steps(claim.mechanism.sampling_rate, sigma, claim.steps)])
        gaussian = law.epsilon(claim.delta)
    at_small = claim.epsilon_at_small_delta
    return OneRun(
        found,
        Bound("Steinke", "any mechanism", at_small, claim.small_delta, steinke),
        Bound("Gaussian", "a Gaussian mechanism", claim.epsilon, claim.delta, gaussian),
    )


def steinke_bound(canaries: int, made: int, right: int, delta: float, wrong: float) -> float:
    """The least epsilon not refuted by ``right`` of ``made`` guesses, at confidence 1 - wrong.

    Algorithm of appendix D of the paper. 0 where nothing is refuted.
    """

    def refuted(epsilon: float) -> bool:
        return steinke_p_value(canaries, made, right, epsilon, delta) < wrong

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
        if high > 1e3:
            return low
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def steinke_p_value(canaries: int, made: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses under (epsilon, delta)-privacy (theorem 5.2)."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    by_chance = float(stats.binom.sf(right - 1, made, accuracy))
    if right < 1:
        return 1.0
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), made, accuracy))
    by_delta = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, by_chance + by_delta * delta * 2 * canaries)


def gaussian_sigma(claim: Claim, most_alarms: float, most_misses: float) -> float:
    """The largest sigma whose best test errs as little as observed; infinite where all do.

    ``most_alarms``, ``most_misses``: upper ends of the shares of false alarms and misses.
    """
    rate, steps = claim.mechanism.sampling_rate, claim.steps

    def excess(log_sigma: float) -> float:
        law = loss_law([Steps(rate, math.exp(log_sigma), steps)])
        return law.misses(most_alarms) - most_misses

    low, high = math.log(claim.mechanism.sigma / 1e3), math.log(claim.mechanism.sigma * 1e3)
    if most_alarms + most_misses >= 1 or excess(high) <= 0:
        return math.inf
    if excess(low) >= 0:  # not even without noise: canaries that are never drawn are missed
        return math.exp(low)
    return math.exp(float(optimize.brentq(excess, low, high, xtol=1e-4)))


def _rates(found: Guesses) -> tuple[float, float]:
    """Upper ends of Clopper-Pearson intervals that hold together at ``CONFIDENCE``."""
    wrong = (1 - CONFIDENCE) / 2
    return _upper(found.alarms, found.out, wrong), _upper(found.misses, found.in_, wrong)


def _upper(hits: int, trials: int, wrong: float) -> float:
    return 1.0 if hits >= trials else float(stats.beta.ppf(1 - wrong, hits + 1, trials - hits))


def calibrate(claim: Claim, seeds_S: Sequence[int]) -> FalseAlarms:
    """Audits of the claimed mechanism itself: the canaries' losses are drawn from their law."""
    strategy, wrong = plan_guesses(claim), 1 - CONFIDENCE
    steinke = gaussian = 0
    for seed in seeds_S:
        rng = np.random.default_rng(seed)
        took_part_M = rng.random(claim.canaries) < 0.5
        found = count(claim.law.sample(took_part_M, rng), took_part_M, strategy)
        p_value = steinke_p_value(
            found.canaries,
            found.made,
            found.right,
            claim.epsilon_at_small_delta,
            claim.small_delta,
        )
        most_alarms, most_misses = _rates(found)
        steinke += p_value < wrong
        # As the bound is above the claim just when the claimed sigma is refuted.
        gaussian += claim.law.misses(most_alarms) > most_misses
    return FalseAlarms(len(seeds_S), steinke, gaussian)
