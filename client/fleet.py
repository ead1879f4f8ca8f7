"""The lab's end of Flower's fleet protocol. The one place with Flower's internals on this side.

One outbound connection: activate, ask for work, fetch it, answer, ask again; heartbeats beside.
Whatever fails is tried again, for ever, with growing pauses. Every byte of the lab's own passes
the egress log first: an object that no logged message announced is not sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
from cryptography import x509
from flwr.app import Error, Message, RecordDict
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
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from cytofed import __version__
from cytofed.client.directory import ClientDirectory, certificate_of, http_client
from cytofed.client.egress import EgressLog, EgressRefused, Outgoing, fields_of, public_reason
from cytofed.client.policy import open_ledger
from cytofed.documents import LABEL_LEAVE, LABEL_RENEW, LABEL_RENEWED, LedgerHead
from cytofed.errors import CytofedError, RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.messages import ERROR_CODE, BadMessage
from cytofed.objects import (
    Content,
    deflate,
    enclosed,
    enclosed_in,
    inflate,
    long_field,
    read_tree,
    split_long_field,
    with_enclosed,
)
from cytofed.privacy import wire
from cytofed.privacy.identity import sign, verify
from cytofed.privacy.ledger import LedgerRolledBack
from cytofed.sealed_message import attach_head, attached_head
from cytofed.words import reason_of

_BEAT_ALLOWED_S = 30.0
"""what Flower is told; it takes a lab for gone after twice that"""

RENEW_DAYS = 30.0
"""A certificate that ends sooner is renewed."""

_RENEW_EVERY_S = 3600.0
_FIRST_PAUSE_S = 0.5
_MOST_WORD_CHARS = 64
_LIE = (
    "the coordinator tells of an entry of this lab's privacy ledger that this lab never signed: "
    "ignored, nothing is charged"
)

_SIGNED_S = 20.0
"""for which signed headers are sent again"""

_SIGNED_HEADERS = (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
)

_ROUTINE = {
    "activate-node": "activate",
    "deactivate-node": "deactivate",
    "send-node-heartbeat": "heartbeat",
    "pull-messages": "poll",
    "pull-object": "fetch",
    "confirm-message-received": "confirm",
    "push-messages": "push",
}

T = TypeVar("T")


class _Again(Exception):
    """The coordinator does not know this session: activate again."""


class _Withdrawn(Exception):
    """The coordinator does not want the answer any more."""


@dataclass(frozen=True)
class Answer:
    """What a lab says to a message: a content, or a reason why there is none.

    ``outgoing``: its record for the egress log. ``sent`` is called when all of it has arrived.
    """

    outgoing: Outgoing
    content: RecordDict | None = field(default=None, repr=False)
    reason: str = ""
    sent: Callable[[], None] = field(default=lambda: None, repr=False)


class FleetLink:
    """The connection of one lab. ``say`` is told what it does, in one line, and if it is online."""

    def __init__(
        self,
        directory: ClientDirectory,
        egress: EgressLog,
        say: Callable[[str, bool], None],
    ) -> None:
        self._directory, self._egress, self._say = directory, egress, say
        self._times = directory.settings().timeouts
        self._key = directory.node_key()
        self._stop = threading.Event()
        self._node: Node | None = None
        self._gate = _EgressGate(egress)
        self._client = self._new_client()
        self._renew_at = time.monotonic()
        self._head = ""
        self._lied_to = False

    def stop(self) -> None:
        """End ``work`` as soon as it waits for nothing."""
        self._stop.set()

    def work(
        self,
        respond: Callable[[Message], Answer | None],
        *,
        idle: Callable[[], None],
        room: Callable[[], int],
    ) -> None:
        """Answer messages until ``stop``; ``idle`` is called between two of them.

        ``room``: most bytes that the arrays of a message may have now.
        """
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        try:
            while not self._stop.is_set():
                try:
                    self._activate()
                    while not self._stop.is_set():
                        idle()
                        self._renew_in_time()
                        self._one(respond, room)
                except _Again:
                    self._node = None
                    self._stop.wait(_FIRST_PAUSE_S)
        finally:
            self._stop.set()
            self._deactivate()

    # --- one message

    def _one(self, respond: Callable[[Message], Answer | None], room: Callable[[], int]) -> None:
        started = time.monotonic()
        found = self._call("pull_messages", PullMessagesRequest(node=self._node))
        if not found.messages_list:
            if time.monotonic() - started < self._times.poll_s:
                self._stop.wait(self._times.poll_s)
            return
        try:
            message = self._fetch(found, room)
            if message is not None:
                self._check_ledger(message)
                answer = respond(message)
                if answer is None:
                    self._stop.wait(_FIRST_PAUSE_S)
                else:
                    self._push(message, answer)
        except _Withdrawn:
            self._stop.wait(_FIRST_PAUSE_S)  # a coordinator that is never content gets no more

    def _check_ledger(self, message: Message) -> None:
        """Stop where this lab has told an entry that its privacy ledger lacks.

        What comes back counts only with the lab's own signature: a coordinator can't make a lab
        stop, or charge its patients, by telling of an entry that never was.
        Errors: LedgerRolledBack, once the coordinator knows why there is no answer.
        """
        document = attached_head(message)
        if not document:
            return
        membership = self._directory.membership()
        try:
            seen = LedgerHead.verified(
                document,
                self._directory.identity().public,
                federation=membership.federation,
                lab=membership.lab,
            )
        except VerificationError as error:
            if not self._lied_to:  # once a connection is enough to know
                self._lied_to = True
                self._say(f"{_LIE} ({error.message})", True)
            return
        if seen.head == self._head:
            return
        try:
            with open_ledger(self._directory.settings()) as book:
                book.check_head(seen.head)
        except LedgerRolledBack as error:
            note_unknown_head(self._directory, seen.head)
            reason = public_reason(error, known=(membership.lab,))
            outgoing = Outgoing(
                type="refusal",
                destination=membership.address,
                fields=fields_of({"reason": reason}),
                nbytes=len(reason.encode()),
                sha256=hashlib.sha256(reason.encode()).hexdigest(),
            )
            with contextlib.suppress(_Withdrawn):  # the reason alone was enough
                self._push(message, Answer(outgoing, reason=reason))
            raise

    def _fetch(self, found: Any, room: Callable[[], int]) -> Message | None:
        """The message that was found; None, once the coordinator knows, where it cannot be read."""
        if len(found.messages_list) != 1 or len(found.message_object_trees) != 1:
            raise _Withdrawn
        try:
            tree = read_tree(found.message_object_trees[0])
        except BadMessage as error:  # what it is called comes back to nobody
            self._say(f"a message could not be read: {error.message}", True)
            raise _Withdrawn from None
        run_id, announced = found.messages_list[0].metadata.run_id, found.message_object_trees[0]
        came_along = enclosed_in(found)

        def fetched(number: str) -> bytes | memoryview:
            if number in came_along:
                return came_along[number]
            request = PullObjectRequest(node=self._node, run_id=run_id, object_id=number)
            got = self._call("pull_object", request)
            if not got.object_found or not got.object_available:
                raise _Withdrawn
            content: memoryview = got.object_content
            return content

        message = None
        try:  # each piece goes to its place in an array as it comes
            message = _in_few_words(inflate(tree, fetched, max_bytes=room()))
        except (_Withdrawn, _Again, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a coordinator can make of its bytes
            self._say(f"a message could not be read: {reason_of(error)}", True)
            self._stop.wait(_FIRST_PAUSE_S)  # the next may be no better
        confirm = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=announced.object_id
        )
        self._call("confirm_message_received", confirm)
        return message

    def _push(self, message: Message, answer: Answer) -> None:
        if answer.content is None:
            reply = Message(Error(ERROR_CODE, answer.reason), reply_to=message)
        else:
            if answer.outgoing is not None and answer.outgoing.ledger_head:
                self._tell_head(answer.content, answer.outgoing.ledger_head)
            reply = Message(answer.content, reply_to=message)
        objects = deflate(reply)
        announcement = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(objects.head)],
            message_object_trees=[objects.tree],
            clientapp_runtime_list=[0.0],
        )
        request = with_enclosed(announcement, objects.announced())
        sizes = objects.sizes()
        self._egress.record(replace(answer.outgoing, objects=sizes))
        self._gate.announce(sizes)
        try:
            session = self._call("push_messages", request)
            for number in dict.fromkeys(session.objects_to_push):  # each leaves once
                if self._directory.paused:  # small answers, such as a refusal, are out already
                    raise _Withdrawn
                if number in objects:
                    head = PushObjectRequest(
                        node=self._node,
                        run_id=message.metadata.run_id,
                        object_id=number,
                        session_id=session.session_id,
                    )
                    self._call("push_object", _Push(head, objects.parts(number)))
        finally:
            self._gate.announce({})
        answer.sent()

    def _tell_head(self, content: RecordDict, head: str) -> None:
        membership = self._directory.membership()
        told = LedgerHead(membership.federation, membership.lab, head)
        attach_head(content, told.signed(self._directory.identity()))
        self._head = head

    # --- the connection

    def _renew_in_time(self) -> None:
        """Renew a certificate that ends soon; where that fails the lab says so and works on."""
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + _RENEW_EVERY_S
        days = certificate_days(self._directory)
        if days > RENEW_DAYS:
            return
        try:
            renew(self._directory, self._egress)
        except CytofedError as error:
            self._say(f"the certificate ends in {days:.0f} days: {error.message}", True)
            return
        old, self._client = self._client, self._new_client()
        old.close()

    def _new_client(self) -> _Client:
        context = self._directory.tls()
        auth = _NodeAuth(self._key, self._key.public_key())
        client = _Client(
            self._directory.membership().url, interceptors=[self._gate, auth], verify=context
        )
        client._client.close()
        client._client = http_client(
            context,
            proxy=self._directory.settings().proxy,
            connect_s=self._times.connect_s,
            request_s=self._times.request_s,
        )
        client._client.headers["user-agent"] = f"cytofed/{__version__}"
        return client

    def _activate(self) -> None:
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(self._key.public_key()),
            heartbeat_interval=_BEAT_ALLOWED_S,
        )
        self._node = Node(node_id=self._call("activate_node", request).node_id)
        self._say("connected, waiting for work", True)

    def _deactivate(self) -> None:
        if self._node is not None:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, CytofedError, ValueError):
                return

    def _beat(self) -> None:
        while not self._stop.wait(self._times.heartbeat_s):
            if self._node is None:
                continue
            try:
                self._client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_BEAT_ALLOWED_S)
                )
            except (httpx.HTTPError, CytofedError, ValueError):
                continue  # the other thread says what is wrong

    def _call(self, name: str, request: Any) -> Any:
        """One request, tried until it is answered.

        Errors: _Again where the session is unknown, _Withdrawn for what is not wanted any more.
        """
        method = getattr(self._client, "".join(part.title() for part in name.split("_")))
        pause_s, told = _FIRST_PAUSE_S, ""
        while True:
            try:
                found = method(request)
                if told:
                    self._say("connected again", True)
                return found
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                # Asking for work touches nobody's messages: there 403 means off the roster.
                unknown = code in (401, 404, 409) or (code == 403 and name == "pull_messages")
                if name != "activate_node" and unknown:
                    raise _Again from error
                if name != "activate_node" and 400 <= code < 500 and code not in (408, 429):
                    raise _Withdrawn from error
                why = _why_status(code)
            except (httpx.TransportError, ValueError) as error:
                why = _why_transport(error)
            if why != told:
                self._say(why, False)
                told = why
            if self._stop.wait(pause_s * random.uniform(0.7, 1.3)):
                raise KeyboardInterrupt
            pause_s = min(pause_s * 1.6, self._times.retry_max_s)


def _in_few_words(message: Message) -> Message:
    """The message, whose group and type come back with its answer. Errors: BadMessage."""
    for word in (message.metadata.group_id, message.metadata.message_type):
        if len(word) > _MOST_WORD_CHARS:
            raise BadMessage(f"a group or type of {len(word)} characters")
    return message


@dataclass(frozen=True)
class _Push:
    """Flower's PushObjectRequest, whose content is copied once: to where it is sent from."""

    head: PushObjectRequest
    parts: Sequence[Content] = field(repr=False)

    @property
    def object_id(self) -> str:
        return str(self.head.object_id)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))

    def SerializeToString(self, **_: Any) -> bytes:
        last = long_field(PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER, self.nbytes)
        return b"".join((self.head.SerializeToString(), last, *(part[:] for part in self.parts)))


