"""The lab half: a Flower ClientApp that trains, evaluates and says who it is.

P parameters, C classes. The same app answers a coordinator over TLS and the grid of a simulation;
what differs is only how a ``Lab`` is opened. The first import of torch is inside the functions
that train.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from cytofed.arrays import Float32, Manifest, Parts
from cytofed.client.budget import Budget
from cytofed.client.cells import Cells
from cytofed.client.orders import check_parts
from cytofed.client.secure import SecureLab
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.labels import Scheme
from cytofed.messages import (
    ERROR_CODE,
    Evaluation,
    Hello,
    Masked,
    Order,
    Update,
    pack_evaluation,
    pack_hello,
    pack_masked,
    pack_step,
    pack_update,
    unpack_order,
    unpack_step,
)
from cytofed.metrics import Tally, tally
from cytofed.plan import Plan
from cytofed.privacy.evaluation import check_release, clipped_confusion, noised_tally
from cytofed.privacy.noise import Randomness, SystemRandomness
from cytofed.privacy.sampling import draw, units_of
from cytofed.privacy.terms import Terms, terms_of
from cytofed.seeds import derive
from cytofed.strategies import make_strategy
from cytofed.strategies.strategy import Correction, LocalRound, Strategy

if TYPE_CHECKING:
    import torch

    from cytofed.client.training import Progress
    from cytofed.models import Classifier
    from cytofed.privacy.selfcheck import SelfCheck

_KEPT_FEATURES = 64
"""labs whose frozen features one process keeps"""

_log = logging.getLogger("cytofed.lab")


class Memory(Protocol):
    """What a lab's half of a strategy remembers between rounds (control variates, own layers)."""

    def load(self, run: str, round_: int) -> Parts:
        """What was saved in the last round before ``round_``; empty at the start."""

    def save(self, run: str, round_: int, parts: Parts) -> None:
        """Remember ``parts`` as of the end of ``round_``."""


class Updates(Protocol):
    """Keeps the one update of a round, so that a second attempt releases the very same.

    Noised scores are kept the same way, as an update of their order.
    """

    def load(self, order: Order) -> Update | None:
        """What was kept for the round and weights of this order."""

    def save(self, order: Order, update: Update) -> None:
        """On the disk when this returns."""


@dataclass(frozen=True)
class Lab:
    """One lab with its data, ready to answer orders of one plan."""

    name: str
    plan: Plan
    scheme: Scheme
    train: Cells
    test: Cells
    absent_C: npt.NDArray[np.bool_]
    """classes that this lab never labels: masked in its loss"""
    start: Path
    """the plan's start model: architecture and the tensors that are not trained"""
    memory: Memory = field(repr=False)
    calibration: Cells | None = None
    """kept out of training and test, for the model's temperature"""
    budget: Budget | None = field(default=None, repr=False)
    """needed by plans with differential privacy; None: a simulation, which counts nothing else"""
    declared_patients: int | None = None
    """the lab's own public figure; images with ``privacy.unit: image``"""
    secure: SecureLab | None = field(default=None, repr=False)
    """needed by plans with secure aggregation"""
    randomness: Callable[[Order], Randomness] = field(
        default=lambda _order: SystemRandomness(), repr=False
    )
    """of sampling and noise; only a simulation gives another"""
    stream: str = "federation"
    """names the order of images: runs of a federation have the same, its baselines another"""
    updates: Updates | None = field(default=None, repr=False)
    """keeps a round's update for a second attempt at the round"""


_Part = Literal["train", "test", "calibration"]

OnStep = Callable[[Order, "Progress"], None]


