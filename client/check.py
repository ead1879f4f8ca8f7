"""``cytofed data check``: what a data folder holds, and what is wrong with it.

Every image is judged alone, never by comparison with others: under differential privacy, whether
one patient's image is used must not depend on another patient. (Duplicates are reported, nothing
is left out for them.)

Shapes: N images, H W pixels, P pairs.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from cytofed.client.cache import Progress, read_image_file, summaries, thread_count
from cytofed.client.reader import (
    FORMATS,
    Listing,
    Problem,
    UnreadableImage,
    list_cells,
    load_rgb,
)
from cytofed.labels import LabelMap, Scheme

if TYPE_CHECKING:
    from rich.console import Console

_THUMB_PX = 16
_EXAMPLES = 20


@dataclass(frozen=True)
class Suspect:
    """A decodable image that is visibly broken; used all the same."""

    path: str
    detail: str


@dataclass(frozen=True)
class Identifier:
    """One place where something like an identifier was found; values are never repeated."""

    where: str
    images: int
    examples: tuple[str, ...]  # paths, the first few


@dataclass(frozen=True)
class Patients:
    """How many patients, and how many cells each has."""

    count: int
    cells_min: int
    cells_median: float
    cells_max: int


@dataclass(frozen=True)
class DataReport:
    """What was found. images + excluded + problems on the disk + hidden = all image files."""

    root: str
    scheme: str
    label_map: str
    field_um: float | None
    images: int  # labelled and readable: what training sees, suspects included
    classes: Mapping[str, int]  # code -> exact images
    coarse: Mapping[str, int]  # "MMZ MYB PMO" -> images that are one of these
    excluded: Mapping[str, int]  # label -> images left out by the label map
    sizes: Mapping[str, int]  # "250x250" -> images
    quarantined: tuple[Problem, ...]  # left out, by name, with the reason
    hidden: int  # skipped
    suspects: tuple[Suspect, ...]
    exact_duplicates: tuple[tuple[str, ...], ...]  # groups of files with the same bytes
    near_duplicates: tuple[tuple[str, ...], ...]  # groups that look the same, exact ones left out
    mislabelled_duplicates: tuple[tuple[str, ...], ...]  # groups of either kind with two labels
    patients: Patients | None
    identifiers: tuple[Identifier, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def check_data(
    root: Path,
    scheme: Scheme,
    label_map: LabelMap | None = None,
    patients: str | None = None,
    *,
    progress: Progress | None = None,
) -> DataReport:
    """Read every image below ``root`` and report. Damaged files are findings, never errors.

    Raises InputError where no run could start: no images, an unmapped label, a wrong ``patients``.
    """
    listing = list_cells(root, scheme, label_map=label_map, patients=patients)
    looks: list[_Look | Problem] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(thread_count()) as pool:
        warnings.simplefilter("ignore")  # decoders warn of odd metadata
        for look in pool.map(lambda path: _look(listing.root, path), listing.paths):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(listing))
    rows = [row for row, look in enumerate(looks) if isinstance(look, _Look)]
    good = [look for look in looks if isinstance(look, _Look)]
    readable = listing.take(rows, [look for look in looks if isinstance(look, Problem)])
    exact, near = _duplicates(readable.paths, good)
    classes, coarse = _counts(readable, scheme)
    return DataReport(
        root=str(root),
        scheme=scheme.name,
        label_map=listing.map_name,
        field_um=listing.field_um,
        images=len(readable),
        classes=classes,
        coarse=coarse,
        excluded=listing.excluded,
        sizes=dict(Counter(f"{look.width}x{look.height}" for look in good).most_common()),
        quarantined=tuple(sorted(readable.problems, key=lambda problem: problem.path)),
        hidden=listing.hidden,
        suspects=tuple(
            Suspect(path, look.suspect)
            for path, look in zip(readable.paths, good, strict=True)
            if look.suspect
        ),
        exact_duplicates=exact,
        near_duplicates=near,
        mislabelled_duplicates=_mislabelled(readable, (*exact, *near)),
        patients=_patients(readable),
        identifiers=_identifiers(readable, good),
    )


# --- one image -----------------------------------------------------------------------------------


class _Look(NamedTuple):
    width: int
    height: int
    sha256: bytes
    dhash: int
    thumb_HW3: np.ndarray  # uint8, 16 x 16
    suspect: str  # "" = none
    metadata: tuple[str, ...]  # places that hold text


def _look(root: Path, path: str) -> _Look | Problem:
    try:
        _, data = read_image_file(f"{root}/{path}")
        image = load_rgb(data)
    except UnreadableImage as error:
        return Problem(path, error.kind, error.detail)
    try:
        return _looked_at(data, image)
    except MemoryError:
        return Problem(path, "no memory", "to look at it takes more than there is")


def _looked_at(data: bytes, image: Image.Image) -> _Look:
    pixels_HWC = np.asarray(image)
    small = image.resize((4 * _THUMB_PX, 4 * _THUMB_PX), Image.Resampling.BOX, reducing_gap=2.0)
    dhash_N, _ = summaries(np.asarray(small)[None])
    return _Look(
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256(data).digest(),
        dhash=int(dhash_N[0]),
        thumb_HW3=np.asarray(small.reduce(4)),
        suspect=visible_damage(pixels_HWC),
        metadata=tuple(text_in_metadata(data)),
    )


def visible_damage(pixels_HWC: np.ndarray) -> str:
    """Why an image looks broken, or "" when it does not; judged from this image alone.

    A damaged JPEG stream shifts or recolours all that follows, block by block, and so leaves steps
    of one pixel along a row or column. Optics cannot: a microscope's blur spreads every edge over
    several pixels. Counted are stretches of 8 pixels with such a step, on one line.
    """
    height, width, _ = pixels_HWC.shape
    if height < 24 or width < 24:
        return ""
    if int(pixels_HWC.max()) - int(pixels_HWC.min()) < 8:
        return "one colour all over"
    for lines_LSC, what in ((_across(pixels_HWC), "row"), (_down(pixels_HWC), "column")):
        steps_LS = _hard_steps(lines_LSC)
        line = int(steps_LS.sum(axis=1).argmax())
        found, possible = int(steps_LS[line].sum()), steps_LS.shape[1]
        if found >= max(6, 0.2 * possible):
            return f"torn at {what} {line + 2}: {found} of {possible} blocks do not fit"
    return ""


def _across(pixels_HWC: np.ndarray) -> np.ndarray:
    """Means of 8 pixels in a row: (rows, stretches, 3)."""
    width = pixels_HWC.shape[1] // 8 * 8
    # Slices: several times as fast as a mean over an inner axis.
    total = pixels_HWC[:, 0:width:8].astype(np.uint16)
    for at in range(1, 8):
        total += pixels_HWC[:, at:width:8]
    return total.astype(np.float32) / 8


def _down(pixels_HWC: np.ndarray) -> np.ndarray:
    """Means of 8 pixels in a column: (columns, stretches, 3)."""
    height = pixels_HWC.shape[0] // 8 * 8
    total = pixels_HWC[0:height:8].astype(np.uint16)
    for at in range(1, 8):
        total += pixels_HWC[at:height:8]
    return (total.astype(np.float32) / 8).transpose(1, 0, 2)


def _hard_steps(lines_LSC: np.ndarray) -> np.ndarray:
    """Bool (lines, stretches): a step of one pixel, far beyond the slope on either side."""
    slopes_LSC = np.abs(np.diff(lines_LSC, axis=0))
    around_LSC = np.maximum(slopes_LSC[:-2], slopes_LSC[2:])
    excess_LSC = slopes_LSC[1:-1] - 2 * around_LSC
    return np.asarray(
        (excess_LSC[..., 0] > 10) | (excess_LSC[..., 1] > 10) | (excess_LSC[..., 2] > 10)
    )


# --- identifiers ---------------------------------------------------------------------------------

# Tags that say how an image was made; every other tag with text in it is reported.
_TECHNICAL_TAGS = frozenset(
    {
        "Make",
        "Model",
        "Software",
        "ExifVersion",
        "FlashPixVersion",
        "ComponentsConfiguration",
        "InteroperabilityIndex",
        "InteroperabilityVersion",
        "JPEGTables",
        "InterColorProfile",
        "SceneType",
        "FileSource",
        "CFAPattern",
    }
)
_ENCODERS = re.compile(
    r"lead technologies|gd-jpeg|gimp|intel\(r\) jpeg|lavc|photoshop|imagemagick|graphicsmagick|"
    r"libjpeg|mozjpeg|opencv|handmade software|image alchemy|jpeg encoder|ijg|xv |pillow|matlab",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])([-_.])(?:0[1-9]|1[0-2])\2(?:19|20)?\d\d)(?!\d)"
)
# 15-48904.PB, S21-12345, 2021-00123: year and number, as laboratories count their cases.
_ACCESSION = re.compile(r"(?<!\d)(?:19|20)?\d\d[-/]\d{4,8}(?!\d)")
_DICOM_UID = re.compile(r"(?<![\d.])\d+(?:\.\d+){5,}")
_LONG_NUMBER = re.compile(r"\d{8,}")
_SEQUENCE = re.compile(r"[A-Za-z]+_\d{1,8}(\.\w+)?")  # BLA_00001.jpg, BA_24200302.jpg
_RANGE = re.compile(r"\d*01\s*-\s*\d*00")  # 1001-2000, a folder of the TCIA tree
_TELLING_COLUMN = re.compile(
    r"(first|last|sur|patient|full)[ _]?name|vorname|nachname|birth|geburt|\bdob\b|\bmrn\b|\bssn\b"
    r"|insur|versich|address|accession",
    re.IGNORECASE,
)


def text_in_metadata(data: bytes) -> Iterator[str]:
    """Places in an image file that hold text which is not merely an encoder's name."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            kind, info = image.format, {str(key): value for key, value in image.info.items()}
            tags = dict(_tags(image))
            app13 = "photoshop" in info
    except Exception:  # metadata may be as damaged as anything else
        yield "metadata that cannot be read"
        return
    for name, value in tags.items():
        if name not in _TECHNICAL_TAGS and _has_text(value):
            yield f"{'TIFF' if kind == 'TIFF' else 'EXIF'} {name}"
    if any(key.lower() in ("xmp", "xml:com.adobe.xmp", "raw profile type xmp") for key in info):
        yield "XMP"
    if app13:
        yield "IPTC (Photoshop block)"
    comment = info.get("comment")
    if comment and not _is_encoder(_text(comment)):
        yield "JPEG comment"
    if kind == "PNG":
        for key, value in info.items():
            if isinstance(value, str) and key.lower() not in ("software", "xml:com.adobe.xmp"):
                yield f"PNG text {key}"


