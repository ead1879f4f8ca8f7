"""Arrays through shared memory: what goes in comes out, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from cytofed.messages import RAW, array_of
from cytofed.simulations import exchange
from cytofed.simulations.exchange import Slot, Slots, open_folder, pack, unpack

LARGE = 1 << 16
"""float32 values that do not go through the pipe itself"""


def content_of(**parts: npt.NDArray[Any]) -> RecordDict:
    record = ArrayRecord()
    for name, values in parts.items():
        raw = np.frombuffer(values.tobytes(), np.uint8).data
        record[name] = array_of(values.dtype.name, values.shape, RAW, raw)
    return RecordDict(
        {"header": ConfigRecord({"run": "r", "round": 3, "loss": 0.5}), "parts": record}
    )


def parts_of(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    return {
        name: np.frombuffer(array.data, array.dtype).reshape(array.shape)
        for name, array in cast(ArrayRecord, content["parts"]).items()
    }


def noise(size: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"weights": np.zeros(0, np.float32)},
        {"weights": noise(7)},
        {"weights": noise(LARGE), "control": noise(LARGE, 1)},
        {"confusion": np.arange(12).reshape(3, 4), "scalar": np.array(5)},
        {"weights": noise(LARGE), "bins": np.arange(6, dtype=np.int64).reshape(2, 3)},
    ],
    ids=["nothing", "empty", "small", "large", "shapes", "mixed"],
)
def test_content_comes_out_as_it_went_in(tmp_path: Path, parts: dict[str, Any]) -> None:
    content = content_of(**parts)
    again = unpack(pack(content, Slot(tmp_path / "slot")))
    assert again["header"] == content["header"]
    found = parts_of(again)
    assert list(found) == list(parts)
    for name, values in parts.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values)


def test_only_large_content_takes_a_file(tmp_path: Path) -> None:
    assert pack(content_of(weights=noise(100)), Slot(tmp_path / "small")).path is None
    assert pack(content_of(weights=noise(LARGE)), Slot(tmp_path / "large")).path
    assert [file.name for file in tmp_path.iterdir()] == ["large"]


def test_a_file_is_used_again_for_a_shorter_content(tmp_path: Path) -> None:
    pack(content_of(weights=noise(3 * LARGE)), Slot(tmp_path / "slot"))
    short = noise(2 * LARGE, 1)
    again = unpack(pack(content_of(weights=short), Slot(tmp_path / "slot")))
    assert np.array_equal(parts_of(again)["weights"], short)


def test_a_slot_comes_back_only_when_nothing_looks_at_its_content(tmp_path: Path) -> None:
    slots = Slots(tmp_path, keep_bytes=1 << 30)
    slot = slots.take()
    packed = pack(content_of(weights=noise(LARGE)), Slot(slot.path))
    part = parts_of(slots.lend(packed, slot))["weights"][5:10]
    other = slots.take()
    assert other is not slot
    assert np.array_equal(part, noise(LARGE)[5:10])
    del part
    assert slots.take() is slot


def test_a_slot_shows_what_was_written_last_also_where_that_is_longer(tmp_path: Path) -> None:
    slots = Slots(tmp_path, keep_bytes=1 << 30)
    for seed, size in enumerate([LARGE, LARGE, 4 * LARGE, 2 * LARGE]):
        slot = slots.take()
        packed = pack(content_of(weights=noise(size, seed)), Slot(slot.path))
        assert np.array_equal(parts_of(slots.lend(packed, slot))["weights"], noise(size, seed))
    assert len(list(tmp_path.iterdir())) == 1


def test_free_slots_keep_no_more_than_they_may(tmp_path: Path) -> None:
    limit = 3 * 4 * LARGE
    slots = Slots(tmp_path, keep_bytes=limit)
    contents = []
    for seed in range(6):
        slot = slots.take()
        packed = pack(content_of(weights=noise(LARGE, seed)), Slot(slot.path))
        contents.append(slots.lend(packed, slot))
    contents.clear()
    assert 0 < sum(file.stat().st_size for file in tmp_path.iterdir()) <= limit


def test_folders_of_dead_processes_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_base", lambda: tmp_path)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead = tmp_path / f"cytofed-{done.pid}-abc"
    others = [tmp_path / f"cytofed-{os.getpid()}-abc", tmp_path / "cytofed-x-abc", tmp_path / "x"]
    for folder in [dead, *others]:
        folder.mkdir()
        (folder / "slot-1").write_bytes(b"x")
    own = open_folder()
    assert own.parent == tmp_path
    assert sorted(tmp_path.iterdir()) == sorted([own, *others])
    assert own.stat().st_mode & 0o777 == 0o700
