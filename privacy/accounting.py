"""What a mechanism costs: events, accountants, prices and calibration.

A mechanism is a frozen event; an accountant composes events. Two accountants of Opacus are used:
PRV (Gopi et al., NeurIPS 2021, arXiv:2106.02848) prices a fixed plan, RDP (Mironov 2017,
arXiv:1702.07476) composes what adapts on the way, because it is a filter (Feldman and Zrnic,
NeurIPS 2021). What was spent over plans is the least of several bounds by both, see ``spend``: one
number, which is shown, held and held against limits. The GDP accountant of Opacus underestimates
and is not offered. What is not supported is refused; what is not private costs infinity.

All epsilons are for one patient (or image) added or removed. No torch is imported here: the
ledger and the coordinator use this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from cytofed.errors import InputError
from cytofed.whose import whose

Unit = Literal["patient", "image", "none"]
Accountant = Literal["PRV", "RDP", "PRV + RDP"]

# Opacus' orders, and larger ones: few, well-hidden releases have their optimum there.
ORDERS: tuple[float, ...] = (
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *(float(order) for order in (*range(12, 64), 72, 80, 96, 112, 128, 160, 192, 224, 256)),
)
PRV_LARGEST_EPSILON = 128.0
"""above it PRV takes minutes and overflows; RDP is used, and the guarantee says so"""
PRV_SMALLEST_DELTA = 1e-9
"""below it the tail of a loss is lost in the rounding of sums: RDP is used. (At 1e-10 that rounding
moves epsilon by .003 of 10, at 1e-12 by more than the error that PRV adds.)"""
PRV_LARGEST_GRID = 1 << 23
MOST_PRICED_APART = 8
"""plans; of more, RDP of them all is the least, and PRV of each would take seconds"""


@dataclass(frozen=True)
class SubsampledGaussian:
    """``steps`` of DP-SGD: Poisson sampling with a secret draw, noise sigma x sensitivity.

    ``sigma`` 0 is no noise and costs infinity. Cyclic or shuffled batches are another mechanism
    and not covered.
    """

    unit: Unit
    sampling_rate: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"Expected 0 < sampling_rate={self.sampling_rate:g} <= 1")
        _check_sigma(self.sigma)
        _check_count("steps", self.steps)


@dataclass(frozen=True)
class Gaussian:
    """``count`` releases of a clipped sum over all patients, noise sigma x sensitivity."""

    unit: Unit
    sigma: float
    count: int

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)
        _check_count("count", self.count)


@dataclass(frozen=True)
class NonPrivate:
    """A release without differential privacy. It costs infinity."""

    unit: Unit = "none"


Event = SubsampledGaussian | Gaussian | NonPrivate


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy of one unit against one adversary."""

    epsilon: float
    delta: float
    unit: Unit
    accountant: Accountant
    adversary: str = "add-or-remove"
    patients: int | None = None
    """of all labs together, where they are known: delta times them is how many of them the
    guarantee may fail for"""
    pseudo: bool = False
    """the patients are made up by a simulation"""

    @property
    def per(self) -> str:
        """Whose it is, in the word that is shown."""
        return whose(self.unit, pseudo=self.pseudo)

    def __str__(self) -> str:
        if math.isinf(self.epsilon):
            return "no differential privacy (epsilon infinite)"
        times = ""
        if self.patients is not None:
            times = f" ({delta_times(self.delta, self.patients, self.per)})"
        return (
            f"epsilon {shown(self.epsilon)} at delta {self.delta:g}{times}, per {self.per}, "
            f"{self.adversary}, by {self.accountant}"
        )