class _Pulled:
    """Flower's PullObjectResponse, whose content stays where it has come."""

    object_found = object_available = False
    object_content = memoryview(b"")

    def ParseFromString(self, body: bytes) -> None:
        try:
            others, content = split_long_field(body, PullObjectResponse.OBJECT_CONTENT_FIELD_NUMBER)
        except BadMessage as error:
            raise DecodeError(error.message) from None
        head = PullObjectResponse.FromString(others)
        self.object_found, self.object_available = head.object_found, head.object_available
        self.object_content = content


class _Client(FleetHttpClient):
    """Flower's client, with less copying of what is large."""

    def PushObject(self, request: _Push) -> PushObjectResponse:
        return self._large("push-object", "PushObject", request, PushObjectResponse)

    def PullObject(self, request: PullObjectRequest) -> _Pulled:  # type: ignore[override]
        return self._large("pull-object", "PullObject", request, _Pulled)

    def _large(self, path: str, method: str, request: Any, response: Callable[[], T]) -> T:
        found: T = cast(Any, self)._unary_unary(
            path=f"/v1/fleet/{path}",
            rpc_method=f"/flwr.proto.Fleet/{method}",
            request=request,
            response_type=response,
        )
        return found


class _NodeAuth(NodeAuthHttpInterceptor):
    """Flower's signed headers, made anew every few seconds: they sign the time, which the other
    side lets hold for minutes, and nothing of the request."""

    _signed: tuple[float, Mapping[str, str]] = (-math.inf, {})

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        signed_at, headers = self._signed
        if time.monotonic() - signed_at < _SIGNED_S:
            context.request.headers.update(headers)
            return call_next(context)

        def sent(signed: ProtobufRequestContext) -> httpx.Response:
            response = call_next(signed)
            if response.status_code == 200:
                found = {name: signed.request.headers[name] for name in _SIGNED_HEADERS}
                self._signed = (time.monotonic(), found)
            return response

        return super().intercept(context, sent)


