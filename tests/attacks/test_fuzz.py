"""Well-formed and hostile: every reader ends in a value or in an error that it names.

CYTOFED_FUZZ_CASES: cases altogether, such as 1000000 at night. A finding names its case:
``fuzz.run(TARGET, 1, first=NUMBER)`` has it again.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.attacks import fuzz
from tests.attacks.fuzz import TARGETS, run

ASKED = int(os.environ.get("CYTOFED_FUZZ_CASES", "20000"))


@pytest.mark.parametrize("name", TARGETS)
def test_no_hostile_content_does_more_than_be_refused(name: str) -> None:
    run(name, 100)


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_no_hostile_content_of_many_does_more_than_be_refused(name: str) -> None:
    run(name, ASKED // len(TARGETS), first=100)


@pytest.mark.parametrize("fault", ["raises", "is slow", "takes memory"])
def test_what_no_case_may_do_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    kept: list[bytes] = []
    calls = itertools.count()

    def case(_rng: random.Random) -> None:
        if next(calls) < 5:
            return
        if fault == "raises":
            raise ZeroDivisionError
        while fault == "is slow":
            pass
        kept.append(b"x" * (1 << 26))

    monkeypatch.setitem(TARGETS, "planted", case)
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    monkeypatch.setattr(fuzz, "MEGABYTES", 100)
    with pytest.raises(AssertionError, match=r"planted \d+: (ZeroDivisionError|TooSlow|\d+ MiB)"):
        run("planted", 100)
