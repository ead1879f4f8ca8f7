"""The cells that training, partitions and evaluation see: a selection over cached folders.

Selections are cheap: pixels stay in the memory-mapped cache files until a batch asks for them.

Shapes: N images, B images of a batch, C classes, H W pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cytofed.client.cache import Progress, framing, open_cached, open_cell_file
from cytofed.client.reader import Listing, Problem, list_cells
from cytofed.errors import InputError
from cytofed.files import write_atomically
from cytofed.labels import LabelMap, Scheme


@dataclass(frozen=True, eq=False)
class Source:
    """One cached data folder; row i of every array is image i of the listing."""

    listing: Listing  # readable images only; the others are its problems
    pixels_NHWC: np.memmap  # uint8
    dhash_N: np.ndarray  # uint64
    background_N3: np.ndarray  # float32, 0..255: RGB of the glass at the border
    file: Path  # the cache file


@dataclass(frozen=True, eq=False)
class Cells:
    """A selection of images over one or several sources."""

    sources: tuple[Source, ...]
    source_N: np.ndarray  # int16: which source
    row_N: np.ndarray  # int32: which row of it
    targets_NC: np.ndarray  # bool: the codes an image may have
    patients_N: np.ndarray | None  # str; over several sources "<source>:<patient>"
    size_px: int

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def as_cached(self) -> bool:
        """Whether ``images`` are those of the cache files, unchanged."""
        return True

    def take(self, index: np.ndarray) -> Cells:
        """The images at ``index`` (positions or a bool mask), in that order."""
        return Cells(
            sources=self.sources,
            source_N=self.source_N[index],
            row_N=self.row_N[index],
            targets_NC=self.targets_NC[index],
            patients_N=None if self.patients_N is None else self.patients_N[index],
            size_px=self.size_px,
        )

    def images(self, index: np.ndarray) -> np.ndarray:
        """Pixels at ``index``: a fresh, contiguous uint8 array (B, H, W, 3)."""
        rows_B = self.row_N[index]
        if len(self.sources) == 1:
            pixels_NHWC: np.ndarray = np.asarray(self.sources[0].pixels_NHWC)
            return np.asarray(np.take(pixels_NHWC, rows_B, axis=0))
        source_B = self.source_N[index]
        pixels_BHWC = np.empty((len(rows_B), self.size_px, self.size_px, 3), np.uint8)
        for number in np.unique(source_B).tolist():
            at = np.flatnonzero(source_B == number)
            pixels_BHWC[at] = np.asarray(self.sources[number].pixels_NHWC)[rows_B[at]]
        return pixels_BHWC

    def paths(self) -> list[str]:
        """Path of each image, relative to its data folder."""
        pairs = zip(self.source_N.tolist(), self.row_N.tolist(), strict=True)
        return [self.sources[number].listing.paths[row] for number, row in pairs]

    def file_sha256(self) -> list[str]:
        """Hex SHA-256 of each image's file."""
        hashes = [open_cell_file(source.file).sha256_N32 for source in self.sources]
        pairs = zip(self.source_N.tolist(), self.row_N.tolist(), strict=True)
        return [hashes[source][row].tobytes().hex() for source, row in pairs]

    def own_patients(self) -> list[str]:
        """Each image's patient as its own folder names it, whatever other folders there are."""
        assert self.patients_N is not None
        names = self.patients_N.tolist()
        return names if len(self.sources) == 1 else [name.partition(":")[2] for name in names]

    def column(self, name: str) -> np.ndarray:
        """Text of a CSV column, "" for sources without it; InputError when none has it."""
        if not any(name in source.listing.columns for source in self.sources):
            known = sorted({column for s in self.sources for column in s.listing.columns})
            raise InputError(
                f'no column "{name}" in the data',
                hint=f"columns: {', '.join(known)}" if known else "only a CSV has columns",
            )
        texts = [
            np.array(source.listing.columns.get(name, [""] * len(source.listing)), dtype=str)
            for source in self.sources
        ]
        return self._gather(texts)

    @property
    def dhash_N(self) -> np.ndarray:
        """uint64 difference hash of each frame."""
        return self._gather([source.dhash_N for source in self.sources])

    @property
    def background_N3(self) -> np.ndarray:
        """float32 RGB of the glass at each frame's border, 0..255."""
        return self._gather([source.background_N3 for source in self.sources])

    @property
    def exact_N(self) -> np.ndarray:
        """bool: exactly one class is possible."""
        return np.asarray(self.targets_NC.sum(axis=1) == 1)

    @property
    def class_N(self) -> np.ndarray:
        """int64 class of exact images, -1 where the label is a coarse set."""
        return np.where(self.exact_N, self.targets_NC.argmax(axis=1), -1)

    def save(self, path: Path) -> None:
        """Write a description that :func:`load_cells` opens without walking any folder.

        It holds file names and patients, no pixels: readable by this user only.
        """
        meta = {
            "size_px": self.size_px,
            "sources": [_source_meta(source) for source in self.sources],
        }
        arrays = {
            f"targets_{number}": source.listing.targets_NC
            for number, source in enumerate(self.sources)
        }
        if self.patients_N is not None:
            arrays["patients"] = self.patients_N
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            source=self.source_N,
            row=self.row_N,
            targets=self.targets_NC,
            **arrays,
        )
        write_atomically(path, buffer.getvalue(), mode=0o600)

    def _gather(self, values: Sequence[np.ndarray]) -> np.ndarray:
        starts = np.cumsum([0, *map(len, values[:-1])])
        return np.asarray(np.concatenate(values)[starts[self.source_N] + self.row_N])


