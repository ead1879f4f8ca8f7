"""A coordinator that lies, or a lab: the real one, of which one function is another.

It is used in one process with its labs, and in a process of its own (tests/deployment/faulty.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message

from cytofed.messages import Order, pack_order
from cytofed.privacy.secagg_lab import LabState
from cytofed.server import secure
from cytofed.server.asking import ask_each

Lie = Callable[[str, Order], Order | None]
"""what a lab is told in place of an order; None: it is not asked, and called absent"""


def tells(lie: Lie) -> Callable[..., Iterator[tuple[str, Message | None]]]:
    """In place of ``SecureRun._sent``: each lab gets what ``lie`` makes of the order for it."""

    def sent(
        self: secure.SecureRun, grid: Any, setup: Any, order: Order
    ) -> Iterator[tuple[str, Message | None]]:
        told = {lab: lie(lab, order) for lab in setup.members}
        contents = (
            (lab, self.nodes[lab], pack_order(own)) for lab, own in told.items() if own is not None
        )
        timeout_s = self.plan.cohort.round_timeout_s
        yield from ask_each(grid, contents, order.kind, order.round, timeout_s=timeout_s)
        for lab, own in told.items():
            if own is None:
                yield lab, None

    return sent


def one_lab_alone(victim: str) -> Lie:
    """All labs but one are told of a weight bound beside which their own weights are nothing, in
    the first round."""

    def lie(lab: str, order: Order) -> Order:
        if lab == victim or order.round > 1:
            return order
        return replace(order, max_weight=2.0**60)

    return lie


def other_weights(victim: str) -> Lie:
    """All labs but one start from other weights, from the second round on."""

    def lie(lab: str, order: Order) -> Order:
        if lab == victim or order.round < 2:
            return order
        moved = {name: values_P + np.float32(0.01) for name, values_P in order.parts.items()}
        return replace(order, parts=moved)

    return lie


def called_absent(lab: str, *, from_round: int) -> Lie:
    """A lab that is there is called absent."""

    def lie(name: str, order: Order) -> Order | None:
        return None if name == lab and order.round >= from_round else order

    return lie


def one_after_the_other(victim: str) -> Lie:
    """In the first round other bounds, from the second on other weights."""
    first, then = one_lab_alone(victim), other_weights(victim)
    return lambda lab, order: first(lab, order) if order.round < 2 else then(lab, order)


def of_another_seed(deal: Callable[..., Any]) -> Callable[..., Any]:
    """A lab deals well-signed shares of seeds that it did not commit to."""

    def dealt(state: LabState, *arguments: Any) -> Any:
        return deal(replace(state, seeds=bytes(len(state.seeds))), *arguments)

    return dealt
