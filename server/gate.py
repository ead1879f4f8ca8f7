"""What is refused at the door: before a body is read, before anything of Flower sees a request.

Only known paths answer; bodies are small, have a length and arrive in time. All but enrolment and
health need a client certificate of the roster, the fleet's paths one for the very key that signs
the request's headers. Failed enrolments are limited in their rate for each address, renewal and
leaving for each lab: none can use up what others have. A stranger gets one answer on a connection.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cytofed.server.pki import public_key_pem_of_der

ENROL, RENEW, LEAVE, HEALTH = "/v1/enrol", "/v1/renew", "/v1/leave", "/health"

KIB, MIB = 1 << 10, 1 << 20

HEAD_BYTES = 16 * KIB
"""most bytes of a request's head"""

FLEET_BODIES: Mapping[str, int] = {
    "/v1/fleet/activate-node": 4 * KIB,
    "/v1/fleet/deactivate-node": 4 * KIB,
    "/v1/fleet/send-node-heartbeat": 4 * KIB,
    "/v1/fleet/pull-messages": 4 * KIB,
    "/v1/fleet/pull-object": 4 * KIB,
    "/v1/fleet/confirm-message-received": 4 * KIB,
    "/v1/fleet/push-messages": 1 * MIB,
    "/v1/fleet/push-object": 8 * MIB,
}
"""What a lab may call, and how large a body may be. Flower cuts arrays at 5 MB."""

ENROL_BODY = 64 * KIB

CERTIFICATE = "client_certificate"
"""key of the connection's client certificate (DER, or empty) in an ASGI scope's ``state``"""


_CLOSE = (b"connection", b"close")

_REMEMBERED = 4096
"""addresses or keys whose rate is known at a time"""


class Rates:
    """At most ``count`` in any ``per_s`` seconds, of each who asks."""

    def __init__(self, count: int, per_s: float) -> None:
        self._count, self._per_s = count, per_s
        self._times: dict[str | bytes, deque[float]] = {}

    def full(self, who: str | bytes) -> bool:
        """Whether there is no room for one more now."""
        times = self._times.get(who, deque())
        while times and time.monotonic() - times[0] >= self._per_s:
            times.popleft()
        return len(times) >= self._count

    def note(self, who: str | bytes) -> None:
        """Count one."""
        times = self._times.pop(who, deque(maxlen=self._count))
        times.append(time.monotonic())
        self._times[who] = times  # who was noted longest ago is forgotten first
        if len(self._times) > _REMEMBERED:
            del self._times[next(iter(self._times))]


class Gate:
    """ASGI middleware, the outermost. ``known_key``: whether a public key (PEM) is in the roster.

    ``key_header``: the header in which Flower's node authentication sends its key.
    ``per_minute``: failed enrolments of each address, and renewals of each lab.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        known_key: Callable[[bytes], bool],
        key_header: str,
        per_minute: int,
        body_timeout_s: float,
    ) -> None:
        self._app, self._known_key = app, known_key
        self._failed, self._changes = Rates(per_minute, 60.0), Rates(per_minute, 60.0)
        self._key_header, self._body_timeout_s = key_header.lower().encode(), body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        origin = origin_of((scope.get("client") or ("",))[0])
        stranger = not scope.get("state", {}).get(CERTIFICATE)

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["path"] == ENROL and message["status"] >= 400:
                    self._failed.note(origin)
                headers = list(message.get("headers", []))
                if stranger and _CLOSE not in headers:
                    message = {**message, "headers": [*headers, _CLOSE]}
            await send(message)

        status = self._refuse(scope, origin)
        if status:
            await _answer(send if status == 429 else send_noted, status)
            return
        deadline = asyncio.get_running_loop().time() + self._body_timeout_s
        arrived = False

        async def receive_in_time() -> Message:
            nonlocal arrived
            if arrived:  # waits for a disconnect, however long the answer takes
                return await receive()
            async with asyncio.timeout_at(deadline):
                message = await receive()
            arrived = not message.get("more_body", False)
            return message

        try:
            await self._app(scope, receive_in_time, send_noted)
        except TimeoutError:
            if arrived:
                raise
            await _answer(send_noted, 408)

    def _refuse(self, scope: Scope, origin: str) -> int:
        """The status to refuse with, or 0."""
        path, method = scope["path"], scope["method"]
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        if size + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > HEAD_BYTES:
            return 431
        if path == HEALTH and method in ("GET", "HEAD"):
            return 0
        signed = path in (ENROL, RENEW, LEAVE)
        limit = ENROL_BODY if signed else FLEET_BODIES.get(path)
        if limit is None or method != "POST":
            return 404
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        if length is None or b"transfer-encoding" in headers:
            return 411
        if not length.isdigit() or len(length) > 12 or int(length) > limit:
            return 413
        own = _certified_key(scope)
        if path != ENROL and not (own and self._known_key(own)):
            return 403
        if path == ENROL:
            return 429 if self._failed.full(origin) else 0
        if signed:
            if self._changes.full(own):
                return 429
            self._changes.note(own)
            return 0
        return 0 if _decoded(headers.get(self._key_header, b"")) == own else 403


def _certified_key(scope: Scope) -> bytes:
    """The key (PEM) of the connection's client certificate, or nothing."""
    certificate = scope.get("state", {}).get(CERTIFICATE, b"")
    return public_key_pem_of_der(certificate) if certificate else b""


@lru_cache(4096)
def origin_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the network of 64 bits of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _decoded(key: bytes) -> bytes:
    try:
        return b64decode(key, validate=True)
    except ValueError:
        return b""


async def _answer(send: Send, status: int) -> None:
    # The body was not read, so the connection can't be used again.
    headers = [(b"content-length", b"0"), _CLOSE]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
