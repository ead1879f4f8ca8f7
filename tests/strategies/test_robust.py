"""Median, trimmed mean and Krum: one hostile lab does not get its way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.arrays import Float32
from cytofed.errors import InputError
from cytofed.messages import MAX_UPDATE
from cytofed.plan import StrategySpec
from cytofed.strategies import STRATEGIES, make_strategy
from cytofed.strategies.robust import krum, median, trimmed_mean
from cytofed.strategies.strategy import Strategy

labs = st.integers(3, 12)
seeds = st.integers(0, 2**32 - 1)


def honest(labs: int, seed: int, size: int = 6) -> list[Float32]:
    return list(np.random.default_rng(seed).normal(0, 0.1, (labs, size)).astype(np.float32))


def combined(strategy: Strategy, updates: list[Float32]) -> Float32:
    assert strategy.combine is not None
    return strategy.combine(updates)


def slow_krum(updates: list[Float32], hostile: int) -> Float32:
    """Blanchard et al. 2017, section 4, as it is written."""
    scores = []
    for one in updates:
        squares = sorted(
            float(((one.astype(np.float64) - other) ** 2).sum())
            for other in updates
            if other is not one
        )
        scores.append(sum(squares[: len(updates) - hostile - 2]))
    return updates[int(np.argmin(scores))]


@settings(max_examples=30, deadline=None)
@given(labs, seeds)
def test_median_is_that_of_each_coordinate(labs: int, seed: int) -> None:
    updates = honest(labs, seed)
    expected = [sorted(float(u[p]) for u in updates) for p in range(6)]
    middle = [(c[(labs - 1) // 2] + c[labs // 2]) / 2 for c in expected]
    np.testing.assert_allclose(combined(median(), updates), middle, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(labs, seeds, st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.49]))
def test_trimmed_mean_leaves_out_the_share_on_either_side_and_one_at_least(
    labs: int, seed: int, trim: float
) -> None:
    updates = honest(labs, seed)
    cut = min(max(int(trim * labs + 1e-9), 1), (labs - 1) // 2) if trim else 0
    expected = [np.mean(sorted(float(u[p]) for u in updates)[cut : labs - cut]) for p in range(6)]
    np.testing.assert_allclose(combined(trimmed_mean(trim), updates), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), seeds)
def test_krum_is_the_update_nearest_to_its_neighbours(hostile: int, more: int, seed: int) -> None:
    updates = honest(2 * hostile + 3 + more, seed)
    expected = slow_krum(updates, hostile)
    assert (combined(krum(hostile), updates) == expected).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 11), seeds, st.sampled_from([-MAX_UPDATE, -1.0, 5.0, MAX_UPDATE]))
def test_one_hostile_lab_moves_no_coordinate_out_of_the_honest_range(
    labs: int, seed: int, wish: float
) -> None:
    good = honest(labs, seed)
    bad = np.full(6, wish, np.float32)
    updates = [*good[:2], bad, *good[2:]]
    low, high = np.min(good, axis=0), np.max(good, axis=0)
    for strategy in (median(), trimmed_mean()):
        found = combined(strategy, updates)
        assert (found >= low - 1e-6).all(), strategy.name
        assert (found <= high + 1e-6).all(), strategy.name
    assert any((combined(krum(1), updates) == one).all() for one in good)


def test_the_plain_mean_does_go_where_a_hostile_lab_wants() -> None:
    updates = [*honest(9, 0), np.full(6, MAX_UPDATE, np.float32)]
    assert (np.mean(updates, axis=0) > 10).all()


@pytest.mark.parametrize(
    ("strategy", "labs"),
    [(median(), 3), (trimmed_mean(), 3), (krum(1), 5), (krum(2), 7), (trimmed_mean(0.0), 1)],
)
def test_each_says_how_many_labs_its_promise_needs(strategy: Strategy, labs: int) -> None:
    assert strategy.min_updates == labs
    assert strategy.needs_single_updates


def test_impossible_options_are_refused() -> None:
    for trim in (-0.1, 0.5, 1.0):
        with pytest.raises(InputError, match="trim"):
            trimmed_mean(trim)
    for hostile in (-1, 0.5):
        with pytest.raises(InputError, match="hostile"):
            krum(hostile)


# --- all strategies by name


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_made_by_its_name(name: str) -> None:
    strategy = make_strategy(StrategySpec(name, {"server_lr": 0.5}))
    assert strategy.name == name
    assert strategy.needs_single_updates == (name in ("median", "trimmed_mean", "krum"))
    assert strategy.down[0] == strategy.lab.up[0] == "weights"
    assert set(strategy.down) <= set(strategy.init(np.zeros(2, np.float32)))


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("fedporx", "fedprox"), ("FedAvg", "fedavg"), ("Krum", "krum"), ("yogi", "fedyogi")],
)
def test_unknown_strategy_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=wrong) as refusal:
        make_strategy(StrategySpec(wrong))
    assert nearest in refusal.value.hint


def test_unknown_option_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"fedprox has no option 'mue'") as refusal:
        make_strategy(StrategySpec("fedprox", {"mue": 0.1}))
    assert "mu" in refusal.value.hint
    assert "server_lr" in refusal.value.hint
