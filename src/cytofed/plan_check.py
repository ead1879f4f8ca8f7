"""Does a plan hold together, and what does it cost a lab?

Used before anything runs: by ``cytofed plan``, by the coordinator when it queues a plan, by the
lab before a person approves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cytofed.encoder import Given, card_of, check_start, start_file
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.lineage import start_warnings
from cytofed.plan import Plan
from cytofed.privacy.accounting import Guarantee, shown
from cytofed.privacy.secagg import check_rules
from cytofed.privacy.terms import Terms, delta_of, patients_of, patients_told, terms_of
from cytofed.strategies import make_strategy
from cytofed.work import work_of


def check_plan(plan: Plan) -> list[str]:
    """Warnings of a plan that can run.

    Errors: InputError for parts that do not fit together or are not offered.
    """
    work_of(plan)
    strategy = make_strategy(plan.strategy)
    check_start(plan.model.start, arch=plan.model.arch, width=plan.model.width)
    _check_prior(plan)
    if plan.secure_aggregation.enabled and strategy.needs_single_updates:
        raise InputError(
            f"strategy {strategy.name} needs single updates, and secure aggregation hides them",
            hint="choose a strategy that needs the mean only, or switch secure_aggregation off",
        )
    settings, labs = plan.secure_aggregation, plan.simulation.labs
    if settings.enabled and labs is not None:
        check_rules(labs, threshold=settings.threshold, min_cohort=settings.min_cohort)
    if settings.enabled and plan.evaluation.per_lab:
        raise InputError(
            "evaluation.per_lab tells scores of single labs, which secure aggregation hides",
            hint="leave evaluation.per_lab out, or switch secure_aggregation off",
        )
    _check_scores(plan)
    warnings = []
    if "momentum" in strategy.lab.up and (
        plan.train.optimizer != "sgd" or plan.train.momentum == 0
    ):
        raise InputError(
            f"strategy {strategy.name} shares momentum, and train.optimizer="
            f"{plan.train.optimizer} with train.momentum={plan.train.momentum:g} has none to share",
            hint="set train.optimizer=sgd and train.momentum=0.9, or strategy.name=fedavg",
        )
    if "control" in strategy.lab.up and plan.train.optimizer != "sgd":
        warnings.append(
            f"strategy {strategy.name} takes local paths for sums of gradients: that holds with "
            f"train.optimizer=sgd, not with {plan.train.optimizer}"
        )
    if plan.privacy.unit == "none":
        _refuse_noise_for_nobody(plan)
        warnings.append(
            "privacy.unit is none: not differentially private, the model may reveal a patient"
        )
        if settings.enabled:
            warnings.append(
                "secure_aggregation hides whose an update is, not what it is made of: a round's "
                f"sum over fewer than about {FEW_IMAGES:,} images may show some of them, a larger "
                "one a single image; noise hides them: set privacy.unit=patient"
            )
        return warnings
    return [*warnings, *_check_private(plan)]


def _check_prior(plan: Plan) -> None:
    """A prior names classes of the scheme, and is used."""
    codes, prior = load_scheme(plan.labels.scheme).codes, plan.train.class_prior
    if not prior:
        return
    unknown = sorted(set(prior) - set(codes))
    if unknown:
        raise InputError(
            f"train.class_prior names {unknown[0]!r}, which label scheme {plan.labels.scheme} "
            "does not have",
            hint=f"its codes: {', '.join(codes)}",
        )
    if plan.train.balance != "logits":
        raise InputError(
            f"train.class_prior is given, and train.balance is {plan.train.balance}: nothing "
            "would use it",
            hint="set train.balance=logits, or leave train.class_prior out",
        )


def _check_scores(plan: Plan) -> None:
    """Noise on scores has a unit that it protects, and images to score."""
    sigma = plan.evaluation.sigma
    if sigma is None:
        return
    if plan.privacy.unit == "none":
        raise InputError(
            f"evaluation.sigma is {sigma:g}, and privacy.unit is none: noise protects a patient, "
            "and without a unit nobody",
            hint="set privacy.unit=patient, or leave evaluation.sigma out",
        )
    if plan.evaluation.fraction == 0:
        raise InputError(
            f"evaluation.sigma is {sigma:g}, and evaluation.fraction is 0: no image to score",
            hint="raise evaluation.fraction, or leave evaluation.sigma out",
        )


def _refuse_noise_for_nobody(plan: Plan) -> None:
    """An epsilon or sigma without a unit is a privacy that was meant and would not be there."""
    for key in ("epsilon", "sigma"):
        value = getattr(plan.privacy, key)
        if value is not None:
            raise InputError(
                f"privacy.{key} is {value:g}, and privacy.unit is none: no noise would be added",
                hint=f"set privacy.unit=patient, or privacy.{key}=null to train without privacy",
            )


def _check_private(plan: Plan) -> list[str]:
    """What must not depend on data under differential privacy (design: privacy)."""
    public = plan.train.balance == "logits" and plan.train.class_prior
    if plan.train.balance != "none" and not public:
        raise InputError(
            f"train.balance is {plan.train.balance}: it takes class counts from private images, so "
            "one patient's gradient would depend on another",
            hint="set train.balance=none, or train.balance=logits with a public train.class_prior",
        )
    if plan.evaluation.calibration > 0:
        raise InputError(
            f"evaluation.calibration is {plan.evaluation.calibration:g}: a temperature is fitted "
            "to private images, and no noise covers that",
            hint="set evaluation.calibration=0",
        )
    if plan.evaluation.per_lab:
        raise InputError(
            "evaluation.per_lab tells scores of single labs, which differential privacy does not "
            "cover",
            hint="leave evaluation.per_lab out",
        )
    terms = terms_of(plan)
    assert terms is not None
    warnings = _costly_ways(plan, terms)
    start = plan.model.start
    given = Given.named(start) is not None  # its card comes with it
    if start != "random" and not given and card_of(start_file(start)) is None:
        warnings.append(
            f"model.start {start} has no card: nobody can tell which patients it has seen already"
        )
    warnings += start_warnings(plan, deployed=True)
    if plan.privacy.unit == "image":
        warnings.append("privacy.unit is image: the guarantee is for one image; a patient has many")
    if plan.privacy.declared_patients is None:
        warnings.append(
            "privacy.declared_patients is not set: a simulation counts, a deployment stops"
        )
    if plan.evaluation.sigma is None:
        warnings.append(
            "evaluation.sigma is not set: a deployment tells no scores, a simulation exact ones"
        )
    return warnings


FEW_IMAGES = 500
"""in a sum without noise: fewer of them give away a larger share (docs/research.md)"""
FEW_PATIENTS = 100
"""below it a lab's noise is large, and sampling makes it larger"""


