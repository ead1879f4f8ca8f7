"""An approval is for its plan's rounds, scores, bytes and days, and for nothing more."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.enforcement import (
    TRIES,
    Answered,
    Approved,
    Asked,
    Beyond,
    Record,
    caught_up,
    evaluations,
    longest_days,
    over,
    permit,
)
from cytofed.errors import RefusedError, VerificationError
from cytofed.plan import from_dict
from cytofed.privacy.ledger import AlreadyAnswered
from cytofed.secure_round import STEPS

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PRIVATE = {"unit": "patient", "sigma": 2.0, "declared_patients": 100}
SECURE = {"enabled": True}


def approved(*, max_days: float | None = None, **sections: Any) -> Approved:
    tree = {"train": {"rounds": 5}, "evaluation": {"every": 2}, **sections}
    return Approved(from_dict(tree), "r1", NOW, answer_bytes=1000, max_days=max_days)


def carried_out(
    plan: Approved, *orders: tuple[str, int], now: datetime = NOW, so_far: Answered | None = None
) -> Answered:
    found = so_far or Answered()
    for kind, number in orders:
        found = permit(Asked(kind, number, 0), plan, found, now=now)
    return found


def test_a_plan_is_carried_out_once_and_each_scored_round_is_scored() -> None:
    plan = approved()
    orders = [("train", 1), ("train", 2), ("evaluate", 2), ("train", 3), ("train", 4),
              ("evaluate", 4), ("train", 5), ("evaluate", 5)]  # fmt: skip
    assert carried_out(plan, *orders).round == 5
    assert evaluations(plan.plan) == 3


@pytest.mark.parametrize("number", [0, 6, 7, 10**6])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_round_that_the_plan_does_not_have_is_refused(kind: str, number: int) -> None:
    with pytest.raises(Beyond, match="rounds 1 to 5"):
        carried_out(approved(), (kind, number))


@pytest.mark.parametrize("number", [1, 3])
def test_scores_that_are_not_due_are_refused(number: int) -> None:
    with pytest.raises(Beyond, match="every 2 rounds"):
        carried_out(approved(), ("evaluate", number))


def test_a_private_plan_without_a_price_for_scores_is_asked_for_none() -> None:
    plan = approved(privacy=PRIVATE)
    with pytest.raises(Beyond, match="no scores"):
        carried_out(plan, ("evaluate", 2))
    assert evaluations(plan.plan) == 0


@pytest.mark.parametrize("kinds", [("train", "train"), ("evaluate", "train"),
                                   ("train", "evaluate"), ("evaluate", "evaluate")])  # fmt: skip
def test_rounds_only_rise(kinds: tuple[str, str]) -> None:
    so_far = carried_out(approved(), (kinds[0], 4))
    with pytest.raises(AlreadyAnswered, match="round 4"):
        carried_out(approved(), (kinds[1], 2), so_far=so_far)


def test_rounds_that_a_lab_missed_may_be_passed_over() -> None:
    assert carried_out(approved(), ("train", 1), ("train", 4)).round == 4


def test_an_order_is_tried_a_few_times_and_repeats_of_bytes_are_bounded_by_bytes() -> None:
    plan = approved()
    so_far = carried_out(plan, *[("train", 1)] * TRIES)
    with pytest.raises(Beyond, match="more than"):
        carried_out(plan, ("train", 1), so_far=so_far)
    order = Asked("train", 1, 0)
    again = permit(order, plan, so_far, now=NOW, again=True)
    assert again.tries == so_far.tries
    spent = again.sent(TRIES * plan.answer_bytes + 1)
    with pytest.raises(Beyond, match="bytes"):
        permit(order, plan, spent, now=NOW, again=True)
    assert carried_out(plan, ("train", 2), so_far=so_far).tries == {"train": 1}


def test_steps_and_slots_are_for_secure_aggregation_and_not_without_end() -> None:
    for asked in (Asked("query.secagg", 0, 0), Asked("train", 1, 1)):
        with pytest.raises(Beyond, match="secure aggregation"):
            permit(asked, approved(), Answered(), now=NOW)
    plan, so_far, step = (
        approved(secure_aggregation=SECURE),
        Answered(),
        Asked("query.secagg", 0, 0),
    )
    assert permit(Asked("train", 1, 7), plan, so_far, now=NOW).round == 1
    for _ in range(TRIES * len(STEPS) * 8):  # each step for each of five rounds and three scores
        so_far = permit(step, plan, so_far, now=NOW)
    with pytest.raises(RefusedError, match="steps of secure aggregation"):
        permit(step, plan, so_far, now=NOW)


def test_an_approval_that_nobody_used_expires() -> None:
    plan = approved(cohort={"approval_days": 3})
    late = NOW + timedelta(days=3, seconds=1)
    assert carried_out(plan, ("train", 1), now=NOW + timedelta(days=2.9)).round == 1
    with pytest.raises(Beyond, match="approval_days=3"):
        carried_out(plan, ("train", 1), now=late)
    started = carried_out(plan, ("train", 1))
    assert not over(plan, started, now=late)


def test_a_run_under_way_ends_one_day_too() -> None:
    plan = approved(cohort={"approval_days": 3, "wait_s": 3600, "round_timeout_s": 7200})
    days = longest_days(plan.plan)
    assert 3 < days < 10
    so_far = carried_out(plan, ("train", 1))
    late = NOW + timedelta(days=days, minutes=1)
    with pytest.raises(Beyond, match="5 rounds take at most"):
        carried_out(plan, ("train", 2), so_far=so_far, now=late)
    own = replace(plan, max_days=0.5)
    with pytest.raises(Beyond, match=r"limits\.max_run_days is 0\.5"):
        carried_out(own, ("train", 2), so_far=so_far, now=NOW + timedelta(days=0.6))


def test_a_record_comes_back_from_the_disk_and_another_file_is_refused(tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    assert record.load() == Answered()
    found = carried_out(approved(), ("train", 1), ("train", 2), ("evaluate", 2)).sent(77)
    record.save(found)
    assert record.load() == found
    [file] = (tmp_path / "run").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    for text in ("", "[]", "{}", file.read_text().replace('"round": 2', '"round": -1')):
        file.write_text(text)
        with pytest.raises(VerificationError, match="not what this lab wrote"):
            record.load()


def test_a_record_of_an_earlier_day_catches_up_with_what_left() -> None:
    plan = approved()
    old = carried_out(plan, ("train", 1))
    for kept in (old, Answered()):
        found = caught_up(kept, plan, last_round=4)
        assert found.started_at == NOW
        with pytest.raises(AlreadyAnswered):
            carried_out(plan, ("train", 3), so_far=found)
    assert caught_up(old, plan, last_round=1) == old
