"""Hostile content that is well-formed: documents, messages, objects and requests as their own
encoders write them, with what is in them changed, signed and hashed anew.

A *target* takes a seeded generator and has one case read, by the code that reads it in a
deployment. What comes out is a value or an error that the reader's docstring names; any other
exception, or more processor time or memory than ``SECONDS`` and ``MEGABYTES``, is a finding:
``run`` says the target and the number, and the same number gives the same case again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import math
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from uvicorn.server import ServerState

from cytofed.documents import Decision, Ended, LedgerHead, Member, Offer, Roster, Start
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.messages import (
    RAW,
    BadMessage,
    array_of,
    new_message,
    unpack_evaluation,
    unpack_hello,
    unpack_masked,
    unpack_order,
    unpack_step,
    unpack_update,
)
from cytofed.objects import deflate, inflate, read_tree, with_enclosed
from cytofed.plan import Plan
from cytofed.privacy import secagg_coordinator, secagg_lab, wire
from cytofed.privacy.identity import Identity, sign
from cytofed.sealed_message import (
    attached_head,
    new_content,
    pack_content,
    unpack_content,
    unpack_parcel,
)
from cytofed.server.door import Connection, Door
from cytofed.server.enrolment import read_request
from cytofed.server.fleet import Fleet
from cytofed.server.gate import CERTIFICATE, ENROL, FLEET_BODIES, HEAD_BYTES, HEALTH, Gate
from tests.attacks import stage as stages

SECONDS = 10.0
"""of processor time that one case may take; it takes milliseconds"""

MEGABYTES = 300
"""of memory that all cases together may add at their peak"""

Target = Callable[[random.Random], None]
TARGETS: dict[str, Target] = {}


class TooSlow(Exception):
    """A case took more than ``SECONDS``."""


class Finding(AssertionError):
    """A case that did what no case may do."""


def run(name: str, cases: int, *, first: int = 0) -> None:
    """Have so many cases of a target read. Errors: Finding."""
    target = TARGETS[name]
    with _clock(), _listening():
        target(random.Random(f"{name} warm"))  # what is made once is not the cases'
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + cases):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                target(random.Random(f"{name} {number}"))
                assert not ERRORS, ERRORS.pop()
            except Exception as error:
                raise Finding(f"{name} {number}: {type(error).__name__}: {error!s:.300}") from error
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > MEGABYTES << 10:
                raise Finding(f"{name} {number}: {grown >> 10} MiB")


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    def late(_number: int, _frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Errors(logging.Handler):
    """An error that is logged is one more that anybody can cause as often as they like."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            ERRORS.append(record.getMessage() + repr(record.exc_info))


ERRORS: list[str] = []


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """What the coordinator and its server log is looked at, and not kept. Flower tells at length
    what it refuses."""
    handler = _Errors()
    loggers = [logging.getLogger(n) for n in ("uvicorn.error", "cytofed.coordinator", "flwr")]
    before = [(logger.propagate, logger.disabled) for logger in loggers]
    for logger in loggers[:2]:
        logger.propagate = False
        logger.addHandler(handler)
    loggers[2].disabled = True
    try:
        yield
    finally:
        for logger, (propagate, disabled) in zip(loggers, before, strict=True):
            logger.propagate, logger.disabled = propagate, disabled
            logger.removeHandler(handler)


def target(of: Target) -> Target:
    TARGETS[of.__name__] = of
    return of


# --- values


TEXTS = (
    "", "a", "lab-01", "lab-02", "coordinator", "run-1", "approved", "x" * 300, "x" * 70_000,
    "../../x", "a\0b", "\x1b[2J", "\u202e", "\ud7ff", "é", "nan", "1e999", "0", "-1", "None", "[]",
    "header", "parts", "body", "seal", "9" * 5000,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 23, 24, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1,
           2**63, 2**64 - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 0.5)


def _bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 15, 16, 32, 33, 64, 1184, 1216, 5000)))


