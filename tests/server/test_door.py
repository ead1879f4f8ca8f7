"""Strangers at the port are few and short, and labs get in whatever they do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cytofed.errors import InputError
from cytofed.server import door as door_module
from cytofed.server import pki
from cytofed.server.door import (
    LAB_CONNECTIONS,
    STRANGERS,
    STRANGERS_OF_ADDRESS,
    Door,
    serve_at,
)
from cytofed.server.gate import CERTIFICATE, HEAD_BYTES

LENGTH = (b"content-length", b"0")
ASK = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    while scope["path"] == "/slow" and (await receive()).get("more_body"):
        pass
    lab = bool(scope["state"][CERTIFICATE])
    headers = [] if lab else [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": [*headers, LENGTH]})
    await send({"type": "http.response.body", "body": b""})


@dataclass
class Port:
    """A port in this process, with one lab whose key is known."""

    number: int
    server: uvicorn.Server
    authority: str
    folder: Path

    def plain(self, host: str = "127.0.0.1") -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.number), 30, source_address=(host, 0))
        made.settimeout(30)
        return made

    def secure(self, link: socket.socket, *, lab: bool = False) -> ssl.SSLSocket:
        context = ssl.create_default_context(cadata=self.authority)
        if lab:
            context.load_cert_chain(self.folder / "lab.pem", self.folder / "lab.key")
        return context.wrap_socket(link, server_hostname="127.0.0.1")

    def lab(self) -> ssl.SSLSocket:
        return self.secure(self.plain(), lab=True)


def lives(link: socket.socket) -> bool:
    """Whether the other end keeps the connection open, as far as is seen at once."""
    link.setblocking(False)
    try:
        return link.recv(1) != b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    finally:
        link.settimeout(30)


def answer(link: ssl.SSLSocket) -> int:
    """The status of an answer without a body."""
    link.sendall(ASK)
    return int(link.recv(4096).split()[1])


def ends(link: socket.socket) -> bool:
    """True once the other end has closed, or cut, the connection."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while link.recv(4096):
            pass
    return True


def client_of(authority: pki.Issued) -> pki.Issued:
    """A lab's key and certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = request.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pki.Issued(pki.sign_request(authority, pem, lab="leeds"), secret)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    authority = pki.new_authority("fed")
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    server, lab = pki.new_server_certificate(authority, ("127.0.0.1",)), client_of(authority)
    for name, issued in {"server": server, "lab": lab}.items():
        (tmp_path / f"{name}.pem").write_bytes(issued.certificate)
        (tmp_path / f"{name}.key").write_bytes(issued.key)
    key = pki.public_key_pem(lab.certificate)
    door = Door(known=lambda pem: pem == key, files=1 << 12)
    [listening] = door.listen("127.0.0.1", 0)
    made = serve_at(door, app, folder=tmp_path, ending=lambda: None)
    thread = threading.Thread(target=lambda: asyncio.run(made.serve([listening])), daemon=True)
    number = listening.getsockname()[1]
    thread.start()
    while not made.started:
        thread.join(0.01)
    try:
        yield Port(number, made, authority.certificate.decode(), tmp_path)
    finally:
        made.should_exit = made.force_exit = True
        thread.join(30)


def test_lab_gets_in_while_strangers_hold_what_they_can(port: Port) -> None:
    idle = [port.plain() for _ in range(3 * STRANGERS_OF_ADDRESS)]
    with port.lab() as lab:
        assert answer(lab) == 200
        more = [port.plain() for _ in range(3 * STRANGERS_OF_ADDRESS)]
        assert answer(lab) == 200  # and stays
        assert all(ends(link) for link in idle)
        assert all(ends(link) for link in more[:-STRANGERS_OF_ADDRESS])


def test_strangers_of_one_address_push_out_only_each_other(port: Port) -> None:
    first = [port.plain("127.0.0.2") for _ in range(3)]
    many = [port.plain("127.0.0.3") for _ in range(2 * STRANGERS_OF_ADDRESS)]
    assert all(ends(link) for link in many[:STRANGERS_OF_ADDRESS])
    assert all(lives(link) for link in first)
    for link in first:
        assert answer(port.secure(link)) == 200


def test_strangers_of_many_addresses_are_few_together(port: Port) -> None:
    each = STRANGERS_OF_ADDRESS // 2
    hosts = [f"127.0.1.{number}" for number in range(1, 3 * STRANGERS // each)]
    links = [port.plain(host) for host in hosts for _ in range(each)]
    with port.lab() as lab:
        assert answer(lab) == 200
    assert sum(lives(link) for link in links) <= STRANGERS


def test_one_lab_has_few_connections_and_the_oldest_goes(port: Port) -> None:
    links = [port.lab() for _ in range(LAB_CONNECTIONS)]
    assert answer(links[-1]) == 200
    links.append(port.lab())
    assert answer(links[-1]) == 200
    assert ends(links[0])
    assert answer(links[1]) == 200


@pytest.mark.parametrize("kind", ["plain", "secure", "lab"])
def test_head_that_never_comes_is_not_waited_for(
    port: Port, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "HEAD_S", 0.2)
    link = port.plain()
    if kind != "plain":
        link = port.secure(link, lab=kind == "lab")
        link.sendall(ASK[:20])
    assert ends(link)


def test_stranger_has_seconds_for_all_it_does(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "STRANGER_S", 0.2)
    link = port.secure(port.plain())
    link.sendall(b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
    assert ends(link)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\nlarge: " + b"x" * (1 << 20),
        b"GET /" + b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * (1 << 18),
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b" folded\r\n" * (1 << 18),
        b"\r\n" * (1 << 20),
        b"POST /slow HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
        + b"trailer: x\r\n" * (1 << 18),
        b"POST /slow HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"1;" + b"extension" * (1 << 18),
    ],
    ids=["value", "target", "many", "folded", "empty", "trailers", "extension"],
)  # fmt: skip
@pytest.mark.parametrize("lab", [False, True])
def test_head_is_held_to_its_limit_whoever_sends_it(port: Port, head: bytes, lab: bool) -> None:
    link = port.secure(port.plain(), lab=lab)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        link.sendall(head)
    assert ends(link)
    connections: Any = port.server.server_state.connections
    assert sum(len(made.conn._receive_buffer) for made in connections) < HEAD_BYTES + (1 << 16)


def test_requests_in_a_row_are_answered_one_after_the_other(port: Port) -> None:
    with port.lab() as lab:
        lab.sendall(ASK * 50)
        got = b""
        while got.count(b"HTTP/1.1 200") < 50:
            got += lab.recv(1 << 16)
    with port.secure(port.plain()) as stranger:
        stranger.sendall(ASK * 50)
        got = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := stranger.recv(1 << 16):
                got += part
        assert got.count(b"HTTP/1.1 200") == 1


def test_no_number_of_connections_uses_up_the_files_of_this_process() -> None:
    assert Door(known=lambda _pem: False, files=400)._most == 100
    assert Door(known=lambda _pem: False, files=1 << 16)._most == STRANGERS


def test_port_that_is_taken_is_said() -> None:
    door = Door(known=lambda _pem: False, files=400)
    [taken] = door.listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(InputError, match="cannot listen on"):
        door.listen("127.0.0.1", taken.getsockname()[1])
    taken.close()
