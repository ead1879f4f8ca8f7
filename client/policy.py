"""What this lab agrees to: the price of a plan, the limits it must keep, the person's decision.

Nothing is trained before an offer is approved here: a plan for one run over the labs of one roster.
It waits with its price; the lab's own limits refuse it by name; approval sets its full price aside
in the privacy ledger and pins the keys of all labs that may take part. Any change of plan, run or
roster is another offer, with another id, which waits anew; the one that it takes the place of stays
to be seen, and can't be approved any more. Nor can an offer whose run is over.

::

    <folder>/<plan>-<offer>.json    one offer: the coordinator's signed document, what the lab
                                    decided, who for it, and at what price; whole or not there
    <folder>/.shown                 the offers that a person was shown last
    <folder>/.lock                  held by whoever changes one

The order of things in ``approve`` (limits, then the ledger's hold, then the file) and ``reject``
(the file, then the ledger) is such that a crash between two of them leaves nothing approved that
was not paid for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from cytofed.client.origin import Known, known_of, origin_told
from cytofed.client.reader import NOBODY
from cytofed.client.settings import Settings
from cytofed.documents import Offer
from cytofed.encoder import Given, is_shipped, shipped
from cytofed.errors import InputError, RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.labels import load_map, load_scheme
from cytofed.metrics import Tally
from cytofed.plan import Plan, to_dict
from cytofed.plan_check import check_plan
from cytofed.privacy import wire
from cytofed.privacy.accounting import Guarantee, NonPrivate, PlanCost, check_delta
from cytofed.privacy.identity import PublicIdentity
from cytofed.privacy.ledger import Hold, Ledger, NotApproved, Unbounded
from cytofed.privacy.terms import declared_of, delta_of, patients_of, patients_told, terms_of
from cytofed.secure_round import encoding_of, tally_encoding
from cytofed.strategies import make_strategy
from cytofed.words import MOST_CHARS, one_line

State = Literal["waiting", "approved", "rejected", "replaced", "expired", "ended"]
"""replaced: by another offer for its run; expired: nobody decided in time; ended: its run was over
before anybody decided"""

_CLOSED = ("replaced", "expired", "ended")
"""what nobody can decide about any more, and nobody did"""

MAX_WAITING, MAX_APPROVED, MAX_CLOSED = 16, 64, 64
"""offers that a lab keeps at a time: undecided; approved and not over; closed undecided"""

KEEP_CLOSED = timedelta(days=90)
"""so long a closed offer can be seen: whoever offers without end deletes none"""

LABEL_RECORD = "cytofed/1/approval-record"

MOST_NOTE_CHARS = 500
BY_RULE = "auto_approve"
"""who approved, where no person did"""

SEALED_BYTES = 2048
"""what a header, the seal and a signature add to a message, rounded up"""


class TooManyOffers(RefusedError):
    """The lab keeps as many offers as it will."""


def ledger_federation(federation: str, lab: str) -> str:
    """How a federation is called in the ledger: two labs of one machine's user stay apart."""
    return f"{federation}/{lab}"


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of client.yaml with the lab's limits. Errors: LedgerMissing, VerificationError."""
    return Ledger.open(settings.ledger, pool=settings.pool, limits=settings.limits.of_ledger())


def cost_of(plan: Plan, settings: Settings, lab: str) -> PlanCost:
    """What a plan spends at this lab.

    Errors: RefusedError where a private plan states another number of patients than the lab.
    """
    images = settings.images_per_patient if settings.patients else None
    if plan.privacy.unit == "none":
        return _stated_cost(plan, lab, images)
    stated, own = declared_of(plan, lab), settings.patients_declared
    if own is None:
        raise RefusedError(
            f"plan {plan.sha256[:12]} is private and this lab declares no number of patients",
            hint="set patients_declared in client.yaml: public, rounded",
        )
    if stated != own:
        raise RefusedError(
            f"plan {plan.sha256[:12]} states {stated or 'no'} patients for {lab}, "
            f"this lab declares {own}: the noise is scaled by that number",
            hint=f"ask for a plan with privacy.declared_patients: {{{lab}: {own}}}",
        )
    return _stated_cost(plan, lab, images)


def _stated_cost(plan: Plan, lab: str, images_per_patient: int | None) -> PlanCost:
    """The cost as approved, whatever client.yaml says now."""
    terms, every = terms_of(plan), plan.evaluated_every
    if terms is None:
        return PlanCost(delta_of(plan), 1, plan.train.rounds, NonPrivate(), evaluate_every=every)
    cost = terms.cost(declared_of(plan, lab) or 1)
    if cost.unit != "image":
        return cost
    return replace(cost, images_per_patient=images_per_patient)


