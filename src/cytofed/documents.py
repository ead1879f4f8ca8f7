"""The signed documents between coordinator and labs, from invitation to the start of a run.

::

    Invite     coordinator -> lab, by hand    address, CA, fingerprint, a token for one enrolment
    Roster     coordinator -> labs            who is enrolled, with which keys
    Offer      coordinator -> lab             a plan, the run that it is for, the roster
    Decision   lab -> coordinator             approved or rejected: this plan, this run, this roster
    Start      coordinator -> cohort          the approvals of all labs that take part
    Ended      coordinator -> other labs      the run is over for labs that are not in its start
    LedgerHead lab -> coordinator, and back   the last entry of the lab's privacy ledger, the lab's
                                              own signature under it both ways

A lab approves keys along with a plan: the offer carries the roster, and a start is only good with
every member's own approval of the same plan, run and roster.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

from cytofed.errors import InputError, VerificationError
from cytofed.plan import Plan, from_dict, to_dict
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, PublicIdentity, sign, verify
from cytofed.privacy.secagg import Cohort, check_rules
from cytofed.strict import read_json
from cytofed.words import one_line

COORDINATOR = "coordinator"
"""the name of the coordinator's identity; no lab may have it"""

LABEL_ROSTER = "cytofed/1/roster"
LABEL_OFFER = "cytofed/1/offer"
LABEL_OFFER_ID = "cytofed/1/offer-id"
LABEL_DECISION = "cytofed/1/decision"
LABEL_START = "cytofed/1/start"
LABEL_ENROL = "cytofed/1/enrol"
LABEL_ENROLLED = "cytofed/1/enrolled"
LABEL_LEAVE = "cytofed/1/leave"
LABEL_RENEW = "cytofed/1/renew"
LABEL_RENEWED = "cytofed/1/renewed"
LABEL_END = "cytofed/1/end"
LABEL_HEAD = "cytofed/1/ledger-head"

