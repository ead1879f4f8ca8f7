"""Canonical bytes for everything that is signed or sent: one value, one encoding, no pickle.

Messages are deterministic CBOR (RFC 8949, section 4.2) cut down to unsigned integers, byte strings,
text, arrays and maps with text keys. Any CBOR reader can read them; this one refuses every other
encoding of the same value, so that a signature covers exactly one meaning. Every length is checked
against the bytes at hand before anything is allocated.

Arrays travel as one flat run of bytes and a :class:`Manifest` (names, shapes, dtypes) that is
signed with the message they belong to.

::

    VerificationError
    `- MalformedMessage      not canonical, not the expected fields, or over a size limit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cytofed import canonical
from cytofed.arrays import is_shape
from cytofed.canonical import ARRAY, BYTES, MAP, TEXT, UINT
from cytofed.errors import VerificationError

Value: TypeAlias = canonical.Value
encode = canonical.encode

MAX_DEPTH = 6
MAX_MESSAGE_BYTES = 1 << 24  # far above any control message; tensors have their own limit
MAX_ITEMS = 1 << 18  # bounds what a message of many tiny items takes in memory
MAX_NAME_CHARS = 256
MAX_ARRAYS = 10_000
DTYPES = ("<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8")


class MalformedMessage(VerificationError):
    """Bytes that are not the canonical encoding of the message they claim to be."""


def decode(data: bytes | memoryview, *, limit: int = MAX_MESSAGE_BYTES) -> Any:
    """The value of canonical bytes; maps become dict, arrays list.

    Raises :class:`MalformedMessage` for anything that :func:`encode` would not have written, and
    for more than ``limit`` bytes.
    """
    if len(data) > limit:  # guard: message-size
        raise MalformedMessage(f"message of {len(data)} bytes, expected at most {limit}")
    view = memoryview(data)
    value, end = _read(view, 0, 0, [MAX_ITEMS])
    if end != len(view):  # guard: trailing-bytes
        raise MalformedMessage(f"{len(view) - end} bytes after the end of the message")
    return value


def _read(view: memoryview, at: int, depth: int, budget: list[int]) -> tuple[Any, int]:
    major, number, at = _read_head(view, at)
    if major == UINT:
        return number, at
    if major in (BYTES, TEXT):
        raw = _take(view, at, number)
        if major == BYTES:
            return bytes(raw), at + number
        try:
            return str(raw, "utf-8"), at + number
        except UnicodeDecodeError as error:
            raise MalformedMessage(f"text at byte {at} is not UTF-8") from error
    if depth >= MAX_DEPTH:  # guard: nesting
        raise MalformedMessage(f"nested deeper than {MAX_DEPTH} levels")
    # Each item takes at least a byte: a false count is caught before anything is built.
    if number > len(view) - at:  # guard: item-count
        raise MalformedMessage(f"{number} items announced, {len(view) - at} bytes left")
    budget[0] -= number
    if budget[0] < 0:  # guard: item-budget
        raise MalformedMessage(f"more than {MAX_ITEMS} items in one message")
    if major == ARRAY:
        items = []
        for _ in range(number):
            item, at = _read(view, at, depth + 1, budget)
            items.append(item)
        return items, at
    fields: dict[str, Any] = {}
    previous = b""
    for _ in range(number):
        start = at
        key, at = _read(view, at, depth + 1, budget)
        if not isinstance(key, str):
            raise MalformedMessage(f"map key at byte {start} is not text")
        encoded = bytes(view[start:at])
        if encoded <= previous:  # guard: key-order
            raise MalformedMessage(f"map key {key!r} is repeated or out of order")
        previous = encoded
        fields[key], at = _read(view, at, depth + 1, budget)
    return fields, at


def _read_head(view: memoryview, at: int) -> tuple[int, int, int]:
    first = _take(view, at, 1)[0]
    major, code = first >> 5, first & 31
    if major not in (UINT, BYTES, TEXT, ARRAY, MAP) or code > 27:
        raise MalformedMessage(f"byte {at} starts an item of an unknown kind (0x{first:02x})")
    if code < 24:
        return major, code, at + 1
    size = 1 << code - 24
    number = int.from_bytes(_take(view, at + 1, size), "big")
    if number < (24 if size == 1 else 1 << 4 * size):  # guard: shortest-number
        raise MalformedMessage(f"number at byte {at} is not in its shortest form")
    return major, number, at + 1 + size


def _take(view: memoryview, at: int, size: int) -> memoryview:
    if size > len(view) - at:  # guard: announced-length
        raise MalformedMessage(f"{size} bytes announced at byte {at}, {len(view) - at} left")
    return view[at : at + size]


class Fields:
    """Typed access to one decoded map: every field is asked for once, and none may be left over."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise MalformedMessage(f"{what} is not a map of fields")
        self._left = dict(value)
        self._what = what

    @classmethod
    def of(cls, data: bytes | memoryview, what: str, *, limit: int = MAX_MESSAGE_BYTES) -> Fields:
        """The fields of canonical bytes; ``what`` names the message in errors."""
        try:
            return cls(decode(data, limit=limit), what)
        except MalformedMessage as error:
            raise MalformedMessage(f"{what}: {error.message}") from error

    def _pop(self, name: str, kind: type) -> Any:
        value = self._left.pop(name, None)
        if not isinstance(value, kind):
            raise MalformedMessage(f"{self._what}: field {name!r} is not {kind.__name__}")
        return value

    def uint(self, name: str) -> int:
        return int(self._pop(name, int))

    def text(self, name: str) -> str:
        value = str(self._pop(name, str))
        if len(value) > MAX_NAME_CHARS:
            raise MalformedMessage(f"{self._what}: field {name!r} has {len(value)} characters")
        return value

    def raw(self, name: str, size: int | None = None) -> bytes:
        value = bytes(self._pop(name, bytes))
        if size is not None and len(value) != size:  # guard: field-size
            raise MalformedMessage(
                f"{self._what}: field {name!r} has {len(value)} bytes, expected {size}"
            )
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, ascending and without repeats."""
        values = self._pop(name, list)
        if not all(isinstance(value, str) and len(value) <= MAX_NAME_CHARS for value in values):
            raise MalformedMessage(f"{self._what}: field {name!r} is not a list of names")
        if any(a >= b for a, b in pairwise(values)):  # guard: name-order
            raise MalformedMessage(f"{self._what}: field {name!r} is repeated or out of order")
        return tuple(values)

    def blobs(self, name: str) -> dict[str, bytes]:
        """A map from names to byte strings."""
        values = self._pop(name, dict)
        if not all(isinstance(value, bytes) for value in values.values()):
            raise MalformedMessage(f"{self._what}: field {name!r} holds something else than bytes")
        if any(len(key) > MAX_NAME_CHARS for key in values):  # guard: name-length
            raise MalformedMessage(f"{self._what}: field {name!r} has an endless name")
        return dict(values)

    def inner(self, name: str) -> Fields:
        return Fields(self._pop(name, dict), f"{self._what}.{name}")

    def items(self, name: str) -> list[Any]:
        return list(self._pop(name, list))

    def end(self) -> None:
        """Raise if a field was not asked for: unknown fields are not ignored."""
        if self._left:  # guard: unknown-fields
            raise MalformedMessage(f"{self._what}: unknown fields {sorted(self._left)}")


@dataclass(frozen=True)
class Entry:
    """One array: its name, shape and little-endian dtype string."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """What a payload holds, in order: its size is known before anything is allocated.

    (:class:`cytofed.arrays.Manifest` says which tensors lie in the one vector of weights; this one
    is about the bytes of a message.)
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if len(self.entries) > MAX_ARRAYS:
            raise MalformedMessage(f"manifest of {len(self.entries)} arrays, at most {MAX_ARRAYS}")
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise MalformedMessage("manifest names an array twice")
        for entry in self.entries:
            if entry.dtype not in DTYPES:
                raise MalformedMessage(
                    f"array {entry.name!r:.80} has the unknown dtype {entry.dtype!r:.20}"
                )
            if not is_shape(entry.shape, np.dtype(entry.dtype)):  # guard: array-shape
                raise MalformedMessage(f"array {entry.name!r:.80} has an absurd shape")

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def to_bytes(self) -> bytes:
        return encode([[entry.name, list(entry.shape), entry.dtype] for entry in self.entries])

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        entries = []
        rows = decode(data)
        if not isinstance(rows, list):
            raise MalformedMessage("manifest is not a list of arrays")
        for row in rows:
            match row:
                case [str(name), list(shape), str(dtype)] if all(type(n) is int for n in shape):
                    entries.append(Entry(name, tuple(shape), dtype))
                case _:
                    raise MalformedMessage("manifest row is not name, shape, dtype")
        return cls(tuple(entries))


