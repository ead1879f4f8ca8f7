"""Gradient inversion works where nothing protects, and what stops it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cytofed.plan import load_plan
from cytofed.simulations.attacks import Sent, invert, invert_images, sample_images


def test_a_gradient_of_one_image_gives_the_image() -> None:
    rng = np.random.default_rng(0)
    image_D, bias_U = rng.random(12).astype(np.float32), rng.normal(size=5).astype(np.float32)
    found_D = invert(Sent(np.outer(bias_U, image_D).astype(np.float32), bias_U))
    np.testing.assert_allclose(found_D, image_D, atol=1e-6)


@pytest.fixture(scope="module")
def likeness(sample: Path) -> dict[str, float]:
    images_ND, classes_N = sample_images(sample / "marrow")
    plan = load_plan("demo", ["privacy.unit=patient", "privacy.epsilon=8"])
    found = invert_images(plan, images_ND, classes_N)
    assert all(len(way["pictures"]) == len(found["images"]) for way in found["ways"])
    return {way["way"]: way["likeness"] for way in found["ways"]}


def test_a_plain_update_of_one_image_is_the_image(likeness: dict[str, float]) -> None:
    assert likeness["plain update"] > 0.99


def test_clipping_alone_hides_nothing(likeness: dict[str, float]) -> None:
    assert likeness["clipped"] > 0.99


def test_noise_at_epsilon_8_leaves_nothing_of_the_image(likeness: dict[str, float]) -> None:
    assert abs(likeness["clipped and noised"]) < 0.1


def test_a_secure_sum_leaves_an_image_its_share_of_a_mixture(likeness: dict[str, float]) -> None:
    assert likeness["secure sum"] < 0.35
