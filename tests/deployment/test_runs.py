"""Runs of one coordinator: what one lab, one folder or one thread does is nobody else's failure."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from cytofed.client.directory import ClientDirectory
from cytofed.client.policy import open_ledger
from cytofed.model_file import read_model
from cytofed.plan import from_dict, to_dict
from cytofed.server.control import send_command

from .conftest import Federation, deal, free_port

pytestmark = pytest.mark.timeout(1800)  # processes on a busy machine
LABS = ("lab-1", "lab-2", "lab-3")
PLAN: dict[str, Any] = {
    "labels": {"scale": {"size_px": 32}},
    "model": {"width": 8},
    "train": {"rounds": 1, "steps_per_round": 2, "batch": 8},
    "cohort": {"min_labs": 2, "wait_s": 30, "round_timeout_s": 600},
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Federation]:
    """Three labs that have joined; the coordinator runs, and no lab yet."""
    root = tmp_path_factory.mktemp("runs")
    deal(sample, root, LABS)
    made = Federation(root, LABS, free_port())
    try:
        made.found()
        yield made
    finally:
        made.kill_all()


@pytest.fixture(autouse=True)
def ends(federation: Federation) -> Iterator[None]:
    """Each test ends its labs, and begins with a coordinator without faults."""
    yield
    federation.kill_all()
    federation.start("coordinator")


def queue(federation: Federation, name: str, *, labs: list[str] | None = None, **train: Any) -> str:
    tree = {**PLAN, "name": name, "train": {**PLAN["train"], **train}}
    socket = federation.coordinator / "control.sock"
    plan = to_dict(from_dict(tree))
    return str(send_command(socket, "run", plan=plan, labs=labs or [])["run"])


def approve(federation: Federation, run: str, *labs: str) -> None:
    for lab in labs:
        directory = ClientDirectory.open(federation.root / lab)

        def offered(directory: ClientDirectory = directory) -> list[str]:
            return [e.sha256 for e in directory.plans().entries() if e.run == run]

        [offer] = federation.until(offered, f"{lab} has the plan of {run}")
        settings = directory.settings()
        with open_ledger(settings) as book:
            directory.plans().approve(offer, settings, book)


def described(federation: Federation, run: str) -> dict[str, Any]:
    """The run as `server status` shows it."""
    told = federation.run("coordinator", "server", "status", federation.coordinator, "--json")
    [found] = [one for one in json.loads(told)["runs"] if one["run"] == run]
    return dict(found)


def has_failed(federation: Federation, run: str) -> bool:
    return bool(described(federation, run)["status"] == "failed")


def folder_of(federation: Federation, run: str) -> Path:
    return federation.coordinator / "runs" / run


def test_shape_that_numpy_cannot_make_costs_its_lab_the_round_and_nobody_else(
    federation: Federation,
) -> None:
    for lab in ("lab-1", "lab-2"):
        federation.start(lab)
    federation.start("lab-3", "shape:cytofed.client.daemon:pack_content")
    run = queue(federation, "shape")
    approve(federation, run, *LABS)
    summary = federation.summary(run)
    assert summary["status"] == "incomplete"
    [one] = summary["participation"]
    assert one["received"] == ["lab-1", "lab-2"]
    assert "absurd shape" in one["absent"]["lab-3"]


@pytest.mark.faults
def test_silent_lab_holds_up_no_other_run_nor_the_start_of_its_own(federation: Federation) -> None:
    for lab in LABS:
        federation.start(lab)
    first = queue(federation, "first")
    second = queue(federation, "second", labs=["lab-1", "lab-2"])
    approve(federation, second, "lab-1", "lab-2")
    assert federation.summary(second)["status"] == "completed"
    assert described(federation, first)["status"] == "approval"

    command = ("server", "start-run", federation.coordinator, first)
    federation.run("coordinator", *command, code=2)  # nobody has approved it
    approve(federation, first, "lab-1", "lab-2")
    folder = folder_of(federation, first) / "private"
    federation.until(
        lambda: all((folder / "decisions" / lab).is_file() for lab in ("lab-1", "lab-2")),
        "both approvals are known",
    )
    federation.run("coordinator", *command)
    assert federation.summary(first)["status"] == "completed"
    assert federation.state(first)["cohort"] == ["lab-1", "lab-2"]
    federation.until((folder / "told" / "lab-3").is_file, "lab-3 knows that it is over")
    assert f"run {first} is over for this lab" in (federation.root / "lab-3.log").read_text()
    federation.run("coordinator", *command, code=2)  # it is over


@pytest.mark.faults
def test_damaged_folder_is_the_end_of_its_run_and_others_go_on(federation: Federation) -> None:
    cut, altered, whole = (queue(federation, name) for name in ("cut", "altered", "whole"))
    federation.kill("coordinator")
    state = folder_of(federation, cut) / "state.json"
    state.write_bytes(state.read_bytes()[:40])
    offer = folder_of(federation, altered) / "private" / "offer"
    offer.write_bytes(offer.read_bytes()[:-1] + b"x")
    federation.start("coordinator")

    for run, why in ((cut, "state.json cannot be read"), (altered, "")):
        federation.until(partial(has_failed, federation, run), f"{run} has ended")
        reason = described(federation, run)["reason"]
        assert reason
        assert why in reason
        assert federation.summary(run)["reason"] == reason
    for lab in LABS:
        federation.start(lab)
    approve(federation, whole, *LABS)
    assert federation.summary(whole)["status"] == "completed"


@pytest.mark.faults
def test_run_with_a_broken_checkpoint_keeps_the_model_of_the_one_before(
    federation: Federation,
) -> None:
    for lab in LABS:
        federation.start(lab)
    federation.kill("coordinator")
    federation.start("coordinator", "kill:cytofed.server.app:save_progress:after:2")
    run = queue(federation, "broken", rounds=3)
    approve(federation, run, *LABS)
    died = federation.running["coordinator"]
    federation.until(lambda: died.poll() is not None, "the coordinator dies after round 2")
    newest = folder_of(federation, run) / "checkpoints" / "round-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    federation.start("coordinator")

    summary = federation.summary(run)
    assert summary["status"] == "incomplete"
    assert summary["rounds"] == 1
    assert "round-00002.safetensors cannot be read" in summary["reason"]
    assert read_model(folder_of(federation, run) / "model.safetensors")[0]
    assert len(federation.records(run)) == 1
    federation.wait_for_model("lab-1")


@pytest.mark.faults
def test_failure_in_the_middle_of_a_run_keeps_its_model_and_names_the_reason(
    federation: Federation,
) -> None:
    for lab in LABS:
        federation.start(lab)
    federation.kill("coordinator")
    federation.start("coordinator", "fail:cytofed.server.rounds:_record:2:RuntimeError")
    run = queue(federation, "middle", rounds=3)
    approve(federation, run, *LABS)
    summary = federation.summary(run)
    assert summary["status"] == "incomplete"
    assert summary["rounds"] == 1
    assert "internal error: RuntimeError" in summary["reason"]
    assert described(federation, run)["reason"] == summary["reason"]
    assert read_model(folder_of(federation, run) / "model.safetensors")[0]


@pytest.mark.faults
def test_full_disk_sets_a_run_aside_and_it_goes_on_when_there_is_room(
    federation: Federation, tmp_path: Path
) -> None:
    planted = tmp_path / "full"
    planted.touch()
    for lab in LABS:
        federation.start(lab)
    federation.kill("coordinator")
    federation.start("coordinator", f"fail:cytofed.server.app:save_progress:{planted}:ENOSPC")
    run = queue(federation, "full", rounds=2)
    approve(federation, run, *LABS)
    told = federation.until(lambda: described(federation, run)["reason"], "the run is set aside")
    assert "planted" in told
    assert described(federation, run)["status"] == "rounds"
    planted.unlink()
    assert federation.summary(run)["status"] == "completed"


@pytest.mark.faults
def test_words_of_either_side_are_words_at_the_other(federation: Federation) -> None:
    """lab-3 refuses with a reason, and the coordinator's card comes, with more than words in it."""
    federation.kill("coordinator")
    federation.start("coordinator", "words:cytofed.server.results:model_card")
    for lab in ("lab-1", "lab-2"):
        federation.start(lab)
    # A liar's own gate, which lets no such reason out, is no gate.
    gate = "skip:cytofed.client.egress:_check_reason"
    federation.start("lab-3", "words:cytofed.client.daemon:public_reason", gate)
    federation.run("lab-3", "client", "pause", federation.root / "lab-3")
    run = queue(federation, "words")
    approve(federation, run, *LABS)
    summary = federation.summary(run)
    reason = summary["participation"][0]["absent"]["lab-3"]
    assert reason.startswith("refused:")
    assert "gone  2026-01-01 INFO forged" in reason
    assert reason.isprintable()

    def kept() -> list[Path]:
        found = (federation.root / "lab-1" / "models").glob("*/result.json")
        return [file.parent for file in found if json.loads(file.read_text())["run"] == run]

    [home] = federation.until(kept, "lab-1 has the result")
    card = home / "model_card.md"
    told = federation.run("coordinator", "server", "status", federation.coordinator)
    lines = [told, *(log.read_text() for log in federation.root.glob("*.log"))]
    for page in (card.read_text(), *lines):
        assert all(char.isprintable() or char == "\n" for char in page)
    for page in lines:
        assert not any(line.startswith("2026-01-01") for line in page.splitlines())
    assert "![x](" not in card.read_text()
    assert "<img" not in card.read_text().replace("\\<", "")


