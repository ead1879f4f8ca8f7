"""Intervals of a mean over several splits of the same images.

Splits share training images, so their scores vary together and an ordinary t-interval is too
narrow. Corrected resampled t-test: Nadeau and Bengio, Machine Learning 52 (2003) 239-281; for
repeated folds Bouckaert and Frank, PAKDD 2004.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from cytofed.errors import InputError


def half_width(values: Sequence[float], *, test_share: float, confidence: float) -> float:
    """How far an interval's end is from the mean of ``values``, one score (or gap) a split.

    ``test_share``: what part of the images each split tests, in [0, 1); 0 for scores that share
    nothing, which gives Student's t. ``confidence``: that the true mean is below the upper end
    (one-sided: .975 for a two-sided 95 % interval). Infinite for a single value.
    Errors: InputError for a share outside [0, 1).
    """
    if not 0 <= test_share < 1:
        raise InputError(f"Expected 0 <= test_share={test_share:g} < 1")
    count = len(values)
    if count < 2:
        return math.inf
    deviation = float(np.std(values, ddof=1))
    error = deviation * math.sqrt(1 / count + test_share / (1 - test_share))
    return float(stdtrit(count - 1, confidence)) * error
