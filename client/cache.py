"""Decode images once, at the plan's scale, into a memory-mapped file.

Two kinds of files lie in the cache folder, both private to the user (0600):

``<key>.cells``  the pixels of one selection of images; the key is the SHA-256 of the settings and
                 of every image's content, so a file never changes after it has its name.
``<key>.memo``   what is known of one data folder: the stat and SHA-256 of each file. It saves the
                 reading of unchanged files and can be lost at no cost.

Guarantees: a file appears under its name only when complete and on the disk (built aside, fsync,
rename), so a killed build leaves nothing half-valid, and two builds at once do no harm. A changed
file is noticed by size, mtime, ctime or inode; files younger than two seconds are read again.

Shapes: N images, H W pixels of the cell, B images of one chunk.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import numpy as np
import PIL
from PIL import Image, features

from cytofed.client.reader import MAX_FRAME_PX, Kind, Problem, UnreadableImage, load_rgb
from cytofed.errors import InputError

Progress = Callable[[int, int], None]  # images done, images in all

_VERSION = 2
_HEADER_BYTES = 4096  # one page: the pixels behind it are page-aligned
_CHUNK = 32  # images that a thread takes at once
_RACY_NS = 2_000_000_000  # a file this young may change again within the same time stamp
_KEEP_S = 30 * 24 * 3600  # cache files that nobody opened for so long are deleted
MAX_PART = 4.0
MAX_FILE_BYTES = 1 << 29


@dataclass(frozen=True)
class Framing:
    """How an image becomes a cell of ``size_px`` x ``size_px`` pixels.

    ``part``: side of the centred square that is kept, as a share of the frame's width; above 1 the
    frame is continued by reflection. None: the largest square of the frame.
    """

    size_px: int
    part: float | None = None

    def __post_init__(self) -> None:
        if not 16 <= self.size_px <= 1024:
            raise InputError(f"size_px {self.size_px} is not between 16 and 1024")
        if self.part is not None and not 0.02 <= self.part <= MAX_PART:
            raise InputError(
                f"the plan's field is {self.part:.3g} times the frame: not between .02 and "
                f"{MAX_PART:g}",
                hint="correct field_um in the label map, or labels.scale.field_um in the plan",
            )

    @property
    def digest(self) -> str:
        """Everything that decides the pixels besides the files' content."""
        versions = [_VERSION, PIL.__version__, features.version("libjpeg_turbo")]
        return json.dumps([*versions, self.size_px, self.part])


def framing(size_px: int, *, plan_um: float | None, source_um: float | None) -> Framing:
    """The framing that brings a source of known field to the plan's field.

    Where either field is unknown, the whole frame is used.
    """
    if plan_um is None or source_um is None:
        return Framing(size_px)
    return Framing(size_px, round(plan_um / source_um, 6))


@dataclass(frozen=True, eq=False)
class CellFile:
    """One open cache file; its rows are in the order of the selection it was made for."""

    path: Path
    pixels_NHWC: np.memmap  # uint8
    sha256_N32: np.ndarray  # uint8: SHA-256 of each image file
    dhash_N: np.ndarray  # uint64: difference hash
    background_N3: np.ndarray  # float32: bright end of the border's RGB, 0..255


@dataclass(frozen=True, eq=False)
class Cached:
    """The readable ones among the images asked for, and why the others are not."""

    file: CellFile
    rows: np.ndarray  # int64: positions in the paths asked for
    problems: tuple[Problem, ...]


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/cytofed``, else ``~/.cache/cytofed``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cytofed"


def decode_cell(data: bytes, frame: Framing) -> np.ndarray:
    """One image file as uint8 (H, W, 3) at the scale of ``frame``.

    Raises UnreadableImage and nothing else, whatever the bytes.
    """
    return _pixels(data, frame)


