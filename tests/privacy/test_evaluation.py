"""Scores under differential privacy: one patient's part is bounded, noised and paid for.

Shapes: N cells, U units, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cytofed.errors import InputError, VerificationError
from cytofed.labels import load_scheme
from cytofed.messages import MAX_COUNT, BadMessage, Evaluation, new_message, pack_evaluation
from cytofed.messages import unpack_evaluation as unpack
from cytofed.metrics import Tally, summarise
from cytofed.plan import Plan, load_plan
from cytofed.plan_check import check_plan, score_prices
from cytofed.privacy import evaluation
from cytofed.privacy.accounting import Gaussian, price
from cytofed.privacy.encoding import encode
from cytofed.privacy.evaluation import (
    TallyMechanism,
    check_release,
    clipped_confusion,
    denoised,
    noised_tally,
)
from cytofed.privacy.ledger import Ledger, NotApproved, Order
from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness
from cytofed.privacy.terms import Terms, terms_of
from cytofed.secure_round import (
    protocol_round,
    tally_encoding,
    tally_limbs,
    tally_of_sum,
)

CLASSES = 5
MECHANISM = TallyMechanism(sigma=2.0, cells_per_unit=16)


def lab(seed: int, cells_of_unit: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, targets (some coarse) and units of a lab; patients differ in their mix."""
    rng = np.random.default_rng(seed)
    unit_N = np.repeat(np.arange(len(cells_of_unit)), cells_of_unit)
    mix_UC = rng.dirichlet(np.full(CLASSES, 0.3), len(cells_of_unit))
    truth_N = np.array([rng.choice(CLASSES, p=mix_UC[u]) for u in unit_N], dtype=int)
    targets_NC = np.eye(CLASSES, dtype=bool)[truth_N].reshape(-1, CLASSES)
    targets_NC[rng.random(len(unit_N)) < 0.1, :2] = True
    return rng.dirichlet(np.ones(CLASSES), len(unit_N)), targets_NC, unit_N


# --- sensitivity


@given(
    seed=st.integers(0, 2**32),
    cells=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cells_per_unit=st.sampled_from([1, 4, 16]),
)
@settings(max_examples=60, deadline=None)
def test_one_patient_changes_the_matrix_by_at_most_the_bound(
    seed: int, cells: list[int], cells_per_unit: int
) -> None:
    """Also one with more cells than a patient may have: nothing rests on who counted."""
    mechanism = TallyMechanism(1.0, cells_per_unit)
    probs_NC, targets_NC, unit_N = lab(seed, cells)
    whole_CC = clipped_confusion(probs_NC, targets_NC, unit_N, mechanism)
    for unit in range(len(cells)):
        rest_N = unit_N != unit
        rest_CC = clipped_confusion(probs_NC[rest_N], targets_NC[rest_N], unit_N[rest_N], mechanism)
        assert np.linalg.norm(whole_CC - rest_CC) <= mechanism.max_norm * (1 + 1e-12)


def test_the_bound_is_reached_so_the_noise_is_not_wasted() -> None:
    one_class_NC = np.eye(CLASSES, dtype=bool)[np.zeros(16, int)]
    found_CC = clipped_confusion(
        one_class_NC.astype(float), one_class_NC, np.zeros(16, int), MECHANISM
    )
    assert found_CC[0, 0] == pytest.approx(4.0) == MECHANISM.max_norm


def test_patients_below_the_bound_are_counted_as_they_are() -> None:
    targets_NC = np.eye(CLASSES, dtype=bool)  # a cell of each class
    found_CC = clipped_confusion(
        np.roll(targets_NC, 1, axis=1).astype(float), targets_NC, np.zeros(CLASSES, int), MECHANISM
    )
    assert found_CC.tolist() == np.roll(np.eye(CLASSES), 1, axis=1).tolist()


def test_what_a_patient_weighs_does_not_depend_on_what_the_model_said() -> None:
    probs_NC, targets_NC, unit_N = lab(3, [16, 9, 30])
    wrong_CC = clipped_confusion(probs_NC, targets_NC, unit_N, MECHANISM)
    right_CC = clipped_confusion(targets_NC.astype(float), targets_NC, unit_N, MECHANISM)
    np.testing.assert_allclose(wrong_CC.sum(axis=1), right_CC.sum(axis=1))
    assert np.count_nonzero(right_CC - np.diag(np.diag(right_CC))) == 0


