"""Prices agree with other implementations, and nothing resets them."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from functools import cache

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from cytofed.errors import InputError
from cytofed.privacy import accounting
from cytofed.privacy.accounting import (
    Event,
    Gaussian,
    Guarantee,
    NonPrivate,
    PlanCost,
    PlanUse,
    SubsampledGaussian,
    Unit,
    across_labs,
    check_delta,
    default_delta,
    epsilon_for,
    event_from_dict,
    event_to_dict,
    in_unit,
    max_rounds,
    price,
    sigma_for,
    spend,
)

# (sampling rate, sigma, steps, delta): epsilon by PLD and Microsoft's PRV, by Opacus' PRV and RDP;
# each computed with two implementations that agree to 1e-4.
POINTS = {
    (0.01, 1.0, 1000, 1e-5): (1.8282, 1.8384, 2.1014),
    (0.032, 1.2, 2000, 1e-5): (6.9396, 6.9499, 7.5384),
    (0.1, 2.0, 500, 1e-3): (3.9803, 3.9907, 4.5086),
    (0.25, 4.0, 400, 1e-3): (4.2584, 4.2688, 4.7927),
    (1.0, 10.0, 50, 1e-3): (2.0533, 2.0636, 2.3305),
    (0.004, 0.8, 5000, 1e-6): (2.9073, 2.9175, 3.3925),
    (0.0625, 0.6, 320, 1e-4): (20.8219, 20.8333, 23.5521),
    (1.0, 1.0, 1, 1e-5): (4.3772, 4.3874, 4.7285),
}


@cache
def pld(*mechanisms: tuple[float, float, int], delta: float) -> float:
    """Google's dp-accounting: the second implementation."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for rate, sigma, steps in mechanisms:
        event = PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))
        accountant.compose(SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


def dp_sgd(rate: float, sigma: float, steps: int) -> SubsampledGaussian:
    return SubsampledGaussian("patient", rate, sigma, steps)


@pytest.mark.parametrize("point", POINTS)
def test_epsilon_matches_reference_points(point: tuple[float, float, int, float]) -> None:
    exact, prv_reference, rdp_reference = POINTS[point]
    rate, sigma, steps, delta = point
    event = dp_sgd(rate, sigma, steps)
    prv = price([event], delta)
    rdp = price([event], delta, accountant="RDP")
    assert (prv.accountant, rdp.accountant) == ("PRV", "RDP")
    assert prv.epsilon == pytest.approx(prv_reference, abs=1e-4)
    assert rdp.epsilon == pytest.approx(rdp_reference, abs=1e-4)
    assert exact <= prv.epsilon <= exact + 0.015 <= rdp.epsilon


@pytest.mark.parametrize("point", [point for point in POINTS if point[2] <= 1000])
def test_pld_le_prv_le_pld_plus_margin_le_rdp(point: tuple[float, float, int, float]) -> None:
    rate, sigma, steps, delta = point
    exact = pld((rate, sigma, steps), delta=delta)
    event = dp_sgd(rate, sigma, steps)
    prv = price([event], delta).epsilon
    assert exact - 1e-3 <= prv <= exact + 0.015 <= price([event], delta, accountant="RDP").epsilon


def test_training_and_evaluation_compose_as_in_another_implementation() -> None:
    events: list[Event] = [dp_sgd(0.25, 3.0, 40), Gaussian("patient", 12.0, 3)]
    exact = pld((0.25, 3.0, 40), (1.0, 12.0, 3), delta=1e-3)
    prv = price(events, 1e-3).epsilon
    assert exact - 1e-3 <= prv <= exact + 0.015
    assert prv <= price(events, 1e-3, accountant="RDP").epsilon


def test_one_gaussian_matches_the_closed_form() -> None:
    """Balle and Wang 2018 (arXiv:1805.06530), theorem 8: delta of the Gaussian mechanism."""
    sigma, epsilon = 2.0, price([Gaussian("patient", 2.0, 1)], 1e-3).epsilon

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * sigma), epsilon * sigma
    assert cdf(a - b) - math.exp(epsilon) * cdf(-a - b) <= 1e-3


def test_three_rounds_cost_what_one_accountant_over_all_steps_says() -> None:
    """The reset bug: a new accountant every round prints the first round's epsilon for ever."""
    one_round = dp_sgd(0.25, 2.0, 10)
    once = price([one_round], 1e-3).epsilon
    thrice = price([one_round] * 3, 1e-3).epsilon
    assert thrice == price([dp_sgd(0.25, 2.0, 30)], 1e-3).epsilon
    assert thrice > 1.4 * once


