"""A lab's privacy ledger: what was spent on its patients, over everything it ever took part in.

One SQLite file for all federations of a machine's user; each entry belongs to a *patient pool*
that the lab names. Entries are only appended and each carries the hash of all before it, so a
changed byte is found, and a file restored from a backup is noticed when a peer shows a later
head. The state is what replaying the entries gives; there is no other.

The order of things is what makes a crash overstate the spend, never understate it::

    hold     at approval      the plan's full price is set aside
    reserve  before training  a round is spent, on disk, before the first gradient
    release  before sending   the one update of the round that may leave
    settle   after sending
    free     on reject, leave, run's end: what was never reserved

Every use of the patients is an entry. One without differential privacy leaves their epsilon
unbounded from then on; one that protects single images counts for a patient with as many as the
lab says that one has at most. What it all costs is one number, by ``accounting.spend``.

No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.privacy.accounting import (
    Event,
    Gaussian,
    Guarantee,
    NonPrivate,
    PlanCost,
    PlanUse,
    Unit,
    event_from_dict,
    event_to_dict,
    in_unit,
    max_rounds,
    shown,
    spend,
    times,
)

VERSION = 1
BUSY_S = 30.0
YEAR = timedelta(days=365)

Task = Literal["train", "evaluate"]


class LedgerRolledBack(VerificationError):
    """A peer saw a head that this ledger does not have: the ledger is older than what was sent."""


class LedgerMissing(VerificationError):
    """There is no ledger where there must be one. A new one would be a fresh budget."""


class OverBudget(RefusedError):
    """A plan or round would pass the lab's limit."""

    def __init__(self, message: str, *, hint: str = "", fitting_rounds: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.fitting_rounds = fitting_rounds


class NotApproved(RefusedError):
    """No approval of this lab covers the order."""


class AlreadyAnswered(RefusedError):
    """The order's round was answered, with other weights, or is past."""


@dataclass(frozen=True)
class Limits:
    """A lab's own limits, from its client.yaml. None is no limit.

    ``delta`` is the lab's own: all epsilons of the ledger are stated at it. Without one, it is
    the smallest delta of any plan approved here.
    """

    epsilon: float | None = None
    epsilon_per_year: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "epsilon_per_year"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"Expected limit {name}={value:g} > 0")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"Expected 0 < limit delta={self.delta:g} < 1")

    @property
    def any(self) -> bool:
        return self.epsilon is not None or self.epsilon_per_year is not None


@dataclass(frozen=True)
class Order:
    """What a coordinator asks of this lab, as the ledger sees it.

    ``order_sha256`` covers the whole order; ``slot`` is the attempt within a round.
    """

    federation: str
    run: str
    round: int
    slot: int
    plan_sha256: str
    weights_sha256: str
    order_sha256: str
    task: Task = "train"


@dataclass(frozen=True)
class Hold:
    """A plan's price, set aside. ``id`` is kept with the approval: see ``restore_charge``."""

    id: str
    federation: str
    plan_sha256: str
    cost: PlanCost
    run: str | None = None
    """the run that draws on it; one approval pays for one run"""
    reserved: Mapping[Task, int] = field(default_factory=dict)
    state: Literal["active", "freed", "charged"] = "active"

    @property
    def remaining(self) -> Mapping[Task, int]:
        if self.state != "active":
            return {"train": 0, "evaluate": 0}
        allowed: dict[Task, int] = {"train": self.cost.rounds, "evaluate": self.cost.evaluations}
        return {task: count - self.reserved.get(task, 0) for task, count in allowed.items()}

    def remaining_events(self) -> tuple[Event, ...]:
        return tuple(
            times(event, count)
            for task, count in self.remaining.items()
            if count and (event := event_of(self.cost, task)) is not None
        )


@dataclass(frozen=True)
class Reservation:
    """The ledger's yes to an order.

    ``state`` says what to do: "new": train. "retry": the very same order again; send the same
    bytes, or train when ``release_sha256`` is None: nothing has left yet. "next_slot": mask the
    round's same update anew (or train, as before).
    """

    state: Literal["new", "retry", "next_slot"]
    release_sha256: str | None
    head: str


@dataclass(frozen=True)
class Unbounded:
    """The first use of the patients that nothing bounds."""

    since: datetime
    run: str

    def to_json(self) -> dict[str, Any]:
        return {"since": self.since.isoformat(), "run": self.run}

    def __str__(self) -> str:
        return f"unbounded since {self.since:%Y-%m-%d}, run {self.run}"