def lab_app(
    open_lab: Callable[[Context, str], Lab],
    *,
    mods: list[Mod] | None = None,
    on_step: OnStep | None = None,
    tell_exact: bool = False,
    check: Callable[[Order, Lab], None] | None = None,
) -> ClientApp:
    """The app; ``open_lab`` finds the lab that a context stands for, as it takes part in a run.

    ``tell_exact``: answer ``evaluate.exact``, a lab's own scores without noise or masks, whatever
    the plan says. For simulations; a deployed lab knows no such order. ``check``: raises where
    private orders are not to be answered; left out, the first one is checked for (``self_check``).
    """
    app = ClientApp(mods=[_errors_as_replies, *(mods or [])])
    nets: dict[tuple[str, Path], _Net] = {}
    check_path = check or _SelfCheck().run

    def ready(message: Message, context: Context) -> tuple[Order, Lab, _Net]:
        order = unpack_order(message)
        lab = open_lab(context, order.run)
        if order.plan_sha256 != lab.plan.sha256:
            raise InputError(
                f"order is of plan {order.plan_sha256[:12]}, "
                f"{lab.name} approved {lab.plan.sha256[:12]}"
            )
        key = lab.plan.sha256, lab.start
        if key not in nets:
            nets.clear()  # one plan, from one start model, at a time
            nets[key] = _Net.build(lab)
        net = nets[key]
        check_parts(order, net.strategy, size=net.manifest.size, folder=lab.start.parent)
        return order, lab, net

    def ready_to_release(message: Message, context: Context) -> tuple[Order, Lab, _Net]:
        order, lab, net = ready(message, context)
        if lab.plan.privacy.unit != "none":
            check_path(order, lab)
        return order, lab, net

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, lab, net = ready_to_release(message, context)
        update = _kept(order, lab) or _train(order, lab, net, on_step)
        if lab.plan.secure_aggregation.enabled:
            return Message(pack_masked(_masked(order, lab, net, update)), reply_to=message)
        return Message(pack_update(update), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        order, lab, net = ready_to_release(message, context)
        found = _evaluate(order, lab, net)
        if lab.plan.secure_aggregation.enabled:
            words_W = _secure(lab).mask_tally(order, found)
            masked = Masked(lab.name, order.run, order.round, order.slot, words_W)
            return Message(pack_masked(masked), reply_to=message)
        evaluation = Evaluation(lab.name, order.run, order.round, found)
        return Message(pack_evaluation(evaluation), reply_to=message)

    def exact(message: Message, context: Context) -> Message:
        order, lab, net = ready(message, context)
        found = _tally(order, lab, net)
        evaluation = Evaluation(lab.name, order.run, order.round, found)
        return Message(pack_evaluation(evaluation), reply_to=message)

    if tell_exact:
        app.evaluate("exact")(exact)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        lab = open_lab(context, unpack_order(message).run)
        return Message(pack_hello(Hello(lab.name, len(lab.train))), reply_to=message)

    @app.query("secagg")
    def secagg(message: Message, context: Context) -> Message:
        request = unpack_step(message)
        lab = open_lab(context, request.run)
        return Message(pack_step(_secure(lab).answer(request)), reply_to=message)

    return app


def _errors_as_replies(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """A lab that cannot answer says why; of an unexpected error only its type leaves."""
    try:
        return call_next(message, context)
    except CytofedError as error:
        _log.warning("order refused: %s", error)
        return Message(Error(ERROR_CODE, error.message), reply_to=message)
    except Exception as error:
        _log.exception("order failed")
        return Message(
            Error(ERROR_CODE, f"internal error at the lab: {type(error).__name__}"),
            reply_to=message,
        )


class _SelfCheck:
    """The checks of the private path, run once, before the first private order is answered.

    A failure stays: the lab answers no private order until it is started anew.
    """

    def __init__(self) -> None:
        self._passed = False
        self._failure = ""

    def run(self, order: Order, lab: Lab) -> None:
        """Errors: VerificationError naming the check that failed."""
        if self._passed:
            return
        if not self._failure:
            self._failure = self._found(order, lab)
        if self._failure:
            raise VerificationError(f"self-check failed: {self._failure}")
        self._passed = True

    def _found(self, order: Order, lab: Lab) -> str:
        """What is wrong; empty where nothing is."""
        # Rounds that no plan has: in a simulation the noise of a real one would be seen twice.
        rounds = count(2**40)

        def new_randomness() -> Randomness:
            return lab.randomness(replace(order, round=next(rounds)))

        try:
            passed = self_check(new_randomness)
        except VerificationError as error:
            _log.error("self-check failed, no private order is answered: %s", error)
            return error.message
        _log.info("self-check passed: %s", passed)
        return ""


def self_check(new_randomness: Callable[[], Randomness]) -> SelfCheck:
    """Check the private path as it is: sensitivity, noise of training and scores, the step itself.

    ``new_randomness``: as a round takes it; what is checked is its noise too. Takes half a second.
    Errors: VerificationError naming the check that failed.
    """
    from cytofed.client import private, training
    from cytofed.privacy.selfcheck import check_production_path

    with training.steady(1):  # so few numbers that threads would spin
        passed = check_production_path(new_randomness=new_randomness)
        check_release(new_randomness)
        private.check_training()
    return passed


@dataclass(frozen=True)
class _Net:
    """A built net, kept warm between orders, and what of it is exchanged."""

    net: Classifier
    manifest: Manifest
    strategy: Strategy
    device: torch.device
    known_features: dict[tuple[str, str], Float32] = field(default_factory=dict)

    @staticmethod
    def build(lab: Lab) -> _Net:
        from cytofed import models
        from cytofed.client import training

        plan = lab.plan
        net, _ = models.load_model(lab.start)
        device = training.choose_device(plan.train.device)
        return _Net(
            net.to(device),
            models.manifest(net, plan.model.trainable),
            make_strategy(plan.strategy),
            device,
        )

    def features(self, lab: Lab, part: _Part) -> Float32 | None:
        """The frozen encoder's features of a lab's images, computed once; None where it trains."""
        from cytofed.client.features import frozen_features

        if any(tensor.role != "head" for tensor in self.manifest.tensors):
            return None
        key = lab.name, part
        if key not in self.known_features:
            while len(self.known_features) >= _KEPT_FEATURES:
                del self.known_features[next(iter(self.known_features))]
            cells = _cells(lab, part)
            self.known_features[key] = frozen_features(self.net, cells, self.device, lab.plan.train)
        return self.known_features[key]


def _kept(order: Order, lab: Lab) -> Update | None:
    """The round's update where it was made before: nothing is trained or spent again."""
    update = None if lab.updates is None else lab.updates.load(order)
    if update is not None:
        private = lab.plan.privacy.unit != "none"
        assert lab.budget is not None or not private
        if lab.budget is not None:
            lab.budget.reserve(order)  # another slot of the round; refuses what is no repeat
            if private:
                lab.budget.release(order, update.parts)
    return update


def _train(order: Order, lab: Lab, net: _Net, on_step: OnStep | None) -> Update:
    from cytofed import models

    half = net.strategy.lab
    # Under privacy a lab of nobody sends noise, so that none is told from one patient.
    if len(lab.train) == 0 and lab.plan.privacy.unit == "none":
        raise InputError(f"{lab.name} has no image to train on")
    memory = lab.memory.load(order.run, order.round)
    models.load_flat(net.net, net.manifest, _own_layers(order, memory, net))
    correction = half.prepare(order.parts, memory)
    step = None if on_step is None else partial(on_step, order)
    private = lab.plan.privacy.unit != "none"
    trained = (_train_privately if private else _train_plainly)(order, lab, net, correction, step)
    end_P = models.flatten(net.net, net.manifest)
    local = LocalRound(order.parts["weights"], end_P, trained.reach, trained.momentum_P)
    parts, remembered = half.finish(order.parts, memory, local)
    if half.local_roles:
        remembered = {**remembered, "own": end_P}
    if remembered:
        lab.memory.save(order.run, order.round, remembered)
    parts = {name: parts[name] for name in half.up}
    update = Update(
        lab=lab.name,
        run=order.run,
        round=order.round,
        weight=trained.weight,
        parts=parts,
        loss=trained.loss,
        train_s=trained.train_s,
    )
    if lab.updates is not None:
        lab.updates.save(order, update)  # before it is named: it can't be made again
    if private:
        assert lab.budget is not None
        lab.budget.release(order, parts)
    return update


def _masked(order: Order, lab: Lab, net: _Net, update: Update) -> Masked:
    """The update as ring words under this slot's masks; loss and weight are only in the sum."""
    masked = _secure(lab).mask(order, lab.plan, net.strategy, update.parts, update.weight)
    if masked.clamped:
        _log.warning("round %d: %.2g of the update was clamped", order.round, masked.clamped)
    words_W = masked.words_W
    return Masked(lab.name, order.run, order.round, order.slot, words_W, update.train_s)


def _secure(lab: Lab) -> SecureLab:
    if lab.secure is None:
        raise InputError(f"{lab.name} has no keys for secure aggregation")
    return lab.secure


@dataclass(frozen=True)
class _Outcome:
    """What of local training goes into an update's header."""

    weight: float
    reach: float
    loss: float
    train_s: float
    momentum_P: Float32 | None


def _train_plainly(
    order: Order,
    lab: Lab,
    net: _Net,
    correction: Correction | None,
    on_step: Callable[[Progress], None] | None,
) -> _Outcome:
    """One round without privacy: a use of the patients all the same, which the ledger has first."""
    from cytofed.client import training

    plan = lab.plan
    if lab.budget is not None:
        lab.budget.reserve(order)
    trained = training.train(
        net.net,
        lab.train,
        plan,
        progress_start=(order.round - 1) / plan.train.rounds,
        progress_end=order.round / plan.train.rounds,
        absent_C=lab.absent_C,
        correction=correction,
        features_NF=net.features(lab, "train"),
        seed=derive(plan.train.seed, "train", lab.stream, lab.name),
        in_round=order.round,
        device=net.device,
        on_step=on_step,
    )
    return _Outcome(
        weight=float(len(lab.train)),
        reach=trained.reach,
        loss=trained.loss,
        train_s=trained.train_s,
        momentum_P=trained.momentum_P,
    )


def _train_privately(
    order: Order,
    lab: Lab,
    net: _Net,
    correction: Correction | None,
    on_step: Callable[[Progress], None] | None,
) -> _Outcome:
    """One round under differential privacy: reserved in the ledger before anything is drawn."""
    from cytofed.client import private

    plan = lab.plan
    terms, budget, declared_patients = _private_terms(lab)
    budget.reserve(order)
    randomness = lab.randomness(order)
    trained = private.train_privately(
        net.net,
        lab.train,
        plan,
        terms,
        declared_patients=declared_patients,
        randomness=randomness,
        progress_start=(order.round - 1) / plan.train.rounds,
        progress_end=order.round / plan.train.rounds,
        absent_C=lab.absent_C,
        correction=correction,
        features_NF=net.features(lab, "train"),
        device=net.device,
        on_step=on_step,
    )
    _log.info(
        "round %d: %d patients drawn, %d gradients not finite",
        order.round,
        trained.patients,
        trained.non_finite,
    )
    return _Outcome(
        weight=float(declared_patients),  # public; the number of images is not
        reach=trained.reach,
        loss=math.nan,
        # How long it took says how many patients were drawn: only a simulation tells.
        train_s=trained.train_s if randomness.simulated else 0.0,
        momentum_P=trained.momentum_P,
    )


def _private_terms(lab: Lab) -> tuple[Terms, Budget, int]:
    """What a private order needs. Errors: InputError where the lab lacks it."""
    terms = terms_of(lab.plan)
    if terms is None or lab.budget is None or lab.declared_patients is None:
        raise InputError(
            f"{lab.name} has no budget or no declared number of patients for a private plan",
            hint="set patients_declared in client.yaml",
        )
    return terms, lab.budget, lab.declared_patients


def _evaluate(order: Order, lab: Lab, net: _Net) -> Tally:
    """What the plan lets leave of the held-out images' scores.

    Errors: RefusedError for a private plan that pays for no scores.
    """
    if lab.plan.privacy.unit == "none":
        if lab.budget is not None:
            lab.budget.reserve(order)
        return _tally(order, lab, net)
    return _evaluate_privately(order, lab, net)


def _evaluate_privately(order: Order, lab: Lab, net: _Net) -> Tally:
    """A noised tally, reserved in the ledger before a held-out image is looked at."""
    terms, budget, _ = _private_terms(lab)
    mechanism = terms.tally
    if mechanism is None:
        raise RefusedError(
            "the plan releases no scores: they are of patients, and exact ones are not private",
            hint="set evaluation.sigma in the plan",
        )
    kept = _kept(order, lab)
    if kept is not None:
        return _tally_of(kept.parts, lab)
    units = units_of(lab.plan.privacy.unit, len(lab.test), lab.test.patients_N)
    budget.reserve(order)
    randomness = lab.randomness(order)
    drawn = draw(
        units, sampling_rate=1.0, cells_per_unit=terms.cells_per_unit, randomness=randomness
    )
    rows_N = np.concatenate([np.zeros(0, np.int64), *drawn.rows])
    unit_N = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn.rows])
    probs_NC = _predict(order, lab, net, "test", rows_N)
    targets_NC = lab.test.targets_NC[rows_N]
    confusion_CC = clipped_confusion(probs_NC, targets_NC, unit_N, mechanism)
    noised_CC = noised_tally(confusion_CC, mechanism, randomness).confusion_CC
    parts = {"confusion": noised_CC.ravel().astype(np.float32)}
    if lab.updates is not None:
        lab.updates.save(order, Update(lab.name, order.run, order.round, 1.0, parts))
    budget.release(order, parts)
    return _tally_of(parts, lab)


