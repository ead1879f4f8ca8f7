"""A Grid whose messages are sealed: the round loop sees contents, the one below sees parcels.

An order to many labs is encrypted once, with a key wrap for each. Replies are opened here, in the
place that the order had; what does not hold becomes that lab's failure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from cytofed.documents import LedgerHead, Roster
from cytofed.messages import ERROR_CODE, BadMessage
from cytofed.objects import cut_to_file
from cytofed.privacy.identity import Identity
from cytofed.privacy.sealing import Context, Direction, Sealed, seal, seal_for_all, unseal
from cytofed.sealed_message import (
    REFUSAL,
    Parcel,
    attach_head,
    attached_head,
    pack_body,
    pack_content,
    pack_parcel,
    text_of,
    travels_inside,
    unpack_content,
    unpack_parcel,
)
from cytofed.server.asking import unreadable


@dataclass(frozen=True)
class SealedRun:
    """The place of a run: what every sealed message of it says and is checked against."""

    identity: Identity
    roster: Roster
    run: str
    plan_sha256: str
    start: bytes
    """the signed start, which travels with every order"""
    nodes: Mapping[str, int]
    """the cohort"""

    def context(self, round_: int, slot: int, content: str, *, lab: str, to_lab: bool) -> Context:
        coordinator = self.identity.name
        return Context(
            federation=self.roster.federation,
            run=self.run,
            plan_sha256=self.plan_sha256,
            roster_sha256=self.roster.sha256,
            round=round_,
            slot=slot,
            sender=coordinator if to_lab else lab,
            receiver=lab if to_lab else coordinator,
            direction=Direction.TO_LAB if to_lab else Direction.TO_COORDINATOR,
            content=content,
        )


@dataclass(frozen=True)
class _Place:
    """Where an order was sent; its reply belongs there too."""

    lab: str
    round: int
    slot: int
    kind: str


@dataclass(frozen=True)
class _Shared:
    """One content, for one lab or many: sealed once, a large body in a file without a name."""

    content: RecordDict = field(repr=False)
    sealed: Mapping[str, Sealed] = field(repr=False)
    record: ArrayRecord | None = field(repr=False)
    """the body, as it travels with every parcel that is too large to hold it"""

    @staticmethod
    def make(content: RecordDict, sealed: Mapping[str, Sealed], spool: Path) -> _Shared:
        body = next(iter(sealed.values())).body
        if travels_inside(body):
            return _Shared(content, sealed, None)
        record = pack_body(body)
        # Its pieces keep the file, which has no name, for as long as one may be sent again.
        cut_to_file(record["body"], tempfile.TemporaryFile(dir=spool))  # noqa: SIM115
        bare = {lab: Sealed(found.prefix, memoryview(b"")) for lab, found in sealed.items()}
        return _Shared(content, bare, record)


class Heads(Protocol):
    """Remembers the last head of each lab's privacy ledger, as the lab signed it."""

    def seen_head(self, lab: str) -> bytes: ...
    def note_head(self, lab: str, document: bytes) -> None: ...