@dataclass(frozen=True)
class Balance:
    """At the lab's own delta, by ``accounting.spend``. ``total`` is spent and held together."""

    spent: Guarantee
    held: Guarantee
    total: Guarantee
    last_year: Guarantee
    unbounded: Unbounded | None = None

    def told(self, guarantee: Guarantee) -> str:
        """An epsilon of this balance in words, since when there is none where there is none."""
        if math.isfinite(guarantee.epsilon):
            return str(guarantee)
        return "unbounded" if self.unbounded is None else str(self.unbounded)


def event_of(cost: PlanCost, task: Task) -> Event | None:
    """What one order of ``task`` spends; None where the plan releases nothing by it."""
    if task == "train":
        return cost.training
    return NonPrivate(cost.unit) if cost.unit == "none" else cost.evaluation


@dataclass(frozen=True)
class _Entry:
    at: datetime
    pool: str
    kind: str
    body: Mapping[str, Any]
    hash: str


@dataclass
class _Round:
    """A round as replayed; the last slot is the only one that may be asked for again."""

    order: Order
    hold: str
    orders: dict[int, str]
    event: Event
    at: datetime
    release_sha256: str | None = None
    settled: bool = False


@dataclass(frozen=True)
class _Charge:
    """What is counted as spent after a rollback, of the hold that it was approved by."""

    at: datetime
    hold: str
    plan_sha256: str
    run: str
    event: Event


_RoundKey = tuple[str, str, str, Task, int]
"""federation, run, plan: a run that is approved with another plan pays for its rounds anew"""


class _State:
    """One pool's entries, replayed."""

    def __init__(self) -> None:
        self.holds: dict[str, Hold] = {}
        self.rounds: dict[_RoundKey, _Round] = {}
        self.charges: list[_Charge] = []

    def apply(self, entry: _Entry) -> None:
        body = entry.body
        match entry.kind:
            case "hold":
                cost = _cost_from_dict(body["cost"])
                self.holds[entry.hash] = Hold(
                    entry.hash, body["federation"], body["plan_sha256"], cost
                )
            case "reserve":
                order = Order(**body["order"])
                hold = self.holds[body["hold"]]
                reserved = dict(hold.reserved)
                reserved[order.task] = reserved.get(order.task, 0) + 1
                self.holds[hold.id] = replace(hold, run=order.run, reserved=reserved)
                self.rounds[_key(order)] = _Round(
                    order,
                    hold.id,
                    {order.slot: order.order_sha256},
                    event_from_dict(body["event"]),
                    entry.at,
                )
            case "slot":
                order = Order(**body["order"])
                self.rounds[_key(order)].orders[order.slot] = order.order_sha256
            case "release":
                self.rounds[_key(Order(**body["order"]))].release_sha256 = body["update_sha256"]
            case "settle":
                self.rounds[_key(Order(**body["order"]))].settled = True
            case "free":
                for hold_id in body["holds"]:
                    self.holds[hold_id] = replace(self.holds[hold_id], state="freed")
            case "restore":
                for hold_id in body["holds"]:
                    self.holds[hold_id] = replace(self.holds[hold_id], state="charged")
                for number, charge in enumerate(body["charges"]):
                    self.charges.append(
                        _Charge(
                            entry.at,
                            charge.get("hold", f"{entry.hash} {number}"),
                            charge["plan_sha256"],
                            charge.get("run", f"of plan {charge['plan_sha256'][:12]}"),
                            event_from_dict(charge["event"]),
                        )
                    )
            case "open":
                pass
            case _:
                raise InputError(
                    f"ledger entry {entry.kind!r} is unknown to this version of cytofed",
                    hint="use the version that wrote it, or a later one",
                )

    def uses(
        self, unit: Unit, *, spent: bool = True, held: bool = False, since: datetime | None = None
    ) -> dict[str, PlanUse]:
        """By hold, what counts of each plan in ``unit``."""
        used: dict[str, list[Event]] = {}
        if spent:
            for known in self.rounds.values():
                if since is None or known.at >= since:
                    used.setdefault(known.hold, []).append(known.event)
            for charge in self.charges:
                if since is None or charge.at >= since:
                    used.setdefault(charge.hold, []).append(charge.event)
        if held:
            for hold in self.holds.values():
                used.setdefault(hold.id, []).extend(hold.remaining_events())
        return {key: self._use(key, events, unit) for key, events in used.items() if events}

    def _use(self, key: str, events: Sequence[Event], unit: Unit) -> PlanUse:
        hold = self.holds.get(key)
        images = None if hold is None else hold.cost.images_per_patient
        used = tuple(in_unit(event, unit, images) for event in events)
        return PlanUse(used if hold is None else hold.cost.events_in(unit), used)

    def unbounded(self, unit: Unit, since: datetime | None = None) -> Unbounded | None:
        """The first of what was spent that has no bound in ``unit``."""
        dated = [(r.at, r.order.run, r.hold, r.event) for r in self.rounds.values()]
        dated += [(c.at, c.run, c.hold, c.event) for c in self.charges]
        for at, run, key, event in sorted(dated, key=lambda one: one[0]):
            known = self._use(key, [event], unit).used[0]
            late = since is None or at >= since
            if late and (isinstance(known, NonPrivate) or known.sigma == 0):
                return Unbounded(at, run)
        return None


