"""What a model gets right: strict and tolerant scores, calibration, and scores over labs.

All of it comes from a ``Tally`` of whole numbers, so that sums over labs are exact in any order
and fit a secure sum. Tolerant scores after Matek et al., Blood 2021, 10.1182/blood.2020010568;
expected calibration error and temperature after Guo et al., ICML 2017, arXiv:1706.04599.

Conventions: "macro" is the mean over classes with test images (support > 0); a precision or
recall with nothing to divide by is 0. Counts below 0, which noise on a tally can give, are
read as 0.

Shapes: N images, M images of the calibration part, C classes, B reliability bins, T temperatures,
R bootstrap draws, D = C*C + 3B + T*(1 + 3B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from cytofed.errors import InputError
from cytofed.labels import Scheme

BINS = 15
CONFIDENCE_UNIT = 1_000_000
"""Confidence is summed in millionths: whole numbers add up the same in any order."""
TEMPERATURES: Final = tuple(2.0 ** (k / 6) for k in range(-6, 13))
"""What logits may be divided by, 0.5 to 4: neighbours are 12% apart, so none is further than 6%
from the best. A fixed list, since sums of scores over labs are for the same temperatures."""
TINY_SUPPORT = 10
"""Classes with fewer test images are noise in a macro score (ABE has 8 images in all)."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

_TEMPERED = (len(TEMPERATURES), 1 + 3 * BINS)
_LEAST = 1e-38
"""Probabilities below are taken for this: float32 has none much smaller, and a log is finite."""


def _no_temperatures() -> Counts:
    return np.zeros(_TEMPERED, np.int64)


@dataclass(frozen=True, eq=False)
class Tally:
    """What a lab's evaluation returns; tallies of labs add up to the tally of all.

    Only images with one exact label are in it: a set of allowed classes has no row.
    """

    confusion_CC: Counts
    """rows truth, columns prediction"""
    bins_B3: Counts
    """per bin of confidence: images, sum of confidence in millionths, right predictions"""
    tempered_TD: Counts = field(default_factory=_no_temperatures)
    """per temperature: minus the log likelihood of the calibration part in millionths, then the
    bins of the test images; zeros where no images were kept for calibration"""

    def __post_init__(self) -> None:
        classes = len(self.confusion_CC)
        if self.confusion_CC.shape != (classes, classes) or self.bins_B3.shape != (BINS, 3):
            raise InputError(
                f"Expected a tally of (C, C) and ({BINS}, 3) counts, found "
                f"{self.confusion_CC.shape} and {self.bins_B3.shape}"
            )
        if self.tempered_TD.shape != _TEMPERED:
            raise InputError(
                f"Expected {_TEMPERED} counts of temperatures, found {self.tempered_TD.shape}"
            )
        for counts in (self.confusion_CC, self.bins_B3, self.tempered_TD):
            if counts.dtype != np.int64:
                raise InputError(f"Expected a tally of int64, found {counts.dtype}")

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """The tally of no image at all."""
        return cls(np.zeros((classes, classes), np.int64), np.zeros((BINS, 3), np.int64))

    @classmethod
    def from_vector(cls, vector_D: Counts, classes: int) -> Tally:
        """The tally whose ``vector_D`` this is.

        Errors: InputError when the length does not fit ``classes``.
        """
        ends = np.cumsum([classes * classes, 3 * BINS, _TEMPERED[0] * _TEMPERED[1]])
        expected = int(ends[-1])
        if vector_D.shape != (expected,):
            raise InputError(
                f"Expected a tally of {expected} numbers for {classes} classes, "
                f"found shape {vector_D.shape}"
            )
        counts, bins, tempered = np.split(vector_D.copy(), ends[:-1])
        return cls(
            counts.reshape(classes, classes), bins.reshape(BINS, 3), tempered.reshape(_TEMPERED)
        )

    @property
    def vector_D(self) -> Counts:
        """All counts as one vector, for the wire and the secure sum."""
        parts = self.confusion_CC, self.bins_B3, self.tempered_TD
        return np.concatenate([part.ravel() for part in parts])

    @property
    def images(self) -> int:
        """Number of images counted."""
        return int(self.confusion_CC.sum())

    @property
    def temperature(self) -> float | None:
        """What fits the calibration part best; None without one."""
        loss_T = self.tempered_TD[:, 0]
        return TEMPERATURES[int(loss_T.argmin())] if (loss_T > 0).any() else None

    def at(self, temperature: float | None) -> Tally:
        """The same with the bins at one of ``TEMPERATURES``; as it is for None."""
        if temperature is None:
            return self
        bins_D = self.tempered_TD[TEMPERATURES.index(temperature), 1:]
        return Tally(self.confusion_CC, bins_D.reshape(BINS, 3), self.tempered_TD)

    def __add__(self, other: Tally) -> Tally:
        if self.confusion_CC.shape != other.confusion_CC.shape:
            raise InputError(
                f"cannot add tallies of {len(self.confusion_CC)} and "
                f"{len(other.confusion_CC)} classes"
            )
        return Tally(
            self.confusion_CC + other.confusion_CC,
            self.bins_B3 + other.bins_B3,
            self.tempered_TD + other.tempered_TD,
        )


