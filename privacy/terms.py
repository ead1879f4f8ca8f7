"""What a plan's privacy settings come to: steps, noise and price.

Of ``epsilon`` and ``sigma`` a plan gives one; the other follows over all its steps, so every lab
and the coordinator compute the same noise from the same plan. No torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cytofed.errors import InputError
from cytofed.plan import Plan
from cytofed.privacy.accounting import (
    Gaussian,
    Guarantee,
    PlanCost,
    SubsampledGaussian,
    check_delta,
    price,
    sigma_for,
    times,
)
from cytofed.privacy.evaluation import TallyMechanism

DEFAULT_EPSILON = 8.0
"""of a plan that names a unit but neither epsilon nor sigma"""


@dataclass(frozen=True)
class Terms:
    """The subsampled Gaussian mechanism of a plan, the same at every lab.

    ``training``: one round as an event. ``guarantee``: all rounds, training alone.
    ``evaluation``: one release of scores, every ``evaluate_every`` rounds and at the end; None
    where a plan releases none.
    """

    training: SubsampledGaussian
    rounds: int
    delta: float
    max_norm: float
    cells_per_unit: int
    guarantee: Guarantee
    evaluation: Gaussian | None = None
    evaluate_every: int = 1

    @property
    def steps(self) -> int:
        """Steps over the whole plan."""
        return self.training.steps * self.rounds

    def cost(self, declared_patients: int) -> PlanCost:
        """What the plan costs a lab, scores included.

        Errors: InputError unless delta < 1/declared_patients.
        """
        return PlanCost(
            self.delta,
            declared_patients,
            self.rounds,
            self.training,
            self.evaluation,
            self.evaluate_every,
        )

    @property
    def tally(self) -> TallyMechanism | None:
        """How one release of scores is noised."""
        if self.evaluation is None:
            return None
        return TallyMechanism(self.evaluation.sigma, self.cells_per_unit)

    def scores(self) -> Guarantee | None:
        """The price of all scores alone; None where a plan releases none."""
        if self.evaluation is None:
            return None
        return price([times(self.evaluation, self.evaluations)], self.delta)

    def total(self) -> Guarantee:
        """The price of training and scores together."""
        if self.evaluation is None:
            return self.guarantee
        training = times(self.training, self.rounds)
        return price([training, times(self.evaluation, self.evaluations)], self.delta)

    @property
    def evaluations(self) -> int:
        """Releases of scores over the whole plan."""
        return self.cost(declared_patients=1).evaluations

    def to_json(self) -> dict[str, Any]:
        """The object ``privacy`` of ``plan show`` and of summary.json."""
        return {
            "unit": self.training.unit,
            "epsilon": self.guarantee.epsilon,
            "delta": self.delta,
            "sigma": self.training.sigma,
            "sampling_rate": self.training.sampling_rate,
            "steps": self.steps,
            "max_norm": self.max_norm,
            "adversary": self.guarantee.adversary,
            "accountant": self.guarantee.accountant,
            "statement": str(self.guarantee),
        }


def terms_of(plan: Plan) -> Terms | None:
    """The terms of a plan; None where ``privacy.unit`` is ``none``.

    Errors: InputError for an epsilon that no noise reaches, or delta >= 1/declared_patients.
    """
    settings = plan.privacy
    if settings.unit == "none":
        return None
    steps_per_round = private_steps(plan)
    steps = steps_per_round * plan.train.rounds
    sigma = settings.sigma
    if sigma is None:
        target = settings.epsilon or DEFAULT_EPSILON
        sigma = sigma_for(target, settings.delta, settings.sampling_rate, steps)
    training = SubsampledGaussian(settings.unit, settings.sampling_rate, sigma, steps_per_round)
    whole = SubsampledGaussian(settings.unit, settings.sampling_rate, sigma, steps)
    for declared in _declared(plan):
        check_delta(settings.delta, declared)
    scores = plan.evaluation.sigma
    return Terms(
        training=training,
        rounds=plan.train.rounds,
        delta=settings.delta,
        max_norm=settings.max_norm,
        cells_per_unit=settings.cells_per_patient if settings.unit == "patient" else 1,
        guarantee=price([whole], settings.delta),
        evaluation=None if scores is None else Gaussian(settings.unit, scores, 1),
        evaluate_every=plan.evaluated_every,
    )


def private_steps(plan: Plan) -> int:
    """Steps of one round: as given, else ``local_epochs / sampling_rate``, rounded."""
    if plan.train.steps_per_round is not None:
        return plan.train.steps_per_round
    return max(1, math.floor(plan.train.local_epochs / plan.privacy.sampling_rate + 0.5))


def declared_of(plan: Plan, lab: str) -> int | None:
    """The declared number of a lab's patients, None where the plan does not carry it.

    Errors: InputError when the plan lists labs and this one is not among them.
    """
    declared = plan.privacy.declared_patients
    if declared is None or isinstance(declared, int):
        return declared
    if lab not in declared:
        raise InputError(
            f"privacy.declared_patients has no entry for {lab}",
            hint="list every lab of the cohort, or give one number for all",
        )
    return declared[lab]


def _declared(plan: Plan) -> list[int]:
    declared = plan.privacy.declared_patients
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared.values())
