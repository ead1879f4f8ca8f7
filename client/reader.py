"""Find the cells of a data folder and what they are; decode one image. No pixels are kept here.

Layouts: class folders (with or without range folders below, as in the TCIA and Kaggle trees), one
flat folder with the class as file-name prefix, both at once (PBC), and a CSV of path and label.
The label is the nearest folder that the map knows, else the file-name prefix. Where both are
labels, an image gets the codes that both allow, and none in common is a conflict.

Shapes: N images, C classes.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from cytofed.errors import InputError
from cytofed.labels import LabelMap, Scheme, built_in_maps, identity_map, load_scheme

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"})
# Only these decoders see a lab's files: each more is one more parser of untrusted bytes.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
DEFAULT_SCHEME = "bone-marrow-21"
"""into which labels are read where no map says another"""
NOBODY = "none"
"""as ``patients``: the images say nothing of patients, whatever the columns of a CSV are called"""
MAX_FRAME_PX = 40_000_000  # a whole-slide image is not a single cell

_LARGE_PX = 4_000_000
_LARGE = threading.Lock()

_PLUGINS = (BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin)  # import registers
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
_LABEL_COLUMNS = ("label", "class", "code", "cell_type", "celltype", "category")
_PATIENT_COLUMN = re.compile(
    r"(patient(en|in)?|pat|subject|case|donor|person|individual|participant|proband(en)?|fall)s?"
    r"([ _.-]?(id|ids|identifier|no|nr|num|number|nummer|code|key|name|uid|uuid|hash|ref|pseudonym"
    r"|index))?|pid|mrn|pseudonym",
    re.IGNORECASE,
)
_RANGE_FOLDER = re.compile(r"\d+(\s*-\s*\d+)?")

Kind = Literal[
    "empty",  # zero bytes
    "text",  # text under the name of an image
    "truncated",
    "unreadable",
    "no memory",  # now; it is tried again the next time
    "missing",  # in the CSV, not on the disk
    "conflict",  # folder and prefix, or two CSV rows, say different things
    "no label",
    "no patient",
    "not listed",  # on the disk, not in the CSV
]


class UnreadableImage(InputError):
    """One file that is no usable image; quarantined by name, never a crash."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind: Kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Problem:
    """An image that is left out, and why."""

    path: str  # relative to the data folder
    kind: Kind
    detail: str


@dataclass(frozen=True)
class Listing:
    """The labelled images of one data folder, sorted by path; no pixels."""

    root: Path
    paths: tuple[str, ...]
    targets_NC: np.ndarray  # bool: the codes an image may have; one True is exact
    patients: tuple[str, ...] | None
    columns: Mapping[str, tuple[str, ...]]  # further columns of the CSV
    field_um: float | None
    absent: frozenset[str]
    excluded: Mapping[str, int]  # label -> images left out because the map says so
    problems: tuple[Problem, ...]
    map_name: str
    hidden: int = 0  # hidden files, skipped

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Sequence[int] | np.ndarray, problems: Iterable[Problem] = ()) -> Listing:
        """The given rows, and further problems."""
        picked = [int(row) for row in rows]
        return Listing(
            root=self.root,
            paths=tuple(self.paths[row] for row in picked),
            targets_NC=self.targets_NC[np.asarray(picked, dtype=np.int64)],
            patients=self.patients and tuple(self.patients[row] for row in picked),
            columns={
                name: tuple(values[row] for row in picked) for name, values in self.columns.items()
            },
            field_um=self.field_um,
            absent=self.absent,
            excluded=self.excluded,
            problems=(*self.problems, *problems),
            map_name=self.map_name,
            hidden=self.hidden,
        )


@dataclass(frozen=True)
class Found:
    """Image files below a folder, sorted; hidden ones only counted."""

    paths: tuple[str, ...]
    hidden: int