class _EgressGate:
    """Flower's interceptor seam: nothing is sent that is neither routine nor announced."""

    def __init__(self, egress: EgressLog) -> None:
        self._egress = egress
        self._announced: dict[str, int] = {}

    def announce(self, sizes: dict[str, int]) -> None:
        """The objects of the message that was just written down, and no others."""
        self._announced = sizes

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        call = context.request.url.path.rpartition("/")[2]
        asked: Any = context.message
        if call == "push-object":
            self._check(asked.object_id, asked.nbytes)
        else:
            objects = enclosed_in(asked)
            for number, content in objects.items():
                self._check(number, len(content))
            nbytes = int(context.request.headers.get("content-length", 0))
            self._egress.routine(_ROUTINE.get(call, call), nbytes - len(enclosed(objects.values())))
        return call_next(context)

    def _check(self, number: str, size: int) -> None:
        if self._announced.get(number) != size:
            raise EgressRefused(f"object {number:.16} belongs to no logged message")


def note_unknown_head(directory: ClientDirectory, head: str) -> None:
    """Keep a head that this lab told and its ledger lacks: charging all plans in full makes up for
    what came before it, and the ledger then goes on after it."""
    known = unknown_heads(directory)
    if head not in known:
        write_atomically(directory.root / "unknown.heads", "\n".join((*known, head)), mode=0o600)