@dataclass(frozen=True)
class PlanCost:
    """What a plan spends at one lab: the events of a round, and of an evaluation.

    Evaluation happens every ``evaluate_every`` rounds and at the end; ``evaluation`` None
    releases nothing, but where there is no privacy at all.

    ``images_per_patient``: the most images of one patient, where the unit is one image; None where
    nobody knows.
    """

    delta: float
    declared_patients: int
    rounds: int
    training: Event
    evaluation: Gaussian | None = None
    evaluate_every: int = 1
    images_per_patient: int | None = None

    def __post_init__(self) -> None:
        _check_count("rounds", self.rounds)
        _check_count("evaluate_every", self.evaluate_every)
        _check_count("declared_patients", self.declared_patients)
        if not 0 < self.delta < 1:
            raise InputError(f"Expected 0 < delta={self.delta:g} < 1")
        if self.evaluation is not None and self.evaluation.unit != self.unit:
            raise InputError(
                f"training protects units of {self.unit!r} and evaluation of "
                f"{self.evaluation.unit!r}: one plan has one unit"
            )

    @property
    def unit(self) -> Unit:
        return self.training.unit

    @property
    def evaluations(self) -> int:
        if self.evaluation is None and self.unit != "none":
            return 0
        return math.ceil(self.rounds / self.evaluate_every)

    def events(self) -> tuple[Event, ...]:
        """All events of the plan."""
        training = (times(self.training, self.rounds),)
        if self.evaluation is None:
            return training
        return (*training, times(self.evaluation, self.evaluations))

    def events_in(self, unit: Unit) -> tuple[Event, ...]:
        """All events of the plan as they count in ``unit``."""
        return tuple(in_unit(event, unit, self.images_per_patient) for event in self.events())

    def with_rounds(self, rounds: int) -> PlanCost:
        return replace(self, rounds=rounds)


def shown(epsilon: float) -> str:
    """Two decimals, rounded up: a printed epsilon must not be below the true one."""
    return "infinite" if math.isinf(epsilon) else f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def times(event: Event, count: int) -> Event:
    """``count`` repetitions of ``event`` as one event."""
    match event:
        case SubsampledGaussian():
            return replace(event, steps=event.steps * count)
        case Gaussian():
            return replace(event, count=event.count * count)
        case NonPrivate():
            return event


def default_delta(patients: int) -> float:
    """The delta of a plan that names none, over the ``patients`` of all labs together."""
    return min(1e-5, 1 / (10 * patients))


def check_delta(delta: float, patients: int) -> None:
    """Errors: InputError unless 0 < delta <= 1/(2 N), N the ``patients`` of all labs together.

    A mechanism that publishes one patient in N in full passes for epsilon 0 at delta 1/N.
    """
    bound = 1 / (2 * max(patients, 1))
    if not (patients >= 1 and 0 < delta <= bound):
        raise InputError(
            f"Expected 0 < delta={delta:g} <= {bound:.3g} = 1/(2 N), of the N={patients} patients "
            f"whom all labs together declare: delta x N is {delta * patients:.3g}",
            hint="leave privacy.delta out, for "
            f"{default_delta(max(patients, 1)):.3g}, or set privacy.delta={_round_down(bound)} or "
            "lower",
        )


def delta_times(delta: float, patients: int, per: str = "patient") -> str:
    """Delta beside the patients (or images) that it is for, for people."""
    return f"x {patients:,} {per}s: {delta * patients:.2g}"


def price(
    events: Sequence[Event],
    delta: float,
    *,
    accountant: Accountant = "PRV",
) -> Guarantee:
    """What ``events`` cost together, as a plan that is fixed before its first release.

    Guarantees: an upper bound; PRV is within .015 of the exact value where it works (from
    epsilon .1 to 128), and RDP where it does not, or is lower; ``Guarantee.accountant`` says which
    it was.
    Errors: InputError for a delta out of bounds and for events of different units.
    """
    if not 0 < delta < 1:
        raise InputError(f"Expected 0 < delta={delta:g} < 1")
    unit = _one_unit(events)
    if any(_is_not_private(event) for event in events):
        return Guarantee(math.inf, delta, unit, "RDP")
    mechanisms = _merge(events)
    by_rdp = _rdp_epsilon(mechanisms, delta)
    if accountant == "RDP" or not mechanisms:
        return Guarantee(by_rdp, delta, unit, "RDP")
    by_prv = _prv_epsilon(mechanisms, delta, by_rdp)
    if by_prv is None or by_rdp <= by_prv:
        return Guarantee(by_rdp, delta, unit, "RDP")
    return Guarantee(by_prv, delta, unit, "PRV")


