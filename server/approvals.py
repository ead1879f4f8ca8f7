"""Runs that wait for the labs' approval, side by side: who is asked, what they say, when to start.

A question is out at every lab that is there and has not decided, for each run; nobody waits for
anybody's answer. A run starts when all labs of its offer have decided, when the coordinator's
person says so, or when the plan's days are over; the days count from when it was offered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flwr.app import ConfigRecord, Message, RecordDict

from cytofed.documents import Decision, Offer, Start
from cytofed.errors import CytofedError, InputError
from cytofed.messages import BadMessage
from cytofed.plan import Plan
from cytofed.privacy.identity import Identity
from cytofed.privacy.secagg import check_rules
from cytofed.secure_round import check_weight
from cytofed.server.asking import Pauses, read
from cytofed.server.fleet import Fleet, Stopped
from cytofed.server.runs import RunFolder
from cytofed.strategies import make_strategy
from cytofed.words import reason_of

_ANSWER_S = 120.0
"""a lab that has approved reads its images before it answers"""
_SLOWER, _SLOWEST = 1.3, 12.0
"""Each question for a decision comes later than the one before, up to 12 times ``offer_every_s``:
people take hours, and each answer is a record in the lab's log."""
_REPLY_BYTES = 1 << 22

_log = logging.getLogger("cytofed.coordinator")


@dataclass(frozen=True)
class _Question:
    """One lab's question about one run, on its way."""

    folder: RunFolder
    offer: Offer
    lab: str
    until: float


class Approvals:
    """Asks for decisions. For one thread; ``ask`` and ``collect`` do not wait for labs."""

    def __init__(self, fleet: Fleet, identity: Identity, *, every_s: float) -> None:
        self._fleet, self._identity = fleet, identity
        self._grid = fleet.grid(wait_s=1.0, reply_bytes=_REPLY_BYTES)
        self._out: dict[str, _Question] = {}
        self._pauses = Pauses(every_s, every_s * _SLOWEST, longer=_SLOWER)

    @property
    def waiting(self) -> bool:
        """Whether a question is on its way."""
        return bool(self._out)

    def ask(self, folder: RunFolder, offer: Offer) -> None:
        """Ask each lab that is there, has not decided and was not asked just now."""
        nodes, decided = self._fleet.nodes, folder.decisions(offer)
        asked = {question.lab for question in self._out.values() if question.folder == folder}
        document = (folder.private / "offer").read_bytes()
        content = RecordDict({"offer": ConfigRecord({"document": document})})
        for lab in undecided(offer, decided, nodes):
            key = (folder.name, lab)
            if lab in asked or not self._pauses.over(key) or not self._fleet.presence(lab).online:
                continue
            message = self._grid.create_message(
                content, "query.offer", nodes[lab], "0", ttl=_ANSWER_S
            )
            [number] = self._grid.push_messages([message])
            self._out[number] = _Question(folder, offer, lab, time.monotonic() + _ANSWER_S)

    def collect(self, waiting: Collection[RunFolder]) -> None:
        """Note the decisions that came; withdraw questions about runs that wait no more.

        Errors: Stopped.
        """
        for number in [n for n, asked in self._out.items() if asked.folder not in waiting]:
            del self._out[number]
            self._grid.withdraw(number)
        for reply in self._grid.pull_messages(list(self._out)) if self._out else ():
            question = self._out.pop(reply.metadata.reply_to_message_id, None)
            if question is not None:
                self._note(question, reply)
        for number in [n for n, asked in self._out.items() if time.monotonic() > asked.until]:
            question = self._out.pop(number)
            self._pauses.refused((question.folder.name, question.lab))

    def _note(self, question: _Question, reply: Message) -> None:
        folder, lab = question.folder, question.lab
        try:
            told = read(reply, lambda got: _decision_in(got, question.offer, lab))
            if told is not None:
                decision, document = told
                folder.keep_decision(lab, document)
                _log.info("run %s: %s %s the plan", folder.name, lab, decision.verdict)
                return
        except (BadMessage, OSError) as error:  # asked again, it says the same
            why = reason_of(error)
            _log.warning("run %s: answer of %s to the offer: %s", folder.name, lab, why)
        self._pauses.refused((folder.name, lab))

    def start_if_due(self, folder: RunFolder, offer: Offer) -> bool:
        """Fix the run's cohort where it is time to; whether it was.

        Errors: Stopped where the run is to end; InputError where it is time and too few approved.
        """
        if why := folder.stop_reason():
            raise Stopped(why)
        decided, nodes = folder.decisions(offer), self._fleet.nodes
        queued = datetime.fromisoformat(folder.state().queued_at)
        over = datetime.now(UTC) > queued + timedelta(days=offer.plan.cohort.approval_days)
        if undecided(offer, decided, nodes) and not over and not folder.asked_to_start:
            return False
        approved = approved_by(offer, decided, nodes)
        check_enough(offer.plan, len(approved))
        start = Start(folder.name, offer.plan.sha256, offer.roster.sha256, approved)
        folder.fix_cohort(start.signed(self._identity), start.labs)
        _log.info("run %s: starts with %s", folder.name, ", ".join(start.labs))
        return True


def undecided(offer: Offer, decided: Container[str], nodes: Container[str]) -> list[str]:
    """Labs of the offer that are enrolled still and have not said yes or no."""
    names = [member.name for member in offer.roster.members]
    return [lab for lab in names if lab in nodes and lab not in decided]


def approved_by(
    offer: Offer, decided: Mapping[str, tuple[Decision, bytes]], nodes: Container[str]
) -> dict[str, bytes]:
    """The approvals, signed, of labs that are enrolled still and are not left out."""
    out = left_out(offer, decided)
    return {
        lab: document
        for lab, (decision, document) in decided.items()
        if decision.verdict == "approved" and lab in nodes and lab not in out
    }


def left_out(offer: Offer, decided: Mapping[str, tuple[Decision, bytes]]) -> dict[str, str]:
    """Labs whose approval counts for nothing, and why: the others would refuse such a cohort."""
    found: dict[str, str] = {}
    for lab, (decision, _) in decided.items():
        if decision.verdict == "approved":
            try:
                check_weight(decision, offer.plan, labs=len(offer.roster.members))
            except CytofedError as error:  # of a lab that the plan does not list, too
                found[lab] = error.message
    return found


def check_enough(plan: Plan, labs: int) -> None:
    """Whether a run may start with so many labs. Errors: InputError."""
    need = max(plan.cohort.min_labs, make_strategy(plan.strategy).min_updates)
    if labs < need:
        raise InputError(f"{labs} labs approved the plan, {need} are needed")
    settings = plan.secure_aggregation
    if settings.enabled:
        check_rules(labs, threshold=settings.threshold, min_cohort=settings.min_cohort)


def _decision_in(reply: Message, offer: Offer, lab: str) -> tuple[Decision, bytes] | None:
    """A lab's decision about the offer, with its document; None where it has not decided."""
    answer = reply.content.get("answer")
    document = answer.get("decision") if isinstance(answer, ConfigRecord) else None
    if not isinstance(document, bytes) or not document:
        return None
    return Decision.verified(document, offer.roster.member(lab).identity, offer), document
