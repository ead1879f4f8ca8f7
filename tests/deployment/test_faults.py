"""Faults of real processes. For each: how the run ends, who is named, and nothing is spent twice.

The steps are those of a round (docs/protocol.md): orders go out (2), the lab reserves and trains
(3), masks, seals, logs and sends (4), the coordinator unmasks (5) and checkpoints (6), scores (7).
A process that dies at a step is started again; the run goes on as if nothing had been.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import check_against_ledger, verify
from cytofed.client.policy import Entry, ledger_federation, open_ledger
from cytofed.plan import from_dict, to_dict
from cytofed.server import pki
from cytofed.server.control import send_command

from .conftest import Federation, deal, free_port, result_of
from .proxies import BreakingLine, InspectingBox

pytestmark = pytest.mark.timeout(1800)  # processes on a busy machine
LABS = ("lab-1", "lab-2", "lab-3")
PLAN: dict[str, Any] = {
    "labels": {"scale": {"size_px": 32}},
    "model": {"width": 8},
    "train": {"rounds": 2, "steps_per_round": 2, "batch": 8},
    "cohort": {"min_labs": 3, "wait_s": 300, "round_timeout_s": 600},
}
PRIVATE: dict[str, Any] = {
    **PLAN,
    "privacy": {"unit": "patient", "epsilon": 8, "declared_patients": 20},
    "secure_aggregation": {"enabled": True},
    "evaluation": {"sigma": 4.0},
}
_numbers = count(1)


def founded(root: Path, sample: Path) -> Federation:
    """Three labs with patients, joined; the coordinator runs."""
    deal(sample, root, LABS)
    made = Federation(root, (), free_port())
    made.found()
    for lab in LABS:
        made.join(lab, "--patients", "name:_0*([0-9])", "--patients-declared", "20")
        settings = root / lab / "client.yaml"
        settings.write_text(settings.read_text().replace("retry_max_s: 30", "retry_max_s: 2"))
    made.labs = LABS
    return made


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Federation]:
    """One federation for faults that heal: each test leaves all four processes running."""
    made = founded(tmp_path_factory.mktemp("standing"), sample)
    try:
        for lab in LABS:
            made.start(lab)
        yield made
    finally:
        made.kill_all()


@pytest.fixture
def federation(tmp_path: Path, sample: Path) -> Iterator[Federation]:
    """A federation of its own, for faults that stay. No lab runs yet."""
    made = founded(tmp_path, sample)
    try:
        yield made
    finally:
        made.kill_all()


def queue(federation: Federation, plan: dict[str, Any], **sections: Any) -> str:
    """Queue a plan under a name of its own; the run's name."""
    tree = {**plan, **sections, "name": f"fault-{next(_numbers)}"}
    socket = federation.coordinator / "control.sock"
    return str(send_command(socket, "run", plan=to_dict(from_dict(tree)))["run"])


def approve(federation: Federation, run: str, *labs: str) -> None:
    for lab in labs or LABS:
        directory = ClientDirectory.open(federation.root / lab)
        offered = partial(offers, directory, run)
        [entry] = federation.until(offered, f"{lab} has the plan of {run}")
        settings = directory.settings()
        with open_ledger(settings) as book:
            directory.plans().approve(entry.sha256, settings, book)


def offers(directory: ClientDirectory, run: str) -> list[Entry]:
    return [entry for entry in directory.plans().entries() if entry.run == run]


def restart(federation: Federation, who: str, *faults: str) -> None:
    federation.kill(who, signal.SIGTERM)
    assert "Traceback" not in (federation.root / f"{who}.log").read_text()
    federation.start(who, *faults)


def died(federation: Federation, who: str) -> None:
    """Wait until the fault has killed the process."""
    process = federation.running[who]
    federation.until(lambda: process.poll() is not None, f"{who} dies of its fault")
    assert process.returncode == -signal.SIGKILL
    del federation.running[who]


def consistent(federation: Federation) -> None:
    """At every lab ledger and egress log agree, and no order was answered in two ways."""
    for lab in LABS:
        directory = ClientDirectory.open(federation.root / lab)
        name = ledger_federation("fed", lab)
        report = verify(directory.egress, directory.identity().public)
        answers: dict[tuple[Any, ...], set[str]] = {}
        for record in report.messages:
            body = record.body
            if body["type"] in ("update", "masked", "evaluation"):
                place = (body["type"], body["run"], body["round"], body["slot"])
                answers.setdefault(place, set()).add(body["sha256"])
        assert all(len(hashes) == 1 for hashes in answers.values()), answers
        with open_ledger(directory.settings()) as book:
            check_against_ledger(report, book, federation=name)


