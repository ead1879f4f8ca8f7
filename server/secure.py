"""The coordinator's half of secure aggregation around the protocol: who is asked what, when.

The protocol itself is ``privacy.secagg_coordinator``, pure. The coordinator ends with the sum of
the survivors' vectors and with nothing of any single lab.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from cytofed.arrays import Float32, Parts
from cytofed.errors import InputError
from cytofed.files import write_atomically
from cytofed.heap import give_back_the_rest
from cytofed.messages import (
    BadMessage,
    Kind,
    Masked,
    Order,
    Step,
    content_bytes,
    pack_order,
    pack_step,
    unpack_masked,
    unpack_step,
)
from cytofed.metrics import Tally
from cytofed.plan import Plan
from cytofed.privacy import secagg_coordinator as protocol
from cytofed.privacy.encoding import Encoding, decode
from cytofed.privacy.identity import Identity
from cytofed.privacy.masks import Words, add_words
from cytofed.privacy.secagg import Cohort, CohortTooSmall, SecaggError
from cytofed.privacy.secagg_coordinator import Opening, Poll, Setup
from cytofed.secure_round import encoding_of, protocol_round, tally_encoding, tally_of_sum
from cytofed.server.asking import ask, ask_each, content_of, read
from cytofed.strategies.strategy import Strategy

SLOTS = 16
"""vectors per set-up; a new one is made when they are used up"""

T = TypeVar("T")


@dataclass(frozen=True)
class SecureSum:
    """What a round of secure aggregation gives: the mean, who is in it, who is not and why."""

    mean: Parts
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class _Collection:
    """One sum: what is asked for in which round, and how its words are written."""

    kind: Kind
    number: int
    parts: Parts
    encoding: Encoding
    need: int
    """labs without which the sum is of no use"""

    @property
    def protocol_round(self) -> int:
        return protocol_round(self.kind, self.number)


Received = Callable[[Masked, int], None]
"""is told of every vector that arrives, and its bytes; a lab's second vector of a round too"""

_ATTEMPTS = 2
"""slots that a round may take"""


@dataclass
class Absent:
    """Collects who failed, by name and reason."""

    reasons: dict[str, str]
    tell: Callable[[str, str], None]
    clean: Callable[[str], str]
    """makes a lab's words fit to be printed"""

    def add(self, lab: str, reason: str) -> None:
        if lab not in self.reasons:
            self.reasons[lab] = self.clean(reason)
            self.tell(lab, self.reasons[lab])


