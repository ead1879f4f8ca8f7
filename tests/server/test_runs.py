"""Folders of runs: one that is damaged says so, and the others are as before."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cytofed.documents import COORDINATOR, Decision, Member, Roster, Start
from cytofed.errors import InputError
from cytofed.plan import Plan
from cytofed.privacy.identity import Identity
from cytofed.server.app import Coordinator, chosen, describe_run
from cytofed.server.control import Command
from cytofed.server.directory import ServerDirectory
from cytofed.server.runs import DamagedRun, RunFolder, RunState

CHIEF = Identity.generate(COORDINATOR)
NAMES = ("basel", "bonn", "leeds")
LABS = {name: Identity.generate(name) for name in NAMES}
ROSTER = Roster("fed", 1, tuple(Member(LABS[name].public, f"{name}-key") for name in NAMES))


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


def test_ended_runs_are_read_once_and_not_again_while_nobody_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ServerDirectory.create(tmp_path / "c", name="fed", address="localhost:4567")
    for _ in range(5):
        folder = RunFolder.create(directory.runs, Plan(), ROSTER, directory.identity())
        folder.end("completed", cohort=())
    coordinator = Coordinator(directory)
    read = list[str]()
    state = RunFolder.state

    def counted(folder: RunFolder) -> RunState:
        read.append(folder.name)
        return state(folder)

    monkeypatch.setattr(RunFolder, "state", counted)
    coordinator._give_results()
    assert coordinator._runs("approval", "rounds") == []
    assert len(set(read)) == 5
    read.clear()
    coordinator._give_results()
    assert coordinator._runs("approval", "rounds") == []
    assert read == []
    status = coordinator._answer(Command("status", {}))
    assert [run["status"] for run in status["runs"]] == ["completed"] * 5


@pytest.mark.parametrize("damage", ["stop", "state"])
def test_no_file_of_one_run_ends_a_thread_of_the_coordinator(damage: str, tmp_path: Path) -> None:
    directory = ServerDirectory.create(tmp_path / "c", name="fed", address="localhost:4567")
    chief = directory.identity()
    bad, good = (RunFolder.create(directory.runs, Plan(), ROSTER, chief) for _ in range(2))
    started(bad, chief)
    (bad.private / "stop").write_bytes(b"\xff\xfe stopped")
    if damage == "state":
        (bad.root / "state.json").write_bytes(b"\xff")
    coordinator = Coordinator(directory)
    coordinator._approve_some()
    coordinator._carry_out_next()
    coordinator._give_results()
    status = coordinator._answer(Command("status", {}))
    assert {run["run"] for run in status["runs"]} == {bad.name, good.name}
    assert bad.state().phase == "failed"
    assert "0 labs approved" in good.state().reason  # as without the other


@pytest.mark.skipif(os.geteuid() != 0, reason="to be nobody for a while takes root")
def test_run_that_this_user_may_not_read_is_damaged_and_hides_no_other(tmp_path: Path) -> None:
    shut, good = queued(tmp_path), queued(tmp_path)
    shut.root.chmod(0o000)
    above = [folder for folder in tmp_path.parents if folder.name.startswith(("pytest-", "popen-"))]
    for folder in (tmp_path, *above, good.root):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        assert set(RunFolder.all(tmp_path)) == {shut, good}
        with pytest.raises(DamagedRun, match="cannot be read"):
            shut.state()
    finally:
        os.seteuid(0)


def started(folder: RunFolder, chief: Identity) -> None:
    """Have a run wait for its turn, approved by all labs."""
    offer = folder.offer(chief)
    about = (folder.name, offer.plan.sha256, offer.roster.sha256)
    approvals = {
        lab: Decision(lab, "approved", *about, max_weight=8, at=datetime.now(UTC)).signed(key)
        for lab, key in LABS.items()
    }
    for lab, document in approvals.items():
        folder.keep_decision(lab, document)
    start = Start(*about, approvals)
    folder.fix_cohort(start.signed(chief), start.labs)


def test_run_that_waits_for_its_turn_is_stopped_at_once_and_others_stay(tmp_path: Path) -> None:
    directory = ServerDirectory.create(tmp_path / "c", name="fed", address="localhost:4567")
    chief = directory.identity()
    one, other = (RunFolder.create(directory.runs, Plan(), ROSTER, chief) for _ in range(2))
    for folder in (one, other):
        started(folder, chief)
    one.ask_to_stop("stopped by the coordinator")
    Coordinator(directory)._approve_some()
    assert (one.state().phase, other.state().phase) == ("failed", "rounds")
    assert one.state().reason == "stopped by the coordinator"
    assert one.state().cohort == NAMES