def spent(federation: Federation, lab: str, run: str) -> list[tuple[str, int]]:
    """Tasks and rounds of a run that the lab's ledger has charged."""
    with open_ledger(ClientDirectory.open(federation.root / lab).settings()) as book:
        events = book.summary()["events"]
    return sorted((e["task"], e["round"]) for e in events if e.get("run") == run)


def completed(federation: Federation, run: str) -> None:
    """All rounds with all labs; each lab has the model and has paid each round once."""
    summary = federation.summary(run)
    assert summary["status"] == "completed", summary["participation"]
    assert [r["received"] for r in summary["participation"]] == [list(LABS)] * 2
    for lab in LABS:
        directory = ClientDirectory.open(federation.root / lab)
        result = federation.until(
            partial(result_of, directory, run), f"{lab} has the model of {run}"
        )
        told = json.loads(result.read_text())
        assert told["weights_sha256"] == summary["weights_sha256"]
        delivered = federation.coordinator / "runs" / run / "private" / "delivered" / lab
        federation.until(delivered.is_file, f"the coordinator knows that {lab} has the model")
        if summary["privacy"]["unit"] == "patient":
            tasks = [(task, number) for task in ("evaluate", "train") for number in (1, 2)]
            assert spent(federation, lab, run) == tasks
            with open_ledger(directory.settings()) as book:
                assert book.balance().held.epsilon == 0
    consistent(federation)


def lab_log(federation: Federation, lab: str) -> str:
    return (federation.root / f"{lab}.log").read_text()


# --- kill -9 at each step

QUICK: tuple[pytest.MarkDecorator, ...] = ()
FULL = (pytest.mark.faults,)
BUDGET = "cytofed.client.opening:LimitedBudget"
STATES = "cytofed.client.states:SealedStates.save"
OUTBOX = "cytofed.client.outbox:Outbox.put"
PROTOCOL = "cytofed.privacy.secagg_coordinator"
LAB_STEPS = [
    ("1-keys-made", f"{STATES}:after:1", FULL),
    ("1-shares-dealt", f"{STATES}:after:2", FULL),
    ("3-before-reserve", f"{BUDGET}.reserve:before:1", FULL),
    ("3-reserved", f"{BUDGET}.reserve:after:1", FULL),
    ("3-trained", "cytofed.client.opening:OutboxUpdates.save:before:1", FULL),
    ("3-update-kept", "cytofed.client.opening:OutboxUpdates.save:after:1", FULL),
    ("4-masked", f"{STATES}:after:4", FULL),
    ("4-before-outbox", f"{OUTBOX}:before:1", FULL),
    ("4-in-outbox", f"{OUTBOX}:after:1", QUICK),
    ("4-sent", f"{BUDGET}.settle:before:1", FULL),
    ("4-settled", f"{BUDGET}.settle:after:1", FULL),
    ("5-agreed", f"{STATES}:after:5", FULL),
    ("5-revealed", f"{STATES}:after:6", FULL),
    ("7-scores-reserved", f"{BUDGET}.reserve:after:2", FULL),
    ("7-scores-in-outbox", f"{OUTBOX}:after:2", FULL),
    ("8-result-kept", "cytofed.client.policy:PlanBook.ended:before:1", FULL),
]
COORDINATOR_STEPS = [
    ("1-cohort-fixed", "cytofed.server.runs:RunFolder.fix_cohort:after:1", FULL),
    ("1-keys-announced", f"{PROTOCOL}:announce:after:1", FULL),
    ("2-order-packed", "cytofed.server.secure:pack_order:after:1", FULL),
    ("5-one-vector-added", "cytofed.server.secure:add_words:after:1", FULL),
    ("5-before-reveal", f"{PROTOCOL}:call_reveal:before:1", FULL),
    ("5-unmasked", f"{PROTOCOL}:unmask:after:1", FULL),
    ("6-before-checkpoint", "cytofed.server.app:save_progress:before:1", QUICK),
    ("6-checkpointed", "cytofed.server.app:save_progress:after:1", FULL),
    ("7-one-tally-added", "cytofed.server.secure:add_words:after:4", FULL),
    ("7-scored", "cytofed.server.app:keep_scores:after:2", FULL),
    ("6-before-results", "cytofed.server.app:write_results:before:1", FULL),
    ("6-results-written", "cytofed.server.app:write_results:after:1", FULL),
    ("8-one-delivered", "cytofed.server.runs:RunFolder.deliver:after:1", FULL),
]