STEP_IMAGES = 52
"""of all labs together: a step of the ``marrow`` plan where its rate was chosen"""
LARGE_STEP = 128
"""images; steps of 167 cost two labs .027 of macro F1 (docs/results.md, ``sources``)"""


def large_steps(plan: Plan, images: int) -> list[str]:
    """Whether a federation of so many training images takes fewer steps than it could learn from.

    A plan that says steps an epoch was made for some number of images, and nobody knows another
    before the labs are there.
    """
    train = plan.train
    steps = train.steps_per_epoch
    if plan.privacy.unit != "none" or steps is None or images <= LARGE_STEP * steps:
        return []
    suited = round(images / STEP_IMAGES)
    more = suited / steps
    told = f"train.steps_per_epoch={suited} train.rounds={round(train.rounds * more)}"
    if train.steps_per_round is None:
        told += f" train.local_epochs={train.local_epochs / more:.3g}"
    return [
        f"train.steps_per_epoch is {steps}: of {images:,} training images over all labs a step "
        f"sees {images // steps}, and few steps learn less; as long a training in steps of "
        f"{STEP_IMAGES}: {told}"
    ]


def _costly_ways(plan: Plan, terms: Terms) -> list[str]:
    """Settings that are private and learn little for their epsilon, each with the way out."""
    found = []
    train, model, privacy = plan.train, plan.model, plan.privacy
    if train.optimizer == "adamw":
        found.append(
            "train.optimizer is adamw: it scales noise to steps of full length, and learns little; "
            "set train.optimizer=sgd train.lr=0.3 train.warmup=0"
        )
    if model.start == "random" and model.trainable == "all":
        found.append(
            "all weights are trained from random ones, and each takes its noise: a linear head on "
            "an encoder of public images (`cytofed pretrain`) learns far more; set "
            "model.arch=encoder+head model.start=FILE model.trainable=head"
        )
    declared = privacy.declared_patients
    counts = list(declared.values()) if isinstance(declared, Mapping) else [declared or math.inf]
    if privacy.sampling_rate < 1 and min(counts) < FEW_PATIENTS:
        found.append(
            f"privacy.sampling_rate is {privacy.sampling_rate:g} with {min(counts)} declared "
            f"patients: a step sees about {privacy.sampling_rate * min(counts):.0f}, and the noise "
            "of a step is shared by no more; set privacy.sampling_rate=1"
        )
    scores, total = terms.scores(), terms.total()
    if scores is not None and total.epsilon > 1.25 * terms.guarantee.epsilon:
        found.append(
            f"scores raise epsilon from {shown(terms.guarantee.epsilon)} to {shown(total.epsilon)} "
            f"({total.unit}, delta {total.delta:g}, {total.adversary}): raise evaluation.sigma (it "
            f"is {plan.evaluation.sigma:g}) or evaluation.every (it is {plan.evaluated_every})"
        )
    return found


