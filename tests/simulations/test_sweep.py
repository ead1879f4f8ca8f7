"""Sweeps: what a file asks for, what is refused before anything runs, and what comes out."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from cytofed.console import SweepProgress
from cytofed.errors import InputError
from cytofed.simulations import sweep as sweeping
from cytofed.simulations.simulate import Request
from cytofed.simulations.sweep import Sweep, SweptRun, read_sweep, run_sweep
from tests.simulations.processes import processes_about

SMALL = Path(__file__).with_name("small.yaml")


class Simulate(Protocol):
    """The fixture ``directly``."""

    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


@pytest.fixture
def desk(few: Path, tmp_path: Path) -> Path:
    """A folder with a plan and images, for sweep files."""
    shutil.copy(SMALL, tmp_path / "small.yaml")
    (tmp_path / "images").symlink_to(few)
    return tmp_path


@pytest.fixture
def read(desk: Path) -> Callable[[str], Sweep]:
    """``read_sweep`` of a text, on the small plan."""

    def made(text: str) -> Sweep:
        file = desk / "sweep.yaml"
        file.write_text("plan: small.yaml\ndata: images\n" + text)
        return read_sweep(file)

    return made


# --- the file


def test_runs_are_the_list_times_the_grid_times_the_seeds(read: Callable[[str], Sweep]) -> None:
    sweep = read(
        "list: [{privacy: {unit: none}}, {privacy: {unit: patient, sigma: 1.5}}]\n"
        "grid: {train.lr: [0.1, 1e-3], labs: [2, 3]}\n"
        "seeds: [4, 7, 9]\n"
    )
    assert sweep.keys == ("privacy.unit", "privacy.sigma", "train.lr", "labs")
    assert len(sweep.runs) == 2 * 2 * 2 * 3
    plans = [run.request.plan for run in sweep.runs]
    assert {(p.privacy.unit, p.privacy.sigma) for p in plans} == {("none", None), ("patient", 1.5)}
    assert {p.train.lr for p in plans} == {0.1, 0.001}
    assert {p.simulation.labs for p in plans} == {2, 3}
    assert [p.train.seed for p in plans[:4]] == [4, 7, 9, 4]
    assert len({run.name for run in sweep.runs}) == len(sweep.runs)


def test_data_plan_labels_patients_partition_can_be_swept(desk: Path) -> None:
    shutil.copytree(desk / "images", desk / "more")
    (desk / "sweep.yaml").write_text(
        "grid:\n  plan: [small.yaml, demo]\n  data: [images, [images, more]]\n"
        "  patients: [may_overlap, 'folder:1']\n  partition: [iid, sources]\n"
        "set: {labels: marrow}\n"
    )
    runs = read_sweep(desk / "sweep.yaml").runs
    assert {run.request.plan.name for run in runs} == {"small", "demo"}
    assert {len(run.request.data) for run in runs} == {1, 2}
    assert {(run.request.plan.patients, run.request.patients) for run in runs} == {
        ("may_overlap", None),
        ("disjoint", "folder:1"),
    }
    # As `simulate --partition sources` does: as many labs as there are sources.
    assert {
        (r.request.plan.simulation.partition, r.request.plan.simulation.labs) for r in runs
    } == {
        ("iid", 3),
        ("sources", None),
    }


def test_a_sweep_that_grows_keeps_the_names_of_its_runs(read: Callable[[str], Sweep]) -> None:
    before = {run.name for run in read("grid: {labs: [2, 3]}\nseeds: 2\n").runs}
    after = {run.name for run in read("grid: {labs: [5, 3, 2]}\nseeds: [5, 1, 0]\n").runs}
    assert before < after


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("grids: {labs: [2]}", "unknown key 'grids'", "did you mean 'grid'?"),
        ("grid: {labz: [2]}", "unknown key 'labz'", "did you mean 'labs'?"),
        ("grid: {train.roundz: [2]}", "unknown key 'train.roundz'", "did you mean 'rounds'?"),
        ("set: {privacy: {epsilom: 2}}", "unknown key 'privacy.epsilom'", "'epsilon'"),
        ("grid: {labs: 3}", "labs of the grid is 3, expected a list", "belongs under set"),
        ("grid: {train.rounds: [two]}", "train.rounds is 'two', expected a whole number", ""),
        ("grid: {train.rounds: [3, 0]}", "with train.rounds=0: Expected train.rounds=0 >= 1", ""),
        ("grid: {partition: [iid, dirichelet]}", "partition=dirichelet", ""),
        ("grid: {privacy.epsilon: [3]}", "privacy.unit is none", "privacy.unit=patient"),
        ("grid: {data: [nowhere]}", "no data folder nowhere", "relative to the sweep file"),
        ("grid: {plan: [nothing]}", "no plan file 'nothing'", "built-in"),
        ("grid: {labels: [nothing]}", "nothing", ""),
        ("list: {labs: 3}", "expected a list", ""),
        ("list: [3]", "list entry 1 is 3", ""),
        ("seeds: [1, 1]", "two runs are the same", "remove one"),
        ("seeds: 0", "seeds is 0", ""),
        ("seeds: yes", "seeds is True", ""),
        ("seeds: 2\ngrid: {seed: [1]}", "the seed is set elsewhere too", ""),
        ("set: {labs: 2}\ngrid: {simulation.labs: [2]}", "simulation.labs is given twice", ""),
        ("list: [{labs: 2}]\ngrid: {labs: [2]}", "simulation.labs is given twice", ""),
        ("seeds: 10000\ngrid: {labs: [2, 3]}", "20,000 runs", ""),
        ("grid: {labs: [2]}\nseeds: 2\ngrid: {labs: [3]}", '"grid" is given twice', "leave one"),
        ("grid: {train.lr: [1], 'train.lr': [2]}", '"grid.train.lr" is given twice', ""),
        ("grid: {train: {lr: [1]}, train.lr: [2]}", "train.lr is given twice in grid", ""),
        ("list: [{privacy.unit: patient, privacy: {unit: none}}]", "is given twice in list", ""),
        ("set: {privacy: {unit: patient}}\ngrid: {privacy: [{unit: none}]}", "and privacy too", ""),
        ("set:\n  privacy:", '"set.privacy" has no value', ""),
        ("set: {privacy: null}", "privacy is empty", ""),
        ("name: a/b", "name is 'a/b'", ""),
        ("grid: [", "not valid YAML", ""),
    ],
)
def test_a_bad_file_is_one_error_before_anything_runs(
    text: str, message: str, hint: str, read: Callable[[str], Sweep]
) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "sweep.yaml" in caught.value.message


# --- running


def failing(sweep: Sweep, out: Path, jobs: int | None) -> dict[str, Any]:
    with SweepProgress(len(sweep.runs), quiet=True) as watch:
        return run_sweep(sweep, out, jobs=jobs, watch=watch)


@pytest.mark.parametrize(
    ("jobs", "threads", "most"), [(64, 1, 3), (None, 1, 3), (2, 1, 2), (8, 2, 1)]
)
def test_never_more_runs_at_once_than_cores(
    jobs: int | None,
    threads: int,
    most: int,
    read: Callable[[str], Sweep],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, peak, lock = 0, 0, threading.Lock()

    def one(_jobs: object, _run: SweptRun) -> str:
        nonlocal now, peak
        with lock:
            now, peak = now + 1, max(peak, now + 1)
        time.sleep(0.02)
        with lock:
            now -= 1
        return "made to fail"

    monkeypatch.setattr(sweeping, "_cores", lambda: 3)
    monkeypatch.setattr(sweeping._Jobs, "_one", one)
    found = failing(read(f"set: {{train.threads: {threads}}}\nseeds: 12"), tmp_path / "out", jobs)
    assert peak == most
    assert found["status"] == "failed"
    assert {row["error"] for row in found["runs"]} == {"made to fail"}


def test_folder_of_another_sweep_is_refused_and_a_grown_one_is_gone_on_with(
    read: Callable[[str], Sweep], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", read("grid: {labs: [2]}")
    sweeping._prepare_folder(first, out, resume=False)
    (out / "runs" / first.runs[0].name).mkdir()
    with pytest.raises(InputError, match="already holds a sweep"):
        sweeping._prepare_folder(first, out, resume=False)
    sweeping._prepare_folder(read("grid: {labs: [3, 2]}"), out, resume=True)
    with pytest.raises(InputError, match="holds another sweep"):
        sweeping._prepare_folder(read("grid: {labs: [3]}"), out, resume=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".sweep.yaml.1234.part").touch()  # while its file was written
    sweeping._prepare_folder(first, tmp_path / "killed", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        sweeping._prepare_folder(first, tmp_path / "full", resume=True)


def test_two_sweeps_in_one_folder_are_refused(
    read: Callable[[str], Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_LOCK_WAIT_S", 0.0)
    sweep, out = read("seeds: 1"), tmp_path / "out"
    sweeping._prepare_folder(sweep, out, resume=False)
    with (
        sweeping._locked(out),
        pytest.raises(InputError, match="another sweep is at work"),
        SweepProgress(1, quiet=True) as watch,
    ):
        run_sweep(sweep, out, resume=True, watch=watch)


# --- killed and resumed


@dataclass
class CommandLine:
    """``cytofed sweep`` in processes of its own."""

    file: Path
    out: Path
    cache: Path

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cytofed.cli", "sweep", str(self.file)]
        return subprocess.Popen(
            [*command, "--out", str(self.out), "--json", "--resume"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(self.cache)},
            # A shell in the background has Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )

    def finish(self) -> tuple[int, dict[str, Any]]:
        process = self.start()
        out, err = process.communicate(timeout=1000)
        assert out, err
        return process.returncode, json.loads(out)

    def wait_until(self, begun: int, process: subprocess.Popen[str]) -> None:
        """Until so many runs have a folder."""
        deadline = time.monotonic() + 250
        while len(list((self.out / "runs").glob("*/checkpoints"))) < begun:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def expected(directly: Simulate, cache_dir: Path, tmp_path: Path) -> Callable[[Sweep], bytes]:
    """The table of a sweep that nothing interrupted, its runs made over another transport."""

    def table(sweep: Sweep) -> bytes:
        whole = tmp_path / "whole"
        sweeping._prepare_folder(sweep, whole, resume=False)
        for run in sweep.runs:
            out = whole / "runs" / run.name
            with contextlib.suppress(InputError):  # a run that fails there, too
                directly(replace(run.request, out=out, cache_dir=cache_dir))
                (out / "report.html").touch()  # it takes longer than the run
        with SweepProgress(len(sweep.runs), quiet=True) as watch:
            run_sweep(sweep, whole, resume=True, watch=watch)
        return (whole / "table.csv").read_bytes()

    return table


def test_killed_and_resumed_sweep_has_the_table_of_one_that_was_not(
    read: Callable[[str], Sweep],
    expected: Callable[[Sweep], bytes],
    desk: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = read("list: [{labs: 2}, {labs: 3}, {partition: 'classes:9'}]\n")
    line = CommandLine(desk / "sweep.yaml", desk / "out", cache_dir)
    process = line.start()
    line.wait_until(1, process)
    time.sleep(random.uniform(0, 2))
    process.kill()
    process.communicate(timeout=20)
    code, found = line.finish()
    assert code == 4
    assert [row["status"] for row in found["runs"]] == ["completed", "completed", "failed"]
    assert "classes:9" in found["runs"][2]["error"]
    errors = {row["run"]: row["error"] for row in found["runs"]}
    monkeypatch.setattr(sweeping._Jobs, "_one", lambda _self, run: errors[run.name])
    assert (desk / "out" / "table.csv").read_bytes() == expected(sweep)
    assert processes_about(line.out) == []


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_24_runs_killed_again_and_again_give_the_identical_table(
    read: Callable[[str], Sweep],
    expected: Callable[[Sweep], bytes],
    desk: Path,
    cache_dir: Path,
) -> None:
    sweep = read(
        "list: [{privacy.unit: none}, {privacy: {unit: patient, epsilon: 8}}]\n"
        "grid: {labs: [2, 3], secure_aggregation.enabled: [false]}\n"
        "seeds: 6\n"
    )
    assert len(sweep.runs) == 24
    line = CommandLine(desk / "sweep.yaml", desk / "out", cache_dir)
    chance = random.Random(seed := random.randrange(10**6))
    print(f"kill moments drawn from seed {seed}")  # shown when the test fails
    for begun in (1, 5, 14):
        process = line.start()
        line.wait_until(begun, process)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        process.communicate(timeout=20)
    process = line.start()
    line.wait_until(18, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-2:] == [
        "cytofed: error: interrupted",
        f"cytofed: hint: go on with: cytofed sweep {line.file} --resume --out {line.out}",
    ]
    assert processes_about(line.out) == []
    code, found = line.finish()
    assert code == 0
    assert found["status"] == "completed"
    assert (desk / "out" / "table.csv").read_bytes() == expected(sweep)