def epsilon_for(sigma: float, delta: float, sampling_rate: float, steps: int) -> float:
    """PRV's epsilon of ``steps`` steps."""
    event = SubsampledGaussian("patient", sampling_rate, sigma, steps)
    return price([event], delta).epsilon


@lru_cache(maxsize=256)
def sigma_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The noise multiplier for which ``steps`` steps cost ``epsilon``.

    Guarantees: ``epsilon - 1e-3 <= epsilon_for(sigma, ...) <= epsilon``. (Where the accountant
    changes, near epsilon 100, the lower bound is some units looser.)
    Calibrated by steps: by epochs, Opacus is one step short for some sizes.
    Errors: InputError for an epsilon that is not above 0, or so low that no sigma reaches it.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"Expected 0 < epsilon={epsilon:g} < infinity")

    def excess(log_sigma: float) -> float:
        """log(cost / epsilon): nearly linear in log sigma."""
        cost = epsilon_for(math.exp(log_sigma), delta, sampling_rate, steps)
        return math.log(cost / epsilon) if cost > 0 else -math.inf

    # A first guess from the Gaussian limit of many steps; then a bracket around it.
    reach = math.sqrt(2 * math.log(1.25 / delta))
    high = math.log(max(sampling_rate * math.sqrt(steps) * reach / epsilon, 0.5))
    above = excess(high)
    low, below = high, above
    while above > 0:
        low, below = high, above
        high += max(above, 0.1)
        if high > math.log(1e6):
            raise InputError(
                f"no noise reaches epsilon {epsilon:g} at delta {delta:g} over {steps} steps",
                hint="raise privacy.epsilon, or lower train.rounds or privacy.sampling_rate",
            )
        above = excess(high)
    while below <= 0:
        high, above = low, below
        low += max(min(below, -0.1), -1.0)
        below = excess(low)
    # False position (Illinois) towards the middle of what is asked for; ``high`` always fits.
    # Where the cost jumps, the bracket closes in on the jump.
    tight = math.log1p(-1e-3 / epsilon) if epsilon > 2e-3 else -0.5
    f_low, f_high, last = below - tight / 2, above - tight / 2, 0
    while above < tight and high - low > 1e-9:
        middle = low + (high - low) * f_low / (f_low - f_high)
        if not low < middle < high:
            middle = (low + high) / 2
        value = excess(middle)
        f_middle = value - tight / 2
        if value > 0:
            low, f_low = middle, f_middle
            f_high = f_high / 2 if last == 1 else f_high
            last = 1
        else:
            high, above, f_high = middle, value, f_middle
            f_low = f_low / 2 if last == -1 else f_low
            last = -1
    return math.exp(high)


@dataclass(frozen=True)
class PlanUse:
    """What counts of one plan: ``used``, of ``whole``, all that it may ever release."""

    whole: tuple[Event, ...]
    used: tuple[Event, ...]

    @staticmethod
    def all_of(events: Sequence[Event]) -> PlanUse:
        return PlanUse(tuple(events), tuple(events))


