"""Checkpoints: a crash leaves the last finished round, and no run goes on from another's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cytofed.errors import InputError
from cytofed.server.checkpoints import Progress, load_last_whole, load_progress, save_progress

PLAN, OTHER_PLAN = "a" * 64, "b" * 64


def progress(round_: int) -> Progress:
    state = {
        "weights": np.arange(5, dtype=np.float32) + round_,
        "momentum": np.full(5, 0.1, np.float32),
    }
    records = tuple({"round": r, "applied": True, "absent": {}} for r in range(1, round_ + 1))
    return Progress(round_, state, records, wall_s=1.5 * round_)


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert load_progress(tmp_path / "none", plan_sha256=PLAN) is None


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    save_progress(tmp_path, progress(3), plan_sha256=PLAN)
    found = load_progress(tmp_path, plan_sha256=PLAN)
    assert found is not None
    assert (found.round, found.records, found.wall_s) == (3, progress(3).records, 4.5)
    assert found.state.keys() == progress(3).state.keys()
    for name, values in progress(3).state.items():
        assert found.state[name].tobytes() == values.tobytes()
        assert found.state[name].dtype == np.float32


def test_newest_wins_and_two_are_kept(tmp_path: Path) -> None:
    for round_ in (8, 9, 10, 11):
        save_progress(tmp_path, progress(round_), plan_sha256=PLAN)
    found = load_progress(tmp_path, plan_sha256=PLAN)
    assert found is not None
    assert found.round == 11
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "round-00010.safetensors",
        "round-00011.safetensors",
    ]


def test_checkpoint_of_another_plan_is_refused_with_both_hashes(tmp_path: Path) -> None:
    save_progress(tmp_path, progress(1), plan_sha256=PLAN)
    with pytest.raises(InputError) as refusal:
        load_progress(tmp_path, plan_sha256=OTHER_PLAN)
    assert "a" * 12 in refusal.value.message
    assert "b" * 12 in refusal.value.message
    assert "--out" in refusal.value.hint


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    save_progress(tmp_path, progress(1), plan_sha256=PLAN)
    file = tmp_path / "round-00001.safetensors"
    content = {"cut": file.read_bytes()[:-7], "empty": b"", "text": b"no checkpoint" * 9}[damage]
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"round-00001\.safetensors cannot be read"):
        load_progress(tmp_path, plan_sha256=PLAN)


@pytest.mark.parametrize("lost", ["round", "records", "wall_s"])
def test_checkpoint_without_its_notes_is_damaged_and_the_one_before_is_found(
    lost: str, tmp_path: Path
) -> None:
    save_progress(tmp_path, progress(1), plan_sha256=PLAN)
    notes = {"round": "2", "records": "[]", "wall_s": "1.0", "plan_sha256": PLAN}
    notes[lost] = "no"
    save_file(dict(progress(2).state), tmp_path / "round-00002.safetensors", notes)
    with pytest.raises(InputError, match=r"round-00002\.safetensors cannot be read"):
        load_progress(tmp_path, plan_sha256=PLAN)
    found = load_last_whole(tmp_path, plan_sha256=PLAN)
    assert found is not None
    assert found.round == 1
    assert load_last_whole(tmp_path, plan_sha256="f" * 64) is None


CRASH = """
import os, sys
from pathlib import Path
import numpy as np
from cytofed.server.checkpoints import Progress, save_progress

folder, where = Path(sys.argv[1]), sys.argv[2]
save_progress(folder, Progress(1, {"weights": np.ones(9, np.float32)}), plan_sha256="p")
kill = lambda *_: os.kill(os.getpid(), 9)
setattr(os, where, kill)  # the moment of the kill: nothing written, not on disk, not renamed
save_progress(folder, Progress(2, {"weights": np.full(9, 2, np.float32)}), plan_sha256="p")
"""


@pytest.mark.parametrize("moment", ["close", "fsync", "replace"])
def test_kill_in_the_middle_of_a_write_leaves_the_former(moment: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path), moment]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == -9
    found = load_progress(tmp_path, plan_sha256="p")
    assert found is not None
    assert found.round == 1
    assert found.state["weights"].tolist() == [1.0] * 9
    save_progress(tmp_path, Progress(2, found.state), plan_sha256="p")
    assert not list(tmp_path.glob(".*.part")), "the next write clears what the kill left"
