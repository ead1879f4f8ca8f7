"""Reading images: our cache against torchvision's ImageFolder and against bare decoding.

    python benchmarks/data.py [--quick] [--json]

Epoch: all images once in random order, as float batches of the plan's scale. First pass: building
the cache against Pillow's open and convert alone, by as many threads. Runs alternate, so that a
machine that is busy for a while slows both; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cytofed.client.cache import thread_count
from cytofed.client.cells import Cells, open_cells
from cytofed.labels import load_scheme

REPO = Path(__file__).resolve().parent.parent
SIZE_PX = 64
FIELD_UM = 21.6
BATCH = 64


def images_folder(wanted: int, scratch: Path) -> tuple[Path, str]:
    """Class folders of links to real marrow images, spread over the classes."""
    data = Path(os.environ.get("CYTOFED_TEST_DATA", REPO.parent / "shared" / "data"))
    root, name = data / "bone_marrow_128", "bone_marrow_128"
    if not root.is_dir():
        root, name = REPO / "src" / "cytofed" / "sample" / "marrow", "shipped sample"
    paths = sorted(root.glob("*/*.jpg"))
    for path in paths[:: max(1, len(paths) // wanted)]:
        (scratch / path.parent.name).mkdir(parents=True, exist_ok=True)
        (scratch / path.parent.name / path.name).symlink_to(path)
    return scratch, name


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def our_epoch(cells: Cells, *, as_float: bool) -> None:
    import torch

    order = np.random.default_rng(0).permutation(len(cells))
    for start in range(0, len(order), BATCH):
        pixels_BHWC = torch.from_numpy(cells.images(order[start : start + BATCH]))
        if as_float:
            pixels_BHWC.permute(0, 3, 1, 2).float().div_(255)


def torchvision_epoch(root: Path, workers: int) -> None:
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = transforms.Compose([transforms.Resize((SIZE_PX, SIZE_PX)), transforms.ToTensor()])
    loader = DataLoader(
        ImageFolder(str(root), steps), batch_size=BATCH, shuffle=True, num_workers=workers
    )
    for _batch in loader:
        pass


def open_marrow(root: Path, cache_dir: Path) -> Cells:
    scheme = load_scheme("bone-marrow-21")
    return open_cells([root], scheme, size_px=SIZE_PX, field_um=FIELD_UM, cache_dir=cache_dir)


def bare_decoding(paths: Sequence[Path]) -> None:
    def decode(chunk: Sequence[Path]) -> None:
        for path in chunk:
            with Image.open(path) as image:
                image.convert("RGB")

    with ThreadPoolExecutor(thread_count()) as pool:
        list(pool.map(decode, [paths[start : start + 32] for start in range(0, len(paths), 32)]))


def measure(*, quick: bool, scratch: Path) -> dict[str, object]:
    root, name = images_folder(2500 if quick else 10_000, scratch / "images")
    paths = sorted(root.glob("*/*.jpg"))
    bare_decoding(paths[:200])  # the first decoding loads Pillow's plugins
    passes: list[tuple[float, float]] = []
    for _ in range(5 if quick else 9):
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        bare_s = timed(lambda: bare_decoding(paths))
        passes.append((bare_s, timed(lambda: open_marrow(root, scratch / "cache"))))

    cells = open_marrow(root, scratch / "cache")
    our_epoch(cells, as_float=True)
    ours_s: list[float] = []
    uint8_s: list[float] = []
    peer_s: dict[int, list[float]] = {0: [], 2: []}
    for _ in range(1 if quick else 4):
        for workers, seconds in peer_s.items():
            for _ in range(3):
                ours_s.append(timed(lambda: our_epoch(cells, as_float=True)))
                uint8_s.append(timed(lambda: our_epoch(cells, as_float=False)))
            seconds.append(timed(partial(torchvision_epoch, root, workers)))

    medians = {workers: statistics.median(seconds) for workers, seconds in peer_s.items()}
    best = min(medians, key=lambda workers: medians[workers])
    epoch_s = statistics.median(ours_s)
    speedup = medians[best] / epoch_s
    # Ratios of neighbours in time: what slowed one run slowed the other.
    share = statistics.median(bare / ours for bare, ours in passes)
    return {
        "name": "data",
        "ours": {
            "images": len(cells),
            "data": name,
            "size_px": SIZE_PX,
            "threads": thread_count(),
            "epoch_s": round(epoch_s, 4),
            "epoch_uint8_s": round(statistics.median(uint8_s), 4),
            "first_pass_s": round(statistics.median(ours for _, ours in passes), 3),
            "reopen_s": round(timed(lambda: open_marrow(root, scratch / "cache")), 4),
        },
        "peer": {
            "epoch_torchvision_s": round(medians[best], 3),
            "num_workers": best,
            "bare_decoding_s": round(statistics.median(bare for bare, _ in passes), 3),
        },
        "goals": [
            goal("epoch from the cache: times torchvision's speed", speedup, 20.0),
            goal("first pass: share of bare decoding's speed", share, 0.9),
        ],
    }


def goal(name: str, value: float, limit: float) -> dict[str, object]:
    return {
        "name": name,
        "value": round(value, 3),
        "op": ">=",
        "limit": limit,
        "met": value >= limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer images and repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON line last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(quick=options.quick, scratch=Path(scratch))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
