"""Virtual labs: who holds what, what is masked, and what each remembers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from cytofed.client.memory import FolderMemory
from cytofed.console import RunProgress
from cytofed.plan import from_dict
from cytofed.simulations import simulate as simulation
from cytofed.simulations.partitions import parse_partition
from cytofed.simulations.simulate import Request
from cytofed.simulations.virtual import VirtualLabs, baseline_plan

Small = Callable[..., Request]
PARTITIONS = ("iid", "dirichlet:0.3", "classes:2", "quantity:1", "acquisition", "iid+missing:1")


def cut(request: Request) -> VirtualLabs:
    """The labs of a request, without training."""
    shutil.rmtree(request.out, ignore_errors=True)
    private = request.out / "checkpoints"
    private.mkdir(parents=True)
    spec = parse_partition(request.plan.simulation.partition)
    cells = simulation._read(request, RunProgress(quiet=True))
    return simulation._cut(request, spec, cells, private)


def paths(labs: VirtualLabs, lab: int, side: int) -> list[str]:
    return sorted(labs.cells.take(labs.rows(lab, side)).paths())


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_image_is_at_one_lab_and_central_trains_on_all(partition: str, small: Small) -> None:
    labs = cut(small(f"simulation.partition={partition}", "simulation.labs=3"))
    for side in (1, 2):
        own = [paths(labs, lab, side) for lab in range(3)]
        assert sorted(chain(*own)) == paths(labs, 3, side), "each once, none twice"
    central = labs.lab(3)
    assert central.name == "central"
    assert sorted(central.train.paths()) == paths(labs, 3, 1)
    kept = len(paths(labs, 3, 1)) + len(paths(labs, 3, 2))
    assert kept == 48 if "missing" not in partition else kept < 48


def test_test_images_depend_on_neither_partition_nor_number_of_labs(small: Small) -> None:
    chosen = set()
    for partition in PARTITIONS:
        for number in (1, 2, 5) if partition in ("iid", "quantity:1") else (3,):
            labs = cut(small(f"simulation.partition={partition}", f"simulation.labs={number}"))
            chosen.add(tuple(paths(labs, number, 2)))
    assert len(chosen) == 1
    assert len(*chosen) >= 4
    other_seed = cut(small("train.seed=1", "simulation.labs=3"))
    assert tuple(paths(other_seed, 3, 2)) not in chosen


def test_classes_without_a_training_image_are_masked_at_their_lab_only(small: Small) -> None:
    labs = cut(small("simulation.partition=classes:2", "simulation.labs=2"))
    for number in (0, 1):
        lab = labs.lab(number)
        held_C = lab.train.targets_NC.any(axis=0)
        assert 0 < held_C.sum() < 4
        assert (lab.absent_C == ~held_C).all()
    everything = labs.lab(2)
    assert (~everything.absent_C).sum() == 4
    unmasked = replace(labs, plan=cut(small("train.mask_absent=none")).plan)
    assert not unmasked.lab(0).absent_C.any()
    declared = replace(labs, plan=cut(small("train.mask_absent=declared")).plan)
    assert not declared.lab(0).absent_C.any(), "the map of these folders declares nothing absent"


def test_calibration_images_are_kept_out_of_training_and_test(small: Small) -> None:
    plain = cut(small(out=small().out.with_name("plain")))
    labs = cut(small("evaluation.calibration=0.25"))
    for number in range(4):  # three labs and central
        lab = labs.lab(number)
        assert lab.calibration is not None
        kept, train, test = (set(c.paths()) for c in (lab.calibration, lab.train, lab.test))
        assert kept
        assert not kept & (train | test)
        assert kept | train == set(plain.lab(number).train.paths())
        assert test == set(plain.lab(number).test.paths())
    assert not (plain.side_N == 3).any()


def test_saved_labs_open_as_they_were(small: Small) -> None:
    labs = cut(small("simulation.partition=dirichlet:0.5+stain:0.5+missing:1", "simulation.labs=3"))
    found = VirtualLabs.load(labs.folder)
    assert (found.plan, found.names) == (labs.plan, labs.names)
    for number in range(4):
        for side in (1, 2):
            assert paths(found, number, side) == paths(labs, number, side)
        before, after = labs.lab(number).train, found.lab(number).train
        rows = np.arange(min(len(before), 3))
        assert (before.images(rows) == after.images(rows)).all(), "the stains are the same too"


def test_stain_changes_a_lab_s_images_and_is_its_own_at_central_too(small: Small) -> None:
    plain = cut(small("simulation.labs=2", out=small().out.with_name("plain")))
    labs = cut(small("simulation.labs=2", "simulation.partition=iid+stain:1"))
    for number in (0, 1):
        cells, before = labs.lab(number).train, plain.lab(number).train
        rows = np.arange(len(cells))
        assert cells.paths() == before.paths()
        assert (cells.images(rows) != before.images(rows)).any()
        central = labs.lab(2).train
        at = [central.paths().index(path) for path in cells.paths()]
        assert (central.images(np.array(at)) == cells.images(rows)).all()


def vector(value: float) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    return {"control": np.full(3, value, np.float32)}


def test_memory_is_that_of_the_round_before_however_often_a_round_is_run(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path, "lab-1")
    assert memory.load("federation", 1) == {}
    memory.save("federation", 1, vector(1))
    memory.save("federation", 2, vector(2))
    memory.save("federation", 2, vector(3))  # the round was run again after a crash
    assert memory.load("federation", 1) == {}
    assert memory.load("federation", 2)["control"].tolist() == [1.0] * 3
    assert memory.load("federation", 3)["control"].tolist() == [3.0] * 3
    assert memory.load("federation", 9)["control"].tolist() == [3.0] * 3


def test_memories_of_labs_and_runs_are_apart_and_few_files(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path, "lab-1")
    for round_ in range(1, 9):
        memory.save("federation", round_, vector(round_))
    assert FolderMemory(tmp_path, "lab-2").load("federation", 9) == {}
    assert memory.load("central", 9) == {}
    assert len(list(tmp_path.rglob("*.safetensors"))) <= 3
    assert memory.load("federation", 8)["control"].tolist() == [7.0] * 3


def test_one_place_has_as_many_epochs_in_rounds_of_one() -> None:
    plan = from_dict(
        {
            "train": {"rounds": 300, "local_epochs": 0.07, "optimizer": "sgd"},
            "strategy": {"name": "fednag"},
        }
    )
    train = baseline_plan(plan).train
    assert train.rounds == 21
    assert train.rounds * train.local_epochs == pytest.approx(300 * 0.07)
    assert baseline_plan(plan).strategy.name == "fedavg"
    whole_epochs = replace(plan, train=replace(plan.train, rounds=5, local_epochs=2.0))
    assert baseline_plan(whole_epochs).train.rounds == 5