Verdict = Literal["approved", "rejected"]

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Invite:
    """What a lab gets by mail or on paper. The token is good for one enrolment, for a while."""

    federation: str
    address: str
    lab: str
    token: str = field(repr=False)
    ca_pem: str = field(repr=False)
    fingerprint: str
    """of the coordinator's identity: to be compared by phone"""
    expires: datetime

    def to_text(self) -> str:
        fields = {**self.__dict__, "expires": self.expires.isoformat(), "format": _INVITE}
        return json.dumps(fields, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> Invite:
        """Errors: InputError for what is no invite."""
        try:
            found = read_json(path.read_text(encoding="utf-8-sig"))
            if found.pop("format") != _INVITE:
                raise ValueError("another format")
            expires = datetime.fromisoformat(found.pop("expires"))
            texts = {key: str(found[key]) for key in found}
            return Invite(**texts, expires=expires)
        except OSError as error:
            raise InputError(f"cannot read invite {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path} is not an invite",
                hint="ask the coordinator for the file that `cytofed server invite` wrote",
            ) from None


_INVITE = "cytofed-invite-1"
_LAST_SECOND = 253_402_300_000
"""of the year 9999, which is where dates end"""


@dataclass(frozen=True)
class Member:
    """A lab of the roster: its keys, and what it says of itself in public."""

    identity: PublicIdentity
    node_key_sha256: str
    """of the key that its certificate and its requests are made with"""
    declared_patients: int = 0
    """0: not stated"""

    @property
    def name(self) -> str:
        return self.identity.name

    def to_value(self) -> wire.Value:
        return {
            "declared_patients": self.declared_patients,
            "identity": self.identity.to_bytes(),
            "node_key_sha256": self.node_key_sha256,
        }

    @staticmethod
    def of(value: object) -> Member:
        fields = wire.Fields(value, "member")
        member = Member(
            PublicIdentity.from_bytes(fields.raw("identity")),
            fields.text("node_key_sha256"),
            fields.uint("declared_patients"),
        )
        fields.end()
        return member


@dataclass(frozen=True)
class Roster:
    """Who is enrolled. ``epoch`` rises with every change."""

    federation: str
    epoch: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if names != sorted(set(names)) or COORDINATOR in names:
            raise VerificationError(f"roster of {names}: expected labs in order, each once")

    def to_bytes(self) -> bytes:
        return wire.encode(
            {
                "epoch": self.epoch,
                "federation": self.federation,
                "members": [member.to_value() for member in self.members],
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> Roster:
        fields = wire.Fields.of(data, "roster")
        roster = Roster(
            fields.text("federation"),
            fields.uint("epoch"),
            tuple(Member.of(item) for item in fields.items("members")),
        )
        fields.end()
        return roster

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def find(self, lab: str) -> Member | None:
        return next((member for member in self.members if member.name == lab), None)

    def member(self, lab: str) -> Member:
        """Errors: VerificationError for a stranger."""
        found = self.find(lab)
        if found is None:
            raise VerificationError(f"{lab!r} is not in the roster")
        return found


@dataclass(frozen=True)
class Offer:
    """A plan for one run, over the labs of a roster."""

    run: str
    plan: Plan
    roster: Roster

    @property
    def federation(self) -> str:
        return self.roster.federation

    @property
    def sha256(self) -> str:
        """The id of the offer: what a lab's person approves. Another federation, run, plan or
        roster is another offer."""
        body = wire.encode(
            {
                "federation": self.federation,
                "label": LABEL_OFFER_ID,
                "plan_sha256": self.plan.sha256,
                "roster_sha256": self.roster.sha256,
                "run": self.run,
            }
        )
        return hashlib.sha256(body).hexdigest()

    def signed(self, coordinator: Identity) -> bytes:
        body = wire.encode(
            {
                "plan": json.dumps(to_dict(self.plan)).encode(),
                "plan_sha256": self.plan.sha256,
                "roster": self.roster.to_bytes(),
                "run": self.run,
            }
        )
        return sign(coordinator, LABEL_OFFER, body)

    @staticmethod
    def verified(document: bytes, coordinator: PublicIdentity) -> Offer:
        """Errors: VerificationError, InputError for a plan that this version does not know, or
        knows as another one."""
        fields = wire.Fields.of(verify(document, label=LABEL_OFFER, signer=coordinator), "offer")
        run, plan, roster = fields.text("run"), fields.raw("plan"), fields.raw("roster")
        if not _RUN.fullmatch(run):  # it names folders, and stands in logs and documents
            raise VerificationError(f"an offer of a run with the name {one_line(run, most=40)!r}")
        sha256 = fields.text("plan_sha256")
        fields.end()
        try:
            tree = read_json(plan)
        except ValueError:
            raise wire.MalformedMessage("the plan of an offer is not JSON") from None
        found = from_dict(tree, source="offered plan")
        if found.sha256 != sha256:
            raise InputError(
                f"the offered plan is {sha256[:12]} at the coordinator and {found.sha256[:12]} "
                f"here, where {found.model.start} is another encoder or plans mean something else",
                hint="install the coordinator's version of cytofed",
            )
        return Offer(run, found, Roster.from_bytes(roster))


@dataclass(frozen=True)
class Decision:
    """What a lab's person said to an offer. ``max_weight``: public bound of the lab's weight.

    ``record_sha256``: of the lab's own record of who approved, salted: the lab's signature binds it
    to its persons, whose names stay there. Empty where a rule decided, or nobody approved.
    """

    lab: str
    verdict: Verdict
    run: str
    plan_sha256: str
    roster_sha256: str
    max_weight: int
    at: datetime
    reason: str = ""
    record_sha256: str = ""

    def signed(self, lab: Identity) -> bytes:
        body = wire.encode(
            {
                "at": int(self.at.timestamp()),
                "max_weight": self.max_weight,
                "plan_sha256": self.plan_sha256,
                "reason": self.reason[:200],
                "record_sha256": self.record_sha256,
                "roster_sha256": self.roster_sha256,
                "run": self.run,
                "verdict": self.verdict,
            }
        )
        return sign(lab, LABEL_DECISION, body)

    @staticmethod
    def verified(document: bytes, lab: PublicIdentity, offer: Offer) -> Decision:
        """A lab's decision about exactly this offer. Errors: VerificationError."""
        fields = wire.Fields.of(verify(document, label=LABEL_DECISION, signer=lab), "decision")
        verdict = fields.text("verdict")
        decision = Decision(
            lab=lab.name,
            verdict=cast(Verdict, verdict),
            run=fields.text("run"),
            plan_sha256=fields.text("plan_sha256"),
            roster_sha256=fields.text("roster_sha256"),
            max_weight=fields.uint("max_weight"),
            at=datetime.fromtimestamp(min(fields.uint("at"), _LAST_SECOND), UTC),
            reason=one_line(fields.text("reason")),
            record_sha256=fields.text("record_sha256"),
        )
        fields.end()
        found = (decision.run, decision.plan_sha256, decision.roster_sha256)
        if found != (offer.run, offer.plan.sha256, offer.roster.sha256):
            raise VerificationError(f"decision of {lab.name} is about another run, plan or roster")
        if verdict not in ("approved", "rejected"):
            raise VerificationError(f"decision of {lab.name} is {verdict!r:.40}")
        return decision


@dataclass(frozen=True)
class Start:
    """A run's cohort: the labs whose approvals it carries, fixed for the whole run."""

    run: str
    plan_sha256: str
    roster_sha256: str
    decisions: Mapping[str, bytes] = field(repr=False)

    @property
    def labs(self) -> tuple[str, ...]:
        return tuple(sorted(self.decisions))

    def decided(self, offer: Offer) -> dict[str, Decision]:
        """Each lab's own decision. Errors: VerificationError for one of another lab or offer."""
        return {
            lab: Decision.verified(document, offer.roster.member(lab).identity, offer)
            for lab, document in self.decisions.items()
        }

    def signed(self, coordinator: Identity) -> bytes:
        body = wire.encode(
            {
                "decisions": dict(self.decisions),
                "plan_sha256": self.plan_sha256,
                "roster_sha256": self.roster_sha256,
                "run": self.run,
            }
        )
        return sign(coordinator, LABEL_START, body)

    @staticmethod
    def verified(document: bytes, coordinator: PublicIdentity, offer: Offer) -> Start:
        """The start of the offered run, each of its labs with its own approval.

        Errors: VerificationError for another run, plan or roster, a lab that did not approve, or
        fewer labs than the plan asks for.
        """
        fields = wire.Fields.of(verify(document, label=LABEL_START, signer=coordinator), "start")
        start = Start(
            run=fields.text("run"),
            plan_sha256=fields.text("plan_sha256"),
            roster_sha256=fields.text("roster_sha256"),
            decisions=fields.blobs("decisions"),
        )
        fields.end()
        found = (start.run, start.plan_sha256, start.roster_sha256)
        if found != (offer.run, offer.plan.sha256, offer.roster.sha256):
            raise VerificationError("the start of a run is for another plan, run or roster")
        for lab, decision in start.decided(offer).items():
            if decision.verdict != "approved":
                raise VerificationError(f"{lab} is in the cohort and did not approve the plan")
        if len(start.decisions) < offer.plan.cohort.min_labs:
            raise VerificationError(
                f"a cohort of {len(start.decisions)} labs, the plan asks for "
                f"{offer.plan.cohort.min_labs}"
            )
        return start


@dataclass(frozen=True)
class Ended:
    """An offer that is over for every lab that is not in its run's start: nothing will be asked of
    it any more. ``why``: such as ``started without this lab``."""

    federation: str
    run: str
    offer_sha256: str
    why: str

    def signed(self, coordinator: Identity) -> bytes:
        body = wire.encode(
            {
                "federation": self.federation,
                "offer_sha256": self.offer_sha256,
                "run": self.run,
                "why": one_line(self.why),
            }
        )
        return sign(coordinator, LABEL_END, body)

    @staticmethod
    def verified(document: bytes, coordinator: PublicIdentity, *, federation: str) -> Ended:
        """Errors: VerificationError for another federation, or what is no such document."""
        fields = wire.Fields.of(verify(document, label=LABEL_END, signer=coordinator), "end")
        ended = Ended(
            fields.text("federation"),
            fields.text("run"),
            fields.text("offer_sha256"),
            one_line(fields.text("why")),
        )
        fields.end()
        if ended.federation != federation:
            raise VerificationError("the end of a run of another federation")
        return ended


def secure_cohort(start: Start, offer: Offer, coordinator: PublicIdentity) -> Cohort:
    """The cohort as secure aggregation pins it. Errors: InputError for rules that are not safe."""
    settings = offer.plan.secure_aggregation
    return Cohort(
        federation=offer.federation,
        run=start.run,
        plan_sha256=start.plan_sha256,
        roster_sha256=start.roster_sha256,
        coordinator=coordinator,
        labs=tuple(offer.roster.member(lab).identity for lab in start.labs),
        threshold=check_rules(
            len(start.labs), threshold=settings.threshold, min_cohort=settings.min_cohort
        ),
        min_cohort=settings.min_cohort,
    )


@dataclass(frozen=True)
class LedgerHead:
    """The head of a lab's privacy ledger, signed by the lab: it goes with each answer, and comes
    back with the next order. An older ledger, put back, does not have it; nobody else can make a
    lab believe that its own is old."""

    federation: str
    lab: str
    head: str

    def signed(self, lab: Identity) -> bytes:
        body = wire.encode({"federation": self.federation, "head": self.head, "lab": self.lab})
        return sign(lab, LABEL_HEAD, body)

    @staticmethod
    def verified(
        document: bytes, signer: PublicIdentity, *, federation: str, lab: str
    ) -> LedgerHead:
        """Errors: VerificationError for what the lab ``signer`` did not sign, another federation or
        lab, or what is no hash."""
        fields = wire.Fields.of(verify(document, label=LABEL_HEAD, signer=signer), "ledger head")
        found = LedgerHead(fields.text("federation"), fields.text("lab"), fields.text("head"))
        fields.end()
        if (found.federation, found.lab) != (federation, lab):
            raise VerificationError("the ledger head is of another federation or lab")
        if not _HEX_SHA256.fullmatch(found.head):
            raise VerificationError("the ledger head is no SHA-256")
        return found