def test_a_cell_without_finite_probabilities_counts_nothing_and_disturbs_nobody() -> None:
    """``tally`` refuses the whole lab for it, which would tell of one patient."""
    probs_NC, targets_NC, unit_N = lab(4, [8, 8])
    broken_NC = probs_NC.copy()
    broken_NC[0] = np.nan
    found_CC = clipped_confusion(broken_NC, targets_NC, unit_N, MECHANISM)
    without_CC = clipped_confusion(probs_NC[1:], targets_NC[1:], unit_N[1:], MECHANISM)
    assert np.isfinite(found_CC).all()
    np.testing.assert_allclose(found_CC, without_CC)


# --- noise


def test_noise_has_the_promised_scale_on_every_count_of_a_lab_without_cells() -> None:
    empty_CC = clipped_confusion(
        np.zeros((0, 21)), np.zeros((0, 21), bool), np.zeros(0, int), MECHANISM
    )
    assert empty_CC.shape == (21, 21)
    randomness = SystemRandomness()
    draws_RD = np.array(
        [noised_tally(empty_CC, MECHANISM, randomness).confusion_CC.ravel() for _ in range(200)]
    )
    promised = math.sqrt(MECHANISM.noise_sd**2 + 1 / 12)  # rounding to whole numbers
    assert MECHANISM.noise_sd == 2.0 * 4.0
    assert draws_RD.std() == pytest.approx(promised, rel=0.02)
    assert (draws_RD.std(axis=0) > 0.7 * promised).all()
    assert abs(draws_RD.mean()) < 0.2


def test_calibration_is_not_released() -> None:
    tally = noised_tally(np.zeros((CLASSES, CLASSES)), MECHANISM, SystemRandomness())
    assert not tally.bins_B3.any()


@pytest.mark.parametrize(("sigma", "cells"), [(0.0, 16), (-1.0, 16), (math.inf, 16), (1.0, 0)])
def test_no_setting_switches_the_noise_off(sigma: float, cells: int) -> None:
    with pytest.raises(InputError, match="Expected"):
        TallyMechanism(sigma, cells)


# --- reading it


@given(arrays(np.int64, (4, 4), elements=st.integers(0, 500)))
def test_counts_without_noise_are_read_as_they_are(counts_CC: np.ndarray) -> None:
    found = denoised(Tally(counts_CC, Tally.empty(4).bins_B3))
    if counts_CC.any():
        assert found is not None
        assert (found.confusion_CC == counts_CC).all()
    else:
        assert found is None


@given(arrays(np.int64, (4, 4), elements=st.integers(-300, 500)))
def test_noised_counts_are_read_with_their_total_and_none_below_zero(counts_CC: np.ndarray) -> None:
    found = denoised(Tally(counts_CC, Tally.empty(4).bins_B3))
    if found is None:
        assert counts_CC.sum() < 8
    else:
        assert found.confusion_CC.min() >= 0
        assert abs(found.images - counts_CC.sum()) <= counts_CC.size / 2  # rounding


def test_scores_of_noised_counts_are_nearer_to_the_truth_than_of_clamped_ones() -> None:
    scheme = load_scheme("bone-marrow-21")
    rng = np.random.default_rng(0)
    truth_CC = np.diag(rng.integers(20, 200, 21)) + rng.integers(0, 3, (21, 21))
    exact = summarise(Tally(truth_CC, Tally.empty(21).bins_B3), scheme)["accuracy"]
    off_read, off_clamped = [], []
    for number in range(10):
        noised = noised_tally(truth_CC.astype(float), MECHANISM, SimulatedRandomness(0, number))
        read = denoised(noised)
        assert read is not None
        off_read.append(abs(summarise(read, scheme)["accuracy"] - exact))
        off_clamped.append(abs(summarise(noised, scheme)["accuracy"] - exact))
    assert np.mean(off_read) < 0.5 * np.mean(off_clamped)


