"""Pretraining on the sample that ships: resumable, honest about its images, ready to start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cytofed import models
from cytofed.client.cells import Cells, open_cells
from cytofed.console import RunProgress
from cytofed.encoder import card_of, sha256_of
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.plan import Model, load_plan
from cytofed.simulations.pretrain import (
    _DEVIATION,
    Recipe,
    Request,
    contrastive_loss,
    pretrain,
    whiten,
)
from cytofed.simulations.simulate import Request as SimulationRequest
from cytofed.simulations.simulate import simulate

RECIPE = Recipe(width=8, size_px=32, epochs=2, seed=3)


class Stop(KeyboardInterrupt):
    """Ctrl-C of a test."""


def quiet(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def request_(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("pretrain")
    return Request(
        (sample / "blood",), folder / "blood.safetensors", RECIPE, cache_dir=folder / "cache"
    )


@pytest.fixture(scope="module")
def encoder(request_: Request) -> Path:
    pretrain(request_, quiet)
    return request_.out


def cells_of(request_: Request) -> Cells:
    assert request_.cache_dir is not None
    scheme = load_scheme(request_.scheme)
    return open_cells(
        request_.data, scheme, size_px=32, field_um=21.6, cache_dir=request_.cache_dir
    )


def test_interrupted_pretraining_ends_with_the_same_weights(
    request_: Request, encoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "blood.safetensors"
    told = []

    def stop(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise Stop

    again = replace(request_, out=out, checkpoint_s=0)
    with pytest.raises(Stop):
        pretrain(again, stop)
    with pytest.raises(InputError, match="unfinished"):
        pretrain(again, quiet)
    other = replace(again, resume=True, recipe=replace(RECIPE, lr=1e-3))
    with pytest.raises(InputError, match="recipe"):
        pretrain(other, quiet)
    assert not out.exists()
    pretrain(replace(again, resume=True), quiet)
    assert sha256_of(out) == sha256_of(encoder)


def test_card_names_its_model_and_every_image(request_: Request, encoder: Path) -> None:
    card = card_of(encoder)
    assert card is not None
    assert card.model_sha256 == sha256_of(encoder)
    files = sorted(sha256_of(path) for path in request_.data[0].rglob("*.jpg"))
    platelets = {sha256_of(path) for path in request_.data[0].rglob("PLATELET_*.jpg")}
    assert list(card.images_sha256) == [f for f in files if f not in platelets]
    assert card.recipe["seed"] == 3


@pytest.mark.parametrize("objective", ["supervised", "contrastive"])
def test_each_objective_trains(request_: Request, tmp_path: Path, objective: str) -> None:
    recipe = replace(RECIPE, objective=objective, epochs=0.5)  # type: ignore[arg-type]
    lines: list[str] = []
    pretrain(
        replace(request_, out=tmp_path / "e.safetensors", recipe=recipe, checkpoint_s=0),
        lines.append,
    )
    assert len(lines) == recipe.steps(len(cells_of(request_)))


def test_a_file_that_is_there_is_not_replaced(request_: Request, encoder: Path) -> None:
    before = encoder.read_bytes()
    with pytest.raises(InputError, match="is there already"):
        pretrain(request_, quiet)
    assert encoder.read_bytes() == before


def test_plan_starts_from_the_encoder_frozen_or_not(encoder: Path) -> None:
    start = str(encoder)
    free = models.build(Model(arch="stagenet", width=8, start=start), 7, seed=0)
    head = models.build(Model(arch="encoder+head", start=start), 7, seed=1)
    images = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for ours, others in zip(free.encoder.parameters(), head.encoder.parameters(), strict=True):
        assert torch.equal(ours, others)
    one_view, mean = models.features(free, images), models.features(head, images)
    views = torch.stack([models.features(free, view) for view in models.views_of(images)])
    torch.testing.assert_close(views.mean(dim=0), mean)
    assert torch.equal(one_view, views[0])
    assert models.manifest(head, "all").names == ("head.weight", "head.bias")
    assert not free.head.weight.any()


def test_an_encoder_alone_predicts_nothing(encoder: Path) -> None:
    with pytest.raises(InputError, match="no classes to predict"):
        models.load_model(encoder)


def test_whitened_features_are_uncorrelated_and_of_one_deviation(
    request_: Request, encoder: Path
) -> None:
    net = models.build(Model(arch="encoder+head", start=str(encoder)), 7, seed=0)
    cells = cells_of(request_)
    whiten(net.encoder, cells, replace(RECIPE, ridge=0.0))
    features_NF = models.features(net, models.images_of(torch.from_numpy(all_images(cells))))
    covariance_FF = torch.cov(features_NF.double().T)
    strong = slice(0, 48)  # float32 statistics blur the weakest directions
    torch.testing.assert_close(
        covariance_FF[strong, strong] / _DEVIATION**2,
        torch.eye(48, dtype=torch.double),
        atol=0.02,
        rtol=0,
    )
    assert features_NF.mean(dim=0).abs().max() < 0.05


def test_contrastive_loss_is_least_where_partners_are_nearest() -> None:
    embedded_BE = torch.randn((16, 8), generator=torch.Generator().manual_seed(0))
    paired = contrastive_loss(torch.cat([embedded_BE, embedded_BE]), temperature=0.2)
    crossed = contrastive_loss(torch.cat([embedded_BE, embedded_BE.roll(1, 0)]), temperature=0.2)
    assert paired < crossed


def test_private_run_over_an_image_of_the_card_stops(
    request_: Request, encoder: Path, tmp_path: Path
) -> None:
    changes = [
        "privacy.unit=patient",
        "privacy.epsilon=8",
        "simulation.pseudo_patient_cells=4",
        "model.arch=encoder+head",
        f"model.start={encoder}",
        "labels.scale.size_px=32",
    ]
    asked = SimulationRequest(
        load_plan("demo", changes), tmp_path / "run", request_.data, cache_dir=request_.cache_dir
    )
    with pytest.raises(InputError, match=r"were used to train the encoder .*blood"):
        simulate(asked, RunProgress(quiet=True))


def all_images(cells: Cells) -> np.ndarray:
    return cells.images(np.arange(len(cells)))