def unknown_heads(directory: ClientDirectory) -> tuple[str, ...]:
    """The heads of ``note_unknown_head``."""
    file = directory.root / "unknown.heads"
    return tuple(file.read_text().split()) if file.is_file() else ()


def certificate_days(directory: ClientDirectory) -> float:
    """Days until this lab's certificate ends."""
    certificate = x509.load_pem_x509_certificate((directory.root / "certificate.pem").read_bytes())
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def renew(directory: ClientDirectory, egress: EgressLog) -> None:
    """Get and keep a new certificate for the key that this lab has.

    Errors: RefusedError; VerificationError for an answer that is not the coordinator's;
    CytofedError where it cannot be reached.
    """
    request_pem = (directory.root / "request.pem").read_bytes()  # as it enrolled with
    answer = _tell(directory, egress, "renew", LABEL_RENEW, "renewal", {"request": request_pem},
                   {"csr": request_pem})  # fmt: skip
    body = verify(answer, label=LABEL_RENEWED, signer=directory.coordinator())
    fields = wire.Fields.of(body, "renewed certificate")
    certificate, lab = fields.raw("certificate"), fields.text("lab")
    fields.end()
    if lab != directory.membership().lab:
        raise VerificationError("the new certificate is another lab's")
    certificate = certificate_of(directory.node_key().public_key(), certificate)
    write_atomically(directory.root / "certificate.pem", certificate)


