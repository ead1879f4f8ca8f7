"""A federation of real processes on loopback: one coordinator, labs with folders of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.directory import ClientDirectory

FAULTY = Path(__file__).with_name("faulty.py")

PATIENCE_S = 600.0
"""how long anything may take on a machine that is busy with other things"""

PLAN = """\
name: tiny
labels: {scale: {size_px: 32, field_um: 21.6}}
model: {width: 8}
train: {rounds: 2, steps_per_round: 2, batch: 8}
cohort: {min_labs: 3, wait_s: 300, round_timeout_s: 600}
"""

PRIVATE = PLAN.replace("rounds: 2, steps_per_round: 2", "rounds: 1, steps_per_round: 2") + (
    "privacy: {unit: patient, epsilon: 8, declared_patients: 20}\n"
    "secure_aggregation: {enabled: true}\n"
)


@dataclass
class Federation:
    """Directories and processes below one folder. Whatever runs is killed at the end."""

    root: Path
    labs: tuple[str, ...]
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    def data(self, lab: str) -> Path:
        return self.root / "data" / lab

    def environment(self, who: str) -> dict[str, str]:
        """Each party is a user of its own: nobody shares a ledger."""
        home = {"XDG_STATE_HOME": str(self.root / "state" / who)}
        cache = {"XDG_CACHE_HOME": str(self.root / "cache")}
        return {**os.environ, **home, **cache, "OMP_NUM_THREADS": "1"}

    def run(self, who: str, *command: str | Path, code: int = 0) -> str:
        """One command to its end; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "cytofed.cli", *map(str, command)],
            env=self.environment(who),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert done.returncode == code, f"{command}: {done.returncode} {done.stderr[-2000:]}"
        return done.stdout

    def start(self, who: str, *faults: str, home: Path | None = None) -> subprocess.Popen[bytes]:
        """A process in the background: the coordinator, or a lab by name.

        ``faults``: planted in it, see faulty.py. ``home``: its directory, if not of its name.
        """
        group = "server" if who == "coordinator" else "client"
        command = [str(FAULTY), *faults, "--"] if faults else ["-m", "cytofed.cli"]
        with (self.root / f"{who}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, group, "start", str(home or self.root / who)],
                env=self.environment(who),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.running[home.name if home else who] = process
        if who == "coordinator":
            self.until(self.answers, "the coordinator answers")
        return process

    def kill(self, who: str, number: int = signal.SIGKILL) -> None:
        process = self.running.pop(who)
        process.send_signal(number)
        process.wait(timeout=PATIENCE_S)

    def kill_all(self) -> None:
        for who in list(self.running):
            self.kill(who)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def until(self, happened: Callable[[], Any], what: str) -> Any:
        """What ``happened`` gives, once it gives something. Fails with the logs after a while."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            found = happened()
            if found:
                return found
            time.sleep(0.1)
        ended = {who: p.returncode for who, p in self.running.items() if p.poll() is not None}
        logs = "".join(f"\n--- {f.name}\n{f.read_text()[-1500:]}" for f in self.root.glob("*.log"))
        raise AssertionError(f"waited in vain until {what}; ended by themselves: {ended}{logs}")

    # --- from an empty folder to a finished run

    def found(self) -> None:
        """A coordinator, started, and all labs, joined."""
        address = f"127.0.0.1:{self.port}"
        self.run("coordinator", "server", "init", self.coordinator,
                 "--name", "fed", "--address", address)  # fmt: skip
        settings = self.coordinator / "server.yaml"
        settings.write_text(
            settings.read_text().replace("offer_every_s: 5 ", "offer_every_s: 0.3 ")
        )
        self.start("coordinator")
        for lab in self.labs:
            self.join(lab)

    def join(self, lab: str, *flags: str) -> None:
        invite = self.root / f"{lab}.invite"
        self.run("coordinator", "server", "invite", self.coordinator, lab, "--out", invite)
        self.run(lab, "client", "join", invite, "--dir", self.root / lab,
                 "--data", self.data(lab), *flags)  # fmt: skip

    def queue(self, plan: str) -> tuple[str, str]:
        """Queue a plan; the run's name and the plan's hash."""
        file = self.root / "plan.yaml"
        file.write_text(plan)
        found = json.loads(
            self.run("coordinator", "server", "run", self.coordinator, file, "--json")
        )
        return found["run"], found["plan_sha256"]

    def approve(self, plan_sha256: str, *labs: str) -> None:
        """Approve at the labs, as soon as an offer of the plan has arrived there."""
        for lab in labs or self.labs:
            offer = self.until(partial(self.offered, lab, plan_sha256), f"{lab} has the plan")
            self.run(lab, "client", "approve", self.root / lab, offer)

    def offered(self, lab: str, plan_sha256: str) -> str:
        """The id of the offer that waits at a lab for a plan; empty where there is none."""
        entries = ClientDirectory.open(self.root / lab).plans().entries()
        waiting = [e for e in entries if e.plan_sha256.startswith(plan_sha256) and not e.over]
        return waiting[-1].sha256 if waiting else ""

    def state(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.coordinator / "runs" / run / "state.json").read_text()
        )
        return found

    def summary(self, run: str) -> dict[str, Any]:
        """The summary, once the run has ended."""
        ended = ("completed", "incomplete", "failed")
        self.until(lambda: self.state(run)["phase"] in ended, f"{run} has ended")
        file = self.coordinator / "runs" / run / "summary.json"
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def records(self, run: str) -> list[dict[str, Any]]:
        """metrics.jsonl as far as it is."""
        file = self.coordinator / "runs" / run / "metrics.jsonl"
        text = file.read_text() if file.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def wait_for_model(self, lab: str) -> None:
        results = self.root / lab / "models"
        self.until(lambda: list(results.glob("*/result.json")), f"{lab} has the model")


def result_of(directory: ClientDirectory, run: str) -> Path | None:
    """The result of a run at a lab, once it is there."""
    files = (directory.root / "models").glob("*/result.json")
    return next((file for file in files if json.loads(file.read_text())["run"] == run), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deal(sample: Path, root: Path, labs: tuple[str, ...], *, each: int = 4) -> None:
    """A few shipped images of every class for each lab, no image at two labs."""
    for folder in sorted((sample / "marrow").iterdir()):
        for number, image in enumerate(sorted(folder.glob("*.jpg"))[: each * len(labs)]):
            home = root / "data" / labs[number % len(labs)] / folder.name
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, home / image.name)


@pytest.fixture
def federation(tmp_path: Path, sample: Path) -> Iterator[Federation]:
    """Three labs that have joined a coordinator that runs."""
    labs = ("lab-1", "lab-2", "lab-3")
    deal(sample, tmp_path, labs)
    made = Federation(tmp_path, labs, free_port())
    try:
        made.found()
        yield made
    finally:
        made.kill_all()
