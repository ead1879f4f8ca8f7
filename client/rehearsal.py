"""A rehearsal: made-up patients at a lab of its own, real orders, and the plan's own arithmetic.

Self-checks that call a function see what is wrong below it. Here an approved plan goes in at one
end and a sealed answer comes out at the other, and between them is all that a lab does with an
order: its folder of images, its split, its ledger, its training. What is expected is computed here,
from the plan's numbers alone; no function that is looked at has a part in it.

* with and without one patient, and the same randomness, an update moves by at most
  max_norm x rate of learning / denominator, and scores by at most the root of the cells a patient;
* what one patient adds is the same whoever else is there;
* patients without a gradient leave the noise of all steps, no more and no less, and so do
  gradients that are not finite;
* patients are drawn independently, at the plan's rate;
* no two releases have the same noise: not two labs', two rounds', nor one lab's after a restart;
* what stands beside the vectors says nothing about anybody.

Each check has a false alarm in less than one of 10^9 rehearsals.

Shapes: P parameters, R releases, U patients, D orders.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # scipy.stats takes a second to import

from cytofed.arrays import Float32
from cytofed.client.made_up import SCHEME, UNLABELLED, MadeUp, MadeUpLab, Patient, made_up
from cytofed.errors import VerificationError
from cytofed.files import write_atomically
from cytofed.messages import Order, Update
from cytofed.plan import Plan, from_dict
from cytofed.privacy.noise import Randomness, RepeatedRandomness, SimulatedRandomness

Floats = npt.NDArray[np.float64]

SIGMA = 1.3
SAMPLING_RATE = 0.25
_DECLARED = 10
_CLIPPED = 0.1
"""max_norm that every made-up gradient is longer than"""
_UNCLIPPED = 1e3
"""max_norm that none reaches"""
_ROUNDS = 400
_RAREST = 1e-10
"""the chance of what is taken for no chance"""
_CELLS = 16
_NOISES = 1000
"""that are kept to be known again"""
_AT_ONCE = 25
"""orders of a lab: a long ledger takes long to read"""
_EXPECTED = 100
"""patients drawn: of fewer, a rate that is too high can't be told from chance"""
_MOST_TWINS = 10
"""equal numbers among 1,500 of noise in float32: one is rare"""

NOBODY = Patient("nobody", UNLABELLED, 2)
PATIENTS = (
    Patient("a", "basophil", 1),
    Patient("b", "eosinophil", 2),
    Patient("c", "lymphocyte", 3),
    Patient("d", "monocyte", 5),
    Patient("e", "platelet", 9),
)
"""of different sizes, so that what is divided by everybody's mean shows"""


@dataclass(frozen=True)
class Rehearsed:
    """What was seen; every value has passed."""

    orders: int
    sensitivity: float
    """largest change of an update by one patient, over what the plan promises"""
    noise_ratio: float
    """standard deviation of the noise over what the plan promises"""
    correlation: float
    """largest absolute correlation between two releases' noise"""
    drawn: float
    """patients drawn over those expected"""
    noises: tuple[str, ...]
    """SHA-256 of each release of noise alone: another process never has the same"""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.orders} orders: sensitivity {self.sensitivity:.3f} of what the plan says, "
            f"noise {self.noise_ratio:.3f}, largest correlation {self.correlation:.3f}, drawn "
            f"{self.drawn:.2f}, in {self.seconds:.1f} s"
        )


def rehearse(
    *,
    quick: bool = False,
    sigma: float = SIGMA,
    sampling_rate: float = SAMPLING_RATE,
    stopping: threading.Event | None = None,
) -> Rehearsed:
    """All of the above, for plans with this noise and rate; ``quick``: fewer orders and variants.

    Nothing of it touches the lab's own records, ledger or cache.
    Errors: VerificationError naming what does not hold; Stopped once ``stopping`` is set.
    """
    from cytofed.client.training import steady

    started_s = time.perf_counter()
    with steady(1), made_up(declared=_DECLARED, stopping=stopping) as world:
        largest = _check_sensitivity(world, sigma, quick=quick)
        ratio, correlation, noises = _check_noise(world, sigma, sampling_rate, quick=quick)
        _check_non_finite(world, sigma)
        drawn = _check_sampling(world, sampling_rate, steps=16, orders=10)
        if not quick:
            drawn = _check_sampling(world, sampling_rate, steps=1, orders=200)
        _check_scores(world, quick=quick)
        orders = world.orders
    return Rehearsed(
        orders, largest, ratio, correlation, drawn, noises, time.perf_counter() - started_s
    )


