"""Seeds of independent streams, derived from one number and a path of names."""

from __future__ import annotations

import hashlib


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream ``path`` under ``seed``; other paths give unrelated streams.

    For simulations and data order only: noise of differential privacy never comes from here.
    """
    text = "\x1f".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
