"""What a process does with the memory of large blocks, where glibc's malloc gives it out.

Left alone, glibc learns from sizes: some blocks go back to the system at each turn and come again
page by page, which is most of what a copy costs; others stay, in an arena per thread.
"""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_MIB = 1 << 20


def keep_blocks() -> None:
    """Keep what was freed for the next block: a lab does the same every round."""
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 1024 * _MIB, _ARENA_MAX: 1})


def give_blocks_back() -> None:
    """Keep blocks of the size of what is sent and read at a time, give vectors back, and take
    nothing for them from among small blocks that stay: memory is scarcer than time where one
    process serves all labs."""
    _set({_MMAP_THRESHOLD: _MIB // 2, _TRIM_THRESHOLD: 32 * _MIB, _ARENA_MAX: 1})


def give_back_the_rest() -> None:
    """Give the pages of freed small blocks back as well, once there was use for uncommonly many."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)