def spend(uses: Sequence[PlanUse], delta: float, *, unit: Unit = "patient") -> Guarantee:
    """What is spent over plans: the one number that is shown, held and held against limits.

    The least of these upper bounds, each a guarantee at ``delta``:

    - RDP of all that was used, whichever plan, round or stop was chosen in the light of what came
      before: a filter.
    - Of a single plan, PRV of the whole of it: it is fixed before its first release, and a part of
      it is post-processing of the whole, whatever made it stop.
    - Of several, that of any one at nine tenths of ``delta`` and what the others cost at one tenth,
      added up: basic composition, which holds for mechanisms that run side by side and adapt to
      each other too (Vadhan and Zhang, STOC 2023, arXiv:2207.08335). It is the least where one
      plan is large and the others are small.

    Where it depends on releases *which* of them is the least (who has seen a plan's end asks for
    another plan, or does not), the delta of all ways together is at most their sum.

    Guarantees: the price of a plan that is alone; what is used of a plan costs at most the plan;
    it never falls as more is used.
    Errors: InputError for a delta out of bounds and for events of other units than ``unit``.
    """
    uses = [use for use in uses if use.used]
    used = [event for use in uses for event in use.used]
    if not used:
        return Guarantee(0.0, delta, unit, "RDP")
    bounds = [replace(price(used, delta, accountant="RDP"), unit=unit)]
    if math.isinf(bounds[0].epsilon):
        return bounds[0]
    if len(uses) == 1:
        bounds.append(price(uses[0].whole, delta))
    elif len(uses) <= MOST_PRICED_APART:
        for number, use in enumerate(uses):
            rest = _others([*uses[:number], *uses[number + 1 :]], 0.1 * delta)
            if rest < bounds[0].epsilon:  # else it is not the least: PRV takes a third of a second
                epsilon = price(use.whole, 0.9 * delta).epsilon + rest
                bounds.append(Guarantee(epsilon, delta, unit, "PRV + RDP"))
    return min(bounds, key=lambda bound: bound.epsilon)


def _others(uses: Sequence[PlanUse], delta: float) -> float:
    """Epsilon of the plans beside the largest one."""
    if len(uses) == 1:
        return spend(uses, delta, unit=_one_unit(uses[0].used)).epsilon
    used = [event for use in uses for event in use.used]
    return price(used, delta, accountant="RDP").epsilon


def max_rounds(
    cost: PlanCost,
    *,
    epsilon: float,
    delta: float,
    before: Sequence[PlanUse] = (),
    unit: Unit = "patient",
) -> int:
    """The largest number of rounds of ``cost`` that fits ``epsilon`` after the plans ``before``.

    0 when not even one fits; at most ``cost.rounds``.
    """

    def fits(rounds: int) -> bool:
        plan = PlanUse.all_of(cost.with_rounds(rounds).events_in(unit))
        return spend([*before, plan], delta, unit=unit).epsilon <= epsilon

    if fits(cost.rounds):
        return cost.rounds
    low, high = 0, cost.rounds - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def in_unit(event: Event, unit: Unit, images_per_patient: int | None = None) -> Event:
    """What ``event`` costs a unit of another kind: a patient who has so many images, or all.

    One patient's k images, each drawn with rate q and clipped to 1, move a sum by at most the
    number that is drawn of them, which is k with probability 1-(1-q)^k at the most: the Gaussian
    mechanism of that rate and sensitivity k dominates it (a mixture of Gaussians is monotone in
    its shifts: Choquette-Choo et al., ICLR 2024, arXiv:2310.15526).
    Anything else has no bound.
    """
    if event.unit == unit:
        return event
    k = images_per_patient
    if isinstance(event, NonPrivate) or (event.unit, unit) != ("image", "patient") or not k:
        return NonPrivate(unit)
    if isinstance(event, Gaussian):
        return Gaussian(unit, event.sigma / k, event.count)
    rate = -math.expm1(k * math.log1p(-event.sampling_rate)) if event.sampling_rate < 1 else 1.0
    return SubsampledGaussian(unit, rate, event.sigma / k, event.steps)