def steps(listed: list[tuple[str, str, tuple[pytest.MarkDecorator, ...]]]) -> list[Any]:
    return [pytest.param(point, id=name, marks=marks) for name, point, marks in listed]


@pytest.mark.parametrize("point", steps(LAB_STEPS))
def test_private_masked_run_survives_kill_9_of_a_lab(standing: Federation, point: str) -> None:
    restart(standing, "lab-2", f"kill:{point}")
    run = queue(standing, PRIVATE)
    approve(standing, run)
    died(standing, "lab-2")
    standing.start("lab-2")
    completed(standing, run)


@pytest.mark.parametrize("point", steps(COORDINATOR_STEPS))
def test_private_masked_run_survives_kill_9_of_the_coordinator(
    standing: Federation, point: str
) -> None:
    restart(standing, "coordinator", f"kill:{point}")
    run = queue(standing, PRIVATE)
    approve(standing, run)
    died(standing, "coordinator")
    standing.start("coordinator")
    completed(standing, run)


# --- the line between them


def through(federation: Federation, lab: str, port: int) -> None:
    """From its next start on, the lab reaches the coordinator by way of another port."""
    file = federation.root / lab / "federation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "address": f"127.0.0.1:{port}"}))


@pytest.mark.parametrize("first_bytes", [pytest.param(900), pytest.param(2500, marks=FULL)])
def test_private_masked_run_survives_a_line_that_is_cut_all_the_time(
    standing: Federation, first_bytes: int
) -> None:
    with BreakingLine(standing.port, first_bytes=first_bytes) as line:
        through(standing, "lab-2", line.port)
        restart(standing, "lab-2")
        run = queue(standing, PRIVATE)
        approve(standing, run)
        completed(standing, run)
        assert line.cuts > 10
    through(standing, "lab-2", standing.port)
    restart(standing, "lab-2")


def test_private_masked_run_survives_every_seventh_request_failing(standing: Federation) -> None:
    restart(standing, "coordinator", "stumble:7")
    run = queue(standing, PRIVATE)
    approve(standing, run)
    completed(standing, run)
    restart(standing, "coordinator")


# --- labs that are not there


def without_lab_3(federation: Federation, run: str) -> str:
    """The run goes on with the two others and ends incomplete; why lab-3 was absent."""
    summary = federation.summary(run)
    assert summary["status"] == "incomplete"
    [one] = summary["participation"]
    assert one["received"] == ["lab-1", "lab-2"]
    consistent(federation)
    return str(one["absent"]["lab-3"])


def approved_by_two(federation: Federation, run: str) -> None:
    """lab-3's word, and lab-1's, are with the coordinator; the run waits for lab-2."""
    approve(federation, run, "lab-3", "lab-1")
    file = federation.coordinator / "runs" / run / "private" / "decisions" / "lab-3"
    federation.until(file.is_file, "lab-3's approval is known")


SHORT = {
    **PLAN,
    "train": {**PLAN["train"], "rounds": 1},
    "cohort": {"min_labs": 2, "wait_s": 8, "round_timeout_s": 600},
}
"""goes on without a lab that is away for 8 seconds; the two others are there throughout"""


@pytest.mark.parametrize("seconds", [pytest.param(600), pytest.param(-600, marks=FULL)])
def test_lab_with_a_clock_off_by_ten_minutes_is_absent_and_told_so(
    standing: Federation, seconds: int
) -> None:
    run = queue(standing, SHORT)
    approved_by_two(standing, run)
    restart(standing, "lab-3", f"clock:{seconds}")
    approve(standing, run, "lab-2")
    assert "not connected" in without_lab_3(standing, run)
    assert "clock is off by minutes" in lab_log(standing, "lab-3")
    restart(standing, "lab-3")


def test_lab_with_another_authority_sends_nothing(standing: Federation) -> None:
    own = standing.root / "lab-3" / "ca.pem"
    kept = own.read_bytes()
    run = queue(standing, SHORT)
    approved_by_two(standing, run)
    standing.kill("lab-3", signal.SIGTERM)
    own.write_bytes(pki.new_authority("fed").certificate)
    left = messages(standing, "lab-3")
    standing.start("lab-3")
    approve(standing, run, "lab-2")
    assert "not connected" in without_lab_3(standing, run)
    assert "not by the authority that this lab pinned" in lab_log(standing, "lab-3")
    assert messages(standing, "lab-3") == left
    own.write_bytes(kept)
    restart(standing, "lab-3")


