"""What is refused at the door: before a body is read, before anything of Flower sees a request.

Only known paths answer; bodies are small, have a length and arrive in time. All but enrolment and
health need a client certificate of the roster, the fleet's paths one for the very key that signs
the request's headers. Enrolment, renewal and leaving are limited in their rate.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cytofed.server.pki import public_key_pem_of_der

ENROL, RENEW, LEAVE, HEALTH = "/v1/enrol", "/v1/renew", "/v1/leave", "/health"

KIB, MIB = 1 << 10, 1 << 20

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


@dataclass
class Rate:
    """At most ``count`` in any ``per_s`` seconds."""

    count: int
    per_s: float
    _times: deque[float] = field(default_factory=deque, repr=False)

    def full(self) -> float:
        """Seconds until there is room again; 0 takes it."""
        now = time.monotonic()
        while self._times and now - self._times[0] >= self.per_s:
            self._times.popleft()
        if len(self._times) >= self.count:
            return self.per_s - (now - self._times[0])
        self._times.append(now)
        return 0.0


class Gate:
    """ASGI middleware, the outermost. ``known_key``: whether a public key (PEM) is in the roster.

    ``key_header``: the header in which Flower's node authentication sends its key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        known_key: Callable[[bytes], bool],
        key_header: str,
        enrolments: Rate,
        body_timeout_s: float,
    ) -> None:
        self._app, self._known_key, self._enrolments = app, known_key, enrolments
        self._changes = Rate(enrolments.count, enrolments.per_s)
        self._key_header, self._body_timeout_s = key_header.lower().encode(), body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status = self._refuse(scope)
        if status:
            await _answer(send, status)
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
            await self._app(scope, receive_in_time, send)
        except TimeoutError:
            if arrived:
                raise
            await _answer(send, 408)

    def _refuse(self, scope: Scope) -> int:
        """The status to refuse with, or 0."""
        path, method = scope["path"], scope["method"]
        if path == HEALTH and method in ("GET", "HEAD"):
            return 0
        signed = path in (ENROL, RENEW, LEAVE)
        limit = ENROL_BODY if signed else FLEET_BODIES.get(path)
        if limit is None or method != "POST":
            return 404
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        if length is None:
            return 411
        if not length.isdigit() or len(length) > 12 or int(length) > limit:
            return 413
        own = _certified_key(scope)
        if path != ENROL and not (own and self._known_key(own)):
            return 403
        if signed:
            # Apart: strangers who ask to enrol cannot keep a lab from renewing or leaving.
            return 429 if (self._enrolments if path == ENROL else self._changes).full() else 0
        return 0 if _decoded(headers.get(self._key_header, b"")) == own else 403


def _certified_key(scope: Scope) -> bytes:
    """The key (PEM) of the connection's client certificate, or nothing."""
    certificate = scope.get("state", {}).get(CERTIFICATE, b"")
    return public_key_pem_of_der(certificate) if certificate else b""


def _decoded(key: bytes) -> bytes:
    try:
        return b64decode(key, validate=True)
    except ValueError:
        return b""


async def _answer(send: Send, status: int) -> None:
    # The body was not read, so the connection can't be used again.
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
