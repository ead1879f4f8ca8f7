"""Who signs and who can read: Ed25519 signatures, hybrid HPKE keys, fingerprints, signed documents.

Every lab and the coordinator own one :class:`Identity`; others know its :class:`PublicIdentity` and
pin the fingerprint. A signed document names its label and signer, and the signature covers both, so
that a document of one kind can never pass for another.

Sources: Ed25519, RFC 8032; HPKE, RFC 9180, with ML-KEM-768 + X25519 (X-Wing).

::

    VerificationError
    `- SignatureError        not signed by this key, for this purpose, over these bytes
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
)

from cytofed.errors import InputError, VerificationError
from cytofed.privacy import wire

Entropy = Callable[[int], bytes]  # n -> n unpredictable bytes; os.urandom outside tests

SIGNATURE_BYTES = 64
_ED25519_BYTES, _MLKEM_BYTES, _X25519_BYTES = 32, 1184, 32
_MLKEM_SEED_BYTES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIGNED = "cytofed/1/signed"
_FINGERPRINT = "cytofed/1/fingerprint"


class SignatureError(VerificationError):
    """A document that this signer did not sign for this purpose."""


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a lab or of the coordinator: name, signature key, HPKE key (raw bytes).

    Raises InputError for a name or key that cannot be used.
    """

    name: str
    signing: bytes = field(repr=False)  # Ed25519, 32 bytes
    sealing: bytes = field(repr=False)  # ML-KEM-768 (1184 bytes), then X25519 (32 bytes)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r} is not a name",
                hint="use up to 64 letters, digits, dots, dashes and underscores",
            )
        try:
            Ed25519PublicKey.from_public_bytes(self.signing)
            self.hpke_key()
        except ValueError as error:
            raise InputError(f"{self.name}: public key cannot be read: {error}") from error

    def hpke_key(self) -> MLKEM768X25519PublicKey:
        return self._hpke_key

    @cached_property
    def _hpke_key(self) -> MLKEM768X25519PublicKey:
        if len(self.sealing) != _MLKEM_BYTES + _X25519_BYTES:
            raise ValueError(f"HPKE key has {len(self.sealing)} bytes, expected 1216")
        return MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(self.sealing[:_MLKEM_BYTES]),
            X25519PublicKey.from_public_bytes(self.sealing[_MLKEM_BYTES:]),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name and both keys, in hex: what a lab pins and what people compare."""
        return hashlib.sha256(
            wire.encode([_FINGERPRINT, self.name, self.signing, self.sealing])
        ).hexdigest()

    def to_bytes(self) -> bytes:
        return wire.encode({"name": self.name, "sealing": self.sealing, "signing": self.signing})

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicIdentity:
        fields = wire.Fields.of(data, "public identity", limit=1 << 12)
        public = cls(
            name=fields.text("name"),
            signing=fields.raw("signing", _ED25519_BYTES),
            sealing=fields.raw("sealing", _MLKEM_BYTES + _X25519_BYTES),
        )
        fields.end()
        return public


@dataclass(frozen=True, repr=False, eq=False)
class Identity:
    """The secret half: kept in a 0600 file, never printed."""

    public: PublicIdentity
    _signing: Ed25519PrivateKey
    _mlkem: MLKEM768PrivateKey
    _x25519: X25519PrivateKey

    @property
    def name(self) -> str:
        return self.public.name

    def __repr__(self) -> str:
        return f"Identity({self.name!r}, fingerprint={self.public.fingerprint[:16]!r})"

    @classmethod
    def generate(cls, name: str, *, entropy: Entropy = os.urandom) -> Identity:
        """A new identity. ``entropy`` is the operating system's generator outside tests."""
        return cls._of(name, entropy(_ED25519_BYTES + _MLKEM_SEED_BYTES + _X25519_BYTES))

    @classmethod
    def _of(cls, name: str, seeds: bytes) -> Identity:
        signing = Ed25519PrivateKey.from_private_bytes(seeds[:32])
        mlkem = MLKEM768PrivateKey.from_seed_bytes(seeds[32:96])
        x25519 = X25519PrivateKey.from_private_bytes(seeds[96:128])
        public = PublicIdentity(
            name=name,
            signing=signing.public_key().public_bytes_raw(),
            sealing=mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw(),
        )
        return cls(public, signing, mlkem, x25519)

    def to_bytes(self) -> bytes:
        """The secret keys: for a 0600 file, nothing else."""
        seeds = (
            self._signing.private_bytes_raw()
            + self._mlkem.private_bytes_raw()
            + self._x25519.private_bytes_raw()
        )
        return wire.encode({"name": self.name, "secret": seeds, "version": 1})

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        fields = wire.Fields.of(data, "identity", limit=1 << 12)
        name, seeds, version = (
            fields.text("name"),
            fields.raw("secret", 128),
            fields.uint("version"),
        )
        fields.end()
        if version != 1:
            raise InputError(f"identity file of version {version}, expected 1")
        return cls._of(name, seeds)

    def signature(self, message: bytes) -> bytes:
        """Raw Ed25519 signature; callers prefix ``message`` with a label of their own."""
        return self._signing.sign(message)

    def hpke_key(self) -> MLKEM768X25519PrivateKey:
        return MLKEM768X25519PrivateKey(self._mlkem, self._x25519)


def check_signature(public: PublicIdentity, signature: bytes, message: bytes, what: str) -> None:
    """Raise :class:`SignatureError` unless ``public`` signed ``message``; ``what`` names it."""
    try:
        Ed25519PublicKey.from_public_bytes(public.signing).verify(signature, message)
    except InvalidSignature as error:
        raise SignatureError(  # guard: signature
            f"{what} is not signed by {public.name} ({public.fingerprint[:16]})"
        ) from error


def sign(identity: Identity, label: str, body: bytes) -> bytes:
    """A signed document: label, signer, body and a signature over all three."""
    signature = identity.signature(wire.encode([_SIGNED, label, identity.name, body]))
    return wire.encode(
        {"body": body, "label": label, "signature": signature, "signer": identity.name}
    )


def verify(document: bytes, *, label: str, signer: PublicIdentity) -> bytes:
    """The body of a signed document.

    Raises :class:`SignatureError` for another label, signer or body than was signed, and
    :class:`~cytofed.privacy.wire.MalformedMessage` for bytes that are no signed document.
    """
    fields = wire.Fields.of(document, "signed document")
    body, found, name = fields.raw("body"), fields.text("label"), fields.text("signer")
    signature = fields.raw("signature", SIGNATURE_BYTES)
    fields.end()
    if found != label:  # guard: label
        raise SignatureError(f"document is a {found!r}, expected a {label!r}")
    if name != signer.name:  # guard: signer
        raise SignatureError(f"document is by {name!r}, expected {signer.name!r}")
    message = wire.encode([_SIGNED, found, name, body])
    check_signature(signer, signature, message, f"document {label!r}")
    return body