def test_box_that_opens_tls_reads_nothing_and_is_named(
    standing: Federation, tmp_path: Path
) -> None:
    box = InspectingBox(tmp_path / "box")
    left = messages(standing, "lab-3")
    before = lab_log(standing, "lab-3")
    standing.kill("lab-3", signal.SIGTERM)
    through(standing, "lab-3", box.port)
    standing.start("lab-3")
    words = "a proxy that inspects TLS"
    standing.until(
        lambda: words in lab_log(standing, "lab-3")[len(before) :], "lab-3 says what is wrong"
    )
    told = standing.run("lab-3", "client", "check", standing.root / "lab-3", code=5)
    assert "Some Proxy CA" in told
    assert box.tries >= 2
    assert box.seen == b""
    assert messages(standing, "lab-3") == left
    box.close()
    through(standing, "lab-3", standing.port)
    restart(standing, "lab-3")


def messages(federation: Federation, lab: str) -> int:
    directory = ClientDirectory.open(federation.root / lab)
    return len(verify(directory.egress, directory.identity().public).messages)


@pytest.mark.faults
def test_slow_lab_is_absent_by_name_and_does_not_hold_up_the_others(standing: Federation) -> None:
    restart(standing, "lab-3", "sleep:cytofed.client.training:train:900")
    run = queue(standing, SHORT, cohort={**SHORT["cohort"], "round_timeout_s": 45})
    approve(standing, run)
    assert "no answer before the deadline" in without_lab_3(standing, run)
    standing.kill("lab-3")
    standing.start("lab-3")


def ended_while_lab_3_is_away(federation: Federation) -> tuple[str, str]:
    """A run that lab-3 approved and then left with a kill; why it was absent."""
    run = queue(federation, SHORT)
    approved_by_two(federation, run)
    federation.kill("lab-3")
    approve(federation, run, "lab-2")
    return run, without_lab_3(federation, run)


@pytest.mark.faults
def test_lab_that_never_comes_back_is_absent_by_name(standing: Federation) -> None:
    run, why = ended_while_lab_3_is_away(standing)
    assert "not connected" in why, run
    standing.start("lab-3")


@pytest.mark.faults
def test_lab_that_was_away_gets_its_result_while_the_next_plan_waits(standing: Federation) -> None:
    run, _ = ended_while_lab_3_is_away(standing)
    waiting = queue(standing, PLAN)
    standing.start("lab-3")
    directory = ClientDirectory.open(standing.root / "lab-3")
    result = partial(result_of, directory, run)
    standing.until(result, "lab-3 has the model")
    assert standing.state(waiting)["phase"] == "approval"
    send_command(standing.coordinator / "control.sock", "stop-run", run=waiting)
    assert standing.summary(waiting)["status"] == "failed"


# --- two of the same, and too little room


def test_second_daemon_on_one_directory_is_refused(standing: Federation) -> None:
    standing.run("lab-1", "client", "start", standing.root / "lab-1", code=1)


@pytest.mark.faults
def test_second_daemon_with_the_same_key_pays_nothing_twice(standing: Federation) -> None:
    plan = {**PRIVATE, "secure_aggregation": {"enabled": False}}
    copy = standing.root / "lab-2-copy"
    standing.kill("lab-2", signal.SIGTERM)
    run = queue(standing, plan, cohort={**SHORT["cohort"], "round_timeout_s": 60})
    standing.start("lab-2")
    approve(standing, run, "lab-2")
    shutil.copytree(standing.root / "lab-2", copy, ignore=shutil.ignore_patterns("*.part"))
    standing.start("lab-2", home=copy)
    approve(standing, run, "lab-1", "lab-3")
    summary = standing.summary(run)
    standing.kill(copy.name)
    assert summary["status"] in ("completed", "incomplete")
    found = spent(standing, "lab-2", run)
    assert len(found) == len(set(found)) <= 4
    answers: dict[tuple[str, int], set[str]] = {}
    for home in (standing.root / "lab-2", copy):
        directory = ClientDirectory.open(home)
        for record in verify(directory.egress, directory.identity().public).messages:
            body = record.body
            if body["run"] == run and body["type"] in ("update", "evaluation"):
                place = (body["type"], body["round"])
                answers.setdefault(place, set()).add(body["sha256"])
    # Each sealing is new, so two daemons may show two hashes only where one update was sent twice.
    assert all(len(hashes) <= 2 for hashes in answers.values())


