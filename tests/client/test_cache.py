"""The cache is right whatever happens to the files or to the process that builds it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytofed.client import cache
from cytofed.client.cache import Framing, decode_cell, framing, open_cached, summaries
from cytofed.errors import InputError

FRAME = Framing(32, 1.0)


@pytest.fixture
def folder(sample: Path, tmp_path: Path) -> Path:
    """Twelve images of the sample, old enough for their time stamps to be trusted."""
    root = tmp_path / "images"
    root.mkdir()
    for path in sorted((sample / "marrow" / "BLA").iterdir())[:12]:
        shutil.copyfile(path, root / path.name)
        age(root / path.name, 3600)
    return root


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def pixels(root: Path, frame: Framing = FRAME) -> np.ndarray:
    """What the cache must hold: every readable image decoded afresh."""
    kept = []
    for name in names(root):
        try:
            kept.append(decode_cell((root / name).read_bytes(), frame))
        except InputError:
            continue
    return np.stack(kept)


def decoded(
    root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, frame: Framing = FRAME
) -> tuple[np.ndarray, int]:
    """Pixels by the cache, and how many images were decoded for them."""
    count = 0
    real = cache._pixels

    def counting(data: bytes, frame: Framing) -> np.ndarray:
        nonlocal count
        count += 1
        return real(data, frame)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_pixels", counting)
        found = open_cached(root, names(root), frame, cache_dir=cache_dir)
    return np.array(found.file.pixels_NHWC), count


def test_second_opening_decodes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, count = decoded(folder, tmp_path / "c", monkeypatch)
    assert count == 12
    assert np.array_equal(first, pixels(folder))
    second, count = decoded(folder, tmp_path / "c", monkeypatch)
    assert count == 0
    assert np.array_equal(second, first)


@pytest.mark.parametrize("change", ["edit", "same size", "add", "remove", "touch", "swap"])
def test_every_change_is_noticed_and_only_what_is_new_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    decoded(folder, tmp_path / "c", monkeypatch)
    one, other = (folder / name for name in names(folder)[:2])
    new = io.BytesIO()
    Image.fromarray(255 - decode_cell(one.read_bytes(), FRAME)).save(new, "PNG")
    times = (one.stat().st_atime_ns, one.stat().st_mtime_ns)
    expected = 1
    if change == "edit":
        one.write_bytes(new.getvalue())
    elif change == "same size":  # and the old time: only ctime tells
        one.write_bytes(new.getvalue().ljust(one.stat().st_size, b"\0")[: one.stat().st_size])
        os.utime(one, ns=times)
    elif change == "add":
        (folder / "new.png").write_bytes(new.getvalue())
    else:
        expected = 0
        if change == "remove":
            one.unlink()
        elif change == "touch":
            one.touch()
        else:
            one.rename(folder / "x")
            other.rename(one)
            (folder / "x").rename(other)
    found, count = decoded(folder, tmp_path / "c", monkeypatch)
    assert np.array_equal(found, pixels(folder))
    assert count == expected


def test_a_young_file_that_changes_within_one_time_stamp_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (folder / name for name in names(folder)[:2])
    one.write_bytes(one.read_bytes())  # written now
    decoded(folder, tmp_path / "c", monkeypatch)
    status = one.stat()
    monkeypatch.setattr(
        cache,
        "_state",
        lambda new: cache_state(status) if new.st_ino == status.st_ino else cache_state(new),
    )
    one.write_bytes(other.read_bytes())  # and again, looking the same to stat
    found, _ = decoded(folder, tmp_path / "c", monkeypatch)
    assert np.array_equal(found, pixels(folder))


cache_state = cache._state


def test_other_scale_is_another_file_and_does_not_disturb_the_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _ = decoded(folder, tmp_path / "c", monkeypatch)
    large, count = decoded(folder, tmp_path / "c", monkeypatch, Framing(48, 0.5))
    assert count == 12
    assert np.array_equal(large, pixels(folder, Framing(48, 0.5)))
    again, count = decoded(folder, tmp_path / "c", monkeypatch)
    assert count == 0
    assert np.array_equal(again, small)


def test_unusable_files_are_problems_by_name_and_leave_no_gap(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = names(folder)
    (folder / first).write_bytes(b"")
    (folder / last).write_bytes((folder / last).read_bytes()[:1000])
    (folder / "note.jpg").write_text("text")
    for _ in range(2):
        found = open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
        assert {(p.path, p.kind) for p in found.problems} == {
            (first, "empty"),
            (last, "truncated"),
            ("note.jpg", "text"),
        }
        assert [names(folder)[row] for row in found.rows] == names(folder)[1:11]
        assert np.array_equal(found.file.pixels_NHWC, pixels(folder))
        _, count = decoded(folder, tmp_path / "c", monkeypatch)
        assert count == 0


@pytest.mark.parametrize("size", [(20_000, 1), (6000, 30)])
def test_a_narrow_frame_of_known_field_is_not_continued_to_gigabytes(
    folder: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Both are a few kilobytes; as squares of their width's field they would be up to 16 GB."""
    Image.new("RGB", size, "pink").save(folder / "narrow.png")
    frame = framing(48, plan_um=40.0, source_um=10.0)
    tracemalloc.start()
    found = open_cached(folder, names(folder), frame, cache_dir=tmp_path / "c")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(p.path, p.kind) for p in found.problems] == [("narrow.png", "unreadable")]
    assert "too narrow" in found.problems[0].detail
    assert len(found.rows) == 12
    assert peak_bytes < 200e6


