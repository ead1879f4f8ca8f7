"""What a strategy remembers at a lab is for its own run, and for nobody who reads the disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cytofed.client.memory import SealedMemory
from cytofed.errors import VerificationError

KEY = os.urandom(32)
OFFER = "ab" * 32
RUN = "../../elsewhere"


def memory_in(folder: Path, *, offer: str = OFFER, key: bytes = KEY) -> SealedMemory:
    return SealedMemory(folder, "lab-1", offer, key)


def control(value: float) -> dict[str, np.ndarray]:
    return {"control": np.full(64, value, np.float32)}


def test_a_memory_is_that_of_the_round_before_and_few_files(tmp_path: Path) -> None:
    memory = memory_in(tmp_path / "memory")
    assert memory.load(RUN, 1) == {}
    for number in (1, 2, 3, 4, 5):
        memory.save(RUN, number, control(number))
    assert memory.load(RUN, 5)["control"].tolist() == [4.0] * 64
    assert memory.load(RUN, 99)["control"].tolist() == [5.0] * 64
    assert len(list((tmp_path / "memory").iterdir())) <= 3


def test_control_variates_are_not_readable_on_the_disk(tmp_path: Path) -> None:
    memory_in(tmp_path / "memory").save(RUN, 1, control(0.123))
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.parent == tmp_path / "memory", "a run's name is no path"
    assert file.stat().st_mode & 0o077 == 0
    assert np.float32(0.123).tobytes() * 4 not in file.read_bytes()


def test_a_memory_of_another_offer_or_lab_or_an_altered_one_is_refused(tmp_path: Path) -> None:
    memory_in(tmp_path).save(RUN, 1, control(1))
    for stranger in (memory_in(tmp_path, offer="cd" * 32), memory_in(tmp_path, key=bytes(32))):
        with pytest.raises(VerificationError, match="altered"):
            stranger.load(RUN, 2)
    [file] = tmp_path.iterdir()
    file.rename(tmp_path / "round-00007.sealed")
    with pytest.raises(VerificationError, match="altered"):
        memory_in(tmp_path).load(RUN, 8)
