"""A coordinator that holds one approval asks for more than was approved, and gets nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

import cytofed.client.app
from cytofed.client.enforcement import Record
from cytofed.documents import Offer
from cytofed.errors import InputError
from cytofed.messages import BadMessage
from tests.attacks.boundary import Boundary, boundary, plan_of

ROUNDS = {"train": {"rounds": 4, "steps_per_round": 1, "batch": 8}, "evaluation": {"every": 2}}
PRIVATE: dict[str, Any] = {
    **ROUNDS,
    "privacy": {"unit": "patient", "epsilon": 8, "delta": 1e-3, "declared_patients": 20},
    "evaluation": {"every": 2, "sigma": 4.0},
}


@pytest.fixture
def stage(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boundary]:
    with boundary(tmp_path, sample, monkeypatch) as found:
        yield found


def refused(stage: Boundary, ask: Callable[[], Any], why: str) -> None:
    """Nothing of an image leaves, and the lab says why."""
    before = stage.left()
    with pytest.raises(BadMessage, match=why):
        ask()
    assert stage.left() == before


def moved(stage: Boundary, offer: Offer) -> dict[str, Any]:
    """Other weights than the start's."""
    return {name: values + 1 for name, values in stage.weights(offer).items()}


@pytest.mark.parametrize("plan", [ROUNDS, PRIVATE], ids=["plain", "private"])
def test_one_approval_gives_each_round_and_each_due_score_once(
    stage: Boundary, plan: dict[str, Any]
) -> None:
    offer = stage.approved(plan_of(**plan))
    stage.train(offer, 1)
    refused(stage, lambda: stage.evaluate(offer, 1), "every 2 rounds")
    stage.train(offer, 2)
    stage.evaluate(offer, 2)
    refused(stage, lambda: stage.evaluate(offer, 2, parts=moved(stage, offer)), "other weights")
    refused(stage, lambda: stage.train(offer, 1), "round")
    stage.train(offer, 4)
    refused(stage, lambda: stage.train(offer, 3), "round 4 came")
    stage.evaluate(offer, 4)
    refused(stage, lambda: stage.evaluate(offer, 2), "round 4 came")
    for number in range(5, 11):
        refused(stage, lambda n=number: stage.train(offer, n), "rounds 1 to 4")  # type: ignore[misc]
        refused(stage, lambda n=number: stage.evaluate(offer, n), "rounds 1 to 4")  # type: ignore[misc]
    kinds = [(kind, number) for kind, number in stage.left()]
    assert kinds == [("update", 1), ("update", 2), ("evaluation", 2), ("update", 4),
                     ("evaluation", 4)]  # fmt: skip
    stage.finish(offer)
    refused(stage, lambda: stage.train(offer, 4), "approved")


@pytest.mark.parametrize("plan", [ROUNDS, PRIVATE], ids=["plain", "private"])
def test_what_is_wrong_with_the_images_is_told_by_its_kind(
    stage: Boundary, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words about data count patients and name them: they stay in the lab's own log."""

    def fail(*_: object, **__: object) -> None:
        raise InputError("412 images, but 411 patient identifiers")

    offer = stage.approved(plan_of(**plan))
    monkeypatch.setattr(cytofed.client.app, "_train", fail)
    with pytest.raises(BadMessage, match="InputError at the lab") as found:
        stage.train(offer, 1)
    assert "41" not in str(found.value)


def test_a_lab_whose_last_patient_is_gone_answers_with_noise_as_before(stage: Boundary) -> None:
    images = [f for f in stage.lab.settings().data.rglob("*") if f.suffix in (".jpg", ".png")]
    assert images
    for file in images:
        file.unlink()
    offer = stage.approved(plan_of(**PRIVATE))
    stage.train(offer, 1)
    stage.train(offer, 2)
    stage.evaluate(offer, 2)
    assert [kind for kind, _ in stage.left()] == ["update", "update", "evaluation"]


def test_the_same_order_gives_the_same_bytes_and_another_slot_nothing(stage: Boundary) -> None:
    offer = stage.approved(plan_of(**ROUNDS))
    first, again = stage.train(offer, 1), stage.train(offer, 1)
    assert first == again
    refused(stage, lambda: stage.train(offer, 1, slot=1), "slots are for secure aggregation")


def test_a_lab_that_was_killed_knows_what_it_answered(stage: Boundary) -> None:
    offer = stage.approved(plan_of(**ROUNDS))
    stage.train(offer, 3)
    folder = stage.lab.run_folder(offer)
    stage.restart()
    refused(stage, lambda: stage.train(offer, 2), "round")
    for file in (folder / "answered.json", *(folder / "outbox").rglob("*.*")):
        if file.is_file():
            file.unlink()  # an older copy of the folder was put back
    assert Record(folder).load().round == 0
    assert stage.egress.last_round(offer.run, offer.plan.sha256) == 3
    refused(stage, lambda: stage.train(offer, 2), "round 3 came")


def test_what_was_not_decided_or_started_in_time_is_over(
    stage: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(**ROUNDS, cohort={"min_labs": 1, "approval_days": 3})
    offer, waiting = stage.approved(plan), stage.offer(plan, "run-2")

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return super().now(tz) + timedelta(days=3, minutes=1)

    monkeypatch.setattr("cytofed.client.daemon.datetime", Later)
    refused(stage, lambda: stage.train(offer, 1), "approval_days")
    stage.daemon._idle()
    approved, undecided = (
        next(e for e in stage.lab.plans().entries() if e.run == of.run) for of in (offer, waiting)
    )
    assert approved.ended
    assert "approval_days" in approved.reason
    assert undecided.state == "expired"
    refused(stage, lambda: stage.train(offer, 1), "approved")
