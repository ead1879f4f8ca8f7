"""Augmentation: independent, bounded, reproducible, and true to its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cytofed.client.augment import augment
from cytofed.plan import Augment

NONE = Augment(flip=False, rotate=False, shift=0.0, scale=0.0, stain=0.0)
ALL = Augment(flip=True, rotate=True, shift=0.2, scale=0.2, stain=0.2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 6, side: int = 24) -> torch.Tensor:
    """A dark disc off the centre on a bright field, with some noise."""
    noise = torch.randint(0, 30, (count, side, side, 3), generator=generator(9))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = ((y - side // 3) ** 2 + (x - side // 2) ** 2 < (side // 4) ** 2)[None, :, :, None]
    return (torch.where(disc, 60, 200) + noise).to(torch.uint8)


def test_everything_off_is_the_image_itself() -> None:
    batch = pixels()
    expected = batch.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(augment(batch, NONE, generator()), expected)


def test_result_is_float32_channels_first_between_0_and_1() -> None:
    changed = augment(pixels(), ALL, generator())
    assert changed.shape == (6, 3, 24, 24)
    assert changed.dtype == torch.float32
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_black_and_white_stay_finite_and_in_range() -> None:
    batch = torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    batch[1] = 255
    changed = augment(batch, replace(ALL, stain=1.0), generator())
    assert torch.isfinite(changed).all()
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_same_seed_same_images_and_the_global_generator_is_untouched() -> None:
    before = torch.random.get_rng_state()
    one, two = (augment(pixels(), ALL, generator(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one, augment(pixels(), ALL, generator(4)))


def test_an_image_is_changed_the_same_whatever_the_others_show() -> None:
    batch = pixels()
    other = batch.clone()
    other[1:] = 255 - other[1:]
    one, two = (augment(b, ALL, generator()) for b in (batch, other))
    torch.testing.assert_close(one[0], two[0])


def test_images_of_a_batch_are_changed_differently() -> None:
    batch = pixels(1).expand(6, -1, -1, -1)
    changed = augment(batch, ALL, generator())
    assert len({tuple(image.flatten().tolist()) for image in changed}) == 6


def test_settings_do_not_shift_each_others_draws() -> None:
    one, two = generator(), generator()
    augment(pixels(), ALL, one)
    augment(pixels(), NONE, two)
    assert torch.equal(one.get_state(), two.get_state())


def test_flips_alone_give_the_four_mirror_images_exactly() -> None:
    batch = pixels(1).expand(64, -1, -1, -1)
    image = batch[0].permute(2, 0, 1).float() / 255
    mirrors = [image, image.flip(1), image.flip(2), image.flip(1, 2)]
    seen = set()
    for changed in augment(batch, replace(NONE, flip=True), generator()):
        distances = [float((changed - mirror).abs().max()) for mirror in mirrors]
        assert min(distances) < 1e-4
        seen.add(distances.index(min(distances)))
    assert seen == {0, 1, 2, 3}


def test_rotation_keeps_what_lies_around_the_centre() -> None:
    batch = torch.full((8, 24, 24, 3), 220, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(24) - 11.5, torch.arange(24) - 11.5, indexing="ij")
    batch[:, (x**2 + y**2) < 49] = 40
    changed = augment(batch, replace(NONE, rotate=True, flip=True), generator())
    torch.testing.assert_close(
        changed.mean((1, 2, 3)), batch.float().mean((1, 2, 3)) / 255, rtol=0.02, atol=0
    )
    assert (changed[:, :, 12, 12] < 0.2).all()


@pytest.mark.parametrize("shift", [0.1, 0.3])
def test_shift_moves_no_further_than_asked(shift: float) -> None:
    side = 40
    batch = torch.full((64, side, side, 3), 255, dtype=torch.uint8)
    batch[:, 19:21, 19:21] = 0
    dark = 1 - augment(batch, replace(NONE, shift=shift), generator())[:, 0]
    position = torch.arange(side, dtype=torch.float32) + 0.5
    centre_y = (dark.sum(2) * position).sum(1) / dark.sum((1, 2))
    moved = (centre_y - side / 2).abs() / side
    assert moved.max() <= shift + 1e-3
    assert moved.max() > 0.8 * shift


def test_stain_changes_colours_but_not_shapes() -> None:
    batch = pixels()
    changed = augment(batch, replace(NONE, stain=0.2), generator())
    plain = batch.permute(0, 3, 1, 2).float() / 255
    assert (changed - plain).abs().mean() > 0.01
    for before, after in zip(plain, changed, strict=True):
        pair = torch.stack((before.mean(0).flatten(), after.mean(0).flatten()))
        assert torch.corrcoef(pair)[0, 1] > 0.98


def test_stain_gain_is_linear_in_optical_density() -> None:
    """Two pixels of one image: a changed density is an affine function of the density."""
    batch = torch.tensor([[[[200, 190, 210], [100, 80, 150], [141, 123, 177]]]], dtype=torch.uint8)
    middle = torch.sqrt(batch[:, :, 0].double() * batch[:, :, 1].double())
    assert (middle - batch[:, :, 2]).abs().max() < 1
    density = -torch.log(augment(batch, replace(NONE, stain=0.1), generator())[0, :, 0])
    torch.testing.assert_close(
        (density[:, 0] + density[:, 1]) / 2, density[:, 2], rtol=0.03, atol=0
    )
