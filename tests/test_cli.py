"""The command line: the transcripts in tests/transcripts are executed as they stand.

In a ``console`` block a line ``$ command`` runs in a shell, in one working folder per file. What
follows must be its whole output, stdout and stderr as they come; ``...`` stands for any text, on a
line of its own for any lines. ``[exit N]`` is the exit code where it is not 0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TRANSCRIPTS = Path(__file__).parent / "transcripts"


@dataclass(frozen=True)
class Step:
    """One command with what it should print."""

    line: int
    command: str
    output: tuple[str, ...]
    exit_code: int


def steps(text: str) -> Iterator[Step]:
    """The commands of a transcript in order."""
    inside, found = False, list[tuple[int, str, list[str]]]()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            inside = line == "```console"
        elif inside and line.startswith("$ "):
            found.append((number, line.removeprefix("$ "), []))
        elif inside:
            found[-1][2].append(line)
    for number, command, output in found:
        exit_code = 0
        if output and (match := re.fullmatch(r"\[exit (\d+)\]", output[-1])):
            exit_code = int(match[1])
            output.pop()
        yield Step(number, command, tuple(output), exit_code)


def pattern(output: tuple[str, ...]) -> str:
    """A regular expression of the lines with their wildcards."""
    lines = [
        r"(?:[^\n]*\n)*?" if line.strip() == "..." else _line(line) + r"[ ]*\n" for line in output
    ]
    return "".join(lines)


def _line(line: str) -> str:
    return r"[^\n]*".join(re.escape(part) for part in line.rstrip().split("..."))


@pytest.fixture
def desk(sample: Path, tmp_path: Path) -> Path:
    """A folder with ``images/``: twelve cells of each of four classes."""
    for code in ("BLA", "EOS", "LYT", "NGS"):
        (tmp_path / "images" / code).mkdir(parents=True)
        for image in sorted((sample / "marrow" / code).iterdir())[:12]:
            shutil.copy(image, tmp_path / "images" / code)
    return tmp_path


def run(step: Step, folder: Path) -> tuple[int, str]:
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", step.command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=250,
        env={
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "COLUMNS": "100",
        },
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in TRANSCRIPTS.glob("*.md")))
def test_transcript_is_what_happens(name: str, desk: Path, request: pytest.FixtureRequest) -> None:
    text = (TRANSCRIPTS / f"{name}.md").read_text()
    if name == "corrupt":
        shutil.copytree(request.getfixturevalue("real_data") / "corrupt", desk / "corrupt")
    for step in steps(text):
        exit_code, output = run(step, desk)
        where = f"{name}.md line {step.line}: $ {step.command}"
        assert "Traceback" not in output, f"{where}\n{output}"
        assert re.fullmatch(pattern(step.output), output), f"{where}\nprinted:\n{output}"
        assert exit_code == step.exit_code, where


def test_transcripts_compare_every_line() -> None:
    """The check itself: wildcards match what they should and nothing more."""
    assert re.fullmatch(pattern(("a ... c", "...", "z")), "a b c\nx\ny\nz\n")
    assert re.fullmatch(pattern(("a", "...")), "a\n")
    for wrong in ("a b c\nz\nmore\n", "b c\nz\n", "a b c\n", ""):
        assert not re.fullmatch(pattern(("a ... c", "...", "z")), wrong)
    (step,) = steps("```console\n$ x\nout\n[exit 2]\n```\n```\n$ not this\n```\n")
    assert step == Step(2, "x", ("out",), 2)
