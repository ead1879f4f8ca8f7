"""Views for pretraining: strongly changed, each by itself, always images."""

from __future__ import annotations

import torch
from torch import Tensor

from cytofed.client.views import Changes, views
from cytofed.plan import Augment

STILL = Changes(
    Augment(flip=False, rotate=False, shift=0, scale=0, stain=0), tint=0, blur=0, sharpen=0, noise=0
)


def frames(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, 40, 40, 3), dtype=torch.uint8, generator=generator)


def seen(frames_BHW3: Tensor, changes: Changes, seed: int = 1) -> Tensor:
    return views(frames_BHW3, 24, 0.6, changes, torch.Generator().manual_seed(seed))


def test_without_changes_a_view_is_the_middle_of_the_frame() -> None:
    middle_B3SS = frames()[:, 8:32, 8:32].permute(0, 3, 1, 2) / 255
    # Optical density has no black: 0 becomes 1 of 255.
    torch.testing.assert_close(seen(frames(), STILL), middle_B3SS, atol=1 / 254, rtol=0)


def test_views_are_images_of_the_asked_size_and_differ() -> None:
    first, second = seen(frames(), Changes(), 1), seen(frames(), Changes(), 2)
    assert first.shape == (3, 3, 24, 24)
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.allclose(first, second, atol=0.05)


def test_no_image_touches_the_view_of_another() -> None:
    others = frames().clone()
    others[1:] = 255 - others[1:]
    torch.testing.assert_close(seen(frames(), Changes())[0], seen(others, Changes())[0])
