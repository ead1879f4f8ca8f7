"""The two adapters of Flower against each other in one process: every internal symbol at work."""

from __future__ import annotations

import ast
import importlib
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import EgressLog, Outgoing, verify
from cytofed.client.fleet import Answer, FleetLink, unknown_heads
from cytofed.client.policy import open_ledger
from cytofed.documents import LABEL_LEAVE, LedgerHead
from cytofed.messages import RAW, array_of
from cytofed.objects import PIECE_BYTES
from cytofed.privacy.identity import sign
from cytofed.privacy.ledger import LedgerRolledBack
from cytofed.sealed_message import attach_head
from cytofed.server import pki
from cytofed.server.fleet import Fleet, FleetGrid
from cytofed.server.gate import CERTIFICATE

from .joined import coordinator, join

ADAPTERS = ("cytofed.server.fleet", "cytofed.client.fleet", "cytofed.objects")
LARGE = PIECE_BYTES + 1_000_000
"""bytes: more than one piece"""


def test_flower_is_the_version_whose_internals_are_used() -> None:
    assert metadata.version("flwr").startswith("1.41.")


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_symbol_of_flower_that_an_adapter_names_is_there(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    imports = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr")
        for alias in node.names
    ]
    assert imports
    for module, symbol in imports:
        assert hasattr(importlib.import_module(str(module)), symbol), f"{module}.{symbol}"


def with_certificates(app: ASGIApp, certificates: dict[bytes, bytes]) -> ASGIApp:
    """As TLS would: the certificate (DER) of whoever calls, here by the key in the headers."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        headers = dict(scope["headers"])
        key = b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b""))
        scope["state"] = {CERTIFICATE: certificates.get(key, b"")}
        await app(scope, receive, send)

    return wrapped


class Line:
    """A coordinator's fleet and one lab's link to it, without a network between them."""

    def __init__(self, root: Path) -> None:
        self.server = coordinator(root)
        self.lab: ClientDirectory = join(self.server, "leeds", root / "leeds")
        certificate = self.server.certificate("leeds")
        self.key = pki.public_key_pem(certificate)
        self.fleet = Fleet(poll_s=0.5, spool=root / "spool")
        self.fleet.enrol({"leeds": self.key})
        der = load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)
        app = self.fleet.app(enrolments_per_minute=10, body_timeout_s=30.0)
        self.http = TestClient(with_certificates(app, {self.key: der}))
        self.http.__enter__()  # one event loop for all requests
        self.egress = EgressLog(self.lab.egress, self.lab.identity())
        self.said: list[str] = []
        self.link = FleetLink(self.lab, self.egress, lambda text, _online: self.said.append(text))
        client: Any = self.link._client
        self.http.headers["user-agent"] = client._client.headers["user-agent"]
        client._client = self.http
        client._base_url = "http://testserver"
        self.errors: list[BaseException] = []

    def work(
        self, respond: Callable[[Message], Answer], *, room: int = 1 << 25
    ) -> threading.Thread:
        def run() -> None:
            try:
                self.link.work(respond, idle=lambda: None, room=lambda: room)
            except BaseException as error:  # for the test's own thread
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def grid(self) -> FleetGrid:
        return self.fleet.grid(wait_s=120.0, reply_bytes=1 << 25)

    def ask(self, content: RecordDict) -> Message:
        """The lab's reply to one message."""
        grid = self.grid()
        node = self.fleet.nodes["leeds"]
        [number] = grid.push_messages([grid.create_message(content, "train", node, "1", 60.0)])
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for reply in grid.pull_messages([number]):
                assert reply.metadata.reply_to_message_id == number
                return reply
        raise AssertionError(f"no reply; {self.said} {self.errors}")

    def close(self) -> None:
        self.link.stop()
        self.fleet.close()
        self.http.__exit__()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.close()


def content_of(data: bytes) -> RecordDict:
    record = ArrayRecord()
    record["body"] = array_of("uint8", (len(data),), RAW, memoryview(data))
    return RecordDict({"header": ConfigRecord({"text": "x"}), "parts": record})


def bytes_of(message: Message) -> bytes:
    record = message.content["parts"]
    assert isinstance(record, ArrayRecord)
    return bytes(record["body"].data)


LOGGED = Outgoing(type="status", destination="here", fields=(), nbytes=1, sha256="0" * 64)


@pytest.mark.parametrize("size", [10, LARGE])
def test_message_and_reply_come_whole_through_both_adapters(line: Line, size: int) -> None:
    sent, back = np.random.default_rng(1).bytes(size), np.random.default_rng(2).bytes(size)
    seen: list[bytes] = []

    def respond(message: Message) -> Answer:
        seen.append(bytes_of(message))
        return Answer(LOGGED, content_of(back))

    line.work(respond)
    assert bytes_of(line.ask(content_of(sent))) == back
    assert seen == [sent]
    assert not list(line.fleet.spool.iterdir()), "what was collected is gone from the spool"
    assert line.fleet.presence("leeds").online
    assert line.fleet.presence("leeds").version


