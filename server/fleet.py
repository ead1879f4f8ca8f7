"""Flower's Fleet API in this process, and a Grid on top. The one place with Flower's internals.

Of Flower 1.41 this uses the fleet's handlers, their messages and node authentication, and the link
state with its object store in memory. Not its processes, Control API and Runtime API: see docs.

What Flower leaves open and is added here:

- it checks who calls, not what a caller may touch: ``_Calls`` ties every message, object and
  upload to the node it is meant for;
- it keeps all objects of all labs in one store, as their announcements say they hang together:
  here a reply's objects belong to one delivery, are a tree, have room of their own, and go with it;
- a lab that restarts is refused for a minute: here the same key takes its session over;
- a message is delivered once, even where the answer to the lab's question got lost: a lab asks for
  work only with nothing in hand, so what it had then is sent again;
- a question for work waits until there is some: a round takes no polling intervals.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import threading
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from fastapi import HTTPException, Request
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cytofed.errors import CytofedError
from cytofed.messages import ERROR_CODE, BadMessage, content_bytes
from cytofed.objects import (
    Content,
    InFile,
    Objects,
    Tree,
    body_of_piece,
    deflate,
    enclosed,
    enclosed_in,
    inflate,
    long_field,
    read_tree,
)
from cytofed.server.gate import FLEET_BODIES, Gate
from cytofed.server.uploads import Arriving, Spooled
from cytofed.server.worker import sign_of_life
from cytofed.words import reason_of

KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER
_SIGNED_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)

_T = TypeVar("_T")
Endpoint = Callable[[Request], Awaitable[Response]]
Parts = tuple[Content, ...]
"""bytes one after the other"""

_SPOOL_FROM_BYTES = 1 << 16
_SEND_AGAIN = 5
"""times that a message is sent again before its lab counts as absent"""

_PUSHES = 20
"""times that a lab may start to upload the reply to one message"""

_SENT_BYTES, _LEAST_SENT_BYTES = 1 << 19, 1 << 14
"""that are sent to all labs at a time, and to each: what waits to be sent is in memory several
times, and each connection keeps buffers of that size"""

_IN_MEMORY = 1 << 22
"""bytes of a reply that are not spooled"""

_LATE_S = 60.0
"""after its time that a message is dropped, whoever forgot it"""

_SPOOLING = 4
"""chunks of uploads that wait to be written"""

_THREADS = 4
"""that handle calls; none of them waits for a lab"""

_log = logging.getLogger("cytofed.coordinator")


class Stopped(CytofedError):
    """The coordinator, or the run, is being stopped while it waits for labs."""


@dataclass(frozen=True)
class Presence:
    """What is known of a lab's connection. ``clock_s``: its clock minus ours at its last call."""

    online: bool
    last_seen: datetime | None = None
    clock_s: float = 0.0
    version: str = ""


class _Reply:
    """A lab's reply on its way: what it consists of, and what of that has come.

    ``room``: bytes that may still come; ``folder``: for those that are large.
    """

    def __init__(self, head: Message, tree: Tree, *, room: int, folder: Path) -> None:
        self.head, self.tree = head, tree
        self.missing = dict.fromkeys(tree.children)
        self._room, self._in_memory, self._folder = room, _IN_MEMORY, folder
        self._contents: dict[str, bytes | Path] = {}

    def put(self, number: str, content: bytes | Spooled) -> None:
        """Take an object; one that is there already changes nothing.

        Errors: BadMessage for an object of another name, a large one that is no piece of an array,
        or one that has no room.
        """
        if number not in self.missing:
            return
        if isinstance(content, Spooled):
            body_of_piece(content.start, len(content))
            name = content.sha256
        else:
            name = hashlib.sha256(content).hexdigest()
            self._in_memory -= len(content)
        self._room -= len(content)
        if self._room < 0 or self._in_memory < 0:  # guard: reply-room
            raise BadMessage("the reply is larger than any that was asked for")
        if name != number:  # guard: reply-object
            raise BadMessage("not the object of that name")
        if isinstance(content, Spooled):
            place = self._folder / secrets.token_hex(16)
            content.path.rename(place)
            self._contents[number] = place
        else:
            self._contents[number] = content
        del self.missing[number]

    @property
    def whole(self) -> bool:
        return not self.missing or self.head.has_error()

    @property
    def files(self) -> list[Path]:
        return [content for content in self._contents.values() if isinstance(content, Path)]

    def read(self, *, max_bytes: int) -> Message:
        """The reply, which is whole. Errors: BadMessage, OSError."""
        if self.head.has_error():
            return self.head

        def content_of(number: str) -> Content:
            content = self._contents[number]
            return InFile.of(content) if isinstance(content, Path) else content

        return inflate(self.tree, content_of, max_bytes=max_bytes)


