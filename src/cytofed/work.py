"""How much work a plan asks for, and the most that is offered: rounds, steps, epochs, waiting.

A lab and its coordinator agree to a plan's hours as to its price. A plan that asks for a billion
steps is no plan: it is refused where it is checked, before anything is priced or built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cytofed.errors import InputError
from cytofed.plan import Plan
from cytofed.privacy.terms import private_steps

MOST_ROUNDS = 100_000
MOST_STEPS = 10_000_000
"""of one lab over the plan: weeks on a processor"""
MOST_EPOCHS = 100_000.0
_SLOTS, _ATTEMPTS, _ASKED, _SET_UP = 16, 2, 2, 3
"""of secure aggregation: vectors of a set-up, tries of a vector, questions after each and for a
set-up"""


@dataclass(frozen=True)
class Work:
    """What a plan asks of one lab. ``steps_per_round``, ``steps``: None where they follow from the
    lab's own number of images; then ``epochs`` says how often each is seen.

    ``waiting_s``: the longest that all rounds can take, every lab silent until its deadline.
    """

    rounds: int
    steps_per_round: int | None
    steps: int | None
    epochs: float | None
    evaluations: int
    waiting_s: float

    def to_json(self) -> dict[str, Any]:
        return {
            "steps_per_round": self.steps_per_round,
            "steps": self.steps,
            "epochs": self.epochs,
            "evaluations": self.evaluations,
            "waiting_s": self.waiting_s,
        }

    def lines(self) -> list[str]:
        """For people."""
        if self.steps is not None:
            told = f"{self.steps:,} steps at each lab, {self.steps_per_round:,} a round"
        else:
            told = f"{self.epochs:,.4g} epochs over each lab's images"
        if self.evaluations:
            told += f"; {self.evaluations:,} evaluations"
        return [told, f"at most {_duration(self.waiting_s)} if labs let every deadline pass"]


def work_of(plan: Plan) -> Work:
    """What a plan asks for.

    Errors: InputError for more than is offered, with the key to lower.
    """
    train = plan.train
    if train.rounds > MOST_ROUNDS:
        raise InputError(
            f"train.rounds={train.rounds:,}, at most {MOST_ROUNDS:,} are offered",
            hint="train longer in each round",
        )
    per_round = _steps_per_round(plan)
    steps = None if per_round is None else per_round * train.rounds
    if steps is not None and steps > MOST_STEPS:
        raise InputError(
            f"the plan asks for {steps:,} steps at each lab ({train.rounds:,} rounds of "
            f"{per_round:,}), at most {MOST_STEPS:,} are offered",
            hint="lower train.rounds, or what a round trains",
        )
    epochs = None if train.steps_per_round is not None else train.rounds * train.local_epochs
    if epochs is not None and epochs > MOST_EPOCHS:
        raise InputError(
            f"the plan asks for {epochs:,.0f} epochs ({train.rounds:,} rounds of "
            f"{train.local_epochs:,g}), at most {MOST_EPOCHS:,.0f} are offered",
            hint="lower train.rounds or train.local_epochs",
        )
    every = plan.evaluated_every
    evaluations = -(-train.rounds // every) if plan.releases_scores else 0
    waiting_s = _waiting_s(plan, train.rounds + evaluations)
    return Work(train.rounds, per_round, steps, epochs, evaluations, waiting_s)


def _steps_per_round(plan: Plan) -> int | None:
    train = plan.train
    if plan.privacy.unit != "none":
        return private_steps(plan)
    if train.steps_per_round is not None:
        return train.steps_per_round
    if train.steps_per_epoch is not None:
        return max(1, round(train.local_epochs * train.steps_per_epoch))
    return None


def _waiting_s(plan: Plan, vectors: int) -> float:
    """Of so many vectors, one for each round and evaluation."""
    cohort = plan.cohort
    if not plan.secure_aggregation.enabled:
        return vectors * cohort.round_timeout_s
    sets = math.ceil(vectors * _ATTEMPTS / _SLOTS)
    asked = vectors * _ASKED + sets * _SET_UP
    return vectors * _ATTEMPTS * cohort.round_timeout_s + asked * cohort.wait_s


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"