@pytest.mark.parametrize(("size", "requests"), [(10, 0), (100_000, 1), (LARGE, 2)])
def test_only_large_pieces_take_requests_of_their_own(line: Line, size: int, requests: int) -> None:
    asked: list[str] = []
    line.http.event_hooks = {"request": [lambda request: asked.append(request.url.path)]}
    line.work(lambda _message: Answer(LOGGED, content_of(bytes(size))))
    assert bytes_of(line.ask(content_of(b"x"))) == bytes(size)
    assert sum(path.endswith("/push-object") for path in asked) == requests
    line.link.stop()
    [record] = verify(line.egress.path, line.lab.identity().public).messages
    assert sum(record.body["objects"].values()) > size, "what came along is in the log too"


def test_message_larger_than_any_approved_plan_has_is_not_fetched(line: Line) -> None:
    asked: list[str] = []
    line.http.event_hooks = {"request": [lambda request: asked.append(request.url.path)]}
    line.work(lambda _message: Answer(LOGGED, content_of(b"y")), room=LARGE // 2)
    grid, node = line.grid(), line.fleet.nodes["leeds"]
    content = content_of(bytes(LARGE))
    [number] = grid.push_messages([grid.create_message(content, "train", node, "1", 60.0)])
    until = time.monotonic() + 30
    while not any(path.endswith("/confirm-message-received") for path in asked):
        assert time.monotonic() < until
        grid.pull_messages([number])
    assert any("could not be read" in said for said in line.said)
    assert not any(path.endswith("/pull-object") for path in asked)


def test_long_words_of_a_message_do_not_end_a_lab(line: Line) -> None:
    """They would come back in what the lab sends, which is refused as no such message."""
    grid, node, client = line.grid(), line.fleet.nodes["leeds"], cast(Any, line.link._client)
    pull, lies = client.PullMessages, [1, 1]

    def lying(request: Any) -> Any:
        found = pull(request)
        if found.message_object_trees and lies:
            lies.pop()
            found.message_object_trees[0].object_id = "a" * 100_000
        return found

    client.PullMessages = lying
    line.work(lambda _message: Answer(LOGGED, content_of(b"y")))
    long = grid.create_message(content_of(b"x"), "train", node, "1" * 300_000, 60.0)
    [number] = grid.push_messages([long])
    until = time.monotonic() + 60
    while not list(grid.pull_messages([number])) and not line.errors:
        assert time.monotonic() < until
    assert not line.errors
    assert bytes_of(line.ask(content_of(b"x"))) == b"y"
    assert not lies


def test_object_that_is_asked_for_many_times_leaves_once(line: Line) -> None:
    client, done = cast(Any, line.link._client), threading.Event()
    announce, pushed = client.PushMessages, list[str]()

    def greedy(request: Any) -> Any:
        if pushed:  # it is sent the message again, for it lacks the answer still
            done.set()
        found = announce(request)
        found.objects_to_push.extend(list(found.objects_to_push) * 50)
        return found

    def push(request: Any) -> PushObjectResponse:
        if not done.is_set():
            pushed.append(request.object_id)
        return PushObjectResponse(stored=True)

    client.PushMessages, client.PushObject = greedy, push
    line.work(lambda _message: Answer(LOGGED, content_of(bytes(100_000))))
    grid, node = line.grid(), line.fleet.nodes["leeds"]
    [number] = grid.push_messages([grid.create_message(content_of(b"x"), "train", node, "1", 60.0)])
    until = time.monotonic() + 60
    while not done.is_set() and time.monotonic() < until:
        grid.pull_messages([number])
    assert len(pushed) == 1


def test_lab_whose_session_is_never_known_takes_its_time(line: Line) -> None:
    asked, waited = list[str](), list[float]()

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return self.is_set()

    def refused(response: httpx.Response) -> None:
        asked.append(response.request.url.path)
        if asked[-1].endswith("/pull-messages"):
            response.status_code = 401
        if len(asked) > 6:
            line.link.stop()

    line.link._stop = Waits()
    line.link._beat = lambda: None  # type: ignore[method-assign]
    line.http.event_hooks = {"response": [refused]}
    line.work(lambda _message: Answer(LOGGED, content_of(b"y"))).join(60)
    assert len(waited) >= sum(path.endswith("/pull-messages") for path in asked) > 2


def test_message_is_not_given_to_a_connection_whose_lab_asks_on_another(line: Line) -> None:
    """A lab that was restarted gets it at once, not after the old connection's waiting time."""
    line.fleet._poll_s = 60.0
    stale = PullMessagesRequest(node=Node(node_id=line.fleet.nodes["leeds"]))
    link = line.link
    link._activate()
    asked = threading.Thread(target=lambda: link._client.PullMessages(stale), daemon=True)
    asked.start()
    line.work(lambda _message: Answer(LOGGED, content_of(b"back")))
    assert bytes_of(line.ask(content_of(b"x"))) == b"back"


def test_reason_why_there_is_no_answer_reaches_the_round_loop(line: Line) -> None:
    line.work(lambda _message: Answer(LOGGED, reason="paused"))
    reply = line.ask(content_of(b"x"))
    assert reply.has_error()
    assert reply.error.reason == "paused"


@pytest.mark.parametrize("answer", [Answer(LOGGED, content_of(b"y")), Answer(LOGGED, reason="no")])
def test_answer_of_a_lab_that_has_gone_since_is_not_lost(line: Line, answer: Answer) -> None:
    def respond(_message: Message) -> Answer:
        line.link.stop()
        return answer

    lab = line.work(respond)
    until = time.monotonic() + 30
    while not line.fleet.presence("leeds").online:
        assert time.monotonic() < until
        time.sleep(0.02)
    grid = line.grid()
    node = line.fleet.nodes["leeds"]
    [number] = grid.push_messages([grid.create_message(content_of(b"x"), "train", node, "1", 60.0)])
    lab.join(60)
    assert not line.fleet.presence("leeds").online
    [reply] = grid.pull_messages([number])
    if answer.content is None:
        assert reply.error.reason == "no"
    else:
        assert bytes_of(reply) == b"y"


def test_lab_that_is_off_the_roster_is_a_failure_by_name(line: Line) -> None:
    line.fleet.enrol({})
    grid = line.grid()
    [number] = grid.push_messages([grid.create_message(content_of(b"x"), "train", 7, "1", 60.0)])
    [reply] = grid.pull_messages([number])
    assert reply.error.reason == "not in the roster any more"


def head_of(line: Line, head: str) -> bytes:
    """As the lab told it."""
    return LedgerHead("fed", "leeds", head).signed(line.lab.identity())


def lies_about(line: Line) -> dict[str, bytes]:
    """What a coordinator may send in place of what the lab told."""
    own = head_of(line, "a" * 64)
    chief = line.server.identity()
    return {
        "signed by the coordinator": LedgerHead("fed", "leeds", "a" * 64).signed(chief),
        "of another lab": LedgerHead("fed", "bonn", "a" * 64).signed(line.lab.identity()),
        "of another federation": LedgerHead("other", "leeds", "a" * 64).signed(line.lab.identity()),
        "another head under a signature": own.replace(b"a" * 64, b"b" * 64),
        "signed for something else": sign(line.lab.identity(), LABEL_LEAVE, b"a" * 64),
        "bytes": b"a" * 64,
        "many bytes": bytes(1 << 19),
    }


def test_lie_about_the_ledgers_head_is_ignored_and_told_and_burns_nothing(line: Line) -> None:
    with open_ledger(line.lab.settings()) as book:
        before = book.summary()
    line.work(lambda _message: Answer(LOGGED, content_of(b"y")))
    for lie in lies_about(line).values():
        content = content_of(b"x")
        attach_head(content, lie)
        assert bytes_of(line.ask(content)) == b"y"
    assert not line.errors
    assert unknown_heads(line.lab) == ()
    with open_ledger(line.lab.settings()) as book:
        assert book.summary() == before
    assert sum("never signed" in said for said in line.said) == 1


def test_lab_stops_where_it_has_told_what_its_ledger_lacks(line: Line) -> None:
    content = content_of(b"x")
    attach_head(content, head_of(line, "a" * 64))
    asked: list[Message] = []

    def respond(message: Message) -> Answer:
        asked.append(message)
        return Answer(LOGGED, content_of(b"y"))

    line.work(respond)
    reply = line.ask(content)
    assert reply.has_error()
    assert "LedgerRolledBack" in str(reply.error.reason)
    until = time.monotonic() + 30
    while not line.errors and time.monotonic() < until:
        time.sleep(0.05)
    assert isinstance(line.errors[0], LedgerRolledBack)
    assert line.errors[0].exit_code == 5
    assert not asked, "nothing was trained"
    assert unknown_heads(line.lab) == ("a" * 64,)


def test_head_that_the_ledger_has_is_no_obstacle_and_the_next_one_is_told(line: Line) -> None:
    with open_ledger(line.lab.settings()) as book:
        head = book.head
    content = content_of(b"x")
    attach_head(content, head_of(line, head))
    told = replace(LOGGED, ledger_head=head)
    line.work(lambda _message: Answer(told, content_of(b"y")))
    reply = line.ask(content)
    document = reply.content["ledger"]["head"]
    assert isinstance(document, bytes)
    own = line.lab.identity().public
    assert LedgerHead.verified(document, own, federation="fed", lab="leeds").head == head


def test_object_that_no_logged_message_announced_does_not_leave(line: Line) -> None:
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import PushObjectRequest

    from cytofed.client.egress import EgressRefused
    from cytofed.client.fleet import _Push
    from cytofed.objects import with_enclosed

    client = line.link._client
    with pytest.raises(EgressRefused):
        client.PushObject(_Push(PushObjectRequest(object_id="a" * 64), (b"x",)))
    with pytest.raises(EgressRefused):
        client.PushMessages(with_enclosed(PushMessagesRequest(), [b"x"]))
