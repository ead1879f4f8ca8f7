"""The sum of updates: free of order to the bit, exact to 2^-30, and one vector large."""

from __future__ import annotations

import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cytofed.arrays import Float32
from cytofed.errors import CytofedError
from cytofed.messages import MAX_UPDATE, MAX_WEIGHT
from cytofed.server.aggregate import Sum

SIZE = 70_000  # more than two chunks
numbers = st.floats(-MAX_UPDATE, MAX_UPDATE, width=32)
weights = st.integers(1, 100_000).map(float)
updates = st.lists(st.tuples(arrays(np.float32, 5, elements=numbers), weights), min_size=1)


def mean_of(updates: list[tuple[Float32, float]]) -> Float32:
    total = Sum(("weights",), len(updates[0][0]))
    for values_P, weight in updates:
        total.add({"weights": values_P}, weight)
    return total.mean()["weights"]


@settings(max_examples=100, deadline=None)
@given(updates, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(
    updates: list[tuple[Float32, float]], random: Random
) -> None:
    expected = mean_of(updates).tobytes()
    random.shuffle(updates)
    assert mean_of(updates).tobytes() == expected


@settings(max_examples=100, deadline=None)
@given(updates)
def test_mean_is_that_of_float64_within_2_to_the_minus_30(
    updates: list[tuple[Float32, float]],
) -> None:
    values_KP = np.stack([v for v, _ in updates]).astype(np.float64)
    exact = np.average(values_KP, axis=0, weights=[w for _, w in updates])
    rounding_to_float32 = np.abs(exact) * 2.0**-24
    assert (np.abs(mean_of(updates) - exact) <= 2.0**-30 + rounding_to_float32).all()


def test_every_part_and_every_chunk_is_summed_on_its_own() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 2, SIZE)).astype(np.float32)
    total = Sum(("weights", "control"), SIZE)
    for weights_P, control_P, weight in ((first[0], second[0], 1.0), (first[1], second[1], 3.0)):
        total.add({"weights": weights_P, "control": control_P}, weight)
    mean = total.mean()
    assert total.count == 2
    np.testing.assert_allclose(mean["weights"], (first[0] + 3 * first[1]) / 4, atol=1e-6)
    np.testing.assert_allclose(mean["control"], (second[0] + 3 * second[1]) / 4, atol=1e-6)


def test_one_lab_s_update_comes_back_unchanged() -> None:
    values = np.array([0.0, 1.0, -2.5, 1e-3, MAX_UPDATE], np.float32)
    np.testing.assert_allclose(mean_of([(values, 137.0)]), values, rtol=2**-23, atol=2**-31)


def test_largest_update_at_the_largest_weight_does_not_overflow() -> None:
    for sign in (1, -1):
        values = np.full(3, sign * MAX_UPDATE, np.float32)
        assert (mean_of([(values, MAX_WEIGHT / 2), (values, MAX_WEIGHT / 2)]) == values).all()


def test_more_weight_than_the_sum_has_room_for_is_refused() -> None:
    total = Sum(("weights",), 1)
    total.add({"weights": np.ones(1, np.float32)}, MAX_WEIGHT)
    with pytest.raises(CytofedError, match="exceeds"):
        total.add({"weights": np.ones(1, np.float32)}, 1.0)
    assert total.mean()["weights"].tolist() == [1.0], "what was refused left no trace"


def test_large_weights_and_small_ones_add_up() -> None:
    """They are rounded in two ways."""
    values = [np.full(3, value, np.float32) for value in (1.5, -0.25, 0.125)]
    total = Sum(("weights",), 3)
    for values_P, weight in zip(values, (1e6, 3.0, 2e6), strict=True):
        total.add({"weights": values_P}, weight)
    exact = (1.5e6 - 0.75 + 0.25e6) / 3_000_003
    np.testing.assert_allclose(total.mean()["weights"], exact, rtol=2**-23)


def test_a_cleared_sum_is_a_new_one() -> None:
    rng = np.random.default_rng(1)
    first_P, second_P = rng.normal(size=(2, SIZE)).astype(np.float32)
    total = Sum(("weights",), SIZE)
    total.add({"weights": first_P}, 7.0)
    before = total.mean()["weights"].copy()
    total.clear()
    assert total.count == 0
    total.add({"weights": second_P}, 2.0)
    assert total.mean()["weights"].tobytes() == mean_of([(second_P, 2.0)]).tobytes()
    assert before.tobytes() == mean_of([(first_P, 7.0)]).tobytes()


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(CytofedError, match="no updates"):
        Sum(("weights",), 3).mean()


def test_memory_is_one_vector_however_many_labs_there_are() -> None:
    size = 10_000_000
    values_P = np.ones(size, np.float32)

    def peak_bytes(labs: int) -> int:
        tracemalloc.start()
        total = Sum(("weights",), size)
        for _ in range(labs):
            total.add({"weights": values_P}, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    vector = 8 * size
    assert peak_bytes(2) < 1.2 * vector
    assert peak_bytes(20) < 1.2 * vector