def find_images(root: Path) -> Found:
    """Every file below ``root`` with the ending of an image.

    A link to a folder is followed, unless that folder is below ``root`` (and found there) or above
    it. So whether a file is found depends on its own path, never on what else is there.
    Raises InputError when ``root`` is not a folder that can be read.
    """
    if not root.is_dir():
        raise InputError(f"no data folder {root}", hint="give an existing folder, or a CSV file")
    paths: list[str] = []
    hidden = 0
    home = Path(os.path.realpath(root))
    waiting: list[tuple[str, str, frozenset[tuple[int, int]]]] = [("", str(root), frozenset())]
    while waiting:
        prefix, folder, above = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in above:  # outside folders that link to each other
                continue
            above |= {(status.st_dev, status.st_ino)}
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_hidden = entry.name.startswith(".")
                    if entry.is_dir():
                        if not is_hidden and not (
                            entry.is_symlink() and _found_elsewhere(entry.path, home)
                        ):
                            waiting.append((f"{prefix}{entry.name}/", entry.path, above))
                    elif is_hidden:
                        hidden += 1
                    elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
                        paths.append(prefix + entry.name)
        except OSError as error:
            raise InputError(
                f"cannot read folder {folder}: {error.strerror}",
                hint="give the user that runs cytofed the right to read it",
            ) from error
    return Found(tuple(sorted(paths)), hidden)


def _found_elsewhere(link: str, home: Path) -> bool:
    """Whether a link leads to a folder that is found without it, or that holds all of these."""
    target = Path(os.path.realpath(link))
    return target.is_relative_to(home) or home.is_relative_to(target)


def list_cells(
    root: Path,
    scheme: Scheme,
    *,
    label_map: LabelMap | None = None,
    patients: str | None = None,
    alone: bool = False,
) -> Listing:
    """The labelled images of ``root``, a folder or a CSV file.

    ``label_map`` None: the built-in map of a known layout that knows all labels here.
    ``patients``: ``column:NAME`` of the CSV, ``folder:DEPTH`` (1 = the folders in ``root``) or
    ``name:REGEX`` on the file name (first group); None or ``none``: nobody says.
    ``alone``: nothing of a patient's images depends on another patient's, as differential privacy
    needs it: a row of a CSV is read by itself and its path taken as it stands (no search by file
    name), an image listed for two patients is each one's own, a label conflict is within a patient,
    a label that the map lacks is a problem of its images, not of the folder, and a folder of which
    nothing can be used is one of nobody: or it would show whether its last patient is there.

    Guarantees: every image file is a row, an excluded image, or a problem by name.
    Raises InputError for an unmapped label (with its count and the line to add), a wrong
    ``patients``, or a folder without images.
    """
    if label_map is not None and label_map.scheme != scheme.name:
        raise InputError(
            f"label map {label_map.name} is for scheme {label_map.scheme}, "
            f"the plan's scheme is {scheme.name}",
            hint="choose a map into the plan's scheme, or set labels.scheme",
        )
    patients = None if patients == NOBODY else patients
    candidates = _candidates(root, _table_of(root, alone), patients if alone else None, alone)
    if not candidates.rows and not candidates.problems and not alone:
        raise InputError(
            f"no images below {root}", hint=f"looked for {' '.join(sorted(ENDINGS))} and a CSV"
        )
    chosen, verdicts = _judged(candidates, [label_map] if label_map else _known_maps(scheme))
    if alone:
        verdicts = [_as_problem(verdict, chosen) for verdict in verdicts]
    else:
        _refuse_unmapped(verdicts, chosen, scheme, automatic=label_map is None)

    problems = list(candidates.problems)
    excluded: Counter[str] = Counter()
    kept: list[_Row] = []
    codes: list[tuple[str, ...]] = []
    for row, verdict in zip(candidates.rows, verdicts, strict=True):
        if verdict.problem is not None:
            problems.append(Problem(row.path, verdict.problem, verdict.detail))
        elif not verdict.codes:
            excluded[verdict.label] += 1
        else:
            kept.append(row)
            codes.append(verdict.codes)

    masks = {group: scheme.mask_C(group) for group in set(codes)}
    listing = Listing(
        root=candidates.root,
        paths=tuple(row.path for row in kept),
        targets_NC=np.array([masks[group] for group in codes], dtype=bool).reshape(
            len(codes), len(scheme.codes)
        ),
        patients=None,
        columns={
            name: tuple(row.columns[at] for row in kept)
            for at, name in enumerate(candidates.columns)
        },
        field_um=chosen.field_um,
        absent=chosen.absent,
        excluded=dict(sorted(excluded.items())),
        problems=tuple(sorted(problems, key=lambda problem: (problem.path, problem.kind))),
        map_name=chosen.name,
        hidden=candidates.hidden,
    )
    return listing if patients is None else _with_patients(listing, patients, chosen, alone)


