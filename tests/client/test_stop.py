"""A lab that is told to end while its private path is checked ends, and leaves nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cytofed.client import made_up
from cytofed.client.daemon import _Check
from cytofed.client.rehearsal import rehearse
from cytofed.errors import VerificationError


def test_a_rehearsal_that_is_stopped_answers_no_order_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_up, "_MEMORY", tmp_path)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(made_up.Stopped):
        rehearse(quick=True, stopping=stopping)
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_was_stopped_has_ended_and_not_passed(tmp_path: Path) -> None:
    check = _Check(tmp_path / "noise.seen")
    check.start()
    check.stop()
    assert "check" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(VerificationError, match="was stopped"):
        check.passed()
