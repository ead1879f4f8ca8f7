"""Three labs' images for a trial of a deployment: ``python deploy/example_labs.py OUT [DATA]``.

Deals the marrow cells that ship in the package (or those of DATA, in class folders) to three labs,
no image to two of them. Each gets a folder with a CSV. The CSV's column ``patient`` is made up, so
that a plan per patient can be tried: the images say nothing about whose they are.
"""

from __future__ import annotations

import csv
import random
import shutil
import sys
from pathlib import Path

from cytofed.client.reader import ENDINGS

LABS = ("leeds", "bonn", "porto")
PATIENTS = 25
"""of each lab, and what it declares"""
SAMPLE = Path(__file__).resolve().parent.parent / "src" / "cytofed" / "sample" / "marrow"


def deal(data: Path, out: Path) -> dict[str, int]:
    """Copy the images below ``data`` to ``out/LAB/``; how many each lab got.

    Errors: SystemExit where ``data`` has no images in class folders.
    """
    images = [path for path in sorted(data.glob("*/*")) if path.suffix.lower() in ENDINGS]
    if not images:
        raise SystemExit(f"no class folders with images in {data}")
    random.Random(1).shuffle(images)  # the same for everybody who tries
    counts = {}
    for number, lab in enumerate(LABS):
        folder = out / lab
        folder.mkdir(parents=True)
        own = images[number :: len(LABS)]
        with (folder / "cells.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "patient"])
            for at, image in enumerate(own):
                shutil.copyfile(image, folder / image.name)
                table.writerow([image.name, image.parent.name, f"{lab}-{at % PATIENTS:02d}"])
        counts[lab] = len(own)
    return counts


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit("usage: example_labs.py OUT [DATA]")
    found = deal(Path(sys.argv[2]) if len(sys.argv) == 3 else SAMPLE, Path(sys.argv[1]))
    for name, count in found.items():
        print(f"{name}: {count} images of {PATIENTS} made-up patients")