@pytest.mark.parametrize("accountant", ["PRV", "RDP"])
def test_ours_is_opacus_own_accountant(accountant: str) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    opacus = {"PRV": PRVAccountant, "RDP": RDPAccountant}[accountant]()
    opacus.history = [(2.0, 0.1, 200), (9.0, 1.0, 2)]
    events = [dp_sgd(0.1, 2.0, 200), Gaussian("patient", 9.0, 2)]
    ours = price(events, 1e-4, accountant=accountant)  # type: ignore[arg-type]
    assert ours.epsilon == pytest.approx(opacus.get_epsilon(1e-4), abs=2e-4)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(8.0, 1e-3, 0.25, 40), (3.0, 1e-4, 1.0, 50), (0.05, 1e-3, 0.25, 40)],
)
def test_calibrated_sigma_costs_what_was_asked_and_hardly_less(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = sigma_for(epsilon, delta, rate, steps)
    assert epsilon - 1e-3 <= epsilon_for(sigma, delta, rate, steps) <= epsilon
    assert epsilon_for(sigma * 0.99, delta, rate, steps) > epsilon


@pytest.mark.parametrize(
    ("patients", "delta", "sigma"), [(150, 150**-1.1, 6.45), (945, 945**-1.1, 7.71)]
)
def test_calibrated_sigma_matches_reference_points(
    patients: int, delta: float, sigma: float
) -> None:
    assert delta < 1 / patients
    assert sigma_for(3.0, delta, 1.0, 50) == pytest.approx(sigma, abs=0.06)


def test_sigma_is_calibrated_by_the_steps_that_run() -> None:
    """By epochs, 10 epochs at rate .3 become int(10/.3) = 33 steps where 34 run."""
    sigma = sigma_for(1.5, 1e-3, 0.3, 33)
    assert epsilon_for(sigma, 1e-3, 0.3, 33) <= 1.5 < epsilon_for(sigma, 1e-3, 0.3, 34)


@given(
    rate=st.floats(0.05, 1),
    sigma=st.floats(0.6, 20),
    steps=st.integers(1, 200),
    more=st.integers(1, 50),
)
@settings(max_examples=20, deadline=None)
def test_more_steps_never_cost_less(rate: float, sigma: float, steps: int, more: int) -> None:
    rate, sigma = round(rate, 1) or 0.1, round(sigma, 0) or 1.0
    events = [dp_sgd(rate, sigma, steps)]
    less = price(events, 1e-3, accountant="RDP").epsilon
    assert price([*events, dp_sgd(rate, sigma, more)], 1e-3, accountant="RDP").epsilon >= less


@pytest.mark.parametrize(
    "event", [dp_sgd(0.1, 0.0, 1), Gaussian("patient", 0.0, 1), NonPrivate(), NonPrivate("patient")]
)
def test_what_is_not_private_costs_infinity(
    event: SubsampledGaussian | Gaussian | NonPrivate,
) -> None:
    cost = price([event], 1e-3)
    assert cost.epsilon == math.inf
    assert "no differential privacy" in str(cost)


def test_where_prv_fails_rdp_is_used_and_named() -> None:
    tiny_noise = price([dp_sgd(0.25, 0.1, 400)], 1e-3)
    assert tiny_noise.accountant == "RDP"
    assert 1e3 < tiny_noise.epsilon < math.inf


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_impossible_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(InputError, match="sigma"):
        dp_sgd(0.1, sigma, 1)


@pytest.mark.parametrize("rate", [0.0, 1.1, math.nan])
def test_impossible_sampling_rate_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match="sampling_rate"):
        dp_sgd(rate, 1.0, 1)


def test_epsilon_too_low_for_any_noise_is_refused() -> None:
    with pytest.raises(InputError, match="no noise reaches"):
        sigma_for(1e-9, 1e-3, 1.0, 10**6)


def test_images_and_patients_are_not_composed() -> None:
    with pytest.raises(InputError, match="different units"):
        price([dp_sgd(0.1, 1.0, 1), Gaussian("image", 1.0, 1)], 1e-3)


@pytest.mark.parametrize("patients", [100, 1000, 2306])
def test_delta_times_patients_is_at_most_a_half_and_by_default_a_tenth(patients: int) -> None:
    check_delta(1 / (2 * patients), patients)
    with pytest.raises(InputError, match=rf"N={patients:d} patients.*delta x N is 0\.51") as error:
        check_delta(0.51 / patients, patients)
    wayout = float(error.value.hint.split("privacy.delta=")[1].split()[0])
    check_delta(wayout, patients)
    assert default_delta(patients) == 1e-5
    assert default_delta(1000 * patients) == 1 / (10 * 1000 * patients)


