"""Pictures in docs/screenshots: ``python -m tests.simulations.take_screenshots RUN SWEEP AUDIT``.

Takes three directories, each with its report.html. Whatever the browser complains about is printed.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.simulations.browser import Browser

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
VIEWS: dict[str, dict[str, Any]] = {
    "": {"width_px": 1200, "height_px": 1500, "scale": 0.75},
    "-phone": {"width_px": 390, "height_px": 1400, "dark": True},
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        for kind, folder in zip(("run", "sweep", "audit"), sys.argv[1:], strict=True):
            headings = {kind: ""}
            if kind == "audit":
                headings = {"audit": "Audit", "attacks": "Images from updates"}
            for (part, section), (name, view) in itertools.product(headings.items(), VIEWS.items()):
                shown = browser.show(Path(folder) / "report.html", section=section, **view)
                file = FOLDER / f"{part}{name}.png"
                Image.open(io.BytesIO(shown.png)).convert("RGB").save(file, optimize=True)
                print(f"{file.name}, {file.stat().st_size:,} bytes", *shown.complaints)
        browser.close()


if __name__ == "__main__":
    main()