@dataclass
class _Delivery:
    """One message to one lab, from the moment it can be asked for until its reply is collected."""

    node: int
    room: int
    """bytes that the reply may have"""
    until: float
    """when nobody waits for the reply any more"""
    sent: Objects | None
    """its objects, until the lab confirms that it has them"""
    delivered: bool = False
    lost: bool = False
    reply: _Reply | None = None
    pushes: int = 0

    @property
    def whole(self) -> bool:
        """Whether all of the reply has arrived."""
        return self.reply is not None and self.reply.whole


@dataclass(frozen=True)
class _Upload:
    """A lab's upload session."""

    node: int
    message: str


class _Link(InMemoryLinkState):
    """Flower's link state, with take-over, wake-ups and a record of who may touch what."""

    def __init__(self, spool: Path) -> None:
        super().__init__(NoOpFederationManager(), InMemoryObjectStore())  # which stays empty
        self.spool = spool
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(mode=0o700)
        self.wake = threading.Event()
        self.deliveries: dict[str, _Delivery] = {}
        self.uploads: dict[str, _Upload] = {}
        self.seen: dict[int, Presence] = {}
        self.sessions: dict[int, int] = {}
        """how often a node went online: who asked for work before has hung up"""
        self._mail: dict[int, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    def _cleanup_expired_task_tokens_locked(self) -> None:
        """Nothing: Flower fails a run whose process gave no sign of life for a minute. That is
        this process, which goes on after a pause (of a suspended or starved machine)."""

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        done: bool = super().activate_node(node_id, heartbeat_interval)
        if not done and super().deactivate_node(node_id):  # the same key, still "online"
            done = super().activate_node(node_id, heartbeat_interval)
        if done:
            self.sessions[node_id] = self.sessions.get(node_id, 0) + 1
            self._lose(node_id)
            self.wake.set()
        return done

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        with self.lock:
            self._lose(node_id)
            found: list[Message] = super().get_message_ins(node_id, limit, run_id=run_id)
            for message in found:
                delivery = self.deliveries.get(message.metadata.message_id)
                if delivery is not None:
                    delivery.delivered = True
        return found

    def store_message_ins(self, message: Message) -> str | None:
        stored: str | None = super().store_message_ins(message)
        event = self._mail.get(message.metadata.dst_node_id)
        if event is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(event.set)
        return stored

    def start_session(self, run_id: int) -> str:
        """Without Flower's record of it, which stays for ever where nothing comes."""
        return secrets.token_hex(16)

    def store_message_and_object_tree(
        self, message: Message, object_tree: Any, session_id: str
    ) -> tuple[bool, list[str]]:
        """Take the announcement of a reply; what of it is missing.

        Errors: BadMessage for an impossible tree, and for another reply than was announced before.
        """
        tree = read_tree(object_tree)
        with self.lock:
            number = message.metadata.reply_to_message_id
            delivery = self.deliveries.get(number)
            if delivery is None or self.store_message_res(message) is None:
                raise BadMessage("nobody waits for this reply, or another one came first")
            if delivery.reply is None:
                delivery.reply = _Reply(message, tree, room=delivery.room, folder=self.spool)
            elif delivery.reply.tree != tree:  # guard: reply-tree
                raise BadMessage("the reply hangs together in another way than before")
            self.uploads[session_id] = _Upload(delivery.node, number)
            # A reason is in the head; and nobody waits any more for what comes after it.
            missing = [] if delivery.reply.whole else list(delivery.reply.missing)
        self.wake.set()
        return True, missing

    def take_object(self, session: str, number: str, content: bytes | Spooled) -> None:
        """Store an object of a reply. Errors: BadMessage for what is none, or has no room."""
        with self.lock:
            upload = self.uploads.get(session)
            delivery = self.deliveries.get(upload.message) if upload is not None else None
            if delivery is None or delivery.reply is None:
                raise BadMessage("nobody waits for this reply any more")
            delivery.reply.put(number, content)
        self.wake.set()

    def get_object_tree(self, number: str) -> Any:
        """The objects of a message to a lab, which Flower's handler asks a store for."""
        delivery = self.deliveries.get(number)
        if delivery is None or delivery.sent is None:
            raise NoObjectInStoreError(f"no message {number}")
        return delivery.sent.tree

    async def wait_for_message(self, node_id: int, timeout_s: float) -> None:
        """Return when there is a message for the node, after the timeout, or at the end.

        Who asks for work has nothing in hand: what was delivered and not answered is lost.
        """
        self._lose(node_id)
        self._loop = asyncio.get_running_loop()
        event = self._mail.setdefault(node_id, asyncio.Event())
        event.clear()
        if self._queued(node_id) or self.closed:
            return
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            return

    def close(self) -> None:
        """Let nobody wait for messages any more."""
        self.closed = True
        if self._loop is not None and not self._loop.is_closed():
            for event in self._mail.values():
                self._loop.call_soon_threadsafe(event.set)

    def forget(self, message_id: str) -> None:
        """Drop a message, its reply and all that was uploaded for it."""
        with self.lock:
            delivery = self.deliveries.pop(message_id, None)
            self.delete_messages({message_id})
            if delivery is not None and delivery.reply is not None:
                for file in delivery.reply.files:
                    file.unlink(missing_ok=True)
            for session in [s for s, u in self.uploads.items() if u.message == message_id]:
                del self.uploads[session]

    def sweep(self) -> None:
        """Drop what nobody waits for any more: messages past their time, files of no reply."""
        with self.lock:
            late = time.monotonic() - _LATE_S
            known = [number for number, found in self.deliveries.items() if found.until > late]
            for number in {*self.deliveries, *self.message_ins_store}.difference(known):
                self.forget(number)
            files = {
                file
                for delivery in self.deliveries.values()
                for file in (delivery.reply.files if delivery.reply is not None else ())
            }
            for file in self.spool.iterdir():
                if file not in files and not file.name.startswith("."):  # which is arriving
                    file.unlink(missing_ok=True)

    def _queued(self, node_id: int) -> bool:
        with self.lock:
            return any(
                message.metadata.dst_node_id == node_id and message.metadata.delivered_at == ""
                for message in self.message_ins_store.values()
            )

    def _lose(self, node_id: int) -> None:
        """Mark what the node had in hand: it asks for work, so it does not have it any more."""
        with self.lock:
            for delivery in self.deliveries.values():
                if delivery.node == node_id and delivery.delivered and not delivery.whole:
                    delivery.lost = True
                    self.wake.set()


class _Holder:
    """What Flower's routes ask for the link state."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def state(self) -> _Link:
        return self._link


class _Calls:
    """What labs may call: an ASGI app that reads, authenticates, binds and asks Flower's handlers.

    Flower's own middlewares take several times as long for a request as its handlers, and leave
    its body in cycles of references, which is memory of many uploads.
    """

    def __init__(self, link: _Link, *, poll_s: float) -> None:
        self._link, self._poll_s = link, poll_s
        self.state = SimpleNamespace(linkstate_factory=_Holder(link))  # node authentication asks
        self._threads = ThreadPoolExecutor(_THREADS, "calls")
        self._spooling = ThreadPoolExecutor(1, "spool")
        self._behind = threading.Semaphore(_SPOOLING)
        self._signed: dict[int, tuple[str, ...]] = {}
        """the headers with which each node was authenticated last"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request({**scope, "app": self}, receive)
        try:
            status, parts = 200, await self._answer(request)
        except HTTPException as error:
            status, parts = error.status_code, ()
        except FlowerError as error:
            status, parts = API_ERROR_MAP[error.code].http_status_code, ()
        except ClientDisconnect:
            return
        except TimeoutError:
            raise  # the gate knows of which
        except Exception as error:
            _log.error("%s: %s: %s", scope["path"], type(error).__name__, error)
            status, parts = 500, ()
        finally:
            request.scope["state"].clear()  # it holds the body
        headers = [
            (b"content-type", PROTOBUF_MEDIA_TYPE.encode()),
            (b"content-length", str(sum(map(len, parts))).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        at_once = max(_LEAST_SENT_BYTES, _SENT_BYTES // max(1, len(self._link.sessions)))
        for part in parts:
            for at in range(0, len(part), at_once):
                piece = part[at : at + at_once]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, request: Request) -> Parts:
        if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
            raise HTTPException(415)
        call = request.url.path.rpartition("/")[2]
        try:
            if call == "push-object":
                return await self._take_object(request, call)
            asked = _CALLS[call].request.FromString(bytes(await _body_of(request)))
        except (DecodeError, BadMessage):
            raise HTTPException(400, "no request of this call") from None
        request.state.protobuf_request = asked
        if call == "pull-messages":
            node = await self._aside(self._let_in, request, call, asked)
            session = self._link.sessions.get(node)
            await self._link.wait_for_message(node, self._poll_s)
            if session != self._link.sessions.get(node) or await request.is_disconnected():
                return ()  # no message: the lab asks on another connection, and gets it there
            return await self._aside(self._handle, call, asked, node)
        return await self._aside(self._let_in_and_handle, request, call, asked)

    async def _aside(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Done by one of a few threads: not more of them than do good, as each takes memory."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def _take_object(self, request: Request, call: str) -> Parts:
        number = PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER
        with Arriving(number, self._link.spool, file_from=_SPOOL_FROM_BYTES) as arriving:
            fed: Future[None] | None = None
            try:
                async for chunk in request.stream():
                    # Hashed and written by a thread while the next comes, if that keeps up.
                    await _done(fed)
                    if self._behind.acquire(blocking=False):
                        fed = self._spooling.submit(arriving.feed, chunk)
                        fed.add_done_callback(lambda _fed: self._behind.release())
                    else:
                        fed = None
                        arriving.feed(chunk)
                await _done(fed)
            finally:
                wait([fed] if fed else [])  # where the body was cut: none is written any more
            others, content = arriving.end()
            told = PushObjectRequest.FromString(others)
            asked = _Push(told.node, told.run_id, told.object_id, told.session_id, content)
            request.state.protobuf_request = asked
            return await self._aside(self._let_in_and_handle, request, call, asked)

    def _let_in_and_handle(self, request: Request, call: str, asked: Any) -> Parts:
        return self._handle(call, asked, self._let_in(request, call, asked))

    def _let_in(self, request: Request, call: str, asked: Any) -> int:
        """The node that calls, authenticated, and within what it may touch.

        Headers that were verified are only looked at when they come again: they sign their time,
        and nothing else of a request.
        """
        told = tuple(request.headers.get(name, "") for name in _SIGNED_HEADERS)
        node = self._link.get_node_id_by_public_key(_decoded(told[0]))
        again = node is not None and _node_of(asked) == node and self._signed.get(node) == told
        if not again or abs(_clock_offset(request)) > TIMESTAMP_TOLERANCE:
            again = False
            authenticate_node(request)
        if node is None:
            raise HTTPException(403, "not in the roster")
        agent = request.headers.get("user-agent", "")
        version = agent.removeprefix("cytofed/") if agent.startswith("cytofed/") else ""
        clock_s = self._link.seen[node].clock_s if again else _clock_offset(request)
        self._link.seen[node] = Presence(True, datetime.now(UTC), clock_s, _printable(version))
        self._signed[node] = told
        with self._link.lock:
            self._check(call, node, asked)
        return node

    def _handle(self, call: str, asked: Any, node: int) -> Parts:
        link = self._link
        if call == "pull-object":
            return _pulled(self._sent(node, asked.object_id).parts(asked.object_id))
        try:
            if call == "push-object":
                link.take_object(asked.session_id, asked.object_id, asked.object_content)
                return (PushObjectResponse(stored=True).SerializeToString(),)
            if call == "confirm-message-received":
                link.deliveries[asked.message_object_id].sent = None
                return (ConfirmMessageReceivedResponse().SerializeToString(),)
            stores = {"store": link} if _CALLS[call].takes_store else {}
            found = _CALLS[call].handler(request=asked, state=link, **stores)
            if call == "push-messages":
                self._take_enclosed(asked, found)
        except BadMessage as error:
            raise HTTPException(400, error.message) from error
        except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
            raise HTTPException(400, f"not understood: {type(error).__name__}") from error
        return (found.SerializeToString(), *self._enclosed(call, found))

    def _take_enclosed(self, asked: Any, found: Any) -> None:
        """Store the small objects that came with a reply's announcement; the rest is asked for."""
        wanted = set(found.objects_to_push)
        for number, content in enclosed_in(asked).items():
            if number in wanted:
                self._link.take_object(found.session_id, number, content)
                found.objects_to_push.remove(number)

    def _enclosed(self, call: str, found: Any) -> Parts:
        """The small objects of a message, which its lab would fetch one by one."""
        if call != "pull-messages":
            return ()
        sent = (self._link.deliveries[tree.object_id].sent for tree in found.message_object_trees)
        return tuple(enclosed(objects.small()) for objects in sent if objects is not None)

    def _sent(self, node: int, number: str) -> Objects:
        """The objects of a message that this node has in hand, with that one. Errors: 403."""
        for delivery in list(self._link.deliveries.values()):
            sent = delivery.sent if delivery.node == node and delivery.delivered else None
            if sent is not None and number in sent:
                return sent
        raise HTTPException(403, "not yours")  # guard: node-object

    def _check(self, call: str, node: int, asked: Any) -> None:
        """Raise 403 for what is not this node's, 413 for more than its reply may have.

        A reply's head has no content: that is in the objects.
        """
        if call == "push-messages":
            if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
                raise HTTPException(400, "one message at a time")
            metadata, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
            delivery = self._link.deliveries.get(metadata.reply_to_message_id)
            if (
                delivery is None
                or delivery.node != node
                or not delivery.delivered
                or metadata.src_node_id != node
                or metadata.message_id != tree.object_id
            ):  # guard: node-reply
                raise HTTPException(403, "not yours")
            delivery.pushes += 1
            if (
                delivery.pushes > _PUSHES or asked.messages_list[0].content.items
            ):  # guard: reply-uploads
                raise HTTPException(413, "too many uploads, or a content in the announcement")
        elif call == "pull-object":
            self._sent(node, asked.object_id)
        elif call == "push-object":
            upload = self._link.uploads.get(asked.session_id) if asked.session_id else None
            if upload is None or upload.node != node:  # guard: node-upload
                raise HTTPException(403, "not yours")
        elif call == "confirm-message-received":
            own = self._link.deliveries.get(asked.message_object_id)
            if own is None or own.node != node:  # guard: node-confirm
                raise HTTPException(403, "not yours")


def _not_flowers(**_: Any) -> Any:
    raise TypeError("handled here")


@dataclass(frozen=True)
class _Call:
    """``handler``: Flower's, where what it does is left to it."""

    request: type[Any]
    handler: Callable[..., Any] = _not_flowers
    takes_store: bool = False


_CALLS: Mapping[str, _Call] = {
    "activate-node": _Call(ActivateNodeRequest, fleet_handlers.activate_node),
    "deactivate-node": _Call(DeactivateNodeRequest, fleet_handlers.deactivate_node),
    "send-node-heartbeat": _Call(SendNodeHeartbeatRequest, fleet_handlers.send_node_heartbeat),
    "pull-messages": _Call(PullMessagesRequest, fleet_handlers.pull_messages, takes_store=True),
    "push-messages": _Call(PushMessagesRequest, fleet_handlers.push_messages),
    "pull-object": _Call(PullObjectRequest),
    "push-object": _Call(PushObjectRequest),
    "confirm-message-received": _Call(ConfirmMessageReceivedRequest),
}


async def _done(work: Future[None] | None) -> None:
    """Return when a thread is done with its work. Errors: those of the work."""
    if work is not None:
        await asyncio.wrap_future(work) if not work.done() else work.result()


async def _body_of(request: Request) -> bytearray:
    """The body, which the gate knows to be small, in memory that is taken once."""
    body = bytearray(int(request.headers["content-length"]))
    at = 0
    async for chunk in request.stream():
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
    del body[at:]
    return body


def _pulled(content: Parts) -> Parts:
    """Flower's PullObjectResponse, whose last field is sent from where it lies."""
    head: bytes = PullObjectResponse(object_found=True, object_available=True).SerializeToString()
    number = PullObjectResponse.OBJECT_CONTENT_FIELD_NUMBER
    return (head + long_field(number, sum(map(len, content))), *content)


@dataclass(frozen=True)
class _Push:
    """Flower's PushObjectRequest, its content as it was taken in."""

    node: Any
    run_id: int
    object_id: str
    session_id: str
    object_content: bytes | Spooled = field(repr=False)


def _decoded(key: str) -> bytes:
    """A key of the headers; nothing where it is none, and node authentication will say so."""
    try:
        return b64decode(key, validate=True)
    except ValueError:
        return b""


def _node_of(asked: Any) -> int:
    """The node that a request says it is of; 0, which is none, to be activated."""
    return int(asked.node.node_id if hasattr(asked, "node") else getattr(asked, "node_id", 0))


def _printable(text: str) -> str:
    return "".join(char for char in text[:20] if char.isalnum() or char in ".+-")


def _clock_offset(request: Request) -> float:
    stamp = datetime.fromisoformat(request.headers[TIMESTAMP_HEADER])
    return (stamp - datetime.now(UTC)).total_seconds()


class Fleet:
    """The labs' connections. ``close`` ends all waiting.

    ``spool``: a folder of this process's own for what is on its way; emptied at the start.
    """

    def __init__(self, *, poll_s: float, spool: Path) -> None:
        self._link = _Link(spool)
        self.spool = spool
        self._poll_s = poll_s
        self._nodes: dict[str, int] = {}
        self._closed = threading.Event()
        self._run = _start_run(self._link)

    def close(self) -> None:
        """End every wait of a grid with ``Stopped``, and every lab's for messages."""
        self._closed.set()
        self._link.close()
        self._link.wake.set()

    def enrol(self, keys: Mapping[str, bytes]) -> None:
        """Make the labs' public keys (PEM, by lab) the only ones that get in, from now on."""
        known = {bytes(node.public_key): node for node in self._registered()}
        for lab, key in keys.items():
            node = self._link.get_node_id_by_public_key(key)
            if node is None:
                node = self._link.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=lab)
            self._nodes[lab] = node
        for key, info in known.items():
            if key not in keys.values():
                info.online_until = info.online_until or 0.0  # else Flower compares None
                self._link.delete_node(NOOP_FLWR_AID, info.node_id)
        self._nodes = {lab: node for lab, node in self._nodes.items() if lab in keys}
        self._link.wake.set()

    @property
    def nodes(self) -> Mapping[str, int]:
        """Node ids of the labs in the roster."""
        return dict(self._nodes)

    def knows(self, key_pem: bytes) -> bool:
        return self._link.get_node_id_by_public_key(key_pem) is not None

    def presence(self, lab: str) -> Presence:
        node = self._nodes.get(lab, -1)
        seen = self._link.seen.get(node, Presence(False))
        return replace(seen, online=self._online(node))

    def app(
        self,
        *,
        enrolments_per_minute: int,
        body_timeout_s: float,
        others: Mapping[str, Endpoint] = {},
    ) -> ASGIApp:
        """The ASGI app behind its gate: the fleet's calls, and ``others`` by path."""
        calls = _Calls(self._link, poll_s=self._poll_s)
        plain = Starlette(
            routes=[Route(path, end, methods=["GET", "POST"]) for path, end in others.items()]
        )

        async def either(scope: Scope, receive: Receive, send: Send) -> None:
            await (calls if scope["path"] in FLEET_BODIES else plain)(scope, receive, send)

        return Gate(
            either,
            known_key=self.knows,
            key_header=KEY_HEADER,
            per_minute=enrolments_per_minute,
            body_timeout_s=body_timeout_s,
        )

    def grid(
        self, *, wait_s: float, reply_bytes: int, stopped: Callable[[], str] = lambda: ""
    ) -> FleetGrid:
        """A Grid for one run. ``wait_s``: how long a message waits for a lab that is away.

        ``stopped``: why the run is to end, or nothing.
        """
        return FleetGrid(self, wait_s=wait_s, reply_bytes=reply_bytes, stopped=stopped)

    def _registered(self) -> list[Any]:
        infos = self._link.get_node_info(owner_aids=[NOOP_FLWR_AID])
        return [info for info in infos if info.status != "unregistered"]

    def _online(self, node: int) -> bool:
        return any(info.status == "online" for info in self._link.get_node_info(node_ids=[node]))


def _start_run(link: _Link) -> Run:
    """Flower's run: one for the life of this process, whatever cytofed runs in it."""
    run_id = link.create_run(
        "cytofed/coordinator", "0.0.0", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID,
        TaskType.SERVER_APP,
    )  # fmt: skip
    run = link.get_run_info(run_ids=[run_id])[0]
    task = run.primary_task_id
    if task is None or not (link.claim_task(task) and link.activate_task(task)):
        raise CytofedError("Flower's run could not be started")
    TaskIdentity.run_id, TaskIdentity.task_id = run_id, task
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return run


@dataclass
class _Waiting:
    """A message of the round loop: held while its lab is away, then sent, then collected."""

    message: Message
    deadline: float
    held_since: float
    sent: str = ""
    times: int = 0


class FleetGrid(Grid):
    """Flower's Grid on the link state of this process. For one thread."""

    def __init__(
        self, fleet: Fleet, *, wait_s: float, reply_bytes: int, stopped: Callable[[], str]
    ) -> None:
        self._fleet, self._wait_s, self._reply_bytes = fleet, wait_s, reply_bytes
        self._stopped = stopped
        self._link, self._run = fleet._link, fleet._run
        self._waiting: dict[str, _Waiting] = {}
        self._numbers = itertools.count(1)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("the coordinator has one Flower run")

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._fleet.nodes.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._link.sweep()
        ids = []
        for message in messages:
            number = f"cytofed-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = number
            now = time.monotonic()
            waiting = _Waiting(message, now + message.metadata.ttl, now)
            self._waiting[number] = waiting
            self._advance(waiting)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What has arrived; waits up to half a second for the first. Errors: Stopped."""
        wanted = [number for number in message_ids if number in self._waiting]
        until = time.monotonic() + 0.5
        while True:
            sign_of_life()
            self._link.wake.clear()
            why = "the coordinator stops" if self._fleet._closed.is_set() else self._stopped()
            if why:
                self.close()
                raise Stopped(why)
            replies = []
            for number in wanted:
                reply = self._advance(self._waiting[number])
                if reply is not None:
                    replies.append(reply)
                    if _size(reply) > _SPOOL_FROM_BYTES:
                        break  # large ones one at a time: the others wait in the spool
            if replies or time.monotonic() > until:
                break
            self._link.wake.wait(0.1)
        for reply in replies:
            self.withdraw(reply.metadata.reply_to_message_id)
        for number in list(self._waiting):  # nobody asks for what is past its deadline
            if time.monotonic() > self._waiting[number].deadline + 1:
                self.withdraw(number)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("cytofed's round loop pushes and pulls")

    def close(self) -> None:
        """Withdraw whatever is still on its way."""
        for number in list(self._waiting):
            self.withdraw(number)

    def withdraw(self, number: str) -> None:
        """Drop a message and its reply; a lab gets, and may send, no more of them."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None and waiting.sent:
            self._link.forget(waiting.sent)

    def _advance(self, waiting: _Waiting) -> Message | None:
        """Bring one message a step further; its reply once that is whole."""
        node = waiting.message.metadata.dst_node_id
        if node not in self._fleet.nodes.values():
            return _failure(waiting, "not in the roster any more")
        delivery = self._link.deliveries.get(waiting.sent)
        online = self._fleet._online(node)
        if waiting.sent and (delivery is None or delivery.lost):
            self._withdraw(waiting)
        elif delivery is not None and not online and not delivery.whole:
            self._withdraw(waiting)  # a lab that answered may go; one that did not is sent it again
        if not waiting.sent:
            away_s = time.monotonic() - waiting.held_since
            if not online:
                gone = away_s > self._wait_s
                return _failure(waiting, f"not connected for {away_s:.0f} s") if gone else None
            if waiting.times > _SEND_AGAIN:
                return _failure(waiting, f"took the message {waiting.times} times, never answered")
            self._send(waiting)
            return None
        return None if delivery is None else self._collect(waiting, delivery)

    def _withdraw(self, waiting: _Waiting) -> None:
        self._link.forget(waiting.sent)
        waiting.sent = ""
        waiting.held_since = time.monotonic()

    def _send(self, waiting: _Waiting) -> None:
        old = waiting.message
        left_s = max(1.0, waiting.deadline - time.monotonic())
        message = Message(
            old.content,
            old.metadata.dst_node_id,
            old.metadata.message_type,
            ttl=left_s,
            group_id=old.metadata.group_id,
        )
        objects = deflate(message)
        with self._link.lock:  # another thread may be looking through them
            self._link.deliveries[objects.number] = _Delivery(
                old.metadata.dst_node_id, self._reply_bytes, waiting.deadline, objects
            )
        if self._link.store_message_ins(objects.head) is None:
            self._link.forget(objects.number)
            return
        waiting.sent, waiting.times = objects.number, waiting.times + 1

    def _collect(self, waiting: _Waiting, delivery: _Delivery) -> Message | None:
        if delivery.reply is None or not delivery.whole:
            return None
        try:
            message = delivery.reply.read(max_bytes=self._reply_bytes)
        except Exception as error:  # whatever a lab can make of its bytes
            return _failure(waiting, f"its reply cannot be read: {reason_of(error)}")
        return _reply_to(waiting, message)


def _size(reply: Message) -> int:
    """Bytes of a reply's content; 0 for an error."""
    return content_bytes(reply.content) if reply.has_content() else 0


def _failure(waiting: _Waiting, reason: str) -> Message:
    return Message(Error(ERROR_CODE, reason), reply_to=waiting.message)


def _reply_to(waiting: _Waiting, reply: Message) -> Message:
    """The reply as one to the round loop's message, however often that was sent."""
    metadata = cast(Any, reply.metadata)
    metadata.__dict__["_reply_to_message_id"] = waiting.message.metadata.message_id
    return reply