def tally(
    probs_NC: NDArray[np.floating[Any]],
    targets_NC: NDArray[np.bool_],
    calibration: tuple[NDArray[np.floating[Any]], NDArray[np.bool_]] | None = None,
) -> Tally:
    """Count predictions (the most likely class, the first of equals) against exact labels.

    Rows of ``targets_NC`` with several allowed classes are left out.
    ``calibration``: probabilities and targets (M, C) of images that were kept for it.

    Errors: InputError for other shapes, for probabilities that are not finite or lie outside
    [0, 1], and for an image without any label.
    """
    _check_scored(probs_NC, targets_NC)
    classes = probs_NC.shape[1]
    exact_N = targets_NC.sum(axis=1) == 1
    probs_NC = probs_NC[exact_N]
    truth_N = targets_NC[exact_N].argmax(axis=1)
    guess_N = probs_NC.argmax(axis=1)
    confusion_CC = np.bincount(truth_N * classes + guess_N, minlength=classes * classes)
    confusion_CC = confusion_CC.reshape(classes, classes).astype(np.int64)
    right_N = truth_N == guess_N
    bins_B3 = _bins(probs_NC.max(axis=1, initial=0.0), right_N)
    if calibration is None or len(calibration[0]) == 0:
        return Tally(confusion_CC, bins_B3)

    _check_scored(*calibration)
    rows = []
    for temperature in TEMPERATURES:
        kept_MC, top_N = _tempered(calibration[0], temperature), _tempered(probs_NC, temperature)
        found_M = np.where(calibration[1], kept_MC, 0).sum(axis=1)
        loss = -np.log(np.maximum(found_M, _LEAST)).sum()
        micro = np.rint(loss * CONFIDENCE_UNIT).astype(np.int64)
        rows.append(np.append(micro, _bins(top_N.max(axis=1, initial=0.0), right_N)))
    return Tally(confusion_CC, bins_B3, np.stack(rows))


def _check_scored(probs_NC: NDArray[np.floating[Any]], targets_NC: NDArray[np.bool_]) -> None:
    if probs_NC.ndim != 2 or probs_NC.shape != targets_NC.shape:
        raise InputError(
            f"Expected probabilities and targets of one shape (N, C), found {probs_NC.shape} "
            f"and {targets_NC.shape}"
        )
    if not np.isfinite(probs_NC).all():
        rows = int((~np.isfinite(probs_NC)).any(axis=1).sum())
        raise InputError(
            f"probabilities of {rows} of {len(probs_NC)} images are not finite",
            hint="the model's weights are broken; lower train.lr",
        )
    # float32 softmax may exceed 1 by some units in the last place
    if len(probs_NC) and (probs_NC.min() < 0 or probs_NC.max() > 1 + 1e-5):
        raise InputError(
            f"Expected probabilities from 0 to 1, found {probs_NC.min():g} to {probs_NC.max():g}",
            hint="apply softmax to the logits first",
        )
    labels_N = targets_NC.sum(axis=1)
    if (labels_N == 0).any():
        raise InputError(f"{int((labels_N == 0).sum())} of {len(probs_NC)} images have no label")


