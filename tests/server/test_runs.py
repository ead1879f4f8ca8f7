"""Folders of runs: one that is damaged says so, and the others are as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cytofed.documents import COORDINATOR, Member, Roster
from cytofed.errors import InputError
from cytofed.plan import Plan
from cytofed.privacy.identity import Identity
from cytofed.server.app import chosen, describe_run
from cytofed.server.runs import DamagedRun, RunFolder

CHIEF = Identity.generate(COORDINATOR)
NAMES = ("basel", "bonn", "leeds")
ROSTER = Roster(
    "fed", 1, tuple(Member(Identity.generate(name).public, f"{name}-key") for name in NAMES)
)


def queued(runs: Path) -> RunFolder:
    return RunFolder.create(runs, Plan(), ROSTER, CHIEF)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"x"', '{"phase": "done"}', '{"cohort": 7}', "\x00\xff", '{"phase": ["a"]}'],
)
def test_damaged_state_is_named_and_hides_no_other_run(text: str, tmp_path: Path) -> None:
    damaged, whole = queued(tmp_path), queued(tmp_path)
    (damaged.root / "state.json").write_text(text)
    with pytest.raises(DamagedRun, match=f"{damaged.name}: state.json cannot be read"):
        damaged.state()
    assert {folder.name for folder in RunFolder.all(tmp_path)} == {damaged.name, whole.name}
    assert RunFolder.all(tmp_path, but={damaged.name}) == [whole]
    assert describe_run(whole)["status"] == "approval"
    damaged.end("failed", reason="its state was damaged", cohort=("bonn",))
    assert damaged.state().cohort == ("bonn",)
    assert describe_run(damaged)["reason"] == "its state was damaged"


def test_fields_that_no_state_has_are_damage(tmp_path: Path) -> None:
    folder = queued(tmp_path)
    kept = json.loads((folder.root / "state.json").read_text())
    (folder.root / "state.json").write_text(json.dumps({**kept, "more": 1}))
    with pytest.raises(DamagedRun, match="more"):
        folder.state()


def test_offer_to_some_labs_has_a_roster_of_these() -> None:
    some = chosen(ROSTER, ["leeds", "basel"])
    assert [member.name for member in some.members] == ["basel", "leeds"]
    assert some.sha256 != ROSTER.sha256
    assert chosen(ROSTER, []) == ROSTER
    with pytest.raises(InputError, match="'rome' is not enrolled"):
        chosen(ROSTER, ["basel", "rome"])
    with pytest.raises(InputError, match="twice"):
        chosen(ROSTER, ["basel", "basel"])
