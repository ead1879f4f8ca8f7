"""The start model: made by a process with torch, read by one without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cytofed.arrays import weights_sha256
from cytofed.errors import InputError
from cytofed.model_file import write_model
from cytofed.plan import Plan, load_plan
from cytofed.start import START_FILE, Start, read_start, write_start

FLAGS = ["model.width=8", "labels.scale.size_px=32"]
PLAN = load_plan("demo", FLAGS)


def start_of(plan: Plan, folder: Path) -> Start:
    folder.mkdir(exist_ok=True)
    write_start(plan, folder)
    found = read_start(folder)
    assert found is not None
    return found


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert read_start(tmp_path) is None


def test_half_written_start_is_none(tmp_path: Path) -> None:
    start_of(PLAN, tmp_path)
    (tmp_path / "manifest.json").unlink()  # it is written last
    assert read_start(tmp_path) is None


def test_start_is_that_of_the_plan_and_its_seed(tmp_path: Path) -> None:
    one = start_of(PLAN, tmp_path / "one")
    two = start_of(PLAN, tmp_path / "two")
    other = start_of(load_plan("demo", [*FLAGS, "train.seed=1"]), tmp_path / "other")
    assert one.manifest == two.manifest == other.manifest
    hashes = [weights_sha256(s.manifest, s.weights_P) for s in (one, two, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (one.info.plan_sha256, one.info.size_px, one.info.width) == (PLAN.sha256, 32, 8)


def test_weights_put_back_are_all_tensors_again(tmp_path: Path) -> None:
    start = start_of(PLAN, tmp_path)
    moved = start.with_weights(start.weights_P + 1)
    assert moved.keys() == start.tensors.keys()
    for name, values in start.tensors.items():
        np.testing.assert_array_equal(moved[name], values + 1)
        assert moved[name].shape == values.shape
    with pytest.raises(InputError):
        start.with_weights(start.weights_P[:-1])


def test_a_class_that_no_lab_trained_is_never_predicted_by_the_released_model(
    tmp_path: Path,
) -> None:
    start = start_of(PLAN, tmp_path)
    trained_P = start.weights_P + 0
    head = start.manifest.split(trained_P)
    head["head.weight"][:7], head["head.bias"][:7] = 0.1, -3
    before_P = trained_P.copy()
    released = start.with_weights(start.released(trained_P))
    np.testing.assert_array_equal(trained_P, before_P)  # training goes on from the same weights
    softmax_C = np.exp(released["head.bias"]) / np.exp(released["head.bias"]).sum()
    assert (softmax_C[7:] < 1e-30).all()
    assert (softmax_C[:7] > 0.1).all()
    for name, values in start.with_weights(trained_P).items():
        same = slice(7) if name == "head.bias" else slice(None)
        np.testing.assert_array_equal(released[name][same], values[same])


def test_an_untrained_model_is_released_as_it_is(tmp_path: Path) -> None:
    start = start_of(PLAN, tmp_path)
    np.testing.assert_array_equal(start.released(start.weights_P), start.weights_P)


def test_training_of_the_head_alone_exchanges_the_head_alone(tmp_path: Path) -> None:
    whole = start_of(PLAN, tmp_path / "whole")
    head = start_of(load_plan("demo", [*FLAGS, "model.trainable=head"]), tmp_path / "head")
    assert {tensor.role for tensor in head.manifest.tensors} == {"head"}
    assert 0 < head.manifest.size < 0.5 * whole.manifest.size
    assert head.tensors.keys() == whole.tensors.keys()
    moved = head.with_weights(head.weights_P + 1)
    same = [name for name in moved if np.array_equal(moved[name], head.tensors[name])]
    assert {*same} == {*head.tensors} - {*head.manifest.names}


def test_workers_that_write_it_at_the_same_time_leave_a_whole_one(tmp_path: Path) -> None:
    start = start_of(PLAN, tmp_path)

    def write(_: int) -> None:
        for _ in range(10):
            write_model(tmp_path / START_FILE, start.tensors, start.info)
            found = read_start(tmp_path)
            assert found is not None
            assert found.weights_P.tobytes() == start.weights_P.tobytes()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", START_FILE}