def some(rng: random.Random, depth: int = 3) -> Any:
    """A value of the wire format."""
    kind = rng.randrange(7 if depth else 4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind in (2, 3):
        return _bytes(rng)
    many = rng.choice((0, 1, 2, 3, 50))
    if kind == 4:
        return [some(rng, depth - 1) for _ in range(many)]
    return {rng.choice(TEXTS[:8]): some(rng, depth - 1) for _ in range(many)}


def changed(rng: random.Random, value: Any) -> Any:
    """``value`` with something in it changed, at any depth: also within bytes that are a document
    themselves."""
    if rng.random() < 0.15:
        return some(rng)
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        found = dict(value)
        action = rng.randrange(8)
        if action == 0:
            del found[key]
        elif action == 1:
            found[rng.choice(TEXTS)] = some(rng)
        elif action == 2:
            found[key] = found[rng.choice(sorted(value))]
        else:
            found[key] = changed(rng, found[key])
        return found
    if isinstance(value, list) and value:
        found_list = list(value)
        at, action = rng.randrange(len(value)), rng.randrange(8)
        if action == 0:
            del found_list[at]
        elif action == 1:
            found_list.insert(at, found_list[at])
        elif action == 2:
            found_list = found_list[::-1]
        elif action == 3:
            found_list = found_list * rng.choice((2, 100))
        else:
            found_list[at] = changed(rng, found_list[at])
        return found_list
    if isinstance(value, bytes) and value:
        return _changed_bytes(rng, value)
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(TEXTS) + value[at + 1 :]
    if isinstance(value, int) and rng.random() < 0.5:
        return max(0, min(2**64 - 1, value + rng.choice((-1, 1, 2**32))))
    return some(rng)


def _changed_bytes(rng: random.Random, value: bytes) -> bytes:
    with contextlib.suppress(VerificationError, TypeError):
        inner = wire.decode(value)
        if isinstance(inner, dict | list) and rng.random() < 0.9:
            return wire.encode(changed(rng, inner))
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(value)
        if isinstance(tree, dict | list) and rng.random() < 0.9:
            return json.dumps(changed_json(rng, tree)).encode()
    action, at = rng.randrange(5), rng.randrange(len(value))
    if action == 0:
        return value[:at]
    if action == 1:
        return value + _bytes(rng)
    if action == 2:
        return value[:at] + bytes([rng.randrange(256)]) + value[at + 1 :]
    if action == 3:
        return value[at:] + value[:at]
    return _bytes(rng)


def some_json(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((2, 900))):
        deep = [deep]
    return rng.choice([*TEXTS, *NUMBERS, *FLOATS, -1, True, None, [], {}, deep, [0] * 1000,
                       10**400, -(2**63)])  # fmt: skip


def changed_json(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        found = dict(value)
        if rng.random() < 0.1:
            del found[key]
        elif rng.random() < 0.1:
            found[rng.choice(TEXTS)] = some_json(rng)
        else:
            found[key] = changed_json(rng, found[key])
        return found
    if isinstance(value, list) and value and rng.random() < 0.9:
        found_list = list(value)
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            found_list.insert(at, some_json(rng))
        else:
            found_list[at] = changed_json(rng, found_list[at])
        return found_list
    return some_json(rng)


# --- signed documents


LABS = tuple(stages.identity(name) for name in stages.names(3))
ROSTER = Roster("marrow", 3, tuple(Member(lab.public, "a" * 64, 20) for lab in LABS))
OFFER = Offer("run-1", Plan(), ROSTER)
ABOUT = (OFFER.run, OFFER.plan.sha256, ROSTER.sha256)
AT = datetime(2026, 1, 1, tzinfo=UTC)
DECISIONS = {
    lab.name: Decision(lab.name, "approved", *ABOUT, max_weight=8, at=AT).signed(lab)
    for lab in LABS
}
START = Start(*ABOUT, DECISIONS)
HEX = "ab" * 32


def _document(
    rng: random.Random, document: bytes, signer: Identity, read: Callable[[bytes], object]
) -> None:
    """A document whose signer says something else than it should."""
    outer = wire.decode(document)
    label = outer["label"]
    body = changed(rng, wire.decode(outer["body"]))
    try:
        signed = sign(signer, label, wire.encode(body))
    except (TypeError, UnicodeEncodeError):  # no such value can be written
        return
    if rng.random() < 0.1:
        signed = wire.encode(changed(rng, wire.decode(signed)))
    with contextlib.suppress(VerificationError, InputError):
        read(signed)


@target
def offers(rng: random.Random) -> None:
    chief = stages.CHIEF
    _document(rng, OFFER.signed(chief), chief, lambda d: Offer.verified(d, chief.public))


@target
def decisions(rng: random.Random) -> None:
    lab = rng.choice(LABS)
    _document(rng, DECISIONS[lab.name], lab, lambda d: Decision.verified(d, lab.public, OFFER))


@target
def starts(rng: random.Random) -> None:
    chief = stages.CHIEF
    _document(rng, START.signed(chief), chief, lambda d: Start.verified(d, chief.public, OFFER))


@target
def small_documents(rng: random.Random) -> None:
    chief, lab = stages.CHIEF, LABS[0]
    if rng.random() < 0.5:
        ended = Ended("marrow", "run-1", HEX, "why").signed(chief)
        _document(rng, ended, chief, lambda d: Ended.verified(d, chief.public, federation="marrow"))
    else:
        head = LedgerHead("marrow", lab.name, HEX).signed(lab)
        _document(
            rng, head, lab,
            lambda d: LedgerHead.verified(d, lab.public, federation="marrow", lab=lab.name),
        )  # fmt: skip


@target
def enrolments(rng: random.Random) -> None:
    lab = LABS[0]
    body: dict[str, wire.Value] = {"declared_patients": 20, "fingerprint": lab.public.fingerprint,
            "request": b"pem", "token": "token"}  # fmt: skip
    request = [lab.public.to_bytes(), sign(lab, "cytofed/1/enrol", wire.encode(body))]
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        document = wire.encode(changed(rng, request))
        with contextlib.suppress(VerificationError, InputError):
            read_request(document, check=lambda _lab, _token: None)


# --- secure aggregation


@cache
def _requests() -> tuple[tuple[Any, Any, bytes], ...]:
    """Each step of the protocol: a lab's state before it, the step, what the coordinator asks."""
    fresh = stages.fresh()
    advertised = stages.advertised(fresh)
    announced = stages.announced(advertised)
    dealt = stages.dealt(announced)
    ready = stages.accepted(dealt)
    polled = stages.polled(stages.masked(ready))
    agreed = stages.agreed(polled)
    lab = stages.names(4)[0]
    assert advertised.opening is not None
    assert announced.announcement is not None
    assert dealt.setup is not None
    assert polled.poll is not None
    reveal = secagg_coordinator.call_reveal(polled.poll, stages.CHIEF, agreed.agreements)
    liar = stages.names(4)[3]
    other = replace(announced.states[liar], seeds=bytes(len(announced.states[liar].seeds)))
    cheated = stages.accepted(stages.dealt(announced.with_state(liar, other)))
    spoiled = stages.revealed(stages.agreed(stages.polled(stages.masked(cheated))))
    poll = spoiled.poll
    assert poll is not None
    released = {
        name: secagg_coordinator.check_revealed(poll, name, reply)
        for name, reply in spoiled.replies.items()
    }
    proof = {liar: secagg_coordinator.prove(poll, released, liar)}
    return (
        (fresh.states[lab], secagg_lab.advertise, advertised.opening.request),
        (announced.states[lab], secagg_lab.share, announced.announcement.request),
        (dealt.states[lab], secagg_lab.accept, dealt.setup.requests[lab]),
        (polled.states[lab], secagg_lab.agree, polled.poll.request),
        (agreed.states[lab], secagg_lab.reveal, reveal),
        (
            spoiled.states[lab],
            secagg_lab.convict,
            secagg_coordinator.call_convict(stages.CHIEF, proof),
        ),
    )


@target
def steps_at_a_lab(rng: random.Random) -> None:
    state, step, request = rng.choice(_requests())
    outer = wire.decode(request)
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        body = wire.encode(changed(rng, wire.decode(outer["body"])))
        forged = sign(stages.CHIEF, outer["label"], body)
        with contextlib.suppress(CytofedError):
            step(state, stages.identity(stages.names(4)[0]), forged)


@cache
def _replies() -> tuple[tuple[Callable[[str, bytes], object], bytes], ...]:
    """Each reply to the coordinator: how it reads it, and the first lab's honest one."""
    advertised = stages.advertised(stages.fresh())
    announced = stages.announced(advertised)
    dealt = stages.dealt(announced)
    polled = stages.polled(stages.masked(stages.accepted(dealt)))
    agreed = stages.agreed(polled)
    revealed = stages.revealed(agreed)
    lab = stages.names(4)[0]
    opening, announcement = advertised.opening, announced.announcement
    setup, poll = dealt.setup, polled.poll
    assert opening is not None
    assert announcement is not None
    assert setup is not None
    assert poll is not None
    _, ready_reply = stages.answers(dealt, secagg_lab.accept, {lab: setup.requests[lab]})
    return (
        (lambda n, r: secagg_coordinator.check_keys(opening, n, r), advertised.replies[lab]),
        (lambda n, r: secagg_coordinator.check_shares(announcement, n, r), dealt.replies[lab]),
        (lambda n, r: secagg_coordinator.check_ready(setup, n, r), ready_reply[lab]),
        (lambda n, r: secagg_coordinator.check_agreed(poll, n, r), agreed.agreements[lab]),
        (lambda n, r: secagg_coordinator.check_revealed(poll, n, r), revealed.replies[lab]),
    )  # fmt: skip


@target
def steps_at_the_coordinator(rng: random.Random) -> None:
    read, reply = rng.choice(_replies())
    lab = stages.names(4)[0]
    outer = wire.decode(reply)
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        body = wire.encode(changed(rng, wire.decode(outer["body"])))
        forged = sign(stages.identity(lab), outer["label"], body)
        with contextlib.suppress(CytofedError):
            read(lab, forged)


# --- messages


def _array(rng: random.Random) -> Any:
    data = rng.choice((b"", b"\0" * 4, b"\xff" * 8, rng.randbytes(64)))
    dtype = rng.choice(("float32", "float64", "uint8", "uint32", "int64", "O", "V8", "f4,f4", "é"))
    many = rng.choice((0, 1, 2, 40))
    shape = rng.choice(
        [(), (len(data),), (len(data) // 4,), (0,) * many, (1,) * many, (2**31, 0), (2**62, 2**62),
         (-1,), (2**31, 2**31, 2**31, 0), tuple(rng.choice(NUMBERS) for _ in range(many))]
    )  # fmt: skip
    return array_of(dtype, shape, rng.choice((RAW, RAW, RAW, "numpy.ndarray")), memoryview(data))


def _scalar(rng: random.Random) -> Any:
    signed = [number for number in NUMBERS if number < 2**63]
    return rng.choice(
        [rng.choice(TEXTS[:16]), rng.choice(signed), -rng.choice(signed), rng.choice(FLOATS), True,
         _bytes(rng), [1, 2], [1.0], ["a"], [b"a"], [True], []]
    )  # fmt: skip


KEYS = ("run", "round", "plan_sha256", "slot", "labs", "max_weight", "lab", "weight", "loss",
        "train_s", "step", "body", "images", "content", "prefix", "papers", "head", "kind",
        "roster_sha256", "offer_sha256", "order_sha256")  # fmt: skip
PARTS = ("weights", "update", "body", "counts", "tally", "words", "bins", "confusion", "file", "é")


def _record(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind < 3:
        keys = rng.sample(KEYS, rng.randrange(len(KEYS)))
        return ConfigRecord({key: _scalar(rng) for key in keys})
    if kind == 5:
        return MetricRecord({key: rng.choice(FLOATS) for key in rng.sample(KEYS, 3)})
    record = ArrayRecord()
    for name in rng.sample(PARTS, rng.randrange(4)):
        record[name] = _array(rng)
    return record


def _message(rng: random.Random) -> Message:
    names = rng.sample(("header", "parts", "seal", "body", "ledger", "answer", "x"), 3)
    content = RecordDict({name: _record(rng) for name in names})
    if rng.random() < 0.7:
        header = {key: _scalar(rng) if rng.random() < 0.2 else _fitting(key) for key in KEYS}
        content = RecordDict({"header": ConfigRecord(header), "parts": _arrays(rng)})
    kind = rng.choice(("train", "evaluate", "query", "query.offer", "train.x", ""))
    try:
        return new_message(content, kind=kind, node=1, group="1", ttl_s=1.0)
    except ValueError:
        return new_message(content, kind="train", node=1, group="1", ttl_s=1.0)


def _fitting(key: str) -> Any:
    if key.endswith("sha256"):
        return HEX
    if key in ("round", "slot", "labs", "images"):
        return 1
    numbers = ("max_weight", "weight", "loss", "train_s")
    return 2.0 if key in numbers else b"" if key in ("body", "papers", "prefix") else "run-1"


def _arrays(rng: random.Random) -> ArrayRecord:
    record = ArrayRecord()
    for name in rng.sample(PARTS, rng.randrange(4)):
        record[name] = _array(rng)
    return record


READERS: tuple[Callable[[Message], object], ...] = (
    unpack_order,
    lambda m: unpack_update(m, parts=("update",), size=16),
    lambda m: unpack_masked(m, words=16, dtype=np.dtype(np.uint32)),
    unpack_step,
    lambda m: unpack_evaluation(m, classes=4),
    lambda m: unpack_evaluation(m, classes=4, noised=True),
    unpack_hello,
    unpack_parcel,
    attached_head,
)


@target
def messages(rng: random.Random) -> None:
    message = _message(rng)
    for read in READERS:
        with contextlib.suppress(BadMessage):
            read(message)


@target
def sealed_contents(rng: random.Random) -> None:
    """What a peer has sealed: manifest and payload, under a signature that holds."""
    content = new_content({"run": "run-1", "round": 1, "loss": 0.5, "raw": b"x"}, file=b"y" * 40)
    manifest, pieces = pack_content(content)
    payload = b"".join(pieces)
    rows = wire.decode(manifest)
    if rng.random() < 0.7:
        rows = changed(rng, rows)
    if rng.random() < 0.5:  # the header, which is the last part, and its size in the manifest
        size = wire.decode(manifest)[-1][1][0]
        with contextlib.suppress(TypeError, UnicodeEncodeError):
            header = wire.encode(changed(rng, wire.decode(payload[-size:])))
            payload = payload[:-size] + header
            rows = [*wire.decode(manifest)[:-1], [*wire.decode(manifest)[-1]]]
            rows[-1][1] = [len(header)]
    else:
        payload = _changed_bytes(rng, payload)
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        manifest = wire.encode(rows)
        with contextlib.suppress(VerificationError, BadMessage):
            unpack_content(manifest, memoryview(payload))


# --- objects


def _tree(node: ObjectTree) -> Any:
    return [node.object_id, [_tree(child) for child in node.children]]


def _node(value: Any) -> ObjectTree:
    made = ObjectTree(object_id=value[0])
    made.children.extend(_node(child) for child in value[1])
    return made


@target
def objects(rng: random.Random) -> None:
    """A message's objects with some of them changed, hashed and announced anew."""
    message = _message(rng) if rng.random() < 0.3 else _plain(rng)
    try:
        found = deflate(message)
    except (ValueError, TypeError, AttributeError, UnicodeEncodeError):
        return  # nobody can send it
    contents = {number: found.content(number) for number in found.numbers}
    names: dict[str, str] = {}
    for number in _inner_first(found.tree):
        content = contents.pop(number)
        for old, new in names.items():
            content = content.replace(old.encode(), new.encode())
        if rng.random() < 0.3:
            content = _changed_object(rng, content, [*names.values(), number])
        names[number] = hashlib.sha256(content).hexdigest()
        contents[names[number]] = content

    def renamed(value: Any) -> Any:
        return [names.get(value[0], value[0]), [renamed(child) for child in value[1]]]

    tree = renamed(_tree(found.tree))
    for _ in range(rng.choice((0, 0, 1, 3))):
        _changed_tree(rng, tree, list(contents))
    with contextlib.suppress(BadMessage):
        known = read_tree(ObjectTree.FromString(_node(tree).SerializeToString()))

        def read(number: str) -> bytes:
            if number not in contents:
                raise BadMessage("it never came")
            return contents[number]

        inflate(known, read, max_bytes=1 << 20)


def _plain(rng: random.Random) -> Message:
    record = ArrayRecord()
    for name in rng.sample(PARTS, 2):
        data = rng.randbytes(rng.choice((0, 1, 100)))
        record[name] = array_of("uint8", (len(data),), RAW, memoryview(data))
    content = RecordDict({"header": ConfigRecord({"run": "r"}), "parts": record,
                          "scores": MetricRecord({"a": 1.0})})  # fmt: skip
    return new_message(content, kind="train", node=1, group="1", ttl_s=1.0)


def _inner_first(tree: ObjectTree) -> list[str]:
    found: dict[str, None] = {}

    def walk(node: ObjectTree) -> None:
        for child in node.children:
            walk(child)
        found.setdefault(node.object_id)

    walk(tree)
    return list(found)


def _changed_object(rng: random.Random, content: bytes, known: list[str]) -> bytes:
    head, _, body = content.partition(b"\0")
    parts = head.decode().split(" ")
    action = rng.randrange(7)
    if action == 0:
        parts[0] = rng.choice(("Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk",
                               "ConfigRecord", "MetricRecord", "object", ""))  # fmt: skip
    elif action == 1 and len(parts) > 1:
        parts[1] = ",".join(rng.choice(known) for _ in range(rng.choice((0, 1, 2, 1000))))
    elif action == 2:
        parts[-1] = rng.choice(TEXTS[:18])
    elif action in (3, 4):
        body = _changed_bytes(rng, body) if body else _bytes(rng)
        parts[-1] = str(len(body))
    elif action == 5:
        return _changed_bytes(rng, content)
    else:
        return rng.choice((b"", b"\0", b" " * 5, content[: rng.randrange(len(content) + 1)]))
    return " ".join(parts).encode() + b"\0" + body


def _changed_tree(rng: random.Random, tree: Any, known: list[str]) -> None:
    at = tree
    while at[1] and rng.random() < 0.7:
        at = rng.choice(at[1])
    action = rng.randrange(6)
    if action == 0 and at[1]:
        del at[1][rng.randrange(len(at[1]))]
    elif action == 1:
        at[0] = rng.choice([*known, "", "a" * 64, "../x"])
    elif action == 2:
        at[1].append([rng.choice(known), []])
    elif action == 3:
        at[1].extend([[f"{number:064x}", []] for number in range(rng.choice((3, 5000)))])
    elif action == 4:
        inner = at
        for number in range(rng.choice((3, 80))):
            inner[1].append([f"{number:064x}", []])
            inner = inner[1][-1]
    else:
        at[1].append(json.loads(json.dumps(tree)))


# --- calls of a lab


class Line:
    """A fleet in this process, and a lab that is in its roster and says what it likes."""

    def __init__(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        self.fleet = Fleet(poll_s=0.001, spool=Path(self.home.name) / "spool")
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([])
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), 1, AT, AT + timedelta(1))
            .sign(key, hashes.SHA384())
        )  # fmt: skip
        self.key = key
        self.public = public_key_to_bytes(key.public_key())
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)
        self.fleet.enrol({"leeds": self.public})
        self.node = self.fleet.nodes["leeds"]
        self.app = self.fleet.app(enrolments_per_minute=1 << 30, body_timeout_s=5.0)
        self.loop = asyncio.new_event_loop()
        self.signed_at, self.headers = -math.inf, [(b"", b"")]
        self.in_hand: tuple[Message, str] | None = None

    def post(self, call: str, body: bytes) -> int:
        """The status of the answer."""
        if time.monotonic() - self.signed_at > 60:
            stamp = datetime.now(UTC).isoformat()
            told = {
                FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self.public),
                TIMESTAMP_HEADER: stamp.encode(),
                FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(
                    sign_message(self.key, stamp.encode())
                ),
                "content-type": PROTOBUF_MEDIA_TYPE.encode(),
            }
            self.headers = [(name.lower().encode(), value) for name, value in told.items()]
            self.signed_at = time.monotonic()
        scope = {
            "type": "http", "method": "POST", "path": f"/v1/fleet/{call}", "query_string": b"",
            "headers": [*self.headers, (b"content-length", str(len(body)).encode())],
            "state": {CERTIFICATE: self.certificate}, "client": ("192.0.2.1", 1),
        }  # fmt: skip
        statuses: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        self.loop.run_until_complete(self.app(scope, receive, send))
        return statuses[0]

    def work(self) -> tuple[Message, str]:
        """A message that the lab has in hand, and an upload session for its reply."""
        link = self.fleet._link
        number = self.in_hand[0].metadata.message_id if self.in_hand is not None else ""
        delivery = link.deliveries.get(number)
        if self.in_hand is None or delivery is None or not delivery.sent or delivery.pushes > 9:
            for number in list(link.deliveries):
                link.forget(number)
            self.post("activate-node", ActivateNodeRequest(
                public_key=self.public, heartbeat_interval=30).SerializeToString())  # fmt: skip
            grid = self.fleet.grid(wait_s=600.0, reply_bytes=1 << 22)
            content = RecordDict({"header": ConfigRecord({"run": "r"})})
            grid.push_messages([grid.create_message(content, "train", self.node, "1", 1e6)])
            [message] = link.get_message_ins(self.node, 1)
            self.in_hand = message, ""
        return self.in_hand


