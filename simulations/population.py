"""Labs that fail on purpose: dropouts, stragglers and senders of NaN, by round and seed.

All draws are functions of (seed, round, names of the labs): a resumed run meets the same failures,
and the order in which labs are listed does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cytofed.errors import InputError
from cytofed.plan import Population
from cytofed.simulations.split import generator


def count(rate: float, labs: int) -> int:
    """floor(rate x labs), exactly: 0.29 of 100 labs are 29, though 0.29 * 100 < 29 in floats."""
    return math.floor(Fraction(str(rate)) * labs)


def absent(round_: int, labs: Sequence[str], rate: float, seed: int) -> frozenset[str]:
    """The floor(rate x labs) labs that drop out of this round."""
    return _draw(labs, count(rate, len(labs)), seed, "dropout", round_)


def late(
    round_: int, labs: Sequence[str], rate: float, seed: int, *, gone: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The floor(rate x labs) labs whose reply is late, among those not ``gone`` (at most all)."""
    present = [lab for lab in labs if lab not in gone]
    return _draw(present, min(count(rate, len(labs)), len(present)), seed, "straggler", round_)


def broken(labs: Sequence[str], nan_labs: int | Sequence[str], seed: int) -> frozenset[str]:
    """The labs that send NaN: those named, or that many drawn once for the whole run.

    Errors: InputError for a name that is no lab, or a number above that of the labs.
    """
    if isinstance(nan_labs, int):
        if not 0 <= nan_labs <= len(labs):
            raise InputError(
                f"Expected 0 <= simulation.population.nan_labs={nan_labs} <= {len(labs)} labs.",
                hint="it is the number of labs that send NaN: lower it, or raise --labs",
            )
        return _draw(labs, nan_labs, seed, "nan")
    unknown = sorted(set(nan_labs) - set(labs))
    if unknown:
        raise InputError(
            f"simulation.population.nan_labs names {unknown[0]!r}, which is no lab of this run.",
            hint=f"the labs are {labs[0]} to {labs[-1]}" if labs else "",
        )
    return frozenset(nan_labs)


@dataclass(frozen=True)
class Fate:
    """What befalls the labs in one round. ``gone`` shares no lab with ``late`` or ``nan``."""

    gone: frozenset[str] = frozenset()  # never get the order
    late: frozenset[str] = frozenset()  # reply after the round's deadline
    nan: frozenset[str] = frozenset()  # reply with NaN


def fate(population: Population, round_: int, labs: Sequence[str], seed: int) -> Fate:
    """What befalls ``labs`` in a round. Same arguments, same fate.

    Errors: InputError for rates outside [0, 1] and impossible ``nan_labs``.
    """
    for name in ("dropout", "stragglers"):
        rate = getattr(population, name)
        if not 0 <= rate <= 1:
            raise InputError(
                f"Expected 0 <= simulation.population.{name}={rate} <= 1.",
                hint="it is a share of the labs: 0.2 is one lab in five",
            )
    gone = absent(round_, labs, population.dropout, seed)
    return Fate(
        gone=gone,
        late=late(round_, labs, population.stragglers, seed, gone=gone),
        nan=broken(labs, population.nan_labs, seed) - gone,
    )


def _draw(labs: Sequence[str], number: int, seed: int, *purpose: str | int) -> frozenset[str]:
    names = sorted(labs)
    picked = generator(seed, *purpose).choice(len(names), size=number, replace=False)
    return frozenset(names[i] for i in picked)
