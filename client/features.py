"""Features of a frozen encoder, found once for each image and kept beside the cache of images.

A file holds a row for each image of one cache file, in its order, and after the rows a mark for
each: it is set once the row is on the disk, so a killed process leaves no half-valid row, and
several processes may fill the file together. Its name says which encoder, where and by which
version of torch it was found. Like the cached images, it stays with the lab and may be deleted.

Shapes: N images, F features, B images of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cytofed import models
from cytofed.arrays import Float32
from cytofed.canonical import digest
from cytofed.client.cells import Cells, Source
from cytofed.client.training import steady
from cytofed.plan import Train

_VERSION = 1
_BATCH = 64
_TOGETHER = 1024
"""rows between two writes: what an interrupted process loses at most"""

_log = logging.getLogger("cytofed.lab")


def frozen_features(
    net: models.Classifier, cells: Cells, device: torch.device, settings: Train
) -> Float32:
    """The encoder's features of all cells, (N, F) float32, without augmentation.

    Taken from the files beside the cached images where they are there, and put there where not;
    cells that are not seen as they are cached (a simulated stain) are computed each time.
    """
    with steady(settings.threads):
        net.to(device)
        if not cells.as_cached:
            return _compute(net, cells, np.arange(len(cells)), device)
        features_NF = np.empty((len(cells), net.head.in_features), np.float32)
        digest = _digest(net, device, settings)
        for number, source in enumerate(cells.sources):
            at = np.flatnonzero(cells.source_N == number)
            if len(at):
                features_NF[at] = _of_source(net, cells.take(at), source, digest, device)
    return features_NF


def _of_source(
    net: models.Classifier, cells: Cells, source: Source, digest: str, device: torch.device
) -> Float32:
    """Features of cells that are all of one source."""
    path = source.file.with_name(f"{source.file.stem}-{digest}.features")
    shape = len(source.pixels_NHWC), net.head.in_features
    kept_NF, known_N = _read(path, *shape)
    missing = np.flatnonzero(~known_N[cells.row_N])
    for start in range(0, len(missing), _TOGETHER):
        index = missing[start : start + _TOGETHER]
        found_BF = _compute(net, cells, index, device)
        kept_NF[cells.row_N[index]] = found_BF
        _write(path, cells.row_N[index], found_BF, len(known_N))
    features_NF: Float32 = kept_NF[cells.row_N]
    return features_NF


def _compute(
    net: models.Classifier, cells: Cells, index: npt.NDArray[np.int64], device: torch.device
) -> Float32:
    """Features of the images at ``index``; each is the same whatever its neighbours are."""
    parts = [np.zeros((0, net.head.in_features), np.float32)]
    for start in range(0, len(index), _BATCH):
        wanted = index[start : start + _BATCH]
        # Always as many images: of another number, kernels may add up in another order.
        full = np.concatenate([wanted, np.repeat(wanted[:1], _BATCH - len(wanted))])
        images = models.images_of(torch.from_numpy(cells.images(full)).to(device))
        features_BF = models.features(net, images).float().cpu().numpy()
        parts.append(features_BF[: len(wanted)])
    return np.concatenate(parts)


def _digest(net: models.Classifier, device: torch.device, settings: Train) -> str:
    """What decides the features besides the images."""
    facts = [_VERSION, torch.__version__, device.type, settings.threads, net.views]
    tensors = [
        [name, list(array.shape), hashlib.sha256(array.tobytes()).digest()]
        for name, array in models.tensors_of(net.encoder).items()
    ]
    return digest("cytofed/1/features", repr(facts), tensors).hex()[:24]


# --- the file


def _read(path: Path, images: int, features: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Rows (N, F) and which of them are known; none where the file is missing or damaged."""
    size = images * features * 4
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if len(data) == size + images:
            rows_NF = np.frombuffer(data[:size], "<f4").reshape(images, features)
            return rows_NF.astype(np.float32), np.frombuffer(data[size:], np.uint8) == 1
        path.unlink()
    return np.zeros((images, features), np.float32), np.zeros(images, bool)


def _write(path: Path, rows_B: npt.NDArray[np.int32], features_BF: Float32, images: int) -> None:
    """Put rows into the file, then their marks. Where that fails, they are found again later."""
    width = features_BF.shape[1] * 4
    try:
        with _open(path, images * (width + 1)) as file:
            for row, features_F in zip(rows_B.tolist(), features_BF.astype("<f4"), strict=True):
                os.pwrite(file, features_F.tobytes(), row * width)
            os.fsync(file)
            for row in rows_B.tolist():
                os.pwrite(file, b"\1", images * width + row)
    except OSError as error:
        _log.warning("features are not kept: cannot write %s: %s", path, error.strerror)


@contextlib.contextmanager
def _open(path: Path, size: int) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, size)
        yield file
    finally:
        os.close(file)
