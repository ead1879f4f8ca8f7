"""Scores under differential privacy: the confusion matrix, clipped per patient and noised.

What is released is the confusion matrix alone. Of a tally, it is the part that the scores of a
differential count need; the 45 numbers of the reliability bins would share its norm, and cost
accuracy in every score, for a calibration that noise makes useless. They stay zero.

One patient's part are the counts of at most ``cells_per_unit`` of his held-out cells. A patient
whose cells are all of one class has a count of that size in one place, one with many classes has
ones in many: the L2 norm lies between the root of the number of cells and that number. Each part
is scaled by the norm of its *true* classes' counts to at most ``sqrt(cells_per_unit)``, which
halves the noise at 16 cells, typically. Predictions within a class only split its count, so the
norm of the part is never larger. And a patient's weight does not depend on what the model said:
clipped by the norm of the part itself, patients with scattered errors would count more, and
accuracy would come out too low.

A patient is on one side of the split, and pays for training or for evaluation; the ledger
composes both all the same, and what it says never depends on how a lab has split.

No torch is imported here: the coordinator reads noised tallies.

Shapes: N cells, U units (patients, or images where the plan says so), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytofed.errors import InputError, VerificationError
from cytofed.metrics import Tally
from cytofed.privacy.noise import Randomness, SimulatedRandomness

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TallyMechanism:
    """The Gaussian mechanism of one evaluation: ``accounting.Gaussian(unit, sigma, 1)``."""

    sigma: float
    cells_per_unit: int

    def __post_init__(self) -> None:
        # No value switches the noise off: a plan without it releases no scores.
        if not 0 < self.sigma < math.inf:
            raise InputError(f"Expected 0 < evaluation.sigma={self.sigma:g} < infinity")
        if self.cells_per_unit < 1:
            raise InputError(f"Expected cells_per_patient={self.cells_per_unit} >= 1")

    @property
    def max_norm(self) -> float:
        """L2 bound of one unit's part of the confusion matrix, in cells."""
        return math.sqrt(self.cells_per_unit)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one lab's noise on each count, in cells."""
        return self.sigma * self.max_norm


def clipped_confusion(
    probs_NC: npt.NDArray[np.floating[Any]],
    targets_NC: npt.NDArray[np.bool_],
    unit_N: npt.NDArray[np.int64],
    mechanism: TallyMechanism,
) -> Floats:
    """The confusion matrix (C, C), rows truth, each unit scaled to at most ``max_norm``.

    ``unit_N`` numbers the units from 0. Cells with a coarse label count nothing.

    Guarantees: finite, never negative; a cell whose probabilities are not finite counts nothing,
    and changes nothing for others; a unit's scale depends on its own labels only.
    Sensitivity: ``mechanism.max_norm`` in L2 (add or remove one unit), whatever the model says
    and however many cells the unit has.
    """
    classes = targets_NC.shape[1]
    counted_N = (targets_NC.sum(axis=1) == 1) & np.isfinite(probs_NC).all(axis=1)
    truth_N = targets_NC[counted_N].argmax(axis=1)
    guess_N = probs_NC[counted_N].argmax(axis=1)
    unit_N = unit_N[counted_N]
    truth_UC = np.zeros((int(unit_N.max(initial=-1)) + 1, classes))
    np.add.at(truth_UC, (unit_N, truth_N), 1.0)
    norm_U = np.linalg.norm(truth_UC, axis=1)
    scale_U = np.minimum(1.0, mechanism.max_norm / np.maximum(norm_U, 1.0))
    confusion_CC = np.zeros((classes, classes))
    np.add.at(confusion_CC, (truth_N, guess_N), scale_U[unit_N])
    return confusion_CC


def noised_tally(confusion_CC: Floats, mechanism: TallyMechanism, randomness: Randomness) -> Tally:
    """``confusion_CC`` with N(0, (sigma max_norm)^2) on every count, as whole numbers.

    Guarantees: every count gets noise, those of absent classes and of a lab without held-out
    cells too. Rounding comes after the noise, so it costs nothing; counts may be negative.
    """
    noise = randomness.normals(confusion_CC.size).astype(np.float64)
    noised_CC = confusion_CC + mechanism.noise_sd * noise.reshape(confusion_CC.shape)
    bins_B3 = Tally.empty(len(confusion_CC)).bins_B3
    return Tally(np.rint(noised_CC).astype(np.int64), bins_B3)


def denoised(pooled: Tally) -> Tally | None:
    """A noised confusion matrix, summed over labs, as counts to compute scores from.

    The nearest matrix without negative counts and with the same total ("Norm-Sub", Wang et al.,
    NDSS 2020, arXiv:1905.08320): a constant is taken off, and what falls below 0 is 0. Negative
    counts read as 0 alone would leave the positive half of the noise in hundreds of empty places.
    It is post-processing and costs nothing. None where the noise hides all there was.
    """
    noised_D = pooled.confusion_CC.ravel().astype(np.float64)
    total = noised_D.sum()
    if total < 1:
        return None
    descending_D = np.sort(noised_D)[::-1]
    offset_D = (np.cumsum(descending_D) - total) / np.arange(1, len(noised_D) + 1)
    offset = offset_D[np.flatnonzero(descending_D > offset_D)[-1]]
    counts_D = np.rint(np.maximum(noised_D - offset, 0)).astype(np.int64)
    if not counts_D.any():
        return None
    return Tally(counts_D.reshape(pooled.confusion_CC.shape), pooled.bins_B3)


def check_release(new_randomness: Callable[[], Randomness]) -> None:
    """Self-check of the above, run by a lab before its first private order.

    One patient more or less moves the matrix by at most ``max_norm``; the noise of labs without
    images has the promised scale and shape and none is that of another release.
    ``new_randomness`` is what an evaluation of a lab starts with.
    Errors: VerificationError naming the check that failed.
    """
    from cytofed.privacy.gradients import Mechanism  # torch: at labs only
    from cytofed.privacy.selfcheck import check_noise

    # So much noise that rounding to whole numbers is lost in it.
    mechanism = TallyMechanism(sigma=1000.0, cells_per_unit=16)
    classes, units, cells = 21, 6, 16
    numbers = SimulatedRandomness(0, "self-check tally")
    probs_NC = numbers.normals(units * cells * classes).reshape(-1, classes)
    unit_N = np.repeat(np.arange(units), cells)
    truth_N = (np.arange(units * cells) * unit_N) % 5  # the first patient's are all of one class
    targets_NC = np.eye(classes, dtype=bool)[truth_N]
    all_CC = clipped_confusion(probs_NC, targets_NC, unit_N, mechanism)
    for unit in range(units):
        rest_N = unit_N != unit
        rest_CC = clipped_confusion(probs_NC[rest_N], targets_NC[rest_N], unit_N[rest_N], mechanism)
        change = float(np.linalg.norm(all_CC - rest_CC))
        if not change <= mechanism.max_norm * (1 + 1e-9):
            raise VerificationError(
                f"evaluation self-test: one patient changes the confusion matrix by {change:.4g}, "
                f"more than {mechanism.max_norm:g}"
            )
    empty_CC = np.zeros((classes, classes))
    releases_RP = [
        noised_tally(empty_CC, mechanism, new_randomness()).confusion_CC.ravel() for _ in range(8)
    ]
    promised = Mechanism(mechanism.sigma, mechanism.max_norm, 1.0, 1)
    try:
        check_noise(np.array(releases_RP, np.float64), promised)
    except VerificationError as error:
        raise VerificationError(f"evaluation: {error.message}") from error