def _bins(top_N: NDArray[np.floating[Any]], right_N: NDArray[np.bool_]) -> Counts:
    """Images per bin of confidence, their confidence, and how many are right."""
    capped_N = np.minimum(top_N.astype(np.float64), 1.0)
    micro_N = np.rint(capped_N * CONFIDENCE_UNIT).astype(np.int64)
    bin_N = np.maximum((micro_N * BINS - 1) // CONFIDENCE_UNIT, 0)  # (m/B, (m+1)/B], as in Guo
    bins_B3 = np.zeros((BINS, 3), np.int64)
    np.add.at(bins_B3, bin_N, np.stack([np.ones_like(micro_N), micro_N, right_N], 1))
    return bins_B3


def _tempered(probs_NC: NDArray[np.floating[Any]], temperature: float) -> Floats:
    """The probabilities of logits divided by ``temperature``."""
    logits_NC = np.log(np.maximum(probs_NC.astype(np.float64), _LEAST)) / temperature
    powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True, initial=-np.inf))
    return cast(Floats, powers_NC / powers_NC.sum(axis=1, keepdims=True))


def summarise(tally: Tally, scheme: Scheme, temperature: float | None = None) -> dict[str, Any]:
    """The object ``global`` of summary.json; values are Python numbers, ready for JSON.

    ``temperature``: what the released model's logits were divided by. Then ``ece``,
    ``reliability`` and ``accuracy_coverage`` are of that model, and ``calibration`` says what the
    error was without.

    Beyond the contract: ``images``; ``macro_f1_without_tiny`` (classes with fewer than 10 test
    images left out; None when none remains); ``tolerant.per_class``; ``differential_error``
    (mean over classes of |predicted - true share|, in percentage points, as labs report
    differential counts); ``blasts`` (recall of blasts, which no lab may miss, with its Wilson
    interval at 95 %; None without any); ``reliability`` and ``accuracy_coverage`` (lists of
    points).

    Errors: InputError for a tally without images or of another number of classes.
    """
    confusion_CC = _confusion(tally, scheme)
    strict = _scores(confusion_CC, np.eye(len(scheme.codes), dtype=bool))
    loose = _scores(confusion_CC, np.asarray(scheme.tolerance_CC, dtype=bool))
    support_C = confusion_CC.sum(axis=1)
    images = int(support_C.sum())
    present_C = support_C > 0
    sturdy_C = support_C >= TINY_SUPPORT
    share_C = confusion_CC.sum(axis=0) / images - support_C / images
    released = tally.at(temperature)
    reliability = _reliability(released)
    calibration = None
    if temperature is not None:
        before = _calibration_error(_reliability(tally))
        calibration = {"temperature": temperature, "ece_before": before}
    return {
        "macro_f1": float(strict.f1_C[present_C].mean()),
        "balanced_accuracy": float(strict.recall_C[present_C].mean()),
        "accuracy": float(np.trace(confusion_CC) / images),
        "weighted_f1": float((strict.f1_C * support_C).sum() / images),
        "ece": _calibration_error(reliability),
        "calibration": calibration,
        "per_class": _per_class(strict, support_C, scheme),
        "tolerant": {
            "macro_precision": float(loose.precision_C[present_C].mean()),
            "macro_recall": float(loose.recall_C[present_C].mean()),
            "macro_f1": float(loose.f1_C[present_C].mean()),
            "per_class": _per_class(loose, support_C, scheme),
        },
        "macro_f1_without_tiny": float(strict.f1_C[sturdy_C].mean()) if sturdy_C.any() else None,
        "images": images,
        "differential_error": float(100 * np.abs(share_C)[present_C].mean()),
        "reliability": reliability,
        "accuracy_coverage": _accuracy_coverage(released),
        "blasts": _blasts(confusion_CC, scheme),
    }