@dataclass(frozen=True)
class Price:
    """What a plan costs this lab. ``plan``: by itself, as the ledger would hold it; ``after``: the
    pool's spend if all of it is trained.

    ``left`` is the limit less what is spent and held; None without a limit.
    """

    rounds: int
    steps_per_round: int | None
    unit: str
    plan: Guarantee | None
    spent: Guarantee
    held: Guarantee
    after: Guarantee
    unbounded: Unbounded | None
    images_per_patient: int | None
    limit: float | None
    left: float | None
    fitting_rounds: int
    bytes_per_round: int
    bytes_total: int
    parameters: int
    arch: str
    start: str
    trainable: str
    strategy: str
    secure_aggregation: bool
    roster_sha256: str
    labs: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """``price`` of ``cytofed client plans --json``."""
        return {
            "rounds": self.rounds,
            "steps_per_round": self.steps_per_round,
            "steps": None if self.steps_per_round is None else self.rounds * self.steps_per_round,
            "privacy": {
                "unit": self.unit,
                "plan": None if self.plan is None else _guarantee(self.plan),
                "images_per_patient": self.images_per_patient,
                "statement": "none: not differentially private"
                if self.plan is None
                else str(self.plan),
                "spent": _guarantee(self.spent),
                "held": _guarantee(self.held),
                "after": _guarantee(self.after),
                "unbounded": None if self.unbounded is None else self.unbounded.to_json(),
                "limit": self.limit,
                "left": self.left,
                "fitting_rounds": self.fitting_rounds,
            },
            "bytes_out": {"per_round": self.bytes_per_round, "total": self.bytes_total},
            "model": {
                "arch": self.arch,
                "start": self.start,
                "trainable": self.trainable,
                "parameters": self.parameters,
                "strategy": self.strategy,
                "secure_aggregation": self.secure_aggregation,
            },
            "roster": {"sha256": self.roster_sha256, "labs": dict(self.labs)},
            "warnings": list(self.warnings),
        }


def _guarantee(of: Guarantee) -> dict[str, Any]:
    finite = of.epsilon != float("inf")
    epsilon = of.epsilon if finite else None
    return {
        "epsilon": epsilon,
        "delta": of.delta,
        "unit": of.unit,
        "accountant": of.accountant,
        **patients_told(of),
    }


