"""A thread that is watched over."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cytofed.server import worker
from cytofed.server.worker import Worker


def made(
    turn: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> tuple[Worker, threading.Event, list[str], threading.Event]:
    """A worker that has not started, its end, what it gave up for, and that it did."""
    monkeypatch.setattr(worker, "_FIRST_PAUSE_S", 0.001)
    ending, reasons, gave_up = threading.Event(), list[str](), threading.Event()

    def give_up(reason: str) -> None:
        reasons.append(reason)
        gave_up.set()

    made = Worker("rounds", turn, ending=ending, give_up=give_up)
    return made, ending, reasons, gave_up


def test_turn_that_fails_now_and_then_is_tried_again_and_trouble_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, whole = list[str](), threading.Event()

    def turn() -> float:
        seen.append(found[0].trouble() if found else "")
        if len(seen) in (1, 2, 4):
            raise OSError("no room")
        if len(seen) == 6:
            whole.set()
            return 60.0
        return 0.0

    found: list[Worker] = []
    one, ending, reasons, _ = made(turn, monkeypatch)
    found.append(one)
    one.start()
    assert whole.wait(60)
    assert one.trouble() == ""
    assert "rounds: OSError: no room" in seen
    assert seen[3] == seen[5] == ""
    ending.set()
    one.wake()
    one.join(60)
    assert reasons == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_thread_that_cannot_go_on_says_so_however_it_ends(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn() -> float:
        raise error

    one, _, reasons, gave_up = made(turn, monkeypatch)
    one.start()
    assert gave_up.wait(60)
    one.join(60)
    assert len(reasons) == 1
    assert type(error).__name__ in reasons[0]
    assert one.trouble(in_public=True) == f"rounds: {type(error).__name__}"


def test_woken_worker_does_not_wait_out_its_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, first, again = [0], threading.Event(), threading.Event()

    def turn() -> float:
        turns[0] += 1
        (first if turns[0] == 1 else again).set()
        return 3600.0

    one, ending, _, _ = made(turn, monkeypatch)
    one.start()
    assert first.wait(60)
    one.wake()
    assert again.wait(60)
    ending.set()
    one.wake()
    one.join(60)


def test_turn_without_a_sign_of_life_is_trouble_and_one_that_goes_on_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, heard, end = threading.Event(), threading.Event(), threading.Event()

    def turn() -> float:
        begun.set()
        while not end.wait(0.01):
            if heard.is_set():
                worker.sign_of_life()
        return 3600.0

    one, ending, _, _ = made(turn, monkeypatch)
    one.start()
    assert begun.wait(60)
    one.alive_at -= 7200
    assert one.trouble(in_public=True) == "rounds: stuck for 120 minutes"
    heard.set()
    while one.trouble():
        end.wait(0.01)
    end.set()
    ending.set()
    one.wake()
    one.join(60)
    worker.sign_of_life()  # of no worker's thread: nothing
