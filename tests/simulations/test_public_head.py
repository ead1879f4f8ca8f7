"""A private head's start: scaled features of an encoder and what its own images teach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cytofed import encoder, models
from cytofed.client.cells import open_cells
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.model_file import read_model
from cytofed.plan import Model
from cytofed.simulations import public_head
from cytofed.simulations.pretrain import Recipe, Request, pretrain


@pytest.fixture(scope="module")
def small(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    recipe = Recipe(width=8, size_px=32, epochs=0.5)
    out = folder / "small.safetensors"
    pretrain(Request((sample / "blood",), out, recipe, cache_dir=folder / "cache"), lambda _: None)
    return out


def test_a_public_head_tells_the_images_that_it_was_fitted_to(small: Path, sample: Path) -> None:
    out = small.with_name("with-head.safetensors")
    card = public_head.make(str(small), (sample / "blood",), out)
    assert card == encoder.card_of(out)
    base = encoder.card_of(small)
    assert base is not None
    assert card.images_sha256 == base.images_sha256, "no other image has a part in it"
    weights, _ = read_model(out)
    assert not weights["head.bias"].any(), "how frequent a class is there says nothing here"
    assert models.load_model(out)[0].head.in_features == card.architecture["features"]


def test_a_public_head_is_fitted_to_the_images_of_the_encoders_card_only(
    small: Path, sample: Path
) -> None:
    with pytest.raises(InputError, match="not the images of the card"):
        public_head.make(str(small), (sample / "marrow",), small.with_name("other.safetensors"))


def test_the_shipped_public_head_knows_blood_by_the_features_of_the_shipped_encoder(
    sample: Path, tmp_path: Path
) -> None:
    scheme = load_scheme("bone-marrow-21")
    cells = open_cells(
        (sample / "blood",), scheme, size_px=64, field_um=21.6, cache_dir=tmp_path / "cache"
    )
    exact_N = np.flatnonzero(cells.class_N >= 0)[::4]
    images = models.images_of(torch.from_numpy(cells.images(exact_N)))
    with_head, without = (
        models.build(Model(arch="encoder+head", start=name), 21, seed=0)
        for name in ("blood-head", "blood")
    )
    logits_NC = models.logits(with_head, images)
    right = (logits_NC.argmax(dim=1).numpy() == cells.class_N[exact_N]).mean()
    assert right > 0.7, right
    scale_F = torch.linalg.vector_norm(_project(with_head), dim=1)
    scale_F /= torch.linalg.vector_norm(_project(without), dim=1)
    scaled_NF = models.features(without, images) * scale_F
    torch.testing.assert_close(models.features(with_head, images), scaled_NF, rtol=1e-3, atol=1e-3)


def _project(net: models.Classifier) -> torch.Tensor:
    return net.encoder.get_parameter("project.weight").detach()
