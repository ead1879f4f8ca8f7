"""Using a model file: its predictions for images, its scores on labelled folders.

N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytofed.arrays import Float32
from cytofed.client.cache import decode_cell, default_cache_dir, framing, read_image_file
from cytofed.client.cells import Cells, open_cells
from cytofed.client.reader import UnreadableImage, find_images
from cytofed.errors import InputError
from cytofed.labels import Scheme, load_map, load_scheme
from cytofed.metrics import Tally, summarise, tally
from cytofed.model_file import ModelInfo

_BATCH = 256


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, or why there are none."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    problem: str = ""


def evaluate_model(
    model: Path,
    roots: Sequence[Path],
    *,
    labels: Sequence[str] = (),
    only: Sequence[str] = (),
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Scores of a model on labelled folders: the object ``global`` of summary.json.

    ``only``: codes whose images count; the others are left out (a model cannot know a class that
    no lab had). Errors: InputError for files, labels or codes that cannot be used.
    """
    from cytofed import models
    from cytofed.client import training

    net, info = models.load_model(model)
    scheme = load_scheme(info.scheme)
    cells = open_cells(
        roots,
        scheme,
        maps=[load_map(name) for name in labels] or None,
        size_px=info.size_px,
        field_um=info.field_um,
        cache_dir=cache_dir or default_cache_dir(),
    )
    if only:
        wanted_C = np.zeros(len(scheme.codes), dtype=bool)
        wanted_C[[scheme.index(code) for code in only]] = True
        cells = cells.take(np.flatnonzero(~(cells.targets_NC & ~wanted_C).any(axis=1)))
    found = _tally(training.predict(net, cells), cells, scheme)
    return summarise(found, scheme)


def _tally(probs_NC: Float32, cells: Cells, scheme: Scheme) -> Tally:
    found = tally(probs_NC, cells.targets_NC)
    if not found.confusion_CC.any():
        raise InputError(
            f"none of the {len(cells)} images has one exact label of {scheme.name}",
            hint="coarse labels cannot be scored; give a folder with exact ones",
        )
    return found


def predict_images(
    model: Path, paths: Sequence[Path], *, top: int = 3, field_um: float | None = None
) -> Iterator[Prediction]:
    """The ``top`` classes of each image, of folders all images below them, hidden ones skipped.

    ``field_um``: width of the images' field of view; None takes the whole frame as the model's.
    Unreadable images are yielded with their problem. Errors: InputError for a path that is not
    there or a folder without images.
    """
    from cytofed import models

    net, info = models.load_model(model)
    files = list(_files(paths))
    frame = framing(info.size_px, plan_um=info.field_um, source_um=field_um)
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        pixels, problems = [], {}
        for path in batch:
            try:
                pixels.append(decode_cell(read_image_file(str(path))[1], frame))
            except UnreadableImage as error:
                problems[path] = str(error)
        probs = iter(_probabilities(net, pixels)) if pixels else iter(())
        for path in batch:
            if path in problems:
                yield Prediction(path, problem=problems[path])
            else:
                yield Prediction(path, _top(next(probs), info, top))


def _probabilities(net: Any, pixels: Sequence[npt.NDArray[np.uint8]]) -> Float32:
    import torch

    from cytofed import models

    with torch.inference_mode():
        images = models.images_of(torch.from_numpy(np.stack(pixels)))
        probs_NC: Float32 = torch.softmax(models.logits(net, images).float(), dim=1).numpy()
    return probs_NC


def _top(probs_C: Float32, info: ModelInfo, top: int) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-probs_C, kind="stable")[:top]
    return tuple((info.codes[c], round(float(probs_C[c]), 6)) for c in best.tolist())


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = find_images(path).paths
            if not found:
                raise InputError(f"no image below {path}")
            yield from (path / name for name in found)
        elif path.exists():
            yield path
        else:
            raise InputError(f"no image or folder {path}")
