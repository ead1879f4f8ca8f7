"""Which processes work on a run or a sweep."""

from __future__ import annotations

from pathlib import Path


def processes_about(folder: Path) -> list[int]:
    """Processes that have ``folder`` in their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(folder).encode() in argument for argument in arguments):
            found.append(int(process.name))
    return found