def summarise_labs(
    tallies: Mapping[str, Tally], scheme: Scheme, temperature: float | None = None
) -> dict[str, dict[str, Any]]:
    """``summarise`` of each lab; labs without exactly labelled test images are left out."""
    return {lab: summarise(t, scheme, temperature) for lab, t in tallies.items() if _counted(t)}


@dataclass(frozen=True)
class Spread:
    """A score over labs: mean, standard deviation (of the population of labs) and worst."""

    mean: float
    sd: float
    worst: float
    worst_lab: str
    labs: int


def spread(scores: Mapping[str, float]) -> Spread:
    """The spread of one score over labs; of equally bad labs the first by name is the worst.

    Errors: InputError without any lab.
    """
    if not scores:
        raise InputError("a spread over labs needs the score of at least one lab")
    values_K = np.array(list(scores.values()), dtype=np.float64)
    worst_lab = min(scores, key=lambda lab: (scores[lab], lab))
    return Spread(
        mean=float(values_K.mean()),
        sd=float(values_K.std()),
        worst=scores[worst_lab],
        worst_lab=worst_lab,
        labs=len(scores),
    )


def absent_recall(tally: Tally, train_counts_C: Counts, scheme: Scheme) -> dict[str, float]:
    """Recall of the tested classes that a lab had no training image of, by code.

    This is what a lab gains that it could not have learnt alone. ``train_counts_C`` holds the
    lab's training images per class.
    """
    confusion_CC = np.maximum(tally.confusion_CC, 0)
    support_C = confusion_CC.sum(axis=1)
    return {
        code: float(confusion_CC[c, c] / support_C[c])
        for c, code in enumerate(scheme.codes)
        if train_counts_C[c] == 0 and support_C[c] > 0
    }


def interval(
    tally: Tally,
    scheme: Scheme,
    *,
    rng: np.random.Generator,
    level: float = 0.95,
    draws: int = 1000,
) -> tuple[float, float]:
    """Bootstrap interval of the macro F1: percentiles over redrawn test images.

    Images are redrawn within their true class, which keeps tiny classes in each draw. The
    interval says how much the choice of test images matters; not the choice of patients
    (images of one patient are alike, so it is too narrow for them), nor the training seed.
    """
    return _percentiles(_macro_f1_draws(_confusion(tally, scheme), rng, draws), level)


def gap(
    ours: Tally,
    theirs: Tally,
    scheme: Scheme,
    *,
    rng: np.random.Generator,
    level: float = 0.95,
    draws: int = 1000,
) -> dict[str, float]:
    """Macro F1 of ``ours`` minus that of ``theirs`` on the same images, with an interval.

    Returns ``{"macro_f1", "low", "high"}``. The two are redrawn independently, because a tally
    does not say which image was right in both: the interval is wider than a paired one.
    """
    ours_CC, theirs_CC = _confusion(ours, scheme), _confusion(theirs, scheme)
    draws_R = _macro_f1_draws(ours_CC, rng, draws) - _macro_f1_draws(theirs_CC, rng, draws)
    low, high = _percentiles(draws_R, level)
    difference = _macro_f1(ours_CC[None])[0] - _macro_f1(theirs_CC[None])[0]
    return {"macro_f1": float(difference), "low": low, "high": high}


@dataclass(frozen=True)
class _Scores:
    precision_C: Floats
    recall_C: Floats
    f1_C: Floats


def _scores(confusion_CC: Counts, right_CC: NDArray[np.bool_]) -> _Scores:
    """Scores per class where a prediction counts as right in the cells of ``right_CC``."""
    right_counts_CC = np.where(right_CC, confusion_CC, 0)
    precision_C = _ratio(right_counts_CC.sum(axis=0), confusion_CC.sum(axis=0))
    recall_C = _ratio(right_counts_CC.sum(axis=1), confusion_CC.sum(axis=1))
    f1_C = _ratio(2 * precision_C * recall_C, precision_C + recall_C)
    return _Scores(precision_C, recall_C, f1_C)


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    out = np.zeros(above.shape, np.float64)
    np.divide(above, below, out=out, where=below > 0)
    return out


