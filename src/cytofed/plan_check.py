"""Does a plan hold together, and what does it cost a lab?

Used before anything runs: by ``cytofed plan``, by the coordinator when it queues a plan, by the
lab before a person approves it.
"""

from __future__ import annotations

from typing import Any

from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.plan import Plan
from cytofed.strategies import make_strategy


def check_plan(plan: Plan) -> list[str]:
    """Warnings of a plan that can run.

    Errors: InputError for parts that do not fit together or are not offered.
    """
    strategy = make_strategy(plan.strategy)
    load_scheme(plan.labels.scheme)
    warnings = []
    if plan.secure_aggregation.enabled and strategy.needs_single_updates:
        raise InputError(
            f"strategy {strategy.name} needs every single update, and secure aggregation hides them",
            hint="choose a strategy that needs the mean only, or switch secure_aggregation off",
        )
    if plan.privacy.unit != "none" or plan.secure_aggregation.enabled:
        raise InputError(
            "differential privacy and secure aggregation are not available in this version",
            hint="leave privacy.unit at none and secure_aggregation.enabled at false",
        )
    warnings.append(
        "privacy.unit is none: not differentially private, the model may reveal single patients"
    )
    return warnings


def price(plan: Plan) -> dict[str, Any]:
    """What a lab pays over the whole plan: bytes out and in, rounds, privacy. Imports torch."""
    from cytofed import models

    strategy = make_strategy(plan.strategy)
    classes = len(load_scheme(plan.labels.scheme).codes)
    net = models.build(plan.model, classes, seed=0)
    parameters = models.manifest(net, plan.model.trainable).size
    return {
        "rounds": plan.train.rounds,
        "bytes": {
            "parameters": parameters,
            "up_per_lab_round": 4 * parameters * len(strategy.lab.up),
            "down_per_lab_round": 4 * parameters * len(strategy.down),
        },
        "privacy": {
            "unit": plan.privacy.unit,
            "epsilon": None,
            "statement": "none: not differentially private",
        },
    }
