"""Partitions: complete, whole units, no empty lab, and each law does what its name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.client.cells import Cells, open_cells
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.simulations.partitions import (
    Partition,
    PartitionSpec,
    Stain,
    assign,
    k_means,
    parse_partition,
    perceptual,
    stain_of,
)
from cytofed.simulations.split import Bools, Floats, Ints, generator

few = settings(max_examples=60, deadline=None)
DRAWN = ("iid", "dirichlet:0.3", "dirichlet:1e-4", "quantity:2", "acquisition")


def one_hot(class_N: Ints, classes: int = 7) -> Bools:
    return np.eye(classes, dtype=bool)[class_N]


def balanced(images: int = 1400) -> Bools:
    return one_hot(np.arange(images) % 7)


def cut(
    text: str, labs: int | None, targets_NC: Bools, *, seed: int = 1, **arrays: object
) -> Partition:
    arrays.setdefault("unit_N", np.arange(len(targets_NC)))
    arrays.setdefault("background_N3", colours(len(targets_NC)))
    return assign(parse_partition(text), labs, targets_NC=targets_NC, seed=seed, **arrays)  # type: ignore[arg-type]


def colours(images: int) -> Floats:
    return np.random.default_rng(images).uniform(80, 250, size=(images, 3))


# The flag


@pytest.mark.parametrize(
    "text",
    [
        "iid",
        "dirichlet:0.3",
        "quantity:1",
        "classes:2",
        "acquisition",
        "sources",
        "column:site",
        "column:a+b:c",
        "iid+stain:0.2+missing:3",
    ],
)
def test_a_partition_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_partition(text)) == text


def test_order_of_extras_and_spelling_of_numbers_do_not_matter() -> None:
    spec = parse_partition(" Dirichlet:.30 +missing:1+stain:2e-1 ")
    assert spec == PartitionSpec("dirichlet", 0.3, stain=0.2, missing=1)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dirichelt:0.3", "did you mean dirichlet:0.3?"),
        ("aquisition", "did you mean acquisition?"),
        ("iid+stian:0.2", "did you mean +stain:0.2?"),
        ("stain:0.2", "did you mean +stain:0.2?"),
        ("", "valid: iid"),
        ("iid:3", "valid: iid"),
        ("dirichlet", "try dirichlet:0.3"),
        ("dirichlet:0", "try dirichlet:0.3"),
        ("dirichlet:nan", "try dirichlet:0.3"),
        ("quantity:inf", "try quantity:1.0"),
        ("classes:1.5", "try classes:2"),
        ("column:", "try column:site"),
        ("iid+missing:0", "try +missing:1"),
        ("iid+stain:3", "0.2 is a clear difference"),
        ("iid+stain:.1+stain:.2", "keep one"),
        ("dirichlet:0.3+foo:1", "valid: iid"),
    ],
)
def test_an_unknown_partition_is_refused_with_what_is_valid(text: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        parse_partition(text)
    assert hint in error.value.hint


# What holds for every law


@few
@given(
    st.sampled_from((*DRAWN, "iid+missing:1", "iid+stain:0.3")),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_every_image_is_at_one_lab_no_lab_is_empty_and_units_stay_whole(
    text: str, labs: int, seed: int, patients: bool
) -> None:
    rng = np.random.default_rng(seed)
    class_N = rng.choice(7, size=300, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02])
    unit_N = rng.integers(0, 80, size=300) if patients else np.arange(300)
    train_N = unit_N % 5 != 0
    if labs == 1:
        text = text.replace("+missing:1", "")
    part = cut(text, labs, one_hot(class_N), seed=seed, unit_N=unit_N, train_N=train_N)
    assert part.labs == tuple(f"lab-{k + 1}" for k in range(labs))
    assert part.lab_N.shape == (300,)
    assert ((part.lab_N >= 0) & (part.lab_N < labs)).all()
    assert set(part.lab_N[train_N & part.keep_N].tolist()) == set(range(labs))
    assert part.shared_units == 0
    assert all(len(set(part.lab_N[unit_N == unit])) == 1 for unit in set(unit_N.tolist()))
    assert part.table().sum() == part.keep_N.sum()
    assert sum(len(part.rows(k)) for k in range(labs)) == part.keep_N.sum()
    if "missing" not in text:
        assert part.keep_N.all()


@pytest.mark.parametrize("text", [*DRAWN, "classes:3", "iid+stain:0.2+missing:2"])
def test_the_seed_draws_the_partition(text: str) -> None:
    first, again, other = (cut(text, 4, balanced(), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.lab_N, again.lab_N)
    assert np.array_equal(first.keep_N, again.keep_N)
    assert first.stains == again.stains
    if text != "acquisition":  # the best clustering does not hang on the start
        assert not np.array_equal(first.lab_N, other.lab_N)


@pytest.mark.parametrize("text", [*DRAWN, "classes:3", "sources", "column:site", "iid+stain:0.1"])
def test_one_lab_holds_everything(text: str) -> None:
    source_N, column_N = np.arange(70) % 2, np.array(["a", "b"] * 35)
    part = cut(text, 1, balanced(70), source_N=source_N, column_N=column_N)
    assert not part.lab_N.any()
    assert part.keep_N.all()


@pytest.mark.parametrize("text", [*DRAWN, "classes:2"])
def test_a_thousand_labs_each_hold_a_training_image(text: str) -> None:
    train_N = np.arange(6000) % 5 != 0
    part = cut(text, 1000, balanced(6000), train_N=train_N)
    assert np.bincount(part.lab_N[train_N], minlength=1000).min() >= 1


def test_more_labs_than_patients_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="--labs 9 <= 4") as error:
        cut("iid", 9, balanced(70), unit_N=np.arange(70) % 5, train_N=np.arange(70) % 5 != 0)
    assert "--labs 4" in error.value.hint
    with pytest.raises(InputError, match="--labs 0"):
        cut("iid", 0, balanced(70))


def test_drawn_laws_ask_for_a_number_of_labs() -> None:
    with pytest.raises(InputError, match="number of labs"):
        cut("iid", None, balanced(70))


# Law by law


def test_iid_labs_differ_by_one_image_in_size_and_in_each_class() -> None:
    table_KC = cut("iid", 6, balanced(1405)).table()
    assert np.ptp(table_KC.sum(axis=1)) <= 1
    assert np.ptp(table_KC, axis=0).max() <= 1


def skew(part: Partition) -> float:
    """Mean total variation distance between a lab's class mix and the pool's, 0..1."""
    table_KC = part.table()[:, :-1].astype(float)
    mix_KC = table_KC / table_KC.sum(axis=1, keepdims=True)
    pool_C = table_KC.sum(axis=0) / table_KC.sum()
    return float(np.abs(mix_KC - pool_C).sum(axis=1).mean() / 2)


def test_dirichlet_is_more_skewed_the_smaller_alpha_and_labs_keep_their_size() -> None:
    parts = [cut(f"dirichlet:{alpha}", 10, balanced(7000)) for alpha in (0.03, 0.3, 3, 1000)]
    skews = [skew(part) for part in parts]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.05
    for part in parts:
        sizes_K = part.table().sum(axis=1)
        assert sizes_K.min() > 0.8 * 700
        assert sizes_K.max() < 1.2 * 700


def test_the_test_images_of_a_lab_follow_its_training_mix() -> None:
    train_N = np.arange(7000) // 7 % 5 != 0
    part = cut("dirichlet:0.3", 5, balanced(7000), train_N=train_N)
    train_KC, test_KC = part.table(train_N), part.table(~train_N)
    assert np.abs(train_KC / 4 - test_KC).max() <= 1.5


def test_quantity_varies_sizes_and_not_classes() -> None:
    part = cut("quantity:1", 8, balanced(7000))
    sizes_K = part.table().sum(axis=1)
    assert sizes_K.max() > 3 * sizes_K.min()
    assert skew(part) < 0.03


def test_classes_gives_each_lab_that_many_classes_and_loses_none() -> None:
    for labs, classes in ((4, 2), (7, 1), (3, 7), (5, 3), (30, 2)):
        held_KC = cut(f"classes:{classes}", labs, balanced()).table()[:, :-1] > 0
        assert held_KC.sum(axis=1).tolist() == [classes] * labs
        assert held_KC.any(axis=0).all()


def test_classes_that_cannot_all_be_held_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="without a lab") as error:
        cut("classes:1", 4, balanced())
    assert "classes:2" in error.value.hint
    assert "--labs 7" in error.value.hint
    with pytest.raises(InputError, match="classes:8 <= 7"):
        cut("classes:8", 4, balanced())


def test_acquisition_finds_labs_by_their_background() -> None:
    rng = np.random.default_rng(3)
    true_N = rng.integers(0, 4, size=800)
    centre = np.array([[110, 90, 170], [150, 140, 180], [190, 180, 210], [235, 230, 245]])
    background_N3 = centre[true_N] + rng.normal(0, 4, size=(800, 3))
    part = cut("acquisition", 4, balanced(800), background_N3=background_N3)
    assert np.array_equal(part.lab_N, true_N)  # lab-1 is the darkest
    assert part.about[0].startswith("background rgb(1")


def test_acquisition_keeps_a_patient_whole_by_its_mean_background() -> None:
    unit_N = np.arange(400) // 20
    background_N3 = np.repeat(np.where(np.arange(20) % 2, 100.0, 220.0), 20)[:, None] * np.ones(3)
    background_N3[::20] = 160  # one odd image each
    part = cut("acquisition", 2, balanced(400), unit_N=unit_N, background_N3=background_N3)
    assert np.array_equal(part.lab_N, 1 - unit_N % 2)


def test_acquisition_fills_more_labs_than_there_are_colours() -> None:
    background_N3 = np.full((60, 3), 200.0)
    part = cut("acquisition", 7, balanced(60), background_N3=background_N3)
    assert set(part.lab_N.tolist()) == set(range(7))


def test_perceptual_colours_agree_with_published_values() -> None:
    # sRGB white, mid grey, red and blue in CIE L*a*b* D65, as colour calculators print them
    rgb = np.array([[255, 255, 255], [119, 119, 119], [255, 0, 0], [0, 0, 255]], dtype=float)
    lab = np.array([[100, 0, 0], [50.03, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    assert np.allclose(perceptual(rgb), lab, atol=0.05)


def test_sources_are_labs() -> None:
    source_N = np.array([0, 0, 1, 1, 2, 2, 2])
    part = cut("sources", None, balanced(7), source_N=source_N)
    assert np.array_equal(part.lab_N, source_N)
    assert part.about == ("folder 1", "folder 2", "folder 3")
    with pytest.raises(InputError, match="to be 3") as error:
        cut("sources", 2, balanced(7), source_N=source_N)
    assert "--labs 3" in error.value.hint


def test_a_near_duplicate_in_two_folders_stays_in_both_and_is_counted() -> None:
    part = cut(
        "sources", 2, balanced(4), source_N=np.array([0, 0, 1, 1]), unit_N=np.array([0, 1, 1, 2])
    )
    assert part.lab_N.tolist() == [0, 0, 1, 1]
    assert part.shared_units == 1


def test_a_source_without_training_images_is_refused_by_name() -> None:
    source_N = np.array([0, 0, 1, 1])
    with pytest.raises(InputError, match=r"lab-2 \(folder 2\)"):
        cut("sources", 2, balanced(4), source_N=source_N, train_N=source_N == 0)


def test_a_column_makes_one_lab_of_each_value() -> None:
    column_N = np.array(["york", "leeds", "hull"])[np.arange(70) % 3]
    part = cut("column:site", None, balanced(70), column_N=column_N)
    assert part.about == ("site = hull", "site = leeds", "site = york")
    assert all(len(set(column_N[part.lab_N == k])) == 1 for k in range(3))


def test_values_of_a_column_are_grouped_into_labs_of_like_size() -> None:
    column_N = np.repeat(["a", "b", "c", "d", "e"], [40, 30, 20, 10, 10])
    part = cut("column:site", 2, balanced(110), column_N=column_N)
    assert np.bincount(part.lab_N).tolist() == [60, 50]
    assert all(len(set(part.lab_N[column_N == value])) == 1 for value in "abcde")


def test_a_patient_with_two_values_goes_where_most_of_its_images_are() -> None:
    column_N = np.array(["a", "a", "a", "b", "b", "b"])
    part = cut(
        "column:site", 2, balanced(6), column_N=column_N, unit_N=np.array([0, 0, 1, 1, 1, 2])
    )
    assert part.lab_N.tolist() == [0, 0, 1, 1, 1, 1]


def test_columns_with_gaps_or_too_few_values_are_refused() -> None:
    with pytest.raises(InputError, match="empty for 1 of 3"):
        cut("column:site", None, balanced(3), column_N=np.array(["a", "", "b"]))
    with pytest.raises(InputError, match="has 2 values") as error:
        cut("column:site", 3, balanced(3), column_N=np.array(["a", "b", "b"]))
    assert "--labs 2" in error.value.hint


# Missing classes


@few
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 1000))
def test_labs_lose_classes_but_no_class_is_lost_everywhere(
    labs: int, missing: int, seed: int
) -> None:
    if labs * missing > 7 * (labs - 1):
        return
    train_N = np.arange(1400) // 7 % 5 != 0
    part = cut(f"iid+missing:{missing}", labs, balanced(), seed=seed, train_N=train_N)
    train_KC = part.table(train_N)[:, :-1]
    assert part.missing_KC.sum(axis=1).tolist() == [missing] * labs
    assert np.array_equal(train_KC == 0, part.missing_KC)
    assert (train_KC.sum(axis=0) > 0).all()


def test_test_images_of_missing_classes_stay() -> None:
    train_N = np.arange(1400) % 5 != 0
    part = cut("iid+missing:2", 4, balanced(), train_N=train_N)
    assert part.keep_N[~train_N].all()
    assert not part.keep_N[train_N].all()


def test_a_coarse_image_is_lost_only_with_its_whole_set() -> None:
    targets_NC = balanced(1400)
    targets_NC[:200] = np.array([1, 1, 0, 0, 0, 0, 0], dtype=bool)  # one of the first two
    part = cut("iid+missing:3", 4, targets_NC)
    assert (part.class_N[:200] == -1).all()
    assert part.table()[:, -1].sum() == part.keep_N[:200].sum()
    gone_K = part.missing_KC[:, 0] & part.missing_KC[:, 1]
    assert np.array_equal(~part.keep_N[:200], gone_K[part.lab_N[:200]])


def test_missing_classes_that_cannot_be_met_are_refused() -> None:
    for text, labs in (("iid+missing:1", 1), ("iid+missing:7", 3), ("classes:2+missing:2", 4)):
        with pytest.raises(InputError, match="missing:") as error:
            cut(text, labs, balanced())
        assert "lower K" in error.value.hint


# Stain


def test_the_neutral_stain_changes_nothing() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(Stain((1, 1, 1), (0, 0, 0)).apply(image), image)


def test_gain_multiplies_and_bias_adds_optical_density() -> None:
    image = np.full((2, 4, 4, 3), 127, dtype=np.uint8)  # OD log10(2) in each channel
    stained = Stain((1.0, 2.0, 1.0), (0.0, 0.0, 0.1)).apply(image)
    density = -np.log10((stained[0, 0, 0] + 1.0) / 256)
    assert np.allclose(density, np.log10(2) * np.array([1, 2, 1]) + [0, 0, 0.1], atol=0.004)
    assert (image == 127).all()


def test_each_lab_has_its_own_stain_whatever_the_number_of_labs() -> None:
    four, nine = (cut("iid+stain:0.2", labs, balanced(70)).stains for labs in (4, 9))
    assert four == nine[:4]
    assert len(set(nine)) == 9
    assert stain_of(0.2, 0, seed=1) == four[0] != stain_of(0.2, 0, seed=2)
    assert cut("iid", 2, balanced(70)).stains == (None, None)


@few
@given(st.floats(0.01, 1), st.integers(0, 1000))
def test_stain_strength_bounds_the_shift(strength: float, lab: int) -> None:
    stain = stain_of(strength, lab, seed=1)
    assert np.abs(np.log(stain.gain_3)).max() <= strength + 1e-12
    assert np.abs(stain.bias_3).max() <= strength / 4
    assert stain.apply(np.zeros((1, 2, 2, 3), dtype=np.uint8)).dtype == np.uint8


# Real images


def silhouette(points_N3: Floats, lab_N: Ints) -> float:
    distance_NN = np.linalg.norm(points_N3[:, None] - points_N3[None], axis=2)
    count_K = np.bincount(lab_N)
    mean_NK = np.stack([distance_NN[:, lab_N == k].sum(axis=1) for k in range(len(count_K))], 1)
    rows = np.arange(len(lab_N))
    own_N = mean_NK[rows, lab_N] / np.maximum(count_K[lab_N] - 1, 1)
    mean_NK /= count_K
    mean_NK[rows, lab_N] = np.inf
    near_N = mean_NK.min(axis=1)
    return float(((near_N - own_N) / np.maximum(near_N, own_N)).mean())


def marrow(folder: Path, cache_dir: Path) -> Cells:
    scheme = load_scheme("bone-marrow-21")
    return open_cells([folder], scheme, size_px=32, field_um=None, cache_dir=cache_dir)


def test_real_marrow_images_fall_into_acquisition_clusters_that_hold_every_class(
    real_data: Path, tmp_path: Path
) -> None:
    cells = marrow(real_data / "bone_marrow_128", tmp_path)
    part = cut("acquisition", 4, cells.targets_NC, background_N3=cells.background_N3)
    table_KC = part.table()
    held_C = table_KC.sum(axis=0) > 0
    assert held_C.sum() == 7
    assert (table_KC[:, held_C] > 0).all()
    some = generator(1, "sample").choice(len(cells), 1000, replace=False)
    points_N3 = perceptual(cells.background_N3[some])
    assert silhouette(points_N3, part.lab_N[some]) > 0.35
    # Two scanner settings, bright and dark, are the coarsest structure.
    assert silhouette(points_N3, k_means(points_N3, 2, generator(1, "two"))) > 0.4


def test_the_shipped_marrow_images_make_acquisition_labs(sample: Path, tmp_path: Path) -> None:
    cells = marrow(sample / "marrow", tmp_path)
    part = cut("acquisition", 3, cells.targets_NC, background_N3=cells.background_N3)
    assert (part.table().sum(axis=1) > 0.1 * len(cells)).all()
    points_N3 = perceptual(cells.background_N3)
    assert silhouette(points_N3, part.lab_N) > 0.3