def identifier_in_name(path: str) -> str:
    """What in a path looks like an identifier, or ""; plain sequence numbers do not."""
    for part in path.split("/"):
        if _RANGE.fullmatch(part):
            continue
        for pattern, what in (
            (_DICOM_UID, "DICOM UID"),
            (_ACCESSION, "accession number"),
            (_DATE, "date"),
            (_LONG_NUMBER, "long number"),
        ):
            plain = pattern is _LONG_NUMBER and _SEQUENCE.fullmatch(part)
            if pattern.search(part) and not plain:
                return what
    return ""


def _tags(image: Image.Image) -> Iterator[tuple[str, object]]:
    exif = image.getexif()
    for number, value in exif.items():
        yield ExifTags.TAGS.get(number, f"tag {number}"), value
    for block in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        for number, value in exif.get_ifd(block).items():
            names = ExifTags.GPSTAGS if block is ExifTags.IFD.GPSInfo else ExifTags.TAGS
            yield names.get(number, f"tag {number}"), value


def _has_text(value: object) -> bool:
    text = _text(value).strip("\0 \t\r\n")
    return bool(re.search(r"\w{2}", text)) and not _is_encoder(text)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""


def _is_encoder(text: str) -> bool:
    telling = any(p.search(text) for p in (_DATE, _ACCESSION, _DICOM_UID, _LONG_NUMBER))
    return bool(_ENCODERS.search(text)) and not telling


