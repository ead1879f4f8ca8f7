"""A lab's directory: its keys, the coordinator that it pinned, its settings and its records.

::

    client.yaml                    settings, commented; the lab's to change
    identity.key node.key          0600: signatures and sealing; TLS and node authentication
    storage.key                    0600: encrypts what is kept between attempts at a round; may be
                                   elsewhere, or encrypted itself, see cytofed.client.storage
    certificate.pem ca.pem         what the coordinator's authority signed; the authority itself
    federation.json                federation, lab, address, the coordinator's pinned fingerprint
    coordinator.cbor               the coordinator's public identity
    plans/                         offers and decisions
    egress.log egress.head         what left; its last record's hash
    runs/OFFER/                    of an approved offer, by its id: start model and cohort;
                                   encrypted: own layers, protocol state, outbox
    models/OFFER/                  results
    paused left status.json        marks and the daemon's one line
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cytofed import __version__
from cytofed.client.egress import EgressLog, Outgoing, fields_of
from cytofed.client.policy import PlanBook
from cytofed.client.reader import fitting_map, refuse_unsaid_patients
from cytofed.client.settings import Settings, fresh_yaml, load_settings
from cytofed.client.storage import KEY_BYTES, KEY_FILE, open_storage_key
from cytofed.client.transport import Connections
from cytofed.documents import COORDINATOR, LABEL_ENROL, LABEL_ENROLLED, Invite, Offer
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, PublicIdentity, sign, verify
from cytofed.privacy.ledger import Ledger
from cytofed.strict import read_json
from cytofed.words import one_line

_ENROL_S = 30.0

_OFFERS = 64
"""verified offers that a process remembers"""


@dataclass(frozen=True)
class Membership:
    """Which federation this lab is in, as it was pinned when it joined."""

    federation: str
    lab: str
    address: str
    fingerprint: str
    """of the coordinator"""

    @property
    def url(self) -> str:
        return f"https://{self.address}"


@dataclass(frozen=True)
class ClientDirectory:
    """A lab's directory that exists."""

    root: Path

    @staticmethod
    def open(root: Path) -> ClientDirectory:
        """Errors: InputError where ``root`` is no lab's directory."""
        if not (root / "certificate.pem").is_file():
            raise InputError(
                f"{root} is not a lab's directory",
                hint=f"join a federation: cytofed client join INVITE --dir {root} --data DATA",
            )
        return ClientDirectory(root)

    def settings(self) -> Settings:
        return load_settings(self.root / "client.yaml")

    def membership(self) -> Membership:
        return Membership(**read_json((self.root / "federation.json").read_text()))

    def identity(self) -> Identity:
        return Identity.from_bytes((self.root / "identity.key").read_bytes())

    def coordinator(self) -> PublicIdentity:
        """The coordinator's keys. Errors: VerificationError unless they are those pinned."""
        found = PublicIdentity.from_bytes((self.root / "coordinator.cbor").read_bytes())
        if found.fingerprint != self.membership().fingerprint:
            raise VerificationError(
                f"coordinator.cbor has fingerprint {found.fingerprint[:16]}, this lab pinned "
                f"{self.membership().fingerprint[:16]}"
            )
        return found

    def storage_key(self) -> bytes:
        """Errors: InputError where it is not there, or is not to be opened."""
        return open_storage_key(self.root, self.settings().storage_key)

    def plans(self) -> PlanBook:
        coordinator = self.coordinator()

        @lru_cache(_OFFERS)  # every order and every turn of the daemon reads them all again
        def verified(document: bytes) -> Offer:
            return Offer.verified(document, coordinator)

        return PlanBook(
            self.root / "plans",
            verified=verified,
            own=self.identity().public,
        )

    @property
    def egress(self) -> Path:
        return self.root / "egress.log"

    def run_folder(self, offer: Offer) -> Path:
        """Where all of an approved run is: another offer has another folder, whatever its name."""
        return self.root / "runs" / offer.sha256

    def model_folder(self, offer: Offer) -> Path:
        return self.root / "models" / offer.sha256

    def tls(self) -> ssl.SSLContext:
        """TLS 1.3 to the pinned authority's server, with this lab's certificate."""
        context = pinned_context(self.root / "ca.pem")
        context.load_cert_chain(self.root / "certificate.pem", self.root / "node.key")
        return context

    def node_key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key((self.root / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    # --- marks

    @property
    def paused(self) -> bool:
        return (self.root / "paused").is_file()

    def pause(self) -> None:
        write_atomically(self.root / "paused", _now())

    def resume(self) -> None:
        (self.root / "paused").unlink(missing_ok=True)

    @property
    def left(self) -> bool:
        return (self.root / "left").is_file()

    def leave(self) -> None:
        write_atomically(self.root / "left", _now())

    def say(self, text: str, *, online: bool, at: tuple[str, int]) -> None:
        """The daemon's one line: what it does or waits for. ``at``: the latest run and round."""
        kept = {
            "at": _now(),
            "text": text,
            "online": online,
            "pid": os.getpid(),
            "version": __version__,
            "run": at[0],
            "round": at[1],
        }
        write_atomically(self.root / "status.json", json.dumps(kept), durable=False)

    def said(self) -> Mapping[str, Any]:
        """The daemon's last line; empty where it never ran."""
        file = self.root / "status.json"
        return json.loads(file.read_text()) if file.is_file() else {}


def pinned_context(ca_file: Path) -> ssl.SSLContext:
    """TLS 1.3 that trusts one authority and nothing of the system."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca_file)
    return context


def http_client(
    context: ssl.SSLContext, *, proxy: str | None, connect_s: float, request_s: float
) -> httpx.Client:
    """An HTTPS client that goes where it is told: no proxy of the environment, no redirects."""
    return httpx.Client(
        transport=Connections(context, proxy=proxy, connect_s=connect_s, request_s=request_s),
        headers={"accept-encoding": "identity"},
        trust_env=False,
        follow_redirects=False,
    )


def join(
    invite: Invite,
    root: Path,
    *,
    data: Path,
    labels: str | None = None,
    patients: str | None = None,
    patients_declared: int | None = None,
    pool: str = "default",
    proxy: str | None = None,
) -> ClientDirectory:
    """Make the lab's keys, enrol them with the invite, and write the directory.

    Called again after a failure on the way it goes on with the keys that it made.
    Errors: InputError, RefusedError for an invite that is used up, VerificationError where the
    coordinator is not the one of the invite.
    """
    _check_new(root, data)
    refuse_unsaid_patients(data, patients)
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    root.chmod(0o700)
    write_atomically(root / "ca.pem", invite.ca_pem)
    if not (root / "client.yaml").is_file():
        text = fresh_yaml(
            data=data,
            labels=labels or fitting_map(data),
            patients=patients,
            patients_declared=patients_declared,
            pool=pool,
            proxy=proxy,
        )
        write_atomically(root / "client.yaml", text, mode=0o600)
    settings = load_settings(root / "client.yaml")
    request = _request(root, invite, settings)
    identity = Identity.from_bytes((root / "identity.key").read_bytes())
    EgressLog.create(root / "egress.log", identity)
    with EgressLog(root / "egress.log", identity) as egress:
        fields: dict[str, int | float | str | bytes] = {
            "token": invite.token,
            "identity": identity.public.to_bytes(),
            "csr": (root / "request.pem").read_bytes(),
            "declared_patients": settings.patients_declared or 0,
            "signature": b"\0" * 64,
        }
        egress.record(
            Outgoing(
                type="enrolment",
                destination=invite.address,
                fields=fields_of(fields),
                nbytes=len(request),
                sha256=hashlib.sha256(request).hexdigest(),
            )
        )
    answer = _post(f"https://{invite.address}/v1/enrol", request, root / "ca.pem", settings)
    _keep_answer(root, invite, request, answer)
    Ledger.create(settings.ledger)
    for sub in ("plans", "runs", "models"):
        (root / sub).mkdir(mode=0o700, exist_ok=True)
    return ClientDirectory.open(root)


def _check_new(root: Path, data: Path) -> None:
    if (root / "certificate.pem").exists():
        raise InputError(f"{root} has joined already", hint="choose another --dir")
    strangers = []
    if root.is_dir():
        own = {"identity.key", "node.key", "storage.key", "request.pem", "request.cbor", "ca.pem",
               "client.yaml", "egress.log", "egress.head"}  # fmt: skip
        strangers = [path.name for path in root.iterdir() if path.name not in own]
    if strangers:
        raise InputError(f"{root} is not empty", hint="choose another --dir")
    if not data.exists():
        raise InputError(f"no data at {data}", hint="--data: the folder with this lab's images")


def _request(root: Path, invite: Invite, settings: Settings) -> bytes:
    """The signed request; the very same when asked for again."""
    file = root / "request.cbor"
    if file.is_file():
        return file.read_bytes()
    identity = Identity.generate(invite.lab)
    key = ec.generate_private_key(ec.SECP384R1())
    request_pem = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, invite.lab)]))
        .sign(key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )
    node_key = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_atomically(root / "identity.key", identity.to_bytes(), mode=0o600)
    write_atomically(root / "node.key", node_key, mode=0o600)
    write_atomically(root / KEY_FILE, os.urandom(KEY_BYTES), mode=0o600)
    write_atomically(root / "request.pem", request_pem)
    body = wire.encode(
        {
            "declared_patients": settings.patients_declared or 0,
            "fingerprint": identity.public.fingerprint,
            "request": request_pem,
            "token": invite.token,
        }
    )
    signed = sign(identity, LABEL_ENROL, body)
    request = wire.encode([identity.public.to_bytes(), signed])
    write_atomically(file, request, mode=0o600)
    return request


def _post(url: str, body: bytes, ca_file: Path, settings: Settings) -> bytes:
    times = settings.timeouts
    client = http_client(
        pinned_context(ca_file),
        proxy=settings.proxy,
        connect_s=times.connect_s,
        request_s=_ENROL_S,
    )
    try:
        with client:
            response = client.post(url, content=body)
    except httpx.TransportError as error:
        raise CytofedError(
            f"the coordinator at {url} cannot be reached: {error}",
            hint="is it running? Does a firewall or proxy stand between? "
            "Set proxy in client.yaml and join again",
        ) from None
    if response.status_code == 200:
        return response.content
    if response.status_code == 429:
        raise CytofedError("the coordinator is asked too often", hint="try again in a minute")
    message, hint = _told(response)
    raise RefusedError(f"enrolment failed: {message}", hint=hint)


def _told(response: httpx.Response) -> tuple[str, str]:
    """Why the other side refuses, and a hint, if it says that in a form that is understood."""
    try:
        told = json.loads(response.content)
        error, hint = told["error"], told.get("hint", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        error, hint = f"HTTP {response.status_code}", ""
    return one_line(error, most=300), one_line(hint, most=300)


def _keep_answer(root: Path, invite: Invite, request: bytes, answer: bytes) -> None:
    """Check the coordinator's answer against the invite and write what it gave.

    The coordinator's keys are in the answer; their fingerprint is in the invite.
    """
    outer = wire.Fields.of(answer, "answer")
    claimed = wire.Fields.of(outer.raw("body"), "answer")
    coordinator = PublicIdentity.from_bytes(claimed.raw("coordinator"))
    if coordinator.fingerprint != invite.fingerprint or coordinator.name != COORDINATOR:
        raise VerificationError(
            f"the coordinator has fingerprint {coordinator.fingerprint[:16]}, the invite says "
            f"{invite.fingerprint[:16]}",
            hint="call the coordinator and compare; do not join before they are the same",
        )
    fields = wire.Fields.of(verify(answer, label=LABEL_ENROLLED, signer=coordinator), "answer")
    certificate, federation = fields.raw("certificate"), fields.text("federation")
    named, digest = fields.text("lab"), fields.raw("request")
    found = (federation, named, digest)
    if found != (invite.federation, invite.lab, hashlib.sha256(request).digest()):
        raise VerificationError("the coordinator's answer is to another request than this lab's")
    membership = {
        "federation": federation,
        "lab": named,
        "address": invite.address,
        "fingerprint": invite.fingerprint,
    }
    key = serialization.load_pem_private_key((root / "node.key").read_bytes(), None)
    certificate = certificate_of(key.public_key(), certificate)
    write_atomically(root / "coordinator.cbor", coordinator.to_bytes())
    write_atomically(root / "federation.json", json.dumps(membership, indent=1))
    write_atomically(root / "certificate.pem", certificate)  # last: says that the lab has joined
    (root / "request.cbor").unlink(missing_ok=True)  # holds the token


def certificate_of(key: object, pem: bytes) -> bytes:
    """The certificate (PEM) that somebody gave, and nothing else of what it lay in.

    Errors: VerificationError for what is none of this public key.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
        own = found.public_key() == key
    except Exception as error:  # ValueError, InvalidVersion, UnsupportedAlgorithm, and what comes
        raise VerificationError(f"no certificate was given: {error!s:.100}") from None
    if not own:
        raise VerificationError("the certificate that was given is of another key")
    return found.public_bytes(serialization.Encoding.PEM)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
