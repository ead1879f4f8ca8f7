"""What a person sees: errors, progress and tables on a terminal; nothing of it on stdout's JSON."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from cytofed.errors import CytofedError
from cytofed.words import printable


class _Console(Console):
    """A terminal on which a text is never a command: names and reasons may be anybody's words."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # Every text goes through here, in whatever table or bar it stands.
        return super()._render_buffer(
            part if part.control else part._replace(text=printable(part.text)) for part in buffer
        )


stdout = _Console(highlight=False)
stderr = _Console(stderr=True, highlight=False)


def print_error(error: CytofedError) -> None:
    """``cytofed: error: ...`` and, where it helps, ``cytofed: hint: ...`` on stderr."""
    print(f"cytofed: error: {_shown(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"cytofed: hint: {_shown(error.hint)}", file=sys.stderr)


def _shown(text: str) -> str:
    """In its lines, of which none looks like another message."""
    return "\n  ".join(printable(text).splitlines())


def say(text: str) -> None:
    """One plain line on stdout, never wrapped or coloured."""
    print(printable(text))


def note(text: str) -> None:
    """One plain line on stderr."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


class Commands(click.Group):
    """A group whose help tells what each command does in a whole sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [
            (name, command.get_short_help_str(limit=1000))
            for name, command in shown
            if command is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


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
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[what]}", markup=False),
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

    def warn(self, text: str) -> None:
        if not self._quiet:
            note(f"warning: {text}")

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


class SweepProgress:
    """Live progress of a sweep on stderr: a bar for all runs and a line for each under way.

    Where stderr is no terminal: one plain line for each run that ends. Calls may come from several
    threads.
    """

    def __init__(self, runs: int, *, quiet: bool = False) -> None:
        self._runs, self._quiet = runs, quiet
        self._live = stderr.is_terminal and not quiet
        self._lock = threading.Lock()
        self._done = 0
        self._started: dict[str, float] = {}
        self._lines: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[what]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=stderr,
            transient=True,
            disable=not self._live,
        )
        self._all = self._progress.add_task("sweep", total=runs, what=f"0 of {runs} runs")

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def finished(self, runs: int) -> None:
        """So many were there already."""
        if runs:
            self._add(runs)
            if not self._quiet:
                note(f"{runs} of {self._runs} runs are there already")

    def begin(self, run: str) -> None:
        with self._lock:
            self._started[run] = time.monotonic()
            self._lines[run] = self._progress.add_task(run, total=None, what="reading")

    def line(self, run: str, text: str) -> None:
        """What the process of a run said last."""
        with self._lock:
            if run in self._lines:
                self._progress.update(self._lines[run], what=text[:80])

    def end(self, run: str, row: Mapping[str, Any]) -> None:
        """A run's row is there."""
        with self._lock:
            seconds = time.monotonic() - self._started.pop(run, time.monotonic())
            if run in self._lines:
                self._progress.remove_task(self._lines.pop(run))
        self._add(1)
        if self._quiet:
            return
        score = row.get("macro_f1")
        parts = [f"run {self._done} of {self._runs}", run, str(row["status"])]
        if row.get("error"):
            parts.append(str(row["error"]))
        if score is not None:
            parts.append(f"macro F1 {score:.3f}")
        note(", ".join([*parts, f"{seconds:.0f} s"]))

    def _add(self, runs: int) -> None:
        with self._lock:
            self._done += runs
            what = f"{self._done} of {self._runs} runs"
            self._progress.update(self._all, completed=self._done, what=what)
