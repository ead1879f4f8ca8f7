"""Units, the test split and pseudo-patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.client.split import hold_out
from cytofed.errors import InputError
from cytofed.simulations import split

few = settings(max_examples=40, deadline=None)


def keys(images: int) -> split.Texts:
    return np.asarray([f"BLA/BLA_{n:05d}.jpg" for n in range(images)])


@st.composite
def pools(draw: st.DrawFn) -> tuple[split.Ints, split.Ints, int]:
    """Classes (-1 is coarse), units and a seed; most units are single images, some are large."""
    images = draw(st.integers(2, 120))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    class_N = rng.integers(-1, draw(st.integers(1, 6)), size=images)
    largest = draw(st.sampled_from([1, 2, images // 4 + 1]))
    unit_N = np.repeat(np.arange(images), rng.integers(1, largest + 1, size=images))[:images]
    unit_N[-1] = images  # two units at least
    return class_N, unit_N, draw(st.integers(-5, 5))


def test_a_patient_and_near_duplicates_of_its_cells_are_one_unit() -> None:
    group_N = np.array([0, 0, 1, 2, 3, 4])
    patients_N = np.array(["p1", "p2", "p2", "p3", "", ""])
    assert split.units(group_N, patients_N).tolist() == [0, 0, 0, 1, 2, 3]


def test_without_patients_the_near_duplicate_groups_are_the_units() -> None:
    assert split.units(np.array([7, 3, 7])).tolist() == [1, 0, 1]


def test_images_of_unknown_patient_are_not_one_patient() -> None:
    assert len(set(split.units(np.arange(5), np.array([""] * 5)).tolist())) == 5


@few
@given(pools(), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
def test_units_are_on_one_side_and_both_sides_are_held(
    pool: tuple[split.Ints, split.Ints, int], fraction: float
) -> None:
    class_N, unit_N, seed = pool
    test_N = split.test_split(class_N, unit_N, keys(len(unit_N)), fraction=fraction, seed=seed)
    assert not set(unit_N[test_N]) & set(unit_N[~test_N])
    assert test_N.any()
    assert not test_N.all()


@few
@given(pools())
def test_the_order_of_the_images_does_not_matter(
    pool: tuple[split.Ints, split.Ints, int],
) -> None:
    class_N, unit_N, seed = pool
    key_N = keys(len(unit_N))
    test_N = split.test_split(class_N, unit_N, key_N, fraction=0.2, seed=seed)
    other = np.random.default_rng(0).permutation(len(unit_N))
    renamed_N = unit_N.max() - unit_N  # nor do the numbers of the units
    shuffled_N = split.test_split(
        class_N[other], renamed_N[other], key_N[other], fraction=0.2, seed=seed
    )
    assert np.array_equal(shuffled_N, test_N[other])


def test_single_images_are_stratified_exactly_and_rare_classes_are_on_both_sides() -> None:
    class_N = np.repeat([0, 1, 2, 3, -1], [1000, 100, 8, 2, 50])
    test_N = split.test_split(class_N, np.arange(1160), keys(1160), fraction=0.2, seed=1)
    assert [int(test_N[class_N == c].sum()) for c in (0, 1, 2, 3, -1)] == [200, 20, 2, 1, 10]


def test_a_class_of_one_image_is_trained_on() -> None:
    test_N = split.test_split(
        np.array([0] * 9 + [1]), np.arange(10), keys(10), fraction=0.5, seed=3
    )
    assert not test_N[9]


def test_patients_with_mixed_classes_meet_the_fraction_nearly() -> None:
    rng = np.random.default_rng(5)
    unit_N = np.repeat(np.arange(100), rng.integers(10, 60, size=100))
    class_N = rng.choice(5, p=[0.4, 0.3, 0.2, 0.08, 0.02], size=len(unit_N))
    for seed in range(5):
        test_N = split.test_split(class_N, unit_N, keys(len(unit_N)), fraction=0.2, seed=seed)
        for c in range(5):
            assert 0.14 < test_N[class_N == c].mean() < 0.26


def test_near_duplicates_are_tested_as_often_as_other_images() -> None:
    unit_N = np.concatenate([np.repeat(np.arange(500), 2), np.arange(500, 4500)])
    class_N = np.zeros(5000, dtype=int)
    test_N = split.test_split(class_N, unit_N, keys(5000), fraction=0.2, seed=1)
    assert 0.17 < test_N[:1000].mean() < 0.23


def test_the_seed_draws_the_test_images() -> None:
    class_N, unit_N = np.zeros(200, dtype=int), np.arange(200)
    first, again, other = (
        split.test_split(class_N, unit_N, keys(200), fraction=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fraction_zero_holds_nothing_out() -> None:
    assert not split.test_split(
        np.zeros(3, dtype=int), np.zeros(3, dtype=int), keys(3), fraction=0, seed=1
    ).any()


@few
@given(pools(), st.sampled_from([2, 4, 5]), st.booleans())
def test_folds_of_a_seed_hold_every_image_once_and_units_whole(
    pool: tuple[split.Ints, split.Ints, int], folds: int, two_folders: bool
) -> None:
    class_N, unit_N, seed = pool
    images = len(class_N)
    if len(np.unique(unit_N)) <= folds:
        return
    source_N = unit_N % 2 if two_folders else np.zeros(images, np.int64)
    if min(len(np.unique(unit_N[source_N == s])) for s in np.unique(source_N)) <= folds:
        return
    dhash_N, paths = np.zeros(images, np.uint64), keys(images).tolist()
    times_N = np.zeros(images, np.int64)
    for fold in range(folds):
        try:
            test_N = hold_out(
                class_N, unit_N, paths, dhash_N, source_N, fraction=1 / folds, fold=fold, seed=seed
            )
        except InputError:  # earlier folds took all but one large unit: no split exists
            return
        for unit in np.unique(unit_N[test_N]):
            assert test_N[unit_N == unit].all()
        times_N += test_N
    assert (times_N == 1).all()


def test_folds_are_alike_in_size_and_classes() -> None:
    class_N = np.repeat(np.arange(3), (50, 100, 250))
    unit_N, zeros = np.arange(400), np.zeros(400, np.int64)
    for fold in range(5):
        test_N = hold_out(
            class_N, unit_N, keys(400).tolist(), zeros.astype(np.uint64), zeros,
            fraction=0.2, fold=fold, seed=1,
        )  # fmt: skip
        assert np.bincount(class_N[test_N]).tolist() == [10, 20, 50]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_bounds_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        split.test_split(np.zeros(3, dtype=int), np.arange(3), keys(3), fraction=fraction, seed=1)


def test_a_single_patient_cannot_be_split() -> None:
    with pytest.raises(InputError, match="one patient") as error:
        split.test_split(
            np.zeros(3, dtype=int), np.zeros(3, dtype=int), keys(3), fraction=0.2, seed=1
        )
    assert error.value.hint


def test_equal_paths_in_two_folders_are_told_apart_by_their_picture() -> None:
    dhash_N = np.array([1, 2, 3], dtype=np.uint64)
    key_N = split.image_keys(["a.jpg", "b.jpg", "a.jpg"], dhash_N)
    assert len(set(key_N.tolist())) == 3
    assert key_N[1] == "b.jpg"


@few
@given(pools(), st.integers(1, 30), st.integers(1, 5))
def test_pseudo_patients_straddle_neither_labs_nor_the_test_split(
    pool: tuple[split.Ints, split.Ints, int], cells: int, places: int
) -> None:
    _, unit_N, seed = pool
    place_N = unit_N % places
    names_N = split.pseudo_patients(place_N, unit_N, keys(len(unit_N)), cells=cells, seed=seed)
    for name in set(names_N.tolist()):
        assert len(set(place_N[names_N == name])) == 1
    for unit in set(unit_N.tolist()):
        assert len(set(names_N[unit_N == unit])) == 1
    assert set(names_N) == {f"pseudo-{n + 1:04d}" for n in range(len(set(names_N)))}


def test_pseudo_patients_have_the_size_asked_for() -> None:
    place_N = np.repeat([0, 1, 2], [400, 110, 7])
    names_N = split.pseudo_patients(place_N, np.arange(517), keys(517), cells=20, seed=1)
    sizes = [np.unique(names_N[place_N == p], return_counts=True)[1] for p in range(3)]
    assert set(sizes[0]) == {20}
    assert set(sizes[1]) <= {18, 19}
    assert sizes[2].tolist() == [7]


def test_pseudo_patients_mix_classes() -> None:
    class_N = np.repeat([0, 1], 200)  # the files lie sorted by class
    names_N = split.pseudo_patients(
        np.zeros(400, dtype=int), np.arange(400), keys(400), cells=20, seed=1
    )
    assert all(0 < class_N[names_N == name].mean() < 1 for name in set(names_N))


def test_a_near_duplicate_at_two_labs_makes_no_common_patient() -> None:
    names_N = split.pseudo_patients(np.array([0, 1]), np.array([5, 5]), keys(2), cells=20, seed=1)
    assert names_N[0] != names_N[1]


def test_pseudo_patients_of_no_cells_are_refused() -> None:
    with pytest.raises(InputError, match="cells=0"):
        split.pseudo_patients(np.zeros(2, dtype=int), np.arange(2), keys(2), cells=0, seed=1)
