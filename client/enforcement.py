"""The approved plan, kept to: may an order be carried out, given what was approved and answered?

An approval is for a plan, not for whatever its coordinator asks in the plan's name: each round of
it, in rising order; scores of the rounds that the plan scores; a repeat now and then, since
machines crash; so many bytes, for so long. Private or not makes no difference.

``permit`` is pure. What it gives is on the disk (``Record``) before any work on the order begins,
so a kill at any moment makes a lab forget nothing. A record that was put back from an earlier day
is caught up with by the egress log, which tells the last round that left (``caught_up``).

That a repeat has the very same answer is the outbox's part, and its price the privacy ledger's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cytofed.client.policy import Entry, bytes_out
from cytofed.client.settings import Limits
from cytofed.errors import RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.plan import Plan
from cytofed.privacy.ledger import AlreadyAnswered, NotApproved
from cytofed.secure_round import STEPS

TRIES = 16
"""how often anything of a plan may be asked for: coordinators crash, and lines break"""

_STEP_BYTES = 1 << 12
"""of a step of secure aggregation, for each lab of the roster, rounded up"""

_MOST_DAYS = 36_500.0


class Beyond(NotApproved):
    """An order that the approved plan does not have."""


@dataclass(frozen=True)
class Approved:
    """What an order is held against: the plan as it was approved, and what it comes to."""

    plan: Plan
    run: str
    since: datetime
    answer_bytes: int
    """of all answers that the plan asks for, each once"""
    max_days: float | None = None
    """the lab's own limit"""

    @staticmethod
    def of(entry: Entry, limits: Limits) -> Approved:
        """An approved offer under the limits of client.yaml as they are now."""
        offer, plan = entry.offer, entry.offer.plan
        update, evaluation = bytes_out(offer, entry.parameters)
        rounds, scored = plan.train.rounds, evaluations(plan)
        steps = len(STEPS) * (rounds + scored) if plan.secure_aggregation.enabled else 0
        return Approved(
            plan,
            offer.run,
            entry.decided_at or entry.offered_at,
            rounds * update + scored * evaluation + steps * len(offer.roster.members) * _STEP_BYTES,
            limits.max_run_days,
        )


@dataclass(frozen=True)
class Asked:
    """An order as its seal places it. ``kind``: train, evaluate or query.secagg."""

    kind: str
    round: int
    slot: int


@dataclass(frozen=True)
class Answered:
    """What was done for one approval so far. ``tries``: of the latest round, by kind.

    ``started_at``: when the first order came; None before.
    """

    started_at: datetime | None = None
    round: int = 0
    tries: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    nbytes: int = 0

    def sent(self, nbytes: int) -> Answered:
        """So many bytes are about to leave."""
        return replace(self, nbytes=self.nbytes + nbytes)

    def to_json(self) -> str:
        started = None if self.started_at is None else self.started_at.isoformat()
        tree = {**self.__dict__, "started_at": started, "tries": dict(self.tries)}
        return json.dumps(tree) + "\n"

    @staticmethod
    def from_json(text: str) -> Answered:
        """Errors: ValueError, KeyError, TypeError for what ``to_json`` did not write."""
        tree: dict[str, Any] = json.loads(text)
        started = tree.pop("started_at")
        numbers = (*tree["tries"].values(), tree["round"], tree["steps"], tree["nbytes"])
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("not a count")
        return Answered(None if started is None else datetime.fromisoformat(started), **tree)


def evaluations(plan: Plan) -> int:
    """How often the plan asks a lab for scores."""
    rounds = range(1, plan.train.rounds + 1)
    return sum(map(plan.scores_after, rounds)) if plan.releases_scores else 0


def permit(
    asked: Asked, approved: Approved, so_far: Answered, *, now: datetime, again: bool = False
) -> Answered:
    """The record once the order is carried out; to be kept before it is.

    ``again``: it was answered, and the same bytes are sent: no new try.
    Errors: Beyond (exit 3) for what the plan does not have, naming it; AlreadyAnswered for a round
    before the latest.
    """
    if why := over(approved, so_far, now=now):
        raise Beyond(f"run {approved.run} is over at this lab: {why}")
    after = replace(so_far, started_at=so_far.started_at or now)
    if asked.kind == "query.secagg":
        return _step(approved, after)
    _refuse_beyond(asked, approved)
    if asked.round < so_far.round:
        raise AlreadyAnswered(
            f"{asked.kind} for round {asked.round} of run {approved.run}: round {so_far.round} "
            "came before it, and rounds only rise"
        )
    if so_far.nbytes > TRIES * approved.answer_bytes:
        raise Beyond(
            f"run {approved.run} has taken {so_far.nbytes} bytes, {TRIES} times what its plan asks "
            "for"
        )
    tries = dict(so_far.tries) if asked.round == so_far.round else {}
    if not again:
        tries[asked.kind] = tries.get(asked.kind, 0) + 1
    if tries.get(asked.kind, 0) > TRIES:
        raise Beyond(
            f"{asked.kind} for round {asked.round} of run {approved.run} was asked for more than "
            f"{TRIES} times"
        )
    return replace(after, round=asked.round, tries=tries)