def test_a_guarantee_over_known_patients_says_delta_times_them() -> None:
    cost = Guarantee(3.0912, 1e-5, "patient", "PRV", patients=2306)
    told = (
        "epsilon 3.10 at delta 1e-05 (x 2,306 patients: 0.023), per patient, add-or-remove, by PRV"
    )
    assert str(cost) == told


def test_max_rounds_is_the_last_number_that_fits() -> None:
    cost = PlanCost(1e-3, 150, 20, dp_sgd(0.25, 2.0, 4), Gaussian("patient", 10.0, 1), 5)
    before = [PlanUse.all_of([Gaussian("patient", 5.0, 1)])]
    rounds = max_rounds(cost, epsilon=4.0, delta=1e-4, before=before)

    def reached(number: int) -> float:
        plan = PlanUse.all_of(cost.with_rounds(number).events())
        return spend([*before, plan], 1e-4).epsilon

    assert reached(rounds) <= 4.0 < reached(rounds + 1)
    assert max_rounds(cost, epsilon=0.01, delta=1e-4) == 0
    assert max_rounds(cost.with_rounds(2), epsilon=100.0, delta=1e-4) == 2


@pytest.mark.parametrize("delta", [1e-9, 1e-11, 1e-14, 1e-20])
def test_a_delta_in_the_rounding_of_sums_is_priced_from_above(delta: float) -> None:
    """Against the closed form of the Gaussian mechanism, in logarithms."""
    cost = price([Gaussian("patient", 10.0, 50)], delta)
    mu = math.sqrt(50) / 10
    inside = float(log_ndtr(mu / 2 - cost.epsilon / mu))
    outside = cost.epsilon + float(log_ndtr(-mu / 2 - cost.epsilon / mu))
    assert inside + math.log1p(-math.exp(outside - inside)) <= math.log(delta)
    assert cost.accountant == ("PRV" if delta >= accounting.PRV_SMALLEST_DELTA else "RDP")


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-12])
def test_many_steps_at_a_small_delta_are_priced_from_above(delta: float) -> None:
    """A thousand steps: PRV gave 11.9920 at delta 1e-12, where 11.9921 is exact."""
    cost, mu = price([Gaussian("patient", 20.0, 1000)], delta), math.sqrt(1000) / 20
    inside = float(log_ndtr(mu / 2 - cost.epsilon / mu))
    outside = cost.epsilon + float(log_ndtr(-mu / 2 - cost.epsilon / mu))
    assert inside + math.log1p(-math.exp(outside - inside)) <= math.log(delta)


# --- what is spent over plans

PLANS = st.tuples(
    st.sampled_from([0.05, 0.25, 1.0]), st.floats(1.5, 12.0), st.integers(2, 60), st.booleans()
)


def used(rate: float, sigma: float, rounds: int, share: float) -> PlanUse:
    """A plan of two steps a round, of which a share of the rounds came to pass."""
    steps = max(1, round(share * rounds))
    return PlanUse((dp_sgd(rate, sigma, 2 * rounds),), (dp_sgd(rate, sigma, 2 * steps),))


@given(st.lists(PLANS, min_size=1, max_size=4), st.sampled_from([1e-3, 1e-5]))
@settings(max_examples=12, deadline=None)
def test_what_is_spent_is_never_below_the_exact_composition(
    plans: list[tuple[float, float, int, bool]], delta: float
) -> None:
    shares = [0.4 if ended else 1.0 for *_, ended in plans]
    uses = [used(*plan[:3], share) for plan, share in zip(plans, shares, strict=True)]
    steps = [2 * max(1, round(s * plan[2])) for plan, s in zip(plans, shares, strict=True)]
    exact = pld(*((p[0], p[1], n) for p, n in zip(plans, steps, strict=True)), delta=delta)
    assert spend(uses, delta).epsilon >= exact - 1e-3


