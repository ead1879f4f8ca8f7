"""Convolutions as matrix products: the same function, and the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cytofed.client.convolution import FEW_POSITIONS, Convolution, adopt
from cytofed.models import build
from cytofed.plan import Model

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("kernel", "channels"), [(1, (512, 512)), (3, (128, 256)), ((3, 1), (256, 384))]
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_product_is_torchs_convolution_with_its_gradients(
    kernel: int | tuple[int, int],
    channels: tuple[int, int],
    stride: int,
    padding: int | tuple[int, int],
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(*channels, kernel, stride, padding, bias=False).to(memory_format=layout)
    ours = copy.deepcopy(theirs)
    adopt(ours)
    assert isinstance(ours, Convolution)
    images = torch.randn(2, channels[0], 6, 8).contiguous(memory_format=layout).requires_grad_()
    results = []
    for net in (ours, theirs):
        out = net(images)
        assert ("_Product" in type(out.grad_fn).__name__) == (net is ours)
        pull = torch.linspace(-1, 1, out.numel()).view(out.shape).contiguous(memory_format=layout)
        results.append((out, *torch.autograd.grad(out, (images, net.weight), pull)))
    for mine, other in zip(*results, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_adopted_net_has_the_same_weights_names_and_predictions() -> None:
    net = build(Model(arch="resnet18"), 21, seed=0)
    adopted = copy.deepcopy(net)
    adopt(adopted)
    adopt(adopted)
    assert [name for name, _ in net.named_parameters()] == [
        name for name, _ in adopted.named_parameters()
    ]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(images), adopted(images))


@pytest.mark.parametrize("options", [{"bias": True}, {"groups": 2}, {"dilation": 2}, {}])
def test_what_is_not_plain_or_has_few_weights_stays_torchs(options: dict[str, int]) -> None:
    channels = 256 if options else 32  # 32: few weights
    settings: dict[str, Any] = {"bias": False, **options}
    layer = nn.Conv2d(channels, channels, 3, padding=2, **settings)
    adopt(layer)
    images = torch.randn(1, channels, 6, 6, requires_grad=True)
    assert "_Product" not in type(layer(images).grad_fn).__name__


def test_many_positions_stay_torchs() -> None:
    layer = nn.Conv2d(512, 512, 1, bias=False)
    adopt(layer)
    images = torch.randn(FEW_POSITIONS + 1, 512, 1, 1, requires_grad=True)
    assert "_Product" not in type(layer(images).grad_fn).__name__
    assert "_Product" in type(layer(images[1:]).grad_fn).__name__
