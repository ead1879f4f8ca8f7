"""How many may be at the port, how long, and with how large a head of a request.

A *stranger* is a connection that has not shown a certificate of the roster: it may be in its TLS
handshake, ask to enrol, or look at the health. Strangers are few, for each address of the internet
and for all, and each has seconds, for one request. Where one too many comes the oldest goes: of the
same address, else of the address that has the most. So whoever fills the port pushes out himself,
and a lab, which is a stranger for the length of a handshake, gets in. Labs are not counted among
strangers; each has its own few connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import threading
import time
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cytofed.errors import InputError
from cytofed.server.gate import CERTIFICATE, HEAD_BYTES, origin_of
from cytofed.server.pki import public_key_pem_of_der

HEAD_S = 10.0
"""for a head to arrive; a stranger's handshake comes out of it"""

STRANGER_S = 30.0
"""for all that a stranger does"""

STRANGERS, STRANGERS_OF_ADDRESS = 256, 32
"""connections without a certificate of the roster, of all addresses and of each"""

LAB_CONNECTIONS = 16
"""of each lab: it has two or three, and those that broke off unseen"""

_TLS_BYTES, _MOST_TLS_BYTES, _LEAST_TLS_BYTES = 1 << 19, 1 << 16, 1 << 14
"""that all connections together read at a time, and each one at most and at least"""

_AT_ONCE = 64
"""connections that are accepted in one turn of the event loop"""

_MOST_FILES = 1 << 16


@dataclass
class _Stranger:
    """``end`` cuts the connection; ``asked``: the head of its request is there."""

    origin: str
    link: socket.socket
    end: Callable[[], None]
    since: float = field(default_factory=time.monotonic)
    asked: bool = False


class Door:
    """Counts who is at the port. ``known``: whether a public key (PEM) is in the roster.

    ``files``: how many this process may have open; strangers get a quarter at most.
    Guarantees: at most ``STRANGERS`` connections without a key of the roster and
    ``LAB_CONNECTIONS`` for each key, whatever comes. For the thread of the event loop.
    """

    def __init__(self, *, known: Callable[[bytes], bool], files: int) -> None:
        self._known = known
        self._most = min(STRANGERS, files // 4)
        self._strangers: dict[Any, _Stranger] = {}  # by peer, the oldest first
        self._labs: dict[bytes, dict[Any, Connection]] = {}
        sslproto.SSLProtocol.max_size = _MOST_TLS_BYTES  # of the first connection

    def listen(self, host: str, port: int) -> list[socket.socket]:
        """The sockets that accept for this door. Errors: InputError where that cannot be."""
        found: list[socket.socket] = []
        try:
            for family, *_, address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                try:
                    found.append(_Listening(self, family))
                    found[-1].bind(address)
                except OSError as error:
                    if error.errno != errno.EAFNOSUPPORT:  # a machine without IPv6
                        raise
            if not found:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        except OSError as error:
            for made in found:
                made.close()
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint="see address and listen in server.yaml; does another process use the port?",
            ) from None
        return found

    def come(self, link: socket.socket, peer: Any) -> None:
        """A connection is accepted; who is one too many goes."""
        origin = origin_of(peer[0])
        for other in [p for p, who in self._strangers.items() if who.link.fileno() < 0]:
            del self._strangers[other]
        of_address = Counter(who.origin for who in self._strangers.values())
        if of_address[origin] >= STRANGERS_OF_ADDRESS:
            self._drop_oldest(origin)
        elif len(self._strangers) >= self._most:
            self._drop_oldest(max(of_address, key=of_address.__getitem__))
        self._strangers[peer] = _Stranger(origin, link, lambda: _cut(link))

    def _drop_oldest(self, origin: str) -> None:
        peer = next(peer for peer, who in self._strangers.items() if who.origin == origin)
        self._strangers.pop(peer).end()

    def shaken(self, connection: Connection, certificate: bytes) -> None:
        """A handshake is over; ``certificate`` (DER) is what was shown in it, or nothing."""
        peer = connection.transport.get_extra_info("peername")
        key = public_key_pem_of_der(certificate) if certificate else b""
        if not key or not self._known(key):
            if peer in self._strangers:
                self._strangers[peer].end = connection.transport.abort
            return
        self._strangers.pop(peer, None)
        own = self._labs.setdefault(key, {})
        if len(own) >= LAB_CONNECTIONS:
            own.pop(next(iter(own))).transport.abort()
        own[peer] = connection
        connection.gone = lambda: self._forget(key, peer, connection)

    def _forget(self, key: bytes, peer: Any, connection: Connection) -> None:
        own = self._labs.get(key, {})
        if own.get(peer) is connection:
            del own[peer]
        if not own:
            self._labs.pop(key, None)

    def asked(self, connection: Connection) -> None:
        """The head of a request has come."""
        who = self._strangers.get(connection.transport.get_extra_info("peername"))
        if who is not None:
            who.asked = True

    def sweep(self) -> None:
        """Cut every connection that is too slow; call it each second."""
        now = time.monotonic()
        for peer, who in list(self._strangers.items()):
            if now - who.since > (STRANGER_S if who.asked else HEAD_S):
                del self._strangers[peer]
                who.end()
        for own in list(self._labs.values()):
            for connection in list(own.values()):
                if now - connection.head_since > HEAD_S:
                    connection.transport.abort()


