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
    over: Path | None = None,
) -> None:
    """Write ``data`` so that after a crash ``path`` has either its old or its new content.

    The data, in one piece or in several, is on the disk (fsync) before the name points to it; not
    ``durable``, only after a crash of this process, not of the machine. ``over``: as in
    ``atomically``.
    """
    raw = data.encode() if isinstance(data, str) else data
    with atomically(path, mode=mode, durable=durable, over=over) as part, part.open("r+b") as file:
        file.writelines([raw] if isinstance(raw, bytes) else raw)
        file.truncate()


@contextlib.contextmanager
def atomically(
    path: Path, *, mode: int = 0o644, durable: bool = True, over: Path | None = None
) -> Iterator[Path]:
    """As ``write_atomically``, for a block that writes the file whose path it gets.

    ``over``: a file of the same folder that nobody needs, if it is there; the block gets it, with
    what it holds. Where the disk is told of what is freed, to free a large file and take a new one
    costs more than to write it.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    if over is not None and over.exists():
        os.replace(over, part)
    else:
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
