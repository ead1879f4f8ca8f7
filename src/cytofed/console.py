"""What a person sees: errors, progress and tables on a terminal; nothing of it on stdout's JSON."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cytofed.errors import CytofedError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_error(error: CytofedError) -> None:
    """``cytofed: error: ...`` and, where it helps, ``cytofed: hint: ...`` on stderr."""
    print(f"cytofed: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"cytofed: hint: {error.hint}", file=sys.stderr)


def say(text: str) -> None:
    """One plain line on stdout, never wrapped or coloured."""
    print(text)


def note(text: str) -> None:
    """One plain line on stderr."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


class RunProgress:
    """Live progress of runs on stderr: bars on a terminal, one plain line a round elsewhere.

    It is told what happens (orders, replies, steps, rounds); calls may come from several threads.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = stderr.is_terminal and not quiet
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._shares: dict[str, dict[str, float]] = {}
        self._losses: dict[str, float] = {}
        self._scores: dict[str, str] = {}
        self._started: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stderr,
            transient=True,
            disable=not self._live,
        )

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def reading(self, done: int, total: int) -> None:
        """Images read of the folder at work."""
        with self._lock:
            if "reading" not in self._bars:
                self._bars["reading"] = self._progress.add_task("reading", total=total, what="")
            what = f"{done:,} of {total:,} images"
            self._progress.update(self._bars["reading"], completed=done, total=total, what=what)
            if done == total:
                self._progress.remove_task(self._bars.pop("reading"))

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None:
        with self._lock:
            self._started.setdefault(run, time.monotonic())
            if run not in self._bars:
                self._bars[run] = self._progress.add_task(run, total=rounds, what="")
            self._shares[run] = {}
            what = f"round {round_}/{rounds}: {kind} at {labs} {'lab' if labs == 1 else 'labs'}"
            what += self._scores.get(run, "")
            self._progress.update(self._bars[run], completed=round_ - 1, what=what)

    def step(
        self, run: str, lab: str, *, round_: int, share: float, loss: float, labs: int
    ) -> None:
        """How far one lab's training in the round is, as a share of it."""
        with self._lock:
            if run not in self._bars or run not in self._shares:
                return
            self._shares[run][lab] = share
            done = round_ - 1 + sum(self._shares[run].values()) / max(labs, 1)
            what = f"round {round_}: {lab}, loss {loss:.3f}" if math.isfinite(loss) else lab
            what += self._scores.get(run, "")
            self._progress.update(self._bars[run], completed=done, what=what)

    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None:
        with self._lock:
            if kind == "train" and math.isfinite(loss):
                self._losses[run] = loss
            self._shares.setdefault(run, {})[lab] = 1.0

    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None:
        if not self._quiet:
            note(f"{run} round {round_}: {lab} absent from {kind}: {reason}")

    def round(self, run: str, record: Mapping[str, Any]) -> None:
        with self._lock:
            number = record["round"]
            if run in self._bars:
                self._progress.update(self._bars[run], completed=number)
            score = record.get("global")
            parts = [f"{run} round {number}", f"{len(record['received'])} labs"]
            if run in self._losses:
                parts.append(f"loss {self._losses[run]:.3f}")
            if score:
                self._scores[run] = f", macro F1 {score['macro_f1']:.3f}"
                parts.append(f"macro F1 {score['macro_f1']:.3f}")
            parts.append(f"{record['wall_s']:.1f} s")
        if not self._quiet:
            note(", ".join(parts))