def across_labs(
    guarantees: Sequence[Guarantee], patients: Literal["disjoint", "may_overlap"]
) -> Guarantee:
    """The federation's guarantee for one patient.

    Disjoint patients: the largest epsilon and delta of any lab. A patient known to several labs
    is in all their mechanisms: epsilons and deltas add up.
    """
    if not guarantees:
        raise InputError("no lab's guarantee is given")
    units = {guarantee.unit for guarantee in guarantees}
    if len(units) > 1:
        raise InputError(f"labs' guarantees are for different units: {', '.join(sorted(units))}")
    epsilons = [guarantee.epsilon for guarantee in guarantees]
    deltas = [guarantee.delta for guarantee in guarantees]
    combine = max if patients == "disjoint" else math.fsum
    names = sorted({name for g in guarantees for name in g.accountant.split(" + ")})
    together = cast(Accountant, " + ".join(names))
    return replace(
        guarantees[0], epsilon=combine(epsilons), delta=combine(deltas), accountant=together
    )


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as JSON values; ``event_from_dict`` takes it back."""
    match event:
        case SubsampledGaussian(unit, sampling_rate, sigma, steps):
            return {
                "mechanism": "subsampled_gaussian",
                "unit": unit,
                "sampling_rate": sampling_rate,
                "sigma": sigma,
                "steps": steps,
            }
        case Gaussian(unit, sigma, count):
            return {"mechanism": "gaussian", "unit": unit, "sigma": sigma, "count": count}
        case NonPrivate(unit):
            return {"mechanism": "non_private", "unit": unit}


def event_from_dict(tree: Mapping[str, Any]) -> Event:
    """Errors: InputError for a mechanism that this version does not know."""
    values = {key: value for key, value in tree.items() if key != "mechanism"}
    kinds: dict[str, type[Event]] = {
        "subsampled_gaussian": SubsampledGaussian,
        "gaussian": Gaussian,
        "non_private": NonPrivate,
    }
    kind = kinds.get(str(tree.get("mechanism")))
    if kind is None:
        raise InputError(f"unknown mechanism {tree.get('mechanism')!r}")
    try:
        return kind(**values)
    except TypeError:
        raise InputError(f"no event of {tree['mechanism']}: {dict(tree)!r}") from None


_Mechanism = tuple[float, float, int]
"""sampling rate, sigma, steps: what Opacus' accountants know"""


