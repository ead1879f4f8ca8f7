"""One method family a file, both halves, paper on top."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from cytofed.errors import InputError
from cytofed.plan import StrategySpec
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.fednag import fednag
from cytofed.strategies.fedopt import fedadam, fedavgm, fedyogi
from cytofed.strategies.fedprox import fedprox
from cytofed.strategies.local_norms import local_norms
from cytofed.strategies.robust import krum, median, trimmed_mean
from cytofed.strategies.scaffold import scaffold
from cytofed.strategies.strategy import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    function.__name__: function
    for function in (
        fedavg,
        fedprox,
        fednag,
        fedavgm,
        fedadam,
        fedyogi,
        scaffold,
        local_norms,
        median,
        trimmed_mean,
        krum,
    )
}


def make_strategy(spec: StrategySpec) -> Strategy:
    """The strategy that a plan names.

    Errors: InputError for an unknown name or option, with the nearest known one.
    """
    if spec.name not in STRATEGIES:
        near = difflib.get_close_matches(spec.name, STRATEGIES, n=1)
        raise InputError(
            f"unknown strategy {spec.name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(STRATEGIES)}",
        )
    function = STRATEGIES[spec.name]
    known = list(inspect.signature(function).parameters)
    for option in spec.options:
        if option not in known:
            raise InputError(
                f"strategy {spec.name} has no option {option!r}",
                hint=f"its options: {', '.join(known)}",
            )
    return function(**spec.options)
