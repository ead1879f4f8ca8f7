"""How often something may happen, whoever asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """``burst`` times at once; what was taken comes back, one in ``every_s`` seconds."""

    def __init__(
        self, burst: int, every_s: float, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._every_s, self._now = burst, every_s, now
        self._full_at = now()
        """when nothing of the burst is taken any more"""

    @property
    def room(self) -> bool:
        """Whether it may happen now."""
        return self._full_at - self._now() <= (self._burst - 1) * self._every_s

    def take(self) -> None:
        """It happens."""
        self._full_at = max(self._full_at, self._now()) + self._every_s