# --- the self-check, and faults planted in what it checks


def test_what_ships_passes_its_self_check() -> None:
    check_release(SystemRandomness)


def noise_off(confusion_CC: Any, _mechanism: Any, _randomness: Randomness) -> Tally:
    return Tally(np.rint(confusion_CC).astype(np.int64), Tally.empty(len(confusion_CC)).bins_B3)


def noise_halved(confusion_CC: Any, mechanism: Any, randomness: Randomness) -> Tally:
    return noised_tally(confusion_CC, TallyMechanism(mechanism.sigma / 2, 16), randomness)


def noise_on_what_is_counted(confusion_CC: Any, mechanism: Any, randomness: Randomness) -> Tally:
    noised = noised_tally(confusion_CC, mechanism, randomness)
    return Tally(np.where(confusion_CC > 0, noised.confusion_CC, 0), noised.bins_B3)


def noise_frozen(confusion_CC: Any, mechanism: Any, _randomness: Randomness) -> Tally:
    return noised_tally(confusion_CC, mechanism, SimulatedRandomness(0))


@pytest.mark.parametrize("fault", [noise_off, noise_halved, noise_on_what_is_counted, noise_frozen])
def test_a_fault_of_the_noise_is_caught(
    fault: Callable[..., Tally], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "noised_tally", fault)
    with pytest.raises(VerificationError, match="evaluation"):
        check_release(SystemRandomness)


def test_a_patient_that_is_not_clipped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_clipped(probs: Any, targets: Any, units: Any, mechanism: Any) -> Any:
        return clipped_confusion(probs, targets, np.arange(len(units)), mechanism)

    monkeypatch.setattr(evaluation, "clipped_confusion", not_clipped)
    with pytest.raises(VerificationError, match="one patient changes"):
        check_release(SystemRandomness)


def test_a_seed_shared_by_two_evaluations_is_caught() -> None:
    with pytest.raises(VerificationError, match="same noise"):
        check_release(lambda: SimulatedRandomness(0))


# --- price, hold and ledger


TRAINED = ("privacy.unit=patient", "privacy.sigma=4")
"""a given sigma: none is searched for"""


def plan(*overrides: str) -> Plan:
    return load_plan("demo", [*TRAINED, "evaluation.sigma=5", *overrides])


def terms(*overrides: str) -> Terms:
    found = terms_of(plan(*overrides))
    assert found is not None
    return found


@pytest.mark.parametrize(("rounds", "every", "releases"), [(10, 1, 10), (10, 4, 3), (3, 9, 1)])
def test_scores_have_a_price_of_their_own_and_add_to_the_total(
    rounds: int, every: int, releases: int
) -> None:
    overrides = (f"train.rounds={rounds}", f"evaluation.every={every}")
    found = score_prices(plan(*overrides))
    alone = price([Gaussian("patient", 5.0, releases)], 1e-5).epsilon
    assert found["evaluation"]["epsilon"] == pytest.approx(alone)
    assert found["evaluation"]["releases"] == releases
    training = terms(*overrides).guarantee.epsilon
    assert max(training, alone) < found["total"]["epsilon"] < training + alone
    assert "per patient, add-or-remove" in found["total"]["statement"]


def test_without_sigma_nothing_is_paid_for_scores() -> None:
    quiet = load_plan("demo", TRAINED)
    found = terms_of(quiet)
    assert found is not None
    assert found.cost(100).evaluation is None
    assert found.total() == found.guarantee
    assert score_prices(quiet)["evaluation"] is None
    assert not quiet.releases_scores
    assert plan().releases_scores
    assert load_plan("demo").releases_scores


def test_a_hold_covers_the_scores_of_the_plan_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path)
    cost = terms("train.rounds=5", "evaluation.every=2").cost(100)
    with Ledger.open(path) as ledger:
        hold = ledger.hold(federation="marrow", plan_sha256="a" * 64, cost=cost)
        assert hold.remaining == {"train": 5, "evaluate": 3}
        assert ledger.balance().held.epsilon == price(cost.events(), 1e-5).epsilon
        for number in (2, 4, 5):
            ledger.reserve(_order(number))
        told = [(e["mechanism"], e["sigma"], e["count"]) for e in ledger.summary()["events"]]
        assert told == [("gaussian", 5.0, 1)] * 3
        with pytest.raises(NotApproved, match="evaluate"):
            ledger.reserve(_order(6))