@cache
def _line() -> Line:
    return Line()


@target
def calls(rng: random.Random) -> None:
    """What a lab may call, with every field changed that can be, by the fleet as it is served."""
    line = _line()
    message, session = line.work()
    objects = deflate(Message(_plain(rng).content, reply_to=message))
    node, run_id = Node(node_id=line.node), message.metadata.run_id
    number = rng.choice(sorted(objects.numbers))
    head = PushMessagesRequest(
        node=node, messages_list=[message_to_proto(objects.head)],
        message_object_trees=[objects.tree], clientapp_runtime_list=[0.0],
    )  # fmt: skip
    asked: Any
    call, asked = rng.choice(
        [
            ("push-messages", with_enclosed(head, objects.announced() * rng.choice((0, 1, 2)))),
            ("push-messages", head),
            ("push-object", PushObjectRequest(
                node=node, run_id=run_id, object_id=number, session_id=session,
                object_content=objects.content(number))),
            ("pull-object", PullObjectRequest(
                node=node, run_id=run_id, object_id=message.metadata.message_id)),
            ("pull-messages", PullMessagesRequest(node=node)),
            ("confirm-message-received", ConfirmMessageReceivedRequest(
                node=node, run_id=run_id, message_object_id=message.metadata.message_id)),
            ("send-node-heartbeat", SendNodeHeartbeatRequest(node=node, heartbeat_interval=30)),
            ("activate-node", ActivateNodeRequest(public_key=line.public, heartbeat_interval=30)),
            ("deactivate-node", DeactivateNodeRequest(node_id=line.node)),
        ]
    )  # fmt: skip
    for _ in range(rng.choice((0, 1, 1, 3))):
        _changed_proto(rng, asked)
    body = asked.SerializeToString()
    if rng.random() < 0.1 and body:
        body = _changed_bytes(rng, body)
    status = line.post(call, body)
    assert status in (200, 400, 401, 403, 409, 412, 413), (call, status)
    if call == "push-messages" and status == 200 and line.in_hand is not None:
        sessions = list(line.fleet._link.uploads)
        line.in_hand = line.in_hand[0], sessions[-1] if sessions else ""
    kept = sum(file.stat().st_size for file in line.fleet.spool.iterdir())
    assert kept <= 1 << 22, kept


