"""The law of a patient's total privacy loss, and what it says of attacks on that patient.

The privacy loss of a release is the log-likelihood ratio of "took part" against "did not": by
Neyman and Pearson the best test of membership. Its law under both hypotheses gives epsilon at any
delta and the best trade-off of false alarms and misses (Sommer, Meiser, Mohammadi, PoPETs 2019,
arXiv:1806.02711; composition by Fourier transform: Koskela, Jalko, Honkela, AISTATS 2020,
arXiv:1906.03049). The audit's own accountant: independent of Opacus, an estimate (losses are
rounded to the nearest point of a grid) where prices are upper bounds.

Shapes: B points of a grid of losses, X releases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from cytofed.errors import InputError

Floats = npt.NDArray[np.float64]

_POINTS = 1 << 16
_REACH = 9.0
"""standard deviations beyond which a loss is not looked at: 1e-19"""


@dataclass(frozen=True)
class Steps:
    """``count`` releases by the Poisson-subsampled Gaussian mechanism, noise sigma."""

    sampling_rate: float
    sigma: float
    count: int


@dataclass(frozen=True)
class LossLaw:
    """Probabilities of each total loss, for a patient who took part and for one who did not."""

    loss_B: Floats = field(repr=False)
    in_B: Floats = field(repr=False)
    out_B: Floats = field(repr=False)

    def epsilon(self, delta: float) -> float:
        """The epsilon at ``delta``: within .005 of the exact value, above or below."""

        def excess(epsilon: float) -> float:
            above = self.loss_B > epsilon
            gap_B = -np.expm1(epsilon - self.loss_B[above])
            return float(self.in_B[above] @ gap_B) - delta

        if excess(0.0) <= 0:
            return 0.0
        return float(optimize.brentq(excess, 0.0, float(self.loss_B[-1])))

    def misses(self, false_alarms: float) -> float:
        """The least share of misses of any test with this share of false alarms."""
        alarms_B = np.concatenate([[0.0], np.cumsum(self.out_B[::-1])])
        hits_B = np.concatenate([[0.0], np.cumsum(self.in_B[::-1])])
        return 1 - float(np.interp(false_alarms, alarms_B, hits_B))

    def balanced_threshold(self) -> float:
        """The loss above which false alarms are as many as misses below."""
        alarms_B = 1 - np.cumsum(self.out_B)
        misses_B = np.cumsum(self.in_B)
        return float(self.loss_B[int(np.argmax(misses_B >= alarms_B))])

    def sample(self, took_part_N: npt.NDArray[np.bool_], rng: np.random.Generator) -> Floats:
        """A total loss for each patient."""
        found_N = np.empty(len(took_part_N))
        for which_N, law_B in ((took_part_N, self.in_B), (~took_part_N, self.out_B)):
            cumulated_B = np.cumsum(law_B)
            uniform = rng.random(int(which_N.sum())) * cumulated_B[-1]
            found_N[which_N] = self.loss_B[np.searchsorted(cumulated_B, uniform)]
        return found_N


def loss_of(release_X: Floats, sampling_rate: float, sigma: float) -> Floats:
    """The loss of each release of one coordinate, in units of the sensitivity."""
    exponent_X = (2 * release_X - 1) / (2 * sigma**2)
    if sampling_rate == 1:
        return exponent_X
    return np.logaddexp(math.log1p(-sampling_rate), math.log(sampling_rate) + exponent_X)


def loss_law(events: Sequence[Steps]) -> LossLaw:
    """The law of the sum of all losses of ``events``.

    Errors: InputError for a rate, sigma or count out of range.
    """
    for event in events:
        if not (0 < event.sampling_rate <= 1 and 0 < event.sigma < math.inf and event.count >= 1):
            raise InputError(f"no law of losses for {event}")
    # A window in which all sums lie, under both hypotheses; outside it, sums would wrap around.
    low, high, widest = math.inf, -math.inf, 0.0
    for took_part in (True, False):
        moments = [_moments(event, took_part) for event in events]
        mean = sum(event.count * m for event, (m, _) in zip(events, moments, strict=True))
        variance = sum(event.count * v for event, (_, v) in zip(events, moments, strict=True))
        low = min(low, mean - _REACH * math.sqrt(variance))
        high = max(high, mean + _REACH * math.sqrt(variance))
    for event in events:
        ends = loss_of(_reach(event), event.sampling_rate, event.sigma)
        widest = max(widest, float(ends[1] - ends[0]))
    pitch = (high - low + 2 * widest) / _POINTS
    first = math.floor((low - widest) / pitch)
    loss_B: Floats = pitch * np.arange(first, first + _POINTS, dtype=np.float64)
    laws = [_sum(events, pitch, first, took_part) for took_part in (True, False)]
    return LossLaw(loss_B, *laws)


def _sum(events: Sequence[Steps], pitch: float, first: int, took_part: bool) -> Floats:
    """The law of the sum on the grid ``(first + b) pitch``, by powers of Fourier transforms."""
    transform, offset = np.ones(_POINTS // 2 + 1, complex), 0
    for event in events:
        ends = loss_of(_reach(event), event.sampling_rate, event.sigma)
        lowest, highest = math.floor(ends[0] / pitch), math.ceil(ends[1] / pitch)
        edges = (np.arange(lowest, highest + 2) - 0.5) * pitch
        mass = np.zeros(_POINTS)
        mass[: highest - lowest + 1] = np.diff(_below(edges, event, took_part))
        transform *= np.fft.rfft(mass) ** event.count
        offset += lowest * event.count
    law_B: Floats = np.maximum(np.roll(np.fft.irfft(transform, _POINTS), offset - first), 0.0)
    law_B /= law_B.sum()
    return law_B


def _reach(event: Steps) -> Floats:
    """The least and the largest release that are looked at."""
    return np.array([-_REACH * event.sigma, 1 + _REACH * event.sigma])


def _below(loss_X: Floats, event: Steps, took_part: bool) -> Floats:
    """Probability of a loss of one step below each of ``loss_X``."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odds_X = np.log(np.expm1(loss_X) / event.sampling_rate + 1)
        if event.sampling_rate == 1:
            odds_X = loss_X
        odds_X = np.where(loss_X > 50, loss_X - math.log(event.sampling_rate), odds_X)
        # A loss below log(1 - rate) is impossible: its odds are NaN.
        release_X = np.where(np.isnan(odds_X), -np.inf, event.sigma**2 * odds_X + 0.5)
    outside = special.ndtr(release_X / event.sigma)
    if not took_part:
        return np.asarray(outside)
    inside = special.ndtr((release_X - 1) / event.sigma)
    return np.asarray((1 - event.sampling_rate) * outside + event.sampling_rate * inside)


def _moments(event: Steps, took_part: bool) -> tuple[float, float]:
    """Mean and variance of the loss of one step."""
    ends = _reach(event)
    release_X = np.linspace(ends[0], ends[1], 4001)
    outside = np.exp(-0.5 * (release_X / event.sigma) ** 2)
    inside = np.exp(-0.5 * ((release_X - 1) / event.sigma) ** 2)
    rate = event.sampling_rate if took_part else 0.0
    mass_X = (1 - rate) * outside + rate * inside
    mass_X /= mass_X.sum()
    loss_X = loss_of(release_X, event.sampling_rate, event.sigma)
    mean = float(mass_X @ loss_X)
    return mean, float(mass_X @ (loss_X - mean) ** 2)