def health(federation: Federation) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(federation.coordinator / "ca.pem"))
    return httpx.get(f"https://localhost:{federation.port}/health", verify=context)


@pytest.mark.faults
def test_thread_whose_turns_fail_is_told_at_health_and_goes_on_when_they_do_not(
    federation: Federation, tmp_path: Path
) -> None:
    planted = tmp_path / "fails"
    federation.kill("coordinator")
    federation.start("coordinator", f"fail:cytofed.server.runs:RunFolder.all:{planted}:OSError")
    assert health(federation).status_code == 200
    planted.touch()
    federation.until(lambda: health(federation).status_code == 503, "health tells of it")
    planted.unlink()
    federation.until(lambda: health(federation).status_code == 200, "the threads go on")
    assert queue(federation, "after")


@pytest.mark.faults
@pytest.mark.parametrize("error", ["OSError", "SystemExit"])
def test_coordinator_whose_threads_cannot_go_on_ends_with_1_for_a_fresh_one(
    federation: Federation, tmp_path: Path, error: str
) -> None:
    planted = tmp_path / "fails"
    federation.kill("coordinator")
    process = federation.start(
        "coordinator", f"fail:cytofed.server.runs:RunFolder.all:{planted}:{error}"
    )
    planted.touch()
    federation.until(lambda: process.poll() is not None, "the coordinator ends")
    assert process.returncode == 1  # the service file has it started again
    del federation.running["coordinator"]
    log = (federation.root / "coordinator.log").read_text()
    assert "the coordinator ends, for its thread" in log
    unit = Path(__file__).parents[2] / "deploy" / "cytofed-server.service"
    assert "Restart=always" in unit.read_text()
    assert "RestartPreventExitStatus=2 5" in unit.read_text()