@dataclass
class SecureRun:
    """Secure aggregation of one run. ``counter_file`` keeps the set-up's number and the next slot,
    which only rise, and who has lied: also over crashes."""

    cohort: Cohort
    identity: Identity
    plan: Plan
    strategy: Strategy
    size: int
    max_weight: float
    nodes: Mapping[str, int]
    counter_file: Path
    _setup: Setup | None = None
    _next_slot: int = 0
    _liars: dict[str, bytes] = field(default_factory=dict)
    """dealers of shares that they did not sign, or of other secrets than they committed to: left
    out of every set-up from then on; and the proof of the latter, for the labs"""

    @property
    def encoding(self) -> Encoding:
        return encoding_of(
            self.plan,
            self.strategy,
            size=self.size,
            labs=len(self.cohort.labs),
            max_weight=self.max_weight,
        )

    def collect(
        self, grid: Grid, number: int, down: Parts, absent: Absent, *, received: Received
    ) -> SecureSum:
        """One round's training: masked vectors in, the mean of the survivors out.

        Errors: SecaggError when too few labs are left, before anything is revealed; SumError when
        one has sent what is no update. The round then fails.
        """
        need = max(self.cohort.threshold, self.cohort.min_cohort, self.plan.cohort.min_labs)
        wanted = _Collection("train", number, down, self.encoding, need)
        total_W, survivors = self._sum(grid, wanted, absent, received)
        count = len(survivors)
        decoded = decode(total_W, wanted.encoding, count=count, dtype=np.float32, in_place=True)
        split = np.split(decoded.mean_P, len(self.strategy.lab.up))
        mean: dict[str, Float32] = dict(zip(self.strategy.lab.up, split, strict=True))
        return SecureSum(mean, survivors)

    def collect_tally(
        self,
        grid: Grid,
        number: int,
        parts: Parts,
        absent: Absent,
        *,
        classes: int,
        received: Received,
    ) -> tuple[Tally, tuple[str, ...]]:
        """One round's evaluation: the survivors' tallies as one, exactly, and who they are.

        After it, the round is not trained again: labs close it. Errors: as ``collect``.
        """
        encoding = tally_encoding(classes, labs=len(self.cohort.labs))
        need = max(self.cohort.threshold, self.cohort.min_cohort)
        wanted = _Collection("evaluate", number, parts, encoding, need)
        total_W, survivors = self._sum(grid, wanted, absent, received)
        found = tally_of_sum(total_W, encoding, count=len(survivors), classes=classes)
        return found, survivors

    def _sum(
        self, grid: Grid, wanted: _Collection, absent: Absent, received: Received
    ) -> tuple[Words, tuple[str, ...]]:
        """The sum of the survivors' words, and who they are.

        Where too few vectors came, but more labs answered, all are asked once more in the next
        slot: a lab that died with its mask made may not use that again, and has its update still.
        So they are where a dealer's shares gave another secret than it committed to, without it.
        """
        left = _ATTEMPTS
        while True:
            left -= 1
            setup = self._ready(grid, absent)
            slot = self._take_slot()
            order = self._order(wanted, slot)
            replies = self._sent(grid, setup, order)
            _ = order.sha256  # found once, while the labs work
            total_W = np.empty(wanted.encoding.words, wanted.encoding.dtype)
            total_W.fill(0)  # which takes the memory now, while nobody waits
            survivors, failed, silent = [], dict[str, str](), 0
            for lab, message in replies:
                silent += message is None
                try:
                    masked = _masked(lab, order, wanted.encoding, message)
                except BadMessage as problem:
                    failed[lab] = problem.message
                    continue
                add_words(total_W, masked.words_W)
                survivors.append(lab)
                received(masked, content_bytes(content_of(message).content))
                del masked, message  # before the next is opened: there is memory for one
            possible = len(setup.members) - silent >= wanted.need
            if len(survivors) < wanted.need and possible and left > 0:
                continue
            for lab, reason in failed.items():
                absent.add(lab, reason)
            if len(survivors) < wanted.need:  # a sum that is of no use is not opened
                raise CohortTooSmall("labs answered", have=len(survivors), need=wanted.need)
            if self._opened(grid, wanted, setup, order, survivors, total_W, absent):
                return total_W, tuple(sorted(survivors))

    def _opened(
        self,
        grid: Grid,
        wanted: _Collection,
        setup: Setup,
        order: Order,
        survivors: list[str],
        total_W: Words,
        absent: Absent,
    ) -> bool:
        """Take the masks off the sum, in place; False where a dealer has lied, which is out then.

        Errors: SecaggError for too few labs.
        """
        number = wanted.number
        poll = protocol.call_survivors(
            setup,
            self.identity,
            round=wanted.protocol_round,
            slot=order.slot,
            order_sha256=order.sha256,
            survivors=survivors,
        )
        agreed = self._ask(
            grid, "agree", dict.fromkeys(survivors, poll.request), number, absent,
            lambda lab, reply: _agreement(poll, lab, reply),
        )  # fmt: skip
        request = protocol.call_reveal(poll, self.identity, agreed)
        revealed = self._ask(
            grid, "reveal", dict.fromkeys(survivors, request), number, absent,
            lambda lab, reply: protocol.check_revealed(poll, lab, reply),
        )  # fmt: skip
        try:
            protocol.unmask(poll, total_W, revealed)
        except SecaggError as lie:
            if not lie.lab:
                raise
            # It dealt shares of another secret than it committed to.
            absent.add(lie.lab, lie.message)
            self._liars[lie.lab] = protocol.prove(poll, revealed, lie.lab)
            self._setup = None
            self._save_counter(self._load_counter()["setup"], self._next_slot)
            return False
        return True

    def _order(self, wanted: _Collection, slot: int) -> Order:
        return Order(
            wanted.kind,
            self.cohort.run,
            wanted.number,
            self.plan.sha256,
            wanted.parts,
            slot=slot,
            labs=len(self.cohort.labs),
            max_weight=self.max_weight,
        )

    def _sent(self, grid: Grid, setup: Setup, order: Order) -> Iterator[tuple[str, Message | None]]:
        """Each member's reply to the order, None for silence."""
        members = {lab: self.nodes[lab] for lab in setup.members}
        timeout_s = self.plan.cohort.round_timeout_s
        return ask(grid, members, order.kind, order.round, pack_order(order), timeout_s=timeout_s)

    def _ready(self, grid: Grid, absent: Absent) -> Setup:
        """The set-up in use, or a new one, and another where a dealer was found to lie."""
        while self._setup is None or self._next_slot not in self._setup.slots:
            self._setup = self._set_up(grid, absent)
            # What was dealt grows with the cohort's square, and Flower's records hold it in cycles.
            gc.collect()
            give_back_the_rest()
        return self._setup

    def _set_up(self, grid: Grid, absent: Absent) -> Setup | None:
        """Keys, shares, and everyone's word for the same view; None where a dealer has lied."""
        kept = self._load_counter()
        first = max(self._next_slot, kept["next_slot"])
        # Before anything is sent: a lab takes a number that it has seen for a lie.
        self._save_counter(kept["setup"] + 1, first + SLOTS)
        everyone = [lab.name for lab in self.cohort.labs if lab.name not in self._liars]
        self._convict(grid, everyone, absent)
        opening = protocol.begin(
            self.cohort, self.identity, setup=kept["setup"] + 1, first_slot=first, slots=SLOTS
        )
        lists = self._ask(
            grid, "advertise", dict.fromkeys(everyone, opening.request), 0, absent,
            lambda lab, reply: _key_list(opening, lab, reply),
        )  # fmt: skip
        announced = protocol.announce(opening, self.identity, lists)
        dealt = self._ask(
            grid, "share", dict.fromkeys(announced.order, announced.request), 0, absent,
            lambda lab, reply: protocol.check_shares(announced, lab, reply),
        )  # fmt: skip
        setup = protocol.deliver(announced, self.identity, dealt)
        replies: dict[str, bytes] = {}

        def accepted(lab: str, reply: bytes) -> frozenset[str]:
            replies[lab] = reply
            return protocol.check_ready(setup, lab, reply)

        found = self._ask(grid, "accept", setup.requests, 0, absent, accepted)
        complaints = {lab: replies[lab] for lab, against in found.items() if against}
        if complaints and not self._settled(grid, setup, complaints, absent):
            return None
        self._next_slot = first
        return protocol.delivered(setup)  # what was dealt is not needed once it is delivered

    def _settled(
        self, grid: Grid, setup: Setup, complaints: Mapping[str, bytes], absent: Absent
    ) -> bool:
        """Have the accused show what they dealt; False where one does not, or not what it signed.

        Who complained gets what was shown, and is absent if it complains again.
        """
        requests = protocol.call_open(setup, self.identity, complaints)
        accusers = {
            dealer: [
                lab
                for lab, document in complaints.items()
                if dealer in protocol.check_ready(setup, lab, document)
            ]
            for dealer in requests
        }
        opened = self._ask(
            grid, "open", requests, 0, absent,
            lambda dealer, reply: protocol.check_opened(setup, dealer, accusers[dealer], reply),
        )  # fmt: skip
        self._liars |= dict.fromkeys(set(requests) - set(opened), b"")
        if len(opened) < len(requests):
            return False
        again = self._ask(
            grid, "accept", protocol.deliver_opened(setup, self.identity, opened), 0, absent,
            lambda lab, reply: protocol.check_ready(setup, lab, reply),
        )  # fmt: skip
        for lab in (lab for lab, against in again.items() if against):
            absent.add(lab, "accept: complains of shares that are those that were signed")
        return True

    def _convict(self, grid: Grid, labs: list[str], absent: Absent) -> None:
        """Show the labs who has lied: without proof they open no second sum of the same work."""
        frauds = {lab: proof for lab, proof in self._liars.items() if proof}
        if frauds:
            request = protocol.call_convict(self.identity, frauds)
            self._ask(
                grid, "convict", dict.fromkeys(labs, request), 0, absent,
                partial(protocol.check_convicted, self.cohort, frauds),
            )  # fmt: skip

    def _take_slot(self) -> int:
        slot = self._next_slot
        self._next_slot += 1
        return slot

    def _ask(
        self,
        grid: Grid,
        step: str,
        requests: Mapping[str, bytes],
        number: int,
        absent: Absent,
        check: Callable[[str, bytes], T],
    ) -> dict[str, T]:
        """Send each lab its request; the checked replies by lab, failures in ``absent``."""
        found: dict[str, T] = {}
        for lab, message in self._replies(grid, step, requests, number):
            try:
                found[lab] = read(message, partial(_checked_step, check, lab))
            except BadMessage as reason:
                absent.add(lab, f"{step}: {reason.message}")
        return found

    def _replies(
        self, grid: Grid, step: str, requests: Mapping[str, bytes], number: int
    ) -> Iterator[tuple[str, Message | None]]:
        contents = (
            (lab, self.nodes[lab], pack_step(Step(self.cohort.run, step, request)))
            for lab, request in requests.items()
        )
        timeout_s = self.plan.cohort.wait_s
        return ask_each(grid, contents, "query.secagg", number, timeout_s=timeout_s)

    def _load_counter(self) -> dict[str, int]:
        """The numbers; who has lied is taken over."""
        if not self.counter_file.is_file():
            return {"setup": 0, "next_slot": 0}
        kept = json.loads(self.counter_file.read_text())
        if not all(isinstance(kept.get(key), int) for key in ("setup", "next_slot")):
            raise InputError(f"{self.counter_file} is damaged", hint="start a new run")
        liars = {lab: bytes.fromhex(proof) for lab, proof in kept.get("liars", {}).items()}
        self._liars = {**liars, **self._liars}
        return {"setup": kept["setup"], "next_slot": kept["next_slot"]}

    def _save_counter(self, setup: int, next_slot: int) -> None:
        liars = {lab: proof.hex() for lab, proof in self._liars.items()}
        text = json.dumps({"liars": liars, "next_slot": next_slot, "setup": setup})
        write_atomically(self.counter_file, text, mode=0o600)


def _masked(lab: str, order: Order, encoding: Encoding, message: Message | None) -> Masked:
    masked = read(
        message, lambda got: unpack_masked(got, words=encoding.words, dtype=encoding.dtype)
    )
    claimed = (masked.lab, masked.run, masked.round, masked.slot)
    expected = (lab, order.run, order.round, order.slot)
    if claimed != expected:  # guard: masked-place
        raise BadMessage(f"answers as {claimed}, expected {expected}")
    return masked


def _checked_step(check: Callable[[str, bytes], T], lab: str, message: Message) -> T:
    return check(lab, unpack_step(message).body)


def _agreement(poll: Poll, lab: str, reply: bytes) -> bytes:
    protocol.check_agreed(poll, lab, reply)
    return reply


def _key_list(opening: Opening, lab: str, reply: bytes) -> bytes:
    protocol.check_keys(opening, lab, reply)
    return reply
