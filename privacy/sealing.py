"""Sealed messages: readable by one receiver, in one place of one run, or not at all.

A fresh content key encrypts the payload with AES-256-GCM in 1 MiB chunks, nonce = counter || last
flag (STREAM: Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015; as in age). HPKE (RFC 9180,
ML-KEM-768 + X25519) wraps the content key for the receiver, the sender's Ed25519 signature covers
header, wrap and every chunk's tag. The :class:`Context` (federation, run, plan, roster, round,
slot, sender, receiver, direction, content) is in the header, in the wrap's ``info`` and in each
chunk's associated data; the receiver states the context it expects.

Layout, all numbers big-endian::

    prefix = "CYTOSEAL" | version u16 | header length u32 | header (CBOR) | wrap 1168 | signature 64
    body   = chunks of 1 MiB ciphertext + 16 bytes tag; the last may be shorter, and empty

One payload for many receivers (:func:`seal_for_all`) is encrypted once: one body, one prefix each.
All receivers then share the content key, and a GCM tag binds nobody who knows the key. The header
of such a message therefore carries the payload's SHA-256, so that no receiver can pass another
payload on as the sender's.

Guarantees: :func:`unseal` returns a payload whose every byte was signed by this sender for this
receiver and context, or raises and returns nothing. Memory: the payload once more, and 1 MiB.

::

    VerificationError
    `- SealError             nothing was released
       |- NotSealed          no sealed message at all, or cut or grown
       |- WrongVersion       another version than 1: no downgrade
       |- TooLarge           header or payload over the limit
       |- WrongContext       another run, round, slot, sender, receiver ...: names the field
       `- Tampered           signature, wrap, chunk or payload hash does not hold
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from cytofed.arrays import in_shares
from cytofed.errors import InputError, VerificationError
from cytofed.privacy import wire
from cytofed.privacy.identity import (
    SIGNATURE_BYTES,
    Identity,
    PublicIdentity,
    SignatureError,
    check_signature,
)

VERSION = 1
CHUNK_BYTES = 1 << 20
TAG_BYTES = 16
KEY_BYTES = 32
MAX_HEADER_BYTES = 1 << 22  # the manifest of a model with thousands of arrays fits
MAX_PAYLOAD_BYTES = 1 << 32

_MAGIC = b"CYTOSEAL"
_FIXED_BYTES = len(_MAGIC) + 2 + 4
_WRAP_BYTES = 1136 + KEY_BYTES  # ML-KEM ciphertext 1088, X25519 share 32, tag 16, the key
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_WRAP_LABEL = b"cytofed/1/seal/wrap"
_CHUNK_LABEL = b"cytofed/1/seal/chunk"
_SIGN_LABEL = b"cytofed/1/seal/signature"
_CHUNKS_A_SHARE = 8  # that one thread encrypts
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


Payload = bytes | memoryview | Sequence[memoryview]
"""What is sealed: bytes in one piece or in several, one after the other."""


class SealError(VerificationError):
    """A sealed message is not what the receiver expects; nothing of it was released."""


class NotSealed(SealError):
    """Not a sealed message, or one that was cut or grown."""


class WrongVersion(SealError):
    """A version that this code does not speak. There is no fallback."""


class TooLarge(SealError):
    """A header or payload beyond the limit: refused before memory is taken."""


class WrongContext(SealError):
    """A message for another place: replayed, reflected, reordered or misdirected."""


class Tampered(SealError):
    """A signature, key wrap, chunk or payload hash that does not hold."""


class Direction(StrEnum):
    """Which way a message goes, so that none can be reflected."""

    TO_LAB = "to-lab"
    TO_COORDINATOR = "to-coordinator"
    LAB_TO_LAB = "lab-to-lab"


@dataclass(frozen=True)
class Context:
    """The one place where a message is valid. Hashes are lower-case hex."""

    federation: str
    run: str
    plan_sha256: str
    roster_sha256: str
    round: int
    slot: int
    sender: str
    receiver: str
    direction: Direction
    content: str  # what the payload is, such as "update" or "weights"

    def __post_init__(self) -> None:
        for name in ("plan_sha256", "roster_sha256"):
            check_sha256(name, getattr(self, name))

    def _values(self) -> dict[str, wire.Value]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Sealed:
    """A sealed message as it travels: a short prefix for one receiver and the encrypted body."""

    prefix: bytes
    body: memoryview = field(repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.prefix) + len(self.body)

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the message in one piece, found once."""
        digest = hashlib.sha256(self.prefix)
        digest.update(self.body)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Prefix and body in one piece (copies)."""
        return b"".join((self.prefix, self.body))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Sealed:
        """Cut one piece in two, without a copy of the body."""
        view = memoryview(data)
        end = _FIXED_BYTES + _header_length(view) + _WRAP_BYTES + SIGNATURE_BYTES
        if end > len(view):
            raise NotSealed(f"sealed message ends after {len(view)} bytes, its prefix takes {end}")
        return cls(bytes(view[:end]), view[end:])


@dataclass(frozen=True)
class Unsealed:
    """What a receiver gets once everything holds. ``payload_sha256`` is empty for one receiver."""

    payload: memoryview = field(repr=False)
    manifest: bytes = field(repr=False)
    payload_sha256: str


@dataclass(frozen=True)
class _Header:
    context: Context
    size: int
    manifest: bytes
    payload_sha256: str

    def to_bytes(self) -> bytes:
        return wire.encode(
            {
                "context": self.context._values(),
                "manifest": self.manifest,
                "payload_sha256": self.payload_sha256,
                "size": self.size,
            }
        )

    @classmethod
    def from_bytes(cls, data: memoryview) -> _Header:
        top = wire.Fields.of(data, "header", limit=MAX_HEADER_BYTES)
        inner = top.inner("context")
        try:
            context = Context(
                federation=inner.text("federation"),
                run=inner.text("run"),
                plan_sha256=inner.text("plan_sha256"),
                roster_sha256=inner.text("roster_sha256"),
                round=inner.uint("round"),
                slot=inner.uint("slot"),
                sender=inner.text("sender"),
                receiver=inner.text("receiver"),
                direction=Direction(inner.text("direction")),
                content=inner.text("content"),
            )
        except (ValueError, InputError) as error:
            raise wire.MalformedMessage(f"header: {error}") from error
        header = cls(context, top.uint("size"), top.raw("manifest"), top.text("payload_sha256"))
        inner.end()
        top.end()
        return header


def check_sha256(name: str, value: str) -> None:
    """Raise InputError unless ``value`` is 64 lower-case hex digits."""
    if not _HEX_SHA256.fullmatch(value):
        raise InputError(f"{name}={value!r} is not a SHA-256 in lower-case hex")


def seal(
    payload: Payload,
    context: Context,
    *,
    sender: Identity,
    receiver: PublicIdentity,
    manifest: bytes = b"",
) -> Sealed:
    """Encrypt ``payload`` for ``receiver`` and sign it as ``sender``.

    ``manifest`` is signed with it but readable by anyone: names, shapes, dtypes, hashes.
    """
    pieces = _pieces(payload)
    header = _Header(context, sum(map(len, pieces)), manifest, "")
    key = os.urandom(KEY_BYTES)
    body = _encrypt(pieces, key, header)
    return Sealed(_prefix(header, key, body, sender, receiver), body)


def seal_for_all(
    payload: Payload,
    context: Context,
    *,
    sender: Identity,
    receivers: Iterable[PublicIdentity],
    manifest: bytes = b"",
) -> Mapping[str, Sealed]:
    """Encrypt ``payload`` once for many receivers; the bodies are one and the same object.

    ``context.receiver`` is replaced by each receiver's name.
    """
    pieces = _pieces(payload)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    header = _Header(context, sum(map(len, pieces)), manifest, digest.hexdigest())
    key = os.urandom(KEY_BYTES)
    body = _encrypt(pieces, key, header)
    sealed = {}
    for receiver in receivers:
        own = replace(header, context=replace(context, receiver=receiver.name))
        sealed[receiver.name] = Sealed(_prefix(own, key, body, sender, receiver), body)
    return sealed


def check_seal(
    sealed: Sealed, expected: Context, *, sender: PublicIdentity, receiver: PublicIdentity
) -> bytes:
    """Verify a message that is passed on unread; returns its manifest.

    Raises a :class:`SealError` as :func:`unseal` does, save for what only the receiver can see.
    """
    return _check(sealed, expected, sender, receiver, MAX_PAYLOAD_BYTES)[0].manifest


def unseal(
    sealed: Sealed,
    expected: Context,
    *,
    sender: PublicIdentity,
    receiver: Identity,
    max_bytes: int = MAX_PAYLOAD_BYTES,
    in_place: bool = False,
) -> Unsealed:
    """The payload of a message that this ``sender`` sealed for exactly the ``expected`` place.

    ``in_place``: the payload is written over the sealed body (writable, and lost by it), which
    saves memory of its size. Raises the :class:`SealError` that says what does not hold; then
    nothing was released.
    """
    header, wrap, info = _check(sealed, expected, sender, receiver.public, max_bytes)
    try:
        key = _SUITE.decrypt(wrap, receiver.hpke_key(), info=info)
    except InvalidTag as error:
        raise Tampered(  # guard: key-wrap
            f"{_place(expected)}: the content key does not open with this receiver's key"
        ) from error
    payload = sealed.body[: header.size] if in_place else np.empty(header.size, np.uint8).data
    cipher = AESGCM(key)
    data = _chunk_data(header)
    for index, start, end, last in _chunks(header.size):
        at = start + index * TAG_BYTES
        chunk = sealed.body[at : at + end - start + TAG_BYTES]
        # A cipher works on the very same bytes or on others, not on half of them.
        plain = chunk[: end - start] if in_place else payload[start:end]
        try:
            cipher.decrypt_into(_nonce(index, last), chunk, data, plain)
        except InvalidTag as error:
            place = _place(expected)
            raise Tampered(f"{place}: chunk {index} was altered") from error  # guard: chunk
        if in_place and index:
            payload[start:end] = plain  # over the tags; memoryviews may overlap
    if header.payload_sha256:
        digest = hashlib.sha256(payload).hexdigest()
        if digest != header.payload_sha256:  # guard: payload-hash
            raise Tampered(
                f"{_place(expected)}: payload has SHA-256 {digest[:16]}…, the sender signed "
                f"{header.payload_sha256[:16]}…"
            )
    return Unsealed(payload, header.manifest, header.payload_sha256)


def _pieces(payload: Payload) -> list[memoryview]:
    several = [payload] if isinstance(payload, bytes | memoryview) else payload
    return [memoryview(piece).cast("B") for piece in several if len(piece)]


def _in_chunks(pieces: list[memoryview], size: int) -> Iterator[memoryview]:
    """The chunks of a payload in pieces; only a chunk that lies in several is copied."""
    left = list(reversed(pieces))
    for _, start, end, _ in _chunks(size):
        found = []
        need = end - start
        while need:
            piece = left.pop()
            found.append(piece[:need])
            if len(piece) > need:
                left.append(piece[need:])
            need -= len(found[-1])
        yield found[0] if len(found) == 1 else memoryview(b"".join(found))


def _encrypt(pieces: list[memoryview], key: bytes, header: _Header) -> memoryview:
    body = np.empty(_body_bytes(header.size), np.uint8).data
    cipher = AESGCM(key)
    data = _chunk_data(header)
    chunks = list(zip(_chunks(header.size), _in_chunks(pieces, header.size), strict=True))

    def encrypt_some(share: slice) -> None:
        for (index, start, end, last), plain in chunks[share]:
            at = start + index * TAG_BYTES
            out = body[at : at + end - start + TAG_BYTES]
            cipher.encrypt_into(_nonce(index, last), plain, data, out)

    in_shares(encrypt_some, len(chunks), share=_CHUNKS_A_SHARE)
    return body.toreadonly()


def _prefix(
    header: _Header, key: bytes, body: memoryview, sender: Identity, receiver: PublicIdentity
) -> bytes:
    names = (sender.name, receiver.name)
    if names != (header.context.sender, header.context.receiver):
        raise InputError(
            f"context names {header.context.sender} -> {header.context.receiver}, "
            f"the keys are those of {sender.name} -> {receiver.name}"
        )
    encoded = header.to_bytes()
    if len(encoded) > MAX_HEADER_BYTES or header.size > MAX_PAYLOAD_BYTES:
        raise InputError(
            f"header of {len(encoded)} and payload of {header.size} bytes: at most "
            f"{MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}"
        )
    start = _MAGIC + VERSION.to_bytes(2, "big") + len(encoded).to_bytes(4, "big") + encoded
    info = _wrap_info(start, sender.public, receiver)
    start += _SUITE.encrypt(key, receiver.hpke_key(), info=info)
    return start + sender.signature(_signed(start, header.size, body))


def _check(
    sealed: Sealed,
    expected: Context,
    sender: PublicIdentity,
    receiver: PublicIdentity,
    max_bytes: int,
) -> tuple[_Header, bytes, bytes]:
    """Everything that can be known without the content key: header, wrap and HPKE info."""
    prefix = memoryview(sealed.prefix)
    header_end = _FIXED_BYTES + _header_length(prefix)
    if len(prefix) != header_end + _WRAP_BYTES + SIGNATURE_BYTES:  # guard: prefix-length
        raise NotSealed(f"prefix of {len(prefix)} bytes, its header asks for another length")
    try:
        header = _Header.from_bytes(prefix[_FIXED_BYTES:header_end])
    except wire.MalformedMessage as error:
        raise NotSealed(error.message) from error
    if header.size > max_bytes:  # guard: payload-size
        raise TooLarge(f"payload of {header.size} bytes, expected at most {max_bytes}")
    if len(sealed.body) != _body_bytes(header.size):  # guard: body-length
        raise NotSealed(
            f"body of {len(sealed.body)} bytes, a payload of {header.size} takes "
            f"{_body_bytes(header.size)}: cut or grown on its way"
        )
    for item in fields(Context):
        found, wanted = getattr(header.context, item.name), getattr(expected, item.name)
        if found != wanted:  # guard: context
            raise WrongContext(
                f"message with {item.name} {str(found)[:64]!r}, expected {str(wanted)[:64]!r}"
            )
    start = prefix[: header_end + _WRAP_BYTES]
    try:
        check_signature(
            sender,
            bytes(prefix[header_end + _WRAP_BYTES :]),
            _signed(start, header.size, sealed.body),
            _place(expected),
        )
    except SignatureError as error:
        raise Tampered(error.message) from error  # guard: seal-signature
    info = _wrap_info(prefix[:header_end], sender, receiver)
    return header, bytes(prefix[header_end : header_end + _WRAP_BYTES]), info


def _header_length(prefix: memoryview) -> int:
    if len(prefix) < _FIXED_BYTES or prefix[: len(_MAGIC)] != _MAGIC:
        raise NotSealed("not a sealed message: it does not start with CYTOSEAL")
    version = int.from_bytes(prefix[len(_MAGIC) : len(_MAGIC) + 2], "big")
    if version != VERSION:  # guard: version
        raise WrongVersion(f"sealed message of version {version}, expected {VERSION}")
    length = int.from_bytes(prefix[len(_MAGIC) + 2 : _FIXED_BYTES], "big")
    if length > MAX_HEADER_BYTES:  # guard: header-size
        raise TooLarge(f"header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    return length


def _wrap_info(
    start: bytes | memoryview, sender: PublicIdentity, receiver: PublicIdentity
) -> bytes:
    digest = hashlib.sha256(start).digest()
    keys = bytes.fromhex(sender.fingerprint) + bytes.fromhex(receiver.fingerprint)
    return _WRAP_LABEL + digest + keys


def _signed(start: bytes | memoryview, size: int, body: memoryview) -> bytes:
    tags = hashlib.sha256()
    for index, _, end, _ in _chunks(size):
        at = end + index * TAG_BYTES
        tags.update(body[at : at + TAG_BYTES])
    return _SIGN_LABEL + hashlib.sha256(start).digest() + tags.digest()


def _chunk_data(header: _Header) -> bytes:
    # Without the receiver: the body is the same for all receivers of one payload.
    common = replace(header, context=replace(header.context, receiver=""))
    return _CHUNK_LABEL + VERSION.to_bytes(2, "big") + hashlib.sha256(common.to_bytes()).digest()


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])


def _chunks(size: int) -> Iterable[tuple[int, int, int, bool]]:
    """Index, start, end and last flag of each chunk; an empty payload is one empty chunk."""
    count = max(1, -(-size // CHUNK_BYTES))
    for index in range(count):
        start = index * CHUNK_BYTES
        yield index, start, min(size, start + CHUNK_BYTES), index == count - 1


def _body_bytes(size: int) -> int:
    return size + TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


def _place(context: Context) -> str:
    return (
        f"{context.content!r} of {context.sender} for {context.receiver}, "
        f"round {context.round}, slot {context.slot}"
    )
