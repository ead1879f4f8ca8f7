"""kill -9 or Ctrl-C at any moment, then --resume: the same weights as uninterrupted.

The command line itself is started, killed and started again; what it must end with is computed
here, over another transport.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from cytofed.plan import dump_plan
from cytofed.simulations.simulate import Request
from tests.simulations.processes import processes_about

Small = Callable[..., Request]


class Simulate(Protocol):
    """The fixture ``directly``."""

    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


@dataclass
class CommandLine:
    """``cytofed simulate`` on one request, in processes of its own."""

    request: Request
    home: Path

    def start(self, *, resume: bool) -> subprocess.Popen[str]:
        plan_file = self.home / "plan.yaml"
        plan_file.write_text(dump_plan(self.request.plan))
        flags = ["--data", str(self.request.data[0]), "--jobs", "1", "--json"]
        command = [sys.executable, "-m", "cytofed.cli", "simulate", str(plan_file), *flags]
        return subprocess.Popen(
            [*command, "--out", str(self.request.out), *(["--resume"] if resume else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(self.home / "cache")},
            # A shell in the background has Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )

    def finish(self) -> dict[str, Any]:
        process = self.start(resume=True)
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def wait_for_round(self, number: int, process: subprocess.Popen[str]) -> None:
        """Until round ``number`` is checkpointed; its process must still be running."""
        file = self.request.out / "checkpoints" / "federation" / f"round-{number:05d}.safetensors"
        deadline = time.monotonic() + 200
        while not file.is_file():
            assert process.poll() is None, "the run ended before its round came"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def assert_no_worker_is_left(self) -> None:
        deadline = time.monotonic() + 20
        while processes_about(self.request.out):
            assert time.monotonic() < deadline, f"left behind: {processes_about(self.request.out)}"
            time.sleep(0.05)


@pytest.fixture
def begin(
    small: Small, directly: Simulate, tmp_path: Path
) -> Callable[[str], tuple[CommandLine, str]]:
    """A run to be interrupted and the hash that it must end with."""

    def made(strategy: str) -> tuple[CommandLine, str]:
        flags = ("train.rounds=8", "simulation.labs=2", f"strategy.name={strategy}")
        whole = directly(small(*flags, out=tmp_path / "whole"))
        return CommandLine(small(*flags), tmp_path), whole["weights_sha256"]

    return made


def kill_and_resume(run: CommandLine, kills: int, seed: int) -> dict[str, Any]:
    """Kill at random moments: during start-up, in a round, or just after a checkpoint."""
    chance = random.Random(seed)
    print(f"kill moments drawn from seed {seed}")  # shown when the test fails
    resume = False
    for number in range(kills):
        process = run.start(resume=resume)
        resume = True
        if chance.random() < 0.7:
            run.wait_for_round(min(1 + 2 * number, 7), process)
            time.sleep(chance.uniform(0, 0.1))
        else:
            time.sleep(chance.uniform(0, 3))
        process.kill()
        process.communicate(timeout=20)
        run.assert_no_worker_is_left()
    return run.finish()


Begin = Callable[[str], tuple[CommandLine, str]]


def test_kill_9_and_resume_give_the_weights_of_an_uninterrupted_run(begin: Begin) -> None:
    run, expected = begin("scaffold")  # its labs remember their control variates
    summary = kill_and_resume(run, 2, random.randrange(10**6))
    assert summary["weights_sha256"] == expected
    assert summary["status"] == "completed"
    assert [entry["round"] for entry in summary["participation"]] == [*range(1, 9)]


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_ten_kills_and_resume_give_the_weights_of_an_uninterrupted_run(
    strategy: str, begin: Begin
) -> None:
    run, expected = begin(strategy)
    assert kill_and_resume(run, 10, random.randrange(10**6))["weights_sha256"] == expected


def test_ctrl_c_says_how_to_go_on_and_the_run_does_though_it_is_killed_again(
    begin: Begin,
) -> None:
    run, expected = begin("local_norms")  # its labs remember their own layers
    process = run.start(resume=False)
    run.wait_for_round(2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("cytofed:")]
    assert lines == [
        "cytofed: error: interrupted",
        f"cytofed: hint: go on with: cytofed simulate --resume --out {run.request.out}",
    ]
    assert "Traceback" not in err
    run.assert_no_worker_is_left()
    process = run.start(resume=True)
    run.wait_for_round(5, process)
    process.kill()
    process.communicate(timeout=20)
    assert run.finish()["weights_sha256"] == expected
