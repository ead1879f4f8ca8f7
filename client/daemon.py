"""``cytofed client start``: one process that waits for work and answers it, outbound only.

What comes in is believed in this order: the signed offer of a plan is kept until a person (or the
lab's own rule) decides; the signed start of a run names a cohort whose members all approved; an
order opens only in the place that both give. What goes out is sealed for the coordinator and on
the disk, and in the egress log, before its first byte leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from cytofed.client.app import Lab, lab_app, self_check
from cytofed.client.budget import ledger_order
from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import (
    EgressLog,
    Field,
    Outgoing,
    Protection,
    fields_of,
    public_reason,
)
from cytofed.client.enforcement import (
    Approved,
    Asked,
    Record,
    caught_up,
    over,
    permit,
    undecided,
)
from cytofed.client.fleet import Answer, FleetLink, tell_leave
from cytofed.client.memory import SealedMemory
from cytofed.client.opening import (
    LimitedBudget,
    make_start,
    numbers_of,
    open_images,
    open_lab,
    parameters_of,
)
from cytofed.client.origin import MODEL_FILE, refuse_disguised
from cytofed.client.outbox import Outbox, SameBytes
from cytofed.client.pace import Pace
from cytofed.client.policy import (
    BY_RULE,
    Entry,
    ledger_federation,
    open_ledger,
    refuse,
    refuse_cohort,
)
from cytofed.client.secure import SecureLab
from cytofed.client.settings import FollowedSettings
from cytofed.client.states import SealedStates
from cytofed.documents import Decision, Ended, Offer, Start, secure_cohort
from cytofed.encoder import Given
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.messages import (
    BadMessage,
    Order,
    new_message,
    unpack_order,
)
from cytofed.plan import Plan
from cytofed.privacy import ledger, wire
from cytofed.privacy.noise import Randomness
from cytofed.privacy.sealing import Context as Place
from cytofed.privacy.sealing import Direction, Sealed, seal, unseal
from cytofed.privacy.terms import terms_of
from cytofed.sealed_message import (
    REFUSAL,
    Parcel,
    file_of,
    new_content,
    pack_content,
    pack_parcel,
    text_of,
    unpack_content,
    unpack_parcel,
)
from cytofed.secure_round import public_bound, weight_bounds
from cytofed.start import GIVEN_FILE, take_start
from cytofed.strategies import make_strategy
from cytofed.words import one_line, without_markup

MAX_OFFER_BYTES = 1 << 20
"""of an offer's document: a plan, and the keys of some hundred labs"""

_COMPUTING = threading.RLock()
"""Whoever computes holds it: torch's threads and seeds are the process's, and the check of the
private path is a thread of its own. Two that compute at once get other numbers than each alone."""

_SPARE_BYTES = wire.MAX_MESSAGE_BYTES
"""of a message beyond the arrays of its plan: keys and shares of a cohort, a model's card"""

_UNPLANNED, _UNPLANNED_EVERY_S = 200, 5.0
"""answers that no approved plan asks for, at once and in the long run: each is a record in the
lab's log, for ever"""

_log = logging.getLogger("cytofed.lab")