def _merge(events: Sequence[Event]) -> tuple[_Mechanism, ...]:
    """Equal mechanisms as one: PRV then convolves each once. A Gaussian has sampling rate 1."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if isinstance(event, SubsampledGaussian):
            key, count = (event.sampling_rate, event.sigma), event.steps
        elif isinstance(event, Gaussian):
            key, count = (1.0, event.sigma), event.count
        else:
            raise InputError(f"no accountant composes {event!r}")
        steps[key] = steps.get(key, 0) + count
    return tuple((rate, sigma, count) for (rate, sigma), count in sorted(steps.items()) if count)


def _one_unit(events: Sequence[Event]) -> Unit:
    units = sorted({event.unit for event in events})
    if len(units) > 1:
        raise InputError(
            f"events of different units are not composed: {', '.join(units)}",
            hint="an epsilon per image says nothing about a patient",
        )
    return events[0].unit if events else "patient"


def _is_not_private(event: Event) -> bool:
    return isinstance(event, NonPrivate) or event.unit == "none" or event.sigma == 0


@lru_cache(maxsize=16384)
def _rdp_of_one_step(sampling_rate: float, sigma: float, order: float) -> float:
    """Renyi divergence of one step; infinite where it cannot be computed."""
    with np.errstate(all="ignore"):
        try:
            value = float(_opacus("analysis.rdp")._compute_rdp(sampling_rate, sigma, order))
        except (ArithmeticError, ValueError):
            return math.inf
    return value if value >= 0 else math.inf


def _rdp_epsilon(mechanisms: Sequence[_Mechanism], delta: float) -> float:
    """The least epsilon that any order of ORDERS near the best whole one gives.

    Every order gives a bound, so a search that misses the best one is loose but sound. Orders
    between whole numbers are a slow series: only those on the way to the best are computed.
    """
    if not mechanisms:
        return 0.0

    @cache
    def bound(index: int) -> float:
        # Balle et al. 2020 (arXiv:1905.09982), theorem 21
        order = ORDERS[index]
        rdp = math.fsum(
            steps * _rdp_of_one_step(rate, sigma, order) for rate, sigma, steps in mechanisms
        )
        return rdp - math.log(delta * order) / (order - 1) + math.log1p(-1 / order)

    best = min((i for i, order in enumerate(ORDERS) if order.is_integer()), key=bound)
    while True:
        neighbours = [i for i in (best - 1, best + 1) if 0 <= i < len(ORDERS)]
        nearest = min(neighbours, key=bound)
        if bound(nearest) >= bound(best):
            return max(bound(best), 0.0)
        best = nearest


@lru_cache(maxsize=4096)
def _prv_epsilon(
    mechanisms: tuple[_Mechanism, ...], delta: float, rdp_epsilon: float
) -> float | None:
    """Opacus' PRV upper bound; None where PRV cannot be computed in seconds."""
    if not rdp_epsilon <= PRV_LARGEST_EPSILON or delta < PRV_SMALLEST_DELTA:
        return None
    # The bound is the estimate + error: .01 is Opacus' own, and too much for a small epsilon.
    error = min(0.01, 0.05 * rdp_epsilon)
    delta_error = delta / 1000
    total_steps = sum(steps for _, _, steps in mechanisms)
    # The domain of remark 5.6 in the paper, as Opacus' compute_safe_domain_size has it; that one
    # takes a second for its orders.
    reach = max(
        _rdp_epsilon(mechanisms, delta_error / 4),
        *(_rdp_epsilon([(q, s, 1)], delta_error / (8 * total_steps)) for q, s, _ in mechanisms),
        error,
    )
    mesh = error / math.sqrt(total_steps * math.log(12 / delta_error) / 2)
    if mesh == 0 or 2 * (reach + 3) / mesh > PRV_LARGEST_GRID:
        return None
    accountant = _opacus("prv").PRVAccountant()
    accountant.history = [(sigma, rate, steps) for rate, sigma, steps in mechanisms]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            epsilon = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
        except (ArithmeticError, ValueError, RuntimeError):
            return None
    return epsilon if 0 <= epsilon < math.inf else None


class _AccountantBase:
    """Stands in for ``opacus.accountants.accountant.IAccountant``."""

    def __init__(self) -> None:
        self.history: list[_Mechanism] = []


_ALIAS = "cytofed.privacy._opacus_accountants"


def _opacus(module: str) -> Any:
    """A module of ``opacus.accountants``, loaded without Opacus' packages around it.

    ``import opacus`` imports torch (for an abstract base class), which the ledger and the
    coordinator must not. So the same files are loaded as a package of another name, with that
    base class replaced by an empty one.
    """
    name = f"{_ALIAS}.{module}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec("opacus")
    if spec is None or spec.origin is None:
        raise InputError("opacus is not installed", hint="pip install cytofed")
    package = types.ModuleType(_ALIAS)
    package.__path__ = [str(Path(spec.origin).parent / "accountants")]
    base = types.ModuleType(f"{_ALIAS}.accountant")
    base.IAccountant = _AccountantBase  # type: ignore[attr-defined]
    sys.modules.setdefault(_ALIAS, package)
    sys.modules.setdefault(f"{_ALIAS}.accountant", base)
    return importlib.import_module(name)


def _check_sigma(sigma: float) -> None:
    if not 0 <= sigma < math.inf:
        raise InputError(f"Expected 0 <= sigma={sigma:g} < infinity")


def _check_count(name: str, count: int) -> None:
    if not count >= 1:
        raise InputError(f"Expected {name}={count} >= 1")


def _round_down(value: float) -> str:
    """One significant digit, not above ``value``."""
    exponent = math.floor(math.log10(value))
    return f"{math.floor(value / 10**exponent)}e{exponent}"
