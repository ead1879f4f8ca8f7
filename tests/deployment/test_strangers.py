"""What is sent at a coordinator, or answered to a lab, by whoever can: both stay small and serve.

Figures are printed (pytest -s). CYTOFED_SHARE: the part of the full size, 10,000 connections and
1 GB; a tenth where it is not set.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from cytofed.client.directory import pinned_context

from .conftest import PLAN, Federation, deal, free_port
from .test_hostile import HOSTILE_TREES, Caller, Port, announced

pytestmark = pytest.mark.faults

SHARE = float(os.environ.get("CYTOFED_SHARE", "0.1"))
CONNECTIONS = int(10_000 * SHARE)
HEADER_BYTES = int(1e9 * SHARE)
MOST = 400 << 20
"""bytes of memory above what it was"""

HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
LINES = b"".join(b"x-%d: %s\r\n" % (number, b"y" * 1000) for number in range(1000))


def peak_of(pid: int) -> int:
    """Most resident bytes of a process since ``reset``."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def reset(pid: int) -> int:
    """Count the most anew; what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_of(pid)


@pytest.fixture
def port(tmp_path: Path, sample: Path) -> Iterator[Port]:
    labs = ("lab-1", "lab-2")
    deal(sample, tmp_path, labs, each=1)
    federation = Federation(tmp_path, labs, free_port())
    try:
        federation.found()
        yield Port(federation, f"https://127.0.0.1:{federation.port}")
    finally:
        federation.kill_all()


class Served:
    """A lab that is there all along, at an address of its own: each call on a new connection, and
    how long the worst took."""

    def __init__(self, lab: Callable[[], Caller]) -> None:
        self._lab, self._stop, self.calls, self.worst_s = lab, threading.Event(), 0, 0.0
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._node = lab().activate()
        self.errors: list[Exception] = []

    def _call(self) -> None:
        try:
            self._call_on()
        except Exception as error:
            self.errors.append(error)

    def _call_on(self) -> None:
        body = SendNodeHeartbeatRequest(node=Node(node_id=self._node), heartbeat_interval=30)
        while not self._stop.wait(0.1):
            began = time.monotonic()
            with self._lab() as caller:
                headers = caller.headers()
                status = caller.post("send-node-heartbeat", body.SerializeToString(), headers)
            assert status.status_code == 200
            self.calls += 1
            self.worst_s = max(self.worst_s, time.monotonic() - began)

    def __enter__(self) -> Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def idle(port: Port, links: list[socket.socket]) -> None:
    """Connections that say nothing; every tenth after a handshake and half a head."""
    context = pinned_context(port.federation.root / "lab-1" / "ca.pem")
    for number in range(CONNECTIONS):
        link = socket.create_connection(("127.0.0.1", port.federation.port), timeout=60)
        links.append(link)
        if number % 10 == 0:
            with contextlib.suppress(OSError):
                links.append(context.wrap_socket(link, server_hostname="127.0.0.1"))
                links[-1].sendall(HEAD)


def heads(port: Port) -> None:
    """Request heads without an end, from as many connections as it takes."""
    context = pinned_context(port.federation.root / "lab-1" / "ca.pem")
    left = [HEADER_BYTES]

    def send(_number: int) -> None:
        while left[0] > 0:
            with contextlib.suppress(OSError):
                plain = socket.create_connection(("127.0.0.1", port.federation.port), timeout=60)
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as link:
                    link.sendall(HEAD)
                    while True:
                        link.sendall(LINES)
                        left[0] -= len(LINES)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))


def trees(port: Port) -> None:
    """Announcements of objects that hang together in every wrong way."""
    lab, federation = port.caller("lab-1"), port.federation
    node = lab.activate()
    run, _ = federation.queue(PLAN.replace("min_labs: 3", "min_labs: 2"))
    request = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    found = PullMessagesResponse()

    def offered() -> bool:
        found.ParseFromString(lab.post("pull-messages", request).content)
        return bool(found.messages_list)

    federation.until(offered, "lab-1 has an offer")
    reply = Message(RecordDict(), reply_to=message_from_proto(found.messages_list[0]))
    for _ in range(3):
        for tree in HOSTILE_TREES.values():
            body = announced(node, reply, tree).SerializeToString()
            assert lab.post("push-messages", body).status_code in (400, 413)
    federation.run("coordinator", "server", "stop-run", federation.coordinator, run)


@pytest.mark.parametrize("attack", ["idle", "heads", "trees"])
def test_coordinator_stays_small_and_serves_its_labs(port: Port, attack: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert hard > CONNECTIONS * 1.2, "ulimit -n of this machine is too low for this size"
    coordinator = port.federation.running["coordinator"]
    before, links = reset(coordinator.pid), []  # type: int, list[socket.socket]
    began = time.monotonic()
    try:
        with Served(partial(port.caller, "lab-2", address="127.0.0.2")) as lab:
            {"idle": lambda p: idle(p, links), "heads": heads, "trees": trees}[attack](port)
        assert port.healthy()
    finally:
        for link in links:
            link.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    grown = peak_of(coordinator.pid) - before
    print(
        f"\n{attack}: {time.monotonic() - began:.0f} s; coordinator {before >> 20} MiB, at most "
        f"{grown >> 20} MiB more; {lab.calls} calls of a lab, the slowest {lab.worst_s:.2f} s"
    )
    assert grown < MOST
    assert lab.calls > 0
    assert not lab.errors


def endless(link: ssl.SSLSocket, sent: list[int]) -> None:
    """Every other answer has a length that never comes to an end, or none."""
    link.recv(1 << 16)
    many = sent[1] % 2 == 0
    sent[1] += 1
    length = b"content-length: 99999999999\r\n" if many else b"transfer-encoding: chunked\r\n"
    link.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n" + length + b"\r\n")
    piece = bytes(1 << 16) if many else b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    while True:
        link.sendall(piece)
        sent[0] += len(piece)


def test_lab_stays_small_before_an_endless_answer_and_comes_back(port: Port) -> None:
    federation = port.federation
    log = federation.root / "lab-1.log"
    known = log.stat().st_size if log.is_file() else 0
    lab = federation.start("lab-1")

    def online() -> Any:
        told = federation.run("c", "server", "status", federation.coordinator, "--json")
        return '"online": true' in told

    def ready() -> bool:
        return b"self-check passed" in log.read_bytes()[known:]

    federation.until(online, "lab-1 is there")
    federation.until(ready, "its start is over, which takes memory for a while")
    federation.kill("coordinator")
    before = reset(lab.pid)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    home = federation.coordinator
    context.load_cert_chain(home / "server.pem", home / "server.key")
    listener = socket.create_server(("127.0.0.1", federation.port))
    sent, answers = [0, 0], 6

    def answer(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as link:
            endless(link, sent)

    with listener, ThreadPoolExecutor(4) as pool:
        while sent[1] < answers:
            pool.submit(answer, listener.accept()[0])
    grown = peak_of(lab.pid) - before
    print(
        f"\nendless: {sent[1]} answers, {sent[0] >> 20} MiB sent; lab {before >> 20} MiB, "
        f"at most {grown >> 20} MiB more"
    )
    assert grown < MOST
    federation.start("coordinator")
    federation.until(online, "lab-1 is there again")
