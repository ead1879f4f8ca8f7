"""Claims about scores, checked by hand and against a slow reading of the definitions.

Shapes: N images, C classes.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cytofed.errors import InputError
from cytofed.labels import Scheme, load_scheme
from cytofed.metrics import (
    BINS,
    TEMPERATURES,
    Tally,
    absent_recall,
    gap,
    interval,
    spread,
    summarise,
    summarise_labs,
    tally,
)

# MYB and PMO are neighbours in maturation and tolerated; LYT is another lineage.
SCHEME = Scheme(
    name="small",
    codes=("LYT", "MYB", "PMO"),
    names={"LYT": "lymphocyte", "MYB": "myelocyte", "PMO": "promyelocyte"},
    tolerated=frozenset({("MYB", "PMO")}),
)


def counted(confusion_CC: list[list[int]] | np.ndarray) -> Tally:
    """A tally with this confusion matrix and empty bins."""
    matrix_CC = np.array(confusion_CC, dtype=np.int64)
    return Tally(matrix_CC, Tally.empty(len(matrix_CC)).bins_B3)


def one_hot(classes_N: np.ndarray, classes: int = 3) -> np.ndarray:
    """Exact targets."""
    return np.asarray(np.eye(classes, dtype=bool)[classes_N])


def slow_summary(truth: list[str], guess: list[str], scheme: Scheme) -> dict[str, Any]:
    """The definitions, image by image, without a matrix."""

    def f1(precision: float, recall: float) -> float:
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def scores(code: str, tolerant: bool) -> dict[str, float]:
        def right(t: str, g: str) -> bool:
            pair = (t, g) in scheme.tolerated or (g, t) in scheme.tolerated
            return t == g or (tolerant and pair)

        of_class = [right(t, g) for t, g in zip(truth, guess, strict=True) if t == code]
        called = [right(t, g) for t, g in zip(truth, guess, strict=True) if g == code]
        precision = sum(called) / len(called) if called else 0.0
        recall = sum(of_class) / len(of_class) if of_class else 0.0
        return {
            "precision": precision,
            "recall": recall,
            "f1": f1(precision, recall),
            "support": len(of_class),
        }

    strict = {code: scores(code, False) for code in scheme.codes}
    loose = {code: scores(code, True) for code in scheme.codes}
    present = sorted(set(truth))
    images = len(truth)

    def mean(table: dict[str, dict[str, float]], key: str) -> float:
        return sum(table[code][key] for code in present) / len(present)

    return {
        "macro_f1": mean(strict, "f1"),
        "balanced_accuracy": mean(strict, "recall"),
        "accuracy": sum(t == g for t, g in zip(truth, guess, strict=True)) / images,
        "weighted_f1": sum(v["f1"] * v["support"] for v in strict.values()) / images,
        "per_class": strict,
        "macro_precision": mean(loose, "precision"),
        "macro_recall": mean(loose, "recall"),
        "tolerant_f1": mean(loose, "f1"),
    }


def predictions(classes: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Lists of (truth, prediction)."""
    label = st.integers(0, classes - 1)
    return st.lists(st.tuples(label, label), min_size=1, max_size=60)


def test_scores_of_a_small_matrix_are_those_computed_by_hand() -> None:
    result = summarise(counted([[8, 2, 0], [0, 6, 4], [1, 3, 6]]), SCHEME)
    assert result["accuracy"] == pytest.approx(20 / 30)
    assert result["per_class"]["LYT"] == pytest.approx(
        {"precision": 8 / 9, "recall": 0.8, "f1": 16 / 19, "support": 10}
    )
    assert result["per_class"]["MYB"]["f1"] == pytest.approx(12 / 21)
    assert result["per_class"]["PMO"]["f1"] == pytest.approx(12 / 20)
    assert result["macro_f1"] == pytest.approx((16 / 19 + 12 / 21 + 12 / 20) / 3)
    tolerant = result["tolerant"]["per_class"]
    assert tolerant["LYT"] == result["per_class"]["LYT"]
    assert tolerant["MYB"]["precision"] == pytest.approx((6 + 3) / 11)
    assert tolerant["MYB"]["recall"] == pytest.approx(1.0)
    assert tolerant["PMO"]["precision"] == pytest.approx(1.0)
    assert tolerant["PMO"]["recall"] == pytest.approx(0.9)


