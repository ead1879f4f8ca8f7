"""A request's body as it comes: one long field of it goes to a file, the others to memory.

Protobuf's own reading wants a body whole, and copies it twice. Here memory is for a chunk of each
body that is on its way, however many labs send at once and however slowly, and a content that came
has its SHA-256 already.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cytofed.messages import BadMessage
from cytofed.objects import LONG, read_varint

_OTHERS_BYTES = 1 << 12
"""most bytes of all fields but the long one"""

_START_BYTES = 64


@dataclass(frozen=True)
class Spooled:
    """A content in a file of its own. ``start``: its first bytes."""

    path: Path
    size: int
    sha256: str
    start: bytes = field(repr=False)

    def __len__(self) -> int:
        return self.size


class Arriving:
    """A body that arrives in chunks. ``field``: the number of its long field.

    The long field goes to a file in ``folder`` from ``file_from`` bytes on. As a context it removes
    the file at the end, if it is there still.
    """

    def __init__(self, number: int, folder: Path, *, file_from: int) -> None:
        self._tag, self._folder, self._file_from = number << 3 | LONG, folder, file_from
        self._others, self._pending = bytearray(), b""
        self._size, self._left = -1, 0
        self._start, self._digest = bytearray(), hashlib.sha256()
        self._content = bytearray()
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body. Errors: BadMessage for what is no such body."""
        data = memoryview(self._pending + chunk if self._pending else chunk)
        data = self._take(data)
        at = 0
        while at < len(data):
            start = at
            tag, at = read_varint(data, at)
            size = 0
            if tag & 7 == LONG:
                size, at = read_varint(data, at)
            elif tag & 7 == 0:
                _, at = read_varint(data, at)
            else:
                raise BadMessage("a kind of field that no such request has")
            if at < 0 or (tag != self._tag and at + size > len(data)):
                at = start  # it goes on in the next chunk
                break
            if tag == self._tag:
                self._begin(size)
                data, at = self._take(data[at:]), 0
            else:
                self._others += data[start : at + size]
                at += size
        self._pending = bytes(data[at:])
        if len(self._others) + len(self._pending) > _OTHERS_BYTES:
            raise BadMessage(f"fields of more than {_OTHERS_BYTES} bytes beside the content")

    def end(self) -> tuple[bytes, bytes | Spooled]:
        """The other fields, and the long one. Errors: BadMessage for a body that was cut."""
        if self._pending or self._left:
            raise BadMessage("the body ends within a field")
        if self._file is None or self._path is None:
            return bytes(self._others), bytes(self._content)
        self._file.close()
        digest = self._digest.hexdigest()
        return bytes(self._others), Spooled(self._path, self._size, digest, bytes(self._start))

    def _begin(self, size: int) -> None:
        if self._size >= 0:
            raise BadMessage("the content comes twice")
        self._size = self._left = size
        if size >= self._file_from:
            self._path = self._folder / f".{secrets.token_hex(16)}"
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = os.fdopen(handle, "wb", buffering=0)

    def _take(self, data: memoryview) -> memoryview:
        """What follows the content."""
        part, data = data[: self._left], data[self._left :]
        self._left -= len(part)
        if self._file is None:
            self._content += part
            return data
        self._start += part[: _START_BYTES - len(self._start)]
        self._digest.update(part)
        while part:
            part = part[self._file.write(part) :]
        return data
