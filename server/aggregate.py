"""The order-free sum of updates.

P parameters. Every update is multiplied by its weight and rounded to fixed point, and the integers
are added: the result is the same in whatever order labs answer, and memory stays at one vector
however many labs there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cytofed.arrays import Float32, Parts, in_shares
from cytofed.errors import CytofedError
from cytofed.messages import MAX_UPDATE, MAX_WEIGHT

FRACTION_BITS = 30
"""One unit of the sum is 2^-30. MAX_UPDATE (2^8) times a total weight of 2^24 fits in int64."""

_CHUNK = 1 << 17  # values at a time: few calls, and the scratch array stays in the cache

_ROUNDING = 1.5 * 2.0**52
_ROUNDING_BITS = int(np.array(_ROUNDING).view(np.int64))
"""Where |x| < 2^51, the bits of ``x + _ROUNDING`` are those of ``_ROUNDING`` plus the integer
nearest to x: half the time of rounding and converting one after the other. The bits are added as
they are; what they hold too much is known, and comes off with the mean (modulo 2^64)."""


class Sum:
    """Running weighted sum of updates. ``mean`` is exact up to 2^-31 per unit of weight.

    ``clear`` it and use it again: memory that is there is cheaper than new memory.
    """

    def __init__(self, parts: tuple[str, ...], size: int) -> None:
        self._totals = {name: np.empty(size, dtype=np.int64) for name in parts}
        self._weight = 0.0
        self._excess = 0
        self.count = 0

    def clear(self) -> None:
        """Back to the sum of no updates."""
        self._weight, self._excess, self.count = 0.0, 0, 0

    def add(self, parts: Parts, weight: float) -> None:
        """Add a checked update (finite, within MAX_UPDATE, right shape and parts)."""
        if self._weight + weight > MAX_WEIGHT:
            raise CytofedError(
                f"total weight {self._weight + weight:g} of the cohort exceeds {MAX_WEIGHT:g}"
            )
        scale = weight * 2.0**FRACTION_BITS
        fits = MAX_UPDATE * scale < 2.0**51
        for name, total_P in self._totals.items():
            _add_rounded(total_P, parts[name], scale, first=self.count == 0, by_bits=fits)
        self._excess += _ROUNDING_BITS if fits else 0
        self._weight += weight
        self.count += 1

    def mean(self) -> Parts:
        """The weighted mean of what was added, part by part."""
        if self.count == 0:
            raise CytofedError("the mean of no updates is not defined")
        scale = 1.0 / (self._weight * 2.0**FRACTION_BITS)
        assert MAX_UPDATE * MAX_WEIGHT * 2.0**FRACTION_BITS < 2.0**63
        excess = np.array(self._excess % 2**64, np.uint64).view(np.int64)
        return {name: _scaled(total_P, excess, scale) for name, total_P in self._totals.items()}


def _add_rounded(
    total_P: npt.NDArray[np.int64],
    values_P: Float32,
    scale: float,
    *,
    first: bool,
    by_bits: bool,
) -> None:
    """``total_P += round(values_P * scale)`` in place, modulo 2^64; ties to even.

    ``first``: ``total_P`` holds nothing yet. ``by_bits``: faster, and each value becomes
    _ROUNDING_BITS too large.
    """

    def add(share: slice) -> None:
        scratch = np.empty(_CHUNK, dtype=np.float64)
        for start in range(share.start, share.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, share.stop))
            total, part = total_P[chunk], scratch[: chunk.stop - start]
            np.copyto(part, values_P[chunk])
            np.multiply(part, scale, out=part)
            if by_bits:
                whole = np.add(part, _ROUNDING, out=part).view(np.int64)
            else:
                whole = np.rint(part, out=part).astype(np.int64)
            if first:
                total[:] = whole
            else:
                np.add(total, whole, out=total)

    in_shares(add, len(total_P))


def _scaled(total_P: npt.NDArray[np.int64], excess: npt.NDArray[np.int64], scale: float) -> Float32:
    mean_P = np.empty(len(total_P), np.float32)

    def divide(share: slice) -> None:
        scratch = np.empty(_CHUNK, dtype=np.int64)
        for start in range(share.start, share.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, share.stop))
            part = np.subtract(total_P[chunk], excess, out=scratch[: chunk.stop - start])
            mean_P[chunk] = np.multiply(part, scale, out=part.view(np.float64))

    in_shares(divide, len(total_P))
    return mean_P