def _identifiers(listing: Listing, looks: Sequence[_Look]) -> tuple[Identifier, ...]:
    places: dict[str, list[str]] = defaultdict(list)
    for path, look in zip(listing.paths, looks, strict=True):
        for place in dict.fromkeys(look.metadata):
            places[place].append(path)
    for path in (*listing.paths, *(problem.path for problem in listing.problems)):
        what = identifier_in_name(path)
        if what:
            places[f"{what} in the path"].append(path)
    for column in listing.columns:
        if _TELLING_COLUMN.search(column):
            places[f'CSV column "{column}"'] = list(listing.paths)
    return tuple(
        Identifier(place, len(paths), tuple(paths[:_EXAMPLES])) for place, paths in places.items()
    )


# --- duplicates ----------------------------------------------------------------------------------


def near_duplicate_groups(
    dhash_N: np.ndarray,
    *,
    images: Callable[[np.ndarray], np.ndarray] | None = None,
    max_distance: int = 8,
    min_correlation: float = 0.93,
) -> np.ndarray:
    """Group number of each image; images that look the same have the same number.

    ``dhash_N``: uint64 difference hashes. Pairs within ``max_distance`` bits are candidates; with
    ``images`` (positions -> uint8 pixels, such as ``Cells.images``) a candidate counts when its
    16 x 16 miniatures correlate at least ``min_correlation``: hashes of cells on plain background
    collide. A group's number is the position of its first image.

    Guarantees: exact within ``max_distance``, whatever the order of the images.
    A field of view shifted by more than a few pixels is not found.
    """
    group_N = np.arange(len(dhash_N))
    pairs_P2 = _close_pairs(np.asarray(dhash_N, np.uint64), max_distance)
    if images is not None and len(pairs_P2):
        pairs_P2 = pairs_P2[_look_alike(pairs_P2, images, min_correlation)]
    for one, other in pairs_P2.tolist():
        a, b = sorted((_first(group_N, one), _first(group_N, other)))
        group_N[b] = a
    return np.array([_first(group_N, row) for row in range(len(group_N))], dtype=np.int64)


