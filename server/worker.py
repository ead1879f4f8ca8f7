"""A thread that must not end: what it raises is logged and told, and it goes on.

A thread that ends by an exception ends silently: the process lives, labs stay connected, and
nothing happens any more. Here a failed turn is tried again after a pause; where turn after turn
fails, whoever owns the thread is told to end the process, for a fresh one to be started.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cytofed.words import reason_of

_TRIES = 5
"""failed turns in a row, after which there is no use in another"""
_FIRST_PAUSE_S = 0.5
_QUIET_S = 3600.0
"""without a sign of life, after which a turn counts as stuck"""

_own = threading.local()
_log = logging.getLogger("cytofed.coordinator")


def sign_of_life() -> None:
    """To be called within a turn that takes long; elsewhere it does nothing."""
    worker: Worker | None = getattr(_own, "worker", None)
    if worker is not None:
        worker.alive_at = time.monotonic()


class Worker:
    """Repeats ``turn`` until ``ending``. A turn returns how many seconds to wait for the next.

    ``give_up`` is called with the reason, once, when turns keep failing or the thread itself ends
    before its time.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], float],
        *,
        ending: threading.Event,
        give_up: Callable[[str], None],
    ) -> None:
        self.name = name
        self._turn, self._ending, self._give_up = turn, ending, give_up
        self._wake = threading.Event()
        self._failed: BaseException | None = None
        self.alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Have the next turn begin now."""
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def trouble(self, *, in_public: bool = False) -> str:
        """What is wrong now, or nothing. ``in_public``: without a word of this machine's files."""
        failed = self._failed
        if failed is not None:
            return f"{self.name}: {type(failed).__name__ if in_public else reason_of(failed)}"
        begun = self._thread.ident is not None
        if begun and not self._thread.is_alive() and not self._ending.is_set():
            return f"{self.name}: ended"
        quiet_s = time.monotonic() - self.alive_at
        if begun and quiet_s > _QUIET_S and not self._ending.is_set():
            return f"{self.name}: stuck for {quiet_s / 60:.0f} minutes"
        return ""

    def _work(self) -> None:
        _own.worker = self
        try:
            self._turns()
        except BaseException as error:
            # Python lets a thread end by SystemExit without a word.
            self._failed = error
            _log.exception("%s", self.name)
        finally:
            if not self._ending.is_set():
                self._give_up(self.trouble() or f"{self.name}: ended")

    def _turns(self) -> None:
        """Turn after turn, until told to end or there is no use in another."""
        failures = 0
        while not self._ending.is_set() and failures < _TRIES:
            self._wake.clear()
            self.alive_at = time.monotonic()
            try:
                pause_s = self._turn()
            except Exception as error:
                if self._ending.is_set():
                    return
                failures, self._failed = failures + 1, error
                _log.exception("%s: turn failed, %d in a row", self.name, failures)
                self._ending.wait(_FIRST_PAUSE_S * 2 ** (failures - 1))
            else:
                failures, self._failed = 0, None
                if pause_s > 0:
                    self.alive_at = time.monotonic() + pause_s
                    self._wake.wait(pause_s)