def refuse_known_noise(file: Path, noises: Sequence[str]) -> None:
    """Keep ``noises`` in ``file``, beside those of rehearsals before.

    Errors: VerificationError where one of them was seen before: production noise has a seed.
    """
    known = file.read_text().split() if file.is_file() else []
    if not set(noises).isdisjoint(known):
        raise VerificationError(
            "rehearsal: an earlier process had the same noise: whoever has that can subtract it"
        )
    write_atomically(file, "\n".join([*known, *noises][-_NOISES:]) + "\n", mode=0o600)


# --- the plans, and what they promise


def _plan(
    name: str,
    *,
    trainable: str = "all",
    steps: int = 1,
    sigma: float = SIGMA,
    max_norm: float = _CLIPPED,
    sampling_rate: float = 1.0,
    momentum: float = 0.0,
    strategy: str = "fedavg",
    augment: bool = False,
    lr: float = 0.05,
    drift: float | None = None,
    scores: float | None = None,
) -> Plan:
    still = {"flip": False, "rotate": False, "shift": 0.0, "scale": 0.0, "stain": 0.0}
    return from_dict(
        {
            "name": name,
            "labels": {"scheme": SCHEME, "scale": {"size_px": 16, "field_um": 20.0}},
            "model": {"arch": "cytonet", "width": 8, "trainable": trainable},
            "train": {
                "rounds": _ROUNDS,
                "steps_per_round": steps,
                "optimizer": "sgd",
                "lr": lr,
                "momentum": momentum,
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup": 0.0,
                "precision": "float32",
                "device": "cpu",
                "augment": {} if augment else still,
            },
            "strategy": {"name": strategy},
            "privacy": {
                "unit": "patient",
                "sigma": sigma,
                "delta": 1e-5,
                "max_norm": max_norm,
                "sampling_rate": sampling_rate,
                "cells_per_patient": _CELLS,
                "declared_patients": _DECLARED,
                "noise_drift": drift,
            },
            "evaluation": {
                "fraction": 0.0 if scores is None else 0.5,
                "every": 1,
                "sigma": scores,
            },
        },
        source="rehearsal",
    )


def _pulls(plan: Plan) -> list[float]:
    """How far each step's gradient of 1 moves the weights by the end of a round.

    Plain SGD with Nesterov's momentum m from rest: a gradient is taken once at once, and m^j times
    in the j-th step from its own on.
    """
    train, privacy = plan.train, plan.privacy
    steps, rate = train.steps_per_round or 1, train.lr
    if privacy.noise_drift is not None:
        assert privacy.sigma is not None
        unit = privacy.sigma * privacy.max_norm / _denominator(plan)
        rate = privacy.noise_drift / (unit * math.sqrt(steps * train.rounds))
    return [
        rate * (1 + sum(train.momentum**j for j in range(1, steps - step + 1)))
        for step in range(steps)
    ]


def _denominator(plan: Plan) -> float:
    return plan.privacy.sampling_rate * _DECLARED


def most_moved(plan: Plan) -> float:
    """By how much one patient may move an update, in L2."""
    return sum(_pulls(plan)) * plan.privacy.max_norm / _denominator(plan)


def noise_sd(plan: Plan) -> float:
    """Standard deviation of the noise on each coordinate of an update."""
    assert plan.privacy.sigma is not None
    once = plan.privacy.sigma * plan.privacy.max_norm / _denominator(plan)
    return once * math.hypot(*_pulls(plan))


# --- one patient more or less


def _check_sensitivity(world: MadeUp, sigma: float, *, quick: bool) -> float:
    removed = PATIENTS[-1:] if quick else PATIENTS[-2:]
    labs = _Variants(world)
    largest = 0.0
    for plan in _sensitivity_plans(sigma, quick=quick):
        weights_P = _all_layers_learn(world, plan)
        none = labs.update(plan, (NOBODY,), weights_P)
        for patient in removed:
            at = PATIENTS.index(patient)
            everyone = labs.update(plan, PATIENTS[: at + 1], weights_P)
            rest = labs.update(plan, PATIENTS[:at], weights_P)
            alone = labs.update(plan, (patient,), weights_P)
            length = float(np.linalg.norm(weights_P))
            found = _one_patient(plan, length, everyone, rest, alone, none)
            largest = max(largest, found)
    return largest