def pack(arrays: Mapping[str, NDArray[Any]]) -> tuple[Manifest, NDArray[np.uint8]]:
    """All arrays as one flat run of bytes, and the manifest that reads it back."""
    manifest = manifest_of(arrays)
    flat = np.empty(manifest.nbytes, np.uint8)
    at = 0
    for entry, array in zip(manifest.entries, arrays.values(), strict=True):
        if entry.nbytes:
            flat[at : at + entry.nbytes].view(entry.dtype)[:] = array.reshape(-1)
        at += entry.nbytes
    return manifest, flat


def manifest_of(arrays: Mapping[str, NDArray[Any]]) -> Manifest:
    """What the arrays are, in their order, little-endian."""
    entries = []
    for name, array in arrays.items():
        little = array.dtype.newbyteorder("<")
        entries.append(Entry(name, tuple(array.shape), little.str))
    return Manifest(tuple(entries))


def pieces(arrays: Mapping[str, NDArray[Any]]) -> list[memoryview]:
    """The bytes that ``pack`` makes one run of, array by array where they lie (no copy, where
    they lie in order)."""
    found = []
    for array in arrays.values():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        found.append(little.reshape(-1).view(np.uint8).data)
    return found


def unpack(manifest: Manifest, payload: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """Views into ``payload`` by name; nothing is copied.

    Raises :class:`MalformedMessage` when the payload's size is not the manifest's.
    """
    view = memoryview(payload).cast("B")
    if manifest.nbytes != len(view):  # guard: manifest-size
        raise MalformedMessage(f"payload of {len(view)} bytes, manifest says {manifest.nbytes}")
    arrays: dict[str, NDArray[Any]] = {}
    at = 0
    for entry in manifest.entries:
        count = math.prod(entry.shape)
        flat = np.frombuffer(view[at : at + entry.nbytes], entry.dtype, count)
        arrays[entry.name] = flat.reshape(entry.shape)
        at += entry.nbytes
    return arrays