@settings(max_examples=40)
@given(predictions(3))
def test_scores_agree_with_a_slow_reading_of_the_definitions(pairs: list[tuple[int, int]]) -> None:
    truth_N, guess_N = np.array(pairs).T
    result = summarise(tally(np.eye(3)[guess_N], one_hot(truth_N)), SCHEME)
    slow = slow_summary(
        [SCHEME.codes[t] for t in truth_N], [SCHEME.codes[g] for g in guess_N], SCHEME
    )
    for key in ("macro_f1", "balanced_accuracy", "accuracy", "weighted_f1"):
        assert result[key] == pytest.approx(slow[key])
    for code in SCHEME.codes:
        assert result["per_class"][code] == pytest.approx(slow["per_class"][code])
    assert result["tolerant"]["macro_precision"] == pytest.approx(slow["macro_precision"])
    assert result["tolerant"]["macro_recall"] == pytest.approx(slow["macro_recall"])
    assert result["tolerant"]["macro_f1"] == pytest.approx(slow["tolerant_f1"])


@settings(max_examples=40)
@given(predictions(21))
def test_tolerant_scores_are_never_below_strict_ones(pairs: list[tuple[int, int]]) -> None:
    truth_N, guess_N = np.array(pairs).T
    scheme = load_scheme("bone-marrow-21")
    result = summarise(tally(np.eye(21)[guess_N], one_hot(truth_N, 21)), scheme)
    assert result["tolerant"]["macro_f1"] >= result["macro_f1"] - 1e-12
    for code, strict in result["per_class"].items():
        for key in ("precision", "recall", "f1"):
            assert result["tolerant"]["per_class"][code][key] >= strict[key] - 1e-12


@settings(max_examples=30)
@given(arrays(np.int64, (21, 21), elements=st.integers(0, 50)))
def test_all_scores_lie_between_0_and_1_and_are_json(confusion_CC: np.ndarray) -> None:
    confusion_CC[0, 0] += 1
    result = summarise(counted(confusion_CC), load_scheme("bone-marrow-21"))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    numbers = [result[k] for k in ("macro_f1", "balanced_accuracy", "accuracy", "weighted_f1")]
    numbers += [result["tolerant"][k] for k in ("macro_f1", "macro_precision", "macro_recall")]
    assert all(0 <= n <= 1 + 1e-12 for n in numbers)


@settings(max_examples=40)
@given(
    arrays(np.float64, (24, 3), elements=st.floats(0.01, 1)),
    arrays(np.int64, 24, elements=st.integers(0, 2)),
    st.lists(st.integers(0, 3), min_size=24, max_size=24),
)
def test_tallies_of_labs_add_up_to_the_tally_of_all_images(
    weights_NC: np.ndarray, truth_N: np.ndarray, labs: list[int]
) -> None:
    probs_NC = (weights_NC / weights_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    lab_N = np.array(labs)
    whole = tally(probs_NC, one_hot(truth_N))
    parts = [tally(probs_NC[lab_N == k], one_hot(truth_N[lab_N == k])) for k in range(4)]
    for order in itertools.islice(itertools.permutations(parts), 0, 24, 7):
        total = sum(order, Tally.empty(3))
        assert np.array_equal(total.vector_D, whole.vector_D)


def test_sum_of_vectors_is_the_vector_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        tally(rng.dirichlet(np.ones(3), 50), one_hot(rng.integers(0, 3, 50))) for _ in range(2)
    )
    rebuilt = Tally.from_vector(one.vector_D + other.vector_D, 3)
    assert np.array_equal(rebuilt.confusion_CC, (one + other).confusion_CC)
    assert np.array_equal(rebuilt.bins_B3, (one + other).bins_B3)


def test_coarse_labelled_images_are_left_out() -> None:
    probs_NC = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]])
    targets_NC = np.array([[True, False, False], [False, True, True]])
    result = tally(probs_NC, targets_NC)
    assert result.images == 1
    assert result.bins_B3[:, 0].sum() == 1


