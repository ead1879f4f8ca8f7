"""Enrolment: a lab with an invite sends its public keys and gets its certificate. And health.

The one thing that answers without a client certificate. The request is signed with the identity
that it brings, so nobody enrols keys that are not theirs; the answer is signed by the coordinator.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cytofed import __version__
from cytofed.documents import LABEL_ENROL, LABEL_ENROLLED, Member
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.privacy.identity import PublicIdentity, sign, verify
from cytofed.privacy.wire import Fields, decode, encode
from cytofed.server import pki
from cytofed.server.directory import ServerDirectory


@dataclass(frozen=True)
class Asked:
    """A lab's request, read and verified."""

    token: str
    request_pem: bytes
    member: Member


def read_request(document: bytes) -> Asked:
    """Errors: VerificationError or InputError for anything but a well-signed request."""
    outer = decode(document, limit=1 << 16)
    if not isinstance(outer, list) or len(outer) != 2:
        raise VerificationError("not a request for enrolment")
    public, signed = outer
    if not isinstance(public, bytes) or not isinstance(signed, bytes):
        raise VerificationError("not a request for enrolment")
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
    asked = read_request(document)
    name = asked.member.name
    digest = hashlib.sha256(document).hexdigest()
    answered = directory.root / "labs" / f"{name}.request"
    if answered.is_file() and answered.read_text() == digest:
        certificate = directory.certificate(name)
    else:
        certificate = pki.sign_request(directory.authority(), asked.request_pem, lab=name)
        key = hashlib.sha256(pki.public_key_pem(certificate)).hexdigest()
        directory.redeem(name, asked.token)
        member = Member(asked.member.identity, key, asked.member.declared_patients)
        directory.enrol(member, certificate)
        answered.write_text(digest)
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


def enrolment_route(
    directory: ServerDirectory, enrolled: Callable[[], None]
) -> Callable[[Request], Awaitable[Response]]:
    """POST: a request in, an answer out. ``enrolled`` is called after each new lab."""

    one_at_a_time = threading.Lock()

    def enrol_one(document: bytes) -> bytes:
        with one_at_a_time:
            answer = enrol(directory, document)
            enrolled()
            return answer

    async def route(request: Request) -> Response:
        body = await request.body()
        try:
            answer = await run_in_threadpool(enrol_one, body)
        except (InputError, RefusedError, VerificationError) as error:
            status = 403 if isinstance(error, RefusedError) else 400
            told = {"error": error.message[:300], "hint": error.hint[:300]}
            return JSONResponse(told, status)
        except CytofedError:
            return JSONResponse({"error": "internal error"}, 500)
        return Response(answer, media_type="application/octet-stream")

    return route


async def health(_request: Request) -> Response:
    """Says that the coordinator is up and which version it is."""
    return JSONResponse({"ok": True, "version": __version__})
