"""Simulated failures of labs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.plan import Population
from cytofed.simulations.population import Fate, absent, broken, count, fate, late

few = settings(max_examples=40, deadline=None)


def names(labs: int) -> list[str]:
    return [f"lab-{k + 1}" for k in range(labs)]


@few
@given(st.integers(0, 200), st.integers(0, 100), st.integers(1, 50), st.integers(-3, 3))
def test_floor_of_rate_times_labs_drop(labs: int, percent: int, round_: int, seed: int) -> None:
    gone = absent(round_, names(labs), percent / 100, seed)
    assert len(gone) == percent * labs // 100
    assert gone <= set(names(labs))


def test_the_floor_is_not_fooled_by_binary_fractions() -> None:
    assert 0.29 * 100 < 29
    assert count(0.29, 100) == 29


def test_other_labs_drop_in_other_rounds_and_under_other_seeds() -> None:
    assert len({absent(r, names(20), 0.25, 1) for r in range(10)}) == 10
    assert len({absent(1, names(20), 0.25, s) for s in range(10)}) == 10


def test_every_lab_drops_sooner_or_later() -> None:
    assert set().union(*(absent(r, names(8), 0.25, 1) for r in range(60))) == set(names(8))


def test_the_same_labs_drop_whatever_their_order() -> None:
    assert absent(3, names(9), 0.4, 1) == absent(3, names(9)[::-1], 0.4, 1)


@few
@given(st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_stragglers_are_counted_over_all_labs_and_drawn_among_those_present(
    labs: int, dropout: float, stragglers: float
) -> None:
    met = fate(Population(dropout=dropout, stragglers=stragglers), 2, names(labs), 1)
    assert not met.late & met.gone
    assert len(met.late) == min(count(stragglers, labs), labs - len(met.gone))
    assert met.late == late(2, names(labs), stragglers, 1, gone=met.gone)


def test_labs_that_send_nan_stay_the_same_over_the_run() -> None:
    population = Population(nan_labs=2)
    assert len({fate(population, r, names(10), 1).nan for r in range(5)}) == 1
    assert len(fate(population, 1, names(10), 1).nan) == 2


def test_labs_that_send_nan_can_be_named() -> None:
    assert broken(names(4), ("lab-2",), 1) == {"lab-2"}


def test_a_lab_that_is_away_sends_no_nan() -> None:
    met = fate(Population(dropout=1.0, nan_labs=3), 1, names(3), 1)
    assert met == Fate(gone=frozenset(names(3)))


def test_a_population_without_failures_has_none() -> None:
    assert fate(Population(), 1, names(5), 1) == Fate()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    for population in (Population(dropout=rate), Population(stragglers=rate)):
        with pytest.raises(InputError, match=r"population\.(dropout|stragglers)") as error:
            fate(population, 1, names(3), 1)
        assert error.value.hint


def test_an_unknown_lab_and_too_many_are_refused() -> None:
    with pytest.raises(InputError, match="'lab-9'"):
        broken(names(3), ("lab-9",), 1)
    with pytest.raises(InputError, match="nan_labs=4 <= 3"):
        broken(names(3), 4, 1)