def _tally_of(parts: Parts, lab: Lab) -> Tally:
    """A released confusion matrix as the tally that is sent, the same at every attempt."""
    empty = Tally.empty(len(lab.scheme.codes))
    confusion_CC = parts["confusion"].reshape(empty.confusion_CC.shape).astype(np.int64)
    return Tally(confusion_CC, empty.bins_B3)


def _tally(order: Order, lab: Lab, net: _Net) -> Tally:
    """The exact scores of the order's model, with those of the calibration part."""
    kept = lab.calibration
    calibration = None
    if kept is not None and len(kept):
        calibration = _predict(order, lab, net, "calibration"), kept.targets_NC
    return tally(_predict(order, lab, net, "test"), lab.test.targets_NC, calibration)


def _cells(lab: Lab, part: _Part) -> Cells:
    cells = {"train": lab.train, "test": lab.test, "calibration": lab.calibration}[part]
    assert cells is not None
    return cells


def _predict(
    order: Order,
    lab: Lab,
    net: _Net,
    part: _Part,
    rows_N: npt.NDArray[np.int64] | None = None,
) -> Float32:
    """Probabilities (N, C) that the order's model gives a part of the images, or rows of it.

    The lab's own layers take part where it has some.
    """
    from cytofed import models
    from cytofed.client import training

    # The round's own layers are those saved in it, hence the round after.
    memory = lab.memory.load(order.run, order.round + 1)
    models.load_flat(net.net, net.manifest, _own_layers(order, memory, net))
    cells, features_NF = _cells(lab, part), net.features(lab, part)
    if rows_N is not None:
        cells = cells.take(rows_N)
        features_NF = None if features_NF is None else features_NF[rows_N]
    return training.predict(
        net.net,
        cells,
        features_NF=features_NF,
        device=net.device,
        precision=lab.plan.train.precision,
        # What is trained further can be scored more cheaply, on the image as it is.
        views=1 if order.round < lab.plan.train.rounds else None,
    )


def _own_layers(order: Order, memory: Mapping[str, Any], net: _Net) -> Float32:
    """The order's weights, with the lab's own values where the strategy keeps them local."""
    weights_P = order.parts["weights"]
    if "own" not in memory:
        return weights_P
    weights_P = weights_P.copy()
    for role in net.strategy.lab.local_roles:
        mask_P = net.manifest.mask(role)
        weights_P[mask_P] = memory["own"][mask_P]
    return weights_P