class Daemon:
    """A lab at work. ``run`` returns when the process is told to end."""

    def __init__(
        self,
        directory: ClientDirectory,
        *,
        note: Callable[[str], None],
        rehearsal: bool = False,
        randomness: Callable[[Order], Randomness] | None = None,
    ) -> None:
        """``rehearsal``: of a lab of made-up patients, which answers private orders unchecked.
        ``randomness``: of its draws and noise; without, and in every other lab, the system's.
        """
        self._directory, self._note = directory, note
        self._rehearsal, self._randomness = rehearsal, randomness
        self._membership = directory.membership()
        self._identity = directory.identity()
        self._coordinator = directory.coordinator()
        self._plans = directory.plans()
        self._said = ""
        self._at = ("", 0)
        self._open: _OpenRun | None = None
        self._pace = Pace(_UNPLANNED, _UNPLANNED_EVERY_S)
        self._check = _Check(directory.root / "noise.seen")
        self._app = lab_app(
            self._lab,
            on_step=lambda _order, _step: self._refuse_paused(),
            check=self._refuse_unchecked,
            mods=[_told_by_kind],
        )

    def run(self) -> None:
        """Connect and answer, for ever. Errors: those of the lab's own files and settings."""
        with self.at_work():
            self._check.start()
            if any(e.offer.plan.privacy.unit != "none" for e in self._plans.entries()):
                self._check.want()
            try:
                while not self._worked(FleetLink(self._directory, self._egress, self._say)):
                    time.sleep(self._settings.timeouts.retry_max_s)
            except KeyboardInterrupt:
                pass
            finally:
                self._say("stopped", False)
                self._check.stop()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The lab's records are open, so that ``respond`` can answer."""
        self._file = FollowedSettings(self._directory.root / "client.yaml")
        self._settings = settings = self._file.now()
        with EgressLog(
            self._directory.egress,
            self._identity,
            max_bytes_per_round=settings.limits.max_bytes_per_round,
        ) as egress:
            with open_ledger(settings) as book:
                egress.check_ledger(book)
            self._egress = egress
            self._key = self._directory.storage_key()
            yield

    def _worked(self, link: FleetLink) -> bool:
        """Answer until told to end; False where a full disk or the like has to be mended first."""
        try:
            link.work(self.respond, idle=self._idle, room=self._room)
            return True
        except (InputError, RefusedError, VerificationError):
            raise  # these need a person
        except (CytofedError, OSError) as error:
            told = error.message if isinstance(error, CytofedError) else str(error)
            self._say(f"waiting: {told}; trying again", False)
            return False
        finally:
            link.stop()

    def _say(self, text: str, online: bool) -> None:
        if text != self._said:
            self._said = text
            self._note(text)
            with contextlib.suppress(OSError):  # a full disk; it stands in the log
                self._directory.say(text, online=online, at=self._at)

    def _refuse_unchecked(self, _order: Order, _lab: Lab) -> None:
        """Errors: VerificationError naming the check that the private path has not passed."""
        if not self._rehearsal:
            self._check.passed()

    def _idle(self) -> None:
        if self._check.failure is not None:
            raise self._check.failure
        if self._directory.left:
            self._tell_leave()
            raise KeyboardInterrupt
        try:
            self._follow_settings()
        except InputError as error:
            self._say(f"refuses every order: {error.message}", True)
            return
        entries = self._still_open(self._plans.entries())
        self._sweep(entries)
        waiting = [e.sha256[:12] for e in entries if e.state == "waiting"]
        if self._directory.paused:
            self._say("paused: orders are refused until `cytofed client resume`", True)
        elif waiting:
            self._say(f"connected, offer {', '.join(waiting)} waits for approval", True)
        else:
            self._say("connected, waiting for work", True)

    def _follow_settings(self) -> None:
        """Take the limits of client.yaml as they are now. Errors: InputError where it is wrong."""
        now = self._file.now()
        if now != self._settings:
            self._settings = now
            self._egress.limit(now.limits.max_bytes_per_round)
            self._open = None  # which has the limits of before
            self._note("client.yaml has changed: its limits hold from now on")

    def _still_open(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """The entries, once those whose time is over have ended."""
        if not any(map(self._over, entries)):
            return entries
        with open_ledger(self._settings) as book:
            for entry in self._plans.expire(self._over, book):
                self._note(f"plan {entry.plan_sha256[:12]} is over: {entry.reason}")
        return self._plans.entries()

    def _over(self, entry: Entry) -> str:
        """Why an offer's time is over; empty where it is not, or was closed before."""
        now = datetime.now(UTC)
        if entry.over or entry.state == "rejected":
            return ""
        if entry.state == "waiting":
            return undecided(entry, now=now)
        try:
            so_far = Record(self._directory.run_folder(entry.offer)).load()
        except VerificationError:
            return ""  # which each order of the run is told
        return over(Approved.of(entry, self._settings.limits), so_far, now=now)

    def _sweep(self, entries: Sequence[Entry]) -> None:
        """Of an offer that is not approved nothing but its record is kept."""
        runs = self._directory.root / "runs"
        approved = {entry.offer.sha256 for entry in entries if entry.state == "approved"}
        for folder in runs.iterdir() if runs.is_dir() else ():
            if folder.name not in approved:
                shutil.rmtree(folder)
                if self._open is not None and self._open.offer == folder.name:
                    self._open = None

    def _tell_leave(self) -> None:
        try:
            tell_leave(self._directory, self._egress)
        except CytofedError as error:
            self._note(f"this lab has left; the coordinator was not told: {error.message}")
        else:
            self._note("this lab has left the federation, and the coordinator knows")

    # --- answers

    def _room(self) -> int:
        """Most bytes that the arrays of a message may have: what approved plans come to."""
        approved = [entry for entry in self._plans.entries() if entry.state == "approved"]
        return max(map(_room_of, approved), default=MAX_OFFER_BYTES)

    def respond(self, message: Message) -> Answer | None:
        """Answer what the coordinator asks; never an error. None: it asks without end."""
        if not self._pace.room:
            return None
        answer = self._answer(message)
        if answer.outgoing.type in ("status", "decision", "refusal"):
            self._pace.take()
        return answer

    def _answer(self, message: Message) -> Answer:
        kind = message.metadata.message_type
        try:
            if kind == "query.offer":
                return self._to_offer(message)
            if kind == "query.end":
                return self._to_end(message)
            return self._to_order(message, kind)
        except CytofedError as error:
            _log.warning("%s: %s", kind, error.message)
            return self._unsealed_refusal(error)
        except Exception as error:
            _log.exception("%s", kind)
            return self._unsealed_refusal(error)

    def _unsealed_refusal(self, error: Exception) -> Answer:
        """For what has no place to seal an answer for: signed by nobody, and says nothing."""
        reason = public_reason(error, known=(self._membership.lab,))
        outgoing = self._outgoing("refusal", {"reason": reason}, reason.encode())
        return Answer(outgoing, reason=reason)

    def _to_offer(self, message: Message) -> Answer:
        """Keep a new offer; say what was decided about it, or that nothing was."""
        record = message.content.get("offer") if message.has_content() else None
        document = record.get("document") if isinstance(record, ConfigRecord) else None
        if not isinstance(document, bytes):
            raise BadMessage("an offer without a document")
        if len(document) > MAX_OFFER_BYTES:  # guard: offer-size
            raise RefusedError(f"an offer of {len(document)} bytes, more than {MAX_OFFER_BYTES}")
        offer = Offer.verified(document, self._coordinator)
        if offer.federation != self._membership.federation:  # guard: offer-federation
            raise VerificationError(f"offer of federation {offer.federation}")
        self._follow_settings()
        if offer.plan.privacy.unit != "none":
            self._check.want()
        entry = self._plans.known(offer)
        if entry is None:
            self._plans.refuse_too_many(offer)  # before the work of looking into its plan
            entry = self._plans.offered(document, parameters=parameters_of(offer.plan))
            self._note(
                f"offer {entry.sha256} of plan {entry.plan_sha256} has come: see "
                "`cytofed client plans`"
            )
            self._approve_by_rule(entry)
            entry = self._plans.known(offer) or entry
        if entry.state == "expired":  # which is a no, by its time
            entry = replace(entry, state="rejected", decided_at=entry.expires_at)
        if entry.ended or entry.state not in ("approved", "rejected"):
            return self._plain("status", {"state": "ended" if entry.ended else entry.state}, b"")
        decision = self._decision(entry)
        signed = decision.signed(self._identity)
        told: dict[str, str | int | float | bytes] = {
            "verdict": decision.verdict,
            "run": decision.run,
            "plan_sha256": decision.plan_sha256,
            "roster_sha256": decision.roster_sha256,
            "max_weight": decision.max_weight,
            "offer_sha256": entry.sha256,
            "record_sha256": decision.record_sha256,
            "at": int(decision.at.timestamp()),
            "signature": signed,
        }
        return self._plain("decision", told, signed)

    def _to_end(self, message: Message) -> Answer:
        """An offer is over for this lab, which is not in the run's start: free what it held."""
        record = message.content.get("end") if message.has_content() else None
        document = record.get("document") if isinstance(record, ConfigRecord) else None
        if not isinstance(document, bytes):
            raise BadMessage("the end of a run without a document")
        federation = self._membership.federation
        ended = Ended.verified(document, self._coordinator, federation=federation)
        if any(entry.sha256 == ended.offer_sha256 for entry in self._plans.entries()):
            with open_ledger(self._settings) as book:
                self._plans.ended(ended.offer_sha256, book, why=ended.why)
            self._note(f"run {one_line(ended.run)} is over for this lab: {ended.why}")
        return self._plain("status", {"state": "ended"}, b"")

    def _approve_by_rule(self, entry: Entry) -> None:
        with open_ledger(self._settings) as book:
            why = self._plans.why_not_automatic(entry, self._settings, book)
            if why:
                return
            try:
                self._plans.approve(
                    entry.sha256, self._settings, book, by=BY_RULE, note="within its rules"
                )
            except CytofedError as error:
                self._note(f"not approved by rule: {error.message}")

    def _decision(self, entry: Entry) -> Decision:
        plan = entry.offer.plan
        bound = 0.0
        if entry.state == "approved":
            if plan.privacy.unit == "none":
                folder = self._directory.run_folder(entry.offer)
                images = open_images(plan, self._settings, folder)
                bound = public_bound([float(len(images.train))])
            else:
                bound = float(self._settings.patients_declared or 0)
        return Decision(
            lab=self._membership.lab,
            verdict="approved" if entry.state == "approved" else "rejected",
            run=entry.run,
            plan_sha256=entry.plan_sha256,
            roster_sha256=entry.offer.roster.sha256,
            max_weight=int(bound),
            at=entry.decided_at or datetime.now(UTC),
            reason="",
            record_sha256=entry.record_sha256 if entry.state == "approved" else "",
        )

    def _to_order(self, message: Message, kind: str) -> Answer:
        parcel = unpack_parcel(message)
        # A result comes again where the coordinator never learnt that it is here.
        entry = self._plans.approved(parcel.run, over=kind == "query.result")
        offer = entry.offer
        self._check_start(offer, parcel)
        opened = unseal(
            parcel.sealed,
            self._place(offer, parcel, kind, to_lab=True),
            sender=self._coordinator,
            receiver=self._identity,
            max_bytes=_room_of(entry),
            in_place=not parcel.sealed.body.readonly,
        )
        content = unpack_content(opened.manifest, opened.payload)
        # From here on the coordinator has asked this: whatever goes wrong is answered in its place.
        try:
            if kind == "query.start":
                self._refuse_paused()
                if why := self._over(entry):
                    raise RefusedError(f"run {offer.run} is over at this lab: {why}")
                return self._to_start(entry, parcel, content)
            if kind == "query.result":
                return self._to_result(offer, parcel, content)
            return self._carry_out(entry, parcel, kind, content)
        except CytofedError as error:
            _log.warning("%s of round %d: %s", kind, parcel.round, error.message)
            return self._refusal(offer, parcel, error)
        except Exception as error:
            _log.exception("%s of round %d", kind, parcel.round)
            return self._refusal(offer, parcel, error)

    def _check_start(self, offer: Offer, parcel: Parcel) -> Start:
        start = Start.verified(parcel.papers, self._coordinator, offer)
        if self._membership.lab not in start.decisions:  # guard: lab-in-cohort
            raise VerificationError("this lab is not in the cohort")
        pinned = self._directory.run_folder(offer) / "start"
        cohort = json.dumps(start.labs)
        if not pinned.is_file():
            refuse_cohort(offer, start.labs, self._settings)
            pinned.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(pinned, cohort, mode=0o600)
        elif pinned.read_text() != cohort:  # guard: start-pinned
            raise VerificationError("the run has another cohort than when it started")
        return start

    def _carry_out(self, entry: Entry, parcel: Parcel, kind: str, content: RecordDict) -> Answer:
        """A train, evaluate or secure-aggregation order, by the lab half."""
        offer = entry.offer
        self._refuse_paused()
        order_message = new_message(content, kind=kind, node=0, group=str(parcel.round), ttl_s=1.0)
        if kind == "query.secagg":
            self._permit(entry, Asked(kind, parcel.round, parcel.slot))
            with self._computing(offer.plan):
                self._open_run(entry, parcel)
                found = self._ask_app(order_message)
            return self._counted(entry, self._sealed(offer, parcel, kind, found, None))
        order = unpack_order(order_message)
        place = (order.run, order.round, order.slot, order.plan_sha256)
        if kind not in ("train", "evaluate") or place != (
            offer.run, parcel.round, parcel.slot, offer.plan.sha256,
        ):  # fmt: skip  # guard: order-place
            raise VerificationError(f"the order says {place}, its seal another place")
        mine = ledger_order(order, self._ledger_name(offer))
        kept = self._outbox(offer).take(mine)
        asked = Asked(order.kind, order.round, order.slot)
        self._permit(entry, asked, again=isinstance(kept, SameBytes))
        if isinstance(kept, SameBytes):
            again = self._parcel(parcel, kind, Sealed.from_bytes(kept.sealed))
            answer = Answer(kept.outgoing, again, sent=self._settling(offer, order))
            return self._counted(entry, answer)
        self._at = (order.run, order.round)
        self._say(f"{kind} for run {order.run}, round {order.round}", True)
        with self._computing(offer.plan):
            self._open_run(entry, parcel)
            found = self._ask_app(order_message)
        return self._counted(entry, self._sealed(offer, parcel, kind, found, (mine, order)))

    def _permit(self, entry: Entry, asked: Asked, *, again: bool = False) -> None:
        """Note that the order is carried out. Errors: those of ``permit`` where it must not be;
        RefusedError where it breaks a limit of client.yaml as it is now."""
        self._follow_settings()
        refuse(entry.offer, self._settings, own=self._identity.public, parameters=entry.parameters)
        cohort = json.loads((self._directory.run_folder(entry.offer) / "start").read_text())
        refuse_cohort(entry.offer, cohort, self._settings)
        record, now = Record(self._directory.run_folder(entry.offer)), datetime.now(UTC)
        approved = Approved.of(entry, self._settings.limits)
        last = self._egress.last_round(entry.run, entry.plan_sha256)
        so_far = caught_up(record.load(), approved, last_round=last)
        record.save(permit(asked, approved, so_far, now=now, again=again))

    def _counted(self, entry: Entry, answer: Answer) -> Answer:
        """An answer, once its bytes stand in the approval's record."""
        record = Record(self._directory.run_folder(entry.offer))
        record.save(record.load().sent(answer.outgoing.nbytes))
        return answer

    def _refuse_paused(self) -> None:
        if self._directory.paused:
            raise RefusedError("paused by this lab")  # guard: paused

    @contextlib.contextmanager
    def _computing(self, plan: Plan) -> Iterator[None]:
        """Have torch to oneself; a private plan's turn comes once the private path has passed.

        Errors: VerificationError naming the check that failed.
        """
        if plan.privacy.unit != "none" and not self._rehearsal:
            self._check.passed()
        with _COMPUTING:
            yield

    def _ask_app(self, message: Message) -> RecordDict:
        """Errors: RefusedError with the lab half's reason, or where it was paused meanwhile."""
        reply = self._app(message, Context(0, 0, {}, RecordDict(), {}))
        if reply.has_error():
            raise RefusedError(reply.error.reason or "refused")
        self._refuse_paused()
        return reply.content

    def _sealed(
        self,
        offer: Offer,
        parcel: Parcel,
        kind: str,
        content: RecordDict,
        kept: tuple[ledger.Order, Order] | None,
    ) -> Answer:
        """Seal an answer; with ``kept`` it goes into the outbox."""
        manifest, payload = pack_content(content)
        sealed = seal(
            payload,
            self._place(offer, parcel, kind, to_lab=False),
            sender=self._identity,
            receiver=self._coordinator,
            manifest=manifest,
        )
        secure = offer.plan.secure_aggregation.enabled
        type_ = {"train": "masked" if secure else "update",
                 "evaluate": "masked" if secure else "evaluation",
                 "query.secagg": "secagg", REFUSAL: "refusal"}[kind]  # fmt: skip
        outgoing = Outgoing(
            type=type_,
            destination=self._membership.address,
            fields=_fields(content),
            nbytes=sealed.nbytes,
            sha256=sealed.sha256,
            run=offer.run,
            round=parcel.round,
            slot=parcel.slot,
            plan_sha256=offer.plan.sha256,
            protection=self._protection(offer, kind),
            ledger_head=self._ledger_head(),
        )
        travelling = self._parcel(parcel, kind, sealed)
        if kept is None:
            self._egress.check(outgoing)  # what may not leave becomes a refusal here
            return Answer(outgoing, travelling)
        mine, order = kept
        self._outbox(offer).put(mine, sealed, outgoing)
        return Answer(outgoing, travelling, sent=self._settling(offer, order))

    def _refusal(self, offer: Offer, parcel: Parcel, error: Exception) -> Answer:
        """Why not, signed and sealed like any answer."""
        reason = public_reason(error, known=(offer.run, self._membership.lab))
        return self._sealed(offer, parcel, REFUSAL, new_content({"reason": reason}), None)

    def _to_start(self, entry: Entry, parcel: Parcel, content: RecordDict) -> Answer:
        """Keep the start model that the approved plan names by its content.

        Errors: VerificationError for any other, or one of another size than was approved.
        """
        offer, folder = entry.offer, self._directory.run_folder(entry.offer)
        given = Given.named(offer.plan.model.start)
        if given is None:
            raise VerificationError("a start model came for a plan that asks for none")
        take_start(given, folder, file_of(content), file_of(content, "card"))
        if offer.plan.privacy.unit != "none":
            try:
                refuse_disguised(offer.plan, folder / GIVEN_FILE, self._plans.models())
            except CytofedError:
                (folder / GIVEN_FILE).unlink()
                raise
        make_start(offer.plan, folder, parameters=entry.parameters)
        return self._received(offer, parcel, "query.start")

    def _to_result(self, offer: Offer, parcel: Parcel, content: RecordDict) -> Answer:
        """Keep the model, free what the run never used, and say that it is here."""
        folder = self._directory.model_folder(offer)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        model, kept = file_of(content), folder / MODEL_FILE
        if kept.is_file() and kept.read_bytes() != model:
            raise VerificationError(
                f"run {offer.run} has another result here, which came before",
                hint="a run has one: ask the coordinator why it sends another",
            )
        if model:
            write_atomically(kept, model)
        # Nothing is loaded, and nobody led away, by a card that the coordinator wrote.
        write_atomically(folder / "model_card.md", without_markup(text_of(content, "card")))
        _note_result(folder, offer, content)
        with open_ledger(self._settings) as book:
            why = f"run {offer.run} {text_of(content, 'status')} {text_of(content, 'reason')}"
            self._plans.ended(offer.sha256, book, why=why.strip())
        self._outbox(offer).end_run(offer.run, self._ledger_name(offer))
        if self._open is not None and self._open.offer == offer.sha256:
            self._open = None
        told = f"run {offer.run} {one_line(text_of(content, 'status'), most=40)}"
        self._note(f"{told}: cytofed client model DIR --out FILE" if model else told)
        return self._received(offer, parcel, "query.result")

    def _received(self, offer: Offer, parcel: Parcel, kind: str) -> Answer:
        content = new_content({"state": "received"})
        manifest, payload = pack_content(content)
        sealed = seal(
            payload,
            self._place(offer, parcel, kind, to_lab=False),
            sender=self._identity,
            receiver=self._coordinator,
            manifest=manifest,
        )
        outgoing = Outgoing(
            type="status",
            destination=self._membership.address,
            fields=_fields(content),
            nbytes=sealed.nbytes,
            sha256=sealed.sha256,
            run=offer.run,
        )
        return Answer(outgoing, self._parcel(parcel, kind, sealed))

    # --- places

    def _place(self, offer: Offer, parcel: Parcel, content: str, *, to_lab: bool) -> Place:
        lab, coordinator = self._membership.lab, self._coordinator.name
        return Place(
            federation=self._membership.federation,
            run=offer.run,
            plan_sha256=offer.plan.sha256,
            roster_sha256=offer.roster.sha256,
            round=parcel.round,
            slot=parcel.slot,
            sender=coordinator if to_lab else lab,
            receiver=lab if to_lab else coordinator,
            direction=Direction.TO_LAB if to_lab else Direction.TO_COORDINATOR,
            content=content,
        )

    def _parcel(self, asked: Parcel, kind: str, sealed: Sealed) -> RecordDict:
        return pack_parcel(Parcel(asked.run, asked.round, asked.slot, kind, sealed))

    def _plain(
        self,
        type_: str,
        told: Mapping[str, str | int | float | bytes],
        signed: bytes,
    ) -> Answer:
        """An answer that is signed and not sealed: about an offer, before there is a run."""
        content = RecordDict({"answer": ConfigRecord({"decision": signed})})
        return Answer(self._outgoing(type_, told, signed), content)

    def _outgoing(
        self, type_: str, told: Mapping[str, str | int | float | bytes], data: bytes
    ) -> Outgoing:
        return Outgoing(
            type=type_,
            destination=self._membership.address,
            fields=fields_of(told),
            nbytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    # --- the lab half

    def _lab(self, _context: Context, run: str) -> Lab:
        if self._open is None or self._open.run != run:
            raise VerificationError(f"run {run} is not open")
        return self._open.lab

    def _open_run(self, entry: Entry, parcel: Parcel) -> None:
        """Open the lab for an approved run, kept warm until another."""
        offer = entry.offer
        if self._open is not None and self._open.offer == offer.sha256:
            return
        self._open = None
        folder, name = self._directory.run_folder(offer), self._membership.lab
        secure = None
        if offer.plan.secure_aggregation.enabled:
            start = self._check_start(offer, parcel)
            cohort = secure_cohort(start, offer, self._coordinator)
            states = SealedStates(folder, offer.sha256, self._key)
            bounds = weight_bounds(start.decided(offer), offer.plan)
            secure = SecureLab(self._identity, cohort, bounds, states)
        make_start(offer.plan, folder, parameters=entry.parameters)
        lab = open_lab(
            offer,
            self._settings,
            open_images(offer.plan, self._settings, folder),
            name=name,
            folder=folder,
            outbox=self._outbox(offer),
            memory=SealedMemory(folder / "memory", name, offer.sha256, self._key),
            secure=secure,
        )
        if self._randomness is not None:
            lab = replace(lab, randomness=self._randomness)
        self._open = _OpenRun(offer.run, offer.sha256, lab)

    def _outbox(self, offer: Offer) -> Outbox:
        return Outbox(self._directory.run_folder(offer) / "outbox", self._key, self._egress)

    def _settling(self, offer: Offer, order: Order) -> Callable[[], None]:
        """After the answer has arrived: the ledger notes it."""
        budget = LimitedBudget(
            self._settings.ledger,
            self._settings.pool,
            self._ledger_name(offer),
            "patient",
            self._settings.limits.of_ledger(),
        )
        return lambda: budget.settle(order)

    def _ledger_name(self, offer: Offer) -> str:
        return ledger_federation(offer.federation, self._membership.lab)

    def _ledger_head(self) -> str:
        with open_ledger(self._settings) as book:
            return book.head

    def _protection(self, offer: Offer, kind: str) -> Protection:
        """What covers an answer: the mechanism of its kind, and what is spent with it."""
        unit, terms = offer.plan.privacy.unit, terms_of(offer.plan)
        if terms is None or kind not in ("train", "evaluate"):
            return Protection(unit)
        with open_ledger(self._settings) as book:
            spent = book.balance().spent
        clip, sigma = terms.max_norm, terms.training.sigma
        if kind == "evaluate" and terms.tally is not None:
            clip, sigma = terms.tally.max_norm, terms.tally.sigma
        epsilon = spent.epsilon if math.isfinite(spent.epsilon) else None
        return Protection(unit, clip=clip, sigma=sigma, epsilon=epsilon, delta=spent.delta)


_STOP_S = 60.0  # no order of a rehearsal takes so long


class _Check:
    """The check of the private path, in a thread of its own from a lab's start on.

    First what takes no time, and what it needs is imported; the rehearsal once a private plan is
    there. A failure stays, and what has not been found to pass has not passed: no private order is
    answered.
    """

    def __init__(self, seen: Path) -> None:
        """``seen``: the file of noise that earlier rehearsals saw."""
        self.failure: VerificationError | None = None
        self._seen = seen
        self._thread: threading.Thread | None = None
        self._wanted, self._done = threading.Event(), threading.Event()
        self._stopping = threading.Event()

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="check")
            self._thread.start()

    def stop(self) -> None:
        """End after the order under way. A process that ends while torch computes is an abort."""
        self._stopping.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def want(self) -> None:
        """There is a private plan."""
        self._wanted.set()

    def passed(self) -> None:
        """Wait for the end. Errors: VerificationError naming the check that failed."""
        self.want()
        self.start()
        self._done.wait()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        from cytofed.client.made_up import Stopped
        from cytofed.client.rehearsal import refuse_known_noise, rehearse
        from cytofed.privacy.noise import SystemRandomness

        try:
            with _COMPUTING:
                _log.info("self-check passed: %s", self_check(SystemRandomness))
            self._wanted.wait()
            with _COMPUTING:
                if self._stopping.is_set():
                    raise Stopped
                seen = rehearse(quick=True, stopping=self._stopping)
                refuse_known_noise(self._seen, seen.noises)
                _log.info("rehearsal passed: %s", seen)
        except Stopped:
            self.failure = VerificationError("the self-check was stopped: nothing is trained here")
        except Exception as error:
            if not isinstance(error, VerificationError):
                _log.exception("the check of the private path")
            told = error.message if isinstance(error, CytofedError) else type(error).__name__
            self.failure = VerificationError(
                f"self-check failed, nothing is trained here: {told}",
                hint="install cytofed anew; if it stays so, tell its authors",
            )
        finally:
            self._done.set()


def _room_of(entry: Entry) -> int:
    """Most bytes of an order of an approved plan, of its start model, or of its result."""
    plan = entry.offer.plan
    order = len(make_strategy(plan.strategy).down) * entry.parameters
    return 4 * max(order, numbers_of(plan)) + _SPARE_BYTES


def _told_by_kind(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """An error about settings or data, which may count or name patients, leaves by its kind."""
    try:
        return call_next(message, context)
    except InputError as error:
        _log.warning("order refused: %s", error)
        raise RefusedError(public_reason(error)) from error


@dataclass(frozen=True)
class _OpenRun:
    run: str
    offer: str
    lab: Lab = field(repr=False)


def _note_result(folder: Path, offer: Offer, content: RecordDict) -> None:
    """What the model is and how its run ended, beside it."""
    kept = {
        "run": offer.run,
        "plan_sha256": offer.plan.sha256,
        "received_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: one_line(text_of(content, key)) for key in ("status", "reason", "weights_sha256")},
    }
    write_atomically(folder / "result.json", json.dumps(kept, indent=1) + "\n")


def _fields(content: RecordDict) -> tuple[Field, ...]:
    """Header values, and arrays by shape, for the egress log."""
    header, record = content["header"], content["parts"]
    assert isinstance(header, ConfigRecord)
    assert isinstance(record, ArrayRecord)
    scalars = {k: v for k, v in header.items() if isinstance(v, str | int | float | bytes)}
    arrays = [Field(str(name), array.dtype, tuple(array.shape)) for name, array in record.items()]
    return (*fields_of(scalars), *arrays)