def open_cached(
    root: Path,
    paths: Sequence[str],
    frame: Framing,
    *,
    cache_dir: Path,
    progress: Progress | None = None,
    may_be_none: bool = False,
) -> Cached:
    """The cells of ``paths`` below ``root``, decoded now or taken from the cache.

    An unchanged folder costs one stat a file. Unreadable images become problems by name.
    Raises InputError when none is readable and there must be some, or the cache folder cannot be
    written or is full.
    """
    _make_private(cache_dir)
    memo_path = cache_dir / f"{_hex(str(root.resolve()), frame.digest)}.memo"
    memo = _load_memo(memo_path)
    facts = _recall(root, paths, memo)
    before = dict(facts)
    if memo.facts:  # else nothing is known, and hashing happens on the way of decoding
        _hash_unknown(root, paths, facts, memo)

    found = None
    if all(fact is not None for fact in facts.values()):
        found = _open_if_there(cache_dir / _name(facts, paths, frame))
    if found is None:
        donors = [_open_if_there(cache_dir / name) for name in memo.files]
        with warnings.catch_warnings():  # decoders warn of odd metadata; the pixels are what counts
            warnings.simplefilter("ignore")
            found = _build(
                root,
                paths,
                frame,
                facts,
                donors=[cells for cells in donors if cells is not None],
                cache_dir=cache_dir,
                progress=progress,
            )
        _prune(cache_dir, keep={found.path, memo_path})
    if facts != before or found.path.name not in memo.files:
        files = tuple(dict.fromkeys([found.path.name, *memo.files]))[:4]
        others = {
            path: fact
            for path, fact in memo.facts.items()
            if path not in facts and (root / path).exists()
        }
        known = {path: fact for path, fact in facts.items() if fact is not None}
        _save_memo(memo_path, _Memo({**others, **known}, files))
    os.utime(found.path)

    failed = {path: fact for path, fact in facts.items() if fact is not None and fact.problem}
    if len(failed) == len(paths) and not may_be_none:
        kind, detail = next(iter(failed.values())).problem or ("unreadable", "")
        raise InputError(
            f"none of {len(paths)} images below {root} is readable",
            hint=f"the first, {paths[0]}, is {kind}: {detail}" if paths else "",
        )
    return Cached(
        file=found,
        rows=np.array([row for row, path in enumerate(paths) if path not in failed], np.int64),
        problems=tuple(
            Problem(path, *fact.problem) for path, fact in failed.items() if fact and fact.problem
        ),
    )


def open_cell_file(path: Path) -> CellFile:
    """Map a cache file. Raises InputError when it is gone or not a complete cache file."""
    found = _open_if_there(path)
    if found is None:
        raise InputError(
            f"cache file {path} is gone or not complete", hint="run again: the cache is rebuilt"
        )
    return found


# --- pixels ---------------------------------------------------------------------------------------


def _pixels(data: bytes, frame: Framing) -> np.ndarray:
    # A JPEG decoder can halve on the way (fewer DCT coefficients, no aliasing): as good as a box
    # filter and faster than decoding in full. Never below the size that is needed.
    if frame.part is None:
        image = load_rgb(data, at_least_px=(frame.size_px, frame.size_px))
    else:
        image = load_rgb(data, at_least_px=(math.ceil(frame.size_px / frame.part), 1))
    try:
        # tobytes: half the time of numpy's array interface on small images
        flat = np.frombuffer(_cell(image, frame).tobytes(), np.uint8)
    except MemoryError:
        raise UnreadableImage("no memory", "to scale it takes more than there is") from None
    return flat.reshape(frame.size_px, frame.size_px, 3)