def _per_class(scores: _Scores, support_C: Counts, scheme: Scheme) -> dict[str, dict[str, Any]]:
    return {
        code: {
            "precision": float(scores.precision_C[c]),
            "recall": float(scores.recall_C[c]),
            "f1": float(scores.f1_C[c]),
            "support": int(support_C[c]),
        }
        for c, code in enumerate(scheme.codes)
    }


def _counted(tally: Tally) -> bool:
    return bool((tally.confusion_CC > 0).any())


def _confusion(tally: Tally, scheme: Scheme) -> Counts:
    if len(tally.confusion_CC) != len(scheme.codes):
        raise InputError(
            f"a tally of {len(tally.confusion_CC)} classes does not fit label scheme "
            f"{scheme.name} of {len(scheme.codes)} codes"
        )
    if not _counted(tally):
        raise InputError(
            "no exactly labelled test image to score",
            hint="raise evaluation.fraction, or test on data whose labels name one class each",
        )
    return np.maximum(tally.confusion_CC, 0)


def _reliability(tally: Tally) -> list[dict[str, Any]]:
    """Bins that hold images, from the least to the most confident."""
    bins_B3 = np.maximum(tally.bins_B3, 0)
    return [
        {
            "confidence": float(micro / count / CONFIDENCE_UNIT),
            "accuracy": float(right / count),
            "images": int(count),
        }
        for count, micro, right in bins_B3
        if count > 0
    ]


def _calibration_error(reliability: list[dict[str, Any]]) -> float:
    error = sum(p["images"] * abs(p["accuracy"] - p["confidence"]) for p in reliability)
    return float(error / max(1, sum(p["images"] for p in reliability)))


def _blasts(confusion_CC: Counts, scheme: Scheme) -> dict[str, Any] | None:
    """Recall of blasts with its interval (Wilson 1927: sound for few images and near 0 or 1)."""
    if "BLA" not in scheme.codes:
        return None
    row_C = confusion_CC[scheme.index("BLA")]
    images, right = int(row_C.sum()), int(row_C[scheme.index("BLA")])
    if images == 0:
        return None
    z, share = 1.959964, right / images
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    deviation = math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    half = z * deviation / (1 + z**2 / images)
    return {"recall": share, "low": middle - half, "high": middle + half, "images": images}


def _accuracy_coverage(tally: Tally) -> list[dict[str, float]]:
    """Accuracy when only the most confident images are answered, a point per bin edge."""
    bins_B3 = np.maximum(tally.bins_B3, 0)[::-1]
    count_B, right_B = bins_B3[:, 0].cumsum(), bins_B3[:, 2].cumsum()
    return [
        {"coverage": float(count / count_B[-1]), "accuracy": float(right / count)}
        for b, (count, right) in enumerate(zip(count_B, right_B, strict=True))
        if bins_B3[b, 0] > 0
    ]


def _macro_f1(confusion_RCC: Counts) -> Floats:
    """Macro F1 of each matrix: F1 = 2 right / (support + predicted), over classes present."""
    right_RC = np.diagonal(confusion_RCC, axis1=1, axis2=2)
    support_RC = confusion_RCC.sum(axis=2)
    f1_RC = _ratio(2 * right_RC, support_RC + confusion_RCC.sum(axis=1))
    present_RC = support_RC > 0
    return cast(Floats, np.where(present_RC, f1_RC, 0).sum(axis=1) / present_RC.sum(axis=1))


def _macro_f1_draws(confusion_CC: Counts, rng: np.random.Generator, draws: int) -> Floats:
    confusion_RCC = np.zeros((draws, *confusion_CC.shape), np.int64)
    for c, row_C in enumerate(confusion_CC):
        if row_C.sum() > 0:
            confusion_RCC[:, c] = rng.multinomial(row_C.sum(), row_C / row_C.sum(), size=draws)
    return _macro_f1(confusion_RCC)


def _percentiles(draws_R: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
