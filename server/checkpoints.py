"""A run's progress on disk: what a crash leaves is the last round that was finished.

One safetensors file a round: the strategy's state as arrays, the round and the records so far as
metadata. Written atomically; the newest two are kept.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cytofed.errors import InputError
from cytofed.strategies.strategy import State
from cytofed.tensor_file import write_tensors

Record = Mapping[str, Any]
"""One round as it stands in metrics.jsonl."""


@dataclass(frozen=True)
class Progress:
    """A run after ``round`` rounds: the strategy's state and one record per round."""

    round: int
    state: State
    records: tuple[Record, ...] = ()
    wall_s: float = 0.0


def save_progress(folder: Path, progress: Progress, *, plan_sha256: str) -> None:
    """Write the checkpoint of ``progress``, over the older of two, and remove all but the newest
    two."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "round": str(progress.round),
        "plan_sha256": plan_sha256,
        "records": json.dumps(progress.records),
        "wall_s": repr(progress.wall_s),
    }
    path = _file(folder, progress.round)
    before = [file for file in _files(folder) if file != path]
    over = before[-2] if len(before) > 1 else None
    write_tensors(path, progress.state, metadata, over=over)
    for old in _files(folder)[:-2]:
        old.unlink(missing_ok=True)
    for part in folder.glob(".*.part"):  # left by a crash in the middle of a write
        part.unlink(missing_ok=True)


def load_progress(folder: Path, *, plan_sha256: str) -> Progress | None:
    """The newest checkpoint, or None where there is none.

    Errors: InputError when it belongs to another plan or cannot be read.
    """
    files = _files(folder)
    return _load(files[-1], plan_sha256) if files else None


def load_last_whole(folder: Path, *, plan_sha256: str) -> Progress | None:
    """The newest checkpoint of this plan that can be read, or None where there is none."""
    for file in reversed(_files(folder)):
        with contextlib.suppress(InputError):
            return _load(file, plan_sha256)
    return None


def _load(path: Path, plan_sha256: str) -> Progress:
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = Progress(
            round=int(metadata["round"]),
            state=state,
            records=tuple(json.loads(metadata["records"])),
            wall_s=float(metadata["wall_s"]),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read: {error}",
            hint="remove it to go on from the one before",
        ) from None
    if metadata.get("plan_sha256") != plan_sha256:
        raise InputError(
            f"checkpoint {path} is of plan {metadata.get('plan_sha256', '?')[:12]}, "
            f"this plan is {plan_sha256[:12]}",
            hint="resume with the same plan, seed and data, or choose another --out",
        )
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"))


def _file(folder: Path, round_: int) -> Path:
    return folder / f"round-{round_:05d}.safetensors"
