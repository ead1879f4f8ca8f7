"""Local training under differential privacy: patients are drawn, clipped, summed and noised.

The counterpart of ``training.train`` for plans with ``privacy.unit`` patient or image. What the
net, the optimizer and a strategy's correction see is the clipped and noised gradient only.

Guarantees: one image's pixels, augmentation and label touch one unit's gradient only; loss and
counts that are computed on the way stay in the return value for the lab's own log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cytofed import models
from cytofed.arrays import Float32
from cytofed.client import convolution, training
from cytofed.client.augment import augment
from cytofed.client.cells import Cells
from cytofed.client.training import Bools, Objective, Progress
from cytofed.errors import InputError
from cytofed.plan import Plan, Train
from cytofed.privacy.gradients import (
    Mechanism,
    PatientOptimizer,
    Step,
    private_head_step,
    private_step,
)
from cytofed.privacy.noise import Randomness
from cytofed.privacy.sampling import Draw, Rows, Units, draw, units_of
from cytofed.privacy.terms import Terms
from cytofed.seeds import derive
from cytofed.strategies.strategy import Correction


@dataclass(frozen=True)
class PrivatelyTrained:
    """What private training did. ``patients`` and ``non_finite`` are the lab's own knowledge."""

    steps: int
    mean_lr: float
    train_s: float
    patients: int
    non_finite: int


def train_privately(
    net: nn.Module,
    cells: Cells,
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
    settings = plan.train
    place = training.choose_device(device)
    units = units_of(plan.privacy.unit, len(cells), cells.patients_N)
    mechanism = Mechanism(
        terms.training.sigma, terms.max_norm, terms.training.sampling_rate, declared_patients
    )
    steps = terms.training.steps
    started_s = time.perf_counter()
    lr_sum, patients, non_finite = 0.0, 0, 0
    with training.steady(settings.threads):
        net.to(place)
        convolution.adopt(net)
        trained = models.manifest(net, plan.model.trainable)
        parameters = training.select(net, trained)
        inner = training.make_optimizer(parameters, settings)
        optimizer = PatientOptimizer(inner, net, mechanism=mechanism, randomness=randomness)
        average = training.Average(parameters, settings.ema)
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
            lr_sum += lr
            patients, non_finite = patients + done.patients, non_finite + done.non_finite
            if on_step is not None:
                on_step(Progress(step + 1, steps, math.nan, lr))
        average.finish()
        inner.zero_grad(set_to_none=True)
    return PrivatelyTrained(
        steps, lr_sum / steps, time.perf_counter() - started_s, patients, non_finite
    )


def _make_step(
    net: nn.Module,
    cells: Cells,
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
    if features_NF is not None:
        features = torch.from_numpy(features_NF).to(place)
        targets_NC = torch.from_numpy(cells.targets_NC).to(place)
        head = getattr(net, "head")  # noqa: B009  # every net of models.build has one
        masked_C = present_C if absent_C.any() else None

        def head_step(drawn: Draw) -> Step:
            return private_head_step(
                optimizer, drawn, head, features, targets_NC, present_C=masked_C, correction=pull
            )

        return head_step

    objective = Objective(present_C, settings.label_smoothing)
    precision = training.choose_precision(settings.precision, place)
    copies = plan.privacy.multiplicity
    step_seed = 0

    def loss_of(rows_K: Rows) -> Tensor:
        pixels = torch.from_numpy(cells.images(np.repeat(rows_K, copies)))
        # Of the step and the patient's own rows: nobody else moves a patient's augmentation.
        seed = derive(step_seed, "augment", int(rows_K[0])) & 0xFFFFFFFF
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


def frozen_features(
    net: nn.Module, cells: Cells, device: torch.device, settings: Train, *, batch: int = 256
) -> Float32:
    """The encoder's features of all cells, (N, F) float32, without augmentation."""
    parts = []
    with training.steady(settings.threads):
        net.to(device)
        for start in range(0, len(cells), batch):
            index = np.arange(start, min(start + batch, len(cells)))
            images = models.images_of(torch.from_numpy(cells.images(index)).to(device))
            parts.append(models.features(net, images).float().cpu().numpy())
    return np.concatenate(parts)