def fitting_map(root: Path) -> str | None:
    """Name of the map, of those that ship, that knows the labels of ``root``; None: none does."""
    try:
        return list_cells(root, load_scheme(DEFAULT_SCHEME)).map_name
    except InputError:
        return None


def patient_columns(root: Path) -> tuple[str, ...]:
    """Columns of the CSV that labels ``root`` whose names say that they tell patients apart."""
    table = _table_of(root)
    header = table.header if table else ()
    return tuple(name for name in header if _PATIENT_COLUMN.fullmatch(name))


def refuse_unsaid_patients(root: Path, patients: str | None) -> None:
    """Raises InputError where ``root`` seems to name patients and nobody said what that is.

    Taken for images without patients it would be protected image by image, or by made-up patients.
    """
    if patients is None and (columns := patient_columns(root)):
        raise InputError(
            f'{root} has a column "{columns[0]}", and nothing says whether it names the patients',
            hint=f"--patients 'column:{columns[0]}', or --patients {NOBODY} where it does not",
        )


def load_rgb(data: bytes, *, at_least_px: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to RGB, whatever its mode; EXIF orientation is ignored.

    ``at_least_px``: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, not below this.
    Raises UnreadableImage, for any bytes whatsoever, and nothing else.
    """
    if not data:
        raise UnreadableImage("empty", "0 bytes")
    try:
        plain = _plain_jpeg(data, at_least_px)
        if plain is not None:
            return plain
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise anything on hostile bytes
        raise _reason(data, error) from error
    if image.width * image.height > MAX_FRAME_PX:
        raise UnreadableImage(
            "unreadable", f"{image.width}x{image.height} pixels are not a single cell"
        )
    # One large frame at a time: as many at once as there are threads would be gigabytes.
    room = _LARGE if image.width * image.height > _LARGE_PX else nullcontext()
    try:
        with room:
            if at_least_px is not None:
                image.draft("RGB", at_least_px)
            image.load()
            return _to_rgb(image)
    except Exception as error:
        raise _reason(data, error) from error


def _plain_jpeg(data: bytes, at_least_px: tuple[int, int] | None) -> Image.Image | None:
    """A whole JPEG of three components, None for all else; the same pixels as by Image.open.

    Pillow reads headers in Python, which takes nearly as long as decoding a small cell.
    """
    size = _jpeg_size(data)
    if size is None or size[0] * size[1] > MAX_FRAME_PX:
        return None
    scale = 1
    if at_least_px is not None:
        spare = min(size[0] // max(1, at_least_px[0]), size[1] // max(1, at_least_px[1]))
        scale = next((step for step in (8, 4, 2) if spare >= step), 1)
    scaled = (-(-size[0] // scale), -(-size[1] // scale))
    with suppress(ValueError):  # truncated or odd: Image.open says what it is
        return Image.frombytes("RGB", scaled, data, "jpeg", "RGB", "", scale, 0)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the frame header of an 8-bit JPEG of three components."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            bits, components = data[at + 4], data[at + 9]
            height, width = (int.from_bytes(data[at + k : at + k + 2]) for k in (5, 7))
            usual = bits == 8 and components == 3 and width > 0 and height > 0
            return (width, height) if usual else None
        if not 0xC4 <= marker <= 0xFE or marker in range(0xD0, 0xDB):  # no header segment
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # Bright field: what is transparent is glass, and glass is white.
        glass = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(glass, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(values_HW: np.ndarray) -> Image.Image:
    bands = [slice(start, start + 256) for start in range(0, len(values_HW), 256)]

    def band_of(rows: slice) -> np.ndarray:
        return np.nan_to_num(values_HW[rows].astype(np.float64), posinf=0.0, neginf=0.0)

    top = max((float(band_of(rows).max(initial=0.0)) for rows in bands), default=0.0)
    # The smallest range of a camera that holds the values: bright field has bright background.
    limit = next((2.0**bits - 1 for bits in (8, 12, 16, 32) if top < 2.0**bits), top)
    if top <= 1.0:
        limit = 1.0
    grey_HW = np.empty(values_HW.shape, np.uint8)
    for rows in bands:
        grey_HW[rows] = np.clip(band_of(rows) / limit * 255.0, 0, 255).round()
    return Image.fromarray(grey_HW).convert("RGB")


def _reason(data: bytes, error: Exception) -> UnreadableImage:
    if isinstance(error, MemoryError):
        return UnreadableImage("no memory", "to decode it takes more than there is")
    if _is_text(data):
        return UnreadableImage("text", "text under the name of an image")
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage("unreadable", "not a JPEG, PNG, TIFF or BMP")
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return UnreadableImage("truncated", text)
    return UnreadableImage("unreadable", text)


def _is_text(data: bytes) -> bool:
    try:
        head = data[:512].decode("utf-8", errors="strict" if len(data) <= 512 else "ignore")
    except UnicodeDecodeError:
        return False
    plain = sum(char.isprintable() or char in "\r\n\t" for char in head)
    return plain == len(head) and len(head.encode()) >= min(len(data), 512) - 3


# --- candidates: files, or rows of a CSV ----------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    path: str
    label: str | None = None  # from a CSV
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidates:
    root: Path
    rows: tuple[_Row, ...]
    columns: tuple[str, ...]
    problems: tuple[Problem, ...]
    hidden: int


@dataclass(frozen=True)
class _Table:
    path: Path
    header: tuple[str, ...]
    path_at: int
    label_at: int
    rows: tuple[tuple[str, ...], ...]


def _table_of(root: Path, alone: bool = False) -> _Table | None:
    """The CSV that labels ``root``, if there is one; abbreviations.csv has no path column."""
    if root.suffix.lower() == ".csv" and root.is_file():
        table = _read_table(root, alone)
        if table is None:
            raise InputError(
                f"{root.name} has no column of paths and labels",
                hint=f"name them {_PATH_COLUMNS[0]} and {_LABEL_COLUMNS[0]} in the first line",
            )
        return table
    if not root.is_dir():
        return None
    files = sorted(
        path
        for path in root.iterdir()
        if path.suffix.lower() == ".csv" and not path.name.startswith(".") and path.is_file()
    )
    tables = [table for file in files if (table := _read_table(file, alone)) is not None]
    if len(tables) > 1:
        names = " and ".join(table.path.name for table in tables)
        raise InputError(
            f"{names} in {root} both list paths and labels", hint="give the CSV itself as --data"
        )
    return tables[0] if tables else None


def _read_table(path: Path, alone: bool) -> _Table | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # Each line by itself: a name in another encoding must not change how others are spelled.
    texts = [
        _decoded(line) for line in data.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    ]
    delimiter = max(";,\t", key=(texts[0] if texts else "").count)
    try:
        lines = [*_rows(texts, delimiter, alone)]
    except csv.Error:
        return None
    if not lines:
        return None
    header = tuple(name.strip() for name in lines[0])
    folded = [name.casefold().replace(" ", "_") for name in header]
    path_at = next((folded.index(name) for name in _PATH_COLUMNS if name in folded), None)
    label_at = next((folded.index(name) for name in _LABEL_COLUMNS if name in folded), None)
    if path_at is None or label_at is None:
        return None
    width = len(header)
    rows = tuple(tuple(cell.strip() for cell in [*row, *[""] * width][:width]) for row in lines[1:])
    return _Table(path, header, path_at, label_at, rows)


def _rows(texts: Sequence[str], delimiter: str, alone: bool) -> Iterator[list[str]]:
    """The rows that are not empty. ``alone``: each line is one, whatever quotes it leaves open."""
    if not alone:
        yield from (row for row in csv.reader(texts, delimiter=delimiter) if any(row))
        return
    for text in texts:
        with suppress(csv.Error):  # too long for a row: its image is one that is not listed
            yield from (row for row in csv.reader([text], delimiter=delimiter) if any(row))


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _candidates(root: Path, table: _Table | None, patients: str | None, alone: bool) -> _Candidates:
    if table is None:
        found = find_images(root)
        return _Candidates(root, tuple(_Row(path) for path in found.paths), (), (), found.hidden)

    folder = table.path.parent
    found = find_images(folder)
    known = frozenset(found.paths)
    by_name: dict[str, list[str]] = {}
    for path in found.paths:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)

    others = [at for at in range(len(table.header)) if at not in (table.path_at, table.label_at)]
    whose_at = None
    if patients is not None and patients.startswith("column:"):
        name = patients.removeprefix("column:")
        whose_at = table.header.index(name) if name in table.header else None
    rows: dict[tuple[str, str], _Row] = {}  # by path and, where it matters, patient
    conflicts: set[tuple[str, str]] = set()
    problems: dict[tuple[str, str], Problem] = {}
    for cells in table.rows:
        given, label = cells[table.path_at], cells[table.label_at]
        if any(part.startswith(".") for part in PurePosixPath(os.path.normpath(given)).parts):
            continue  # hidden, like the files themselves
        found_path = _place(given, folder, known, {} if alone else by_name)
        if found_path is None:
            problems[given, "missing"] = Problem(given, "missing", f"in {table.path.name} only")
            continue
        path, key = found_path, (found_path, "" if whose_at is None else cells[whose_at])
        if key in rows and rows[key].label != (label or None):
            detail = f"{table.path.name} says {rows[key].label} and {label}"
            problems[path, "conflict"] = Problem(path, "conflict", detail)
            conflicts.add(key)
        elif not label:
            problems[path, "no label"] = Problem(path, "no label", f"empty in {table.path.name}")
        else:
            rows[key] = _Row(path, label, tuple(cells[at] for at in others))
    for key in conflicts:
        del rows[key]
    accounted = {path for path, _ in rows} | {path for path, _ in problems}
    for path in found.paths:
        if path not in accounted:
            problems[path, "not listed"] = Problem(path, "not listed", f"not in {table.path.name}")
    return _Candidates(
        root=folder,
        rows=tuple(rows[key] for key in sorted(rows)),
        columns=tuple(table.header[at] for at in others),
        problems=tuple(problems.values()),
        hidden=found.hidden,
    )


def _place(
    given: str, folder: Path, known: frozenset[str], by_name: Mapping[str, Sequence[str]]
) -> str | None:
    """Path in ``folder`` that a CSV cell means: as given, absolute, or a unique file name."""
    text = given.replace("\\", "/")
    if os.path.isabs(text):
        text = os.path.relpath(text, folder.resolve())
    text = os.path.normpath(text) if text else ""
    if text in known:
        return text
    same_name = by_name.get(PurePosixPath(text).name, [])
    if len(same_name) == 1 and "/" not in text:
        return same_name[0]
    return None


# --- labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    label: str
    codes: tuple[str, ...] = ()  # empty and no problem: excluded
    problem: Kind | None = None
    detail: str = ""
    unmapped: bool = False


def _as_problem(verdict: _Verdict, label_map: LabelMap) -> _Verdict:
    """An unmapped label as a problem of its own image."""
    if not verdict.unmapped:
        return verdict
    detail = f'label "{verdict.label}" is not in label map {label_map.name}'
    return _Verdict(verdict.label, problem="no label", detail=detail)


class _Judge:
    """Labels by one map; what a folder says is worked out once a folder."""

    def __init__(self, label_map: LabelMap, root: Path) -> None:
        self._map = label_map
        self._root_label = label_map.find(root.resolve().name)
        self._of_folder: dict[str, str | None] = {"": None}
        self._of_pair: dict[tuple[str | None, str | None], _Verdict] = {}
        # Longest first: MMY before MY. A label ends where the letters end: BA is not in BAND_1.
        labels = sorted(label_map.rules, key=len, reverse=True)
        self._prefix = re.compile(
            f"({'|'.join(map(re.escape, labels)) or '(?!)'})(?![^\\W\\d_])", re.IGNORECASE
        )

    def all(self, rows: Sequence[_Row]) -> list[_Verdict]:
        return [self._one(row) for row in rows]

    def _one(self, row: _Row) -> _Verdict:
        if row.label is not None:
            label = self._map.find(row.label)
            if label is None:
                return _Verdict(row.label, unmapped=True)
            return _Verdict(label, self._map.rules[label])
        folder, _, name = row.path.rpartition("/")
        by_folder = self._folder(folder)
        match = self._prefix.match(name)
        by_prefix = self._map.find(match[1]) if match else None
        if by_folder is None and by_prefix is None:
            by_folder = self._root_label
        if by_folder is None and by_prefix is None:
            plain = _plain_label(row.path)
            if plain is None:
                return _Verdict("", problem="no label", detail="neither folder nor name says one")
            return _Verdict(plain, unmapped=True)
        if (by_folder, by_prefix) not in self._of_pair:
            self._of_pair[by_folder, by_prefix] = self._pair(by_folder, by_prefix)
        return self._of_pair[by_folder, by_prefix]

    def _pair(self, by_folder: str | None, by_prefix: str | None) -> _Verdict:
        if by_folder is None or by_prefix is None:
            label = by_folder or by_prefix or ""
            return _Verdict(label, self._map.rules[label])
        outer, inner = self._map.rules[by_folder], self._map.rules[by_prefix]
        both = tuple(code for code in outer if code in inner)
        if not both and (outer or inner):
            detail = f"the folder says {by_folder}, the name says {by_prefix}"
            return _Verdict(by_folder, problem="conflict", detail=detail)
        return _Verdict(by_folder, both)

    def _folder(self, folder: str) -> str | None:
        if folder not in self._of_folder:
            above, _, name = folder.rpartition("/")
            self._of_folder[folder] = self._map.find(name) or self._folder(above)
        return self._of_folder[folder]


def _plain_label(path: str) -> str | None:
    """The label that an unknown layout most likely means: the class folder, else the prefix."""
    *folders, name = path.split("/")
    for folder in reversed(folders):
        if not _RANGE_FOLDER.fullmatch(folder):
            return folder
    match = re.match(r"[^\W\d_]+", name)
    return match[0] if match else None


def _known_maps(scheme: Scheme) -> list[LabelMap]:
    return [*built_in_maps(scheme.name), identity_map(scheme)]


def _judged(
    candidates: _Candidates, options: Sequence[LabelMap]
) -> tuple[LabelMap, list[_Verdict]]:
    """The map that leaves the fewest images without a label, and what it says; first of equals."""
    best: tuple[int, LabelMap, list[_Verdict]] | None = None
    for label_map in options:
        verdicts = _Judge(label_map, candidates.root).all(candidates.rows)
        misses = sum(verdict.unmapped or verdict.problem == "no label" for verdict in verdicts)
        if best is None or misses < best[0]:
            best = (misses, label_map, verdicts)
        if misses == 0:
            break
    assert best is not None
    return best[1], best[2]


def _refuse_unmapped(
    verdicts: Sequence[_Verdict], label_map: LabelMap, scheme: Scheme, *, automatic: bool
) -> None:
    counts = Counter(verdict.label for verdict in verdicts if verdict.unmapped)
    if not counts:
        if verdicts and all(verdict.problem == "no label" for verdict in verdicts):
            raise InputError(
                f"none of {len(verdicts)} images has a label",
                hint="put them into one folder a class, or add a CSV with path and label",
            )
        return
    (label, count), *others = counts.most_common()
    message = f'label "{label}" ({count} images) is not in label map {label_map.name}'
    message += f" (and {len(others)} more labels)" if others else ""
    known = any(not verdict.unmapped and verdict.problem is None for verdict in verdicts)
    for other in built_in_maps(scheme.name) if automatic and known else ():
        if all(other.find(name) for name in counts):
            raise InputError(
                message,
                hint=f"the folder mixes labels of {label_map.name} and {other.name}, whose scales "
                "may differ: give each source's folder as its own --data",
            )
    lines = [f'  "{name}": {_guess(name, scheme)}' for name, _ in counts.most_common(12)]
    if automatic:
        base = f"extends: {label_map.name}" if known and label_map.path else ""
        start = [base or f"scheme: {scheme.name}", "labels:"]
        hint = "write these lines, corrected, to a file and give it as --labels FILE:"
    else:
        start = ["labels:"]
        hint = f"add to {label_map.path or label_map.name}, corrected:"
    end = "  # or [CODE, CODE] for one of these, or excluded"
    raise InputError(message, hint="\n".join([hint, *start, *lines, end]))


def _guess(label: str, scheme: Scheme) -> str:
    """The code that ``label`` seems to mean, else the word CODE."""
    words = {code.casefold(): code for code in scheme.codes}
    words |= {name.casefold(): code for code, name in scheme.names.items()}
    plain = label.casefold().replace("_", " ").removesuffix("s")
    close = difflib.get_close_matches(plain, list(words), n=1, cutoff=0.75)
    return words[close[0]] if close else "CODE"


# --- patients -------------------------------------------------------------------------------------


def _with_patients(listing: Listing, spec: str, label_map: LabelMap, alone: bool) -> Listing:
    ids = _patient_of(listing, spec, label_map)
    missing = [row for row, patient in enumerate(ids) if not patient]
    if ids and len(missing) == len(ids) and not alone:
        raise InputError(
            f'--patients "{spec}" finds no patient in any of {len(ids)} images',
            hint=f"the first image is {listing.paths[0]}" if listing.paths else "",
        )
    problems = [Problem(listing.paths[row], "no patient", f"by {spec}") for row in missing]
    rows = [row for row, patient in enumerate(ids) if patient]
    kept = listing.take(rows, problems)
    return Listing(**{**vars(kept), "patients": tuple(ids[row] for row in rows)})


def _patient_of(listing: Listing, spec: str, label_map: LabelMap) -> list[str]:
    kind, _, value = spec.partition(":")
    readers: dict[str, Callable[[Listing, str, LabelMap], list[str]]] = {
        "column": _by_column,
        "folder": _by_folder,
        "name": _by_name,
    }
    if kind not in readers or not value:
        raise InputError(
            f'--patients "{spec}" is not understood',
            hint="column:NAME, folder:DEPTH or name:REGEX, as in name:'^([0-9]+)_'",
        )
    return readers[kind](listing, value, label_map)


def _by_column(listing: Listing, name: str, _: LabelMap) -> list[str]:
    if name not in listing.columns:
        columns = ", ".join(listing.columns)
        raise InputError(
            f'--patients: no column "{name}" in the data',
            hint=f"columns: {columns}" if columns else "only a CSV with path and label has columns",
        )
    return list(listing.columns[name])


def _by_folder(listing: Listing, depth_text: str, label_map: LabelMap) -> list[str]:
    if not depth_text.isdecimal() or int(depth_text) < 1:
        raise InputError(
            f'--patients "folder:{depth_text}": the depth is not a number from 1',
            hint="folder:1 takes the folders directly in the data folder",
        )
    depth = int(depth_text)
    folders = [path.split("/")[:-1] for path in listing.paths]
    ids = [parts[depth - 1] if len(parts) >= depth else "" for parts in folders]
    names = {name for name in ids if name}
    if (
        names
        and all(label_map.find(n) or _RANGE_FOLDER.fullmatch(n) for n in names)
        and any(label_map.find(n) for n in names)
    ):
        raise InputError(
            f"--patients folder:{depth}: these folders are classes, not patients "
            f"({', '.join(sorted(names)[:3])})",
            hint="give the depth of the patients' folders",
        )
    return ids


def _by_name(listing: Listing, pattern: str, _: LabelMap) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f'--patients "name:{pattern}": {error}', hint="a Python pattern"
        ) from error
    if regex.groups < 1:
        raise InputError(
            f'--patients "name:{pattern}" has no group',
            hint="put the part that names the patient in parentheses: name:'^([0-9]+)_'",
        )
    matches = [regex.search(path.rpartition("/")[2]) for path in listing.paths]
    return [(match[1] or "") if match else "" for match in matches]
