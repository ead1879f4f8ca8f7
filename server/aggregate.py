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

_CHUNK = 1 << 16  # values at a time: the scratch array stays in the processor's cache

_ROUNDING = 1.5 * 2.0**52
_ROUNDING_BITS = np.array(_ROUNDING).view(np.int64)
"""Where |x| < 2^51, the bits of ``x + _ROUNDING`` are those of ``_ROUNDING`` plus the integer
nearest to x: half the time of rounding and converting one after the other."""


class Sum:
    """Running weighted sum of updates. ``mean`` is exact up to 2^-31 per unit of weight."""

    def __init__(self, parts: tuple[str, ...], size: int) -> None:
        self._totals = {name: np.zeros(size, dtype=np.int64) for name in parts}
        self._weight = 0.0
        self.count = 0

    def add(self, parts: Parts, weight: float) -> None:
        """Add a checked update (finite, within MAX_UPDATE, right shape and parts)."""
        if self._weight + weight > MAX_WEIGHT:
            raise CytofedError(
                f"total weight {self._weight + weight:g} of the cohort exceeds {MAX_WEIGHT:g}"
            )
        for name, total_P in self._totals.items():
            add_fixed_point(total_P, parts[name], weight)
        self._weight += weight
        self.count += 1

    def mean(self) -> Parts:
        """The weighted mean of what was added, part by part."""
        if self.count == 0:
            raise CytofedError("the mean of no updates is not defined")
        scale = 1.0 / (self._weight * 2.0**FRACTION_BITS)
        assert MAX_UPDATE * MAX_WEIGHT * 2.0**FRACTION_BITS < 2.0**63
        return {name: _scaled(total_P, scale) for name, total_P in self._totals.items()}


def add_fixed_point(total_P: npt.NDArray[np.int64], values_P: Float32, weight: float) -> None:
    """``total_P += round(values_P * weight * 2^FRACTION_BITS)``, in place; ties to even.

    ``values_P`` lie within MAX_UPDATE.
    """
    scale = weight * 2.0**FRACTION_BITS
    fits = MAX_UPDATE * scale < 2.0**51

    def add(share: slice) -> None:
        scratch = np.empty(_CHUNK, dtype=np.float64)
        for start in range(share.start, share.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, share.stop))
            total, part = total_P[chunk], scratch[: chunk.stop - start]
            np.copyto(part, values_P[chunk])
            np.multiply(part, scale, out=part)
            if fits:
                whole = np.add(part, _ROUNDING, out=part).view(np.int64)
                np.add(total, np.subtract(whole, _ROUNDING_BITS, out=whole), out=total)
            else:
                np.add(total, np.rint(part, out=part).astype(np.int64), out=total)

    in_shares(add, len(total_P))


def _scaled(total_P: npt.NDArray[np.int64], scale: float) -> Float32:
    mean_P = np.empty(len(total_P), np.float32)

    def divide(share: slice) -> None:
        scratch = np.empty(_CHUNK, dtype=np.float64)
        for start in range(share.start, share.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, share.stop))
            part = scratch[: chunk.stop - start]
            mean_P[chunk] = np.multiply(total_P[chunk], scale, out=part)

    in_shares(divide, len(total_P))
    return mean_P
