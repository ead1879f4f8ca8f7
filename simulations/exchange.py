"""Arrays between processes of one machine, without a copy through a pipe.

A message's content becomes a small description plus one file in shared memory; the other side
maps it. The grid's process owns the files and hands them out as slots, which are used again: pages
that are there need not be zeroed, and a mapping need not be made. What a killed process left
behind is removed by the next.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from cytofed.messages import array_of

_INLINE = 1 << 16
"""Contents up to this many bytes go through the pipe itself."""


@dataclass(frozen=True)
class Packed:
    """A RecordDict as plain values. Array data lies in ``path``, or inline where that is None."""

    header: dict[str, Any]
    arrays: tuple[tuple[str, str, tuple[int, ...], str, int], ...]
    path: str | None
    inline: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(row[-1] for row in self.arrays)


@dataclass(frozen=True)
class Task:
    """One message to a virtual lab. Equal ``content_id``: the same content.

    ``reply_path``: the file for the arrays of the answer; what is in it may be overwritten.
    """

    message_id: str
    kind: str
    node: int
    group: str
    ttl_s: float
    content: Packed
    content_id: int
    reply_path: str


@dataclass(frozen=True)
class Answer:
    """A lab's reply: content, or an error's code and reason."""

    message_id: str
    content: Packed | None
    error: tuple[int, str] = (0, "")


@dataclass(frozen=True)
class Step:
    """How far a lab's training is."""

    run: str
    lab_node: int
    round: int
    done: float
    loss: float


def open_folder() -> Path:
    """A new folder in shared memory (or the temporary folder), named after this process."""
    base = _base()
    _remove_stale(base)
    return Path(tempfile.mkdtemp(prefix=f"cytofed-{os.getpid()}-", dir=base))


def _base() -> Path:
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    return shared if usable else Path(tempfile.gettempdir())


def _remove_stale(base: Path) -> None:
    for folder in base.glob("cytofed-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and folder.stat().st_uid == os.getuid() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Slot:
    """One file for the arrays of one content at a time, seen by a process through one mapping.

    Mapped once, and again where the file has grown: pages that are there are cheaper than new ones,
    and a copy into them than a write through the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def room(self, size: int) -> memoryview:
        """The first ``size`` bytes, to write. Errors: OSError where there is no space."""
        if self._map is None or len(self._map) < size:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if os.fstat(file).st_size < size:
                    if sys.platform == "linux":  # a hole would kill the process that writes to it
                        os.posix_fallocate(file, 0, size)
                    else:
                        os.ftruncate(file, size)
                self._map = mmap.mmap(file, 0)
            finally:
                os.close(file)
        return memoryview(self._map)[:size]

    def view(self, size: int) -> memoryview:
        """The first ``size`` bytes, which somebody has written."""
        return self.room(size).toreadonly()


class Slots:
    """The files of one grid. ``keep_bytes``: as much is kept for the next content; safe to share
    between threads."""

    def __init__(self, folder: Path, *, keep_bytes: int) -> None:
        self._folder, self._keep_bytes = folder, keep_bytes
        self._lock = threading.Lock()
        self._free: list[Slot] = []
        self._made = 0

    def take(self) -> Slot:
        """A slot that nobody else has, the one given back last if there is one."""
        with self._lock:
            if self._free:
                return self._free.pop()
            self._made += 1
            return Slot(self._folder / f"slot-{self._made}")

    def give_back(self, slot: Slot) -> None:
        """Nobody looks at ``slot`` any more."""
        with self._lock:
            self._free.append(slot)
            excess = sum(free.size for free in self._free) - self._keep_bytes
            while excess > 0:
                oldest = self._free.pop(0)
                excess -= oldest.size
                oldest.path.unlink(missing_ok=True)

    def lend(self, packed: Packed, slot: Slot) -> RecordDict:
        """The content that lies in ``slot``, which comes back when the content is dropped."""
        whole = np.frombuffer(slot.view(packed.size), np.uint8)
        weakref.finalize(whole, self.give_back, slot)
        return _with_arrays(packed, whole.data)


def pack(content: RecordDict, slot: Slot) -> Packed:
    """Describe ``content``; large array data is written to ``slot``."""
    header = dict(cast(ConfigRecord, content["header"]))
    record = cast(ArrayRecord, content["parts"])
    arrays = tuple(
        (name, array.dtype, tuple(array.shape), array.stype, len(array.data))
        for name, array in record.items()
    )
    size = sum(row[-1] for row in arrays)
    if size <= _INLINE:
        inline = b"".join(bytes(array.data) for array in record.values())
        return Packed(header, arrays, None, inline)
    room, start = slot.room(size), 0
    for array in record.values():
        end = start + len(array.data)
        room[start:end] = memoryview(array.data)
        start = end
    return Packed(header, arrays, str(slot.path))


def unpack(packed: Packed) -> RecordDict:
    """The content again. Its arrays are views of the file: valid until that is written anew."""
    if packed.path is None:
        return _with_arrays(packed, memoryview(packed.inline))
    return _with_arrays(packed, Slot(Path(packed.path)).view(packed.size))


def _with_arrays(packed: Packed, buffer: memoryview) -> RecordDict:
    record, start = ArrayRecord(), 0
    for name, dtype, shape, stype, size in packed.arrays:
        record[name] = array_of(dtype, shape, stype, buffer[start : start + size])
        start += size
    return RecordDict({"header": ConfigRecord(packed.header), "parts": record})
