"""What coordinator and labs must agree on to add up updates that nobody may see: the encoding.

Both sides compute it from the plan, the strategy and the order; nothing of it is secret.
"""

from __future__ import annotations

from cytofed.plan import Plan
from cytofed.privacy.encoding import Encoding, Part
from cytofed.strategies.strategy import Strategy

STEPS = ("advertise", "share", "accept", "agree", "reveal")
"""names of the protocol's requests, in their order"""


def encoding_of(
    plan: Plan, strategy: Strategy, *, size: int, labs: int, max_weight: float
) -> Encoding:
    """How an update of P = ``size`` parameters a part becomes ring words.

    Control variates and the like are gradients, not weights: they have a range of their own,
    ``secure_aggregation.control_range``.
    """
    settings = plan.secure_aggregation
    parts = tuple(
        Part(name, size, settings.range if name == "weights" else settings.control_range)
        for name in strategy.lab.up
    )
    return Encoding(parts, settings.bits, labs, max_weight)


def public_bound(weights: list[float]) -> float:
    """The power of two at or above every weight."""
    bound = 1.0
    while bound < max(weights, default=1.0):
        bound *= 2
    return bound