def load_cells(path: Path) -> Cells:
    """The selection that :meth:`Cells.save` wrote; the pixel files are mapped, nothing is read.

    Raises InputError when a cache file is gone since.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"cannot read the saved selection {path}: {error}") from error
    meta = json.loads(arrays["meta"].tobytes())
    return Cells(
        sources=tuple(
            _source(item, arrays[f"targets_{number}"])
            for number, item in enumerate(meta["sources"])
        ),
        source_N=arrays["source"],
        row_N=arrays["row"],
        targets_NC=arrays["targets"],
        patients_N=arrays.get("patients"),
        size_px=meta["size_px"],
    )


def open_cells(
    roots: Sequence[Path],
    scheme: Scheme,
    *,
    maps: Sequence[LabelMap | None] | None = None,
    patients: str | None = None,
    size_px: int,
    field_um: float | None,
    cache_dir: Path,
    progress: Progress | None = None,
    alone: bool = False,
) -> Cells:
    """Every labelled, readable image of the data folders, at the plan's scale.

    ``maps``: none, one for all roots, or one a root (None: found automatically).
    ``field_um``: the plan's field; each source is cropped or continued to it where its own field
    is known, else its whole frame is used.
    ``progress``: called with images done and images in all of the folder at work.
    ``alone``: see :func:`list_cells`.

    Unreadable images are left out and listed in ``sources[i].listing.problems``.
    Raises InputError as :func:`list_cells` does, or, but for ``alone``, when a folder has no usable
    image.
    """
    if not roots:
        raise InputError("no data folder", hint="give --data DIR")
    chosen = list(maps or [None])
    if len(chosen) == 1:
        chosen *= len(roots)
    if len(chosen) != len(roots):
        raise InputError(
            f"{len(chosen)} label maps for {len(roots)} data folders",
            hint="give one --labels for all, or one for each --data in the same order",
        )
    sources = []
    for root, label_map in zip(roots, chosen, strict=True):
        listing = list_cells(root, scheme, label_map=label_map, patients=patients, alone=alone)
        if not listing.paths and not alone:
            raise InputError(
                f"no image below {root} can be used: {sum(listing.excluded.values())} excluded "
                f"by label map {listing.map_name}, {len(listing.problems)} with problems",
                hint=f"cytofed data check {root}",
            )
        frame = framing(size_px, plan_um=field_um, source_um=listing.field_um)
        cached = open_cached(
            listing.root,
            listing.paths,
            frame,
            cache_dir=cache_dir,
            progress=progress,
            may_be_none=alone,
        )
        sources.append(
            Source(
                listing=listing.take(cached.rows, cached.problems),
                pixels_NHWC=cached.file.pixels_NHWC,
                dhash_N=cached.file.dhash_N,
                background_N3=cached.file.background_N3,
                file=cached.file.path,
            )
        )
    return _all_of(tuple(sources), size_px)


def _all_of(sources: tuple[Source, ...], size_px: int) -> Cells:
    counts = [len(source.listing) for source in sources]
    return Cells(
        sources=sources,
        source_N=np.repeat(np.arange(len(sources), dtype=np.int16), counts),
        row_N=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        targets_NC=np.concatenate([source.listing.targets_NC for source in sources]),
        patients_N=_patients(sources),
        size_px=size_px,
    )


def _patients(sources: tuple[Source, ...]) -> np.ndarray | None:
    per_source = [source.listing.patients for source in sources]
    if any(patients is None for patients in per_source):
        return None
    if len(per_source) == 1:
        return np.array(per_source[0], dtype=str)
    # Patient 7 of one lab is not patient 7 of another.
    names = [f"{n}:{p}" for n, patients in enumerate(per_source, 1) for p in patients or ()]
    return np.array(names, dtype=str)


def _source_meta(source: Source) -> dict[str, Any]:
    listing = source.listing
    return {
        "file": str(source.file.resolve()),
        "root": str(listing.root),
        "paths": listing.paths,
        "patients": listing.patients,
        "columns": listing.columns,
        "field_um": listing.field_um,
        "absent": sorted(listing.absent),
        "excluded": listing.excluded,
        "problems": [[p.path, p.kind, p.detail] for p in listing.problems],
        "map_name": listing.map_name,
        "hidden": listing.hidden,
    }


def _source(meta: dict[str, Any], targets_NC: np.ndarray) -> Source:
    file = open_cell_file(Path(meta["file"]))
    listing = Listing(
        root=Path(meta["root"]),
        paths=tuple(meta["paths"]),
        targets_NC=targets_NC,
        patients=None if meta["patients"] is None else tuple(meta["patients"]),
        columns={name: tuple(texts) for name, texts in meta["columns"].items()},
        field_um=meta["field_um"],
        absent=frozenset(meta["absent"]),
        excluded=meta["excluded"],
        problems=tuple(Problem(*problem) for problem in meta["problems"]),
        map_name=meta["map_name"],
        hidden=meta["hidden"],
    )
    return Source(listing, file.pixels_NHWC, file.dhash_N, file.background_N3, file.path)
