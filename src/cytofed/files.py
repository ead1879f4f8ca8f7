"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


def write_atomically(
    path: Path,
    data: bytes | str | Sequence[bytes | memoryview],
    *,
    mode: int = 0o644,
    durable: bool = True,
) -> None:
    """Write ``data`` so that after a crash ``path`` has either its old or its new content.

    The data, in one piece or in several, is on the disk (fsync) before the name points to it; not
    ``durable``, only after a crash of this process, not of the machine.
    """
    raw = data.encode() if isinstance(data, str) else data
    with atomically(path, mode=mode, durable=durable) as part, part.open("wb") as file:
        file.writelines([raw] if isinstance(raw, bytes) else raw)


@contextlib.contextmanager
def atomically(path: Path, *, mode: int = 0o644, durable: bool = True) -> Iterator[Path]:
    """As ``write_atomically``, for a block that writes the file whose path it gets."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield part
        if durable:
            _sync(part, os.O_RDWR)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
