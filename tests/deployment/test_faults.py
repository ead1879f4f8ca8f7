"""Kills of real processes: a crash costs at most the round under way, nothing is spent twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import verify

from .conftest import PLAN, PRIVATE, Federation, deal, free_port

LONG = PLAN.replace("rounds: 2, steps_per_round: 2", "rounds: 4, steps_per_round: 12")


def test_run_survives_kills_of_the_coordinator_and_of_a_lab(federation: Federation) -> None:
    for lab in federation.labs:
        federation.start(lab)
    run, plan_sha256 = federation.queue(LONG)
    federation.approve(plan_sha256)

    federation.until(lambda: federation.records(run), "the first round is done")
    federation.kill("coordinator")
    federation.kill("lab-2")
    done = len(federation.records(run))
    federation.start("coordinator")
    federation.start("lab-2")

    summary = federation.summary(run)
    assert summary["status"] == "completed"
    assert summary["rounds"] == 4 > done
    assert all(r["received"] == list(federation.labs) for r in summary["participation"])
    for lab in federation.labs:
        federation.wait_for_model(lab)
        assert not sent_twice(federation.root / lab)


def sent_twice(home: Path) -> list[tuple[str, int, int]]:
    """Orders that were answered in two ways, by what left the lab."""
    report = verify(home / "egress.log", ClientDirectory.open(home).identity().public)
    answers: dict[tuple[str, int, int], set[str]] = {}
    for record in report.messages:
        body = record.body
        if body["type"] in ("update", "evaluation", "masked"):
            order = (body["type"], body["round"], body["slot"])
            answers.setdefault(order, set()).add(body["sha256"])
    assert answers
    return [order for order, hashes in answers.items() if len(hashes) > 1]


@pytest.mark.faults
def test_lab_that_never_comes_back_is_absent_by_name(federation: Federation) -> None:
    plan = LONG.replace("min_labs: 3, wait_s: 60", "min_labs: 2, wait_s: 3")
    for lab in federation.labs:
        federation.start(lab)
    run, plan_sha256 = federation.queue(plan)
    federation.approve(plan_sha256)
    federation.until(lambda: federation.records(run), "the first round is done")
    federation.kill("lab-3", 15)
    summary = federation.summary(run)
    assert summary["status"] == "completed"
    assert "lab-3" in summary["participation"][-1]["absent"]


@pytest.mark.slow  # minutes on a busy machine; joins the matrix with the rest of deployment
def test_kill_of_the_coordinator_costs_a_private_masked_run_nothing(
    tmp_path: Path, sample: Path
) -> None:
    labs = ("lab-1", "lab-2", "lab-3")
    deal(sample, tmp_path, labs)
    federation = Federation(tmp_path, (), free_port())
    try:
        federation.found()
        for lab in labs:
            federation.join(lab, "--patients", "name:_0*([0-9])", "--patients-declared", "20")
            federation.start(lab)
        federation.labs = labs
        run, plan_sha256 = federation.queue(PRIVATE.replace("rounds: 1", "rounds: 3"))
        federation.approve(plan_sha256)
        federation.until(lambda: federation.records(run), "the first round is done")
        federation.kill("coordinator")
        federation.start("coordinator")
        assert federation.summary(run)["status"] == "completed"
        for lab in labs:
            federation.wait_for_model(lab)
            told = federation.run(lab, "client", "budget", federation.root / lab, "--json")
            rounds = [event["round"] for event in json.loads(told)["events"]]
            assert rounds == [1, 2, 3]
            federation.kill(lab, 15)
            federation.run(lab, "client", "egress", federation.root / lab, "--verify")
    finally:
        federation.kill_all()