def _sensitivity_plans(sigma: float, *, quick: bool) -> Sequence[Plan]:
    """Whole nets and heads; gradients that are clipped, and gradients that are not."""
    # Little noise where it would drown what is not clipped in its rounding.
    unclipped: dict[str, Any] = {"max_norm": _UNCLIPPED, "sigma": 1e-4}
    few = (
        _plan("whole clipped", sigma=sigma, strategy="scaffold"),
        _plan("whole not clipped", **unclipped),
        _plan("head clipped", trainable="head", sigma=sigma, momentum=0.9, strategy="fednag"),
        _plan("head not clipped", trainable="head", **unclipped),
    )
    if quick:
        return few
    more = (
        _plan("whole 3 steps", sigma=sigma, steps=3, momentum=0.9),
        _plan("head 3 steps", trainable="head", sigma=sigma, steps=3, drift=0.01),
        _plan("whole augmented", sigma=sigma, augment=True),
        _plan("own layers", sigma=sigma, strategy="local_norms"),
    )
    return (*few, *more)


class _Variants:
    """Labs with one set of patients each, and the same randomness in all of them."""

    def __init__(self, world: MadeUp) -> None:
        self._world = world
        self._labs: dict[tuple[Patient, ...], MadeUpLab] = {}

    def lab(self, patients: tuple[Patient, ...]) -> MadeUpLab:
        if patients not in self._labs:
            self._labs[patients] = self._world.lab(patients, randomness=_repeated)
        return self._labs[patients]

    def update(
        self, plan: Plan, patients: tuple[Patient, ...], weights_P: Float32
    ) -> Mapping[str, Floats]:
        return _parts(self.lab(patients).train(plan, 2, weights=weights_P))


def _all_layers_learn(world: MadeUp, plan: Plan) -> Float32:
    """Start weights with a head that is not zero: below one that is, no gradient comes."""
    start = world.start(plan)
    weights_P = start.weights_P
    head_CF = start.manifest.split(weights_P)["head.weight"]
    head_CF += 0.05 * SimulatedRandomness(0, "rehearsal").normals(head_CF.size).reshape(
        head_CF.shape
    )
    return weights_P


def _repeated(order: Order) -> Randomness:
    return RepeatedRandomness(order.kind, order.round)


def _parts(update: Update) -> dict[str, Floats]:
    return {name: np.asarray(part, np.float64) for name, part in update.parts.items()}


def _one_patient(
    plan: Plan,
    weights: float,
    everyone: Mapping[str, Floats],
    rest: Mapping[str, Floats],
    alone: Mapping[str, Floats],
    none: Mapping[str, Floats],
) -> float:
    """The largest change by one patient, as a share of what the plan promises.

    ``weights``: norm of the weights that the update is the difference of. Errors:
    VerificationError.
    """
    steps = len(_pulls(plan))
    most = most_moved(plan)
    scale = {"weights": 1.0, "control": 1 / sum(_pulls(plan)), "momentum": 1 / _pulls(plan)[0]}
    clipped = plan.privacy.max_norm == _CLIPPED
    found = 0.0
    for name, all_P in everyone.items():
        bound = most * scale[name]
        # float32 rounds the noise that cancels, and weights before and after.
        rounding = 2e-7 * float(np.linalg.norm(all_P)) + 1.2e-7 * scale[name] * weights
        change_P = all_P - rest[name]
        change = float(np.linalg.norm(change_P))
        # Steps after the first start from other weights: others' gradients move a little too.
        if not change <= bound * (1.001 if steps == 1 else 1.05) + rounding:
            raise VerificationError(
                f"rehearsal ({plan.name}): one patient moves {name} of an update by {change:.4g}, "
                f"the plan's price is for {bound:.4g}"
            )
        apart_P = change_P - (alone[name] - none[name])
        unit = bound if clipped else change
        alike = steps == 1 and not plan.train.augment.flip  # else others take other steps or forms
        if alike and not np.linalg.norm(apart_P) <= 2e-3 * unit + 2 * rounding:
            raise VerificationError(
                f"rehearsal ({plan.name}): what a patient adds to {name} of an update depends on "
                f"the others (by {float(np.linalg.norm(apart_P)):.4g} of {change:.4g})"
            )
        if clipped and not change >= bound / 2:
            raise VerificationError(
                f"rehearsal ({plan.name}): a patient who moves {name} by {bound:.4g} moved it by "
                f"{change:.4g}: nothing was seen, so nothing was shown"
            )
        found = max(found, change / bound)
    _check_derived(plan, everyone)
    return found


