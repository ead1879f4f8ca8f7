"""Convolutions over few positions as one matrix product.

The last stages of a residual net have maps of 2x2 to 4x4 positions and hundreds of channels. In
private training a pass has one patient's few images, so the weights are far larger than the maps.
There torch's kernels spend most of their time on laying the gradient of the weights out: measured
39 ms a layer (16 images of 2x2, 512 channels, AVX2) where three matrix products take 16.

Shapes: B images, H W pixels, I O channels in and out, Q positions of all images, D = kernel x I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_POSITIONS = 512
MANY_WEIGHTS = 1 << 18
"""within both the product was faster for each shape of ResNet-18 at 64 px; beyond, it is not"""

Pair = tuple[int, int]


class Convolution(nn.Conv2d):
    """``nn.Conv2d``, the same to rounding, that trains faster over few positions on a CPU."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = _pair(self.stride), self.padding
        result: Tensor
        if self._plain and not isinstance(padding, str) and _suits(input, weight):
            height, width = _positions(input, weight, stride, _pair(padding))
            few = len(input) * height * width <= FEW_POSITIONS
            if few and weight.numel() >= MANY_WEIGHTS:
                result = _Product.apply(input, weight, stride, _pair(padding))
                return result
        result = super()._conv_forward(input, weight, bias)
        return result

    @property
    def _plain(self) -> bool:
        return (
            self.bias is None
            and self.groups == 1
            and self.padding_mode == "zeros"
            and set(self.dilation) == {1}
        )


def adopt(net: nn.Module) -> None:
    """Make each ``nn.Conv2d`` of the net a ``Convolution``; names and weights stay."""
    for layer in net.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = Convolution


def _suits(images: Tensor, weight: Tensor) -> bool:
    """Training in float32 on a CPU; evaluation keeps torch's own rounding."""
    return (
        images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images_BIHW: Tensor, weight_OIHW: Tensor, stride: Pair, padding: Pair
    ) -> Tensor:
        height, width = _positions(images_BIHW, weight_OIHW, stride, padding)
        outputs, inputs, *kernel = weight_OIHW.shape
        vertical, horizontal = padding
        padded = functional.pad(
            images_BIHW.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical)
        ).contiguous()
        image, row, column, _ = padded.stride()
        patches_QD = padded.as_strided(
            (len(images_BIHW), height, width, *kernel, inputs),
            (image, stride[0] * row, stride[1] * column, row, column, 1),
        ).reshape(-1, kernel[0] * kernel[1] * inputs)
        ctx.save_for_backward(images_BIHW, weight_OIHW, patches_QD)
        ctx.stride, ctx.padding = stride, padding
        # Channels last, as the net: no copy.
        result_QO = patches_QD @ weight_OIHW.permute(0, 2, 3, 1).reshape(outputs, -1).T
        return result_QO.view(len(images_BIHW), height, width, outputs).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BOHW: Tensor) -> tuple[Tensor | None, ...]:
        images_BIHW, weight_OIHW, patches_QD = ctx.saved_tensors
        outputs, inputs, *kernel = weight_OIHW.shape
        for_images = for_weight = None
        if ctx.needs_input_grad[0]:
            options = ([1, 1], False, [0, 0], 1, [True, False, False])
            for_images = torch.ops.aten.convolution_backward(
                gradient_BOHW, images_BIHW, weight_OIHW, None, ctx.stride, ctx.padding, *options
            )[0]
        if ctx.needs_input_grad[1]:
            gradient_QO = gradient_BOHW.permute(0, 2, 3, 1).reshape(-1, outputs)
            for_weight = (gradient_QO.T @ patches_QD).view(outputs, *kernel, inputs)
            for_weight = for_weight.permute(0, 3, 1, 2)
        return for_images, for_weight, None, None


def _positions(images_BIHW: Tensor, weight_OIHW: Tensor, stride: Pair, padding: Pair) -> Pair:
    """Height and width of the result."""
    sizes, kernel = images_BIHW.shape[2:], weight_OIHW.shape[2:]
    height, width = (
        (size + 2 * pad - side) // step + 1
        for size, pad, side, step in zip(sizes, padding, kernel, stride, strict=True)
    )
    return height, width


def _pair(value: tuple[int, ...]) -> Pair:
    first, second = value
    return first, second