def _cell(image: Image.Image, frame: Framing) -> Image.Image:
    width, height = image.size
    side = float(min(width, height)) if frame.part is None else frame.part * width
    pad_x = max(0, math.ceil((side - width) / 2))
    pad_y = max(0, math.ceil((side - height) / 2))
    if pad_x or pad_y:
        wide, high = width + 2 * pad_x, height + 2 * pad_y
        if wide * high > MAX_FRAME_PX:
            raise UnreadableImage(
                "unreadable",
                f"{width}x{height} pixels are too narrow: the plan's field would be {wide}x{high}",
            )
        around = ((pad_y, pad_y), (pad_x, pad_x), (0, 0))
        image = Image.fromarray(np.pad(np.asarray(image), around, mode="reflect"))
        width, height = image.size
    left, top = (width - side) / 2, (height - side) / 2
    size = (frame.size_px, frame.size_px)
    if image.size == size and left == top == 0:
        return image
    box = (left, top, left + side, top + side)
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def summaries(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference hash (uint64 N) and background (float32 N3) of uint8 images of one size.

    The hash says of each of 8 x 8 blocks whether it is brighter than its left neighbour; the
    background is the 95th percentile of each channel in the outermost 1/32, 0..255: there glass is
    brighter than any cell, while a mean would follow the neighbours and with them the class.
    Guarantees: the same on every machine, as all sums are exact integers.
    """
    count, height, width, _ = pixels_NHWC.shape
    thick = max(1, min(height, width) // 32)
    tops, lefts = np.arange(9) * height // 8, np.arange(10) * width // 9
    # Sums over slices: ten times as fast as reduceat or a conversion of all to float.
    bands = [pixels_NHWC[:, a:b].sum(axis=1, dtype=np.uint16) for a, b in pairwise(tops)]
    bands_N8WC = np.stack(bands, axis=1)
    # Rec. 601 weights, as grey images are made everywhere; blocks in a row have equal heights.
    grey_WC9 = np.zeros((width, 3, 9))
    for block, (a, b) in enumerate(pairwise(lefts)):
        grey_WC9[a:b, :, block] = np.array([299, 587, 114])
    bands_N8X = bands_N8WC.reshape(count, 8, width * 3).astype(np.float64)
    grey_N89 = bands_N8X @ grey_WC9.reshape(width * 3, 9) / np.diff(lefts)
    bits_N64 = (grey_N89[:, :, 1:] > grey_N89[:, :, :-1]).reshape(count, 64)
    dhash_N = np.packbits(bits_N64, axis=1).view(">u8")[:, 0].astype(np.uint64)

    inner = slice(thick, -thick)
    sides = (
        pixels_NHWC[:, :thick].reshape(count, -1, 3),
        pixels_NHWC[:, -thick:].reshape(count, -1, 3),
        pixels_NHWC[:, inner, :thick].reshape(count, -1, 3),
        pixels_NHWC[:, inner, -thick:].reshape(count, -1, 3),
    )
    border_N3A = np.ascontiguousarray(np.concatenate(sides, axis=1).transpose(0, 2, 1))
    bright = border_N3A.shape[2] * 95 // 100
    border_N3A.partition(bright, axis=2)
    return dhash_N, border_N3A[:, :, bright].astype(np.float32)


# --- what is known of the files -------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    """One image file: its state when it was read, and either its hash or why it is unusable."""

    stat: tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode; zeros: read it again
    sha256: bytes
    problem: tuple[Kind, str] | None = None


@dataclass(frozen=True)
class _Memo:
    facts: Mapping[str, _Fact]
    files: tuple[str, ...]  # names of cache files of this folder, the newest first


_Facts = dict[str, _Fact | None]  # None: not known, the file has to be read


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _settled(stat: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """``stat``, or zeros when the file is so young that a next change could look the same."""
    return (0, 0, 0, 0) if max(stat[1], stat[2]) > time.time_ns() - _RACY_NS else stat


def _recall(root: Path, paths: Sequence[str], memo: _Memo) -> _Facts:
    facts: _Facts = {}
    base = os.fspath(root)
    for path in paths:
        fact = memo.facts.get(path)
        try:
            same = fact is not None and fact.stat == _state(os.stat(f"{base}/{path}"))
        except OSError:
            same = False
        facts[path] = fact if same else None
    return facts


def read_image_file(path: str) -> tuple[tuple[int, int, int, int], bytes]:
    """State and content; the state is taken first, so that a later change is seen as one.

    Raises UnreadableImage for what cannot be read, is no plain file, or is far too large for one.
    """
    try:
        # Opened without waiting: a pipe under the name of an image would never answer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("unreadable", "no file, under the name of an image")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableImage("unreadable", f"{status.st_size:,} bytes are no single cell")
            data = os.read(fd, status.st_size)
            while len(data) < status.st_size and (more := os.read(fd, status.st_size - len(data))):
                data += more
        finally:
            os.close(fd)
        return _state(status), data
    except FileNotFoundError as error:
        raise UnreadableImage("missing", "no such file") from error
    except OSError as error:
        raise UnreadableImage("unreadable", error.strerror or str(error)) from error
    except MemoryError:
        raise UnreadableImage("no memory", "to read it takes more than there is") from None


def _unread(error: UnreadableImage) -> _Fact:
    # Gone, forbidden or too large for this moment; it is looked at again the next time.
    return _Fact((0, 0, 0, 0), bytes(32), (error.kind, error.detail))


def _hash_unknown(root: Path, paths: Sequence[str], facts: _Facts, memo: _Memo) -> None:
    """Fill in the facts of touched files whose content is known to be readable or not."""
    seen = {fact.sha256: fact for fact in memo.facts.values() if any(fact.sha256)}

    def look(path: str) -> None:
        try:
            state, data = read_image_file(f"{root}/{path}")
        except UnreadableImage as error:
            facts[path] = _unread(error)
            return
        same = seen.get(hashlib.sha256(data).digest())
        if same is not None:
            facts[path] = _Fact(_settled(state), same.sha256, same.problem)

    unknown = [path for path in paths if facts[path] is None]
    with ThreadPoolExecutor(thread_count()) as pool:
        list(pool.map(look, unknown))


def _load_memo(path: Path) -> _Memo:
    empty = _Memo({}, ())
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            stat_N4, sha_N32 = archive["stat"], archive["sha256"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return empty  # lost or from another version: everything is read again
    names, problems = meta["paths"], {int(row): tuple(p) for row, p in meta["problems"].items()}
    if not len(names) == len(stat_N4) == len(sha_N32):
        return empty
    stats = map(tuple, stat_N4.tolist())
    shas = map(bytes, sha_N32)
    facts = {
        name: _Fact(stat, sha, problems.get(row))
        for row, (name, stat, sha) in enumerate(zip(names, stats, shas, strict=True))
    }
    return _Memo(facts, tuple(meta["files"]))


def _save_memo(path: Path, memo: _Memo) -> None:
    facts = list(memo.facts.values())
    problems = {row: fact.problem for row, fact in enumerate(facts) if fact.problem}
    meta = {"paths": list(memo.facts), "problems": problems, "files": memo.files}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        stat=np.array([fact.stat for fact in facts], np.int64).reshape(-1, 4),
        sha256=np.frombuffer(b"".join(fact.sha256 for fact in facts), np.uint8).reshape(-1, 32),
    )
    with _new_file(path.parent) as draft:
        _write_all(draft.fd, buffer.getvalue(), 0)
        draft.publish(path)


# --- cache files ----------------------------------------------------------------------------------


def _hex(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part)
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:40]


def _name(facts: _Facts, paths: Sequence[str], frame: Framing) -> str:
    shas = [fact.sha256 for fact in map(facts.get, paths) if fact and not fact.problem]
    return f"{_hex(frame.digest, b''.join(shas))}.cells"


def _open_if_there(path: Path) -> CellFile | None:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(_HEADER_BYTES).rstrip(b"\0"))
            count, size_px = int(header["images"]), int(header["size_px"])
            if header["version"] != _VERSION or os.fstat(file.fileno()).st_size != _file_bytes(
                count, size_px
            ):
                return None
            pixel_bytes = count * size_px * size_px * 3
            file.seek(_HEADER_BYTES + pixel_bytes)
            tail = file.read()
    except (OSError, ValueError, KeyError):
        return None
    shape = (count, size_px, size_px, 3)
    return CellFile(
        path=path,
        pixels_NHWC=np.memmap(path, np.uint8, mode="r", offset=_HEADER_BYTES, shape=shape)
        if count
        else cast(np.memmap, np.zeros(shape, np.uint8)),
        sha256_N32=np.frombuffer(tail, np.uint8, count * 32).reshape(count, 32),
        dhash_N=np.frombuffer(tail, "<u8", count, count * 32).astype(np.uint64),
        background_N3=np.frombuffer(tail, "<f4", count * 3, count * 40)
        .astype(np.float32)
        .reshape(count, 3),
    )


def _file_bytes(count: int, size_px: int) -> int:
    return _HEADER_BYTES + count * (size_px * size_px * 3 + 32 + 8 + 12)


class _Build:
    """The pass over all images; threads fill disjoint rows."""

    def __init__(
        self, root: Path, paths: Sequence[str], frame: Framing, facts: _Facts, fd: int
    ) -> None:
        count = len(paths)
        self.root, self.paths, self.frame, self.facts, self.fd = root, paths, frame, facts, fd
        self.row_bytes = frame.size_px**2 * 3
        self.sha256_N32 = np.zeros((count, 32), np.uint8)
        self.dhash_N = np.zeros(count, np.uint64)
        self.background_N3 = np.zeros((count, 3), np.float32)
        self.ready_N = np.zeros(count, bool)
        self.donors: dict[bytes, tuple[CellFile, int]] = {}

    def chunk(self, start: int) -> int:
        """Rows ``start`` and following; returns how many."""
        stop = min(start + _CHUNK, len(self.paths))
        size_px = self.frame.size_px
        pixels_BHWC = np.zeros((stop - start, size_px, size_px, 3), np.uint8)
        for at in range(stop - start):
            fact, data = self._fact(self.paths[start + at])
            if fact.problem is None:
                donor = self.donors.get(fact.sha256)
                if donor is not None:
                    cells, row = donor
                    pixels_BHWC[at] = cells.pixels_NHWC[row]
                else:
                    try:
                        pixels_BHWC[at] = _pixels(data, self.frame)
                    except UnreadableImage as error:
                        if error.kind == "no memory":
                            fact = _unread(error)
                        else:
                            fact = _Fact(fact.stat, fact.sha256, (error.kind, error.detail))
            self.facts[self.paths[start + at]] = fact
            self.sha256_N32[start + at] = np.frombuffer(fact.sha256, np.uint8)
            self.ready_N[start + at] = fact.problem is None
        self.dhash_N[start:stop], self.background_N3[start:stop] = summaries(pixels_BHWC)
        _write_all(self.fd, pixels_BHWC.data, _HEADER_BYTES + start * self.row_bytes)
        return stop - start

    def _fact(self, path: str) -> tuple[_Fact, bytes]:
        """What is known of an image, and its bytes unless they are not needed."""
        fact = self.facts[path]
        if fact is not None and (fact.problem or fact.sha256 in self.donors):
            return fact, b""
        try:
            state, data = read_image_file(f"{self.root}/{path}")
        except UnreadableImage as error:
            return _unread(error), b""
        return _Fact(_settled(state), hashlib.sha256(data).digest()), data

    def finish(self) -> int:
        """Close the gaps of unreadable images, add header and tail; returns the file's length."""
        rows = np.flatnonzero(self.ready_N)
        for to, row in enumerate(rows.tolist()):
            if to != row:
                data = os.pread(self.fd, self.row_bytes, _HEADER_BYTES + row * self.row_bytes)
                _write_all(self.fd, data, _HEADER_BYTES + to * self.row_bytes)
        header = {"version": _VERSION, "images": len(rows), "size_px": self.frame.size_px}
        tail = (
            self.sha256_N32[rows].tobytes()
            + self.dhash_N[rows].astype("<u8").tobytes()
            + self.background_N3[rows].astype("<f4").tobytes()
        )
        _write_all(self.fd, json.dumps(header).encode().ljust(_HEADER_BYTES, b"\0"), 0)
        _write_all(self.fd, tail, _HEADER_BYTES + len(rows) * self.row_bytes)
        return _file_bytes(len(rows), self.frame.size_px)


def _build(
    root: Path,
    paths: Sequence[str],
    frame: Framing,
    facts: _Facts,
    *,
    donors: Sequence[CellFile],
    cache_dir: Path,
    progress: Progress | None,
) -> CellFile:
    """Decode or copy all images; fills in ``facts``."""
    try:
        with _new_file(cache_dir) as draft:
            build = _Build(root, paths, frame, facts, draft.fd)
            for cells in donors:
                for row, sha in enumerate(map(bytes, cells.sha256_N32)):
                    build.donors.setdefault(sha, (cells, row))
            # Reserve the room first: a full disk is an error here, not a crash in the middle.
            os.posix_fallocate(build.fd, 0, _file_bytes(max(1, len(paths)), frame.size_px))
            done = 0
            pool = ThreadPoolExecutor(thread_count())
            try:
                starts = range(0, len(paths), _CHUNK)
                for future in as_completed([pool.submit(build.chunk, start) for start in starts]):
                    done += future.result()
                    if progress is not None:
                        progress(done, len(paths))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            os.ftruncate(draft.fd, build.finish())
            path = cache_dir / _name(facts, paths, frame)
            draft.publish(path)
    except OSError as error:
        raise InputError(
            f"cannot write the image cache in {cache_dir}: {error.strerror or error}",
            hint=f"it needs {_file_bytes(len(paths), frame.size_px) / 1e6:.0f} MB; "
            "another disk: set XDG_CACHE_HOME",
        ) from error
    return open_cell_file(path)


@dataclass(frozen=True)
class _Draft:
    fd: int
    path: Path

    def publish(self, path: Path) -> None:
        """Give the complete file its name, after it is on the disk."""
        os.fsync(self.fd)
        os.replace(self.path, path)


@contextmanager
def _new_file(folder: Path) -> Iterator[_Draft]:
    fd, name = tempfile.mkstemp(dir=folder, suffix=".tmp")  # 0600
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # ends with the process: an unlocked draft is an orphan
        yield _Draft(fd, Path(name))
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(name)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _make_private(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the cache folder {cache_dir}: {error.strerror}",
            hint="another disk: set XDG_CACHE_HOME",
        ) from error


def _prune(cache_dir: Path, *, keep: set[Path]) -> None:
    """Delete what nobody opened for a month, and drafts of killed builds."""
    for path in cache_dir.iterdir():
        with suppress(OSError):
            if path.suffix == ".tmp" and time.time() - path.stat().st_mtime > 60:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody builds
                    path.unlink()
            old = time.time() - path.stat().st_mtime > _KEEP_S
            if path.suffix in (".cells", ".memo", ".features") and path not in keep and old:
                path.unlink()


def thread_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
