"""Arrays between processes of one machine, without a copy through a pipe.

A message's content becomes a small description plus one file in shared memory; the other side
maps it. Files are unlinked as soon as they are not needed; what a killed process left behind is
removed by the next.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

_INLINE = 1 << 16
"""Contents up to this many bytes go through the pipe itself."""


@dataclass(frozen=True)
class Packed:
    """A RecordDict as plain values. Array data lies in ``path``, or inline where that is None."""

    header: dict[str, Any]
    arrays: tuple[tuple[str, str, tuple[int, ...], str, int], ...]
    path: str | None
    inline: bytes = b""


@dataclass(frozen=True)
class Task:
    """One message to a virtual lab. Equal ``content_id``: the same content."""

    message_id: str
    kind: str
    node: int
    group: str
    ttl_s: float
    content: Packed
    content_id: int


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
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    _remove_stale(base or Path(tempfile.gettempdir()))
    return Path(tempfile.mkdtemp(prefix=f"cytofed-{os.getpid()}-", dir=base))


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


def pack(content: RecordDict, path: Path) -> Packed:
    """Describe ``content``; large array data is written to the new file ``path``."""
    header = dict(cast(ConfigRecord, content["header"]))
    record = cast(ArrayRecord, content["parts"])
    arrays = tuple(
        (name, array.dtype, tuple(array.shape), array.stype, len(array.data))
        for name, array in record.items()
    )
    if sum(row[-1] for row in arrays) <= _INLINE:
        inline = b"".join(bytes(array.data) for array in record.values())
        return Packed(header, arrays, None, inline)
    with path.open("xb", buffering=0) as file:
        for array in record.values():
            view = memoryview(array.data)
            while view:
                view = view[file.write(view) :]
    return Packed(header, arrays, str(path))


def unpack(packed: Packed) -> RecordDict:
    """The content again; arrays are views of the mapped file, which may be unlinked after this."""
    if packed.path is None:
        buffer = memoryview(packed.inline)
    else:
        with Path(packed.path).open("rb") as file:
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    record, start = ArrayRecord(), 0
    for name, dtype, shape, stype, size in packed.arrays:
        array = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
        cast(Any, array).data = buffer[start : start + size]
        record[name], start = array, start + size
    return RecordDict({"header": ConfigRecord(packed.header), "parts": record})
