"""Random changes of cell images: how a cell lies on the slide, and how it was stained.

A cell has no up or down, so flips and any rotation keep its class; shift and scale are the
errors of detection and cropping. All of it is one affine map, sampled once. Stain: the optical
density is unmixed into haematoxylin, eosin and a residual (Ruifrok & Johnston 2001) and each
gets a random gain and offset (Tellez et al. 2019, arXiv:1902.06543); as both steps are linear
they are one 3x3 matrix per image.

Shapes: B images of a batch, H W pixels, 3 colours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from cytofed.plan import Augment

# Optical density of haematoxylin, eosin and (as their cross product) the residual, one a row.
# Romanowsky stains (azure B, eosin Y) differ from H&E, but close in colour; a basis for jitter
# need not fit exactly, since every direction gets its own gain.
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))

# An offset is a change of lamp or glass; it is smaller than a change of stain.
_OFFSET_PER_GAIN = 0.5


def augment(pixels_BHW3: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Randomly changed copies, float32 (B, 3, H, W) in [0, 1].

    Guarantees: depends on nothing but the arguments; each image's change is independent of the
    other images (none of them touches another's pixels); values stay in [0, 1]. With every
    strength 0 and no flips or rotation it is ``pixels / 255``.

    ``pixels_BHW3``: uint8. ``generator``: on the CPU; it advances by the same number of draws
    whatever the settings are.
    """
    count = len(pixels_BHW3)
    draws_B12 = torch.rand((count, 6), generator=generator, dtype=torch.float32)
    normal_B23 = torch.randn((count, 2, 3), generator=generator, dtype=torch.float32)
    device = pixels_BHW3.device
    images_B3HW = pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32) / 255.0
    moves = settings.flip or settings.rotate or settings.shift > 0 or settings.scale > 0
    if moves:
        affine_B23 = affine(draws_B12, settings).to(device)
        images_B3HW = resample(images_B3HW, affine_B23, images_B3HW.shape[2])
    if settings.stain > 0:
        images_B3HW = restain(images_B3HW, (settings.stain * normal_B23).to(device))
    return images_B3HW


def affine(draws_B6: Tensor, settings: Augment) -> Tensor:
    """Maps from output to input coordinates (both -1..1), (B, 2, 3)."""
    zero = torch.zeros_like(draws_B6[:, 0])
    angle_B = 2 * math.pi * draws_B6[:, 0] if settings.rotate else zero
    mirror_B = torch.where(draws_B6[:, 1] < 0.5, -1.0, 1.0) if settings.flip else zero + 1
    upside_B = torch.where(draws_B6[:, 2] < 0.5, -1.0, 1.0) if settings.flip else zero + 1
    # Even on a logarithmic axis: larger is as likely as smaller by the same factor.
    zoom_B = torch.exp((2 * draws_B6[:, 3] - 1) * math.log1p(settings.scale))
    shift_B2 = (2 * draws_B6[:, 4:6] - 1) * 2 * settings.shift
    cosine_B, sine_B = torch.cos(angle_B) * zoom_B, torch.sin(angle_B) * zoom_B
    rows = (
        torch.stack((cosine_B * mirror_B, -sine_B * upside_B, shift_B2[:, 0]), dim=1),
        torch.stack((sine_B * mirror_B, cosine_B * upside_B, shift_B2[:, 1]), dim=1),
    )
    return torch.stack(rows, dim=1)


def resample(images_B3HW: Tensor, affine_B23: Tensor, size_px: int) -> Tensor:
    """The images seen through these maps, (B, 3, size_px, size_px)."""
    x_W = y_H = _centres(size_px, affine_B23)
    # torch's affine_grid multiplies full grids; a sum of a row and a column is 5 times faster.
    row_B2W = affine_B23[:, :, 0, None] * x_W
    column_B2H = affine_B23[:, :, 1, None] * y_H + affine_B23[:, :, 2, None]
    grid_BHW2 = column_B2H.mT[:, :, None] + row_B2W.mT[:, None]
    # Reflection: a border of constant colour would tell the net how the image was turned.
    return functional.grid_sample(
        images_B3HW.contiguous(), grid_BHW2, padding_mode="reflection", align_corners=False
    )


def _centres(count: int, like: Tensor) -> Tensor:
    """Positions of pixel centres between -1 and 1."""
    return (2 * torch.arange(count, dtype=like.dtype, device=like.device) + 1) / count - 1


def restain(images_B3HW: Tensor, jitter_B23: Tensor) -> Tensor:
    """``jitter_B23``: per image the changes of gain and offset of the three stains."""
    stains_33 = functional.normalize(torch.tensor(_STAINS, device=images_B3HW.device), dim=1)
    unmix_33 = torch.linalg.inv(stains_33)
    # With densities as columns, unmixed by the transpose:
    # density' = stains^T diag(1 + gain) unmix^T density + stains^T offset
    gain_B33 = stains_33.T @ ((1 + jitter_B23[:, 0, :, None]) * unmix_33.T)
    offset_B3 = _OFFSET_PER_GAIN * jitter_B23[:, 1] @ stains_33
    # log(intensity) is minus the density; the sign is carried through to spare a pass.
    minus_B3N = images_B3HW.flatten(2).clamp(min=1 / 255).log_()
    minus_B3N = torch.baddbmm(-offset_B3[:, :, None], gain_B33, minus_B3N)
    return minus_B3N.clamp_(max=0.0).exp_().view(images_B3HW.shape)
