"""A lab that pauses works for nobody: no training, no scores, no step of secure aggregation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.policy import open_ledger
from cytofed.messages import BadMessage
from cytofed.sealed_message import new_content
from cytofed.secure_round import STEPS
from tests.attacks.boundary import Boundary, boundary, plan_of

SECURE: dict[str, Any] = {"secure_aggregation": {"enabled": True}, "cohort": {"min_labs": 3}}
PRIVATE: dict[str, Any] = {
    "privacy": {"unit": "patient", "epsilon": 8, "delta": 1e-3, "declared_patients": 20}
}


@pytest.fixture
def stage(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boundary]:
    with boundary(tmp_path, sample, monkeypatch) as found:
        yield found


def test_a_paused_lab_answers_no_order_and_no_step_and_takes_results(stage: Boundary) -> None:
    offer = stage.approved(plan_of(**SECURE))
    stage.lab.pause()
    for step in STEPS:
        with pytest.raises(BadMessage, match="paused"):
            stage.step(offer, step, b"request")
    for kind in ("train", "evaluate"):
        with pytest.raises(BadMessage, match="paused"):
            stage.train(offer, 1, kind=kind, labs=3, max_weight=32.0)
    with pytest.raises(BadMessage, match="paused"):
        stage.ask(offer, "query.start", 0, new_content({}, file=b"model"))
    assert stage.left() == []
    assert not list((stage.lab.run_folder(offer)).rglob("*.state"))
    stage.finish(offer)


@pytest.mark.parametrize("sections", [{}, PRIVATE], ids=["plain", "private"])
def test_pause_stops_a_training_that_runs_and_nothing_of_it_leaves(
    stage: Boundary, sections: dict[str, Any]
) -> None:
    some = {"rounds": 1, "steps_per_round": 12, "batch": 8}
    offer = stage.approved(plan_of(train=some, **sections))
    at_work = f"train for run {offer.run}, round 1"

    def pause_at_work(text: str) -> None:
        if text == at_work:
            stage.lab.pause()

    stage.daemon._note = pause_at_work
    with pytest.raises(BadMessage, match="paused"):
        stage.train(offer, 1)
    assert stage.left() == []
    assert not list(stage.lab.run_folder(offer).rglob("*.update"))
    stage.daemon._note = stage.notes.append
    stage.lab.resume()
    stage.train(offer, 1)
    assert stage.left() == [("update", 1)]
    with open_ledger(stage.lab.settings()) as book:
        events = [event for event in book.summary()["events"] if event["run"] == offer.run]
    assert len(events) <= 1, "the round is paid once"
