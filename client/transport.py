"""The lab's connections below httpx: the standard library's HTTP, which reads large answers whole.

httpx's own transport reads an answer in pieces of one TLS record (16 KiB) and has each pass four
layers of Python: for 45 MB that is four times the processor time that it takes here.

The other end, or a proxy on the way, may be hostile: an answer has as many bytes as its call may
return, each call has an end in time, and nothing is decompressed.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import select
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

import httpx

MOST_ANSWER: Mapping[str, int] = {
    "pull-object": 1 << 23,
    "pull-messages": 1 << 23,
    "push-messages": 1 << 20,
}
"""most bytes of a call's answer, by the last part of its path"""

_MOST_OTHER = 1 << 16
"""of every other answer, and of each without a length: the coordinator says the length"""

_LEAST_RATE = 1 << 14
"""bytes a second, on average, in which a request and the largest answer must have passed"""


class Connections(httpx.BaseTransport):
    """HTTPS with connections that are kept open, one for each thread that asks at a time.

    ``proxy``: http://[user:password@]host:port, asked to CONNECT. Nothing is sent twice: a request
    that fails on a kept connection fails. ``connect_s``, ``request_s``: for each step on the way;
    a request also has an end, ``request_s`` after the time that its bytes take on a slow line.
    """

    def __init__(
        self, context: ssl.SSLContext, *, proxy: str | None, connect_s: float, request_s: float
    ) -> None:
        self._context, self._proxy = context, proxy
        self._connect_s, self._request_s = connect_s, request_s
        self._idle: list[http.client.HTTPSConnection] = []
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Errors: httpx.TransportError, with the words of what went wrong below it."""
        connection = self._kept() or self._new(request.url)
        headers = {name: value for name, value in request.headers.items() if name != "connection"}
        target, body = request.url.raw_path.decode("ascii"), request.read()
        most = MOST_ANSWER.get(request.url.path.rpartition("/")[2], _MOST_OTHER)
        try:
            with _ending(connection, self._request_s + (len(body) + most) / _LEAST_RATE):
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    # Whoever refuses a request before it has all of it says why.
                    connection.request(request.method, target, body or None, headers)
                answer = connection.getresponse()
                content = _content(answer, most)
        except TimeoutError as error:
            connection.close()
            raise httpx.ReadTimeout(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise httpx.ReadError(f"{type(error).__name__}: {error!s:.200}") from error
        if answer.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        found = [(name.encode("latin-1"), value.encode("latin-1"))
                 for name, value in answer.getheaders()]  # fmt: skip
        return httpx.Response(answer.status, headers=found, content=content)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _kept(self) -> http.client.HTTPSConnection | None:
        """An open connection, or None. One with something to read was closed by the other end."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()

    def _new(self, url: httpx.URL) -> http.client.HTTPSConnection:
        host, port = url.host, url.port or 443
        if self._proxy is None:
            made = self._connection(host, port)
        else:
            proxy = urllib.parse.urlsplit(self._proxy)
            made = self._connection(proxy.hostname or "", proxy.port or 80)
            made.set_tunnel(host, port, headers=_credentials(proxy))
        try:
            with _ending(made, 3 * self._connect_s):  # to the proxy, by it, and TLS
                made.connect()
            made.sock.settimeout(self._request_s)
        except TimeoutError as error:
            made.close()
            raise httpx.ConnectTimeout(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            made.close()
            raise httpx.ConnectError(str(error)) from error
        return made

    def _connection(self, host: str, port: int) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            host, port, timeout=self._connect_s, context=self._context
        )


@contextlib.contextmanager
def _ending(connection: http.client.HTTPSConnection, seconds: float) -> Iterator[None]:
    """Cut the connection after so long, however often a byte of it comes. Errors: TimeoutError."""
    cut, before = threading.Event(), connection.sock

    def end() -> None:
        cut.set()
        # An answer without a length takes the socket over; one that is being made comes to be.
        link = before or connection.sock
        if link is not None:
            with contextlib.suppress(OSError):
                # Not ssl's own, which would have the other thread read on without TLS.
                socket.socket.shutdown(link, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if cut.is_set():
            raise TimeoutError(f"not done within {seconds:.0f} s") from error
        raise
    finally:
        timer.cancel()
    if cut.is_set():  # the end of the connection may pass for the end of an answer
        raise TimeoutError(f"not done within {seconds:.0f} s")


def _content(answer: http.client.HTTPResponse, most: int) -> bytes:
    """The body of an answer. Errors: OSError, HTTPException."""
    if answer.getheader("content-encoding", "identity").lower() != "identity":
        raise http.client.HTTPException("the answer is compressed, which was not asked for")
    if answer.length is not None and answer.length <= most:
        return answer.read()
    content = answer.read(_MOST_OTHER + 1) if answer.length is None else b""
    if answer.length is not None or len(content) > _MOST_OTHER:
        raise http.client.HTTPException("the answer is longer than any to this call")
    return content


def _credentials(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user, password = map(urllib.parse.unquote, (proxy.username, proxy.password or ""))
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Proxy-Authorization": f"Basic {token}"}
