"""The start model: made by a process with torch, read by one without."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytofed.arrays import weights_sha256
from cytofed.client.opening import parameters_of
from cytofed.encoder import EncoderCard, Given, refuse_seen
from cytofed.errors import InputError, RefusedError, VerificationError
from cytofed.model_file import write_model
from cytofed.plan import Plan, load_plan
from cytofed.start import (
    GIVEN_FILE,
    START_FILE,
    Start,
    give_start,
    model_of,
    read_start,
    take_start,
    write_start,
)

FLAGS = ["model.width=8", "labels.scale.size_px=32"]
PLAN = load_plan("demo", FLAGS)


def start_of(plan: Plan, folder: Path) -> Start:
    folder.mkdir(exist_ok=True)
    write_start(plan, folder)
    found = read_start(folder)
    assert found is not None
    return found


ENCODER = load_plan("demo", [*FLAGS, "train.seed=5"])
"""whose random weights serve as a file to start from"""


def given_to(folder: Path, *flags: str) -> tuple[Plan, Path]:
    """A plan that starts from a file, as the coordinator queues it, and the file."""
    source = folder / "source"
    start_of(ENCODER, source)
    file = source / START_FILE
    kept = folder / "kept"
    kept.mkdir()
    return give_start(load_plan("demo", [*FLAGS, f"model.start={file}", *flags]), kept), file


HEAD = ("model.arch=encoder+head", "model.trainable=head")


@pytest.mark.parametrize("flags", [(), HEAD])
def test_a_given_start_is_the_one_of_the_file(tmp_path: Path, flags: tuple[str, ...]) -> None:
    plan, file = given_to(tmp_path, *flags)
    plain = start_of(load_plan("demo", [*FLAGS, f"model.start={file}", *flags]), tmp_path / "plain")
    file.unlink()  # it was read when the plan was queued
    found = start_of(plan, tmp_path / "kept")
    assert weights_sha256(found.manifest, found.weights_P) == weights_sha256(
        plain.manifest, plain.weights_P
    )
    assert found.tensors.keys() == plain.tensors.keys()
    assert replace(found.info, plan_sha256="") == replace(plain.info, plan_sha256="")


@pytest.mark.parametrize("flags", [(), HEAD])
def test_a_lab_tells_the_size_before_it_has_the_file(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    plan, _ = given_to(tmp_path, *flags)
    before = parameters_of(plan)
    assert before == start_of(plan, tmp_path / "kept").manifest.size


def test_the_content_of_a_given_start_is_in_the_hash_of_the_plan(tmp_path: Path) -> None:
    plan, file = given_to(tmp_path)
    given = Given.named(plan.model.start)
    assert given == Given("cytonet", 8, hashlib.sha256(file.read_bytes()).hexdigest())
    other = replace(given, sha256="0" * 64)
    assert replace(plan, model=replace(plan.model, start=str(other))).sha256 != plan.sha256


def test_a_start_that_is_not_what_the_plan_names_is_refused_by_both_names(tmp_path: Path) -> None:
    plan, file = given_to(tmp_path)
    given = Given.named(plan.model.start)
    assert given is not None
    start_of(PLAN, tmp_path / "other")
    other = (tmp_path / "other" / START_FILE).read_bytes()
    with pytest.raises(VerificationError, match=given.sha256) as caught:
        take_start(given, tmp_path / "lab", other, b"")
    assert hashlib.sha256(other).hexdigest() in caught.value.message
    assert not (tmp_path / "lab").exists(), "nothing of it is kept"
    take_start(given, tmp_path / "lab", file.read_bytes(), b"")
    (tmp_path / "lab" / GIVEN_FILE).write_bytes(other)  # exchanged on the disk
    with pytest.raises(VerificationError, match=given.sha256):
        start_of(plan, tmp_path / "lab")


def test_a_plan_that_claims_another_net_than_its_start_is_refused(tmp_path: Path) -> None:
    plan, file = given_to(tmp_path)
    given = Given.named(plan.model.start)
    assert given is not None
    with pytest.raises(VerificationError, match="cytonet:8:"):
        take_start(replace(given, width=9), tmp_path / "lab", file.read_bytes(), b"")
    assert not list((tmp_path / "lab").iterdir())


def test_the_card_of_a_start_goes_with_it_and_stops_private_runs_over_its_images(
    tmp_path: Path,
) -> None:
    plan, file = given_to(tmp_path)
    given = Given.named(plan.model.start)
    assert given is not None
    card = EncoderCard("x", "", given.sha256, {}, {}, {}, {}, [], ("a" * 64,))
    card.write(file.with_suffix(".json"))
    folder = tmp_path / "lab"
    take_start(given, folder, file.read_bytes(), file.with_suffix(".json").read_bytes())
    with pytest.raises(InputError, match="1 of 2 images"):
        refuse_seen(model_of(plan, folder).start, ["a" * 64, "b" * 64])
    wrong = replace(card, model_sha256="0" * 64)
    wrong.write(file.with_suffix(".json"))
    with pytest.raises(InputError, match="another model"):
        take_start(given, tmp_path / "l", file.read_bytes(), file.with_suffix(".json").read_bytes())


def test_a_start_that_has_not_come_is_said_to_be_missing(tmp_path: Path) -> None:
    plan, _ = given_to(tmp_path)
    with pytest.raises(RefusedError, match="not come yet"):
        start_of(plan, tmp_path / "lab")


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
