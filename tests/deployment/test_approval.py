"""What persons of a lab type, beside a real coordinator that swaps labs behind their back, or whose
run is stopped: nothing unseen is approved, and nothing that is over holds budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.directory import ClientDirectory

from .conftest import PRIVATE, Federation, deal, free_port

LAB, OTHER = "lab-1", "lab-2"
PLAN = PRIVATE.replace("min_labs: 3", "min_labs: 2").replace(
    "secure_aggregation: {enabled: true}\n", ""
)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Federation]:
    """Two labs; the process of one of them does not run, so that runs wait for its decision."""
    root = tmp_path_factory.mktemp("approval")
    deal(sample, root, (LAB, OTHER), each=1)
    made = Federation(root, (), free_port())
    try:
        made.found()
        for lab in (LAB, OTHER):
            made.join(lab, "--patients", "name:_0*([0-9])", "--patients-declared", "20")
        made.kill("coordinator")
        made.start("coordinator", "lie:overreach:swap_roster")
        made.start(LAB)
        yield made
    finally:
        made.kill_all()


def client(made: Federation, command: str, *flags: str | Path, code: int = 0) -> str:
    words = command.split()
    return made.run(LAB, "client", *words, made.root / LAB, *flags, code=code)


def offers(made: Federation, run: str) -> list[Any]:
    entries = ClientDirectory.open(made.root / LAB).plans().entries()
    return [entry for entry in entries if entry.run == run]


def held(made: Federation) -> float:
    return float(json.loads(client(made, "budget", "--json"))["held"]["epsilon"])


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_labs_swapped_after_the_look_are_not_approved(federation: Federation) -> None:
    run, plan = federation.queue(PLAN)
    federation.until(lambda: offers(federation, run), "the lab has the offer")
    [listed] = json.loads(client(federation, "plans", "--json"))["plans"]
    assert (listed["state"], listed["plan_sha256"]) == ("waiting", plan)
    (federation.coordinator / "swap").touch()
    federation.until(lambda: len(offers(federation, run)) == 2, "the lab has another offer")
    seen, other = offers(federation, run)
    assert seen.sha256 == listed["offer"]
    client(federation, "approve", plan, code=2)
    client(federation, "approve", seen.sha256, code=3)
    assert held(federation) == 0
    told = client(federation, "plan show", other.sha256)
    for member in other.offer.roster.members:
        assert member.identity.fingerprint in told
    assert [p["state"] for p in json.loads(client(federation, "plans", "--json"))["plans"]] == [
        "replaced",
        "waiting",
    ]
    client(federation, "reject", other.sha256)
    (federation.coordinator / "swap").unlink()
    federation.run("c", "server", "stop-run", federation.coordinator, run)
    federation.summary(run)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_stopped_run_holds_nothing_and_is_not_approved(federation: Federation) -> None:
    run, plan = federation.queue(PLAN.replace("name: tiny", "name: stopped"))
    federation.until(lambda: offers(federation, run), "the lab has the offer")
    client(federation, "plans")
    said = client(federation, "approve", plan, "--by", "Ada Roe", "--note", "seen")
    assert "approved by   1 of 1 by Ada Roe" in said
    assert "every key of the plan" in said
    assert held(federation) > 0
    federation.run("c", "server", "stop-run", federation.coordinator, run)
    federation.until(lambda: offers(federation, run)[0].ended, "the lab knows of the end")
    assert held(federation) == 0
    client(federation, "approve", plan, code=3)
    assert held(federation) == 0


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_lab_that_approves_after_the_end_learns_of_it(federation: Federation) -> None:
    run, _ = federation.queue(PLAN.replace("name: tiny", "name: late"))
    [entry] = federation.until(lambda: offers(federation, run), "the lab has the offer")
    federation.kill(LAB)
    federation.run("c", "server", "stop-run", federation.coordinator, run)
    federation.summary(run)
    client(federation, "approve", entry.sha256)
    assert held(federation) > 0
    federation.start(LAB)
    federation.until(lambda: offers(federation, run)[0].ended, "the lab knows of the end")
    assert held(federation) == 0