def over(approved: Approved, so_far: Answered, *, now: datetime) -> str:
    """Why the approval does not hold any more; empty where it does."""
    plan, own = approved.plan, approved.max_days
    if so_far.started_at is None:
        days = plan.cohort.approval_days
        if now > approved.since + _days(days):
            return f"it has not started within cohort.approval_days={days:g} of its approval"
        return ""
    days = longest_days(plan)
    if now > so_far.started_at + _days(days):
        return f"its {plan.train.rounds} rounds take at most {days:.3g} days"
    if own is not None and now > so_far.started_at + _days(own):
        return f"limits.max_run_days is {own:g}"
    return ""


def longest_days(plan: Plan) -> float:
    """After so many days a run is over, however slow: each of its waits once, and the days that its
    labs had to decide, for a coordinator that is down."""
    waits = 2 * (plan.cohort.round_timeout_s + (1 + len(STEPS)) * plan.cohort.wait_s)
    return plan.cohort.approval_days + plan.train.rounds * waits / 86_400


def undecided(entry: Entry, *, now: datetime) -> str:
    """Why nobody can approve a waiting offer any more; empty where they can."""
    days = entry.offer.plan.cohort.approval_days
    if entry.decided_at is None and now > entry.offered_at + _days(days):
        return f"nobody decided within cohort.approval_days={days:g}"
    return ""


def caught_up(so_far: Answered, approved: Approved, *, last_round: int) -> Answered:
    """The record where the egress log has a later round of the run: it was put back, or lost."""
    if last_round <= so_far.round:
        return so_far
    return replace(
        so_far, round=last_round, tries={}, started_at=so_far.started_at or approved.since
    )


@dataclass(frozen=True)
class Record:
    """What was answered under one approval, as a file of its ``folder``."""

    folder: Path

    def load(self) -> Answered:
        """Errors: VerificationError for a file that this lab did not write."""
        try:
            return Answered.from_json(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Answered()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VerificationError(
                f"{self._path} is not what this lab wrote",
                hint="reject the plan: what was answered under its approval is unknown",
            ) from None

    def save(self, answered: Answered) -> None:
        """On the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self._path, answered.to_json(), mode=0o600)

    @property
    def _path(self) -> Path:
        return self.folder / "answered.json"


def _refuse_beyond(asked: Asked, approved: Approved) -> None:
    plan, what = approved.plan, f"{asked.kind} for round {asked.round} of run {approved.run}"
    if not 1 <= asked.round <= plan.train.rounds:
        raise Beyond(f"{what}: the approved plan has rounds 1 to {plan.train.rounds}")
    if asked.kind == "evaluate" and not plan.releases_scores:
        raise Beyond(
            f"{what}: the approved plan releases no scores",
            hint="set evaluation.sigma in the plan",
        )
    if asked.kind == "evaluate" and not plan.scores_after(asked.round):
        raise Beyond(
            f"{what}: the approved plan scores every {plan.evaluated_every} rounds, and the last"
        )
    if asked.slot and not plan.secure_aggregation.enabled:
        raise Beyond(f"{what}, slot {asked.slot}: slots are for secure aggregation")


def _step(approved: Approved, so_far: Answered) -> Answered:
    plan = approved.plan
    if not plan.secure_aggregation.enabled:
        raise Beyond(f"the plan of run {approved.run} has no secure aggregation")
    most = TRIES * len(STEPS) * (plan.train.rounds + evaluations(plan))
    if so_far.steps >= most:
        raise RefusedError(f"run {approved.run} has asked for {most} steps of secure aggregation")
    return replace(so_far, steps=so_far.steps + 1)


def _days(count: float) -> timedelta:
    return timedelta(days=min(count, _MOST_DAYS))
