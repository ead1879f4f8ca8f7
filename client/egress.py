"""The egress log: every message that leaves this lab, written down before it leaves.

One file of lines; each is a record, the hash of it and all before it, and the lab's signature over
that hash. A changed, removed or reordered record breaks the chain and ``verify`` names it. The log
is also the gate: a message with a field that is not on the list of its type is refused, so is one
of another array type than listed, and, where a plan is differentially private, whatever that
privacy does not cover.

Kinds of records::

    start    a process opened the log
    message  type, run, round, slot, fields with shapes, bytes, SHA-256, clip, sigma, epsilon,
             ledger head, destination; on the disk before the first byte leaves
    routine  heartbeats and polls by kind, size and count. They are too many to write each before
             it leaves: a record allows so many to come, and the next one says how many came. After
             a crash the log so tells an upper bound, never too little
    repair   a torn last line was cut off: its message never left

The log carries the privacy ledger's head and so is its second witness; the rounds that the ledger
settled, in turn, must all be here. The last record's number and hash are in a file beside the log
too (``egress.head``): a log that was cut short, or an old one put back, is shorter than that says.

::

    CytofedError
    `- LogInUse                  another process writes it
    RefusedError
    `- EgressRefused             a message or field that is not on the list; nothing left
    VerificationError
    |- EgressAltered             .record: the first record that does not hold
    `- EgressMissing             no log where one must be, or it lacks what the ledger settled
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy.typing as npt

from cytofed import __version__, canonical
from cytofed.errors import CytofedError, RefusedError, VerificationError
from cytofed.plan import Unit
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, PublicIdentity, SignatureError, check_signature
from cytofed.privacy.ledger import Ledger

VERSION = 1
LABEL = "cytofed/1/egress"
MAX_TEXT_CHARS = 256
ROUTINE_ALLOWED = 10_000
"""routine messages that one record announces"""

Kind = Literal["start", "message", "routine", "repair"]

_TEXT, _NUMBER, _BYTES, _REASON = "text", "number", "bytes", "reason"
_EVERYWHERE = {
    "lab": (_TEXT,),
    "run": (_TEXT,),
    "round": (_NUMBER,),
    "slot": (_NUMBER,),
    "plan_sha256": (_TEXT,),
    "roster_sha256": (_TEXT,),
    "order_sha256": (_TEXT,),
    "ledger_head": (_TEXT,),
    "egress_head": (_TEXT,),
    "version": (_TEXT,),
    "signature": (_BYTES,),
}
_OF_TYPE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # What a round's training gives: the vectors of a strategy, nothing of an image.
    "update": {
        "weights": ("float32",),
        "control": ("float32",),
        "momentum": ("float32",),
        "weight": (_NUMBER,),
        "loss": (_NUMBER,),
        "train_s": (_NUMBER,),
    },
    "masked": {"words": ("uint32", "uint16"), "train_s": (_NUMBER,)},
    "evaluation": {"confusion": ("int64",), "bins": ("int64",), "tempered": ("int64",)},
    "hello": {"images": (_NUMBER,)},
    "secagg": {"step": (_TEXT,), "body": (_BYTES,)},
    "refusal": {"reason": (_REASON,)},
    "decision": {
        "verdict": (_TEXT,),
        "max_weight": (_NUMBER,),
        "at": (_NUMBER,),
        "offer_sha256": (_TEXT,),
        "record_sha256": (_TEXT,),
        "reason": (_REASON,),
    },
    "enrolment": {
        "token": (_BYTES, _TEXT),
        "identity": (_BYTES,),
        "node_key": (_BYTES,),
        "csr": (_BYTES,),
        "declared_patients": (_NUMBER,),
    },
    "renewal": {"csr": (_BYTES,)},
    "status": {"state": (_TEXT,), "clock": (_NUMBER, _TEXT)},
    "leave": {"reason": (_REASON,)},
}
FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {name: MappingProxyType({**_EVERYWHERE, **own}) for name, own in _OF_TYPE.items()}
)
"""What may leave: message type -> field -> array types (or text, number, bytes)."""

_ANSWERS = ("update", "masked", "evaluation")

ROUTINE: Mapping[str, int] = MappingProxyType(
    {
        "activate": 4096,
        "deactivate": 4096,
        "heartbeat": 4096,
        "poll": 4096,
        "fetch": 4096,
        "confirm": 4096,
        "health": 4096,
        "push": 1 << 18,
    }
)
"""Messages without content of the lab's, and the most bytes each may have. ``fetch`` asks for an
object, ``confirm`` says it came, ``push`` announces the hashes of a logged message's objects (the
small ones go with it, and are the message's, not routine)."""


