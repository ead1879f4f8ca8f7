"""Fixed point: float updates as ring words whose sum is exact, and the mean back from the sum.

A value v in [-range, range] becomes the integer v / step, rounded up or down at random so that its
expectation is exact (Connolly, Higham, Mary 2021, stochastic rounding); the word is that integer
modulo 2^bits. With ``digits = bits - ceil(log2(cohort))`` and ``top = 2^(digits - 1) - 1`` steps to
a side, ``cohort`` such integers never leave the signed ring: the sum is exact, in whatever order it
is taken.

======  ======  ======  =====================
 bits   cohort  digits   step
======  ======  ======  =====================
  32       8      29     range / 268,435,455
  32      40      26     range / 33,554,431
  16       8      13     range / 4,095
  16      40      10     range / 511
======  ======  ======  =====================

**Error bound.** One lab: less than a step per coordinate. The mean of any number of labs: less than
a step, standard deviation at most step / (2 sqrt(labs)). A weighted mean: less than step *
max_weight * labs / sum of weights, plus the weights' own resolution of 2^-20 or better.

**Weights** travel in the same vector: each coordinate is w v / max_weight, and two more words carry
w / max_weight, so that sum(w v) / sum(w) follows from sums alone. One guard word carries the
constant 1: its sum is the number of labs, or the masks did not cancel.

Shape legend: P parameters, W words (P + 1, or P + 3 with weights).

::

    VerificationError
    `- SumError              a decoded sum is none that this number of labs can have made
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cytofed.arrays import in_shares
from cytofed.errors import InputError, VerificationError
from cytofed.privacy.masks import Words, check_words

MAX_COHORT = 40
_CHUNK = 1 << 16  # coordinates at a time: the float64 temporaries stay in the cache
_CHUNKS_A_SHARE = 16
_MAX_WEIGHT_BITS = 24
_INSIDE = 1 - 1e-9
"""of a range: what is within that needs no clamp, however its multiple is rounded"""


class SumError(VerificationError):
    """A sum of words that this many labs cannot have produced: masks left, or a forged vector."""


@dataclass(frozen=True)
class Part:
    """Consecutive coordinates with one range: what is clamped to [-range_, range_]."""

    name: str
    size: int
    range_: float

    def __post_init__(self) -> None:
        if self.size < 0 or not (math.isfinite(self.range_) and self.range_ > 0):
            raise InputError(
                f"part {self.name!r}: size {self.size}, range {self.range_}: expected a size >= 0 "
                "and a finite range > 0",
                hint="set secure_aggregation.range",
            )


@dataclass(frozen=True)
class Encoding:
    """How one run turns an update into words; the same for all labs of its cohort."""

    parts: tuple[Part, ...]
    bits: int
    cohort: int
    max_weight: float | None = None  # public bound of the labs' weights; None: labs count equally

    def __post_init__(self) -> None:
        if self.bits not in (32, 16):
            raise InputError(f"secure_aggregation.bits={self.bits}, expected 32 or 16")
        if not 1 <= self.cohort <= MAX_COHORT:
            raise InputError(f"cohort of {self.cohort} labs, expected 1 to {MAX_COHORT}")
        weight = self.max_weight
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise InputError(f"max_weight={weight}, expected a finite number > 0")

    @property
    def digits(self) -> int:
        """Bits of one lab's value: the ring less what ``cohort`` summands need."""
        return self.bits - math.ceil(math.log2(self.cohort))

    @property
    def top(self) -> int:
        return (1 << self.digits - 1) - 1

    @property
    def weight_bits(self) -> int:
        return min(_MAX_WEIGHT_BITS, 2 * self.digits)

    @property
    def parameters(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def words(self) -> int:
        return self.parameters + 1 + (0 if self.max_weight is None else 2)

    @property
    def dtype(self) -> np.dtype[np.uint32] | np.dtype[np.uint16]:
        return np.dtype(np.uint32) if self.bits == 32 else np.dtype(np.uint16)

    def step(self, part: Part) -> float:
        """The quantisation step of a part, in the update's unit."""
        return part.range_ / self.top


@dataclass(frozen=True)
class Encoded:
    """One lab's words, and the fraction of its coordinates that were clamped."""

    words_W: Words = field(repr=False)
    clamped: float


@dataclass(frozen=True)
class Decoded:
    """The mean over labs and, with weights, the sum of weights."""

    mean_P: NDArray[np.floating] = field(repr=False)
    weight: float


def one_range(parameters: int, range_: float, *, bits: int, cohort: int) -> Encoding:
    """An encoding with the same range for all coordinates, labs counting equally."""
    return Encoding((Part("update", parameters, range_),), bits, cohort)


def encode(
    values_P: NDArray[np.floating],
    encoding: Encoding,
    *,
    rng: np.random.Generator,
    weight: float | None = None,
) -> Encoded:
    """One lab's update as ring words: clamped, weighted, rounded at random.

    Guarantees: the words of at most ``encoding.cohort`` labs sum without overflow. ``rng`` decides
    only the rounding. Raises InputError for non-finite values: they have no word, and never leave
    the lab.
    """
    if values_P.shape != (encoding.parameters,):
        raise InputError(f"update of shape {values_P.shape}, expected ({encoding.parameters},)")
    share = _share(encoding, weight)
    words_W = np.empty(encoding.words, encoding.dtype)
    signed_W = words_W.view(np.int32 if encoding.bits == 32 else np.int16)
    scratch = np.empty((2, _CHUNK))
    clamped = 0
    for part, start, end in _chunks(encoding):
        values = values_P[start:end]
        # min and max see NaN and infinities without a boolean array of the vector's size
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"update has non-finite values in part {part.name!r}",
                hint="training diverged: lower train.lr",
            )
        steps, drawn = scratch[0, : end - start], scratch[1, : end - start]
        np.multiply(values, np.float64(share / encoding.step(part)), out=steps)
        near = max(-low, high) > part.range_ * _INSIDE
        if near:
            limit = share * encoding.top
            clamped += int(np.count_nonzero(np.abs(values) > part.range_))
            np.clip(steps, -limit, limit, out=steps)
        steps += rng.random(out=drawn)
        np.floor(steps, out=steps)
        if near:
            # limit + .999… may round up to the next integer: the sum must not leave the ring.
            np.minimum(steps, encoding.top, out=steps)
        signed_W[start:end] = steps  # within a word: top is below 2^31, or 2^15
    _write_tail(words_W, encoding, share)
    return Encoded(words_W, clamped / max(1, encoding.parameters))


