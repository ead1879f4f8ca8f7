"""Enrolment, renewal of certificates, leaving. And health.

A lab with an invite sends its public keys and gets its certificate: the one request that is
answered without one. It is signed with the identity that it brings, so nobody enrols keys that are
not theirs. Later the lab asks for a new certificate of the same key, or says that it leaves, both
over its connection and signed. Answers are signed by the coordinator.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cytofed import __version__
from cytofed.documents import (
    LABEL_ENROL,
    LABEL_ENROLLED,
    LABEL_LEAVE,
    LABEL_RENEW,
    LABEL_RENEWED,
    Member,
)
from cytofed.errors import InputError, RefusedError, VerificationError
from cytofed.privacy.identity import PublicIdentity, sign, verify
from cytofed.privacy.wire import Fields, decode, encode
from cytofed.server import pki
from cytofed.server.directory import ServerDirectory

_log = logging.getLogger("cytofed.coordinator")

_ONE_AT_A_TIME = threading.Lock()
"""over all changes of the roster"""


@dataclass(frozen=True)
class Asked:
    """A lab's request, read and verified."""

    token: str
    request_pem: bytes
    member: Member


def read_request(document: bytes, *, check: Callable[[str, str], None]) -> Asked:
    """The request, once ``check`` (lab, token) has let it pass: it comes before all that costs.

    Errors: VerificationError or InputError for anything but a well-signed request; ``check``'s.
    """
    outer = decode(document, limit=1 << 16)
    if not isinstance(outer, list) or len(outer) != 2:
        raise VerificationError("not a request for enrolment")
    public, signed = outer
    if not isinstance(public, bytes) or not isinstance(signed, bytes):
        raise VerificationError("not a request for enrolment")
    claimed = Fields.of(Fields.of(signed, "enrolment").raw("body"), "enrolment")
    check(Fields.of(public, "public identity").text("name"), claimed.text("token"))
    identity = PublicIdentity.from_bytes(public)
    fields = Fields.of(verify(signed, label=LABEL_ENROL, signer=identity), "enrolment")
    token, request_pem = fields.text("token"), fields.raw("request")
    declared, fingerprint = fields.uint("declared_patients"), fields.text("fingerprint")
    fields.end()
    if fingerprint != identity.fingerprint:
        raise VerificationError("the request is signed for another identity")
    return Asked(token, request_pem, Member(identity, "", declared))


def enrol(directory: ServerDirectory, document: bytes) -> bytes:
    """The signed answer to a request: certificate and federation.

    The same lab asking again with the same keys gets the same answer: its first may have been lost.
    Errors: InputError, RefusedError, VerificationError.
    """
    digest = hashlib.sha256(document).hexdigest()
    asked = read_request(
        document,
        check=lambda lab, token: (
            None if directory.answered(lab) == digest else directory.check_invite(lab, token)
        ),
    )
    name = asked.member.name
    if directory.answered(name) == digest:
        certificate = directory.certificate(name)
    else:
        certificate = pki.sign_request(directory.authority(), asked.request_pem, lab=name)
        key = hashlib.sha256(pki.public_key_pem(certificate)).hexdigest()
        directory.redeem(name, asked.token)
        member = Member(asked.member.identity, key, asked.member.declared_patients)
        directory.enrol(member, certificate)
        directory.note_answered(name, digest)
    identity = directory.identity()
    body = encode(
        {
            "certificate": certificate,
            "coordinator": identity.public.to_bytes(),
            "federation": directory.settings().name,
            "lab": name,
            "request": bytes.fromhex(digest),
        }
    )
    return sign(identity, LABEL_ENROLLED, body)


def renew(directory: ServerDirectory, document: bytes) -> bytes:
    """A new certificate for the key that the lab has: the roster, and what labs pinned, stay.

    Errors: InputError, VerificationError.
    """
    member, fields = _from_member(directory, document, LABEL_RENEW)
    request_pem = fields.raw("request")
    fields.end()
    certificate = pki.sign_request(directory.authority(), request_pem, lab=member.name)
    if hashlib.sha256(pki.public_key_pem(certificate)).hexdigest() != member.node_key_sha256:
        raise VerificationError(f"{member.name} asks for a certificate of another key")
    directory.renew(member.name, certificate)
    body = encode({"certificate": certificate, "lab": member.name})
    return sign(directory.identity(), LABEL_RENEWED, body)


def leave(directory: ServerDirectory, document: bytes) -> bytes:
    """Take a lab off the roster, as it asks. Errors: VerificationError."""
    member, fields = _from_member(directory, document, LABEL_LEAVE)
    fields.end()
    directory.leave(member.name)
    return b""


def _from_member(directory: ServerDirectory, document: bytes, label: str) -> tuple[Member, Fields]:
    """Who of the roster has signed this document, and what it says.

    Errors: VerificationError for a stranger, a forged document, one of another federation.
    """
    outer = decode(document, limit=1 << 16)
    if not isinstance(outer, list) or len(outer) != 2:
        raise VerificationError("not a signed document of a lab")
    lab, signed = outer
    if not isinstance(lab, str) or not isinstance(signed, bytes):
        raise VerificationError("not a signed document of a lab")
    roster = directory.roster()
    member = roster.member(lab)
    fields = Fields.of(verify(signed, label=label, signer=member.identity), "document")
    if fields.text("federation") != roster.federation:
        raise VerificationError("a document of another federation")
    return member, fields


Change = Callable[[ServerDirectory, bytes], bytes]
"""A signed request in, the answer out: ``enrol``, ``renew``, ``leave``."""


def route_of(
    change: Change, directory: ServerDirectory, changed: Callable[[], None]
) -> Callable[[Request], Awaitable[Response]]:
    """POST: a request in, an answer out. ``changed`` is called after each."""

    def change_one(document: bytes) -> bytes:
        with _ONE_AT_A_TIME:
            answer = change(directory, document)
            changed()
            return answer

    async def route(request: Request) -> Response:
        body = await request.body()
        try:
            answer = await run_in_threadpool(change_one, body)
        except (InputError, RefusedError, VerificationError) as error:
            status = 403 if isinstance(error, RefusedError) else 400
            told = {"error": error.message[:300], "hint": error.hint[:300]}
            return JSONResponse(told, status)
        except Exception as error:  # of this machine: no request is told what it was
            _log.error("%s: %s: %s", request.url.path, type(error).__name__, error)
            return JSONResponse({"error": "internal error"}, 500)
        return Response(answer, media_type="application/octet-stream")

    return route


def health_of(trouble: Callable[[], str]) -> Callable[[Request], Awaitable[Response]]:
    """Says that the coordinator is up and which version it is; 503 and why, while it is not well.

    ``trouble``: what is wrong now, or nothing; for anybody's eyes.
    """

    async def health(_request: Request) -> Response:
        wrong = trouble()
        if wrong:
            return JSONResponse({"ok": False, "reason": wrong, "version": __version__}, 503)
        return JSONResponse({"ok": True, "version": __version__})

    return health
