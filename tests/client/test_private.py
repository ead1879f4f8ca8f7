"""Private training is training: but for clipping and noise, the same step on the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cytofed import models
from cytofed.client import convolution, private, training
from cytofed.client.convolution import _Product
from cytofed.errors import VerificationError
from cytofed.plan import from_dict
from cytofed.privacy import gradients
from cytofed.privacy.gradients import PatientOptimizer
from cytofed.privacy.noise import SimulatedRandomness
from cytofed.privacy.terms import terms_of

torch.set_num_threads(1)


def test_without_noise_and_clipping_a_private_step_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = []

    def counted(ctx: Any, *inputs: Any) -> Tensor:
        products.append(inputs)
        return forward(ctx, *inputs)

    forward = _Product.forward
    monkeypatch.setattr(_Product, "forward", staticmethod(counted))
    before = torch.random.get_rng_state()
    private.check_training()
    assert len(products) == 2 * 2, "a pass a patient and optimizer goes through the product"
    assert torch.equal(before, torch.random.get_rng_state())


def contiguous_views(flat_P: Tensor, tensors: Any) -> list[Tensor]:
    """As it once was: gradients contiguous, kernels channels last, and a fused optimizer."""
    parts = torch.split(flat_P, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def transposed(ctx: Any, gradient_BOHW: Tensor) -> tuple[Tensor | None, ...]:
    for_images, for_weight, *rest = backward(ctx, gradient_BOHW)
    return for_images, None if for_weight is None else for_weight.mT, *rest


backward = _Product.backward
scale_grad = PatientOptimizer.scale_grad


def divided_twice(self: PatientOptimizer) -> None:
    scale_grad(self)
    self.summed_P.div_(self.expected_batch_size)


def no_nesterov(parameters: Any, settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, settings.lr, settings.momentum)


@pytest.mark.parametrize(
    ("target", "name", "fault", "named"),
    [
        (gradients, "_views", contiguous_views, "sgd, trainable all"),
        (convolution._Product, "backward", staticmethod(transposed), "encoder.3.weight"),
        (PatientOptimizer, "scale_grad", divided_twice, "sgd"),
        (training, "make_optimizer", no_nesterov, "sgd"),
    ],
    ids=["gradients in another order", "a product's gradient", "scale", "another optimizer"],
)
def test_a_step_that_moves_weights_in_another_way_is_caught(
    target: Any, name: str, fault: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, fault)
    with pytest.raises(VerificationError, match="training self-test") as caught:
        private.check_training()
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("sigma", "declared", "schedule"), [(1.5, 50, "cosine"), (9.0, 900, "constant")]
)
def test_noise_moves_a_weight_as_far_as_the_plan_says_whatever_sigma_and_patients(
    sigma: float, declared: int, schedule: str
) -> None:
    plan = from_dict(
        {
            "model": {"trainable": "head"},
            "train": {
                "rounds": 2,
                "steps_per_round": 3,
                "optimizer": "sgd",
                "momentum": 0.0,
                "weight_decay": 0.0,
                "warmup": 0.0,
                "schedule": schedule,
            },
            "privacy": {"unit": "patient", "sigma": sigma, "noise_drift": 0.2},
        }
    )
    terms = terms_of(plan)
    assert terms is not None
    net = models.Classifier(nn.Identity(), features=1000, classes=5)
    net.freeze_encoder()
    for round_ in (1, 2):
        private.train_privately(
            net,
            private._FewCells(),
            plan,
            terms,
            declared_patients=declared,
            randomness=SimulatedRandomness(round_, "drift"),
            progress_start=(round_ - 1) / 2,
            progress_end=round_ / 2,
            absent_C=np.zeros(5, bool),
            features_NF=np.zeros((4, 1000), np.float32),  # a gradient of zero: noise alone moves
            device="cpu",
        )
    assert float(net.head.weight.detach().std()) == pytest.approx(0.2, rel=0.05)
