"""Lies about a secure sum between real processes: nobody's single update comes to light."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import PLAN, Federation, deal, free_port

SECURE = PLAN + "secure_aggregation: {enabled: true}\n"


def said(federation: Federation, lab: str) -> str:
    return (federation.root / f"{lab}.log").read_text()


@pytest.mark.faults  # with the other long runs of processes
@pytest.mark.timeout(1800)
def test_labs_that_are_told_different_things_open_no_sum(federation: Federation) -> None:
    """Other weight bounds, then other weights: both sums would be the first lab's own update."""
    federation.kill("coordinator", 15)
    federation.start("coordinator", "tell:lab-1")
    for lab in federation.labs:
        federation.start(lab)
    run, plan_sha256 = federation.queue(SECURE)
    federation.approve(plan_sha256)
    summary = federation.summary(run)
    assert summary["status"] == "failed"
    first, second = summary["participation"]
    assert set(first["absent"]) == set(second["absent"]) == {"lab-2", "lab-3"}
    for lab in ("lab-2", "lab-3"):
        assert "order with a weight bound of 1.15292e+18" in said(federation, lab)
        assert "labs were told different things" in said(federation, lab)


@pytest.mark.faults  # with the other long runs of processes
@pytest.mark.timeout(1800)
def test_lab_that_would_own_the_model_is_left_out_by_name(tmp_path: Path, sample: Path) -> None:
    labs = ("lab-1", "lab-2", "lab-3", "lab-4")
    deal(sample, tmp_path, labs)
    federation = Federation(tmp_path, labs, free_port())
    try:
        federation.found()
        for lab in labs:
            federation.start(lab, *(("claim:60",) if lab == "lab-4" else ()))
        run, plan_sha256 = federation.queue(SECURE.replace("rounds: 2", "rounds: 1"))
        federation.approve(plan_sha256)
        summary = federation.summary(run)
        assert summary["status"] == "completed"
        assert federation.state(run)["cohort"] == ["lab-1", "lab-2", "lab-3"]
        [(lab, why)] = federation.state(run)["absent"].items()
        assert lab == "lab-4"
        assert "approved with a weight of 1152921504606846976" in why
    finally:
        federation.kill_all()


@pytest.mark.faults  # with the other long runs of processes
@pytest.mark.timeout(1800)
def test_lab_that_deals_another_secret_is_proven_to_lie_and_no_round_is_lost(
    tmp_path: Path, sample: Path
) -> None:
    labs = ("lab-1", "lab-2", "lab-3", "lab-4")
    deal(sample, tmp_path, labs)
    federation = Federation(tmp_path, labs, free_port())
    try:
        federation.found()
        for lab in labs:
            federation.start(lab, *(("deal",) if lab == "lab-2" else ()))
        run, plan_sha256 = federation.queue(SECURE)
        federation.approve(plan_sha256)
        first, second = federation.summary(run)["participation"]
        assert list(first["absent"]) == ["lab-2"]
        assert "the seed of lab-2 is not the one it committed to" in first["absent"]["lab-2"]
        assert first["received"] == second["received"] == ["lab-1", "lab-3", "lab-4"]
    finally:
        federation.kill_all()