def test_calibration_error_of_an_overconfident_model_is_its_overconfidence() -> None:
    probs_NC = np.tile([0.9, 0.05, 0.05], (10, 1))
    result = summarise(tally(probs_NC, one_hot(np.array([0] * 6 + [1] * 4))), SCHEME)
    assert result["ece"] == pytest.approx(0.3)
    assert result["reliability"] == [{"confidence": 0.9, "accuracy": 0.6, "images": 10}]


def test_calibration_error_agrees_with_a_slow_implementation() -> None:
    rng = np.random.default_rng(1)
    probs_NC = rng.dirichlet(np.full(3, 0.4), 500)
    truth_N = rng.integers(0, 3, 500)
    slow = 0.0
    for b in range(BINS):
        inside = [
            (p.max(), int(p.argmax() == t))
            for p, t in zip(probs_NC, truth_N, strict=True)
            if b / BINS < p.max() <= (b + 1) / BINS
        ]
        if inside:
            confidence, right = (sum(v) / len(inside) for v in zip(*inside, strict=True))
            slow += len(inside) / 500 * abs(right - confidence)
    result = summarise(tally(probs_NC, one_hot(truth_N)), SCHEME)
    assert result["ece"] == pytest.approx(slow, abs=2e-6)


def test_every_confidence_has_a_bin_and_bins_include_their_upper_edge() -> None:
    confidences = [0.0, 1 / 15, 0.2, 0.2 + 1e-6, 1.0]
    probs_NC = np.zeros((5, 3))
    probs_NC[:, 0] = confidences
    bins_B3 = tally(probs_NC, one_hot(np.zeros(5, int))).bins_B3
    assert bins_B3[:, 0].sum() == 5
    assert [int(bins_B3[b, 0]) for b in (0, 1, 2, 3, 14)] == [1, 1, 1, 1, 1]