def price(plan: Plan) -> dict[str, Any]:
    """What a lab pays over the whole plan: bytes out and in, rounds, privacy. Imports torch.

    ``privacy`` is training alone, ``evaluation`` its scores alone (None where none are told),
    ``total`` both.
    """
    from cytofed import models

    strategy = make_strategy(plan.strategy)
    classes = len(load_scheme(plan.labels.scheme).codes)
    net = models.build(plan.model, classes, seed=0)
    parameters = models.manifest(net, plan.model.trainable).size
    return {
        "rounds": plan.train.rounds,
        "work": work_of(plan).to_json(),
        "bytes": {
            "parameters": parameters,
            "up_per_lab_round": 4 * parameters * len(strategy.lab.up),
            "down_per_lab_round": 4 * parameters * len(strategy.down),
        },
        "privacy": privacy_price(plan),
        **score_prices(plan),
    }


def privacy_price(
    plan: Plan, patients: int | None = None, *, pseudo: bool = False
) -> dict[str, Any]:
    """The privacy terms of a plan, training alone: epsilon never without unit and adversary.

    ``patients``: of all labs together, where the plan does not say it. ``pseudo``: made up.
    """
    terms = terms_of(plan, patients, pseudo=pseudo)
    if terms is None:
        return {
            "unit": "none",
            "epsilon": None,
            "statement": "none: not differentially private",
        }
    return terms.to_json()


def delta_told(plan: Plan) -> str:
    """Where a private plan's delta comes from; empty without privacy.

    A plan does not know its labs where one number of patients stands for each of them.
    """
    if plan.privacy.unit == "none":
        return ""
    patients, declared = patients_of(plan), plan.privacy.declared_patients
    if patients is None:
        known = "no number of patients is declared here: a run counts those of all its labs"
    elif isinstance(declared, int):
        known = f"N is {patients:,} for one lab, and that for each lab of a run"
    else:
        known = f"N is {patients:,}, of {len(declared or {})} labs"
    if plan.privacy.delta is None:
        return f"delta    {delta_of(plan):g} by the rule min(1e-5, 1/(10 N)); {known}"
    return f"delta    {plan.privacy.delta:g} as the plan says, at most 1/(2 N); {known}"


def score_prices(
    plan: Plan, patients: int | None = None, *, pseudo: bool = False
) -> dict[str, Any]:
    """``evaluation`` and ``total`` of a plan's price; None without differential privacy.

    ``evaluation.releases`` are the evaluations over the plan, each a Gaussian mechanism.
    """
    terms = terms_of(plan, patients, pseudo=pseudo)
    if terms is None:
        return {"evaluation": None, "total": None}
    scores, evaluation = terms.scores(), None
    if scores is not None:
        evaluation = {
            **_guarantee(scores),
            "sigma": plan.evaluation.sigma,
            "releases": terms.evaluations,
        }
    return {"evaluation": evaluation, "total": _guarantee(terms.total())}


def _guarantee(found: Guarantee) -> dict[str, Any]:
    return {
        "unit": found.unit,
        "per": found.per,
        "epsilon": found.epsilon,
        "delta": found.delta,
        **patients_told(found),
        "adversary": found.adversary,
        "accountant": found.accountant,
        "statement": str(found),
    }