def _check_derived(plan: Plan, update: Mapping[str, Floats]) -> None:
    """What travels beside the weights follows from the noised weights alone.

    SCAFFOLD's control (option II, from zeros): minus the update over the way that a gradient of 1
    takes it. FedNAG's momentum after one step from rest: the gradient, so the same.
    """
    for name, part_P in update.items():
        if name == "weights":
            continue
        wanted_P = -update["weights"] / (sum(_pulls(plan)))
        apart = float(np.linalg.norm(part_P - wanted_P))
        if not apart <= 2e-3 * float(np.linalg.norm(wanted_P)):
            raise VerificationError(
                f"rehearsal ({plan.name}): {name} of an update is not what the noised weights say "
                f"(by {apart:.4g} of {float(np.linalg.norm(wanted_P)):.4g})"
            )


# --- noise


def _check_noise(
    world: MadeUp, sigma: float, sampling_rate: float, *, quick: bool
) -> tuple[float, float, tuple[str, ...]]:
    """Labs whose patients have no gradient: two, two rounds each, and one that was restarted."""
    few: dict[str, Any] = {"steps": 3, "sigma": sigma, "sampling_rate": sampling_rate}
    plans = [
        _plan("noise whole", **{**few, "steps": 1}),
        _plan("noise head", trainable="head", momentum=0.9, max_norm=0.7, **few),
    ]
    if not quick:
        plans.append(_plan("noise drift", drift=0.05, **few))
    patients = NOBODY, replace(NOBODY, name="no one", cells=5)
    labs = [world.lab(patients, name=name) for name in ("lab-1", "lab-2")]
    for plan in plans:
        labs[0].approve(plan)
    again = world.restarted(labs[0])
    ratios, correlations, noises = [], [], []
    for plan in plans:
        rounds = 2 if quick else 4
        updates = [lab.train(plan, round_) for lab in labs for round_ in range(1, rounds + 1)]
        updates.append(again.train(plan, 1))
        _check_retry(labs[1], plan, rounds, updates[-2])
        for update in updates:
            _check_header(update)
        releases_RP = np.array([update.parts["weights"] for update in updates], np.float64)
        ratio, correlation = _only_noise(releases_RP, noise_sd(plan), plan.name)
        if plan.train.steps_per_round == 1:
            _check_twins(releases_RP[:, world.start(plan).weights_P == 0], plan.name)
        ratios.append(ratio)
        correlations.append(correlation)
        noises += [hashlib.sha256(release.tobytes()).hexdigest() for release in releases_RP]
    return min(ratios), max(correlations), tuple(noises)


def _only_noise(releases_RP: Floats, sd: float, what: str) -> tuple[float, float]:
    from cytofed.privacy.gradients import Mechanism
    from cytofed.privacy.selfcheck import check_noise

    try:
        return check_noise(releases_RP / sd, Mechanism(1.0, 1.0, 1.0, 1))
    except VerificationError as error:
        raise VerificationError(f"rehearsal ({what}): {error.message}") from None


def _check_retry(lab: MadeUpLab, plan: Plan, round_: int, before: Update) -> None:
    """A round that is asked for again gets the same update: other noise would be another price."""
    again = lab.train(plan, round_)
    for name, part_P in before.parts.items():
        if not np.array_equal(part_P, again.parts[name]):
            raise VerificationError(
                f"rehearsal ({plan.name}): a second attempt at a round has another update; one "
                "was paid for"
            )


def _check_twins(releases_RW: Floats, what: str) -> None:
    """Weights that start at 0 take the noise as it is: numbers of few digits would repeat."""
    _, counts = np.unique(np.abs(releases_RW), return_counts=True)
    twins = int((counts - 1).sum())
    if not twins <= _MOST_TWINS:
        raise VerificationError(
            f"rehearsal ({what}): of {releases_RW.size} numbers of noise {twins} are repeated: "
            "it has too few digits to hide anything in"
        )