def overconfident(
    rng: np.random.Generator, images: int, sharpness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are ``sharpness`` times what they should be, and the truth."""
    logits_NC = rng.normal(0, 1.5, (images, 3))
    right_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    truth_N = np.array([rng.choice(3, p=p) for p in right_NC])
    powers_NC = np.exp(sharpness * logits_NC)
    return powers_NC / powers_NC.sum(axis=1, keepdims=True), one_hot(truth_N)


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 3.0])
def test_temperature_of_a_sum_over_labs_undoes_what_logits_were_multiplied_with(
    sharpness: float,
) -> None:
    rng = np.random.default_rng(3)
    labs = [
        tally(*overconfident(rng, 1000, sharpness), overconfident(rng, images, sharpness))
        for images in (500, 700, 300)
    ]
    whole = sum(labs, Tally.empty(3))
    assert whole.temperature == pytest.approx(sharpness, rel=0.15)
    after = summarise(whole, SCHEME, whole.temperature)
    before = summarise(whole, SCHEME)
    assert after["ece"] < 0.03
    assert after["calibration"]["ece_before"] == before["ece"]
    assert after["macro_f1"] == before["macro_f1"]
    if sharpness == 3.0:
        assert before["ece"] > 0.1


def test_bins_at_a_temperature_are_those_of_a_model_whose_logits_are_divided_by_it() -> None:
    rng = np.random.default_rng(4)
    probs_NC, targets_NC = overconfident(rng, 400, 2.0)
    found = tally(probs_NC, targets_NC, (probs_NC, targets_NC))
    assert found.temperature is not None
    powers_NC = probs_NC ** (1 / found.temperature)
    divided = tally(powers_NC / powers_NC.sum(axis=1, keepdims=True), targets_NC)
    assert np.array_equal(found.at(found.temperature).bins_B3, divided.bins_B3)


def test_without_a_calibration_part_there_is_no_temperature() -> None:
    rng = np.random.default_rng(5)
    probs_NC, targets_NC = overconfident(rng, 50, 2.0)
    nothing = (probs_NC[:0], targets_NC[:0])
    for found in (tally(probs_NC, targets_NC), tally(probs_NC, targets_NC, nothing)):
        assert found.temperature is None
        assert summarise(found, SCHEME, found.temperature)["calibration"] is None
    assert (Tally.from_vector(found.vector_D, 3).vector_D == found.vector_D).all()


def test_a_label_that_allows_several_classes_counts_for_the_temperature() -> None:
    probs_NC = np.array([[0.6, 0.3, 0.1]])
    both = np.array([[True, True, False]])
    loss_T = tally(probs_NC, both, (probs_NC, both)).tempered_TD[:, 0]
    assert loss_T[TEMPERATURES.index(1.0)] == pytest.approx(-1e6 * math.log(0.9), abs=1)


def test_answering_only_the_confident_images_ends_at_the_accuracy_of_all() -> None:
    rng = np.random.default_rng(2)
    result = summarise(
        tally(rng.dirichlet(np.ones(3), 200), one_hot(rng.integers(0, 3, 200))), SCHEME
    )
    points = result["accuracy_coverage"]
    coverages = [p["coverage"] for p in points]
    assert coverages == sorted(coverages)
    assert points[-1] == pytest.approx({"coverage": 1.0, "accuracy": result["accuracy"]})


def test_classes_without_test_images_do_not_lower_the_macro_mean() -> None:
    result = summarise(counted([[5, 0, 0], [0, 5, 0], [0, 0, 0]]), SCHEME)
    assert result["macro_f1"] == 1.0
    assert result["per_class"]["PMO"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_tiny_classes_are_left_out_where_the_name_says_so() -> None:
    result = summarise(counted([[20, 0, 0], [0, 20, 0], [9, 0, 0]]), SCHEME)
    lyt, myb = result["per_class"]["LYT"]["f1"], result["per_class"]["MYB"]["f1"]
    assert result["macro_f1_without_tiny"] == pytest.approx((lyt + myb) / 2)
    assert result["macro_f1"] == pytest.approx((lyt + myb) / 3)
    assert (
        summarise(counted([[1, 0, 0], [0, 0, 0], [0, 0, 0]]), SCHEME)["macro_f1_without_tiny"]
        is None
    )


def test_noise_that_makes_counts_negative_leaves_scores_finite() -> None:
    result = summarise(counted([[50, -3, 1], [2, 40, -1], [-2, 0, 30]]), SCHEME)
    assert result["images"] == 123
    assert 0 <= result["macro_f1"] <= 1


def test_macro_f1_of_the_published_table_is_the_published_figure() -> None:
    # Matek et al. 2021, Table 1, strict: precision and recall give F1 about .545. The harmonic
    # mean per class, then the mean over classes, is the definition that reproduces it.
    table = ".92/.71 .88/.82 .90/.70 .82/.74 .76/.72 .75/.65 .54/.65 .81/.84 .52/.59 .85/.91"
    table += " .57/.70 .27/.63 .30/.64 .57/.63 .14/.64 .35/.80 .22/.84 .08/.53 .17/.63 .28/.90"
    table += " .02/.20"
    pairs = [tuple(map(float, entry.split("/"))) for entry in table.split()]
    # A matrix with these scores for one class: 100 images of it, recall r, precision p.
    f1s = []
    for p, r in pairs:
        right = 10_000 * r
        matrix = [[right, 10_000 - right, 0], [right / p - right, 10, 0], [0, 0, 0]]
        result = summarise(counted(np.rint(np.array(matrix)).astype(np.int64)), SCHEME)
        f1s.append(result["per_class"]["LYT"]["f1"])
    assert sum(f1s) / len(f1s) == pytest.approx(0.545, abs=0.001)


@pytest.mark.parametrize(
    ("probs_NC", "words"),
    [
        (np.array([[math.nan, 0.5, 0.5]]), "not finite"),
        (np.array([[2.0, -1.0, 0.0]]), "from 0 to 1"),
        (np.array([[0.5, 0.5]]), "one shape"),
    ],
)
def test_probabilities_that_are_none_are_refused(probs_NC: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tally(probs_NC, one_hot(np.array([0])))


def test_an_image_without_any_label_is_refused() -> None:
    with pytest.raises(InputError, match="no label"):
        tally(np.ones((1, 3)) / 3, np.zeros((1, 3), bool))


def test_scores_of_nothing_are_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match="no exactly labelled test image") as caught:
        summarise(Tally.empty(3), SCHEME)
    assert "evaluation.fraction" in caught.value.hint


def test_tallies_of_other_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        summarise(counted([[1, 0], [0, 1]]), SCHEME)
    with pytest.raises(InputError, match="cannot add"):
        Tally.empty(2) + Tally.empty(3)
    with pytest.raises(InputError, match="928 numbers"):
        Tally.from_vector(np.zeros(53, np.int64), 3)


def test_counts_that_are_not_whole_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="int64"):
        Tally(np.zeros((3, 3)), np.zeros((BINS, 3), np.int64))  # type: ignore[arg-type]


def test_labs_without_test_images_have_no_scores() -> None:
    scores = summarise_labs(
        {"a": counted([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), "b": Tally.empty(3)}, SCHEME
    )
    assert list(scores) == ["a"]


def test_the_worst_lab_is_named() -> None:
    result = spread({"a": 0.5, "b": 0.2, "c": 0.8})
    assert (result.worst_lab, result.worst, result.labs) == ("b", 0.2, 3)
    assert result.mean == pytest.approx(0.5)
    assert result.sd == pytest.approx(math.sqrt(0.06))
    with pytest.raises(InputError):
        spread({})


def test_recall_is_reported_for_classes_a_lab_never_trained_on() -> None:
    result = absent_recall(counted([[8, 2, 0], [0, 0, 0], [1, 1, 2]]), np.array([10, 0, 0]), SCHEME)
    assert result == {"PMO": 0.5}


BLASTS = Scheme(
    name="blasts",
    codes=("BLA", "LYT"),
    names={"BLA": "blast", "LYT": "lymphocyte"},
    tolerated=frozenset(),
)


def test_recall_of_blasts_comes_with_its_wilson_interval() -> None:
    found = summarise(counted([[8, 2], [3, 7]]), BLASTS)["blasts"]
    assert found["recall"] == 0.8
    assert found["images"] == 10
    # Agresti & Coull 1998 and every calculator: 8 of 10 is .490 to .943.
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    perfect = summarise(counted([[10, 0], [0, 1]]), BLASTS)["blasts"]
    assert 0.7 < perfect["low"] < 0.75
    assert perfect["high"] == pytest.approx(1.0)


def test_recall_of_blasts_is_none_where_none_were_tested() -> None:
    assert summarise(counted([[0, 0], [3, 7]]), BLASTS)["blasts"] is None
    assert summarise(counted(np.eye(3, dtype=int)), SCHEME)["blasts"] is None


def test_interval_holds_the_score_and_shrinks_with_more_images() -> None:
    few = np.array([[8, 2, 0], [1, 6, 3], [1, 3, 6]])
    widths = []
    for factor in (1, 25):
        low, high = interval(counted(few * factor), SCHEME, rng=np.random.default_rng(0))
        assert low <= summarise(counted(few), SCHEME)["macro_f1"] <= high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 5, rel=0.25)


def test_gap_is_the_difference_and_its_interval_tells_real_from_none() -> None:
    good, bad = counted(np.diag([90, 90, 90]) + 5), counted(np.diag([30, 30, 30]) + 30)
    clear = gap(good, bad, SCHEME, rng=np.random.default_rng(0))
    scores = [summarise(t, SCHEME)["macro_f1"] for t in (good, bad)]
    assert clear["macro_f1"] == pytest.approx(scores[0] - scores[1])
    assert 0 < clear["low"] < clear["macro_f1"] < clear["high"]
    none = gap(good, good, SCHEME, rng=np.random.default_rng(0))
    assert none["low"] < 0 == none["macro_f1"] < none["high"]


def test_the_same_seed_gives_the_same_interval() -> None:
    matrix = counted([[8, 2, 0], [1, 6, 3], [1, 3, 6]])
    first, second = (interval(matrix, SCHEME, rng=np.random.default_rng(5)) for _ in range(2))
    assert first == second
