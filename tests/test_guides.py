"""The guides' commands exist, and ``make federation`` runs those of docs/deploy.md."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cytofed.cli import cli

REPO = Path(__file__).resolve().parent.parent
GUIDES = sorted((REPO / "docs").rglob("*.md"))
COMMAND = re.compile(r"cytofed ((?:server|client|plan|data) [a-z-]+|[a-z]+)\b([^\n;&`|#]*)")


def commands(text: str) -> list[tuple[str, frozenset[str]]]:
    """Command and the names of its options, as they stand in a text."""
    joined = text.replace("\\\n", " ").replace('"$cytofed"', "cytofed")
    return [
        (name, frozenset(re.findall(r"(?<=\s)--[a-z-]+", rest)))
        for name, rest in COMMAND.findall(joined)
    ]


def options_of(name: str) -> set[str]:
    """Options of a command. Errors: AssertionError where there is none of that name."""
    found: click.Command = cli
    for part in name.split():
        assert isinstance(found, click.Group), name
        assert part in found.commands, f"no command {name}"
        found = found.commands[part]
    return {option for parameter in found.params for option in parameter.opts} | {"--help"}


def shown(guide: str) -> list[str]:
    """Lines to type."""
    return re.findall(r"^\$ (.*)$", guide, re.M)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_command_of_a_guide_exists_with_its_options(path: Path) -> None:
    lines = shown(path.read_text()) + re.findall(r"`(cytofed [^`]*)`", path.read_text())
    for name, options in commands("\n".join(lines)):
        assert options <= options_of(name), f"{path.name}: {name} {options}"


def test_a_federation_takes_fewer_than_fifteen_lines() -> None:
    assert 5 < len(shown((REPO / "docs" / "deploy.md").read_text())) < 15


def test_make_federation_runs_the_commands_of_the_guide() -> None:
    guide = commands("\n".join(shown((REPO / "docs" / "deploy.md").read_text())))
    script = commands((REPO / "deploy" / "federation.sh").read_text())
    # The script asks for JSON where a person reads.
    told = {(name, options - {"--json"}) for name, options in script}
    assert set(guide) <= told


def groups(command: click.Command, *path: str) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return []
    below = (groups(c, *path, name) for name, c in command.commands.items())
    return [path, *(found for each in below for found in each)]


@pytest.mark.parametrize("group", groups(cli), ids=lambda group: " ".join(group) or "cytofed")
def test_help_tells_what_each_command_does_in_whole_sentences(group: tuple[str, ...]) -> None:
    told = CliRunner().invoke(cli, [*group, "--help"]).output
    assert "Commands:" in told
    assert "..." not in told.split("Commands:")[1]


def test_a_stopped_coordinator_is_no_failed_service() -> None:
    assert "\nSuccessExitStatus=130\n" in (REPO / "deploy" / "cytofed-server.service").read_text()
