"""What a plan's privacy settings come to: steps, noise and price.

Of ``epsilon`` and ``sigma`` a plan gives one; the other follows over all its steps, so every lab
and the coordinator compute the same noise from the same plan. No torch is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cytofed.errors import InputError
from cytofed.plan import Plan
from cytofed.privacy.accounting import (
    Event,
    Gaussian,
    Guarantee,
    PlanCost,
    SubsampledGaussian,
    check_delta,
    default_delta,
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
    patients: int | None = None
    """of all labs together, where they are known"""
    pseudo: bool = False
    """the patients are made up by a simulation"""

    @property
    def steps(self) -> int:
        """Steps over the whole plan."""
        return self.training.steps * self.rounds

    def cost(self, declared_patients: int) -> PlanCost:
        """What the plan costs a lab, scores included.

        Errors: InputError unless delta <= 1/(2 declared_patients).
        """
        check_delta(self.delta, declared_patients)
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
        return self._price(times(self.evaluation, self.evaluations))

    def total(self) -> Guarantee:
        """The price of training and scores together."""
        if self.evaluation is None:
            return self.guarantee
        training = times(self.training, self.rounds)
        return self._price(training, times(self.evaluation, self.evaluations))

    def _price(self, *events: Event) -> Guarantee:
        return replace(price(events, self.delta), patients=self.patients, pseudo=self.pseudo)

    @property
    def evaluations(self) -> int:
        """Releases of scores over the whole plan."""
        return 0 if self.evaluation is None else math.ceil(self.rounds / self.evaluate_every)

    def to_json(self) -> dict[str, Any]:
        """The object ``privacy`` of ``plan show`` and of summary.json."""
        return {
            "unit": self.training.unit,
            "per": self.guarantee.per,
            "epsilon": self.guarantee.epsilon,
            "delta": self.delta,
            **patients_told(self.guarantee),
            "sigma": self.training.sigma,
            "sampling_rate": self.training.sampling_rate,
            "steps": self.steps,
            "max_norm": self.max_norm,
            "adversary": self.guarantee.adversary,
            "accountant": self.guarantee.accountant,
            "statement": str(self.guarantee),
        }


def patients_told(guarantee: Guarantee) -> dict[str, Any]:
    """Beside a delta: of how many patients, and delta times that; None where it is not known."""
    patients = guarantee.patients
    expected = None if patients is None else guarantee.delta * patients
    return {"patients": patients, "delta_times_patients": expected}


def terms_of(plan: Plan, patients: int | None = None, *, pseudo: bool = False) -> Terms | None:
    """The terms of a plan; None where ``privacy.unit`` is ``none``.

    ``patients``: of all labs together; a plan with one number of patients does not know how many
    labs they are at. ``pseudo``: they are made up by a simulation.

    Errors: InputError for an epsilon that no noise reaches, or delta above 1/(2 N).
    """
    settings = plan.privacy
    if settings.unit == "none":
        return None
    delta = delta_of(plan)
    if at_least := patients or patients_of(plan):
        check_delta(delta, at_least)
    if isinstance(settings.declared_patients, Mapping):
        patients = patients or at_least
    steps_per_round = private_steps(plan)
    steps = steps_per_round * plan.train.rounds
    sigma = settings.sigma
    if sigma is None:
        target = settings.epsilon or DEFAULT_EPSILON
        sigma = sigma_for(target, delta, settings.sampling_rate, steps)
    training = SubsampledGaussian(settings.unit, settings.sampling_rate, sigma, steps_per_round)
    whole = SubsampledGaussian(settings.unit, settings.sampling_rate, sigma, steps)
    scores = plan.evaluation.sigma
    return Terms(
        training=training,
        rounds=plan.train.rounds,
        delta=delta,
        max_norm=settings.max_norm,
        cells_per_unit=settings.cells_per_patient if settings.unit == "patient" else 1,
        guarantee=replace(price([whole], delta), patients=patients, pseudo=pseudo),
        evaluation=None if scores is None else Gaussian(settings.unit, scores, 1),
        evaluate_every=plan.evaluated_every,
        patients=patients,
        pseudo=pseudo,
    )


def patients_of(plan: Plan, labs: int = 1) -> int | None:
    """Patients of all labs together, as a plan declares them; None where it does not.

    A map names all labs that can take part; one number is that of each of ``labs``.
    """
    declared = plan.privacy.declared_patients
    if declared is None:
        return None
    return declared * labs if isinstance(declared, int) else sum(declared.values())


def delta_of(plan: Plan) -> float:
    """The plan's delta, or what it would be over the patients that it declares itself."""
    if plan.privacy.delta is not None:
        return plan.privacy.delta
    return default_delta(patients_of(plan) or 1)


def with_delta(plan: Plan, patients: int) -> Plan:
    """The plan as it is run: a private one with its delta as a number.

    ``patients``: of all labs together. Done before a plan is hashed for anybody.
    Errors: InputError for a delta above 1/(2 N).
    """
    if plan.privacy.unit == "none":
        return plan
    delta = plan.privacy.delta
    if delta is None:
        delta = default_delta(patients)
    check_delta(delta, patients)
    return replace(plan, privacy=replace(plan.privacy, delta=delta))


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
