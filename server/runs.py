"""A run of a coordinator as files: what it is, how far it is, who said what.

::

    runs/RUN/                      0700
        plan.yaml summary.json metrics.jsonl model.safetensors model_card.md
        state.json                 see RunState
        checkpoints/               newest rounds
        private/offer private/start              signed documents
        private/decisions/LAB                    each lab's signed decision
        private/start.safetensors manifest.json  the start model
        private/given.safetensors given.json     the file that it is made from, and its card
        private/given/LAB                        that the lab has that file
        private/delivered/LAB                    that the lab has the result
        private/told/LAB                         that a lab outside the cohort knows it is over
        private/stop private/start-now           what the coordinator's person asked for
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from cytofed.documents import Decision, Offer, Roster
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.files import write_atomically
from cytofed.plan import Plan, dump_plan
from cytofed.privacy.identity import Identity
from cytofed.start import give_start
from cytofed.words import reason_of

Phase = Literal["approval", "rounds", "completed", "incomplete", "failed"]

ENDED = ("completed", "incomplete", "failed")

_STATE = "state.json"


class DamagedRun(CytofedError):
    """The state of a run's folder cannot be read."""


@dataclass(frozen=True)
class RunState:
    """How far a run is. ``reason``: why it ended as it did; ``absent``: labs by name, and why."""

    phase: Phase
    queued_at: str
    started_at: str = ""
    ended_at: str = ""
    reason: str = ""
    stop: str = ""
    """why it was asked to stop"""
    cohort: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @staticmethod
    def create(runs: Path, plan: Plan, roster: Roster, coordinator: Identity) -> RunFolder:
        """Queue a plan for the labs that are enrolled now; a start model is copied.

        Errors: InputError for a start model that cannot be read.
        """
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.name).strip("-._")[:32] or "run"
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = RunFolder(runs / f"{slug}-{stamp}-{secrets.token_hex(2)}")
        folder.root.mkdir(mode=0o700)
        for sub in ("", "/decisions", "/delivered", "/given", "/told"):
            (folder.root / f"private{sub}").mkdir(mode=0o700)
        folder.checkpoints.mkdir(mode=0o700)
        try:
            plan = give_start(plan, folder.private)
        except CytofedError:
            shutil.rmtree(folder.root)
            raise
        write_atomically(folder.root / "plan.yaml", dump_plan(plan))
        offer = Offer(folder.name, plan, roster)
        write_atomically(folder.private / "offer", offer.signed(coordinator))
        folder.save(RunState("approval", now()))  # last: says that the folder is whole
        return folder

    @staticmethod
    def all(runs: Path, *, but: Container[str] = ()) -> list[RunFolder]:
        """All runs but those of these names, in the order in which they were queued.

        Those whose state cannot be read come first.
        """
        names = [entry.name for entry in os.scandir(runs) if entry.name not in but]
        found = [RunFolder(runs / name) for name in names if _is_run(runs / name)]
        return sorted(found, key=lambda folder: (folder._queued_at(), folder.name))

    def _queued_at(self) -> str:
        try:
            return self.state().queued_at
        except DamagedRun:
            return ""

    @staticmethod
    def open(runs: Path, name: str) -> RunFolder:
        """Errors: InputError for an unknown name."""
        folder = RunFolder(runs / name)
        if "/" in name or not (folder.root / _STATE).is_file():
            raise InputError(f"no run {name!r}", hint="`cytofed server status DIR` lists them")
        return folder

    def state(self) -> RunState:
        """Errors: DamagedRun where it cannot be read."""
        try:
            found = json.loads((self.root / _STATE).read_text())
            state = RunState(**{**found, "cohort": tuple(found["cohort"])})
            if state.phase not in get_args(Phase) or not isinstance(state.queued_at, str):
                raise ValueError(f"phase {state.phase!r:.40}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DamagedRun(
                f"run {self.name}: {_STATE} cannot be read: {reason_of(error)}"
            ) from None
        return state

    def save(self, state: RunState) -> None:
        write_atomically(self.root / _STATE, json.dumps(asdict(state), indent=1) + "\n")

    def ask_to_stop(self, why: str) -> None:
        write_atomically(self.private / "stop", why)

    def stop_reason(self) -> str:
        """Why the run was asked to stop, or nothing. It is asked to where the words are damaged."""
        try:
            return (self.private / "stop").read_text(errors="replace") or "asked to stop"
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"asked to stop, why cannot be read: {reason_of(error)}"

    def ask_to_start(self) -> None:
        """Have it start with the labs that have approved it, without waiting for others."""
        write_atomically(self.private / "start-now", now())

    @property
    def asked_to_start(self) -> bool:
        return (self.private / "start-now").is_file()

    def end(
        self,
        phase: Phase,
        *,
        reason: str = "",
        absent: Mapping[str, str] = {},
        cohort: tuple[str, ...] = (),
    ) -> None:
        """The run is over. ``cohort``: where its state, which knows, may be damaged."""
        try:
            state = self.state()
        except DamagedRun:
            state = RunState("failed", now(), cohort=cohort)
        self.save(
            replace(
                state,
                phase=phase,
                ended_at=now(),
                reason=reason,
                absent=dict(absent),
                stop=self.stop_reason(),
            )
        )

    def offer(self, coordinator: Identity) -> Offer:
        return Offer.verified((self.private / "offer").read_bytes(), coordinator.public)

    # --- decisions

    def keep_decision(self, lab: str, document: bytes) -> None:
        """Keep a lab's decision, which was verified."""
        write_atomically(self.private / "decisions" / lab, document)

    def decisions(self, offer: Offer) -> dict[str, tuple[Decision, bytes]]:
        """What the labs said so far."""
        found = {}
        for member in offer.roster.members:
            file = self.private / "decisions" / member.name
            if file.is_file():
                document = file.read_bytes()
                try:
                    decision = Decision.verified(document, member.identity, offer)
                except VerificationError:
                    continue
                found[member.name] = (decision, document)
        return found

    def fix_cohort(self, start: bytes, labs: tuple[str, ...]) -> None:
        """From here on the run has these labs and no others."""
        write_atomically(self.private / "start", start)
        self.save(replace(self.state(), phase="rounds", started_at=now(), cohort=labs))

    # --- results

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """Errors: DamagedRun where it cannot be read."""
        file = self.root / "summary.json"
        if not file.is_file():
            return None
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DamagedRun(
                f"run {self.name}: {file.name} cannot be read: {reason_of(error)}"
            ) from None

    def has_start(self, lab: str) -> bool:
        """Whether the lab has the start model that was given."""
        return (self.private / "given" / lab).is_file()

    def note_start(self, lab: str) -> None:
        write_atomically(self.private / "given" / lab, now())

    def delivered(self, lab: str) -> bool:
        return (self.private / "delivered" / lab).is_file()

    def deliver(self, lab: str) -> None:
        write_atomically(self.private / "delivered" / lab, now())

    def told(self, lab: str) -> bool:
        """Whether a lab outside the cohort knows that the run is over for it."""
        return (self.private / "told" / lab).is_file()

    def tell(self, lab: str) -> None:
        write_atomically(self.private / "told" / lab, now())


def _is_run(folder: Path) -> bool:
    """Whether it has a state, be it one that cannot be read."""
    try:
        return (folder / _STATE).is_file()
    except OSError:
        return True


def now() -> str:
    """UTC, as it stands in files."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
