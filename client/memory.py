"""What a lab's half of a strategy remembers between rounds, as files: one a round, so that a run
that is resumed reads the right one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load, load_file, save

from cytofed.arrays import Parts
from cytofed.client.storage import read_sealed, write_sealed
from cytofed.files import write_atomically
from cytofed.privacy import wire

_KEPT = 2
"""rounds"""

_LABEL = "cytofed/1/memory"


@dataclass(frozen=True)
class FolderMemory:
    """The memory of a virtual lab, as plain files: nothing of it is private."""

    folder: Path
    lab: str

    def load(self, run: str, round_: int) -> Parts:
        files = _before(self._folder(run), round_, ".safetensors")
        return load_file(files[-1]) if files else {}

    def save(self, run: str, round_: int, parts: Parts) -> None:
        folder = self._folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{_stem(round_)}.safetensors", _packed(parts))
        _forget(_before(folder, round_, ".safetensors"))

    def _folder(self, run: str) -> Path:
        return self.folder / run / self.lab


@dataclass(frozen=True)
class SealedMemory:
    """The memory of a lab, in the ``folder`` of one ``offer`` (its id), under its storage ``key``.

    Control variates and a lab's own layers are made from its images as an update is: they are
    never on the disk in clear text. A run's name comes from outside and is no part of a path.
    """

    folder: Path
    lab: str
    offer: str
    key: bytes = field(repr=False)

    def load(self, run: str, round_: int) -> Parts:
        """Errors: VerificationError for a file that was altered, or is of another run or lab."""
        files = _before(self.folder, round_, ".sealed")
        if not files:
            return {}
        way_out = "remove it: this lab then goes on as if it had not taken part in that round"
        place = self._place(run, files[-1].stem)
        return load(read_sealed(files[-1], key=self.key, place=place, way_out=way_out))

    def save(self, run: str, round_: int, parts: Parts) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{_stem(round_)}.sealed"
        place = self._place(run, path.stem)
        write_sealed(path, _packed(parts), key=self.key, place=place)
        _forget(_before(self.folder, round_, ".sealed"))

    def _place(self, run: str, stem: str) -> bytes:
        return wire.encode([_LABEL, self.offer, run, self.lab, stem])


def _packed(parts: Parts) -> bytes:
    return save({name: np.ascontiguousarray(values) for name, values in parts.items()})


def _before(folder: Path, round_: int, suffix: str) -> list[Path]:
    """Files of earlier rounds, in order."""
    files = sorted(folder.glob(f"round-*{suffix}"), key=_round_of)
    return [file for file in files if _round_of(file) < round_]


def _round_of(file: Path) -> int:
    return int(file.stem.removeprefix("round-"))


def _stem(round_: int) -> str:
    return f"round-{round_:05d}"


def _forget(files: list[Path]) -> None:
    for old in files[:-_KEPT]:
        old.unlink(missing_ok=True)
