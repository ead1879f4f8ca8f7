"""The state of secure aggregation between two steps: a file that only this lab can open.

It holds the secrets of slots that are still to be used. A thief of the disk finds it encrypted
under the lab's storage key, which is a key file like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cytofed.client.storage import read_sealed, write_sealed
from cytofed.privacy import wire

_LABEL = "cytofed/1/secagg-state"


@dataclass(frozen=True)
class SealedStates:
    """States below the ``folder`` of one ``offer`` (its id), under a key of 32 bytes."""

    folder: Path
    offer: str
    key: bytes = field(repr=False)

    def load(self, run: str) -> bytes | None:
        """The state as saved last; None before the first step.

        Errors: VerificationError for a file that was altered, or that another run or lab wrote.
        """
        if not self._path.is_file():
            return None
        way_out = "remove it: this lab is missing until the cohort exchanges keys anew"
        return read_sealed(self._path, key=self.key, place=self._place(run), way_out=way_out)

    def save(self, run: str, state: bytes) -> None:
        """On the disk, readable by this user only, when it returns."""
        write_sealed(self._path, state, key=self.key, place=self._place(run))

    @property
    def _path(self) -> Path:
        return self.folder / "secagg.state"

    def _place(self, run: str) -> bytes:
        return wire.encode([_LABEL, self.offer, run])
