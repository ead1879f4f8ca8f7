"""The lab's connections below httpx: the standard library's HTTP, which reads large answers whole.

httpx's own transport reads an answer in pieces of one TLS record (16 KiB) and has each pass four
layers of Python: for 45 MB that is four times the processor time that it takes here.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import select
import ssl
import threading
import urllib.parse

import httpx


class Connections(httpx.BaseTransport):
    """HTTPS with connections that are kept open, one for each thread that asks at a time.

    ``proxy``: http://[user:password@]host:port, asked to CONNECT. Nothing is sent twice: a request
    that fails on a kept connection fails.
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
        try:
            target = request.url.raw_path.decode("ascii")
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                # Whoever refuses a request before it has all of it says why.
                connection.request(request.method, target, request.read() or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        except TimeoutError as error:
            connection.close()
            raise httpx.ReadTimeout(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise httpx.ReadError(f"{type(error).__name__}: {error}") from error
        if answer.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return httpx.Response(answer.status, headers=answer.getheaders(), content=content)

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
        try:
            if self._proxy is None:
                made = self._connection(host, port)
            else:
                proxy = urllib.parse.urlsplit(self._proxy)
                made = self._connection(proxy.hostname or "", proxy.port or 80)
                made.set_tunnel(host, port, headers=_credentials(proxy))
            made.connect()
            made.sock.settimeout(self._request_s)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return made

    def _connection(self, host: str, port: int) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            host, port, timeout=self._connect_s, context=self._context
        )


def _credentials(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user, password = map(urllib.parse.unquote, (proxy.username, proxy.password or ""))
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Proxy-Authorization": f"Basic {token}"}
