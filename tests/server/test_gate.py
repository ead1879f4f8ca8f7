"""What is refused at the door, before a body is read."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from cytofed.server import pki
from cytofed.server.gate import (
    CERTIFICATE,
    ENROL,
    ENROL_BODY,
    FLEET_BODIES,
    HEALTH,
    LEAVE,
    RENEW,
    Gate,
    Rate,
)

AUTHORITY = pki.new_authority("fed")
PEM = pki.new_server_certificate(AUTHORITY, ("leeds",)).certificate
DER = load_pem_x509_certificate(PEM).public_bytes(Encoding.DER)
KEY = pki.public_key_pem(PEM)
STRANGER = pki.new_server_certificate(AUTHORITY, ("oslo",)).certificate
STRANGER_DER = load_pem_x509_certificate(STRANGER).public_bytes(Encoding.DER)


async def inner(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def gate(*, enrolments: int = 3, body_timeout_s: float = 5.0) -> Gate:
    return Gate(
        inner,
        known_key=lambda key: key == KEY,
        key_header="x-key",
        enrolments=Rate(enrolments, 60.0),
        body_timeout_s=body_timeout_s,
    )


def status(
    at: Gate,
    path: str,
    *,
    method: str = "POST",
    length: str | None = "5",
    certificate: bytes = DER,
    key: bytes = KEY,
    arrives: bool = True,
) -> int:
    headers = [(b"x-key", b64encode(key))]
    if length is not None:
        headers.append((b"content-length", length.encode()))
    scope = {
        "type": "http", "path": path, "method": method, "headers": headers,
        "state": {CERTIFICATE: certificate},
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        if not arrives:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"12345", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(at(scope, receive, send))
    return int(sent[0]["status"])


PULL = "/v1/fleet/pull-messages"


def test_lab_of_the_roster_gets_in_and_anyone_sees_the_health() -> None:
    assert status(gate(), PULL) == 200
    assert status(gate(), HEALTH, method="GET", length=None, certificate=b"") == 200
    assert status(gate(), ENROL, certificate=b"") == 200
    assert status(gate(), RENEW) == status(gate(), LEAVE) == 200


@pytest.mark.parametrize("path", [PULL, RENEW, LEAVE])
@pytest.mark.parametrize("certificate", [b"", STRANGER_DER])
def test_nobody_else_does(path: str, certificate: bytes) -> None:
    assert status(gate(), path, certificate=certificate) == 403


def test_key_of_the_request_is_that_of_the_certificate() -> None:
    assert status(gate(), PULL, key=pki.public_key_pem(STRANGER)) == 403
    assert status(gate(), PULL, key=b"") == 403


@pytest.mark.parametrize("path", [*FLEET_BODIES, ENROL, RENEW, LEAVE])
def test_large_bodies_are_refused_before_anyone_is_known(path: str) -> None:
    limit = FLEET_BODIES.get(path, ENROL_BODY)
    assert status(gate(), path, length=str(limit + 1), certificate=b"") == 413
    assert status(gate(), path, length="9" * 40, certificate=b"") == 413
    assert status(gate(), path, length="-1", certificate=b"") == 413
    assert status(gate(), path, length=None, certificate=b"") == 411


@pytest.mark.parametrize("path", ["/", "/v1/control/start-run", "/v1/fleet/get-fab", "/v1/enrol/"])
def test_other_paths_and_methods_are_not_there(path: str) -> None:
    assert status(gate(), path) == 404
    assert status(gate(), PULL, method="GET") == 404


def test_enrolments_are_limited_and_do_not_use_up_what_labs_have() -> None:
    one = gate(enrolments=2)
    assert [status(one, ENROL, certificate=b"") for _ in range(3)] == [200, 200, 429]
    assert status(one, RENEW) == 200
    assert status(one, LEAVE) == 200
    assert status(one, RENEW) == 429


def test_body_that_does_not_arrive_is_not_waited_for() -> None:
    assert status(gate(body_timeout_s=0.05), PULL, arrives=False) == 408
