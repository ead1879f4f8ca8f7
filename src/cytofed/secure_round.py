"""What coordinator and labs must agree on to add up what nobody may see.

Encoding, numbering, weights: both sides compute them from the plan, the strategy and what each lab
has signed; nothing of it is secret. Updates are fixed point; a tally is whole numbers, which come
out of the sum exactly.

Shapes: P parameters, C classes, D numbers of a tally, L limbs (2 D), W words (L + 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from cytofed.documents import Decision
from cytofed.errors import VerificationError
from cytofed.messages import MAX_WEIGHT, Kind
from cytofed.metrics import Tally
from cytofed.plan import Plan
from cytofed.privacy.encoding import Encoding, Part, decode
from cytofed.privacy.masks import Words
from cytofed.privacy.terms import declared_of
from cytofed.strategies.strategy import Strategy

STEPS = ("advertise", "share", "accept", "open", "agree", "reveal", "convict")
"""names of the protocol's requests, in their order"""

_LIMB = 1 << 20
"""A number n is sent as n // LIMB and n % LIMB: with 40 labs a word has 26 bits for one of them."""


def protocol_round(kind: Kind, round_: int) -> int:
    """The protocol's number of an order: labs sign one set of survivors for each.

    A round's evaluation comes after its training, and numbers only rise: after it the round is
    not trained again.
    """
    return 2 * round_ + (kind == "evaluate")


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


def public_bound(weights: Iterable[float]) -> float:
    """The power of two at or above every weight."""
    bound, most = 1.0, max(weights, default=1.0)
    while bound < most:
        bound *= 2
    return bound


def check_weight(decision: Decision, plan: Plan, *, labs: int) -> None:
    """Whether a lab of ``labs`` may weigh what it signed: of a private plan the patients that the
    plan declares for it, else a number of images that leaves room for the others.

    Errors: VerificationError with the lab's name.
    """
    told = decision.max_weight
    if plan.privacy.unit != "none":
        declared = declared_of(plan, decision.lab)
        if declared is not None and told != declared:  # guard: declared-weight
            raise VerificationError(
                f"{decision.lab} approved with a weight of {told}, the plan declares {declared} "
                "patients for it",
                hint="set patients_declared in its client.yaml to the plan's figure",
            )
    most = int(MAX_WEIGHT) // labs
    if not 1 <= told <= most:  # guard: absurd-weight
        raise VerificationError(
            f"{decision.lab} approved with a weight of {told}, expected 1 to {most}: it would "
            "decide the model alone",
            hint="leave that lab out",
        )


def weight_bounds(decisions: Mapping[str, Decision], plan: Plan) -> dict[str, float]:
    """What each lab of a cohort may weigh in a secure sum, from what each has signed.

    Errors: VerificationError as ``check_weight``.
    """
    for decision in decisions.values():
        check_weight(decision, plan, labs=len(decisions))
    return at_most_half({lab: float(d.max_weight) for lab, d in decisions.items()})


def at_most_half(weights: Mapping[str, float]) -> dict[str, float]:
    """Each lab's weight, none above all others together: nobody sees what a lab weighs in a sum."""
    total = sum(weights.values())
    return {lab: min(weight, total - weight) for lab, weight in weights.items()}


def tally_encoding(classes: int, *, labs: int) -> Encoding:
    """How the limbs of a tally become ring words: a step of 1, so rounding changes nothing.

    Always of 32 bits, whatever the plan says for updates: a tally is small.
    """
    size = 2 * Tally.empty(classes).vector_D.size
    top = Encoding((Part("tally", size, 1.0),), 32, labs).top
    return Encoding((Part("tally", size, float(top)),), 32, labs)


def tally_limbs(tally: Tally) -> npt.NDArray[np.float64]:
    """The numbers of a tally in two limbs each, (L,); the lower one is never negative."""
    high_D, low_D = np.divmod(tally.vector_D, _LIMB)
    return np.concatenate([high_D, low_D]).astype(np.float64)


def tally_of_sum(sum_W: Words, encoding: Encoding, *, count: int, classes: int) -> Tally:
    """The sum of ``count`` labs' tallies, exactly. Errors: SumError as ``encoding.decode``."""
    mean_L = decode(sum_W, encoding, count=count).mean_P
    high_D, low_D = np.split(np.rint(mean_L * count).astype(np.int64), 2)
    return Tally.from_vector(high_D * _LIMB + low_D, classes)
