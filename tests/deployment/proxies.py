"""What may stand between a lab and its coordinator: a line that breaks, a box that opens TLS."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from cytofed.server import pki


class BreakingLine:
    """Forwards TCP to ``port`` and cuts all its connections again and again.

    The first cut comes after ``first_bytes`` of either direction, each next one after a quarter
    more than the last: early ones hit small requests, late ones let the largest through.
    """

    def __init__(self, port: int, *, first_bytes: float) -> None:
        self._to, self._step_bytes = port, first_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cuts = 0
        self._passed_bytes = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._to))
        except OSError:
            near.close()
            return
        with self._lock:
            self._open |= {near, far}
        other = {near: far, far: near}
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            for end in other:
                selector.register(end, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(1024)
                    if not data:
                        raise ConnectionResetError
                    other[key.fileobj].sendall(data)
                    self._count(len(data))
        near.close()
        far.close()

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._passed_bytes += nbytes
            if self._passed_bytes < self._step_bytes:
                return
            self._passed_bytes, self._step_bytes = 0, self._step_bytes * 1.25
            self.cuts += 1
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._open.clear()


class InspectingBox:
    """Ends TLS with a certificate of its own authority; ``seen`` is what it could read."""

    def __init__(self, folder: Path) -> None:
        issued = pki.new_server_certificate(pki.new_authority("Some Proxy CA"), ("127.0.0.1",))
        folder.mkdir()
        (folder / "certificate.pem").write_bytes(issued.certificate)
        (folder / "key.pem").write_bytes(issued.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.seen = b""
        self.tries = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                self.tries += 1
                with (
                    contextlib.suppress(OSError),
                    self._context.wrap_socket(plain, server_side=True) as opened,
                ):
                    self.seen += opened.recv(4096)