class SealedGrid(Grid):
    """See the module. ``reply_bytes``: largest payload of a reply; ``spool``: a folder for what is
    on its way, sealed."""

    def __init__(
        self, inner: Grid, sealed: SealedRun, *, reply_bytes: int, spool: Path, heads: Heads
    ) -> None:
        self._inner, self._sealed, self._reply_bytes = inner, sealed, reply_bytes
        self._spool, self._heads = spool, heads
        self._labs = {node: lab for lab, node in sealed.nodes.items()}
        self._places: dict[str, tuple[_Place, Message]] = {}
        """by its number, where each order was sent, and the order without its content"""
        self._shared: _Shared | None = None

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            metadata = message.metadata
            lab = self._labs[metadata.dst_node_id]
            place = _Place(
                lab, int(metadata.group_id), _slot(message.content), metadata.message_type
            )
            sealed, record = self._seal(message.content, place)
            parcel = Parcel(
                self._sealed.run,
                place.round,
                place.slot,
                place.kind,
                sealed,
                self._sealed.start,
            )
            content = pack_parcel(parcel, record)
            if head := self._heads.seen_head(lab):
                attach_head(content, head)
            outer = self._inner.create_message(
                content,
                metadata.message_type,
                metadata.dst_node_id,
                metadata.group_id,
                metadata.ttl,
            )
            [number] = self._inner.push_messages([outer])
            message.metadata.__dict__["_message_id"] = number
            self._places[number] = (place, remove_content_from_message(message))
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Opened replies, one at a time: the sealed ones wait outside this process's arrays.

        What is not asked for here nobody waits for any more.
        """
        wanted = list(message_ids)
        for number in self._places.keys() - set(wanted):
            del self._places[number]
        for reply in self._inner.pull_messages(wanted):
            number = reply.metadata.reply_to_message_id
            place, message = self._places.pop(number)
            if not self._places:
                self._shared = None  # answered by all: the model that it holds is an old one soon
            if reply.has_error():
                yield reply
                continue
            try:
                content = self._open(reply, place)
            except Exception as error:  # whatever a lab can make of a sealed content
                yield Message(Error(ERROR_CODE, unreadable(error)), reply_to=message)
            else:
                yield Message(content, reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("cytofed's round loop pushes and pulls")

    def _seal(self, content: RecordDict, place: _Place) -> tuple[Sealed, ArrayRecord | None]:
        context = self._sealed.context(
            place.round, place.slot, place.kind, lab=place.lab, to_lab=True
        )
        sender, roster = self._sealed.identity, self._sealed.roster
        if place.kind == "query.secagg":  # each lab has a content of its own
            manifest, payload = pack_content(content)
            receiver = roster.member(place.lab).identity
            sealed = seal(payload, context, sender=sender, receiver=receiver, manifest=manifest)
            own = _Shared.make(content, {place.lab: sealed}, self._spool)
            return own.sealed[place.lab], own.record
        if self._shared is None or self._shared.content is not content:
            self._shared = None  # before the next is made: there is one at a time
            manifest, payload = pack_content(content)
            receivers = [roster.member(lab).identity for lab in self._sealed.nodes]
            for_all = seal_for_all(
                payload, context, sender=sender, receivers=receivers, manifest=manifest
            )
            self._shared = _Shared.make(content, for_all, self._spool)
        return self._shared.sealed[place.lab], self._shared.record

    def _open(self, reply: Message, place: _Place) -> RecordDict:
        parcel = unpack_parcel(reply)
        if document := attached_head(reply):
            self._note_head(document, place.lab)
        kind = parcel.content
        if kind not in (place.kind, REFUSAL):  # guard: answer-kind
            raise BadMessage(f"answers a {place.kind} order with {kind!r:.40}")
        opened = unseal(
            parcel.sealed,
            self._sealed.context(place.round, place.slot, kind, lab=place.lab, to_lab=False),
            sender=self._sealed.roster.member(place.lab).identity,
            receiver=self._sealed.identity,
            max_bytes=self._reply_bytes,
            in_place=not parcel.sealed.body.readonly,
        )
        content = unpack_content(opened.manifest, opened.payload)
        if kind == REFUSAL:
            raise BadMessage(f"refused: {text_of(content, 'reason')}")
        return content

    def _note_head(self, document: bytes, lab: str) -> None:
        roster = self._sealed.roster
        LedgerHead.verified(  # guard: ledger-head
            document, roster.member(lab).identity, federation=roster.federation, lab=lab
        )
        self._heads.note_head(lab, document)


def _slot(content: RecordDict) -> int:
    header = content["header"]
    slot = header.get("slot", 0) if isinstance(header, ConfigRecord) else 0
    return slot if isinstance(slot, int) else 0
