"""The state of secure aggregation on a lab's disk opens for its own lab and run only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cytofed.client.states import SealedStates
from cytofed.errors import VerificationError

KEY = os.urandom(32)
OFFER = "ab" * 32


def test_a_state_comes_back_and_is_not_readable_on_the_disk(tmp_path: Path) -> None:
    states = SealedStates(tmp_path, OFFER, KEY)
    assert states.load("r1") is None
    secret = os.urandom(300)
    states.save("r1", secret)
    assert states.load("r1") == secret
    [file] = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    raw = file.read_bytes()
    assert all(secret[at : at + 8] not in raw for at in range(len(secret) - 8))


@pytest.mark.parametrize("at", [0, 20, -1])
def test_an_altered_state_is_refused(tmp_path: Path, at: int) -> None:
    SealedStates(tmp_path, OFFER, KEY).save("r1", b"state")
    [file] = tmp_path.iterdir()
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match="altered"):
        SealedStates(tmp_path, OFFER, KEY).load("r1")


def test_another_lab_run_or_offer_opens_nothing(tmp_path: Path) -> None:
    SealedStates(tmp_path, OFFER, KEY).save("r1", b"state")
    for states, run in (
        (SealedStates(tmp_path, OFFER, os.urandom(32)), "r1"),
        (SealedStates(tmp_path, "cd" * 32, KEY), "r1"),
        (SealedStates(tmp_path, OFFER, KEY), "r2"),
    ):
        with pytest.raises(VerificationError):
            states.load(run)