class _Listening(socket.socket):
    """A socket that tells a door whom it accepts."""

    def __init__(self, door: Door, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._door, self._accepted = door, 0
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # as asyncio does: the other family has a socket of its own
            self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)

    def accept(self) -> tuple[socket.socket, Any]:
        if self._accepted >= _AT_ONCE:
            raise BlockingIOError  # the rest once those that had to go are closed
        link, peer = super().accept()
        if not self._accepted:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._accepted += 1
        self._door.come(link, peer)
        return link, peer

    def _next_turn(self) -> None:
        self._accepted = 0


class Connection(H11Protocol):
    """uvicorn's protocol on one connection of a ``Door``.

    h11's parser, as it holds a head of ``HEAD_BYTES`` and no more. uvicorn alone forgets whose
    certificate a connection was made with.
    """

    def __init__(self, *args: Any, door: Door, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door = door
        self.head_since = float("inf")
        """when the head began that is not whole yet"""
        self.gone: Callable[[], None] = lambda: None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Each connection has a buffer of this size for life, a quarter of a MiB if left alone.
        share = min(_MOST_TLS_BYTES, _TLS_BYTES // len(self.connections))
        sslproto.SSLProtocol.max_size = max(_LEAST_TLS_BYTES, share)  # of the next one
        # What came and is not read yet, of a body that is taken slowly: a quarter of a MiB too.
        transport.set_read_buffer_limits(high=max(_LEAST_TLS_BYTES, share))
        # And what waits for a lab that reads slowly, half a MiB if left alone.
        transport.set_write_buffer_limits(high=_MOST_TLS_BYTES)
        connection = transport.get_extra_info("ssl_object")
        certificate = (connection.getpeercert(binary_form=True) if connection else None) or b""
        self.app_state: dict[str, Any] = {**self.app_state, CERTIFICATE: certificate}
        self._door.shaken(self, certificate)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        idle = before is None or before.response_complete
        super().data_received(data)
        if self.cycle is not before:
            self.head_since = float("inf")
            self._door.asked(self)
        elif idle and self.head_since == float("inf"):
            self.head_since = time.monotonic()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. Where an answer is under way it says no more, and nothing does."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state is h11.IDLE:
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone()


def serve_at(
    door: Door, app: ASGIApp, *, folder: Path, ending: Callable[[], None]
) -> uvicorn.Server:
    """A server for the sockets of ``door``, with the certificates of the coordinator's folder.

    ``ending`` is called where the process is told to end.
    """
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(Connection, door=door)),
        h11_max_incomplete_event_size=HEAD_BYTES,
        ws="none",
        lifespan="off",
        ssl_certfile=folder / "server.pem",
        ssl_keyfile=folder / "server.key",
        ssl_ca_certs=str(folder / "ca.pem"),
        # Optional on the port, required by the gate on all paths but enrolment and health.
        ssl_cert_reqs=ssl.CERT_OPTIONAL,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    # What it warns of is what strangers send, as often as they like.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return _Server(config, door=door, ending=ending)


class _Server(uvicorn.Server):
    """uvicorn's server; told to end, it first ends the labs' waiting, which else it waits for."""

    def __init__(self, config: uvicorn.Config, *, door: Door, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._door, self._ending = door, ending

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # each second
            self._door.sweep()
        return bool(await super().on_tick(counter))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a thread: a signal handler must not wait for a lock that its own thread holds.
        threading.Thread(target=self._ending).start()
        super().handle_exit(sig, frame)


def raise_file_limit() -> int:
    """Have as many open files as the system lets this process have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return most if soft == resource.RLIM_INFINITY else soft


def _cut(link: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        link.shutdown(socket.SHUT_RDWR)
