"""Patients are drawn independently, secretly and with few cells each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.privacy.noise import SimulatedRandomness, SystemRandomness
from cytofed.privacy.sampling import Draw, draw, units_of

PATIENTS = st.lists(st.sampled_from(["a", "b", "c", "ä", "10", "1"]), min_size=1, max_size=40)


@given(PATIENTS)
@settings(max_examples=40, deadline=None)
def test_units_are_the_patients_with_all_their_images(patients: list[str]) -> None:
    units = units_of("patient", len(patients), np.array(patients))
    assert len(units) == len(set(patients))
    assert sorted(np.concatenate(units.rows).tolist()) == list(range(len(patients)))
    assert all(len({patients[row] for row in rows}) == 1 for rows in units.rows)


@given(PATIENTS, st.floats(0.01, 1), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_draw_has_each_patient_once_with_at_most_so_many_of_its_own_cells(
    patients: list[str], rate: float, cells: int
) -> None:
    units = units_of("patient", len(patients), patients)
    drawn = draw(units, sampling_rate=rate, cells_per_unit=cells, randomness=SystemRandomness())
    assert len(set(drawn.units)) == len(drawn)
    for unit, rows in zip(drawn.units, drawn.rows, strict=True):
        assert len(set(rows.tolist())) == len(rows) == min(cells, len(units.rows[unit]))
        assert set(rows.tolist()) <= set(units.rows[unit].tolist())


def test_rate_one_draws_everyone_and_a_low_rate_often_nobody() -> None:
    units = units_of("patient", 20, [str(n) for n in range(20)])
    randomness = SimulatedRandomness(0)
    assert len(draw(units, sampling_rate=1.0, cells_per_unit=1, randomness=randomness)) == 20
    sizes = [
        len(draw(units, sampling_rate=0.05, cells_per_unit=1, randomness=randomness))
        for _ in range(2000)
    ]
    assert 0.30 < np.mean(np.array(sizes) == 0) < 0.42  # (1 - .05)^20 = .36


def test_patients_without_identifiers_stop_the_run() -> None:
    with pytest.raises(InputError, match="no patient identifiers") as error:
        units_of("patient", 3, None)
    assert "--patients" in error.value.hint


def test_unit_image_is_one_image_a_unit_and_says_so() -> None:
    units = units_of("image", 3, None)
    assert units.unit == "image"
    assert [rows.tolist() for rows in units.rows] == [[0], [1], [2]]


def test_unit_none_is_not_sampled() -> None:
    with pytest.raises(InputError, match="none"):
        units_of("none", 3, None)


def test_a_patient_occurs_once_in_a_draw() -> None:
    with pytest.raises(InputError, match="each unit once"):
        Draw((1, 1), (np.array([0]), np.array([1])))


@pytest.mark.parametrize(("rate", "cells"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_impossible_sampling_is_refused(rate: float, cells: int) -> None:
    units = units_of("image", 3, None)
    with pytest.raises(InputError, match="Expected"):
        draw(units, sampling_rate=rate, cells_per_unit=cells, randomness=SystemRandomness())


def test_what_is_drawn_stays_out_of_repr() -> None:
    assert "7" not in repr(Draw((7,), (np.array([7]),)))