def tell_leave(directory: ClientDirectory, egress: EgressLog) -> None:
    """Tell the coordinator that this lab leaves; from then on it does not let the lab in.

    Errors: RefusedError where it did not know the lab any more; CytofedError where it cannot be
    reached.
    """
    _tell(directory, egress, "leave", LABEL_LEAVE, "leave", {}, {})


def _tell(
    directory: ClientDirectory,
    egress: EgressLog,
    path: str,
    label: str,
    type_: str,
    content: dict[str, wire.Value],
    told: dict[str, int | float | str | bytes],
) -> bytes:
    """Send a signed document outside of any run, logged before it leaves; the answer's body."""
    membership, settings = directory.membership(), directory.settings()
    body = wire.encode({"federation": membership.federation, **content})
    signed = sign(directory.identity(), label, body)
    document = wire.encode([membership.lab, signed])
    egress.record(
        Outgoing(
            type=type_,
            destination=membership.address,
            fields=fields_of({**told, "signature": signed}),
            nbytes=len(document),
            sha256=hashlib.sha256(document).hexdigest(),
        )
    )
    times = settings.timeouts
    client = http_client(
        directory.tls(),
        proxy=settings.proxy,
        connect_s=times.connect_s,
        request_s=times.request_s,
    )
    try:
        with client:
            response = client.post(f"{membership.url}/v1/{path}", content=document)
    except httpx.TransportError as error:
        raise CytofedError(_why_transport(error)) from None
    if response.status_code != 200:
        raise RefusedError(_why_status(response.status_code))
    return response.content


def _why_status(code: int) -> str:
    if code in (401, 403):
        return (
            f"the coordinator refuses this lab (HTTP {code}): revoked, not enrolled, or this "
            "machine's clock is off by minutes; trying again"
        )
    return f"the coordinator answers HTTP {code}; trying again"


def _why_transport(error: Exception) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return (
            "the server's certificate is not by the authority that this lab pinned: another "
            "server, or a proxy that inspects TLS; trying again"
        )
    if "ALERT" in text.upper():
        return f"the coordinator refuses this lab's certificate ({text:.80}); trying again"
    kind = type(error).__name__
    return f"waiting for the coordinator: {kind}; trying again"
