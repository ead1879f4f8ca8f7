"""Masks: AES-256-CTR keystreams, added to a vector of ring words in place.

A word is uint32 (ring 2^32) or uint16 (ring 2^16), little-endian. A mask's key serves one vector
only, so its counter starts at zero. The work goes chunk by chunk through all masks, so that a chunk
of the vector stays in the processor's cache and memory grows by two chunks a thread, not by a
vector.

Shape legend: W words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from cytofed.arrays import SHARE, THREADS, in_shares
from cytofed.errors import InputError

Words = NDArray[np.uint32] | NDArray[np.uint16]

CHUNK_BYTES = 1 << 18  # a chunk of the vector and one of keystream stay in the second-level cache
_BLOCK_BYTES = 16


@dataclass(frozen=True)
class Mask:
    """A keystream that is added (``sign`` 1) or subtracted (-1)."""

    key: bytes = field(repr=False)  # 32 bytes
    sign: int


def add_masks(words_W: Words, masks: Sequence[Mask]) -> None:
    """Add every mask to ``words_W`` in place, modulo the ring; shares of it side by side.

    Extra memory: 512 KiB a thread. Raises InputError for another dtype or layout.
    """
    check_words(words_W)
    # The cipher and numpy release the interpreter's lock. As few shares as there are threads: each
    # sets up all ciphers anew.
    share = SHARE * math.ceil(len(words_W) / (SHARE * THREADS)) or SHARE
    in_shares(lambda part: add_to_share(words_W, masks, part), len(words_W), share=share)


def add_to_share(words_W: Words, masks: Sequence[Mask], share: slice) -> None:
    """The same for the words of ``share`` alone, whose start is a multiple of 8 (a block)."""
    start, end = share.start * words_W.itemsize, share.stop * words_W.itemsize
    counter = (start // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    streams = [Cipher(algorithms.AES(mask.key), modes.CTR(counter)).encryptor() for mask in masks]
    itemsize = words_W.dtype.itemsize
    zeros = bytes(CHUNK_BYTES)
    stream = np.empty(CHUNK_BYTES // itemsize, words_W.dtype.newbyteorder("<"))
    out = stream.data.cast("B")
    for at in range(start, end, CHUNK_BYTES):
        size = min(CHUNK_BYTES, end - at)
        chunk = words_W[at // itemsize : (at + size) // itemsize]
        part = stream[: size // itemsize]
        plain = zeros if size == CHUNK_BYTES else zeros[:size]
        for mask, cipher in zip(masks, streams, strict=True):
            cipher.update_into(plain, out[:size])
            (np.add if mask.sign > 0 else np.subtract)(chunk, part, out=chunk)


def add_words(total_W: Words, words_W: Words) -> None:
    """Add a vector to the running sum in place, modulo the ring.

    Raises InputError unless both have the same dtype and length: nothing is broadcast.
    """
    check_words(total_W)
    if words_W.dtype != total_W.dtype or words_W.shape != total_W.shape:
        raise InputError(
            f"vector of {words_W.shape} {words_W.dtype}, expected {total_W.shape} {total_W.dtype}"
        )
    np.add(total_W, words_W, out=total_W)


def check_words(words_W: Words) -> None:
    """Raise InputError unless this is a contiguous, writable vector of uint32 or uint16."""
    if words_W.dtype not in (np.uint32, np.uint16) or words_W.ndim != 1:
        raise InputError(
            f"vector of {words_W.ndim} dimensions of {words_W.dtype}, expected uint32 or uint16"
        )
    if not (words_W.flags.c_contiguous and words_W.flags.writeable):
        raise InputError("vector is not contiguous and writable: masks are added in place")
