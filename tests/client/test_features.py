"""Features of frozen encoders: the same wherever they are kept, and found once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cytofed import models
from cytofed.client import features
from cytofed.client.cells import Cells, open_cells
from cytofed.client.features import frozen_features
from cytofed.labels import load_scheme
from cytofed.plan import Model, Train
from cytofed.simulations.partitions import Stain
from cytofed.simulations.virtual import stained

CPU = torch.device("cpu")


@pytest.fixture
def cells(sample: Path, tmp_path: Path) -> Cells:
    whole = open_cells(
        [sample / "marrow"],
        load_scheme("bone-marrow-21"),
        size_px=24,
        field_um=21.6,
        cache_dir=tmp_path / "cache",
    )
    return whole.take(np.arange(0, len(whole), 3))


def frozen(seed: int = 0) -> models.Classifier:
    net = models.build(Model(width=8), 21, seed=seed)
    net.freeze_encoder()
    return net


def kept(cells: Cells) -> list[Path]:
    return sorted(cells.sources[0].file.parent.glob("*.features"))


def test_kept_features_are_those_of_the_encoder_image_by_image(cells: Cells) -> None:
    net = frozen()
    found_NF = frozen_features(net, cells, CPU, Train())
    images = models.images_of(torch.from_numpy(cells.images(np.arange(len(cells)))))
    np.testing.assert_allclose(found_NF, models.features(net, images).numpy(), atol=1e-5)
    assert len(kept(cells)) == 1


def test_features_are_computed_once_even_over_other_selections(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, settings = frozen(), Train()
    first_NF = frozen_features(net, cells.take(np.arange(20)), CPU, settings)
    whole_NF = frozen_features(net, cells, CPU, settings)
    np.testing.assert_array_equal(whole_NF[:20], first_NF)

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(models, "features", never)
    mixed = np.random.default_rng(0).permutation(len(cells))
    np.testing.assert_array_equal(
        frozen_features(frozen(), cells.take(mixed), CPU, settings), whole_NF[mixed]
    )


def test_features_of_an_image_do_not_depend_on_the_others_to_the_bit(cells: Cells) -> None:
    net = frozen()
    whole_NF = features._compute(net, cells, np.arange(len(cells)), CPU)
    mixed = np.random.default_rng(1).permutation(len(cells))[:70]
    np.testing.assert_array_equal(features._compute(net, cells, mixed, CPU), whole_NF[mixed])


def test_another_encoder_has_features_of_its_own(cells: Cells) -> None:
    one_NF = frozen_features(frozen(0), cells, CPU, Train())
    other_NF = frozen_features(frozen(1), cells, CPU, Train())
    assert len(kept(cells)) == 2
    assert not np.allclose(one_NF, other_NF, atol=1e-3)


def test_a_stain_is_seen_and_its_features_are_not_kept(cells: Cells) -> None:
    plain_NF = frozen_features(frozen(), cells, CPU, Train())
    lab_N = np.zeros(len(cells), np.int64)
    none = stained(cells, lab_N, (None,))
    np.testing.assert_array_equal(frozen_features(frozen(), none, CPU, Train()), plain_NF)
    other = stained(cells, lab_N, (Stain((1.3, 0.8, 1.0), (0.0, 0.0, 0.0)),))
    assert not np.allclose(frozen_features(frozen(), other, CPU, Train()), plain_NF, atol=1e-3)
    np.testing.assert_array_equal(frozen_features(frozen(), cells, CPU, Train()), plain_NF)


def test_a_file_cut_short_or_with_rows_unmarked_is_completed(cells: Cells) -> None:
    net = frozen()
    wanted_NF = frozen_features(net, cells, CPU, Train())
    (file,) = kept(cells)
    data = bytearray(file.read_bytes())
    images = len(cells.sources[0].pixels_NHWC)
    data[:400] = bytes(400)  # rows as a killed process leaves them: not written, not marked
    data[-images:] = bytes(images // 2) + data[-images:][images // 2 :]
    file.write_bytes(data)
    np.testing.assert_array_equal(frozen_features(net, cells, CPU, Train()), wanted_NF)
    os.truncate(file, 1000)
    np.testing.assert_array_equal(frozen_features(net, cells, CPU, Train()), wanted_NF)
    np.testing.assert_array_equal(frozen_features(net, cells, CPU, Train()), wanted_NF)


def test_a_disk_that_takes_nothing_costs_no_run(
    cells: Cells, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    one_NF = frozen_features(frozen(), cells, CPU, Train())
    assert "No space left" in caplog.text
    monkeypatch.undo()
    np.testing.assert_array_equal(frozen_features(frozen(), cells, CPU, Train()), one_NF)


def test_no_cells_have_features_of_the_encoders_shape(cells: Cells) -> None:
    nothing = cells.take(np.zeros(0, np.int64))
    net = frozen()
    assert frozen_features(net, nothing, CPU, Train()).shape == (0, net.head.in_features)
    assert not kept(cells)