def test_an_image_that_memory_does_not_hold_is_left_out_by_name_and_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = Image.new("RGB", (50, 70), "pink")
    big.save(folder / "big.png")
    real = cache._cell

    def full(image: Image.Image, frame: Framing) -> Image.Image:
        if image.size == big.size:
            raise MemoryError
        return real(image, frame)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_cell", full)
        found = open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
    assert [(p.path, p.kind) for p in found.problems] == [("big.png", "no memory")]
    assert len(found.rows) == 12
    assert not open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c").problems


def test_a_pipe_and_an_endless_file_are_problems_by_name(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "endless.jpg").open("wb") as file:
        file.truncate(1 << 40)
    found = open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
    assert {p.path for p in found.problems} == {"pipe.jpg", "endless.jpg"}
    assert len(found.rows) == 12


def test_a_missing_file_is_a_problem_and_is_taken_when_it_comes_back(
    folder: Path, tmp_path: Path
) -> None:
    paths = [*names(folder), "gone.jpg"]
    for _ in range(2):
        found = open_cached(folder, paths, FRAME, cache_dir=tmp_path / "c")
        assert [(p.path, p.kind) for p in found.problems] == [("gone.jpg", "missing")]
    shutil.copyfile(folder / paths[0], folder / "gone.jpg")
    assert not open_cached(folder, paths, FRAME, cache_dir=tmp_path / "c").problems


def test_nothing_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("text")
    with pytest.raises(InputError, match="none of 1 images"):
        open_cached(tmp_path, ["x.jpg"], FRAME, cache_dir=tmp_path / "c")


def test_cache_is_private_to_the_user(folder: Path, tmp_path: Path) -> None:
    open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "a" / "c")
    assert stat.S_IMODE((tmp_path / "a" / "c").stat().st_mode) == 0o700
    files = list((tmp_path / "a" / "c").iterdir())
    assert {path.suffix for path in files} == {".cells", ".memo"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


@pytest.mark.parametrize("suffix", [".cells", ".memo"])
@pytest.mark.parametrize("damage", ["cut", "gone", "rubbish"])
def test_a_damaged_cache_file_is_built_anew(
    folder: Path, tmp_path: Path, suffix: str, damage: str
) -> None:
    open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
    (path,) = (tmp_path / "c").glob(f"*{suffix}")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else os.urandom(100))
    found = open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
    assert np.array_equal(found.file.pixels_NHWC, pixels(folder))


BUILD = """
import sys
from pathlib import Path
from cytofed.client import cache
root, cache_dir = Path(sys.argv[1]), Path(sys.argv[2])
real = cache._pixels
def slow(data, frame):
    print(".", flush=True)
    import time; time.sleep(0.02)
    return real(data, frame)
cache._pixels = slow
cache._CHUNK = 1
cache.open_cached(root, sorted(p.name for p in root.iterdir()), cache.Framing(32, 1.0),
                  cache_dir=cache_dir)
"""


