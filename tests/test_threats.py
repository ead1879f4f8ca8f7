"""Every test that docs/threats.md names is there, and each row names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
THREATS = (REPO / "docs" / "threats.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", THREATS)
ROWS = [row for row in THREATS.splitlines() if row.startswith("| ")][1:]


def functions_of(file: str) -> set[str]:
    tree = ast.parse((REPO / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []


def test_every_row_has_four_columns_and_names_a_test() -> None:
    assert len(ROWS) > 40
    for row in ROWS:
        assert row.count("|") == 5, row
        assert re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row), row


def test_the_threat_model_is_linked_for_those_who_decide() -> None:
    for guide in ("README.md", "docs/lab.md", "docs/coordinator.md"):
        assert "threats.md)" in (REPO / guide).read_text()