def _check_header(update: Update) -> None:
    told = (update.weight, update.train_s, math.isnan(update.loss))
    if told != (_DECLARED, 0.0, True):
        raise VerificationError(
            f"rehearsal: beside the update stand weight {update.weight:g}, loss {update.loss:g} "
            f"and {update.train_s:g} s; of a private round only the declared {_DECLARED} patients"
        )


def _check_non_finite(world: MadeUp, sigma: float) -> None:
    """Weights for which no gradient is finite: what is left is the noise."""
    lab = world.lab(PATIENTS)
    for trainable in ("all", "head"):
        plan = _plan(f"not finite {trainable}", trainable=trainable, sigma=sigma)
        start = world.start(plan)
        weights_P = start.weights_P
        start.manifest.split(weights_P)["head.weight"][0] = np.float32(3e38)
        updates = [lab.train(plan, round_, weights=weights_P) for round_ in (2, 3)]
        releases_RP = np.array([update.parts["weights"] for update in updates], np.float64)
        if not np.isfinite(releases_RP).all():
            raise VerificationError(
                f"rehearsal ({plan.name}): gradients that are not finite reach the update"
            )
        small_P = np.abs(weights_P) < 1e6  # the others are too large to take noise
        _only_noise(releases_RP[:, small_P], noise_sd(plan), plan.name)


# --- who is drawn


def _check_sampling(world: MadeUp, sampling_rate: float, *, steps: int, orders: int) -> float:
    """Patients drawn over those expected. Who was is read off updates with next to no noise."""
    patients = PATIENTS[2:]
    rarer = min(sampling_rate, 1 - sampling_rate) or 1.0
    steps = max(steps, min(64, math.ceil(_EXPECTED / (rarer * orders * len(patients)))))
    # Steps so short that none moves the gradients of the next.
    hushed: dict[str, Any] = {"trainable": "head", "sigma": 0.002, "lr": 1e-3}
    plan = _plan(
        f"who is drawn of {steps}",
        steps=steps,
        sampling_rate=sampling_rate,
        **hushed,
    )
    every = _plan("all are drawn", **hushed)
    labs, weights_P = _Variants(world), world.start(every).weights_P
    none_P = labs.update(every, (NOBODY,), weights_P)["weights"]
    # One part of a step: of the denominator of all patients, made that of those drawn.
    part_PU = np.stack(
        [labs.update(every, (p,), weights_P)["weights"] - none_P for p in patients], axis=1
    ) * (_denominator(every) / _denominator(plan))

    def counts_of(lab: MadeUpLab, rounds: range) -> Floats:
        moved_PD = [lab.train(plan, round_).parts["weights"] for round_ in rounds]
        found_UD = np.linalg.lstsq(part_PU, np.stack(moved_PD, 1).astype(np.float64), rcond=None)[0]
        off = float(np.abs(found_UD - np.rint(found_UD)).max())
        if not off <= 0.49:
            raise VerificationError(
                f"rehearsal ({plan.name}): an update is not a sum of its patients' parts (by "
                f"{off:.2f})"
            )
        return np.asarray(np.rint(found_UD).T)

    counts: list[Floats] = []
    first = 1
    while first <= orders:
        rounds = range(first, first := min(first + _AT_ONCE, orders + 1))
        lab = world.lab(patients, name=f"lab-{first}")
        lab.approve(plan)
        again = world.restarted(lab) if not counts else None
        counts.append(counts_of(lab, rounds))
        # Two labs draw the same by chance where hardly anything is left to it.
        telling = sampling_rate < 1 and rarer * steps * len(rounds) * len(patients) > 15
        same = again is not None and np.array_equal(counts_of(again, rounds), counts[-1])
        if telling and same:
            raise VerificationError(
                f"rehearsal ({plan.name}): after a restart a lab draws the same patients"
            )
    return _check_binomial(np.concatenate(counts), steps, sampling_rate)


