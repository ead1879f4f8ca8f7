"""Gradient inversion works where nothing protects, and what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytofed.plan import load_plan
from cytofed.simulations import seat
from cytofed.simulations.attacks import (
    RECOGNISABLE,
    Floats,
    Sent,
    best_of,
    gradients_of,
    invert,
    invert_images,
    lines,
    sample_images,
)
from cytofed.simulations.seat import sit

Sample = tuple[Floats, list[Sent]]


def test_a_gradient_of_one_image_gives_the_image() -> None:
    rng = np.random.default_rng(0)
    image_D, bias_U = rng.random(12).astype(np.float32), rng.normal(size=5).astype(np.float32)
    found_D = invert(Sent(np.outer(bias_U, image_D).astype(np.float32), bias_U))
    np.testing.assert_allclose(found_D, image_D, atol=1e-6)


def test_a_neuron_that_reacts_to_one_image_gives_it_away_in_a_sum() -> None:
    rng = np.random.default_rng(0)
    images_2D = rng.random((2, 500)).astype(np.float32)
    bias_2U = np.array([[1, 2, 0], [3, -1, 0.5]], np.float32)  # the last neuron: one image alone
    summed = Sent(bias_2U.T @ images_2D, bias_2U.sum(0))
    mean_D = np.full(500, 0.5, np.float32)
    assert best_of(summed, images_2D[1], mean_D)[1] > 0.999
    assert best_of(summed, images_2D[0], mean_D)[1] < 0.999


@pytest.fixture(scope="module")
def sample_gradients(sample: Path) -> Sample:
    images_ND, classes_N = sample_images(sample / "marrow")
    return images_ND, gradients_of(images_ND, classes_N)


@pytest.fixture(scope="module")
def inversion(sample_gradients: Sample) -> dict[str, Any]:
    plan = load_plan("demo", ["privacy.unit=patient", "privacy.epsilon=8"])
    found = invert_images(plan, *sample_gradients)
    assert all(len(way["pictures"]) == len(found["images"]) for way in found["ways"])
    return found


@pytest.fixture(scope="module")
def likeness(inversion: dict[str, Any]) -> dict[str, float]:
    return {way["way"]: way["likeness"] for way in inversion["ways"]}


def test_a_plain_update_of_one_image_is_the_image(likeness: dict[str, float]) -> None:
    assert likeness["plain update"] > 0.99


def test_clipping_alone_hides_nothing(likeness: dict[str, float]) -> None:
    assert likeness["clipped"] > 0.99


def test_noise_at_epsilon_8_leaves_nothing_of_the_image(likeness: dict[str, float]) -> None:
    assert abs(likeness["clipped and noised"]) < 0.15
    assert abs(likeness["secure sum, clipped and noised"]) < 0.15


def test_a_secure_sum_of_24_images_is_a_mixture(inversion: dict[str, Any]) -> None:
    (row,) = (way for way in inversion["ways"] if way["way"] == "secure sum")
    assert row["likeness"] < RECOGNISABLE  # the best of 64 pictures, chosen with the truth at hand
    assert row["mixture"] < 0.35


def test_the_way_of_the_plan_is_marked(inversion: dict[str, Any]) -> None:
    assert [way["way"] for way in inversion["ways"] if way["of_plan"]] == ["clipped and noised"]


@pytest.fixture(scope="module")
def seen(sample_gradients: Sample) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat, "VICTIMS", 3)  # half the time
        return sit(*sample_gradients)


def row_of(seen: dict[str, Any], way: str, holds: str) -> dict[str, Any]:
    (row,) = (
        row for row in seen["seat"]["rows"] if row["way"].startswith(way) and holds in row["holds"]
    )
    return dict(row)


def test_sealing_shows_the_network_nothing_and_the_coordinator_all(seen: dict[str, Any]) -> None:
    assert row_of(seen, "sealed, on the way", "network")["likeness"] < 0.15
    opened, plain = row_of(seen, "sealed", "once opened"), row_of(seen, "plain", "update")
    assert opened["likeness"] == plain["likeness"] > 0.99
    assert opened["matched"] == plain["matched"] == 1.0


@pytest.mark.parametrize("labs", [8, 3])
def test_a_masked_upload_says_nothing_of_its_lab(seen: dict[str, Any], labs: int) -> None:
    row = row_of(seen, f"secure aggregation, {labs}", "upload")
    assert row["likeness"] < 0.15
    assert row["matched"] < 0.7  # chance is 1/16


def test_a_sum_tells_who_took_part_and_not_at_which_lab(seen: dict[str, Any]) -> None:
    row = row_of(seen, "secure aggregation, 3", "sum")
    assert row["took_part"] > row["matched"]


def test_colluding_labs_below_the_threshold_open_no_upload(seen: dict[str, Any]) -> None:
    collusion = seen["collusion"]
    for curve in collusion["curves"]:
        opened = [row["opened"] for row in curve["rows"]]
        assert opened == [k >= collusion["threshold"] for k in range(collusion["labs"])]


def test_with_all_others_colluding_nothing_of_a_lab_is_hidden(seen: dict[str, Any]) -> None:
    one, several = seen["collusion"]["curves"]
    assert one["rows"][-1]["likeness"] > 0.99
    assert one["rows"][-1]["cosine"] == pytest.approx(1.0, abs=1e-3)
    assert several["rows"][-1]["cosine"] == pytest.approx(1.0, abs=1e-3)


def test_more_images_behind_an_update_leave_less_to_see(seen: dict[str, Any]) -> None:
    one, several = seen["collusion"]["curves"]
    for row, other in zip(one["rows"], several["rows"], strict=True):
        assert other["likeness"] < row["likeness"]
    assert several["rows"][0]["likeness"] < RECOGNISABLE


def test_each_attack_is_told_in_lines(seen: dict[str, Any], inversion: dict[str, Any]) -> None:
    told = lines({"inversion": inversion, **seen})
    rows = len(inversion["ways"]) + len(seen["seat"]["rows"]) + seen["collusion"]["labs"]
    assert len(told) == rows + 1
    assert "image rebuilt from clipped and noised (this plan) | likeness 0." in "\n".join(told)