def _changed_proto(rng: random.Random, asked: Any) -> None:
    """Change one field of a message of protobuf, at any depth."""
    if isinstance(asked, ObjectTree) and rng.random() < 0.7:
        tree = _tree(asked)
        _changed_tree(rng, tree, [asked.object_id])
        asked.CopyFrom(_node(tree))
        return
    fields = asked.DESCRIPTOR.fields
    if not fields:
        return
    chosen = rng.choice(list(fields))
    value = getattr(asked, chosen.name)
    if chosen.message_type is not None:
        if chosen.message_type.GetOptions().map_entry:
            return
        if not hasattr(value, "add"):
            _changed_proto(rng, value)
        elif len(value) and rng.random() < 0.8:
            _changed_proto(rng, rng.choice(list(value)))
        elif rng.random() < 0.5:
            value.add()
        else:
            del value[:]
        return
    new = rng.choice(
        [*TEXTS[:18], *NUMBERS, *FLOATS, -1, -(2**63), b"", rng.randbytes(70_000), True]
    )
    with contextlib.suppress(TypeError, ValueError, OverflowError, UnicodeError):
        if hasattr(value, "append"):
            value.append(new)
        else:
            setattr(asked, chosen.name, new)


# --- HTTP framing


class Wire:
    """What uvicorn's protocol asks of a transport: it notes what is written."""

    def __init__(self) -> None:
        self.written, self.closed = bytearray(), False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("192.0.2.1", 50_000), "sockname": ("192.0.2.2", 443)}.get(name)

    def pause_reading(self) -> None: ...

    resume_reading = pause_reading

    def set_read_buffer_limits(self, **_: int) -> None: ...

    set_write_buffer_limits = set_read_buffer_limits