def _check_binomial(counts_DU: Floats, steps: int, rate: float) -> float:
    """How often each was drawn in each order, out of ``steps`` times. Errors: VerificationError."""
    orders, patients = counts_DU.shape
    if rate == 1:
        if not (counts_DU == steps).all():
            raise VerificationError("rehearsal: at rate 1 a patient was left out")
        return 1.0
    drawn, trials = int(counts_DU.sum()), counts_DU.size * steps
    chances = {"the rate": _two_sided(drawn, trials, rate)}
    empty = float((1 - rate) ** (patients * steps))
    none = int((counts_DU.sum(1) == 0).sum())
    chances["the number of empty draws"] = _two_sided(none, orders, empty)
    variance = steps * rate * (1 - rate)
    if variance * counts_DU.size > 30:  # else too few are drawn for what follows
        centred_DU = (counts_DU - steps * rate) / math.sqrt(variance)
        sizes_D = centred_DU.sum(1) / math.sqrt(patients)
        # Of their squares: by the kurtosis of a binomial number of patients x steps draws.
        spread = math.sqrt(2 + (1 - 6 * rate * (1 - rate)) / (patients * variance))
        apart = (np.mean(sizes_D**2) - 1) * math.sqrt(orders) / spread
        chances["the spread of sizes"] = math.erfc(abs(apart) / math.sqrt(2))
        serial = np.mean(centred_DU[1:] * centred_DU[:-1]) * math.sqrt((orders - 1) * patients)
        chances["independence of orders"] = math.erfc(abs(serial) / math.sqrt(2))
    for what, chance in chances.items():
        if not chance >= _RAREST:
            raise VerificationError(
                f"rehearsal (who is drawn): {what} is not that of a rate of {rate:g}: of {trials} "
                f"chances {drawn} were taken, {none} of {orders} orders drew nobody"
            )
    return drawn / (trials * rate)


def _two_sided(found: int, trials: int, rate: float) -> float:
    """The chance of a binomial number as far off as this, or further."""
    low = special.bdtr(found, trials, rate)
    high = special.bdtrc(found - 1, trials, rate) if found else 1.0
    return float(2 * min(low, high))


# --- scores


def _check_scores(world: MadeUp, *, quick: bool) -> None:
    """Labs without a cell that counts tell noise; one patient moves scores by what he may."""
    sd = 20.0 * math.sqrt(_CELLS)
    plan = _plan("scores", scores=20.0)
    patients = [replace(NOBODY, name=f"nobody-{number}") for number in range(6)]
    releases = []
    for name in ("lab-1", "lab-2"):
        lab = world.lab(patients, name=name)
        releases += [lab.scores(plan, round_) for round_ in range(1, 5)]
    _only_noise(np.array(releases, np.float64), sd, plan.name)
    if quick:
        return
    _check_split(world)


def _check_split(world: MadeUp) -> None:
    """Some patients are trained on, some scored: one of them moves one of the two, by his part."""
    plan = _plan("both sides", trainable="head", scores=20.0)
    codes = ("basophil", "ig", "monocyte", "platelet")
    patients = tuple(Patient(f"{n}", codes[n % 4], 16 + 2 * n) for n in range(8))
    labs, weights_P = _Variants(world), _all_layers_learn(world, plan)

    def answers(of: tuple[Patient, ...]) -> tuple[Floats, Floats]:
        update = labs.update(plan, of, weights_P)["weights"]
        return update, labs.lab(of).scores(plan, 2).astype(np.float64)

    update_P, all_D = answers(patients)
    most = {"an update": most_moved(plan), "scores": math.sqrt(_CELLS)}
    largest = dict.fromkeys(most, 0.0)
    for patient in patients:
        without_P, rest_D = answers(tuple(p for p in patients if p != patient))
        # Each count that moves is rounded twice.
        rounding = math.sqrt(np.count_nonzero(all_D - rest_D))
        moved = {
            "an update": (float(np.linalg.norm(update_P - without_P)), 0.01 * most["an update"]),
            "scores": (float(np.linalg.norm(all_D - rest_D)), rounding),
        }
        for what, (change, slack) in moved.items():
            if not change <= most[what] + slack:
                raise VerificationError(
                    f"rehearsal ({plan.name}): one patient moves {what} by {change:.4g}, the "
                    f"plan's price is for {most[what]:.4g}"
                )
            largest[what] = max(largest[what], change)
    for what, change in largest.items():
        if not change >= most[what] / 2:
            raise VerificationError(
                f"rehearsal ({plan.name}): no patient moves {what}: nothing was seen, so nothing "
                "was shown"
            )