def price_of(
    offer: Offer,
    settings: Settings,
    book: Ledger,
    *,
    lab: str,
    parameters: int,
    known: Known | None = None,
) -> Price:
    """The price of an offer at this lab; ``parameters``: size P of one exchanged vector.

    ``known``: the models that came here, one of which the plan may start from.

    Errors: RefusedError where the declared patients differ; InputError for a plan that does not
    hold together.
    """
    plan = offer.plan
    warnings = check_plan(plan)
    if known is not None and plan.privacy.unit != "none" and (told := origin_told(plan, known)):
        warnings.append(told)
    terms = terms_of(plan, patients_of(plan, len(offer.roster.members)))
    cost = cost_of(plan, settings, lab)
    if terms is not None and plan.privacy.unit == "image":
        warnings.append(f"the plan promises {terms.total()}; the price here is of a patient")
    balance, limit = book.balance(), settings.limits.max_epsilon
    per_round, evaluation = bytes_out(offer, parameters)
    evaluations = -(-plan.train.rounds // plan.evaluated_every) if evaluation else 0
    return Price(
        rounds=plan.train.rounds,
        steps_per_round=plan.train.steps_per_round if terms is None else terms.training.steps,
        unit=plan.privacy.unit,
        plan=None if terms is None else replace(book.price(cost), patients=terms.patients),
        spent=balance.spent,
        held=balance.held,
        after=book.after(cost),
        unbounded=balance.unbounded,
        images_per_patient=cost.images_per_patient,
        limit=limit,
        left=None if limit is None else max(0.0, limit - balance.total.epsilon),
        fitting_rounds=book.fitting_rounds(cost),
        bytes_per_round=per_round + evaluation,
        bytes_total=plan.train.rounds * per_round + evaluations * evaluation,
        parameters=parameters,
        arch=plan.model.arch,
        start=plan.model.start,
        trainable=plan.model.trainable,
        strategy=plan.strategy.name,
        secure_aggregation=plan.secure_aggregation.enabled,
        roster_sha256=offer.roster.sha256,
        labs=fingerprints(offer),
        warnings=tuple(warnings),
    )


def fingerprints(offer: Offer) -> dict[str, str]:
    """Lab -> fingerprint of its keys: what approving the offer pins."""
    return {member.name: member.identity.fingerprint for member in offer.roster.members}


def bytes_out(offer: Offer, parameters: int) -> tuple[int, int]:
    """Bytes that leave in a round: for training, and for an evaluation (0 where there is none).

    The set-up of secure aggregation, some kilobytes a lab and once a run, comes on top.
    """
    plan, labs = offer.plan, len(offer.roster.members)
    strategy = make_strategy(plan.strategy)
    classes = len(load_scheme(plan.labels.scheme).codes)
    tally = Tally.empty(classes)
    if plan.secure_aggregation.enabled:
        words = encoding_of(plan, strategy, size=parameters, labs=labs, max_weight=1.0).words
        update = words * plan.secure_aggregation.bits // 8
        evaluation = 4 * tally_encoding(classes, labs=labs).words
    else:
        update = 4 * parameters * len(strategy.lab.up)
        evaluation = tally.vector_D.nbytes
    return update + SEALED_BYTES, evaluation + SEALED_BYTES if plan.releases_scores else 0


def refuse(offer: Offer, settings: Settings, *, own: PublicIdentity, parameters: int) -> None:
    """Hold an offer against client.yaml; the ledger's limits are checked by its hold.

    Errors: RefusedError naming the limit, the value and the way out; InputError for a plan that
    does not hold together; VerificationError for a roster with another key for this lab.
    """
    plan, limits = offer.plan, settings.limits
    what = f"plan {plan.sha256[:12]}"
    member = offer.roster.find(own.name)
    if member is None or member.identity != own:
        raise VerificationError(
            f"the roster of {what} does not have this lab ({own.name}, {own.fingerprint[:16]}) "
            "with its own key",
            hint="call the coordinator: somebody may be answering in this lab's name",
        )
    if any(mark in plan.labels.scheme for mark in "/\\."):
        raise RefusedError(
            f"{what} has labels.scheme {plan.labels.scheme!r:.60}, a file and no name: plans open "
            "no files here"
        )
    start = plan.model.start
    if start != "random" and not is_shipped(start) and Given.named(start) is None:
        raise RefusedError(
            f"{what} has model.start {plan.model.start!r:.60}, a file and no name: plans open no "
            "files here",
            hint="ask for random weights, a file by its content, or a shipped encoder: "
            f"{', '.join(shipped())}",
        )
    check_plan(plan)
    if settings.labels is not None and load_map(settings.labels).scheme != plan.labels.scheme:
        raise RefusedError(
            f"{what} is for label scheme {plan.labels.scheme}, this lab's label map "
            f"{Path(settings.labels).name} for {load_map(settings.labels).scheme}",
            hint="set labels in client.yaml to a map into the plan's scheme",
        )
    if plan.privacy.unit == "patient" and settings.patients in (None, NOBODY):
        raise RefusedError(
            f"{what} protects patients, and this lab does not say which image is whose",
            hint="set patients in client.yaml, for example patients: column:patient",
        )
    if plan.privacy.unit != "none" and settings.labels is None:
        raise RefusedError(
            f"{what} is private, and this lab's label map is found by itself: one patient's "
            "folders could choose it for all others",
            hint="set labels in client.yaml: `cytofed client check DIR` says which map fits",
        )
    cost_of(plan, settings, own.name)
    refuse_delta(offer)
    if plan.privacy.unit == "none" and limits.of_ledger().any:
        raise RefusedError(
            f"{what} protects nobody (privacy.unit is none), and this lab has a limit on epsilon",
            hint="ask for a plan with privacy.unit=patient, or remove limits.max_epsilon and "
            "max_epsilon_per_year in client.yaml",
        )
    if limits.allowed_models and plan.model.arch not in limits.allowed_models:
        raise RefusedError(
            f"{what} has model.arch {plan.model.arch}, not one of limits.allowed_models: "
            f"{', '.join(limits.allowed_models)}",
            hint=f"add {plan.model.arch} to limits.allowed_models in client.yaml",
        )
    if limits.allowed_strategies and plan.strategy.name not in limits.allowed_strategies:
        raise RefusedError(
            f"{what} has strategy {plan.strategy.name}, not one of limits.allowed_strategies: "
            f"{', '.join(limits.allowed_strategies)}",
            hint=f"add {plan.strategy.name} to limits.allowed_strategies in client.yaml",
        )
    if limits.secure_aggregation_required and not plan.secure_aggregation.enabled:
        raise RefusedError(
            f"{what} sends single updates, and limits.secure_aggregation_required is true",
            hint="ask for a plan with secure_aggregation.enabled=true",
        )
    smallest = smallest_cohort(plan)
    if smallest < limits.min_cohort:
        key = "secure_aggregation.min_cohort" if plan.secure_aggregation.enabled else ""
        key = key or "cohort.min_labs"
        raise RefusedError(
            f"{what} allows a cohort of {smallest} labs, limits.min_cohort is {limits.min_cohort}",
            hint=f"ask for a plan with {key}={limits.min_cohort}",
        )
    refuse_cohort(offer, [member.name for member in offer.roster.members], settings)
    update, evaluation = bytes_out(offer, parameters)
    most = limits.max_bytes_per_round
    if most is not None and update + evaluation > most:
        raise RefusedError(
            f"{what} sends {update + evaluation} bytes a round, limits.max_bytes_per_round is "
            f"{most}",
            hint="raise the limit in client.yaml, or ask for a smaller model or "
            "model.trainable=head",
        )


def refuse_delta(offer: Offer) -> None:
    """A guarantee may fail for a patient with probability delta: over the roster's patients, for
    half a patient at most. Errors: RefusedError."""
    plan = offer.plan
    if plan.privacy.unit == "none":
        return
    patients = patients_of(plan, len(offer.roster.members))
    if plan.privacy.delta is None or patients is None:
        raise RefusedError(
            f"plan {plan.sha256[:12]} is private and names no delta, or no number of patients",
            hint="ask the coordinator to install a current version of cytofed",
        )
    try:
        check_delta(plan.privacy.delta, patients)
    except InputError as error:
        raise RefusedError(f"plan {plan.sha256[:12]}: {error.message}", hint=error.hint) from None


def smallest_cohort(plan: Plan) -> int:
    """The fewest labs whose updates are ever added up."""
    settings = plan.secure_aggregation
    return settings.min_cohort if settings.enabled else plan.cohort.min_labs


def refuse_cohort(offer: Offer, labs: Sequence[str], settings: Settings) -> None:
    """The same for the labs that take part, when a run starts. Errors: RefusedError."""
    limits, keys = settings.limits, fingerprints(offer)
    if len(labs) < limits.min_cohort:
        raise RefusedError(
            f"a cohort of {len(labs)} labs, limits.min_cohort is {limits.min_cohort}",
            hint="more labs have to enrol and approve",
        )
    for lab in labs:
        pinned = limits.trusted_peers.get(lab)
        if pinned is not None and keys.get(lab) != pinned:
            raise RefusedError(
                f"lab {lab} comes with key {keys.get(lab, 'none')[:16]}, "
                f"limits.trusted_peers has {pinned[:16]}",
                hint=f"call {lab}; if it has new keys, change client.yaml",
            )
    trusted = [lab for lab in labs if lab in limits.trusted_peers]
    if len(trusted) < limits.min_trusted_peers:
        raise RefusedError(
            f"a cohort with {len(trusted)} of this lab's trusted_peers, limits.min_trusted_peers "
            f"is {limits.min_trusted_peers}",
            hint="the others could be the coordinator's inventions; see limits in client.yaml",
        )


@dataclass(frozen=True)
class Approval:
    """That a person said yes. ``by``: who, as they called themselves; it never leaves the lab."""

    by: str
    note: str
    at: datetime

    def to_json(self) -> dict[str, str]:
        return {"by": self.by, "note": self.note, "at": self.at.isoformat()}


@dataclass(frozen=True)
class Entry:
    """An offer as this lab knows it. ``price`` and ``changes`` are those of the decision.

    ``hold``: the ledger's; ``ended``: the run is over and what was left of the hold is freed.
    ``approvals``: fewer than client.yaml asks for while it waits. ``replaced_by``: an offer's id.
    """

    offer: Offer
    document: bytes
    parameters: int
    state: State
    offered_at: datetime
    decided_at: datetime | None = None
    reason: str = ""
    price: Mapping[str, Any] | None = None
    changes: tuple[str, ...] = ()
    hold: str = ""
    ended: bool = False
    approvals: tuple[Approval, ...] = ()
    salt: str = ""
    replaced_by: str = ""

    @property
    def sha256(self) -> str:
        """The id of the offer."""
        return self.offer.sha256

    @property
    def plan_sha256(self) -> str:
        return self.offer.plan.sha256

    @property
    def run(self) -> str:
        return self.offer.run

    @property
    def expires_at(self) -> datetime:
        """Until then it can be approved."""
        days = min(self.offer.plan.cohort.approval_days, 36_500.0)
        return self.offered_at + timedelta(days=days)

    @property
    def over(self) -> bool:
        """Nobody can approve it any more."""
        return self.ended or self.state in _CLOSED

    @property
    def record_sha256(self) -> str:
        """Of who approved, when and with which note: it stands in the lab's signed decision and in
        its egress log, and tells nothing to whoever does not have the salt. Empty where nobody
        approved."""
        if not self.approvals:
            return ""
        body = wire.encode(
            {
                "approvals": [
                    {"at": a.at.isoformat(), "by": a.by, "note": a.note} for a in self.approvals
                ],
                "label": LABEL_RECORD,
                "offer_sha256": self.sha256,
                "salt": self.salt,
            }
        )
        return hashlib.sha256(body).hexdigest()


class PlanBook:
    """The plans known to a lab, as files in one folder. Safe for several processes.

    ``verified`` turns an offer's signed document into the offer; it raises for a forged one, so
    that a changed file is no plan.
    """

    def __init__(
        self,
        folder: Path,
        *,
        verified: Callable[[bytes], Offer],
        own: PublicIdentity,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.folder = folder
        self.own = own
        self._verified = verified
        self._clock = clock
        self._parsed: dict[Path, tuple[tuple[int, int, int], Entry]] = {}

    def __repr__(self) -> str:
        return f"PlanBook({str(self.folder)!r}, lab={self.own.name!r})"

    def entries(self) -> tuple[Entry, ...]:
        """All offers, oldest first. Errors: VerificationError for a file that was altered."""
        if not self.folder.is_dir():
            return ()
        paths = [path for path in self.folder.glob("*.json") if not path.name.startswith(".")]
        found = []
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # replaced by another process meanwhile
                found.append(self._read(path))
        for gone in self._parsed.keys() - set(paths):
            self._parsed.pop(gone, None)
        return tuple(sorted(found, key=lambda entry: entry.offered_at))

    def offered(self, document: bytes, *, parameters: int) -> Entry:
        """Take in an offer from the coordinator. One that is known already stays as it is.

        A new offer of a run takes the place of those of it that still waited: they stay to be
        seen, ``replaced``. Errors: TooManyOffers.
        """
        offer = self._verified(document)
        with self._locked():
            path = self._path(offer)
            if path.exists():
                return self._read(path)
            self.refuse_too_many(offer)
            entry = self._write(Entry(offer, document, parameters, "waiting", self._clock()))
            for other in self.entries():
                if other.run == offer.run and other.state == "waiting" and other != entry:
                    self._write(
                        replace(
                            other,
                            state="replaced",
                            replaced_by=offer.sha256,
                            reason="the coordinator offered this run anew",
                        )
                    )
            return entry

    def refuse_too_many(self, offer: Offer) -> None:
        """Whoever offers without end fills no disk: what may still become a run is counted, and
        what was closed before anybody decided. Errors: TooManyOffers."""
        entries = self.entries()
        others = [e for e in entries if e.run != offer.run and not e.ended]
        if sum(e.state == "waiting" for e in others) >= MAX_WAITING:
            raise TooManyOffers(
                f"{MAX_WAITING} plans wait for a decision here: no other is taken in",
                hint="approve or reject some: cytofed client plans DIR",
            )
        if sum(e.state == "approved" for e in others) >= MAX_APPROVED:
            raise TooManyOffers(
                f"{MAX_APPROVED} approved plans have not ended: no other is taken in",
                hint="reject what is not to be trained any more: cytofed client plans DIR",
            )
        closed = [e for e in entries if e.state in _CLOSED]
        past = [e for e in closed if self._clock() - e.offered_at > KEEP_CLOSED]
        for entry in past:
            self._path(entry.offer).unlink(missing_ok=True)
        if len(closed) - len(past) >= MAX_CLOSED:
            raise TooManyOffers(
                f"{MAX_CLOSED} offers of the last {KEEP_CLOSED.days} days were replaced or over "
                "before anybody decided: no other is taken in",
                hint="call the coordinator; reject those that you have seen: "
                "cytofed client plans DIR",
            )

    def expire(self, over: Callable[[Entry], str], book: Ledger) -> tuple[Entry, ...]:
        """End what ``over`` gives a reason for; what was held and never reserved is freed."""
        expired = []
        with self._locked():
            for entry in self.entries():
                if entry.over or entry.state == "rejected" or not (why := over(entry)):
                    continue
                expired.append(self._close(entry, "expired", why, book))
        return tuple(expired)

    def ended(self, offer_sha256: str, book: Ledger, *, why: str = "") -> None:
        """The run of an offer is over: free what it never reserved; nobody can approve it any
        more. Ending twice changes nothing."""
        with self._locked():
            for entry in self.entries():
                if entry.sha256 == offer_sha256 and not entry.over:
                    told = one_line(why) or f"run {one_line(entry.run)} is over"
                    self._close(entry, "ended", told, book)

    def _close(self, entry: Entry, undecided: State, why: str, book: Ledger) -> Entry:
        """Over: an approved offer stays approved, a rejected one rejected, and has ended; an
        undecided one is ``undecided``.

        The file first: a hold that a crash leaves is freed by whoever tells the end again."""
        if entry.state == "approved":
            entry = self._write(replace(entry, ended=True, reason=why))
            self._free(entry, book, why)
        elif entry.state == "rejected":
            entry = self._write(replace(entry, ended=True))
        else:
            entry = self._write(replace(entry, state=undecided, reason=why))
        return entry

    def matching(self, reference: str) -> tuple[Entry, ...]:
        """The offers that an offer's id or a plan's hash fits, oldest first; 8 digits will do.

        Errors: InputError when there is none, or the digits fit several offers or plans.
        """
        entries, wanted = self.entries(), reference.strip().lower()
        by_id = tuple(e for e in entries if e.sha256.startswith(wanted))
        found = by_id or tuple(e for e in entries if e.plan_sha256.startswith(wanted))
        if found and len(wanted) < 8:
            names = dict.fromkeys(e.sha256 if by_id else e.plan_sha256 for e in found)
            raise InputError(
                f"{wanted!r} is too short: offers and plans are named by 8 digits or more",
                hint=f"it begins: {', '.join(names)}",
            )
        if not found:
            known = [e.sha256 for e in entries if not e.over]
            plans = [e.plan_sha256 for e in entries if not e.over]
            raise InputError(
                f"no plan or offer {one_line(reference, most=64)!r} is known here",
                hint=f"offers: {', '.join(known)}; their plans: {', '.join(dict.fromkeys(plans))}"
                if known
                else "none was offered yet: is `cytofed client start` running?",
            )
        if len(by_id) > 1 or len({e.plan_sha256 for e in found}) > 1:
            raise InputError(f"{wanted!r} fits several: give more digits")
        return found

    def find(self, reference: str, *states: State) -> Entry:
        """The latest offer that ``reference`` fits, of one of these states where there is one.

        Errors: those of ``matching``.
        """
        found = self.matching(reference)
        wanted = [e for e in found if e.state in states and not e.ended] or list(found)
        return wanted[-1]

    def chosen(self, reference: str) -> Entry:
        """The offer that a person approves by ``reference``: by its own id, or by its plan's hash
        while one offer of the plan waits, was among those shown last, and no other came and went
        undecided: whoever looks may have seen that one, and another person or program the last.

        Errors: InputError that says what to look at and type, where another offer could be meant;
        those of ``matching``.
        """
        found = self.matching(reference)
        if found[0].sha256.startswith(reference.strip().lower()):
            return found[0]
        waiting = [e for e in found if e.state == "waiting"]
        approved = [e for e in found if e.state == "approved" and not e.ended]
        waiting = waiting or approved[-1:] or [e for e in found if not e.over]
        if not waiting or waiting == approved[-1:]:
            return (approved or found)[-1]  # which approving again does not change, or is over
        gone = any(e.state in _CLOSED for e in found)
        if len(waiting) == 1 and waiting[0].sha256 in self._last_shown() and not gone:
            return waiting[0]
        which = waiting[-1].sha256
        raise InputError(
            f"plan {found[0].plan_sha256[:12]} waits in {len(waiting)} offers, for runs "
            f"{', '.join(one_line(e.run, most=64) for e in waiting)}"
            if len(waiting) > 1
            else f"the offer of plan {found[0].plan_sha256[:12]} that waits is not the only one, "
            "or not one that `cytofed client plans` showed last: its labs or its run may be others",
            hint=f"look at it, then approve the offer: cytofed client plan show DIR {which}; "
            f"cytofed client approve DIR {which}",
        )

    def shown(self, offers: Iterable[str], *, also: bool = False) -> None:
        """Note the ids of the offers that a person sees now; ``also``: besides the last ones."""
        ids = sorted({*offers, *(self._last_shown() if also else ())})
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self.folder / ".shown", "\n".join(ids) + "\n", mode=0o600)

    def _last_shown(self) -> frozenset[str]:
        file = self.folder / ".shown"
        return frozenset(file.read_text().split()) if file.is_file() else frozenset()

    def models(self) -> Known:
        """The results of approved plans, which lie beside this book."""
        approved = (entry.offer for entry in self.entries() if entry.state == "approved")
        return known_of(self.folder.parent / "models", approved)

    def known(self, offer: Offer) -> Entry | None:
        """What the lab decided about exactly this plan, run and roster."""
        path = self._path(offer)
        return self._read(path) if path.exists() else None

    def approved(self, run: str, *, over: bool = False) -> Entry:
        """The approved plan of a run; with ``over`` also of one that has ended.

        Errors: NotApproved (exit 3).
        """
        found = [e for e in self.entries() if e.run == run]
        for entry in reversed(found):
            if entry.state == "approved" and (over or not entry.ended):
                return entry
        hint = f"cytofed client approve DIR {found[-1].sha256}" if found else ""
        raise NotApproved(f"no plan of run {run} is approved at this lab", hint=hint)

    def approve(
        self, reference: str, settings: Settings, book: Ledger, *, by: str = "", note: str = ""
    ) -> Entry:
        """A person approves an offer: check the limits, set its price aside, pin its keys.

        ``reference``: see ``chosen``. Where ``settings`` asks for several persons, the offer waits
        with the approvals of the first ones. Approving again what is approved changes nothing. One
        approval pays for one run: what an earlier run of the same plan has left is freed.
        Errors: RefusedError as ``refuse``, or for an offer that is over, or a person who approved
        already; OverBudget with the number of rounds that fits.
        """
        with self._locked():
            entry = self.chosen(reference)
            if entry.state == "approved" and not entry.ended:
                return entry
            _refuse_over(entry, now=self._clock())
            approval = self._approval(entry, settings, by=by, note=note)
            offer, lab = entry.offer, self.own.name
            refuse(offer, settings, own=self.own, parameters=entry.parameters)
            changes, approvals = self.changes(entry), (*entry.approvals, approval)
            entry = replace(
                entry,
                approvals=approvals,
                salt=entry.salt or secrets.token_hex(16),
                reason="",
            )
            if len(approvals) < settings.approvals:
                return self._write(replace(entry, state="waiting"))
            self._end_others(entry, book)
            price = price_of(
                offer, settings, book, lab=lab, parameters=entry.parameters, known=self.models()
            )
            hold = book.hold(
                federation=ledger_federation(offer.federation, lab),
                plan_sha256=entry.plan_sha256,
                cost=cost_of(offer.plan, settings, lab),
            ).id
            return self._write(
                replace(
                    entry,
                    state="approved",
                    decided_at=approval.at,
                    price=price.to_json(),
                    changes=changes,
                    hold=hold,
                )
            )

    def _approval(self, entry: Entry, settings: Settings, *, by: str, note: str) -> Approval:
        needed, names = settings.approvals, [a.by for a in entry.approvals]
        by = " ".join(one_line(by, most=MOST_CHARS).split())
        if needed > 1 and not by:
            raise InputError(
                f"client.yaml asks for the approvals of {needed} persons, and none was named",
                hint=f"cytofed client approve DIR {entry.sha256} --by NAME",
            )
        if needed > 1 and _same_person(by) in map(_same_person, names):
            raise RefusedError(
                f"{by} has approved offer {entry.sha256[:12]} already: {len(names)} of {needed}",
                hint="another person has to approve it, with --by and their own name",
            )
        return Approval(by, one_line(note, most=MOST_NOTE_CHARS), self._clock())

    def in_place_of(self, entry: Entry) -> tuple[Entry, ...]:
        """The approved offers, not over, that approving this one ends: of its plan, or its run."""
        return tuple(
            other
            for other in self.entries()
            if (other.plan_sha256 == entry.plan_sha256 or other.run == entry.run)
            and other.state == "approved"
            and not other.ended
            and other.sha256 != entry.sha256
        )

    def _end_others(self, entry: Entry, book: Ledger) -> None:
        """End earlier runs of the same plan, and other offers of the same run: what was set aside
        for them pays for no other."""
        federation = ledger_federation(entry.offer.federation, self.own.name)
        why = f"offer {entry.sha256[:12]} was approved in its place"
        for other in self.in_place_of(entry):
            self._close(other, "ended", why, book)
        bound = [
            hold
            for hold in book.holds()
            if (hold.federation, hold.plan_sha256) == (federation, entry.plan_sha256)
            and hold.state == "active"
            and hold.run not in (None, entry.run)
        ]
        if bound:
            book.free(
                federation=federation,
                plan_sha256=entry.plan_sha256,
                reason=f"approved for run {entry.run}",
            )

    def reject(self, reference: str, book: Ledger, *, reason: str = "") -> Entry:
        """Reject an offer by its id, or all of a plan by its hash, waiting or approved; what was
        never reserved of its price is freed."""
        with self._locked():
            found = self.matching(reference)
            entry = self.find(reference, "approved", "waiting")
            for other in found:
                if other.ended:
                    continue
                rejected = replace(
                    other,
                    state="rejected",
                    decided_at=self._clock(),
                    reason=reason[:200],
                    ended=other.over,
                )
                self._write(rejected)
                if other.sha256 == entry.sha256:
                    entry = rejected
                self._free(rejected, book, reason or "rejected")
        return entry

    def left(self, book: Ledger) -> None:
        """The lab left the federation: waiting and approved plans are rejected, holds freed."""
        with self._locked():
            for entry in self.entries():
                if entry.state in ("waiting", "approved") and not entry.ended:
                    self._write(replace(entry, state="rejected", reason="the lab left"))
                    self._free(entry, book, "the lab left")

    def changes(self, entry: Entry) -> tuple[str, ...]:
        """What differs from the plan approved last, key by key and lab by lab; empty for the
        first plan."""
        before = [
            other
            for other in self.entries()
            if other.state == "approved" and other.decided_at is not None and other != entry
        ]
        if not before:
            return ()
        last = max(before, key=lambda other: str(other.decided_at))
        return (*_plan_changes(last, entry), *_roster_changes(last, entry))

    def why_not_automatic(self, entry: Entry, settings: Settings, book: Ledger) -> str:
        """Why a waiting plan needs a person; empty where auto_approve covers it."""
        auto, plan = settings.auto_approve, entry.offer.plan
        if not auto.enabled:
            return "auto_approve is off"
        if settings.approvals > 1:
            return f"approvals is {settings.approvals}: so many persons decide"
        if plan.privacy.unit != "patient":
            return "the plan does not protect patients"
        if auto.secure_aggregation and not plan.secure_aggregation.enabled:
            return "the plan has no secure aggregation"
        price = price_of(
            entry.offer, settings, book, lab=self.own.name, parameters=entry.parameters
        )
        assert price.plan is not None
        assert auto.max_epsilon is not None
        if not price.plan.epsilon <= auto.max_epsilon:
            return f"{price.plan} is over auto_approve.max_epsilon={auto.max_epsilon:g}"
        if auto.known_labs_only:
            known = {
                key
                for other in self.entries()
                if other.state == "approved"
                for key in fingerprints(other.offer).values()
            }
            new = [lab for lab, key in fingerprints(entry.offer).items() if key not in known]
            if new:
                return f"the keys of {', '.join(new)} were never approved here"
        return ""

    def listing(self, settings: Settings, book: Ledger) -> dict[str, Any]:
        """``cytofed client plans --json``; plans that still wait are priced as of now."""
        return {"plans": [self.listed(entry, settings, book) for entry in self.entries()]}

    def listed(self, entry: Entry, settings: Settings, book: Ledger) -> dict[str, Any]:
        """One offer of ``listing``."""
        price, refused, changes = entry.price, "", entry.changes
        if entry.state == "waiting":
            changes = self.changes(entry)
            try:
                refuse(entry.offer, settings, own=self.own, parameters=entry.parameters)
            except (RefusedError, InputError, VerificationError) as error:
                refused = error.message
            try:
                now = price_of(
                    entry.offer,
                    settings,
                    book,
                    lab=self.own.name,
                    parameters=entry.parameters,
                    known=self.models(),
                )
                price = now.to_json()
                if now.unbounded is not None and now.limit is not None:
                    refused = refused or f"the pool is {now.unbounded}: no limit on it can hold"
                elif now.fitting_rounds < now.rounds:
                    over = f"{now.fitting_rounds} of {now.rounds} rounds fit limits.max_epsilon"
                    refused = refused or over
            except (RefusedError, InputError) as error:
                refused = refused or error.message
        decided = None if entry.decided_at is None else entry.decided_at.isoformat()
        return {
            "offer": entry.sha256,
            "plan_sha256": entry.plan_sha256,
            "federation": entry.offer.federation,
            "run": entry.run,
            "name": entry.offer.plan.name,
            "state": entry.state,
            "ended": entry.ended,
            "offered_at": entry.offered_at.isoformat(),
            "expires_at": entry.expires_at.isoformat(),
            "decided_at": decided,
            "replaced_by": entry.replaced_by or None,
            "ends": [
                {"offer": other.sha256, "run": other.run}
                for other in (self.in_place_of(entry) if entry.state == "waiting" else ())
            ],
            "approvals": [approval.to_json() for approval in entry.approvals],
            "approvals_needed": settings.approvals,
            "reason": entry.reason,
            "refused": refused,
            "price": price,
            "changes": list(changes),
        }

    def _free(self, entry: Entry, book: Ledger, reason: str) -> None:
        """Free what is set aside for an offer's plan, unless another approval needs it."""
        others = (e for e in self.entries() if e.sha256 != entry.sha256)
        if any(
            e.plan_sha256 == entry.plan_sha256 and e.state == "approved" and not e.ended
            for e in others
        ):
            return
        federation = ledger_federation(entry.offer.federation, self.own.name)
        book.free(federation=federation, plan_sha256=entry.plan_sha256, reason=reason)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time: a run's end, told to the daemon, and a person's approval meet."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def approved_holds(self) -> tuple[Hold, ...]:
        """The holds of all approvals here, for ``Ledger.restore_charge``."""
        return tuple(
            Hold(
                entry.hold,
                ledger_federation(entry.offer.federation, self.own.name),
                entry.plan_sha256,
                _stated_cost(entry.offer.plan, self.own.name, _images_approved(entry)),
            )
            for entry in self.entries()
            if entry.hold
        )

    def ask_again(self, reason: str) -> None:
        """Approvals whose holds were charged need another one."""
        with self._locked():
            for entry in self.entries():
                if entry.state == "approved" and not entry.ended:
                    self._write(replace(entry, state="waiting", reason=reason, approvals=()))

    def _path(self, offer: Offer) -> Path:
        return self.folder / f"{offer.plan.sha256[:16]}-{offer.sha256[:16]}.json"

    def _write(self, entry: Entry) -> Entry:
        tree = {
            "document": entry.document.hex(),
            "parameters": entry.parameters,
            "state": entry.state,
            "offered_at": entry.offered_at.isoformat(),
            "decided_at": None if entry.decided_at is None else entry.decided_at.isoformat(),
            "reason": entry.reason,
            "price": entry.price,
            "changes": list(entry.changes),
            "hold": entry.hold,
            "ended": entry.ended,
            "approvals": [approval.to_json() for approval in entry.approvals],
            "salt": entry.salt,
            "replaced_by": entry.replaced_by,
        }
        write_atomically(self._path(entry.offer), json.dumps(tree, indent=1) + "\n", mode=0o600)
        return entry

    def _read(self, path: Path) -> Entry:
        """An offer's file, parsed anew where it is another than before: files are replaced whole,
        and each order and each turn of the daemon asks for all of them."""
        found = path.stat()
        mark = (found.st_ino, found.st_mtime_ns, found.st_size)
        known = self._parsed.get(path)
        if known is None or known[0] != mark:
            self._parsed[path] = known = (mark, self._parse(path))
        return known[1]

    def _parse(self, path: Path) -> Entry:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            document = bytes.fromhex(tree["document"])
            decided = tree["decided_at"]
            entry = Entry(
                offer=self._verified(document),
                document=document,
                parameters=int(tree["parameters"]),
                state=tree["state"],
                offered_at=datetime.fromisoformat(tree["offered_at"]),
                decided_at=None if decided is None else datetime.fromisoformat(decided),
                reason=str(tree["reason"]),
                price=tree["price"],
                changes=tuple(tree["changes"]),
                hold=str(tree["hold"]),
                ended=bool(tree["ended"]),
                approvals=tuple(
                    Approval(str(a["by"]), str(a["note"]), datetime.fromisoformat(a["at"]))
                    for a in tree.get("approvals", ())
                ),
                salt=str(tree.get("salt", "")),
                replaced_by=str(tree.get("replaced_by", "")),
            )
        except (ValueError, KeyError, TypeError):
            entry = None
        if entry is None or self._path(entry.offer) != path:
            raise VerificationError(
                f"{path} is not what this lab wrote",
                hint="restore the file, or remove it: the coordinator offers the plan again",
            )
        return entry


def restore_charge(
    settings: Settings, plans: PlanBook, *, seen_heads: Sequence[str]
) -> dict[str, Any]:
    """Go on after a ledger was lost or restored: charge all approved plans in full.

    ``seen_heads``: the ledger's heads in the egress log. A ledger that is gone is begun anew, with
    these charges in it. Running plans need another approval. Returns the budget after it.
    """
    Ledger.create(settings.ledger)
    with open_ledger(settings) as book:
        book.restore_charge(plans.approved_holds(), seen_heads=seen_heads)
        plans.ask_again("charged in full after the ledger was restored")
        return book.summary()


def budget(settings: Settings) -> dict[str, Any]:
    """``cytofed client budget --json``."""
    with open_ledger(settings) as book:
        return book.summary()


def _refuse_over(entry: Entry, *, now: datetime) -> None:
    """Errors: RefusedError for an offer that nobody can approve any more, and why."""
    what = f"offer {entry.sha256[:12]} for run {one_line(entry.run, most=64)}"
    if entry.state == "replaced":
        raise RefusedError(
            f"{what} was replaced by offer {entry.replaced_by}: its plan or its labs are others",
            hint=f"cytofed client plan show DIR {entry.replaced_by}",
        )
    if entry.over:
        raise RefusedError(
            f"{what} is over and can't be approved any more: {entry.reason or entry.state}",
            hint="ask the coordinator to offer the plan again",
        )
    asked_again = entry.state == "waiting" and entry.decided_at is not None
    if now > entry.expires_at and not asked_again:
        raise RefusedError(
            f"{what} can't be approved any more: cohort.approval_days="
            f"{entry.offer.plan.cohort.approval_days:g} after it was offered are over",
            hint="ask the coordinator to offer the plan again",
        )


def _same_person(name: str) -> str:
    """A name without what two spellings of it differ in."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


def _images_approved(entry: Entry) -> int | None:
    """The most images of one patient, as the price of an approval has it."""
    found = ((entry.price or {}).get("privacy") or {}).get("images_per_patient")
    return found if isinstance(found, int) else None


def _plan_changes(last: Entry, entry: Entry) -> Iterator[str]:
    before, after = flat(last.offer.plan), flat(entry.offer.plan)
    for key in dict.fromkeys((*before, *after)):
        one, other = before.get(key), after.get(key)
        if one != other:
            yield f"{key}: {json.dumps(one)} -> {json.dumps(other)}"
    if last.parameters != entry.parameters:
        yield f"parameters: {last.parameters} -> {entry.parameters}"


def _roster_changes(last: Entry, entry: Entry) -> Iterator[str]:
    before, after = fingerprints(last.offer), fingerprints(entry.offer)
    for lab in sorted({*before, *after}):
        match before.get(lab), after.get(lab):
            case None, str(key):
                yield f"lab {lab} is new: {key}"
            case str(), None:
                yield f"lab {lab} is gone"
            case str(old), str(key) if old != key:
                yield f"lab {lab} HAS ANOTHER KEY: {old} -> {key}"


def flat(plan: Plan) -> dict[str, Any]:
    """All keys of a plan that are part of its hash, dotted."""

    def walk(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            where = f"{path}.{key}" if path else key
            if isinstance(value, Mapping):
                yield from walk(value, where)
            else:
                yield where, value

    tree = {key: value for key, value in to_dict(plan).items() if key != "simulation"}
    return dict(walk(tree, ""))