@given(PLANS, st.lists(PLANS, max_size=3))
@settings(max_examples=10, deadline=None)
def test_what_is_spent_never_falls_and_a_part_of_a_plan_costs_at_most_the_plan(
    plan: tuple[float, float, int, bool], others: list[tuple[float, float, int, bool]]
) -> None:
    rate, sigma, rounds, _ = plan
    before = [used(*other[:3], 0.5 if other[3] else 1.0) for other in others]
    spent = [
        spend([*before, used(rate, sigma, rounds, share)], 1e-5).epsilon
        for share in (0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    assert spent == sorted(spent)
    assert spend(before, 1e-5).epsilon <= spent[0]
    if not before:
        assert spent[-1] == price([dp_sgd(rate, sigma, 2 * rounds)], 1e-5).epsilon


def test_a_small_plan_beside_a_large_one_costs_little_more_than_itself() -> None:
    large = PlanUse.all_of([dp_sgd(1.0, 3.0, 40)])
    small = PlanUse.all_of([dp_sgd(0.25, 20.0, 4)])
    both = spend([large, small], 1e-5)
    by_rdp = price([*large.used, *small.used], 1e-5, accountant="RDP").epsilon
    assert both.accountant == "PRV + RDP"
    assert both.epsilon < by_rdp - 0.5
    assert both.epsilon < spend([large], 1e-5).epsilon + 0.5


@pytest.mark.parametrize(("rate", "sigma", "steps", "k"), [(0.02, 30.0, 4, 8), (0.2, 40.0, 3, 3)])
def test_a_patient_of_k_images_pays_for_no_less_than_the_exact_mixture(
    rate: float, sigma: float, steps: int, k: int
) -> None:
    """The exact mechanism: the sum of so many of k images as a Poisson draw has."""
    event = in_unit(SubsampledGaussian("image", rate, sigma, steps), "patient", k)
    found = price([event], 1e-5).epsilon
    chances = [math.comb(k, j) * rate**j * (1 - rate) ** (k - j) for j in range(k + 1)]
    mixture = MixtureOfGaussiansDpEvent(sigma, list(range(k + 1)), chances)
    accountant = PLDAccountant()
    accountant.compose(mixture, steps)
    exact = float(accountant.get_epsilon(1e-5))
    assert found >= exact - 1e-3
    assert exact > epsilon_for(sigma, 1e-5, rate, steps), "more than one image pays"
    released = in_unit(Gaussian("image", sigma, steps), "patient", k)
    assert released == Gaussian("patient", sigma / k, steps)


def test_what_says_nothing_of_a_patient_has_no_bound() -> None:
    events: list[Event] = [NonPrivate(), dp_sgd(0.5, 1.0, 1), Gaussian("image", 1.0, 1)]
    for event in events:
        unit: Unit = "image" if event.unit == "patient" else "patient"
        assert in_unit(event, unit) == NonPrivate(unit)
    whole = PlanUse.all_of([dp_sgd(0.25, 2.0, 4), NonPrivate("patient")])
    assert spend([whole], 1e-5).epsilon == math.inf


@pytest.mark.parametrize(("rounds", "every", "evaluations"), [(10, 5, 2), (10, 3, 4), (1, 5, 1)])
def test_a_plan_evaluates_every_few_rounds_and_at_its_end(
    rounds: int, every: int, evaluations: int
) -> None:
    cost = PlanCost(1e-3, 9, rounds, dp_sgd(0.5, 1.0, 1), Gaussian("patient", 1.0, 1), every)
    assert cost.evaluations == evaluations
    assert cost.events()[1] == Gaussian("patient", 1.0, evaluations)


def test_a_patient_at_two_labs_pays_at_both() -> None:
    labs = [Guarantee(3.0, 1e-4, "patient", "PRV"), Guarantee(2.0, 1e-3, "patient", "PRV")]
    apart, overlap = across_labs(labs, "disjoint"), across_labs(labs, "may_overlap")
    assert (apart.epsilon, apart.delta) == (3.0, 1e-3)
    assert overlap.epsilon == 5.0
    assert overlap.delta == pytest.approx(1.1e-3)


def test_an_epsilon_is_printed_with_delta_unit_and_adversary_and_never_too_low() -> None:
    cost = Guarantee(3.0912, 1e-5, "patient", "PRV")
    assert str(cost) == "epsilon 3.10 at delta 1e-05, per patient, add-or-remove, by PRV"


@given(st.floats(0.001, 1), st.floats(0, 100), st.integers(1, 10**6))
@settings(max_examples=30, deadline=None)
def test_events_survive_json(rate: float, sigma: float, steps: int) -> None:
    for event in (dp_sgd(rate, sigma, steps), Gaussian("image", sigma, steps), NonPrivate()):
        assert event_from_dict(event_to_dict(event)) == event


def test_gdp_is_not_offered() -> None:
    """It underestimates: 1.6177 where 1.8282 is exact."""
    text = inspect.getsource(accounting)
    assert "GaussianAccountant" not in text
    assert '"gdp"' not in text


def test_prices_and_ledger_need_no_torch() -> None:
    code = (
        "import sys; import cytofed.privacy.ledger; from cytofed.privacy.accounting import *;"
        "price([SubsampledGaussian('patient', .25, 4, 40)], 1e-3); sigma_for(8, 1e-3, 1.0, 4);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
