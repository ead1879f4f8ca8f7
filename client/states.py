"""The state of secure aggregation between two steps: a file that only this lab can open.

It holds the secrets of slots that are still to be used. A thief of the disk finds it encrypted
under the lab's storage key, which is a key file like the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cytofed.errors import VerificationError
from cytofed.files import write_atomically
from cytofed.privacy import wire

_LABEL = "cytofed/1/secagg-state"
_NONCE_BYTES = 12


@dataclass(frozen=True)
class SealedStates:
    """States below one run's ``folder``, under a key of 32 bytes."""

    folder: Path
    key: bytes = field(repr=False)

    def load(self, run: str) -> bytes | None:
        """The state as saved last; None before the first step.

        Errors: VerificationError for a file that was altered, or that another run or lab wrote.
        """
        path = self._path
        if not path.is_file():
            return None
        data = path.read_bytes()
        nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
        try:
            return AESGCM(self.key).decrypt(nonce, sealed, _place(run))
        except (InvalidTag, ValueError):
            raise VerificationError(
                f"{path} was altered, or belongs to another run or lab",
                hint="remove it: this lab is missing until the cohort exchanges keys anew",
            ) from None

    def save(self, run: str, state: bytes) -> None:
        """On the disk, readable by this user only, when it returns."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.key).encrypt(nonce, state, _place(run))
        write_atomically(self._path, nonce + sealed, mode=0o600)

    @property
    def _path(self) -> Path:
        return self.folder / "secagg.state"


def _place(run: str) -> bytes:
    return wire.encode([_LABEL, run])
