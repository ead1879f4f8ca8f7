"""Fixtures for all tests: where the images are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real images; the test skips loudly without it."""
    folder = Path(os.environ.get("CYTOFED_TEST_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip("real data not found: set CYTOFED_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def sample() -> Path:
    """The images that ship in the package."""
    return REPO / "src" / "cytofed" / "sample"