@pytest.mark.faults
def test_full_disk_at_a_lab_costs_its_rounds_and_heals(tmp_path: Path, sample: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    home = tmp_path / "lab-3"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(home)], check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    federation = founded(tmp_path, sample)
    try:
        for lab in LABS:
            federation.start(lab)
        run = queue(federation, SHORT, cohort={**SHORT["cohort"], "round_timeout_s": 60})
        approved_by_two(federation, run)
        fill(home / "filling")
        approve(federation, run, "lab-2")
        why = without_lab_3(federation, run)
        assert "cannot be written" in why or "at the lab" in why or "never answered" in why
        assert federation.running["lab-3"].poll() is None
        (home / "filling").unlink()
        run = queue(federation, PRIVATE)
        approve(federation, run)
        completed(federation, run)
    finally:
        federation.kill_all()
        subprocess.run(["umount", str(home)], check=True)


def fill(path: Path) -> None:
    """All the room that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


# --- the past comes back


@pytest.mark.faults
def test_ledger_put_back_from_a_backup_stops_the_lab_until_all_is_charged(
    federation: Federation,
) -> None:
    for lab in LABS:
        federation.start(lab)
    ledger = ClientDirectory.open(federation.root / "lab-2").settings().ledger
    backup = ledger.read_bytes()
    run = queue(federation, PRIVATE)
    approve(federation, run)
    completed(federation, run)
    before = total(federation, "lab-2")

    federation.kill("lab-2", signal.SIGTERM)
    ledger.write_bytes(backup)
    home = federation.root / "lab-2"
    federation.run("lab-2", "client", "start", home, code=5)
    federation.run("lab-2", "client", "egress", home, "--verify", code=5)
    federation.run("lab-2", "client", "budget", home, "--restore-charge")
    assert total(federation, "lab-2") >= before
    federation.run("lab-2", "client", "egress", home, "--verify")
    federation.start("lab-2")
    run = queue(federation, PRIVATE)
    approve(federation, run)
    completed(federation, run)


def total(federation: Federation, lab: str) -> float:
    with open_ledger(ClientDirectory.open(federation.root / lab).settings()) as book:
        return book.balance().total.epsilon


@pytest.mark.faults
def test_coordinator_put_back_from_a_backup_is_paid_nothing_twice(federation: Federation) -> None:
    for lab in LABS:
        federation.start(lab)
    plan = {**PRIVATE, "secure_aggregation": {"enabled": False}}
    run = queue(federation, plan)
    approve(federation, run)
    federation.until(lambda: federation.records(run), "the first round is done")
    federation.kill("coordinator")
    backup = federation.root / "backup"
    shutil.copytree(federation.coordinator, backup, ignore=shutil.ignore_patterns("*.sock"))
    federation.start("coordinator")
    completed(federation, run)
    paid = {lab: spent(federation, lab, run) for lab in LABS}

    federation.kill("coordinator", signal.SIGTERM)
    shutil.rmtree(federation.coordinator)
    backup.rename(federation.coordinator)
    federation.start("coordinator")
    summary = federation.summary(run)
    # The labs have closed the run: rounds that the coordinator forgot are not trained again.
    assert summary["status"] in ("incomplete", "failed")
    assert set(summary["participation"][-1]["absent"]) == set(LABS)
    assert {lab: spent(federation, lab, run) for lab in LABS} == paid
    consistent(federation)
    run = queue(federation, plan)
    approve(federation, run)
    completed(federation, run)


@pytest.mark.faults
def test_revoked_lab_is_absent_by_name_and_stays_out(federation: Federation) -> None:
    for lab in LABS:
        federation.start(lab)
    run = queue(federation, SHORT)
    approved_by_two(federation, run)
    federation.run("coordinator", "server", "revoke", federation.coordinator, "lab-3")
    approve(federation, run, "lab-2")
    summary = federation.summary(run)
    assert summary["status"] in ("completed", "incomplete")
    assert all(r["received"] == ["lab-1", "lab-2"] for r in summary["participation"])
    federation.until(
        lambda: "refuses this lab" in lab_log(federation, "lab-3"), "lab-3 says why it is out"
    )
    consistent(federation)
