"""The lab's HTTPS below httpx: kept connections, refusals on the way, the proxy."""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.x509 import load_pem_x509_certificate

from cytofed.client.directory import _told, certificate_of, http_client
from cytofed.errors import VerificationError
from cytofed.server import pki

Handler = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@contextlib.contextmanager
def listening(handle: Handler) -> Iterator[int]:
    """A port whose connections ``handle`` gets, one after the other."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with link, contextlib.suppress(OSError):
                    handle(link)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


class Server:
    """A TLS server; ``asked`` has what came in each request, ``links`` counts connections."""

    def __init__(self, folder: Path, *, requests: int, answer: bytes = OK) -> None:
        authority = pki.new_authority("federation")
        issued = pki.new_server_certificate(authority, ("127.0.0.1",))
        (folder / "server.pem").write_bytes(issued.certificate)
        (folder / "server.key").write_bytes(issued.key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._requests, self._answer = requests, answer
        self.pinned = ssl.create_default_context(cadata=authority.certificate.decode())
        self.asked: list[bytes] = []
        self.links = 0

    def handle(self, link: socket.socket) -> None:
        """Answer so many requests on a connection, then close it."""
        self.links += 1
        with self._context.wrap_socket(link, server_side=True) as tls:
            for _ in range(self._requests):
                got = b""
                while b"\r\n\r\n" not in got:
                    got += tls.recv(4096)
                # Closing with a body unread would reset the connection, and the answer with it.
                while len(got) < _length(got):
                    got += tls.recv(4096)
                self.asked.append(got)
                tls.sendall(self._answer)


def _length(request: bytes) -> int:
    """Bytes of the request, whose head is there."""
    head, _, _ = request.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return len(head) + 4 + (int(found[1]) if found else 0)


def client(server: Server, proxy: str | None = None, request_s: float = 20.0) -> httpx.Client:
    return http_client(server.pinned, proxy=proxy, connect_s=5.0, request_s=request_s)


def test_a_connection_serves_many_requests(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=3)
    with listening(server.handle) as port, client(server) as http:
        for path in ("a?x=1", "b", "c"):
            assert http.get(f"https://127.0.0.1:{port}/{path}").content == b"hi"
    assert server.links == 1
    assert server.asked[0].startswith(b"GET /a?x=1 HTTP/1.1\r\n")
    assert f"host: 127.0.0.1:{port}".encode() in server.asked[0]


def test_a_connection_that_the_server_has_closed_is_made_anew(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=1)
    with listening(server.handle) as port, client(server) as http:
        for _ in range(3):
            assert http.post(f"https://127.0.0.1:{port}/", content=b"x").content == b"hi"
            _until_closed(http)
    assert server.links == 3


def _until_closed(http: httpx.Client) -> None:
    [kept] = http._transport._idle  # type: ignore[attr-defined]
    kept.sock.settimeout(10)
    assert kept.sock.recv(1) == b""


def test_who_refuses_a_large_body_unread_is_heard(tmp_path: Path) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    server = Server(tmp_path, requests=1, answer=refusal)

    def patient(link: socket.socket) -> None:
        server.links += 1
        tls = server._context.wrap_socket(link, server_side=True)
        tls.recv(4096)
        tls.sendall(refusal)
        tls.settimeout(10)
        with contextlib.suppress(OSError):  # what was on its way must not reset the answer
            while tls.recv(1 << 16):
                pass

    with listening(patient) as port, client(server) as http:
        found = http.post(f"https://127.0.0.1:{port}/", content=bytes(1 << 20))
    assert found.status_code == 413


def test_another_authority_is_named_and_nothing_is_asked(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=1)
    (tmp_path / "other").mkdir()
    other = Server(tmp_path / "other", requests=1)
    with (
        listening(server.handle) as port,
        client(other) as http,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        http.get(f"https://127.0.0.1:{port}/")
    assert server.asked == []


def test_a_silent_server_and_a_cut_answer_are_transport_errors(tmp_path: Path) -> None:
    cut = Server(tmp_path, requests=1, answer=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi")
    with (
        listening(cut.handle) as port,
        client(cut) as http,
        pytest.raises(httpx.TransportError, match="IncompleteRead"),
    ):
        http.get(f"https://127.0.0.1:{port}/")

    def silent(link: socket.socket) -> None:
        with cut._context.wrap_socket(link, server_side=True) as tls:
            while tls.recv(4096):
                pass

    with (
        listening(silent) as port,
        client(cut, request_s=0.2) as http,
        pytest.raises(httpx.ReadTimeout),
    ):
        http.get(f"https://127.0.0.1:{port}/")


def test_the_proxy_is_asked_to_connect_with_its_password(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=1)
    seen: list[bytes] = []

    def proxy(link: socket.socket) -> None:
        seen.append(link.recv(4096))
        link.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        server.handle(link)

    with listening(proxy) as port, client(server, f"http://u:p%40ss@127.0.0.1:{port}") as http:
        assert http.get("https://127.0.0.1:4433/health").content == b"hi"
    assert seen[0].startswith(b"CONNECT 127.0.0.1:4433 HTTP/1.")
    assert b"Proxy-Authorization: Basic dTpwQHNz\r\n" in seen[0]


def test_a_proxy_that_says_no_is_quoted(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=1)

    def proxy(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with (
        listening(proxy) as port,
        client(server, f"http://127.0.0.1:{port}") as http,
        pytest.raises(httpx.ConnectError, match="407"),
    ):
        http.get("https://127.0.0.1:4433/health")


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", b"x" * (1 << 16)),
        (HEAD + b"\r\n", b"x" * (1 << 16)),
        (CHUNKED, b"10000\r\n" + b"x" * (1 << 16) + b"\r\n"),
        (CHUNKED, b"1\r\nx\r\n" * 1000),
        (HEAD, b"Large: " + b"x" * 60_000 + b"\r\n"),
        (HEAD, b"Endless: " + b"x" * (1 << 16)),
        (CHUNKED + b"7fffffffffffffff\r\n", b"x" * (1 << 16)),
    ],
    ids=["length", "no length", "chunks", "small chunks", "headers", "header", "chunk"],
)  # fmt: skip
def test_of_an_answer_without_end_only_so_much_is_read(
    tmp_path: Path, head: bytes, more: bytes
) -> None:
    server, sent = Server(tmp_path, requests=1), [0]

    def endless(link: socket.socket) -> None:
        with server._context.wrap_socket(link, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(head)
            while sent[0] < 1 << 28:
                tls.sendall(more)
                sent[0] += len(more)

    with (
        listening(endless) as port,
        client(server) as http,
        pytest.raises(httpx.ReadError, match=r"longer than any|more than 100 headers|LineTooLong"),
    ):
        http.post(f"https://127.0.0.1:{port}/v1/enrol", content=b"x")
    assert sent[0] < 1 << 25  # with what lies in the buffers of both ends


@pytest.mark.parametrize(("call", "most"), [("pull-object", 1 << 23), ("enrol", 1 << 16)])
def test_answer_may_be_as_long_as_its_call_needs(tmp_path: Path, call: str, most: int) -> None:
    for size in (most, most + 1):
        answer = HEAD + b"Content-Length: %d\r\n\r\n" % size + bytes(size)
        server = Server(tmp_path, requests=1, answer=answer)
        with listening(server.handle) as port, client(server) as http:
            url = f"https://127.0.0.1:{port}/v1/{call}"
            if size == most:
                assert len(http.post(url, content=b"x").content) == most
            else:
                with pytest.raises(httpx.ReadError, match="longer than any"):
                    http.post(url, content=b"x")


def dripping(context: ssl.SSLContext, first: bytes, drop: bytes) -> Handler:
    """Sends something every now and then, for ever."""

    def drip(link: socket.socket) -> None:
        with context.wrap_socket(link, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(first)
            while True:
                tls.sendall(drop)
                time.sleep(0.02)

    return drip


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (HEAD + b"Content-Length: 60000\r\n\r\n", b"x"),
        (HEAD + b"\r\n", b"x"),
        (CHUNKED, b"1\r\nx\r\n"),
        (HEAD + b"Header: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED + b"0\r\n", b"Trailer: x\r\n"),
    ],
    ids=["body", "no length", "chunks", "header", "continue", "trailers"],
)
def test_answer_that_drips_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, drop: bytes
) -> None:
    monkeypatch.setattr("cytofed.client.transport._LEAST_RATE", 1 << 20)
    server = Server(tmp_path, requests=1)
    with (
        listening(dripping(server._context, first, drop)) as port,
        client(server, request_s=0.3) as http,
        pytest.raises(httpx.ReadTimeout, match="not done within"),
    ):
        http.get(f"https://127.0.0.1:{port}/")


def test_proxy_without_an_end_is_left(tmp_path: Path) -> None:
    server = Server(tmp_path, requests=1)

    def proxy(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(b"HTTP/1.1 200 Connection established\r\n")
        while True:
            link.sendall(b"X-More: x\r\n")
            time.sleep(0.02)

    with (
        listening(proxy) as port,
        http_client(
            server.pinned, proxy=f"http://127.0.0.1:{port}", connect_s=0.2, request_s=9.0
        ) as http,
        pytest.raises(httpx.TransportError),
    ):
        http.get("https://127.0.0.1:4433/health")


def test_nothing_is_decompressed(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(1 << 24))
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    server = Server(tmp_path, requests=1, answer=head + bomb)
    with (
        listening(server.handle) as port,
        client(server) as http,
        pytest.raises(httpx.ReadError, match="compressed"),
    ):
        http.get(f"https://127.0.0.1:{port}/")
    assert b"gzip" not in server.asked[0]


@pytest.mark.parametrize(
    "body", [b"", b"[" * 60_000, b"[1]", b'"x"', b"{}", b'{"error": [1]}', b"\xff", b"1" * 9000]
)
def test_refusal_is_told_in_one_line_whatever_it_says(body: bytes) -> None:
    error, hint = _told(httpx.Response(400, content=body))
    assert error
    assert error.isprintable()
    assert hint == ""


def test_certificate_is_the_labs_own_or_none() -> None:
    issued = pki.new_server_certificate(pki.new_authority("f"), ("127.0.0.1",))
    pem = issued.certificate
    key = load_pem_x509_certificate(pem).public_key()
    assert certificate_of(key, b"junk\n" + pem + b"-----BEGIN") == pem
    for bad in (b"", pem[:-100], pki.new_authority("g").certificate):
        with pytest.raises(VerificationError):
            certificate_of(key, bad)
