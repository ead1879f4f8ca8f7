"""Local training under differential privacy: patients are drawn, clipped, summed and noised.

The counterpart of ``training.train`` for plans with ``privacy.unit`` patient or image. What the
net, the optimizer and a strategy's correction see is the clipped and noised gradient only.

Guarantees: one image's pixels, augmentation and label touch one unit's gradient only; loss and
counts that are computed on the way stay in the return value for the lab's own log.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cytofed import models
from cytofed.arrays import Float32
from cytofed.client import convolution, training
from cytofed.client.augment import augment
from cytofed.client.cells import Cells
from cytofed.client.training import Bools, Objective, Progress
from cytofed.errors import InputError, VerificationError
from cytofed.plan import Plan, from_dict
from cytofed.privacy.accounting import Guarantee, SubsampledGaussian
from cytofed.privacy.gradients import (
    Mechanism,
    PatientOptimizer,
    Step,
    private_head_step,
    private_step,
)
from cytofed.privacy.noise import Randomness, SimulatedRandomness
from cytofed.privacy.sampling import Draw, Rows, Units, draw, units_of
from cytofed.privacy.terms import Terms
from cytofed.seeds import derive
from cytofed.strategies.strategy import Correction


class Images(Protocol):
    """What private training reads of a lab's ``Cells``."""

    def __len__(self) -> int: ...
    @property
    def targets_NC(self) -> Bools: ...
    @property
    def patients_N(self) -> npt.NDArray[np.str_] | None: ...
    def images(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class PrivatelyTrained:
    """What private training did. ``patients`` and ``non_finite`` are the lab's own knowledge."""

    steps: int
    reach: float
    train_s: float
    patients: int
    non_finite: int
    momentum_P: Float32 | None = None


def train_privately(
    net: nn.Module,
    cells: Images,
    plan: Plan,
    terms: Terms,
    *,
    declared_patients: int,
    randomness: Randomness,
    progress_start: float,
    progress_end: float,
    absent_C: Bools,
    correction: Correction | None = None,
    features_NF: Float32 | None = None,
    device: str | torch.device = "auto",
    on_step: Callable[[Progress], None] | None = None,
) -> PrivatelyTrained:
    """Train ``net`` in place for one round of ``terms``.

    ``absent_C``: classes that the lab's map declares absent; never derived from the images.
    ``features_NF``: the frozen encoder's features of all cells; with them the head is trained in
    closed form, without augmentation.
    Errors: InputError for data without patients (unit: patient) or a net with batch statistics.
    """
    place = training.choose_device(device)
    units = units_of(plan.privacy.unit, len(cells), cells.patients_N)
    mechanism = Mechanism(
        terms.training.sigma, terms.max_norm, terms.training.sampling_rate, declared_patients
    )
    settings = replace(plan.train, lr=peak_rate(plan, mechanism, terms.steps))
    steps = terms.training.steps
    started_s = time.perf_counter()
    patients, non_finite = 0, 0
    with training.steady(settings.threads):
        net.to(place)
        convolution.adopt(net)
        trained = models.manifest(net, plan.model.trainable)
        parameters = training.select(net, trained)
        inner = training.make_optimizer(parameters, settings)
        momentum = training.Momentum(inner, parameters, settings, correction)
        optimizer = PatientOptimizer(inner, net, mechanism=mechanism, randomness=randomness)
        average = training.Average(parameters, settings.ema)
        reach = training.Reach(settings)
        pull = _pull(correction, parameters)
        one_step = _make_step(
            net, cells, plan, optimizer, randomness, absent_C, features_NF, place, pull
        )
        for step in range(steps):
            progress = progress_start + (progress_end - progress_start) * step / steps
            lr = training.learning_rate(settings, progress)
            for group in inner.param_groups:
                group["lr"] = lr
            drawn = draw(
                units,
                sampling_rate=mechanism.sampling_rate,
                cells_per_unit=terms.cells_per_unit,
                randomness=randomness,
            )
            done = one_step(drawn)
            average.update()
            reach.step(lr)
            patients, non_finite = patients + done.patients, non_finite + done.non_finite
            if on_step is not None:
                on_step(Progress(step + 1, steps, math.nan, lr))
        average.finish()
        inner.zero_grad(set_to_none=True)
    return PrivatelyTrained(
        steps,
        reach.total,
        time.perf_counter() - started_s,
        patients,
        non_finite,
        momentum.at_end(),
    )


def peak_rate(plan: Plan, mechanism: Mechanism, steps: int) -> float:
    """The learning rate at its height over the ``steps`` of a plan; public, as all it is made of.

    ``train.lr``, or where ``privacy.noise_drift`` is given the rate at which the noise of all steps
    moves a weight by this standard deviation. Steps add up as squares: each moves a weight by its
    rate times sigma x max_norm / denominator.
    """
    drift = plan.privacy.noise_drift
    if drift is None:
        return plan.train.lr
    unit = replace(plan.train, lr=1.0)
    squares = sum(training.learning_rate(unit, step / steps) ** 2 for step in range(steps))
    noise = mechanism.sigma * mechanism.max_norm / mechanism.denominator
    return drift / (noise * math.sqrt(squares))


def _make_step(
    net: nn.Module,
    cells: Images,
    plan: Plan,
    optimizer: PatientOptimizer,
    randomness: Randomness,
    absent_C: Bools,
    features_NF: Float32 | None,
    place: torch.device,
    pull: Callable[[Tensor], Tensor] | None,
) -> Callable[[Draw], Step]:
    settings = plan.train
    present_C = torch.from_numpy(~absent_C).to(place)
    prior_C = training.public_prior(plan)
    prior_C = None if prior_C is None else prior_C.to(place)
    if features_NF is not None:
        features = torch.from_numpy(features_NF).to(place)
        targets_NC = torch.from_numpy(cells.targets_NC).to(place)
        head = getattr(net, "head")  # noqa: B009  # every net of models.build has one
        masked_C = present_C if absent_C.any() else None

        def head_step(drawn: Draw) -> Step:
            return private_head_step(
                optimizer,
                drawn,
                head,
                features,
                targets_NC,
                present_C=masked_C,
                prior_C=prior_C,
                correction=pull,
            )

        return head_step

    objective = Objective(present_C, settings.label_smoothing, prior_C)
    precision = training.choose_precision(settings.precision, place)
    copies = plan.privacy.multiplicity
    step_seed = 0
    named = cells.patients_N if plan.privacy.unit == "patient" else None

    def owner_of(row: int) -> str | int:
        return row if named is None else str(named[row])

    def loss_of(rows_K: Rows) -> Tensor:
        pixels = torch.from_numpy(cells.images(np.repeat(rows_K, copies)))
        # Of the step and the patient's own name: nobody else moves a patient's augmentation.
        seed = derive(step_seed, "augment", owner_of(int(rows_K[0]))) & 0xFFFFFFFF
        generator = torch.Generator().manual_seed(seed)
        images = augment(pixels.to(place), settings.augment, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        targets_KC = torch.from_numpy(np.repeat(cells.targets_NC[rows_K], copies, axis=0)).to(place)
        with training.autocast(place, precision):
            logits_KC = net(images)
        return objective(logits_KC, targets_KC)

    def step(drawn: Draw) -> Step:
        nonlocal step_seed
        step_seed = int(randomness.uniforms(1)[0] * 2**53)
        return private_step(optimizer, drawn, loss_of, correction=pull)

    return step


def _pull(
    correction: Correction | None, parameters: list[nn.Parameter]
) -> Callable[[Tensor], Tensor] | None:
    """The strategy's correction as a function of nothing private: weights and constants only."""
    if correction is None:
        return None

    def flat() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    start_P = flat()
    offset_P = torch.zeros_like(start_P)
    if correction.offset_P is not None:
        if correction.offset_P.shape != tuple(start_P.shape):
            raise InputError(
                f"Expected a correction of shape {tuple(start_P.shape)}, "
                f"found {correction.offset_P.shape}"
            )
        offset_P = torch.from_numpy(correction.offset_P.copy()).to(start_P.device)

    def add(_gradient_P: Tensor) -> Tensor:
        return correction.pull * (flat() - start_P) + offset_P

    return add


def count_units(plan: Plan, cells: Cells) -> int:
    """Patients (or images) of a simulated lab: what it declares. A deployment never counts."""
    found: Units = units_of(plan.privacy.unit, len(cells), cells.patients_N)
    return len(found)


# --- self-check


def check_training() -> None:
    """Without noise and clipping, a private step is a plain one, weight by weight.

    The private one comes from ``train_privately``, with its convolutions, its optimizers and
    weights that lie channels last; the plain one has nothing of these. Of noise and clipping alone
    a gradient in the wrong order cannot be told: once a fused optimizer read contiguous gradients
    against channels-last kernels, and every other check passed.
    Errors: VerificationError naming the first tensor that moves in another way.
    """
    cells, start = _FewCells(), _few_weights()
    for optimizer in ("sgd", "adamw"):
        for trainable in ("all", "head"):
            plan = _noiseless_plan(optimizer, trainable)
            plain, private = copy.deepcopy(start), copy.deepcopy(start)
            private.to(memory_format=torch.channels_last)
            _plain_step(plain, cells, plan)
            everything = np.arange(len(cells))
            images = models.images_of(torch.from_numpy(cells.images(everything)))
            train_privately(
                private,
                cells,
                plan,
                _NOISELESS,
                declared_patients=2,
                randomness=SimulatedRandomness(0, "self-check training"),
                progress_start=0.0,
                progress_end=1.0,
                absent_C=np.zeros(cells.targets_NC.shape[1], bool),
                features_NF=models.features(private, images).numpy()
                if trainable == "head"
                else None,
                device="cpu",
            )
            _refuse_other_moves(start, plain, private, f"{optimizer}, trainable {trainable}")


_NOISELESS = Terms(
    training=SubsampledGaussian("patient", sampling_rate=1.0, sigma=1e-16, steps=1),
    rounds=1,
    delta=1e-3,
    max_norm=1e4,
    cells_per_unit=2,
    guarantee=Guarantee(math.inf, 1e-3, "patient", "RDP"),
)


def _noiseless_plan(optimizer: str, trainable: str) -> Plan:
    steady = {"schedule": "constant", "warmup": 0, "weight_decay": 0, "precision": "float32"}
    still = {"flip": False, "rotate": False, "shift": 0, "scale": 0, "stain": 0}
    return from_dict(
        {
            "model": {"trainable": trainable},
            "train": {"optimizer": optimizer, "lr": 0.1, "augment": still, **steady},
            "privacy": {"unit": "patient"},
        },
        source="self-check",
    )


@dataclass(frozen=True)
class _FewCells:
    """Two patients of two images, as ``Cells`` would show them."""

    def __len__(self) -> int:
        return 4

    @property
    def targets_NC(self) -> Bools:
        return np.eye(5, dtype=bool)[:4]

    @property
    def patients_N(self) -> npt.NDArray[np.str_]:
        return np.array(["a", "b", "b", "a"])

    def images(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        uniform = SimulatedRandomness(0, "self-check images").uniforms(4 * 8 * 8 * 3)
        return (256 * uniform).astype(np.uint8).reshape(4, 8, 8, 3)[index]


def _few_weights() -> models.Classifier:
    """A net with both kinds of convolutions: torch's own, and those that are products."""
    with torch.device("meta"):  # draws nothing from torch's own generator
        few = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        many = nn.Conv2d(64, 64, 8, padding=1, bias=False)  # 2^18 weights
        layers = few, nn.GroupNorm(8, 64), nn.ReLU(), many, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        net = models.Classifier(nn.Sequential(*layers), features=64, classes=5)
    net = net.to_empty(device="cpu")
    numbers = SimulatedRandomness(0, "self-check weights")
    with torch.no_grad():
        for tensor in net.parameters():
            scale = math.sqrt(tensor.shape[0] / tensor.numel())
            tensor.copy_(torch.from_numpy(numbers.normals(tensor.numel())).view_as(tensor) * scale)
    return net


def _plain_step(net: nn.Module, cells: Images, plan: Plan) -> None:
    parameters = training.select(net, models.manifest(net, plan.model.trainable))
    pixels = torch.from_numpy(cells.images(np.arange(len(cells))))
    logits_NC = net(models.images_of(pixels).contiguous())
    targets_NC = torch.from_numpy(cells.targets_NC)
    loss = Objective(torch.ones(targets_NC.shape[1], dtype=torch.bool))(logits_NC, targets_NC)
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    lr, momentum = plan.train.lr, plan.train.momentum
    inner: torch.optim.Optimizer
    if plan.train.optimizer == "sgd":
        inner = torch.optim.SGD(parameters, lr, momentum, nesterov=True, foreach=False)
    else:
        inner = torch.optim.AdamW(parameters, lr, weight_decay=0, foreach=False)
    inner.step()


def _refuse_other_moves(start: nn.Module, plain: nn.Module, private: nn.Module, what: str) -> None:
    tensors = zip(start.named_parameters(), plain.parameters(), private.parameters(), strict=True)
    for (name, before), wanted, found in tensors:
        way = float((wanted - before).detach().norm())
        apart = float((found - wanted).detach().norm())
        # Adam takes a step of full length for the smallest gradient, so rounding shows there.
        if not apart <= 0.02 * way + 1e-7:
            raise VerificationError(
                f"training self-test ({what}): without noise and clipping a private step moves "
                f"{name!r} by {apart:.2g} elsewhere than a plain step, which moves it by {way:.2g}"
            )