class EgressRefused(RefusedError):
    """Something that is not on the list was about to leave. Nothing left."""


class EgressAltered(VerificationError):
    """A record that does not hold; ``record`` is its number, from 1."""

    def __init__(self, message: str, *, record: int) -> None:
        hint = "restore the log from a backup; what left since then is at the coordinator"
        super().__init__(message, hint=hint)
        self.record = record


class EgressMissing(VerificationError):
    """There is no log, or one that is older than what left."""


class LogInUse(CytofedError):
    """Another process writes this log."""


@dataclass(frozen=True)
class Field:
    """One field of a message: arrays by shape and type, scalars by value, bytes by length."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    value: int | float | str | None = None


@dataclass(frozen=True)
class Protection:
    """What protects the patients in a message. Epsilon is the pool's spend with this message."""

    unit: Unit = "none"
    clip: float | None = None
    sigma: float | None = None
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class Outgoing:
    """A message about to leave.

    ``nbytes`` and ``sha256`` are of the bytes as they leave (sealed); ``objects`` has the same for
    each piece where the transport cuts them.
    """

    type: str
    destination: str
    fields: tuple[Field, ...]
    nbytes: int
    sha256: str
    run: str = ""
    round: int = 0
    slot: int = 0
    plan_sha256: str = ""
    protection: Protection = field(default_factory=Protection)
    ledger_head: str = ""
    objects: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "destination": self.destination,
            "fields": [
                {"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "value": f.value}
                for f in self.fields
            ],
            "nbytes": self.nbytes,
            "sha256": self.sha256,
            "run": self.run,
            "round": self.round,
            "slot": self.slot,
            "plan_sha256": self.plan_sha256,
            "protection": dict(vars(self.protection)),
            "ledger_head": self.ledger_head,
            "objects": dict(self.objects),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        fields = (Field(**{**f, "shape": tuple(f["shape"])}) for f in tree["fields"])
        protection = Protection(**tree["protection"])
        return cls(**{**tree, "fields": tuple(fields), "protection": protection})


@dataclass(frozen=True)
class Record:
    """One record of the log; ``hash`` covers it and all before it."""

    number: int
    at: datetime
    kind: Kind
    body: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class EgressReport:
    """A verified log. ``routine``: kind -> size in bytes -> count.

    ``routine_at_most``: routine messages that a crash left uncounted, an upper bound.
    ``torn_bytes``: an unfinished last line, whose message did not leave.
    """

    lab: str
    fingerprint: str
    records: tuple[Record, ...]
    routine: Mapping[str, Mapping[int, int]]
    routine_at_most: int
    torn_bytes: int

    @property
    def head(self) -> str:
        return self.records[-1].hash

    @property
    def messages(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.kind == "message")

    def to_json(self) -> dict[str, Any]:
        """``cytofed client egress --json``."""
        kinds = {r.body["type"] for r in self.messages}
        return {
            "verified": True,
            "lab": self.lab,
            "fingerprint": self.fingerprint,
            "records": len(self.records),
            "head": self.head,
            "types": {
                kind: {
                    "messages": sum(r.body["type"] == kind for r in self.messages),
                    "bytes": sum(r.body["nbytes"] for r in self.messages if r.body["type"] == kind),
                }
                for kind in sorted(kinds)
            },
            "messages": [
                {"number": r.number, "at": r.at.isoformat(), "hash": r.hash, **r.body}
                for r in self.messages
            ],
            "routine": {
                kind: {str(size): count for size, count in sorted(sizes.items())}
                for kind, sizes in sorted(self.routine.items())
            },
            "routine_at_most": self.routine_at_most,
            "torn_bytes": self.torn_bytes,
        }


def fields_of(
    header: Mapping[str, int | float | str | bytes],
    parts: Mapping[str, npt.NDArray[Any]] | None = None,
) -> tuple[Field, ...]:
    """The fields of a message's header and arrays, for its record."""
    fields = []
    for name, value in header.items():
        if isinstance(value, bytes):
            fields.append(Field(name, _BYTES, (len(value),)))
        elif isinstance(value, str):
            fields.append(Field(name, _TEXT, value=value))
        else:
            finite = math.isfinite(value)
            fields.append(Field(name, _NUMBER, value=value if finite else str(value)))
    for name, array in (parts or {}).items():
        fields.append(Field(name, array.dtype.name, tuple(array.shape)))
    return tuple(fields)


def check_outgoing(message: Outgoing) -> None:
    """Errors: EgressRefused for whatever is not on the list, by name."""
    listed = FIELDS.get(message.type)
    if listed is None:
        raise EgressRefused(
            f"a message of type {message.type!r:.40} may not leave",
            hint=f"types that may: {', '.join(FIELDS)}",
        )
    names = [item.name for item in message.fields]
    if len(set(names)) != len(names):
        raise EgressRefused(f"{message.type} names a field twice")
    for item in message.fields:
        where = f"{message.type}.{item.name}"
        if item.name not in listed:
            raise EgressRefused(
                f"field {where!r:.80} may not leave",
                hint=f"fields of {message.type} that may: {', '.join(listed)}",
            )
        kinds = listed[item.name]
        if kinds == (_REASON,):
            _check_reason(where, item, known=(message.run,))
        elif item.dtype not in kinds:
            raise EgressRefused(f"{where} is {item.dtype}, expected {' or '.join(kinds)}")
        elif isinstance(item.value, str) and len(item.value) > MAX_TEXT_CHARS:
            raise EgressRefused(f"{where} has {len(item.value)} characters")
    if message.protection.unit != "none":
        _check_private(message)


def _check_reason(where: str, item: Field, *, known: Sequence[str]) -> None:
    """``known``: names that the coordinator gave itself."""
    text = item.value
    if item.dtype != _TEXT or not isinstance(text, str) or len(text) > 2 * MAX_TEXT_CHARS:
        raise EgressRefused(f"{where} is not a short text")
    if _looks_private(text, known):
        raise EgressRefused(f"{where} looks like a path or an identifier")


def _check_private(message: Outgoing) -> None:
    """Numbers that depend on patients and that the plan's noise does not cover."""
    unit = message.protection.unit
    for item in message.fields:
        where = f"{message.type}.{item.name}"
        exact = item.name in _OF_TYPE["evaluation"] and message.protection.sigma is None
        tells = (
            item.name == "images"
            or exact
            or (item.name == "loss" and item.value != "nan")
            or (item.name == "train_s" and item.value != 0)
        )
        if tells:
            raise EgressRefused(
                f"{where} depends on this lab's patients and is not covered by the plan's privacy "
                f"per {unit}"
            )


_FILE = re.compile(r"[\\/]|\.(jpe?g|png|tiff?|bmp|csv|ya?ml|sqlite|safetensors|json)\b", re.I)
_HASH = re.compile(r"\b(?=\d*[a-f])[0-9a-f]{12,64}\b")


def public_reason(error: Exception, *, known: Sequence[str] = ()) -> str:
    """What the coordinator is told of a lab's failure: never a path, count or identifier.

    ``known``: names that the coordinator gave itself (run, lab). Errors about settings or data
    are told by their kind only; their text is in the lab's own log.
    """
    if isinstance(error, RefusedError | VerificationError):
        text = error.message[: 2 * MAX_TEXT_CHARS]
        if not _looks_private(text, known):
            return text
    return f"{type(error).__name__} at the lab: its own log says more"


def _looks_private(text: str, known: Sequence[str] = ()) -> bool:
    from cytofed.client.check import identifier_in_name

    for name in known:
        text = text.replace(name, "") if name else text
    text = _HASH.sub("", text)
    return bool(_FILE.search(text) or identifier_in_name(text))


class EgressLog:
    """An open log, held by one process. Safe for threads.

    ``record`` and ``routine`` return when what they wrote is on the disk; a log that cannot be
    written raises, and nothing leaves.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        max_bytes_per_round: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self._identity = identity
        self._max_bytes = max_bytes_per_round
        self._clock = clock
        self._lock = threading.RLock()
        self._head = ""
        self._number = 0
        self._ledger_heads: dict[str, None] = {}  # in order
        self._sent: dict[tuple[str, int], dict[str, int]] = {}
        self._last: dict[tuple[str, str], int] = {}
        """the latest round of which an answer left, by run and plan"""
        self._routine: Counter[tuple[str, int]] = Counter()
        self._allowed = 0
        self._certain = True
        """whether what is known here is what is on the disk: not after an interrupted write"""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            raise EgressMissing(
                f"no egress log at {path}: what left this lab is unknown",
                hint="restore the file from a backup",
            ) from None
        except OSError as error:
            raise CytofedError(f"cannot open the egress log {path}: {error}") from None
        try:
            self._take_over()
        except BaseException:
            os.close(self._file)
            raise

    @classmethod
    def create(cls, path: Path, identity: Identity) -> None:
        """Make an empty log unless there is one. Done once, when a lab joins."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return
        os.close(handle)
        cls(path, identity).close()
        _sync_folder(path.parent)

    def close(self) -> None:
        """Write the routine messages that came since the last record, and let go of the file."""
        with self._lock:
            if self._file < 0:
                return
            try:
                if self._allowed and self._certain:
                    self._write([("routine", self._settled(allowed=0))])
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EgressLog({str(self.path)!r}, lab={self._identity.name!r})"

    @property
    def head(self) -> str:
        """Hash of the last record and all before it."""
        return self._head

    @property
    def ledger_heads(self) -> tuple[str, ...]:
        """Heads of the privacy ledger that left, oldest first: for ``Ledger.restore_charge``."""
        return tuple(self._ledger_heads)

    def last_round(self, run: str, plan_sha256: str) -> int:
        """The latest round of a run of which an answer left; 0 where none did."""
        with self._lock:
            return self._last.get((run, plan_sha256), 0)

    def limit(self, max_bytes_per_round: int | None) -> None:
        """From now on, another limit."""
        self._max_bytes = max_bytes_per_round

    def check_ledger(self, book: Ledger) -> None:
        """The ledger has every head that left. Errors: LedgerRolledBack (exit 5)."""
        for head in self._ledger_heads:
            book.check_head(head)

    def check(self, message: Outgoing) -> None:
        """Errors: EgressRefused for what is not on the list or is over the bytes of a round."""
        check_outgoing(message)
        with self._lock:
            sent = self._sent.get((message.run, message.round), {})
            total = sum(sent.values()) + (0 if message.sha256 in sent else message.nbytes)
        if message.run and self._max_bytes is not None and total > self._max_bytes:
            raise EgressRefused(
                f"round {message.round} of run {message.run} would send {total} bytes, over "
                f"limits.max_bytes_per_round={self._max_bytes}",
                hint="raise the limit in client.yaml, or ask for a plan with a smaller model",
            )

    def record(self, message: Outgoing) -> Record:
        """Write a message down; it may leave when this returns.

        Errors: as ``check``; CytofedError when the log cannot be written.
        """
        with self._lock:
            self.check(message)
            again = message.sha256 in self._sent.get((message.run, message.round), {})
            rows: list[tuple[Kind, dict[str, Any]]] = []
            if self._routine:
                rows.append(("routine", self._settled(allowed=ROUTINE_ALLOWED)))
            rows.append(("message", {**message.to_dict(), "again": again}))
            return self._write(rows)[-1]

    def routine(self, kind: str, nbytes: int) -> None:
        """Count a heartbeat, poll or the like; it may leave when this returns.

        Errors: EgressRefused for an unknown kind or one that is too large for its kind.
        """
        if kind not in ROUTINE:
            raise EgressRefused(f"routine message {kind!r:.40} may not leave")
        if nbytes > ROUTINE[kind]:
            raise EgressRefused(f"{kind} of {nbytes} bytes, expected at most {ROUTINE[kind]}")
        with self._lock:
            if self._routine.total() >= self._allowed:
                self._write([("routine", self._settled(allowed=ROUTINE_ALLOWED))])
            self._routine[kind, nbytes] += 1

    def _settled(self, *, allowed: int) -> dict[str, Any]:
        sent: dict[str, dict[str, int]] = {}
        for (kind, size), count in sorted(self._routine.items()):
            sent.setdefault(kind, {})[str(size)] = count
        return {"sent": sent, "allowed": allowed}

    def _take_over(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LogInUse(
                f"the egress log {self.path} is in use by another process",
                hint="one `cytofed client start` a directory: stop the other one",
            ) from None
        size = os.fstat(self._file).st_size
        whole, last_line = 0, b""
        rows: list[tuple[Kind, dict[str, Any]]] = []
        noted = _noted_head(self.path)
        for record, line, end in _read(self.path):
            self._remember(record)
            whole, last_line = end, line
            if noted == (record.number, record.hash):
                noted = None
        if last_line:
            _check_signature(self._identity.public, self._number, last_line, self.path)
        if noted is not None:
            raise _cut_short(self.path, noted[0])
        if whole < size:
            rows += self._mend(whole)
        start = {"version": VERSION, "cytofed": __version__, "lab": self._identity.name}
        rows.append(("start", {**start, "fingerprint": self._identity.public.fingerprint}))
        self._write(rows)

    def _mend(self, whole: int) -> list[tuple[Kind, dict[str, Any]]]:
        """Make a torn last line whole, or cut it off.

        A crash came before its fsync, so its message never left. A line that lacks nothing but
        its end is kept all the same: a signed record is never dropped.
        """
        with self.path.open("rb") as file:
            file.seek(whole)
            torn = file.read()
        try:
            record = _parse(torn + b"\n", self._number + 1, self._head, self.path)
            _check_signature(self._identity.public, record.number, torn, self.path)
        except EgressAltered:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
            digest = hashlib.sha256(torn).hexdigest()
            return [("repair", {"torn_bytes": len(torn), "sha256": digest})]
        os.write(self._file, b"\n")
        os.fsync(self._file)
        self._remember(record)
        return []

    def _write(self, rows: Sequence[tuple[Kind, dict[str, Any]]]) -> list[Record]:
        if self._file < 0:
            raise CytofedError(f"the egress log {self.path} is closed")
        if not self._certain:  # Ctrl-C or SIGTERM can come at any line
            raise CytofedError(
                f"writing the egress log {self.path} was interrupted",
                hint="start again: what is in it is read anew",
            )
        records, lines, head = [], [], self._head
        for offset, (kind, body) in enumerate(rows, start=1):
            number, at = self._number + offset, self._clock()
            text = _canonical(number, at, kind, body)
            head = _link(head, text)
            signature = self._identity.signature(_signed(self._identity.name, head))
            lines.append(_line(text, head, signature))
            records.append(Record(number, at, kind, body, head))
        size = os.fstat(self._file).st_size
        data = b"".join(lines)
        self._certain = False
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
                self._certain = True
            raise CytofedError(
                f"the egress log {self.path} cannot be written: {error.strerror}",
                hint="nothing leaves until it can be",
            ) from error
        for record in records:
            self._remember(record)
        self._certain = True
        _note_head(self.path, self._number, self._head)
        return records

    def _remember(self, record: Record) -> None:
        self._number, self._head = record.number, record.hash
        body = record.body
        if record.kind == "routine":
            self._routine.clear()
            self._allowed = int(body["allowed"])
        elif record.kind == "start":
            self._routine.clear()
            self._allowed = 0
        elif record.kind == "message":
            if body["ledger_head"]:
                self._ledger_heads[body["ledger_head"]] = None
            place = (str(body["run"]), int(body["round"]))
            if place not in self._sent:
                older = [p for p in self._sent if p[0] == place[0] and p[1] < place[1] - 1]
                for past in older:
                    del self._sent[past]
            self._sent.setdefault(place, {})[body["sha256"]] = int(body["nbytes"])
            if body["type"] in _ANSWERS:
                of = (place[0], str(body["plan_sha256"]))
                self._last[of] = max(place[1], self._last.get(of, 0))


def verify(path: Path, lab: PublicIdentity) -> EgressReport:
    """Check every record's place in the chain, its signature, and that none is missing at the end.

    Nothing but the lab's files is needed; the log may be in use.
    Errors: EgressAltered naming the first record that does not hold; EgressMissing.
    """
    noted = _noted_head(path)  # first: a log in use grows
    report = read_report(path, lab)
    if noted is not None and noted not in {(r.number, r.hash) for r in report.records}:
        raise _cut_short(path, noted[0])
    return report


def read_report(path: Path, lab: PublicIdentity) -> EgressReport:
    """As ``verify``, for a log that may be older than what left: for ``restore_charge``."""
    records: list[Record] = []
    whole = 0
    for record, line, end in _read(path):
        _check_signature(lab, record.number, line, path)
        records.append(record)
        whole = end
    if not records or records[0].kind != "start":
        raise EgressMissing(f"the egress log {path} has no beginning", hint="restore the file")
    routine, at_most = _routine_of(records)
    return EgressReport(
        lab=lab.name,
        fingerprint=lab.fingerprint,
        records=tuple(records),
        routine=routine,
        routine_at_most=at_most,
        torn_bytes=path.stat().st_size - whole,
    )


def check_against_ledger(report: EgressReport, book: Ledger, *, federation: str) -> None:
    """Ledger and log tell the same story.

    Errors: LedgerRolledBack when the ledger lacks a head that left; EgressMissing when a round
    that it settled is not in the log: the log is older than what left.
    """
    answered = {
        (str(r.body["run"]), int(r.body["round"]))
        for r in report.messages
        if r.body["type"] in _ANSWERS
    }
    for head in dict.fromkeys(str(r.body["ledger_head"]) for r in report.messages):
        book.check_head(head)
    for event in book.summary()["events"]:
        place = (event.get("run"), event.get("round"))
        settled = event["state"] == "settled" and event["federation"] == federation
        if settled and place not in answered:
            raise EgressMissing(
                f"the privacy ledger settled round {place[1]} of run {place[0]}, and the egress "
                "log has no such message: the log is older than what left this lab",
                hint="put the latest egress log back",
            )


def accept_cut(path: Path) -> None:
    """Go on with a log that is older than what left: called when all approvals were charged."""
    _head_file(path).unlink(missing_ok=True)


def _head_file(path: Path) -> Path:
    return path.with_suffix(".head")


def _note_head(path: Path, number: int, head: str) -> None:
    """Note the last record beside the log.

    Not synced: after a power cut an older note stands there, and a longer log is no fault.
    """
    part = path.with_suffix(".head.part")
    try:
        part.write_text(f"{number} {head}\n")
        part.replace(_head_file(path))
    except OSError as error:
        raise CytofedError(
            f"{_head_file(path)} cannot be written: {error.strerror}",
            hint="nothing leaves until it can be",
        ) from error


def _noted_head(path: Path) -> tuple[int, str] | None:
    """Number and hash of the last record noted; None where there is no (whole) note."""
    try:
        number, head = _head_file(path).read_text().split()
        return int(number), head
    except (OSError, ValueError):
        return None


def _cut_short(path: Path, number: int) -> EgressMissing:
    return EgressMissing(
        f"the egress log {path} does not have its record {number}: it was cut short, or is older "
        "than what left this lab",
        hint="put the latest egress log back; if it is lost: `cytofed client budget DIR "
        "--restore-charge`",
    )


def _routine_of(
    records: Sequence[Record],
) -> tuple[dict[str, dict[int, int]], int]:
    counts: dict[str, dict[int, int]] = {}
    at_most = allowed = 0
    for record in records:
        if record.kind == "start":
            at_most, allowed = at_most + allowed, 0
        elif record.kind == "routine":
            for kind, sizes in record.body["sent"].items():
                for size, count in sizes.items():
                    by_size = counts.setdefault(kind, {})
                    by_size[int(size)] = by_size.get(int(size), 0) + int(count)
            allowed = int(record.body["allowed"])
    return counts, at_most + allowed


def _read(path: Path) -> Iterator[tuple[Record, bytes, int]]:
    """Records in order with their lines and where each ends; a torn last line is not among them.

    Errors: EgressAltered for a line that is not the next record of the chain; EgressMissing.
    """
    head, end = "", 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise EgressMissing(f"no egress log at {path}", hint="restore the file") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn: a record is whole when its line is
            record = _parse(line, number, head, path)
            head, end = record.hash, end + len(line)
            yield record, line, end


def _parse(line: bytes, number: int, previous: str, path: Path) -> Record:
    try:
        tree = json.loads(line)
        record, link, signature = tree["record"], str(tree["hash"]), str(tree["signature"])
        at = datetime.fromisoformat(record["at"])
        text = _canonical(int(record["number"]), at, record["kind"], record["body"])
        same = line == _line(text, link, bytes.fromhex(signature))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EgressAltered(
            f"the egress log {path} was altered at record {number}: it is no record", record=number
        ) from None
    if not same or record["number"] != number or link != _link(previous, text):
        raise EgressAltered(
            f"the egress log {path} was altered at record {number}: its hash chain does not hold",
            record=number,
        )
    return Record(number, at, record["kind"], record["body"], link)


def _check_signature(lab: PublicIdentity, number: int, line: bytes, path: Path) -> None:
    tree = json.loads(line)
    try:
        signed = _signed(lab.name, tree["hash"])
        check_signature(lab, bytes.fromhex(tree["signature"]), signed, f"record {number}")
    except SignatureError as error:
        raise EgressAltered(
            f"the egress log {path} was altered: {error.message}", record=number
        ) from error


def _canonical(number: int, at: datetime, kind: str, body: Mapping[str, Any]) -> str:
    tree = {"number": number, "at": at.astimezone(UTC).isoformat(), "kind": kind, "body": body}
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _line(text: str, link: str, signature: bytes) -> bytes:
    return f'{{"record":{text},"hash":"{link}","signature":"{signature.hex()}"}}\n'.encode()


def _link(previous: str, text: str) -> str:
    return canonical.digest("cytofed/1/egress/link", previous, text).hex()


def _signed(lab: str, link: str) -> bytes:
    return wire.encode([LABEL, lab, link])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
