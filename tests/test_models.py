"""Nets: start weights, manifests, flat weights and model files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from cytofed import model_file, models
from cytofed.errors import InputError
from cytofed.model_file import ModelInfo
from cytofed.plan import Model, Plan

SMALL = Model(width=8)
INFO = ModelInfo("cytonet", 8, "seven", tuple("ABCDEFG"), 32, 21.6, "ab" * 32)
ARCHS = ["cytonet", "stagenet", "resnet18", "resnet50", "resnext50_32x4d"]


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(5))


def saved(path: Path, classes: int = 7, seed: int = 1) -> Path:
    info = replace(INFO, codes=tuple(f"c{i}" for i in range(classes)))
    models.save_model(path, models.build(SMALL, classes, seed=seed), info)
    return path


# --- nets


def test_same_seed_gives_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (models.build(SMALL, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    every = models.manifest(one, "all")
    np.testing.assert_array_equal(models.flatten(one, every), models.flatten(same, every))
    assert not np.array_equal(models.flatten(one, every), models.flatten(other, every))


@pytest.mark.parametrize("arch", ARCHS)
def test_nets_have_group_norm_no_buffers_and_nothing_in_place(arch: str) -> None:
    net = models.build(Model(arch=arch), 21, seed=0)  # type: ignore[arg-type]
    assert list(net.buffers()) == []
    kinds = {type(module) for module in net.modules()}
    assert nn.GroupNorm in kinds
    assert not any(issubclass(kind, nn.modules.batchnorm._NormBase) for kind in kinds)
    assert not any(getattr(module, "inplace", False) for module in net.modules())
    assert [name for name, _ in net.named_children()][-1] == "head"


def test_every_architecture_of_the_plan_can_be_built() -> None:
    assert set(get_args(get_type_hints(Model)["arch"])) == {*ARCHS, "encoder+head"}
    assert set(models._ENCODERS) == set(ARCHS)


@pytest.mark.parametrize("arch", ["cytonet", "resnet18"])
def test_output_of_an_image_does_not_depend_on_the_others(arch: str) -> None:
    net = models.build(Model(arch=arch), 5, seed=0)  # type: ignore[arg-type]
    batch = images()
    with torch.no_grad():
        together, alone = net(batch), net(batch[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


def test_cytonet_of_the_default_plan_is_well_under_a_million_parameters() -> None:
    net = models.build(Plan().model, 21, seed=0)
    assert sum(p.numel() for p in net.parameters()) < 600_000


def test_features_times_head_is_the_output_of_a_net_that_is_trained() -> None:
    net = with_random_head(models.build(SMALL, 7, seed=0))
    with torch.no_grad():
        torch.testing.assert_close(models.logits(net, images()), net(images()))


def test_prediction_on_a_frozen_encoder_does_not_change_when_the_image_is_turned_or_mirrored() -> (
    None
):
    net = with_random_head(models.build(SMALL, 7, seed=0))
    net.freeze_encoder()
    for turned in (torch.rot90(images(), 1, (2, 3)), images().flip(2), images().transpose(2, 3)):
        torch.testing.assert_close(models.logits(net, turned), models.logits(net, images()))
        assert not torch.allclose(net(turned), net(images()), atol=1e-3)  # a single view's does


def test_views_of_a_plan_are_those_of_its_predictions_and_go_with_the_file(tmp_path: Path) -> None:
    net = with_random_head(models.build(replace(SMALL, views=8), 7, seed=0))
    turned = torch.rot90(images(), 1, (2, 3))
    torch.testing.assert_close(models.logits(net, turned), models.logits(net, images()))
    assert torch.equal(models.logits(net, images(), views=1), net(images()))
    models.save_model(tmp_path / "m.safetensors", net, replace(INFO, views=8))
    again, info = models.load_model(tmp_path / "m.safetensors")
    assert info.views == again.views == 8
    torch.testing.assert_close(models.logits(again, images()), models.logits(net, images()))


@pytest.mark.parametrize("views", [0, -1, 3, 10**9])
def test_file_that_names_other_views_is_damaged(views: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    models.save_model(path, models.build(SMALL, 7, seed=0), replace(INFO, views=views))
    with pytest.raises(InputError, match="metadata is damaged"):
        models.load_model(path)


def test_eight_views_are_all_different_and_the_first_is_the_image() -> None:
    views = list(models.views_of(images(1)))
    assert torch.equal(views[0], images(1))
    assert len({view.numpy().tobytes() for view in views}) == 8


def with_random_head(net: models.Classifier) -> models.Classifier:
    nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(2))
    return net


def test_pixels_become_channels_first_between_0_and_1() -> None:
    pixels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    assert models.images_of(pixels)[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])


# --- manifests and flat weights


def test_manifest_covers_every_parameter_once_in_the_nets_order() -> None:
    net = models.build(SMALL, 7, seed=0)
    every = models.manifest(net, "all")
    assert every.names == tuple(name for name, _ in net.named_parameters())
    assert every.size == sum(p.numel() for p in net.parameters())


def test_roles_are_norm_for_group_norms_and_head_for_the_last_layer() -> None:
    net = models.build(SMALL, 7, seed=0)
    roles = {t.name: t.role for t in models.manifest(net, "all").tensors}
    norms = {n for n, m in net.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {n for n, role in roles.items() if role == "norm"} == {
        f"{norm}.{part}" for norm in norms for part in ("weight", "bias")
    }
    assert {n for n, role in roles.items() if role == "head"} == {"head.weight", "head.bias"}
    assert set(models.manifest(net, "head").names) == {"head.weight", "head.bias"}
    assert {t.role for t in models.manifest(net, "norms").tensors} == {"norm", "head"}


def test_all_of_a_stagenet_is_trained_but_its_projection() -> None:
    net = models.build(Model(arch="stagenet", width=8), 7, seed=0)
    left_out = {n for n, _ in net.named_parameters()} - set(models.manifest(net, "all").names)
    assert left_out == {"encoder.project.weight", "encoder.project.bias"}


def test_manifest_does_not_depend_on_what_was_trained_before() -> None:
    net = models.build(SMALL, 7, seed=0)
    expected = {t: models.manifest(net, t) for t in ("all", "head", "norms")}
    for parameter in net.encoder.parameters():
        parameter.requires_grad_(False)
    assert {t: models.manifest(net, t) for t in ("all", "head", "norms")} == expected


def test_flat_weights_return_unchanged_and_in_logical_order() -> None:
    net = models.build(SMALL, 7, seed=0)
    every = models.manifest(net, "all")
    weights = models.flatten(net, every)
    assert weights.dtype == np.float32
    stem = every.tensors[0]
    expected = dict(net.named_parameters())[stem.name].detach().contiguous().numpy()
    np.testing.assert_array_equal(every.split(weights)[stem.name], expected)
    other = models.build(SMALL, 7, seed=9)
    models.load_flat(other, every, weights)
    np.testing.assert_array_equal(models.flatten(other, every), weights)


def test_flatten_is_a_copy() -> None:
    net = models.build(SMALL, 7, seed=0)
    every = models.manifest(net, "all")
    weights = models.flatten(net, every)
    weights[:] = 0
    assert np.count_nonzero(models.flatten(net, every)) > 0


def test_weights_of_wrong_size_or_not_finite_are_refused() -> None:
    net = models.build(SMALL, 7, seed=0)
    every = models.manifest(net, "all")
    weights = models.flatten(net, every)
    with pytest.raises(InputError, match="Expected weights of shape"):
        models.load_flat(net, every, weights[:-1])
    weights[3] = np.nan
    with pytest.raises(InputError, match="1 values that are NaN"):
        models.load_flat(net, every, weights)


# --- files


def test_saved_model_gives_the_same_output_and_facts(tmp_path: Path) -> None:
    net = models.build(SMALL, 7, seed=3)
    models.save_model(tmp_path / "m.safetensors", net, INFO)
    loaded, info = models.load_model(tmp_path / "m.safetensors")
    assert info == INFO
    with torch.no_grad():
        assert torch.equal(loaded(images()), net(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_model_saved_from_arrays_is_the_same_file(tmp_path: Path) -> None:
    net = models.build(SMALL, 7, seed=3)
    models.save_model(tmp_path / "net", net, INFO)
    models.save_model(tmp_path / "arrays", models.tensors_of(net), INFO)
    assert model_file.read_model(tmp_path / "net")[1] == INFO
    for name, array in model_file.read_model(tmp_path / "arrays")[0].items():
        np.testing.assert_array_equal(array, model_file.read_model(tmp_path / "net")[0][name])


def test_not_finite_weights_are_neither_written_nor_read(tmp_path: Path) -> None:
    arrays = models.tensors_of(models.build(SMALL, 7, seed=3))
    arrays["head.bias"] = np.full(7, np.inf, np.float32)
    with pytest.raises(InputError, match=r"head\.bias has 7 values"):
        models.save_model(tmp_path / "m", arrays, INFO)
    assert not (tmp_path / "m").exists()
    safetensors.numpy.save_file(arrays, tmp_path / "m", metadata=INFO.to_metadata())
    with pytest.raises(InputError, match=r"head\.bias has 7 values"):
        models.load_model(tmp_path / "m")


def test_damaged_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"cannot read model file .*m\.safetensors"):
        models.load_model(path)
    with pytest.raises(InputError, match="no model file"):
        models.load_model(tmp_path / "none")
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="expected model format"):
        models.load_model(tmp_path / "foreign")


def test_start_file_gives_its_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", seed=1)
    net = models.build(replace(SMALL, start=str(path)), 7, seed=2)
    every = models.manifest(net, "all")
    source = models.build(SMALL, 7, seed=1)
    np.testing.assert_array_equal(models.flatten(net, every), models.flatten(source, every))


def test_start_file_with_another_head_keeps_the_encoder_and_warns(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", classes=5, seed=1)
    with pytest.warns(UserWarning, match="5 classes"):
        net = models.build(replace(SMALL, start=str(path)), 7, seed=2)
    source = models.tensors_of(models.build(SMALL, 5, seed=1))
    for name, array in models.tensors_of(net).items():
        if not name.startswith("head."):
            np.testing.assert_array_equal(array, source[name])
    fresh = models.build(SMALL, 7, seed=2)
    assert torch.equal(net.head.weight, fresh.head.weight)


def test_start_file_of_another_net_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m")
    with pytest.raises(InputError, match="cytonet of width 8"):
        models.build(Model(width=16, start=str(path)), 7, seed=0)
    with pytest.raises(InputError, match="resnet18"):
        models.build(Model(arch="resnet18", start=str(path)), 7, seed=0)
    arrays, info = model_file.read_model(path)
    del arrays["head.bias"]
    model_file.write_model(path, arrays, info)
    with pytest.raises(InputError, match=r"no tensor head\.bias"):
        models.build(replace(SMALL, start=str(path)), 7, seed=0)


def test_start_file_with_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m")
    arrays, info = model_file.read_model(path)
    first = next(iter(arrays))
    arrays[first] = arrays[first].reshape(-1)
    model_file.write_model(path, arrays, info)
    with pytest.raises(InputError, match="has shape"):
        models.build(replace(SMALL, start=str(path)), 7, seed=0)


def test_encoder_plus_head_trains_and_exchanges_the_head_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "encoder", classes=5)
    model = Model(arch="encoder+head", start=str(path))
    with pytest.warns(UserWarning, match="5 classes"):
        net = models.build(model, 7, seed=0)
    assert set(models.manifest(net, "all").names) == {"head.weight", "head.bias"}
    assert not any(p.requires_grad for p in net.encoder.parameters())
    with pytest.raises(InputError, match="frozen"):
        models.manifest(net, "norms")
    arch, encoder, width = models.describe(model)
    info = replace(INFO, arch=arch, encoder=encoder, width=width)
    models.save_model(tmp_path / "m", net, info)
    loaded, _ = models.load_model(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(images()), net(images()))
    assert set(models.manifest(loaded, "all").names) == {"head.weight", "head.bias"}


def test_encoder_plus_head_without_an_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="no encoder"):
        models.build(Model(arch="encoder+head"), 7, seed=0)
