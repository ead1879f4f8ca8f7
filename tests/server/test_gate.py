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
    HEAD_BYTES,
    HEALTH,
    LEAVE,
    RENEW,
    Gate,
    Rates,
)

AUTHORITY = pki.new_authority("fed")
PEM = pki.new_server_certificate(AUTHORITY, ("leeds",)).certificate
DER = load_pem_x509_certificate(PEM).public_bytes(Encoding.DER)
KEY = pki.public_key_pem(PEM)
STRANGER = pki.new_server_certificate(AUTHORITY, ("oslo",)).certificate
STRANGER_DER = load_pem_x509_certificate(STRANGER).public_bytes(Encoding.DER)


async def inner(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    status = scope["state"].get("answer", 200)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def gate(*, per_minute: int = 3, body_timeout_s: float = 5.0) -> Gate:
    return Gate(
        inner,
        known_key=lambda key: key == KEY,
        key_header="x-key",
        per_minute=per_minute,
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
    client: str = "192.0.2.1",
    answer: int = 200,
    header: tuple[bytes, bytes] = (b"host", b"x"),
) -> int:
    return answered(**locals())[0]


def answered(
    at: Gate,
    path: str,
    *,
    method: str = "POST",
    length: str | None = "5",
    certificate: bytes = DER,
    key: bytes = KEY,
    arrives: bool = True,
    client: str = "192.0.2.1",
    answer: int = 200,
    header: tuple[bytes, bytes] = (b"host", b"x"),
) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers. ``answer``: what the app says to whoever the gate lets in."""
    headers = [(b"x-key", b64encode(key)), header]
    if length is not None:
        headers.append((b"content-length", length.encode()))
    scope = {
        "type": "http", "path": path, "method": method, "headers": headers,
        "state": {CERTIFICATE: certificate, "answer": answer}, "client": (client, 50000),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        if not arrives:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"12345", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(at(scope, receive, send))
    return int(sent[0]["status"]), sent[0]["headers"]


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


def test_failed_enrolments_of_one_address_use_up_nobody_elses() -> None:
    one = gate(per_minute=2)

    def enrol(client: str, answer: int = 403) -> int:
        return status(one, ENROL, certificate=b"", client=client, answer=answer)

    assert [enrol("192.0.2.1") for _ in range(4)] == [403, 403, 429, 429]
    assert enrol("192.0.2.1", answer=200) == 429
    assert [enrol("192.0.2.2", answer=200) for _ in range(9)] == [200] * 9  # a success is no try
    assert [enrol(f"2001:db8::{host}") for host in range(3)] == [403, 403, 429]  # one network
    assert enrol("2001:db8:0:1::1") == 403


def test_one_lab_cannot_keep_another_from_renewing_or_leaving() -> None:
    one = Gate(
        inner,
        known_key=lambda key: key in (KEY, pki.public_key_pem(STRANGER)),
        key_header="x-key",
        per_minute=2,
        body_timeout_s=5.0,
    )
    assert [status(one, RENEW) for _ in range(3)] == [200, 200, 429]
    assert status(one, LEAVE, certificate=STRANGER_DER) == 200


def test_rates_remember_a_bounded_number_of_addresses() -> None:
    rates = Rates(1, 60.0)
    for host in range(10_000):
        rates.note(str(host))
    assert len(rates._times) < 5000
    assert rates.full("9999")


def test_head_of_more_than_its_limit_is_refused() -> None:
    large = (b"x-large", bytes(HEAD_BYTES))
    for path in (PULL, ENROL, HEALTH, "/"):
        assert status(gate(), path, header=large) == 431


def test_body_without_a_length_of_its_own_is_refused() -> None:
    assert status(gate(), PULL, header=(b"transfer-encoding", b"chunked")) == 411


def test_stranger_gets_one_answer_on_a_connection_and_a_lab_many() -> None:
    close = (b"connection", b"close")
    assert answered(gate(), HEALTH, method="GET", certificate=b"")[1].count(close) == 1
    assert answered(gate(), "/", method="GET", certificate=b"")[1].count(close) == 1
    assert close not in answered(gate(), PULL)[1]


def test_body_that_does_not_arrive_is_not_waited_for() -> None:
    assert status(gate(body_timeout_s=0.05), PULL, arrives=False) == 408
