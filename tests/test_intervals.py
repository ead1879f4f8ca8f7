"""Intervals over splits that share images."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cytofed.errors import InputError
from cytofed.intervals import half_width


def test_scores_that_share_nothing_have_students_interval() -> None:
    # t of 9 degrees of freedom at .975 is 2.2622
    values = [float(v) for v in range(10)]
    expected = 2.26216 * np.std(values, ddof=1) / math.sqrt(10)
    assert half_width(values, test_share=0, confidence=0.975) == pytest.approx(expected, rel=1e-5)


def test_ten_runs_of_five_folds_have_an_interval_wider_by_the_root_of_three_and_a_half() -> None:
    values = [0.1, 0.12, 0.09, 0.11, 0.1, 0.13, 0.08, 0.1, 0.11, 0.12]
    plain = half_width(values, test_share=0, confidence=0.95)
    shared = half_width(values, test_share=0.2, confidence=0.95)
    assert shared / plain == pytest.approx(math.sqrt((1 / 10 + 1 / 4) / (1 / 10)))


def test_more_repetitions_of_the_same_images_do_not_narrow_an_interval_to_nothing() -> None:
    values = [0.1, 0.12, 0.09, 0.11, 0.1, 0.13, 0.08, 0.1, 0.11, 0.12] * 1000
    floor = 1.645 * float(np.std(values)) * math.sqrt(0.25)
    assert half_width(values, test_share=0.2, confidence=0.95) >= floor * 0.999


def test_one_value_has_no_interval_and_a_share_of_all_images_is_refused() -> None:
    assert math.isinf(half_width([0.5], test_share=0.2, confidence=0.95))
    with pytest.raises(InputError, match="test_share=1"):
        half_width([0.1, 0.2], test_share=1, confidence=0.95)


def test_repeated_folds_of_one_sample_cover_its_origin_only_with_the_correction() -> None:
    rng = np.random.default_rng(7)
    trials = 400
    covered = {0.0: 0, 0.2: 0}
    for _ in range(trials):
        sample = rng.normal(size=60)
        folds = [f for _ in range(5) for f in np.array_split(rng.permutation(60), 5)]
        scores = [float(sample[fold].mean()) for fold in folds]
        for share in covered:
            width = half_width(scores, test_share=share, confidence=0.975)
            covered[share] += abs(float(np.mean(scores))) <= width
    assert covered[0.0] / trials < 0.8  # a 95 % interval that is none
    assert covered[0.2] / trials > 0.95
