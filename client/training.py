"""Local training and prediction: a net, a lab's cells and a plan.

The pieces are apart so that private training can put its own step between them: draw the images
of a unit, ``unit_gradient`` leaves the gradient of their mean loss in ``p.grad``, ``correct`` adds
the strategy's term (after any clipping and noise), and the optimizer moves the weights.

Guarantees: all randomness comes from ``seed``; the same net, cells, plan, seed and threads on the
same machine give the same weights to the bit. Weights, gradients and optimizer state are float32.

Shapes: B images of a batch, N images, C classes, P parameters, H W pixels.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from cytofed import models
from cytofed.arrays import Float32, Manifest
from cytofed.client.augment import augment
from cytofed.client.cells import Cells
from cytofed.errors import CytofedError, InputError
from cytofed.labels import load_scheme
from cytofed.plan import Plan, Train
from cytofed.seeds import derive
from cytofed.strategies.strategy import Correction

Precision = Literal["auto", "float32", "bfloat16"]
Bools = npt.NDArray[np.bool_]


class Stain(Protocol):
    """A lab's own colours, put on its images before anything else (simulated labs have one)."""

    def apply(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Progress:
    """Where local training is. ``loss`` is that of the last batch."""

    step: int
    steps: int
    loss: float
    lr: float


@dataclass(frozen=True)
class Trained:
    """What local training did. ``loss``: mean over all steps; ``reach``: see ``Reach``;
    ``momentum_P``: the optimizer's at the end, where the correction gave one."""

    loss: float
    steps: int
    images: int
    reach: float
    train_s: float
    momentum_P: Float32 | None = None


def train(
    net: nn.Module,
    cells: Cells,
    plan: Plan,
    *,
    progress_start: float,
    progress_end: float,
    absent_C: Bools | None = None,
    correction: Correction | None = None,
    features_NF: Float32 | None = None,
    seed: int,
    in_round: int = 1,
    device: str | torch.device = "auto",
    stain: Stain | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train ``net`` in place on ``cells``, from ``progress_start`` to ``progress_end``.

    Progress is the share of the whole federation's training, 0 to 1: round r of R is
    ``(r - 1) / R`` to ``r / R``. The learning rate follows it, so the labs need no state. ``seed``
    is that of all of a lab's rounds: with ``in_round`` it says where the one before left off.
    ``features_NF``: those of all cells where the encoder is frozen; the head is trained on them,
    without augmentation.

    Errors: InputError when there are no cells, or one has no class that its lab may have;
    CytofedError naming the step when the loss is not finite.
    """
    settings = plan.train
    place = choose_device(device)
    precision = choose_precision(settings.precision, place)
    if len(cells) == 0:
        raise InputError("there are no cells to train on", hint="see `cytofed data check DIR`")
    absent_C = None if settings.mask_absent == "none" else absent_C
    objective = make_objective(settings, cells, absent_C, place, public_prior(plan))
    steps = count_steps(settings, len(cells))
    batches = draw_batches(settings, cells.targets_NC, steps, seed, in_round=in_round)
    # torch's CPU generator takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(derive(seed, "changes", in_round) & 0xFFFFFFFF)
    started_s = time.perf_counter()
    with steady(settings.threads):
        net.to(place)
        trained = models.manifest(net, plan.model.trainable)
        parameters = select(net, trained)
        trained_part = net if features_NF is None else net.get_submodule("head")
        optimizer = make_optimizer(parameters, settings)
        momentum = Momentum(optimizer, parameters, settings, correction)
        pull = _Pull(parameters, correction)
        average = Average(parameters, settings.ema)
        level = HeadLevel(net, objective.present_C)
        reach = Reach(settings)
        loss_sum, images = 0.0, 0
        for step, index_B in enumerate(batches):
            progress = progress_start + (progress_end - progress_start) * step / steps
            lr = learning_rate(settings, progress)
            targets_BC = torch.from_numpy(cells.targets_NC[index_B]).to(place)
            if features_NF is None:
                inputs = augment(
                    load_pixels(cells, index_B, stain).to(place), settings.augment, generator
                ).contiguous(memory_format=torch.channels_last)
            else:
                inputs = torch.from_numpy(features_NF[index_B]).to(place)
            loss = unit_gradient(
                trained_part, parameters, inputs, targets_BC, objective, precision=precision
            )
            if not math.isfinite(loss):
                raise CytofedError(
                    f"the training loss is {loss} at step {step + 1} of {steps}, "
                    f"learning rate {lr:.3g}",
                    hint=f"lower train.lr (it is {settings.lr:g})",
                )
            pull.add_to_gradients()
            take_step(optimizer, lr)
            average.update()
            reach.step(lr)
            loss_sum, images = loss_sum + loss, images + len(index_B)
            if on_step is not None:
                on_step(Progress(step + 1, steps, loss, lr))
        average.finish()
        if correction is None or correction.offset_P is None:
            level.restore()
        optimizer.zero_grad(set_to_none=True)
    return Trained(
        loss=loss_sum / steps,
        steps=steps,
        images=images,
        reach=reach.total,
        train_s=time.perf_counter() - started_s,
        momentum_P=momentum.at_end(),
    )


def predict(
    net: nn.Module,
    cells: Cells,
    *,
    features_NF: Float32 | None = None,
    batch: int = 256,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    stain: Stain | None = None,
    views: int | None = None,
) -> Float32:
    """Probabilities (N, C) float32 of all cells, in their order; rows sum to 1.

    ``features_NF``: their features where they are known already. ``views``: forms of an image that
    they are means over, left out as many as the net says.
    """
    place = choose_device(device)
    cast = choose_precision(precision, place)
    net.to(place)
    head = net.get_submodule("head")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(cells), batch):
            index_B = np.arange(start, min(start + batch, len(cells)))
            if features_NF is None:
                images_B3HW = models.images_of(load_pixels(cells, index_B, stain).to(place))
                with autocast(place, cast):
                    logits_BC = models.logits(net, images_B3HW, views=views)
            else:
                logits_BC = head(torch.from_numpy(features_NF[index_B]).to(place))
            parts.append(functional.softmax(logits_BC.float(), dim=1).cpu().numpy())
    if not parts:
        return np.zeros((0, cells.targets_NC.shape[1]), np.float32)
    return np.concatenate(parts)


# --- the loss


@dataclass(frozen=True)
class Objective:
    """The loss of a lab: which classes take part, and what it does against imbalance.

    ``prior_C``: log prior added to the logits; ``weight_C``: loss weight per class. Where they come
    from the lab's own class counts, they are no matter for differential privacy: there the prior is
    the plan's or ``None``.
    """

    present_C: Tensor
    label_smoothing: float = 0.0
    prior_C: Tensor | None = None
    weight_C: Tensor | None = None

    def __call__(self, logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
        return loss_on_sets(
            logits_BC,
            targets_BC,
            self.present_C,
            label_smoothing=self.label_smoothing,
            prior_C=self.prior_C,
            weight_C=self.weight_C,
        )


def loss_on_sets(
    logits_BC: Tensor,
    targets_BC: Tensor,
    present_C: Tensor,
    *,
    label_smoothing: float = 0.0,
    prior_C: Tensor | None = None,
    weight_C: Tensor | None = None,
) -> Tensor:
    """Mean over the batch of ``-log sum of softmax over the classes allowed for an image``.

    One allowed class: the usual cross-entropy. Classes that are not present get no probability,
    no gradient and no share of the smoothing. ``prior_C``: logit adjustment (Menon et al. 2021,
    arXiv:2007.07314). ``weight_C``: an image weighs the mean of its classes' weights, and the
    result is divided by the number of images, so no image's gradient depends on another.
    """
    logits_BC = logits_BC.float()
    if prior_C is not None:
        logits_BC = logits_BC + prior_C
    lowest = torch.finfo(torch.float32).min
    # The lowest float instead of -inf: an infinite logit times a zero gradient would be NaN.
    log_BC = functional.log_softmax(logits_BC.masked_fill(~present_C, lowest), dim=1)
    allowed_BC = targets_BC & present_C
    loss_B = -torch.logsumexp(log_BC.masked_fill(~allowed_BC, lowest), dim=1)
    if label_smoothing > 0:
        even_B = -log_BC.masked_fill(~present_C, 0.0).sum(dim=1) / present_C.sum()
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * even_B
    if weight_C is not None:
        allowed_float_BC = allowed_BC.float()
        loss_B = loss_B * (allowed_float_BC @ weight_C) / allowed_float_BC.sum(dim=1)
    return loss_B.mean()


def make_objective(
    settings: Train,
    cells: Cells,
    absent_C: Bools | None,
    device: torch.device,
    prior_C: Tensor | None = None,
) -> Objective:
    """The loss of a lab's own cells. ``prior_C``: of the plan, instead of the lab's own counts.

    Errors: InputError naming the first image all of whose classes are absent at this lab.
    """
    targets_NC = cells.targets_NC
    present_C = np.ones(targets_NC.shape[1], bool) if absent_C is None else ~absent_C
    lost_N = ~(targets_NC & present_C).any(axis=1)
    if lost_N.any():
        first = int(np.flatnonzero(lost_N)[0])
        raise InputError(
            f"{int(lost_N.sum())} images have a class that is declared absent at this lab, "
            f"the first is {cells.take(np.array([first])).paths()[0]}",
            hint="take the class out of `absent` of the label map, or exclude its label",
        )
    counts_C = class_counts(targets_NC & present_C)
    weight_C = None
    if settings.balance == "logits" and prior_C is None:
        # Half an image for a class without any: its log prior must be finite.
        share_C = np.maximum(counts_C, 0.5) / counts_C.sum()
        prior_C = torch.from_numpy(np.log(share_C).astype(np.float32))
    elif settings.balance == "weights":
        weight_C = torch.from_numpy(_inverse(counts_C)).to(device)
    present = torch.from_numpy(present_C).to(device)
    prior_C = None if prior_C is None else prior_C.to(device)
    return Objective(present, settings.label_smoothing, prior_C, weight_C)


def public_prior(plan: Plan) -> Tensor | None:
    """The plan's log prior (C,), None where it has none. It depends on nobody's images.

    A class that the plan does not name counts as the rarest one.
    """
    named = plan.train.class_prior
    if plan.train.balance != "logits" or not named:
        return None
    codes = load_scheme(plan.labels.scheme).codes
    share_C = np.array([named.get(code, min(named.values())) for code in codes])
    return torch.from_numpy(np.log(share_C / share_C.sum()).astype(np.float32))


def class_counts(targets_NC: Bools) -> npt.NDArray[np.float64]:
    """Images per class (C,); a coarse image counts in equal parts for the classes of its set."""
    shares_NC = targets_NC / targets_NC.sum(axis=1, keepdims=True)
    counts_C: npt.NDArray[np.float64] = shares_NC.sum(axis=0)
    return counts_C


def _inverse(counts_C: npt.NDArray[np.float64]) -> Float32:
    """Weights so that every class with images has the same sum, and the mean image weighs 1."""
    filled = counts_C > 0
    weight_C = np.zeros(len(counts_C), np.float32)
    weight_C[filled] = counts_C.sum() / (filled.sum() * counts_C[filled])
    return weight_C


# --- the pieces of a step


def unit_gradient(
    net: nn.Module,
    parameters: Sequence[nn.Parameter],
    inputs: Tensor,
    targets_BC: Tensor,
    objective: Objective,
    *,
    precision: torch.dtype = torch.float32,
) -> float:
    """The loss of these inputs; its gradient, and nothing else, is left in ``p.grad``.

    ``inputs``: images (B, 3, H, W) of a whole net, or features (B, F) of a head.
    Guarantees: depends on these inputs only (no batch statistics, no earlier gradients).
    """
    for parameter in parameters:
        parameter.grad = None
    with autocast(inputs.device, precision):
        logits_BC = net(inputs)
    loss = objective(logits_BC, targets_BC)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def take_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Move the weights along the gradients in ``p.grad`` at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def select(net: nn.Module, trained: Manifest) -> list[nn.Parameter]:
    """The parameters of the manifest, in its order; all others stop requiring gradients."""
    names = set(trained.names)
    by_name = dict(net.named_parameters())
    for name, parameter in by_name.items():
        parameter.requires_grad_(name in names)
    return [by_name[name] for name in trained.names]


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Train) -> torch.optim.Optimizer:
    """A new optimizer: labs keep no optimizer state between rounds.

    Weight decay acts on matrices and kernels alone; scales, shifts and biases are few.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Less than half the time of the other kinds for a small net, where calls cost most.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(
            groups, settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=fused
        )
    return torch.optim.AdamW(groups, settings.lr, betas=(settings.momentum, 0.999), fused=fused)


def learning_rate(settings: Train, progress: float) -> float:
    """The rate at ``progress`` (0 to 1) of the whole federation's training."""
    rate = settings.lr
    if progress < settings.warmup:
        # Not from 0: the first step should move something, and SCAFFOLD divides by the mean.
        rate *= max(progress / settings.warmup, 0.01)
    if settings.schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * progress)
    return rate


def count_steps(settings: Train, images: int) -> int:
    """Steps of one round for a lab with ``images``, at least one."""
    if settings.steps_per_round is not None:
        return settings.steps_per_round
    if settings.steps_per_epoch is not None:
        return max(1, round(settings.local_epochs * settings.steps_per_epoch))
    return max(1, round(settings.local_epochs * images / batch_size(settings, images)))


def batch_size(settings: Train, images: int) -> int:
    """Images of a step for a lab with ``images``, at least one; of a share of them, its whole
    part, which some steps exceed by one."""
    if settings.steps_per_epoch is not None:
        return max(1, images // settings.steps_per_epoch)
    return min(settings.batch, images)


def draw_batches(
    settings: Train, targets_NC: Bools, steps: int, seed: int, *, in_round: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Indices of the images of each step of a round.

    Every epoch has an order of its own, and a round takes on where the one before left off: each
    image is seen once before any is seen twice, however short rounds are. An epoch may end inside
    a batch. A balanced sampler draws with replacement.
    """
    count = len(targets_NC)
    first = (in_round - 1) * steps
    step_S = np.arange(first, first + steps + 1)
    if settings.steps_per_epoch is not None and count > settings.steps_per_epoch:
        start_S = step_S * count // settings.steps_per_epoch
    else:
        start_S = step_S * batch_size(settings, count)
    if settings.balance == "sampler":
        shares_NC = targets_NC / targets_NC.sum(axis=1, keepdims=True)
        chance_N = shares_NC @ _inverse(class_counts(targets_NC)).astype(np.float64)
        rng = np.random.default_rng(derive(seed, "draws", in_round))
        drawn = rng.choice(count, start_S[-1] - start_S[0], p=chance_N / chance_N.sum())
    else:
        epoch_M, place_M = np.divmod(np.arange(start_S[0], start_S[-1]), count)
        drawn = np.empty_like(place_M)
        for epoch in np.unique(epoch_M).tolist():
            order_N = np.random.default_rng(derive(seed, "order", epoch)).permutation(count)
            drawn[epoch_M == epoch] = order_N[place_M[epoch_M == epoch]]
    return np.split(drawn, start_S[1:-1] - start_S[0])


def load_pixels(cells: Cells, index_B: npt.NDArray[np.int64], stain: Stain | None) -> Tensor:
    """Images as uint8 (B, H, W, 3), with the lab's stain put on."""
    pixels_BHW3 = cells.images(index_B)
    return torch.from_numpy(pixels_BHW3 if stain is None else stain.apply(pixels_BHW3))


class _Pull:
    """A strategy's correction on the gradients; see strategies.strategy.Correction."""

    def __init__(self, parameters: Sequence[nn.Parameter], correction: Correction | None) -> None:
        self.parameters = parameters
        self.pull = correction.pull if correction else 0.0
        self.start = [p.detach().clone() for p in parameters] if self.pull else []
        self.offset: list[Tensor] = []
        if correction is not None and correction.offset_P is not None:
            size = sum(p.numel() for p in parameters)
            if correction.offset_P.shape != (size,):
                raise InputError(
                    f"Expected a correction of shape ({size},), found {correction.offset_P.shape}"
                )
            flat_P = torch.from_numpy(np.array(correction.offset_P, np.float32))
            parts = torch.split(flat_P, [p.numel() for p in parameters])
            self.offset = [
                part.view(p.shape).to(p.device) for part, p in zip(parts, parameters, strict=True)
            ]

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        gradients = [p.grad for p in self.parameters]
        for index, gradient in enumerate(gradients):
            assert gradient is not None
            if self.start:
                gradient.add_(self.parameters[index] - self.start[index], alpha=self.pull)
            if self.offset:
                gradient.add_(self.offset[index])


class Momentum:
    """Starts the optimizer's momentum where a strategy says, and tells where it ends.

    Errors: InputError for an optimizer that has none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        settings: Train,
        correction: Correction | None,
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.shared = correction is not None and correction.momentum_P is not None
        if correction is None or correction.momentum_P is None:
            return
        if settings.optimizer != "sgd" or settings.momentum == 0:
            raise InputError(
                f"the strategy shares momentum, and train.optimizer={settings.optimizer} with "
                f"train.momentum={settings.momentum:g} has none to share",
                hint="set train.optimizer=sgd and train.momentum=0.9",
            )
        sizes = [p.numel() for p in parameters]
        if correction.momentum_P.shape != (sum(sizes),):
            raise InputError(
                f"Expected a momentum of shape ({sum(sizes)},), found {correction.momentum_P.shape}"
            )
        flat_P = torch.from_numpy(np.array(correction.momentum_P, np.float32))
        for parameter, part in zip(parameters, torch.split(flat_P, sizes), strict=True):
            # As the parameter lies in memory: kernels are channels last.
            buffer = torch.empty_like(parameter, requires_grad=False)
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(part.view(parameter.shape))

    def at_end(self) -> Float32 | None:
        """The momentum (P,) after the last step, where it was given one."""
        if not self.shared:
            return None
        buffers = [self.optimizer.state[p]["momentum_buffer"] for p in self.parameters]
        momentum_P: Float32 = torch.cat([b.reshape(-1) for b in buffers]).to("cpu").numpy()
        return momentum_P


class Average:
    """Exponential moving average of the weights over the steps of one round."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.step = parameters, decay, 0
        self.mean = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        keep = _kept(self.decay, self.step)
        for mean, parameter in zip(self.mean, self.parameters, strict=False):
            mean.lerp_(parameter, 1 - keep)

    @torch.no_grad()
    def finish(self) -> None:
        for mean, parameter in zip(self.mean, self.parameters, strict=False):
            parameter.copy_(mean)


def _kept(decay: float, step: int) -> float:
    """What an average keeps at a step: a young one forgets faster, or the start would rule it."""
    return min(decay, step / (step + 9))


class Reach:
    """How far a weight goes whose gradient is 1 at every step: learning rates, momentum, average.

    A local path divided by it is the mean gradient along the path, which SCAFFOLD remembers. With
    momentum .9 it is up to ten times the sum of the learning rates. AdamW has no such figure: there
    it is that sum.
    """

    def __init__(self, settings: Train) -> None:
        self.momentum = settings.momentum if settings.optimizer == "sgd" else 0.0
        self.decay, self.steps = settings.ema, 0
        self.velocity, self.at, self.mean = 0.0, 0.0, 0.0

    def step(self, lr: float) -> None:
        """One step of the optimizer at this rate (SGD as torch has it, Nesterov's momentum)."""
        self.steps += 1
        self.velocity = self.momentum * self.velocity + 1
        self.at += lr * (1 + self.momentum * self.velocity)
        keep = _kept(self.decay, self.steps)
        self.mean = keep * self.mean + (1 - keep) * self.at

    @property
    def total(self) -> float:
        return self.mean


class HeadLevel:
    """Keeps the logits of present classes on a level with those of masked ones.

    A softmax over the present classes does not see a shift that all of them share, but an
    optimizer drifts along it: AdamW pushes all of them down, since each is wrong more often than
    right. After the round the masked classes, which never moved, would win. Taking the shared
    part of the change out again leaves the lab's own loss as it is. Not where a strategy adds an
    offset: what that moves is meant (SCAFFOLD moves masked classes as the other labs do).
    """

    def __init__(self, net: nn.Module, present_C: Tensor) -> None:
        self.head = net.get_submodule("head")
        self.rows = torch.nonzero(present_C).flatten()
        self.needed = len(self.rows) < len(present_C)
        self.start = [p.detach()[self.rows].clone() for p in self.head.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Subtract the mean change of the present rows from each of them."""
        if self.needed:
            for parameter, start in zip(self.head.parameters(), self.start, strict=True):
                parameter[self.rows] -= (parameter[self.rows] - start).mean(dim=0)


# --- where and how it is computed


def choose_device(device: str | torch.device) -> torch.device:
    """The device of a plan; ``auto`` takes a GPU where there is one.

    Errors: InputError when a device is asked for that this machine lacks.
    """
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    place = torch.device(device)
    missing = (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()) or (
        place.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InputError(
            f"train.device is {device}, but this machine has none", hint="set train.device=auto"
        )
    return place


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """bfloat16 where ``precision`` allows it and the hardware has it, else float32.

    Errors: InputError when bfloat16 is asked for and would be emulated.
    """
    if precision == "float32":
        return torch.float32
    if has_bfloat16(device):
        return torch.bfloat16
    if precision == "bfloat16":
        raise InputError(
            f"train.precision is bfloat16, but this machine's {device.type} has none",
            hint="set train.precision=auto: float32 where there is no bfloat16",
        )
    return torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here (a CPU with AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # torch has no public question for this; where the private one is gone, float32 is right too.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in questions)


def autocast(
    device: torch.device, precision: torch.dtype
) -> contextlib.AbstractContextManager[Any]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


@contextlib.contextmanager
def steady(threads: int) -> Iterator[None]:
    """What makes training repeat to the bit: the plan's number of threads, on which float sums
    depend, and on a GPU deterministic kernels (on the CPU all that is used here is)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(before)