def _order(number: int) -> Order:
    text = str(number)
    return Order("marrow", "run-1", number, 0, "a" * 64, text, text, task="evaluate")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["evaluation.sigma=5"], "unit"),
        (["privacy.unit=patient", "evaluation.sigma=5", "evaluation.fraction=0"], "fraction"),
        (["privacy.unit=patient", "evaluation.sigma=5", "evaluation.per_lab=true"], "per_lab"),
        (["secure_aggregation.enabled=true", "evaluation.per_lab=true"], "per_lab"),
    ],
)
def test_plans_that_promise_what_scores_cannot_keep_are_refused(
    overrides: list[str], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        check_plan(load_plan("demo", overrides))


@pytest.mark.parametrize("sigma", ["0", "-1", "nan"])
def test_impossible_sigma_is_refused(sigma: str) -> None:
    with pytest.raises(InputError, match=r"evaluation\.sigma"):
        load_plan("demo", ["privacy.unit=patient", f"evaluation.sigma={sigma}"])


def test_a_plan_without_noise_on_scores_says_that_a_deployment_tells_none() -> None:
    told = "evaluation.sigma is not set"
    assert any(told in warning for warning in check_plan(load_plan("demo", TRAINED)))
    assert not any(told in warning for warning in check_plan(plan()))


def test_secure_aggregation_tells_no_lab_s_own_scores_by_default() -> None:
    assert not load_plan("demo", ["secure_aggregation.enabled=true"]).reports_per_lab


# --- messages and the secure sum


def tally_of(confusion_CC: np.ndarray, bins: int = 0) -> Tally:
    bins_B3 = Tally.empty(len(confusion_CC)).bins_B3 + bins
    return Tally(confusion_CC.astype(np.int64), bins_B3)


@given(data=st.data(), labs=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_tallies_come_out_of_the_ring_sum_exactly(data: st.DataObject, labs: int) -> None:
    counts = st.integers(-MAX_COUNT, MAX_COUNT)
    tallies = [
        tally_of(data.draw(arrays(np.int64, (3, 3), elements=counts)), data.draw(counts))
        for _ in range(min(labs, 4))
    ]
    tallies += [tally_of(np.full((3, 3), MAX_COUNT), MAX_COUNT)] * (labs - len(tallies))
    encoding = tally_encoding(3, labs=labs)
    total_W = np.zeros(encoding.words, encoding.dtype)
    for number, tally in enumerate(tallies):
        encoded = encode(tally_limbs(tally), encoding, rng=np.random.default_rng(number))
        assert encoded.clamped == 0
        total_W += encoded.words_W
    found = tally_of_sum(total_W, encoding, count=labs, classes=3)
    assert (found.vector_D == sum(tally.vector_D for tally in tallies)).all()


def test_a_round_s_evaluation_has_a_number_of_its_own_after_its_training() -> None:
    numbers = [protocol_round(kind, n) for n in (1, 2, 3) for kind in ("train", "evaluate")]
    assert numbers == sorted(set(numbers))


def test_only_noised_counts_may_be_negative() -> None:
    content = pack_evaluation(Evaluation("leeds", "run", 1, tally_of(np.full((3, 3), -5))))
    message = new_message(content, kind="evaluate", node=1, group="1", ttl_s=60)
    assert unpack(message, classes=3, noised=True).tally.images == -45
    with pytest.raises(BadMessage, match="negative"):
        unpack(message, classes=3)
    absurd = pack_evaluation(Evaluation("leeds", "run", 1, tally_of(np.full((3, 3), -(2**41)))))
    with pytest.raises(BadMessage, match="absurd"):
        unpack(
            new_message(absurd, kind="evaluate", node=1, group="1", ttl_s=60),
            classes=3,
            noised=True,
        )
