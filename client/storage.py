"""Files that only this lab can read: encrypted under its storage key, and bound to their place.

A thief of the disk finds nothing of an update, a lab's own layers or the secrets of secure
aggregation in clear text. A file that was moved to another place, or from another lab, does not
open.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cytofed.errors import VerificationError
from cytofed.files import write_atomically

_NONCE_BYTES = 12


def write_sealed(path: Path, data: bytes, *, key: bytes, place: bytes) -> None:
    """On the disk, readable by this user and with the key only, when it returns.

    ``place``: what the file is and where it belongs; it opens there alone.
    """
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, data, place)
    write_atomically(path, nonce + sealed, mode=0o600)


def read_sealed(path: Path, *, key: bytes, place: bytes, way_out: str) -> bytes:
    """Errors: VerificationError, with ``way_out``, for a file that was altered or is of another
    place or key."""
    data = path.read_bytes()
    nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, sealed, place)
    except (InvalidTag, ValueError):
        raise VerificationError(
            f"{path} was altered, or belongs to another run or lab", hint=way_out
        ) from None
