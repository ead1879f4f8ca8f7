"""The attack suite proves itself: without a guard, the attack that it stops goes through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_every_guard_is_needed_and_every_attack_test_needs_its_guard() -> None:
    script = Path(__file__).with_name("mutate.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