def decode(
    sum_W: Words,
    encoding: Encoding,
    *,
    count: int,
    dtype: type[np.floating] = np.float64,
    in_place: bool = False,
) -> Decoded:
    """The mean of ``count`` labs from the ring sum of their words, rounded once to ``dtype``.

    ``in_place``: written over the sum, where a word is as wide as ``dtype``; the sum is lost.

    Raises :class:`SumError` when the guard word, a weight or a coordinate is out of what ``count``
    labs can produce.
    """
    check_words(sum_W)
    if sum_W.dtype != encoding.dtype or sum_W.shape != (encoding.words,):
        raise InputError(
            f"sum of {sum_W.shape} {sum_W.dtype}, expected ({encoding.words},) {encoding.dtype}"
        )
    if not 1 <= count <= encoding.cohort:
        raise InputError(f"sum over {count} labs, expected 1 to {encoding.cohort}")
    tail = [int(word) for word in sum_W[encoding.parameters :]]
    if tail[0] != count:  # guard: guard-word
        raise SumError(
            f"guard word sums to {tail[0]}, expected {count}: masks did not cancel, or a lab "
            "sent a vector that it did not encode"
        )
    weight = float(count)
    divisor = weight
    if encoding.max_weight is not None:
        whole = (1 << encoding.weight_bits) - 1
        units = (tail[1] << encoding.weight_bits // 2) + tail[2]
        if not 0 < units <= count * whole:  # guard: weight-sum
            raise SumError(f"weights sum to {units} units, expected 1 to {count * whole}")
        divisor = units / whole
        weight = divisor * encoding.max_weight
    if in_place and sum_W.itemsize == np.dtype(dtype).itemsize:
        mean_P = sum_W.view(dtype)[: encoding.parameters]
    else:
        mean_P = np.empty(encoding.parameters, dtype)
    signed_W = sum_W.view(np.int32 if encoding.bits == 32 else np.int16)
    limit = count * encoding.top
    chunks = list(_chunks(encoding))

    def decode_some(share: slice) -> None:
        for part, start, end in chunks[share]:
            chunk = signed_W[start:end]
            if int(chunk.min()) < -limit or int(chunk.max()) > limit:  # guard: sum-range
                raise SumError(
                    f"part {part.name!r}: a sum of {count} labs lies outside +-{limit} steps"
                )
            scale = np.float64(encoding.step(part) / divisor)
            np.multiply(chunk, scale, out=mean_P[start:end], dtype=np.float64, casting="same_kind")

    in_shares(decode_some, len(chunks), share=_CHUNKS_A_SHARE)
    return Decoded(mean_P, weight)


def _share(encoding: Encoding, weight: float | None) -> float:
    """The lab's weight as a fraction of the greatest, rounded to what the words can carry."""
    if encoding.max_weight is None:
        if weight is not None:
            raise InputError("a weight was given, but this encoding has no max_weight")
        return 1.0
    if weight is None or not 0 <= weight <= encoding.max_weight:
        raise InputError(f"weight {weight}, expected 0 to max_weight {encoding.max_weight}")
    whole = (1 << encoding.weight_bits) - 1
    # Rounded first and used for both sums: the quotient then has no error from the weight.
    return round(weight / encoding.max_weight * whole) / whole


def _write_tail(words_W: Words, encoding: Encoding, share: float) -> None:
    words_W[encoding.parameters] = 1
    if encoding.max_weight is not None:
        units = round(share * ((1 << encoding.weight_bits) - 1))
        half = encoding.weight_bits // 2
        words_W[encoding.parameters + 1] = units >> half
        words_W[encoding.parameters + 2] = units & (1 << half) - 1


def _chunks(encoding: Encoding) -> Iterator[tuple[Part, int, int]]:
    at = 0
    for part in encoding.parts:
        end = at + part.size
        for start in range(at, end, _CHUNK):
            yield part, start, min(end, start + _CHUNK)
        at = end
