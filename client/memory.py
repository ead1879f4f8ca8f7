"""What a lab's half of a strategy remembers between rounds, as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from cytofed.arrays import Parts
from cytofed.files import write_atomically


@dataclass(frozen=True)
class FolderMemory:
    """A lab's memory as files, one a round: a run that is resumed reads the right one."""

    folder: Path
    lab: str
    keep: int = field(default=2)

    def load(self, run: str, round_: int) -> Parts:
        files = [f for f in self._files(run) if _round_of(f) < round_]
        return load_file(files[-1]) if files else {}

    def save(self, run: str, round_: int, parts: Parts) -> None:
        path = self.folder / run / self.lab / f"round-{round_:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({k: np.ascontiguousarray(v) for k, v in parts.items()}))
        for old in [f for f in self._files(run) if _round_of(f) < round_][: -self.keep]:
            old.unlink(missing_ok=True)

    def _files(self, run: str) -> list[Path]:
        return sorted((self.folder / run / self.lab).glob("round-*.safetensors"))


def _round_of(file: Path) -> int:
    return int(file.stem.removeprefix("round-"))
