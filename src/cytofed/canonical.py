"""One value, one encoding: the bytes below every hash and signature.

Deterministic CBOR (RFC 8949, section 4.2), cut down to unsigned integers, byte strings, text,
arrays and maps with text keys. ``cytofed.privacy.wire`` reads it back. Whatever is hashed over more
than one thing goes through here: joined text lets two different lists be one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

Value = int | bytes | str | Sequence["Value"] | Mapping[str, "Value"]

UINT, BYTES, TEXT, ARRAY, MAP = 0, 2, 3, 4, 5
MAX_UINT = (1 << 64) - 1


def encode(value: Value) -> bytes:
    """``value`` as deterministic CBOR. Raises TypeError for what has no canonical form here."""
    out = bytearray()
    _write(out, value)
    return bytes(out)


def digest(label: str, *parts: Value) -> bytes:
    """SHA-256 over a label and values in canonical form: one meaning, one hash."""
    return hashlib.sha256(encode([label, *parts])).digest()


def _write(out: bytearray, value: Value) -> None:
    if isinstance(value, bool):
        raise TypeError("bool has no canonical encoding here: use 0 or 1")
    if isinstance(value, int):
        _write_head(out, UINT, value)
    elif isinstance(value, bytes | bytearray | memoryview):
        _write_head(out, BYTES, len(value))
        out += value
    elif isinstance(value, str):
        text = value.encode()
        _write_head(out, TEXT, len(text))
        out += text
    elif isinstance(value, Mapping):
        _write_head(out, MAP, len(value))
        for key, item in sorted((encode(key), item) for key, item in value.items()):
            out += key
            _write(out, item)
    elif isinstance(value, Sequence):
        _write_head(out, ARRAY, len(value))
        for item in value:
            _write(out, item)
    else:
        raise TypeError(f"{type(value).__name__} has no canonical encoding here")


def _write_head(out: bytearray, major: int, number: int) -> None:
    if not 0 <= number <= MAX_UINT:
        raise TypeError(f"{number} is not an unsigned 64-bit integer")
    if number < 24:
        out.append(major << 5 | number)
        return
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            out.append(major << 5 | code)
            out += number.to_bytes(size, "big")
            return
