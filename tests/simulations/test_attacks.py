"""Gradient inversion works where nothing protects, and what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytofed.errors import InputError
from cytofed.plan import load_plan
from cytofed.privacy.terms import terms_of
from cytofed.simulations import attacks, seat
from cytofed.simulations.attacks import (
    IMAGES,
    RECOGNISABLE,
    Floats,
    Sent,
    best_of,
    gradients_of,
    invert_images,
    likenesses,
    lines,
    pictures,
    sample_images,
    why_missing,
)
from cytofed.simulations.seat import sit

Sample = tuple[Floats, list[Sent]]


def test_a_gradient_of_one_image_gives_the_image() -> None:
    rng = np.random.default_rng(0)
    image_D, bias_U = rng.random(12).astype(np.float32), rng.normal(size=5).astype(np.float32)
    found_MD = pictures(np.outer(bias_U, image_D).astype(np.float32), bias_U)
    np.testing.assert_allclose(found_MD, np.tile(image_D, (6, 1)), atol=1e-6)


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
    terms = terms_of(load_plan("demo", ["privacy.unit=patient", "privacy.epsilon=8"]))
    assert terms is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "GROUPS", 3)
        found = invert_images(terms, *sample_gradients)
    assert all(len(way["pictures"]) == len(found["images"]) for way in found["ways"])
    return found


@pytest.fixture(scope="module")
def likeness(inversion: dict[str, Any]) -> dict[str, float]:
    return {way["way"]: way["likeness"] for way in inversion["ways"]}


def test_a_plain_update_of_one_image_is_the_image(likeness: dict[str, float]) -> None:
    assert likeness["plain"] > 0.99


def test_clipping_alone_hides_nothing(likeness: dict[str, float]) -> None:
    assert likeness["clipped"] > 0.99


def test_noise_at_epsilon_8_leaves_nothing_of_the_image(
    likeness: dict[str, float], inversion: dict[str, Any]
) -> None:
    assert abs(likeness["clipped and noised"]) < 0.15
    assert all(row["noised"] < 0.15 for row in inversion["sums"])


def test_images_in_a_sum_hide_each_other_the_better_the_more_they_are(
    inversion: dict[str, Any],
) -> None:
    one, *_, many = rows = inversion["sums"]
    beyond = [row["likeness"] - row["held_out"] for row in rows]
    assert beyond == sorted(beyond, reverse=True)
    assert one["recognised"] == 1.0
    assert many["recognised"] < 0.2
    assert many["likeness"] < RECOGNISABLE


def test_likeness_counts_neither_scale_nor_what_all_images_have_in_common() -> None:
    rng = np.random.default_rng(0)
    images_ND = rng.random((3, 600)).astype(np.float32)
    mean_D = rng.random(600).astype(np.float32)
    changed_ND = np.float32(7) * images_ND + 3 * mean_D + np.float32(0.5)
    found_NM = likenesses(changed_ND, images_ND, mean_D)
    np.testing.assert_allclose(np.diag(found_NM), 1.0, atol=1e-4)
    assert np.abs(found_NM - np.diag(np.diag(found_NM))).max() < 0.2
    grey_MD = np.full((1, 600), 0.3, np.float32)
    assert np.abs(likenesses(grey_MD, images_ND, mean_D)).max() < 1e-3


@pytest.fixture(scope="module")
def seen(sample_gradients: Sample) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat, "VICTIMS", 3)  # half the time
        images_ND, gradients = sample_gradients
        return sit(images_ND[:IMAGES], gradients[:IMAGES])


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
    told = lines({"inversion": inversion, "round": {"missing": "no images"}, **seen})
    sums, rows = len(inversion["sums"]) - 1, len(seen["seat"]["rows"])
    assert len(told) == len(inversion["ways"]) + sums + 1 + rows + seen["collusion"]["labs"] + 1
    text = "\n".join(told)
    assert "one image from a clipped and noised update | likeness 0." in text
    assert "round 1 replayed: no images" in text


def test_why_an_attack_was_not_made_names_no_file() -> None:
    for message in ("cannot read /home/a/smears/p0123.png", "the first is Miller_1950.PNG, odd"):
        assert "p0123" not in why_missing(InputError(message))
        assert "Miller" not in why_missing(InputError(message))
    assert why_missing(InputError("no held-out image")) == "no held-out image"
