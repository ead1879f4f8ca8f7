"""What a lab checks of an order's content before anything is computed from it.

P parameters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cytofed.arrays import is_finite
from cytofed.errors import RefusedError
from cytofed.messages import WEIGHTS, Order
from cytofed.start import read_start
from cytofed.strategies.strategy import Strategy

_ROUNDING = 1e-5
"""by which start models of the same plan differ between kinds of processors, and more"""


def check_parts(order: Order, strategy: Strategy, *, size: int, folder: Path) -> None:
    """An order carries exactly the vectors of its strategy, and starts where the plan starts.

    ``folder``: where the lab's own start model of the plan lies.

    Errors: RefusedError for other parts, lengths or values that are not finite, and for a first
    round that is not of the start model and the strategy's state at the start.
    """
    expected = strategy.down if order.kind == "train" else (WEIGHTS,)
    if tuple(order.parts) != expected:  # guard: order-parts
        raise RefusedError(
            f"the order carries {', '.join(order.parts) or 'nothing'}, "
            f"strategy {strategy.name} has {', '.join(expected)} for it"
        )
    for name, values_P in order.parts.items():
        if values_P.shape != (size,):  # guard: order-size
            raise RefusedError(f"{name} of shape {values_P.shape}, the plan's net has ({size},)")
        if not is_finite(values_P):  # guard: order-finite
            raise RefusedError(f"{name} has values that are no numbers")
    if order.kind == "train" and order.round <= 1:  # guard: order-start
        start = read_start(folder)
        assert start is not None
        initial = strategy.init(start.weights_P)
        for name, values_P in order.parts.items():
            if np.abs(values_P - initial[name]).max(initial=0.0) > _ROUNDING:
                raise RefusedError(
                    f"round {order.round} begins with other {name} than the start model of the "
                    "plan that was approved",
                    hint="the coordinator and this lab must have the same version of cytofed",
                )
