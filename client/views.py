"""Strongly changed views of cell images, for pretraining.

Two labs' images of one kind of cell differ in stain, lamp, focus and scale more than cells of two
kinds may. An encoder that other labs start from has to look past that, so these changes are far
stronger than those of ``augment``.

Shapes: B images of a batch, H W pixels of a frame, S pixels of a view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from cytofed.client.augment import affine, resample, restain
from cytofed.plan import Augment


@dataclass(frozen=True)
class Changes:
    """How strongly views differ. ``place`` has position, scale and stain, as in a plan."""

    place: Augment = field(default_factory=lambda: Augment(shift=0.06, scale=0.4, stain=0.25))
    tint: float = 0.15
    """standard deviation of the logarithm of the light, of each colour and of all at once"""
    blur: float = 1.0
    sharpen: float = 0.8
    """largest step towards, or away from, the mean of 3x3 pixels; on six views of ten"""
    noise: float = 0.02
    """largest standard deviation of a view's noise"""


def views(
    frames_BHW3: Tensor, size_px: int, part: float, changes: Changes, generator: torch.Generator
) -> Tensor:
    """One random view of each frame, float32 (B, 3, S, S) in [0, 1].

    ``frames_BHW3``: uint8. ``part``: side of a view over side of its frame, before any zoom.
    Guarantees: depends on nothing but the arguments; no image touches another's view.
    """
    count = len(frames_BHW3)
    draws_B9 = torch.rand((count, 9), generator=generator)
    stain_B23 = torch.randn((count, 2, 3), generator=generator)
    light_B3 = torch.randn((count, 3), generator=generator)

    frames_B3HW = frames_BHW3.permute(0, 3, 1, 2).to(torch.float32) / 255.0
    images_B3SS = resample(frames_B3HW, part * affine(draws_B9[:, :6], changes.place), size_px)
    images_B3SS = _refocus(images_B3SS, draws_B9[:, 6], draws_B9[:, 7], changes)
    images_B3SS = restain(images_B3SS, changes.place.stain * stain_B23)
    together_B3 = (light_B3 + light_B3[:, :1]) / 2
    images_B3SS = images_B3SS * torch.exp(changes.tint * together_B3)[:, :, None, None]
    noise_B3SS = torch.randn(images_B3SS.shape, generator=generator)
    level_B = changes.noise * draws_B9[:, 8]
    return (images_B3SS + level_B[:, None, None, None] * noise_B3SS).clamp(0, 1)


def _refocus(images_B3SS: Tensor, amount_B: Tensor, chance_B: Tensor, changes: Changes) -> Tensor:
    padded = functional.pad(images_B3SS, (1, 1, 1, 1), mode="replicate")
    soft_B3SS = functional.avg_pool2d(padded, 3, 1)
    share_B = amount_B * (changes.blur + changes.sharpen) - changes.sharpen
    share_B = torch.where(chance_B < 0.6, share_B, 0.0)
    return (images_B3SS + share_B[:, None, None, None] * (soft_B3SS - images_B3SS)).clamp(0, 1)
