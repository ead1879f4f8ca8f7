"""Seeds of independent streams, derived from one number and a path of names."""

from __future__ import annotations

import hashlib

_BETWEEN = "\x1f"


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream ``path`` under ``seed``; other paths give unrelated streams.

    For simulations and data order only: noise of differential privacy never comes from here.
    """
    names = [str(seed), *map(str, path)]
    if any(_BETWEEN in name for name in names):  # else two paths could be one
        raise ValueError(f"a stream's path {names!r} has the character that joins it")
    text = _BETWEEN.join(names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
