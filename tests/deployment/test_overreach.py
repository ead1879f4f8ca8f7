"""A real coordinator's process that holds one approval and wants more, and a real lab's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import verify
from cytofed.client.policy import MAX_WAITING, open_ledger
from cytofed.plan import from_dict, to_dict
from cytofed.server.control import send_command

from .conftest import Federation, deal, free_port, result_of
from .overreach import FLOOD, MORE

LAB = "lab-1"
PLAN: dict[str, Any] = {
    "name": "greedy",
    "labels": {"scale": {"size_px": 32}},
    "model": {"width": 8},
    "train": {"rounds": 2, "steps_per_round": 1, "batch": 8},
    "cohort": {"min_labs": 1, "wait_s": 300, "round_timeout_s": 600},
}


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_greedy_coordinator_gets_what_was_approved_and_nothing_more(
    tmp_path: Path, sample: Path
) -> None:
    deal(sample, tmp_path, (LAB,))
    federation = Federation(tmp_path, (LAB,), free_port())
    try:
        federation.found()
        federation.kill("coordinator")
        lies = [f"lie:overreach:{name}" for name in ("flood", "demand_more", "forge_heads")]
        federation.start("coordinator", *lies)
        federation.start(LAB)
        lab = ClientDirectory.open(tmp_path / LAB)
        plan = from_dict(PLAN)
        socket = federation.coordinator / "control.sock"
        run = str(send_command(socket, "run", plan=to_dict(plan))["run"])

        def offers() -> list[Any]:
            entries = lab.plans().entries()
            waiting = sum(entry.state == "waiting" for entry in entries)
            assert waiting <= MAX_WAITING + 1, "and one that is just being replaced"
            return [e for e in entries if (e.run, e.plan_sha256) == (run, plan.sha256)]

        [entry] = federation.until(offers, "the lab has the plan")
        assert not list((lab.root / "runs").iterdir()), "nothing is built before approval"
        with open_ledger(lab.settings()) as book:
            lab.plans().approve(entry.sha256, lab.settings(), book)
        federation.until(partial(result_of, lab, run), "the lab has the model")
        assert federation.summary(run)["status"] == "completed"

        report = verify(lab.egress, lab.identity().public)
        told = [(str(r.body["type"]), int(r.body["round"])) for r in report.messages]
        left = [message for message in told if message[0] in ("update", "evaluation")]
        assert left == [("update", 1), ("evaluation", 1), ("update", 2), ("evaluation", 2)]
        [folder] = (lab.root / "runs").iterdir()
        assert folder.name == entry.offer.sha256

        log = (tmp_path / "coordinator.log").read_text()
        assert "LIE WORKED" not in log
        assert log.count("lie refused") == 2 * (MORE + 2)
        assert "rounds 1 to 2" in log
        assert len(report.messages) < FLOOD + 100
        own = (tmp_path / f"{LAB}.log").read_text()
        assert own.count("this lab never signed") == 1
        assert federation.running[LAB].poll() is None, "nobody makes a lab stop by a lie"
    finally:
        federation.kill_all()
