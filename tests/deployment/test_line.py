"""A private run from a model that was trained without privacy, by real processes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from .conftest import PLAN, PRIVATE, Federation, deal, free_port


def two_plans(federation: Federation, lab: str) -> bool:
    return len(list((federation.root / lab / "plans").glob("*.json"))) == 2


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_private_run_from_a_model_without_privacy_promises_its_users_nothing(
    tmp_path: Path, sample: Path
) -> None:
    labs = ("lab-1", "lab-2", "lab-3")
    deal(sample, tmp_path, labs)
    federation = Federation(tmp_path, (), free_port())
    try:
        federation.found()
        for lab in labs:
            federation.join(lab, "--patients", "name:_0*([0-9])", "--patients-declared",
                            "20")  # fmt: skip
            federation.start(lab)
        federation.labs = labs
        run, plan_sha256 = federation.queue(PLAN)
        federation.approve(plan_sha256)
        assert federation.summary(run)["lineage"]["sole"]
        for lab in labs:
            federation.wait_for_model(lab)
        model = federation.coordinator / "runs" / run / "model.safetensors"
        private = PRIVATE.replace("model: {width: 8}", f"model: {{width: 8, start: {model}}}")
        again, plan_sha256 = federation.queue(private)
        for lab in labs:
            federation.until(partial(two_plans, federation, lab), f"{lab} has the second plan")
            listed = json.loads(
                federation.run(lab, "client", "plans", federation.root / lab, "--json")
            )
            [offered] = [p for p in listed["plans"] if p["run"] == again]
            warnings = " ".join(offered["price"]["warnings"])
            assert f"the model of run {run}, in which this lab took part" in warnings
            assert "unbounded" in warnings
            federation.run(lab, "client", "approve", federation.root / lab, plan_sha256)
        summary = federation.summary(again)
        assert summary["status"] == "completed"
        told = summary["lineage"]["whole"]
        assert told["epsilon"] is None
        assert f"run {run} trained without differential privacy" in told["statement"]
        card = (federation.coordinator / "runs" / again / "model_card.md").read_text()
        assert "users of the model." not in card
        assert "against its users" in card
        assert "unbounded" in card
    finally:
        federation.kill_all()