def _first(group_N: np.ndarray, row: int) -> int:
    while group_N[row] != row:
        group_N[row] = group_N[group_N[row]]
        row = int(group_N[row])
    return row


def _close_pairs(dhash_N: np.ndarray, max_distance: int) -> np.ndarray:
    """All pairs (int64 P2, i < j) within ``max_distance`` bits.

    Of b bands, one differs by at most one bit when the whole differs by less than 2b bits; so it is
    enough to compare images that agree in a band but for one bit.
    """
    count = len(dhash_N)
    bands = max_distance // 2 + 1
    edges = [band * 64 // bands for band in range(bands + 1)]
    found = [np.zeros((0, 2), np.int64)]
    for low, high in pairwise(edges):
        bits = high - low
        key_N = (dhash_N >> np.uint64(low)) & np.uint64(2**bits - 1)
        order_N = np.argsort(key_N, kind="stable")
        sorted_N = key_N[order_N]
        for flip in map(np.uint64, (0, *(1 << bit for bit in range(bits)))):
            wanted_N = sorted_N ^ flip
            start_N = np.searchsorted(sorted_N, wanted_N, "left")
            stop_N = np.searchsorted(sorted_N, wanted_N, "right")
            if flip == 0:
                start_N = np.arange(1, count + 1)  # partners behind this one
            else:
                stop_N = np.where((sorted_N & flip) > 0, start_N, stop_N)  # from one side only
            for i, j in _expand(start_N, stop_N):
                a, b = order_N[i], order_N[j]
                near = np.bitwise_count(dhash_N[a] ^ dhash_N[b]) <= max_distance
                pairs_P2 = np.stack([a[near], b[near]], axis=1)
                found.append(np.sort(pairs_P2, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _expand(
    start_N: np.ndarray, stop_N: np.ndarray, chunk: int = 2_000_000
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with start_N[i] <= j < stop_N[i], some millions at a time."""
    lengths_N = np.maximum(stop_N - start_N, 0)
    ends_N = np.cumsum(lengths_N)
    row = 0
    while row < len(start_N):
        before = int(ends_N[row - 1]) if row else 0
        until = max(row + 1, int(np.searchsorted(ends_N, before + chunk, "right")))
        lengths = lengths_N[row:until]
        i = np.repeat(np.arange(row, until), lengths)
        first = np.repeat(start_N[row:until] - (np.cumsum(lengths) - lengths), lengths)
        yield i, np.arange(len(i)) + first
        row = until


def _look_alike(
    pairs_P2: np.ndarray, images: Callable[[np.ndarray], np.ndarray], min_correlation: float
) -> np.ndarray:
    alike = np.zeros(len(pairs_P2), bool)
    for start in range(0, len(pairs_P2), 512):
        part = slice(start, start + 512)
        one, other = (_miniatures(images(pairs_P2[part, side])) for side in (0, 1))
        alike[part] = (one * other).sum(axis=1) >= min_correlation
    return alike


def _miniatures(pixels_NHWC: np.ndarray) -> np.ndarray:
    """16 x 16 block means, centred and scaled to length 1; float (N, 768)."""
    count, height, width, _ = pixels_NHWC.shape
    tops, lefts = (np.arange(_THUMB_PX) * length // _THUMB_PX for length in (height, width))
    sums = np.add.reduceat(pixels_NHWC.astype(np.float64), tops, axis=1)
    sums = np.add.reduceat(sums, lefts, axis=2)
    areas = np.outer(np.diff(tops, append=height), np.diff(lefts, append=width))
    flat = (sums / areas[:, :, None]).reshape(count, -1)
    flat -= flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9))


_Groups = tuple[tuple[str, ...], ...]


def _duplicates(paths: Sequence[str], looks: Sequence[_Look]) -> tuple[_Groups, _Groups]:
    if not looks:
        return (), ()
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for path, look in zip(paths, looks, strict=True):
        by_content[look.sha256].append(path)
    exact = tuple(tuple(group) for group in by_content.values() if len(group) > 1)

    thumbs_NHW3 = np.stack([look.thumb_HW3 for look in looks])
    dhash_N = np.array([look.dhash for look in looks], np.uint64)
    group_N = near_duplicate_groups(dhash_N, images=lambda index: thumbs_NHW3[index])
    by_group: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(group_N.tolist()):
        by_group[group].append(row)
    near = tuple(
        tuple(paths[row] for row in rows)
        for rows in by_group.values()
        if len({looks[row].sha256 for row in rows}) > 1
    )
    return exact, near


def _mislabelled(listing: Listing, groups: Iterable[tuple[str, ...]]) -> _Groups:
    row_of = {path: row for row, path in enumerate(listing.paths)}
    return tuple(
        group
        for group in groups
        if not listing.targets_NC[[row_of[path] for path in group]].all(axis=0).any()
    )


# --- counts --------------------------------------------------------------------------------------


def _counts(listing: Listing, scheme: Scheme) -> tuple[dict[str, int], dict[str, int]]:
    groups = Counter(
        " ".join(code for code, allowed in zip(scheme.codes, mask_C, strict=True) if allowed)
        for mask_C in listing.targets_NC.tolist()
    )
    exact = {code: groups[code] for code in scheme.codes if groups[code]}
    coarse = {group: count for group, count in sorted(groups.items()) if " " in group}
    return exact, coarse


def _patients(listing: Listing) -> Patients | None:
    if listing.patients is None:
        return None
    counts = sorted(Counter(listing.patients).values())
    if not counts:
        return Patients(0, 0, 0.0, 0)
    return Patients(len(counts), counts[0], float(np.median(counts)), counts[-1])


# --- for people ----------------------------------------------------------------------------------


def render(report: DataReport, console: Console) -> None:
    """The report as tables and lines; at most 20 names a finding, all are in ``--json``."""
    from rich.markup import escape
    from rich.table import Table

    def names(title: str, lines: Sequence[str], note: str = "") -> None:
        if lines:
            console.print(f"\n[bold]{title}: {len(lines)}[/bold]{f'  {note}' if note else ''}")
            for line in lines[:_EXAMPLES]:
                console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
            if len(lines) > _EXAMPLES:
                console.print(f"  and {len(lines) - _EXAMPLES} more: --json has all")

    scale = f"{report.field_um:g} um wide" if report.field_um else "field unknown: whole frame"
    console.print(
        f"[bold]{escape(report.root)}[/bold]: {report.images} usable images; labels by map "
        f"{report.label_map} into {report.scheme}; {scale}",
        soft_wrap=True,
    )
    table = Table("class", "images", box=None, padding=(0, 2))
    table.columns[1].justify = "right"
    for code, count in report.classes.items():
        table.add_row(code, str(count))
    for codes, count in report.coarse.items():
        table.add_row(f"one of {codes}", str(count))
    for label, count in report.excluded.items():
        table.add_row(f"{escape(label)} (excluded)", str(count), style="dim")
    console.print(table)
    sizes = [f"{size} ({count})" for size, count in report.sizes.items()]
    more = f" and {len(sizes) - 8} more" if len(sizes) > 8 else ""
    console.print(f"sizes: {', '.join(sizes[:8]) or 'none'}{more}")
    if report.patients is not None:
        of = report.patients
        console.print(
            f"patients: {of.count}, cells each: {of.cells_min} to {of.cells_max}, "
            f"median {of.cells_median:g}"
        )
    if report.hidden:
        console.print(f"hidden files skipped: {report.hidden}")

    names(
        "quarantined",
        [f"{p.path}: {p.kind}, {p.detail}" for p in report.quarantined],
        "left out of training",
    )
    names(
        "suspects",
        [f"{s.path}: {s.detail}" for s in report.suspects],
        "decodable but visibly broken; used, look at them",
    )
    names("groups of identical files", [" = ".join(g) for g in report.exact_duplicates])
    names(
        "groups of near duplicates",
        [" ~ ".join(group) for group in report.near_duplicates],
        "kept on one side of the test split",
    )
    names(
        "duplicates with different labels", [" / ".join(g) for g in report.mislabelled_duplicates]
    )
    names(
        "like identifiers",
        [
            f"{found.where}: {found.images} images, as {found.examples[0]}"
            for found in report.identifiers
        ],
        "nothing of it leaves this machine; better still, remove it",
    )