async def _inner(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"0")]})  # fmt: skip
    await send({"type": "http.response.body", "body": b""})


@cache
def _loop() -> tuple[asyncio.AbstractEventLoop, uvicorn.Config]:
    gate = Gate(_inner, known_key=lambda _key: False, key_header="x-key", per_minute=1 << 30,
                body_timeout_s=1.0)  # fmt: skip
    config = uvicorn.Config(gate, ws="none", lifespan="off", log_config=None, access_log=False,
                            h11_max_incomplete_event_size=HEAD_BYTES)  # fmt: skip
    config.load()
    return asyncio.new_event_loop(), config


STATUSES = {b"200", b"400", b"403", b"404", b"408", b"411", b"413", b"429", b"431", b"100"}


@target
def framing(rng: random.Random) -> None:
    """Bytes of a connection, in pieces, by the parser and the gate of the port."""
    loop, config = _loop()
    door = Door(known=lambda _pem: False, files=1 << 12)
    state = ServerState()
    data = b"".join(_request(rng) for _ in range(rng.choice((1, 1, 2, 5))))
    cuts = sorted({rng.randrange(1, len(data)) for _ in range(rng.choice((0, 1, 4)))})
    made = Connection(config, state, {}, loop, door=door)
    transport = Wire()

    async def talk() -> None:
        made.connection_made(transport)
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if transport.closed:
                break
            made.data_received(data[start:end])
            held = len(made.conn._receive_buffer)
            assert held <= HEAD_BYTES + len(data), held
            for _ in range(3):
                await asyncio.sleep(0)
        made.connection_lost(None)
        for task in list(state.tasks):
            await task

    loop.run_until_complete(talk())
    made._unset_keepalive_if_required()
    lines = [line for line in transport.written.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert {bytes(line.split()[1]) for line in lines} <= STATUSES, lines


def _request(rng: random.Random) -> bytes:
    pick = rng.choice
    path = pick((ENROL, HEALTH, *FLEET_BODIES, "/", "*", "//v1/enrol", "/%00", "/é", "http://x/",
                 "/" + "a" * 20_000, "", "/v1/enrol?x=" + "y" * 100))  # fmt: skip
    method = pick(("POST", "POST", "GET", "HEAD", "CONNECT", "PRI", "", "P\0ST", "x" * 50))
    version = pick(("HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.", "", "ICY"))
    body = rng.randbytes(pick((0, 5, 5, 3000)))
    length = pick(
        (str(len(body)), str(len(body)), "0", "-1", "+5", "5, 5", "9" * 30, "0x5", "٣", "")
    )
    headers = [f"host: {pick(('x', '', 'a' * 300))}"]
    headers += [f"content-length: {length}"] * pick((0, 1, 1, 1, 2))
    extra = (
        "transfer-encoding: chunked", "transfer-encoding: gzip, chunked", "connection: close",
        "connection: upgrade", "upgrade: websocket", "upgrade: h2c", "expect: 100-continue",
        "x: " + "y" * 20_000, " folded", "no colon", ": no name", "x\0y: z", "x : y",
        "te: trailers", "content-length: 7", "host: y", "x: \x80\xff",
    )  # fmt: skip
    headers += rng.sample(extra, pick((0, 0, 1, 2)))
    headers += ["a: b"] * pick((0, 0, 0, 5000))
    if "transfer-encoding: chunked" in headers:
        size = pick((f"{len(body):x}", "0", "ffffffffffffffffff", "-1", "", "5;" + "e" * 9000))
        body = (
            size.encode() + b"\r\n" + body + b"\r\n" + pick((b"0\r\n\r\n", b"", b"0\r\nx: y\r\n"))
        )
    end = pick(("\r\n", "\r\n", "\r\n", "\n", "\r"))
    head = end.join([f"{method} {path} {version}", *headers, "", ""])
    return head.encode("latin-1", "replace") + body