def test_a_killed_build_leaves_nothing_half_valid(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", BUILD, str(folder), str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as build:
        assert build.stdout is not None
        for _ in range(5):
            build.stdout.readline()
        build.send_signal(signal.SIGKILL)
    (draft,) = (tmp_path / "c").iterdir()
    assert draft.suffix == ".tmp"
    age(draft, 120)
    found, count = decoded(folder, tmp_path / "c", monkeypatch)
    assert count == 12
    assert np.array_equal(found, pixels(folder))
    assert not draft.exists()  # the orphan is cleared away


def test_two_builds_at_once_do_no_harm(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(folder), str(tmp_path / "c")]
    builds = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [build.wait(60) for build in builds] == [0, 0]
    (path,) = (tmp_path / "c").glob("*.cells")
    assert np.array_equal(cache.open_cell_file(path).pixels_NHWC, pixels(folder))


def test_an_interrupted_build_leaves_no_draft(folder: Path, tmp_path: Path) -> None:
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c", progress=stop)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_input_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cache folder") as caught:
        open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "file" / "c")
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_what_nobody_opened_for_a_month_is_deleted(folder: Path, tmp_path: Path) -> None:
    open_cached(folder, names(folder), Framing(64), cache_dir=tmp_path / "c")
    for path in (tmp_path / "c").iterdir():
        age(path, 31 * 24 * 3600)
    open_cached(folder, names(folder), FRAME, cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_progress_counts_every_image(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_cached(
        folder,
        names(folder),
        FRAME,
        cache_dir=tmp_path / "c",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (12, 12)


# --- framing -----------------------------------------------------------------------------------


def disc(size: int, diameter: float) -> bytes:
    """A dark disc on white, as a PNG."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    grey = np.where(np.hypot(x, y) < diameter / 2, 60, 250).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "field_um"), [(128, 21.6), (250, 21.6), (360, 36.0), (128, 36.0), (100, 14.4)]
)
def test_a_cell_has_the_same_size_from_every_source(size: int, field_um: float) -> None:
    data = disc(size, diameter=6.0 / field_um * size)  # a cell of 6 um
    frame = framing(64, plan_um=21.6, source_um=field_um)
    dark = decode_cell(data, frame)[:, :, 0] < 155
    assert 2 * np.sqrt(dark.sum() / np.pi) == pytest.approx(6.0 / 21.6 * 64, rel=0.03)
    assert not dark[0].any()


def test_unknown_field_keeps_the_whole_frame() -> None:
    assert framing(64, plan_um=21.6, source_um=None).part is None
    assert framing(64, plan_um=None, source_um=21.6).part is None
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 8:52] = 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    square = decode_cell(buffer.getvalue(), Framing(16)).astype(int)  # the largest one
    assert np.abs(square - 200).max() < 15


def test_a_field_far_beyond_the_frame_is_refused() -> None:
    with pytest.raises(InputError, match="field"):
        framing(64, plan_um=200.0, source_um=21.6)


def test_half_size_decoding_is_close_to_full_decoding(sample: Path) -> None:
    for path in sorted((sample / "marrow" / "EOS").iterdir())[:8]:
        with Image.open(path) as image:
            full = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        difference = decode_cell(path.read_bytes(), Framing(64, 1.0)).astype(float)
        difference -= np.asarray(full)
        assert np.sqrt((difference**2).mean()) < 4
        assert abs(difference.mean()) < 0.5


# --- summaries ---------------------------------------------------------------------------------


def test_background_is_the_glass_at_the_border_whatever_cells_touch_it() -> None:
    pixels_NHWC = np.full((2, 64, 64, 3), 200, np.uint8)
    pixels_NHWC[:, 2:-2, 2:-2] = 250  # what is inside does not count
    pixels_NHWC[1, :, :20] = 90  # a neighbour cell that covers a part of the border
    _, background_N3 = summaries(pixels_NHWC)
    assert np.array_equal(background_N3, np.full((2, 3), 200, np.float32))


@pytest.mark.parametrize("size", [16, 50, 64, 224])
def test_difference_hash_survives_brightness_and_not_a_flip(size: int) -> None:
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    dhash_N, _ = summaries(np.stack([image, image // 2 + 40, image[:, ::-1]]))
    distances = np.bitwise_count(dhash_N ^ dhash_N[0])
    assert distances[1] <= 3
    assert distances[2] > 12