class Ledger:
    """An open ledger, seen by one patient pool. Safe for threads and concurrent processes.

    Every method that changes something is one transaction, on disk when it returns. A ledger
    that cannot be written raises, and the round does not start.
    """

    def __init__(
        self,
        path: Path,
        *,
        pool: str,
        limits: Limits,
        unit: Unit,
        clock: Callable[[], datetime],
    ) -> None:
        self.path = path
        self.pool = pool
        self.limits = limits
        self.unit = unit
        self._clock = clock
        self._lock = threading.RLock()
        self._hashes: list[str] = []
        self._positions: dict[str, int] = {}
        self._accepted: set[str] = set()
        self._last_at = datetime.min.replace(tzinfo=UTC)
        self._states: dict[str, _State] = {}
        with _sqlite_errors(path):
            stat = path.stat()
            self._file = (stat.st_dev, stat.st_ino)
            self._db = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                _configure(self._db)
                self._check_pages()
                self._read_new()
            except BaseException:
                self._db.close()
                raise

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty ledger unless there is one. Done once, when a lab joins."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with _sqlite_errors(path):
            db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            try:
                _configure(db)
                db.execute("BEGIN IMMEDIATE")
                if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _SCHEMA:
                        db.execute(statement)
                    # The nonce makes two ledgers' heads differ from the start.
                    body = {"version": VERSION, "nonce": secrets.token_hex(16)}
                    entry = _canonical(datetime.now(UTC), "", "open", body)
                    db.execute("INSERT INTO entries VALUES (1, ?, ?)", (entry, _link("", entry)))
                db.execute("COMMIT")
            finally:
                db.close()
        _sync_folder(path.parent)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        pool: str = "default",
        limits: Limits | None = None,
        unit: Unit = "patient",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Self:
        """Open and verify an existing ledger for one pool.

        Errors: LedgerMissing; VerificationError where the chain does not hold.
        """
        if not path.is_file() or path.stat().st_size == 0:
            raise LedgerMissing(
                f"no privacy ledger at {path}: what was spent on these patients is unknown",
                hint="restore the file, then run `cytofed client budget DIR --restore-charge`",
            )
        return cls(path, pool=pool, limits=limits or Limits(), unit=unit, clock=clock)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}, pool={self.pool!r})"

    @property
    def head(self) -> str:
        """Hash of the last entry and all before it; every update carries it."""
        with self._transaction(write=False):
            return self._hashes[-1]

    def check_head(self, head: str) -> Literal["none", "current", "older"]:
        """Compare with the last head that a coordinator, or the egress log, saw of this lab.

        "none" is the empty head of a peer that has seen none; "older" is a peer that is behind,
        which may be a restored coordinator.
        Errors: LedgerRolledBack when the head is not in the chain.
        """
        if not head:
            return "none"
        with self._transaction(write=False):
            if head == self._hashes[-1]:
                return "current"
            if head in self._positions or head in self._accepted:
                return "older"
        raise LedgerRolledBack(
            f"the privacy ledger {self.path} does not have the head {head[:12]} that was sent: "
            "it is older than what left this lab",
            hint="put the latest ledger back, or charge all approved plans in full with "
            "`cytofed client budget DIR --restore-charge`",
        )

    def hold(self, *, federation: str, plan_sha256: str, cost: PlanCost) -> Hold:
        """Set a plan's full price aside, which is ``price`` of it. Called by approval.

        Approving again while a hold is active changes nothing.
        Errors: OverBudget (exit 3) with the price and the largest number of rounds that fits;
        RefusedError for a plan that protects nobody where a limit is set.
        """
        with self._transaction() as append:
            state = self._state
            for hold in state.holds.values():
                same = (hold.federation, hold.plan_sha256) == (federation, plan_sha256)
                if same and hold.cost == cost and hold.remaining["train"]:
                    return hold
            self._refuse_over_budget(plan_sha256, cost)
            # Approved before at another price, and no run has drawn on it: this takes its place.
            outdated = [
                hold.id
                for hold in state.holds.values()
                if (hold.federation, hold.plan_sha256) == (federation, plan_sha256)
                and hold.state == "active"
                and hold.run is None
            ]
            if outdated:
                append("free", {"holds": outdated, "reason": "approved anew"})
            entry = append(
                "hold",
                {
                    "federation": federation,
                    "plan_sha256": plan_sha256,
                    "cost": _cost_to_dict(cost),
                },
            )
            return self._state.holds[entry.hash]

    def reserve(self, order: Order) -> Reservation:
        """Spend one round of an approved plan, before its training starts.

        The same order again, or the same round in a later slot, spends nothing.
        Errors: NotApproved where no hold covers the order; AlreadyAnswered for an older round and
        for a round asked again with other weights, plan or order; OverBudget where the limits are
        lower now than at approval.
        """
        with self._transaction() as append:
            known = self._state.rounds.get(_key(order))
            if known is not None:
                return self._reserve_again(order, known, append)
            self._refuse_past(order)
            hold = self._hold_for(order)
            event = event_of(hold.cost, order.task)
            if event is None or not hold.remaining[order.task]:
                raise NotApproved(
                    f"run {order.run} asks to {order.task} in round {order.round}, and all that "
                    f"this lab approved of plan {order.plan_sha256[:12]} is used up",
                    hint=f"cytofed client approve DIR {order.plan_sha256} pays for another run",
                )
            self._refuse_over_limit_now(order, hold, event)
            append(
                "reserve",
                {"order": _order_to_dict(order), "hold": hold.id, "event": event_to_dict(event)},
            )
            return Reservation("new", None, self._hashes[-1])

    def release(self, order: Order, update_sha256: str) -> None:
        """Name the one update of the order's round that may leave, before any byte of it does.

        Two workers that answer the same order at once thus send one update between them.
        Errors: VerificationError when the round's update is another one, or nothing was reserved.
        """
        with self._transaction() as append:
            known = self._reserved(order)
            if known.release_sha256 == update_sha256:
                return
            if known.release_sha256 is not None:
                raise VerificationError(
                    f"round {order.round} of run {order.run} has already released another update "
                    f"({known.release_sha256[:12]}, now {update_sha256[:12]}): two noised updates "
                    "of one round cost twice what was reserved"
                )
            append("release", {"order": _order_to_dict(order), "update_sha256": update_sha256})

    def settle(self, order: Order) -> None:
        """Record that the order's round was answered. Settling twice changes nothing."""
        with self._transaction() as append:
            if not self._reserved(order).settled:
                append("settle", {"order": _order_to_dict(order)})

    def free(self, *, federation: str, plan_sha256: str | None = None, reason: str) -> int:
        """Give back what was never reserved, of one plan or of all of a federation.

        What was reserved stays spent. Returns how many holds were freed.
        """
        with self._transaction() as append:
            holds = [
                hold.id
                for hold in self._state.holds.values()
                if hold.federation == federation
                and hold.plan_sha256 == (plan_sha256 or hold.plan_sha256)
                and hold.state == "active"
            ]
            if holds:
                append("free", {"holds": holds, "reason": reason})
            return len(holds)

    def restore_charge(self, approved: Sequence[Hold], *, seen_heads: Sequence[str]) -> Guarantee:
        """Go on after a rollback: charge all approved plans in full, and accept the lost heads.

        ``approved`` are the holds in the lab's own approvals; those that this ledger has lost are
        charged whole, and the active ones that it still has, for all that remains of them. Runs
        under way need another approval: which of their rounds were answered is not known.
        Returns the pool's spend after it.
        """
        with self._transaction() as append:
            active = [hold for hold in self._state.holds.values() if hold.state == "active"]
            charged = {charge.hold for charge in self._state.charges}
            lost = [h for h in approved if h.id not in self._state.holds and h.id not in charged]
            charges = [
                {
                    "hold": hold.id,
                    "plan_sha256": hold.plan_sha256,
                    **({} if hold.run is None else {"run": hold.run}),
                    "event": event_to_dict(in_unit(event, self.unit, hold.cost.images_per_patient)),
                }
                for hold in (*active, *(replace(h, reserved={}, state="active") for h in lost))
                for event in hold.remaining_events()
            ]
            accepted = [head for head in seen_heads if head and head not in self._positions]
            holds = [hold.id for hold in active]
            append("restore", {"holds": holds, "charges": charges, "accepts": accepted})
            return self._spend(self._state.uses(self.unit))

    def holds(self) -> tuple[Hold, ...]:
        """All holds of the pool, in order."""
        with self._transaction(write=False):
            return tuple(self._state.holds.values())

    def balance(self) -> Balance:
        """Spent and held, in the pool's unit."""
        with self._transaction(write=False):
            state, unit = self._state, self.unit
            return Balance(
                spent=self._spend(state.uses(unit)),
                held=self._spend(state.uses(unit, spent=False, held=True)),
                total=self._spend(state.uses(unit, held=True)),
                last_year=self._spend(state.uses(unit, since=self._now() - YEAR)),
                unbounded=state.unbounded(unit),
            )

    def price(self, cost: PlanCost) -> Guarantee:
        """What a plan costs by itself at this ledger's delta: what ``hold`` would set aside."""
        with self._transaction(write=False):
            return self._spend({"": PlanUse.all_of(cost.events_in(self.unit))}, cost.delta)

    def after(self, cost: PlanCost) -> Guarantee:
        """What would be spent and held with a plan's full price."""
        with self._transaction(write=False):
            uses = self._state.uses(self.unit, held=True)
            new = PlanUse.all_of(cost.events_in(self.unit))
            return self._spend({**uses, "": new}, cost.delta)

    def fitting_rounds(self, cost: PlanCost) -> int:
        """The most rounds of a plan that fit under every limit, up to all of them."""
        with self._transaction(write=False):
            return self._fitting_rounds(cost)

    def summary(self) -> dict[str, Any]:
        """``cytofed client budget --json``: values of JSON only; an infinite epsilon is None."""
        with self._transaction(write=False):
            balance, state = self.balance(), self._state
            rounds = [
                {
                    "at": known.at.isoformat(),
                    "federation": known.order.federation,
                    "run": known.order.run,
                    "round": known.order.round,
                    "task": known.order.task,
                    "plan_sha256": known.order.plan_sha256,
                    "state": "settled" if known.settled else "reserved",
                    **event_to_dict(known.event),
                }
                for known in state.rounds.values()
            ]
            charges = [
                {
                    "at": charge.at.isoformat(),
                    "run": charge.run,
                    "plan_sha256": charge.plan_sha256,
                    "state": "charged",
                    **event_to_dict(charge.event),
                }
                for charge in state.charges
            ]
            unbounded = balance.unbounded
            other = sorted({e["unit"] for e in (*rounds, *charges)} - {self.unit})
            return {
                "pool": self.pool,
                "unit": self.unit,
                "spent": _guarantee_to_dict(balance.spent),
                "held": _guarantee_to_dict(balance.held),
                "total": _guarantee_to_dict(balance.total),
                "last_year": _guarantee_to_dict(balance.last_year),
                "limit": {
                    "epsilon": self.limits.epsilon,
                    "epsilon_per_year": self.limits.epsilon_per_year,
                    "delta": self.limits.delta,
                },
                "unbounded": None if unbounded is None else unbounded.to_json(),
                # Of what was spent; the figures above have it as it counts for this pool's unit.
                "other_units": other,
                "events": sorted((*rounds, *charges), key=lambda event: str(event["at"])),
                "head": self._hashes[-1],
            }

    # Decisions. All run inside a transaction.

    @property
    def _state(self) -> _State:
        return self._states.setdefault(self.pool, _State())

    def _reserve_again(
        self, order: Order, known: _Round, append: Callable[[str, dict[str, Any]], _Entry]
    ) -> Reservation:
        self._refuse_past(order)
        if self._state.holds[known.hold].state != "active":
            # Rejected; or charged after a rollback: what this round released may be forgotten.
            raise NotApproved(f"plan {order.plan_sha256[:12]} is not approved here any more")
        if known.order.weights_sha256 != order.weights_sha256:
            raise AlreadyAnswered(
                f"round {order.round} of run {order.run} was reserved with other weights: "
                "answering it twice would cost twice"
            )
        last_slot = max(known.orders)
        if order.slot == last_slot and known.orders[last_slot] == order.order_sha256:
            return Reservation("retry", known.release_sha256, self._hashes[-1])
        if order.slot <= last_slot:
            raise AlreadyAnswered(
                f"slot {order.slot} of round {order.round}, run {order.run}, serves one order and "
                f"was used (last slot {last_slot})"
            )
        append("slot", {"order": _order_to_dict(order)})
        return Reservation("next_slot", known.release_sha256, self._hashes[-1])

    def _refuse_past(self, order: Order) -> None:
        rounds = [
            number for *place, number in self._state.rounds if (*place, order.round) == _key(order)
        ]
        if rounds and order.round < max(rounds):
            raise AlreadyAnswered(
                f"round {order.round} of run {order.run} is past: "
                f"round {max(rounds)} was already answered"
            )

    def _hold_for(self, order: Order) -> Hold:
        holds = [
            hold
            for hold in self._state.holds.values()
            if (hold.federation, hold.plan_sha256) == (order.federation, order.plan_sha256)
            and hold.state == "active"
        ]
        bound = [hold for hold in holds if hold.run == order.run]
        unbound = [hold for hold in holds if hold.run is None]
        if bound or unbound:
            return (bound or unbound)[0]
        other = [hold.run for hold in holds]
        plan = order.plan_sha256
        if other:
            raise NotApproved(
                f"the approval of plan {plan[:12]} pays for run {other[0]}, not for {order.run}",
                hint=f"`cytofed client reject DIR {plan}` ends it there; then approve again",
            )
        raise NotApproved(
            f"plan {plan[:12]} of run {order.run} is not approved at this lab",
            hint=f"cytofed client approve DIR {plan}",
        )

    def _reserved(self, order: Order) -> _Round:
        known = self._state.rounds.get(_key(order))
        if known is None:
            raise VerificationError(
                f"nothing was reserved for round {order.round} of run {order.run}: "
                "an update must not leave before its cost is in the ledger"
            )
        return known

    def _refuse_over_budget(self, plan_sha256: str, cost: PlanCost) -> None:
        if not self.limits.any:
            return
        plan = f"plan {plan_sha256[:12]}"
        if cost.unit == "none":
            raise RefusedError(
                f"{plan} protects nothing, and the limit of pool {self.pool!r} is per {self.unit}",
                hint=f"a plan with privacy.unit={self.unit} can be kept within the limit",
            )
        alone = self._spend({"": PlanUse.all_of(cost.events_in(self.unit))}, cost.delta)
        for name, limit, since in self._windows():
            before = self._state.uses(self.unit, since=since, held=True)
            new = PlanUse.all_of(cost.events_in(self.unit))
            reached = self._spend({**before, "": new}, cost.delta)
            if reached.epsilon <= limit:
                continue
            self._refuse_unbounded(plan, since)
            if cost.unit != self.unit and cost.images_per_patient is None:
                raise RefusedError(
                    f"{plan} protects each {cost.unit}, and nothing says how many of them one "
                    f"{self.unit} has: pool {self.pool!r} has a limit per {self.unit}",
                    hint="set patients and images_per_patient in client.yaml, or ask for a plan "
                    f"with privacy.unit={self.unit}",
                )
            rounds = self._fitting_rounds(cost)
            used = self._spend(before, cost.delta).epsilon
            raise OverBudget(
                f"{plan} costs {alone}; with {shown(used)} spent and held it would reach "
                f"{shown(reached.epsilon)}, by {reached.accountant}, over the limit of "
                f"{limit:g}{name}, in pool {self.pool!r}",
                # Fewer rounds alone: a plan that names its epsilon would take less noise for them.
                hint=f"ask for a plan with train.rounds={rounds} or fewer at the same "
                "privacy.sigma, or with a lower privacy.epsilon"
                if rounds
                else "not even one round fits; ask for a plan with a lower privacy.epsilon",
                fitting_rounds=rounds,
            )

    def _refuse_unbounded(self, what: str, since: datetime | None) -> None:
        """No limit holds for patients of whom everything may be known already."""
        found = self._state.unbounded(self.unit, since)
        if found is not None:
            raise OverBudget(
                f"{what} asks for pool {self.pool!r}, whose epsilon is {found}: a limit on it "
                "cannot hold",
                hint="patients who never took part are a pool of their own (pool in client.yaml); "
                "for these, remove limits.max_epsilon and max_epsilon_per_year, which bound "
                "nothing any more",
            )

    def _fitting_rounds(self, cost: PlanCost) -> int:
        fitting = [cost.rounds]
        for _, limit, since in self._windows():
            before = self._state.uses(self.unit, since=since, held=True).values()
            fitting.append(
                max_rounds(
                    cost,
                    epsilon=limit,
                    delta=self._delta(cost.delta),
                    before=list(before),
                    unit=self.unit,
                )
            )
        return min(fitting)

    def _refuse_over_limit_now(self, order: Order, hold: Hold, event: Event) -> None:
        """The limits may be lower now than at approval."""
        what = f"round {order.round} of run {order.run}"
        for name, limit, since in self._windows():
            uses = self._state.uses(self.unit, since=since)
            used = in_unit(event, self.unit, hold.cost.images_per_patient)
            before = uses[hold.id].used if hold.id in uses else ()
            uses[hold.id] = PlanUse(hold.cost.events_in(self.unit), (*before, used))
            reached = self._spend(uses)
            if reached.epsilon > limit:
                self._refuse_unbounded(what, since)
                raise OverBudget(
                    f"{what} would bring pool {self.pool!r} to {reached}, over the limit "
                    f"{limit:g}{name}",
                    hint="the limit in client.yaml is lower than when the plan was approved",
                )

    def _windows(self) -> list[tuple[str, float, datetime | None]]:
        """Each limit, with the time from which on what was spent counts towards it."""
        windows: list[tuple[str, float, datetime | None]] = []
        if self.limits.epsilon is not None:
            windows.append(("", self.limits.epsilon, None))
        if self.limits.epsilon_per_year is not None:
            windows.append((" a year", self.limits.epsilon_per_year, self._now() - YEAR))
        return windows

    def _delta(self, candidate: float = math.inf) -> float:
        if self.limits.delta is not None:
            return self.limits.delta
        holds = self._state.holds.values()
        deltas = [hold.cost.delta for hold in holds if hold.cost.unit != "none"]
        smallest = min((*deltas, candidate))
        return smallest if smallest < 1 else 1e-5

    def _spend(self, uses: Mapping[str, PlanUse], candidate: float = math.inf) -> Guarantee:
        """``candidate``: the delta of a plan that is looked at and not held yet."""
        return spend(list(uses.values()), self._delta(candidate), unit=self.unit)

    def _now(self) -> datetime:
        # A clock that was turned back must not reorder entries, or move them between years.
        return max(self._clock(), self._last_at)

    # Storage.

    @contextmanager
    def _transaction(
        self, *, write: bool = True
    ) -> Iterator[Callable[[str, dict[str, Any]], _Entry]]:
        """All entries of other processes read, and, to write, everyone else kept out."""
        with self._lock, _sqlite_errors(self.path):
            if self._db.in_transaction:  # balance() inside summary()
                yield self._append
                return
            self._check_file()
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                self._read_new()
                yield self._append
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._forget()
                raise

    def _append(self, kind: str, body: dict[str, Any]) -> _Entry:
        text = _canonical(self._now(), self.pool, kind, body)
        link = _link(self._hashes[-1], text)
        sequence = len(self._hashes) + 1
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, text, link))
        return self._take(sequence, text, link)

    def _read_new(self) -> None:
        """Verify and replay what was appended since; the last known entry is read again."""
        known = len(self._hashes)
        rows = self._db.execute(
            "SELECT seq, entry, hash FROM entries WHERE seq >= ? ORDER BY seq", (max(known, 1),)
        ).fetchall()
        if known:
            if not rows or rows[0][2] != self._hashes[-1]:
                raise LedgerRolledBack(
                    f"the privacy ledger {self.path} changed under a running process"
                )
            rows = rows[1:]
        for sequence, text, link in rows:
            self._take(sequence, text, link)
        if not self._hashes:
            raise VerificationError(f"the privacy ledger {self.path} has no entries")

    def _take(self, sequence: object, text: object, link: object) -> _Entry:
        previous = self._hashes[-1] if self._hashes else ""
        intact = (
            isinstance(text, str)
            and sequence == len(self._hashes) + 1
            and link == _link(previous, text)
        )
        if not intact:
            raise VerificationError(
                f"the privacy ledger {self.path} was altered at entry {sequence}: "
                "its hash chain does not hold",
                hint="restore it, then run `cytofed client budget DIR --restore-charge`",
            )
        tree = json.loads(str(text))
        entry = _Entry(
            datetime.fromisoformat(tree["at"]), tree["pool"], tree["kind"], tree["body"], str(link)
        )
        if entry.kind == "open" and entry.body["version"] != VERSION:
            raise InputError(
                f"the privacy ledger {self.path} has version {entry.body['version']}, "
                f"expected {VERSION}",
                hint="use the version of cytofed that wrote it, or a later one",
            )
        self._states.setdefault(entry.pool, _State()).apply(entry)
        self._accepted.update(entry.body.get("accepts", ()))
        self._hashes.append(entry.hash)
        self._positions[entry.hash] = len(self._hashes)
        self._last_at = max(self._last_at, entry.at)
        return entry

    def _forget(self) -> None:
        """After a failed transaction: replay from the file at the next one."""
        self._hashes.clear()
        self._positions.clear()
        self._accepted.clear()
        self._states.clear()
        self._last_at = datetime.min.replace(tzinfo=UTC)

    def _check_file(self) -> None:
        """Entries of a replaced file would go to one that nobody can find again."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise LedgerMissing(f"the privacy ledger {self.path} was removed") from None
        if (stat.st_dev, stat.st_ino) != self._file:
            raise LedgerRolledBack(
                f"the privacy ledger {self.path} was replaced while it was in use",
                hint="start again",
            )

    def _check_pages(self) -> None:
        result = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if result != ("ok",):
            raise VerificationError(f"the privacy ledger {self.path} is damaged: {result[0]}")


_SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, entry TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'entries are only appended'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'entries are only appended'); END",
)


def _configure(db: sqlite3.Connection) -> None:
    # One file (no -wal that a backup misses); EXTRA also syncs the folder when the rollback
    # journal goes, without which a power cut could undo a committed reservation.
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA synchronous = EXTRA")
    db.execute("PRAGMA fullfsync = ON")
    db.execute("PRAGMA trusted_schema = OFF")


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: damage fails verification, the rest (disk, lock) is a failure."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        usual = ("BUSY", "FULL", "READONLY", "CANTOPEN", "IOERR", "PERM", "NOMEM", "LOCKED")
        if name.startswith(tuple(f"SQLITE_{kind}" for kind in usual)):
            raise CytofedError(
                f"the privacy ledger {path} cannot be used: {error}",
                hint="nothing is trained until it can be written",
            ) from error
        raise VerificationError(f"the privacy ledger {path} is damaged: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(at: datetime, pool: str, kind: str, body: Mapping[str, Any]) -> str:
    tree = {"at": at.astimezone(UTC).isoformat(), "pool": pool, "kind": kind, "body": body}
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _link(previous: str, entry: str) -> str:
    return hashlib.sha256(f"cytofed ledger 1\n{previous}\n{entry}".encode()).hexdigest()


def _key(order: Order) -> _RoundKey:
    return order.federation, order.run, order.plan_sha256, order.task, order.round


def _order_to_dict(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__dataclass_fields__}


def _cost_to_dict(cost: PlanCost) -> dict[str, Any]:
    return {
        "delta": cost.delta,
        "declared_patients": cost.declared_patients,
        "rounds": cost.rounds,
        "training": event_to_dict(cost.training),
        "evaluation": None if cost.evaluation is None else event_to_dict(cost.evaluation),
        "evaluate_every": cost.evaluate_every,
        "images_per_patient": cost.images_per_patient,
    }


def _cost_from_dict(tree: Mapping[str, Any]) -> PlanCost:
    evaluation = None if tree["evaluation"] is None else event_from_dict(tree["evaluation"])
    if not isinstance(evaluation, Gaussian | None):
        raise InputError(f"an evaluation is a gaussian event, found {tree['evaluation']!r}")
    return PlanCost(
        delta=tree["delta"],
        declared_patients=tree["declared_patients"],
        rounds=tree["rounds"],
        training=event_from_dict(tree["training"]),
        evaluation=evaluation,
        evaluate_every=tree["evaluate_every"],
        images_per_patient=tree.get("images_per_patient"),
    )


def _guarantee_to_dict(guarantee: Guarantee) -> dict[str, Any]:
    return {
        "epsilon": guarantee.epsilon if math.isfinite(guarantee.epsilon) else None,
        "delta": guarantee.delta,
        "accountant": guarantee.accountant,
    }
