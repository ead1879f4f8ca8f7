"""The ledger never understates, whatever crashes, races, is replayed, restored or altered."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import secrets
import shutil
import signal
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.privacy.accounting import (
    Gaussian,
    NonPrivate,
    PlanCost,
    SubsampledGaussian,
    max_rounds,
    price,
)
from cytofed.privacy.ledger import (
    AlreadyAnswered,
    Ledger,
    LedgerMissing,
    LedgerRolledBack,
    Limits,
    NotApproved,
    Order,
    OverBudget,
)

PLAN, OTHER_PLAN = "a" * 64, "b" * 64
TRAINING = SubsampledGaussian("patient", 0.25, 2.0, 4)
COST = PlanCost(1e-3, 150, 10, TRAINING, Gaussian("patient", 10.0, 1), evaluate_every=5)


PRICE = price(COST.events(), 1e-3).epsilon


def epsilon(*events: Any, delta: float = 1e-3) -> float:
    return price(events, delta, accountant="RDP").epsilon


def order(number: int = 1, **changes: Any) -> Order:
    base = Order("marrow", "run-1", number, 0, PLAN, f"weights {number}", f"order {number}")
    return replace(base, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state" / "ledger.sqlite"
    Ledger.create(path)
    return path


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger.open(path)


def approve(ledger: Ledger, plan: str = PLAN, federation: str = "marrow") -> None:
    ledger.hold(federation=federation, plan_sha256=plan, cost=COST)


def answer(ledger: Ledger, asked: Order) -> None:
    ledger.reserve(asked)
    ledger.release(asked, f"update of {asked.round}")
    ledger.settle(asked)


# What is spent and held.


def test_approval_holds_the_full_price_and_spends_nothing(ledger: Ledger) -> None:
    approve(ledger)
    balance = ledger.balance()
    assert balance.spent.epsilon == 0
    assert balance.held.epsilon == balance.total.epsilon == PRICE


def test_rounds_draw_on_the_hold_until_the_plan_is_spent(ledger: Ledger) -> None:
    approve(ledger)
    for number in range(1, 11):
        answer(ledger, order(number))
    for number in (5, 10):
        ledger.reserve(order(number, task="evaluate"))
    balance = ledger.balance()
    assert balance.held.epsilon == 0
    assert balance.spent.epsilon == PRICE
    with pytest.raises(NotApproved, match="used up"):
        ledger.reserve(order(11))


def test_three_rounds_cost_what_one_accountant_says_over_restarts_and_plans(path: Path) -> None:
    """The reset bug: not by a restart, a new round, a new run or a new plan."""
    for number, plan in enumerate((PLAN, OTHER_PLAN, "c" * 64)):
        with Ledger.open(path) as ledger:
            approve(ledger, plan)
            answer(ledger, order(plan_sha256=plan, run=f"run-{number}"))
    with Ledger.open(path) as ledger:
        spent = ledger.balance().spent.epsilon
    assert spent == pytest.approx(epsilon(replace(TRAINING, steps=12)))
    assert spent > 1.4 * epsilon(TRAINING)


def test_a_second_federation_draws_on_the_same_pool(path: Path) -> None:
    limits = Limits(epsilon=1.2 * PRICE)
    first, second = Ledger.open(path, limits=limits), Ledger.open(path, limits=limits)
    approve(first)
    with pytest.raises(OverBudget):
        approve(second, OTHER_PLAN, federation="blood")


def test_another_pool_of_the_same_machine_has_its_own_patients(path: Path) -> None:
    marrow, blood = Ledger.open(path, pool="marrow"), Ledger.open(path, pool="blood")
    approve(marrow)
    marrow.reserve(order())
    assert blood.balance().total.epsilon == 0
    assert marrow.balance().spent.epsilon > 0
    assert blood.head == marrow.head


def test_the_budget_does_not_start_anew_in_a_moved_folder(path: Path, tmp_path: Path) -> None:
    with Ledger.open(path) as ledger:
        approve(ledger)
        ledger.reserve(order())
        before = ledger.balance()
    shutil.move(path.parent, tmp_path / "elsewhere")
    with Ledger.open(tmp_path / "elsewhere" / path.name) as ledger:
        assert ledger.balance() == before


def test_reject_and_leave_free_only_what_was_never_reserved(ledger: Ledger) -> None:
    approve(ledger)
    approve(ledger, OTHER_PLAN)
    ledger.reserve(order())  # nothing left yet, but a crash may have hidden it
    assert ledger.free(federation="marrow", reason="left") == 2
    balance = ledger.balance()
    assert balance.held.epsilon == 0
    assert balance.spent.epsilon == epsilon(TRAINING)
    with pytest.raises(NotApproved):
        ledger.reserve(order(2))
    with pytest.raises(NotApproved):
        ledger.reserve(order())


def test_approving_twice_holds_once(ledger: Ledger) -> None:
    approve(ledger)
    head = ledger.head
    approve(ledger)
    assert ledger.head == head


def test_one_approval_pays_for_one_run(ledger: Ledger) -> None:
    """A coordinator that starts an approved plan again has no new budget."""
    approve(ledger)
    ledger.reserve(order())
    with pytest.raises(NotApproved, match="pays for run run-1, not for run-2") as error:
        ledger.reserve(order(run="run-2"))
    assert "reject" in error.value.hint
    ledger.free(federation="marrow", plan_sha256=PLAN, reason="run ended")
    approve(ledger)
    assert ledger.reserve(order(run="run-2")).state == "new"


def test_nothing_is_reserved_without_approval(ledger: Ledger) -> None:
    with pytest.raises(NotApproved, match="not approved") as error:
        ledger.reserve(order())
    assert error.value.exit_code == 3
    assert f"approve DIR {PLAN}" in error.value.hint


# Retries.


def test_the_same_order_again_spends_nothing(ledger: Ledger) -> None:
    approve(ledger)
    assert ledger.reserve(order()).state == "new"
    head = ledger.head
    again = ledger.reserve(order())
    assert (again.state, again.release_sha256) == ("retry", None)
    ledger.release(order(), "update")
    ledger.settle(order())
    assert ledger.reserve(order()).release_sha256 == "update"
    assert ledger.balance().spent.epsilon == epsilon(TRAINING)
    assert head != ledger.head


def test_the_same_round_in_the_next_slot_spends_nothing(ledger: Ledger) -> None:
    approve(ledger)
    answer(ledger, order())
    later = order(slot=1, order_sha256="other")
    reservation = ledger.reserve(later)
    assert (reservation.state, reservation.release_sha256) == ("next_slot", "update of 1")
    assert ledger.reserve(later).state == "retry"
    assert ledger.balance().spent.epsilon == epsilon(TRAINING)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_sha256": "other"},
        {"weights_sha256": "other", "slot": 1},
        {"order_sha256": "other"},
    ],
    ids=["weights", "weights in the next slot", "same slot, another order"],
)
def test_the_same_round_with_anything_else_is_refused(
    ledger: Ledger, changes: dict[str, Any]
) -> None:
    approve(ledger)
    answer(ledger, order())
    head = ledger.head
    with pytest.raises(AlreadyAnswered):
        ledger.reserve(order(**changes))
    assert ledger.head == head


def test_the_same_round_of_another_plan_is_paid_by_an_approval_of_its_own(ledger: Ledger) -> None:
    approve(ledger)
    answer(ledger, order())
    once = ledger.balance().spent.epsilon
    other = order(plan_sha256=OTHER_PLAN)
    with pytest.raises(NotApproved):
        ledger.reserve(other)
    approve(ledger, OTHER_PLAN)
    assert ledger.reserve(other).release_sha256 is None
    assert ledger.balance().spent.epsilon > once


def test_older_rounds_and_slots_are_past(ledger: Ledger) -> None:
    approve(ledger)
    ledger.reserve(order(1))
    ledger.reserve(order(3, slot=5))
    for past in (order(1), order(2), order(3, slot=4)):
        with pytest.raises(AlreadyAnswered):
            ledger.reserve(past)


def test_a_round_releases_one_update_however_often_it_is_trained(ledger: Ledger) -> None:
    """A retry that releases twice would cost twice what was reserved."""
    approve(ledger)
    ledger.reserve(order())
    ledger.release(order(), "first")
    ledger.release(order(), "first")
    with pytest.raises(VerificationError, match="another update"):
        ledger.release(order(slot=1), "second")


def test_nothing_is_released_or_settled_without_reservation(ledger: Ledger) -> None:
    approve(ledger)
    with pytest.raises(VerificationError, match="nothing was reserved"):
        ledger.release(order(), "update")
    with pytest.raises(VerificationError, match="nothing was reserved"):
        ledger.settle(order())


# Limits.


def test_one_number_is_the_price_the_hold_the_limit_and_what_is_spent(path: Path) -> None:
    """A limit of what a plan costs approves it on an empty ledger, and nothing below does."""
    for limit in (PRICE * 0.999, PRICE):
        ledger = Ledger.open(path, limits=Limits(epsilon=limit))
        assert ledger.price(COST).epsilon == ledger.after(COST).epsilon == PRICE
        if limit < PRICE:
            with pytest.raises(OverBudget):
                approve(ledger)
    assert ledger.fitting_rounds(COST) == COST.rounds
    approve(ledger)
    assert ledger.balance().held.epsilon == ledger.balance().total.epsilon == PRICE
    spent = []
    for number in range(1, 11):
        answer(ledger, order(number))
        spent.append(ledger.balance().spent.epsilon)
    assert spent == sorted(spent)
    for number in (5, 10):
        answer(ledger, order(number, task="evaluate"))
    assert ledger.summary()["spent"] == {"epsilon": PRICE, "delta": 1e-3, "accountant": "PRV"}


def test_after_an_early_end_at_most_the_plan_is_spent_and_at_least_what_was_used(
    ledger: Ledger,
) -> None:
    approve(ledger)
    for number in range(1, 10):
        answer(ledger, order(number))
    ledger.free(federation="marrow", plan_sha256=PLAN, reason="the coordinator stopped")
    exact = price([replace(TRAINING, steps=36)], 1e-3).epsilon
    assert exact - 0.02 <= ledger.balance().spent.epsilon <= PRICE
    assert ledger.balance().held.epsilon == 0


def test_a_plan_over_budget_is_refused_whole_with_its_price_and_a_way_out(path: Path) -> None:
    limit = 0.8 * price(COST.events(), 1e-4).epsilon
    ledger = Ledger.open(path, limits=Limits(epsilon=limit, delta=1e-4))
    with pytest.raises(OverBudget) as error:
        ledger.hold(federation="marrow", plan_sha256=PLAN, cost=COST)
    fitting = max_rounds(COST, epsilon=limit, delta=1e-4)
    assert error.value.exit_code == 3
    assert f"costs {ledger.price(COST)}" in error.value.message
    assert ", by PRV" in error.value.message
    assert f"train.rounds={fitting} or fewer" in error.value.hint
    assert error.value.fitting_rounds == fitting
    assert ledger.holds() == ()
    ledger.hold(federation="marrow", plan_sha256=PLAN, cost=COST.with_rounds(fitting))


def test_rounds_that_would_fit_do_so_under_every_limit(path: Path) -> None:
    limits = Limits(epsilon=0.8 * PRICE, epsilon_per_year=0.5 * PRICE)
    ledger = Ledger.open(path, limits=limits)
    with pytest.raises(OverBudget) as error:
        approve(ledger)
    fitting = COST.with_rounds(error.value.fitting_rounds)
    ledger.hold(federation="marrow", plan_sha256=OTHER_PLAN, cost=fitting)


def test_a_limit_lowered_after_approval_stops_the_next_round(path: Path) -> None:
    with Ledger.open(path) as ledger:
        approve(ledger)
        ledger.reserve(order(1))
    lowered = Limits(epsilon=1.1 * epsilon(TRAINING))
    with Ledger.open(path, limits=lowered) as ledger:
        with pytest.raises(OverBudget, match="round 2"):
            ledger.reserve(order(2))
        assert ledger.reserve(order(1)).state == "retry"


def test_a_yearly_limit_counts_the_last_365_days(path: Path) -> None:
    now = [datetime(2100, 1, 1, tzinfo=UTC)]
    limits = Limits(epsilon_per_year=1.3 * PRICE)
    ledger = Ledger.open(path, limits=limits, clock=lambda: now[0])
    approve(ledger)
    for number in range(1, 11):
        ledger.reserve(order(number))
    now[0] += timedelta(days=364)
    with pytest.raises(OverBudget, match="a year"):
        approve(ledger, OTHER_PLAN)
    now[0] += timedelta(days=2)
    approve(ledger, OTHER_PLAN)


def test_a_clock_turned_back_does_not_reorder_entries(path: Path) -> None:
    now = [datetime(2100, 6, 1, tzinfo=UTC)]
    ledger = Ledger.open(path, clock=lambda: now[0])
    approve(ledger)
    ledger.reserve(order(1))
    now[0] -= timedelta(days=1000)
    ledger.reserve(order(2))
    assert [event["at"][:10] for event in ledger.summary()["events"]] == ["2100-06-01"] * 2


IMAGES = PlanCost(1e-3, 150, 5, replace(TRAINING, unit="image"))
NOBODY = PlanCost(1e-3, 150, 5, NonPrivate())


@pytest.mark.parametrize("cost", [IMAGES, NOBODY], ids=["image", "none"])
@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_a_use_that_nothing_bounds_leaves_the_patients_unbounded_for_ever(
    path: Path, cost: PlanCost, task: Any
) -> None:
    if (cost.unit, task) == ("image", "evaluate"):
        cost = replace(cost, evaluation=Gaussian("image", 10.0, 1))
    now = datetime(2100, 3, 4, tzinfo=UTC)
    ledger = Ledger.open(path, clock=lambda: now)
    ledger.hold(federation="marrow", plan_sha256=PLAN, cost=cost)
    held = ledger.summary()
    assert (held["spent"]["epsilon"], held["held"]["epsilon"]) == (0, None)
    assert held["unbounded"] is None, "nothing was used yet"
    answer(ledger, order(task=task))
    ledger.free(federation="marrow", reason="left")
    approve(ledger, OTHER_PLAN)
    answer(ledger, order(1, plan_sha256=OTHER_PLAN, run="run-2"))
    for pool in ("default", "others"):
        with Ledger.open(path, pool=pool) as again:
            summary = json.loads(json.dumps(again.summary(), allow_nan=False))
            balance = again.balance()
        if pool == "others":
            assert (summary["unbounded"], summary["spent"]["epsilon"]) == (None, 0)
            continue
        assert summary["spent"]["epsilon"] is summary["total"]["epsilon"] is None
        assert summary["unbounded"] == {"since": "2100-03-04T00:00:00+00:00", "run": "run-1"}
        assert balance.told(balance.spent) == "unbounded since 2100-03-04, run run-1"
        assert summary["other_units"] == [cost.unit]


def test_an_unbounded_pool_refuses_all_under_a_limit_and_another_pool_does_not(
    path: Path,
) -> None:
    ledger = Ledger.open(path)
    ledger.hold(federation="marrow", plan_sha256=OTHER_PLAN, cost=NOBODY)
    approve(ledger)
    ledger.reserve(order(1))
    ledger.reserve(order(1, plan_sha256=OTHER_PLAN, run="plain"))
    limited = Ledger.open(path, limits=Limits(epsilon=1e6))
    with pytest.raises(OverBudget, match=r"unbounded since .*, run plain") as error:
        approve(limited, "c" * 64)
    assert "a pool of their own" in error.value.hint
    with pytest.raises(RefusedError, match="protects nothing"):
        limited.hold(federation="marrow", plan_sha256="c" * 64, cost=NOBODY)
    for asked in (order(2), order(2, plan_sha256=OTHER_PLAN, run="plain")):
        with pytest.raises(OverBudget, match="unbounded since"):
            limited.reserve(asked)
    assert limited.fitting_rounds(COST) == 0
    approve(Ledger.open(path, pool="others", limits=Limits(epsilon=1e6)))


def test_a_limit_set_under_a_run_without_privacy_stops_its_next_round(path: Path) -> None:
    Ledger.open(path).hold(federation="marrow", plan_sha256=PLAN, cost=NOBODY)
    limited = Ledger.open(path, limits=Limits(epsilon=1e6))
    with pytest.raises(OverBudget, match="no differential privacy"):
        limited.reserve(order())


def test_a_plan_for_images_counts_for_the_patient_who_has_most_of_them(path: Path) -> None:
    cost = replace(IMAGES, images_per_patient=7)
    as_patient = SubsampledGaussian("patient", 1 - 0.75**7, 2.0 / 7, 4)
    whole = price([replace(as_patient, steps=20)], 1e-3).epsilon
    with Ledger.open(path) as ledger:
        ledger.hold(federation="marrow", plan_sha256=PLAN, cost=cost)
        assert ledger.balance().held.epsilon == pytest.approx(whole)
        ledger.reserve(order())
        balance = ledger.balance()
    with Ledger.open(path) as ledger:
        assert ledger.balance() == balance
        assert balance.spent.epsilon == pytest.approx(epsilon(as_patient))
        assert balance.unbounded is None
    assert balance.spent.epsilon > 20 * epsilon(replace(TRAINING))
    with Ledger.open(path, limits=Limits(epsilon=1e4)) as limited:
        with pytest.raises(RefusedError, match="nothing says how many") as refused:
            limited.hold(federation="marrow", plan_sha256=OTHER_PLAN, cost=IMAGES)
        assert "images_per_patient" in refused.value.hint


def test_approved_anew_at_another_price_it_is_the_new_one_that_is_drawn_on(path: Path) -> None:
    ledger = Ledger.open(path)
    for most in (3, 9):
        cost = replace(IMAGES, images_per_patient=most)
        ledger.hold(federation="marrow", plan_sha256=PLAN, cost=cost)
    ledger.reserve(order())
    active = [hold for hold in ledger.holds() if hold.state == "active"]
    assert [hold.cost.images_per_patient for hold in active] == [9]


def test_spent_is_stated_at_the_labs_own_delta_or_the_smallest_approved(path: Path) -> None:
    ledger = Ledger.open(path)
    approve(ledger)
    smaller = replace(COST, delta=1e-4)
    ledger.hold(federation="marrow", plan_sha256=OTHER_PLAN, cost=smaller)
    assert ledger.balance().spent.delta == 1e-4
    assert Ledger.open(path, limits=Limits(delta=1e-6)).balance().spent.delta == 1e-6


@pytest.mark.parametrize("limits", [{"epsilon": 0.0}, {"delta": 1.0}, {"epsilon": math.nan}])
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="limit"):
        Limits(**limits)


def test_summary_is_json_with_the_contracts_keys(ledger: Ledger) -> None:
    approve(ledger)
    answer(ledger, order())
    summary = json.loads(json.dumps(ledger.summary(), allow_nan=False))
    assert {"pool", "unit", "spent", "held", "limit", "events"} <= set(summary)
    assert set(summary["spent"]) == {"epsilon", "delta", "accountant"}
    assert summary["unbounded"] is None
    event = summary["events"][0]
    assert (event["state"], event["sigma"], event["steps"]) == ("settled", 2.0, 4)


# Rollback.


def yesterdays(path: Path) -> Path:
    copy = path.with_suffix(".backup")
    shutil.copy(path, copy)
    return copy


def test_a_ledger_replaced_by_yesterdays_is_refused(path: Path) -> None:
    with Ledger.open(path) as ledger:
        approve(ledger)
        backup = yesterdays(path)
        ledger.reserve(order())
        sent = ledger.head
    os.replace(backup, path)
    with Ledger.open(path) as ledger, pytest.raises(LedgerRolledBack) as error:
        ledger.check_head(sent)
    assert error.value.exit_code == 5
    assert "--restore-charge" in error.value.hint


def test_a_fresh_ledger_in_place_of_the_old_is_refused(path: Path) -> None:
    with Ledger.open(path) as ledger:
        sent = ledger.head
    path.unlink()
    with pytest.raises(LedgerMissing):
        Ledger.open(path)
    Ledger.create(path)
    with Ledger.open(path) as ledger, pytest.raises(LedgerRolledBack):
        ledger.check_head(sent)


def test_a_restored_coordinator_is_no_rollback(ledger: Ledger) -> None:
    older = ledger.head
    approve(ledger)
    assert ledger.check_head(older) == "older"
    assert ledger.check_head(ledger.head) == "current"
    assert ledger.check_head("") == "none"


def test_a_file_replaced_under_a_running_daemon_is_noticed(path: Path) -> None:
    ledger = Ledger.open(path)
    approve(ledger)
    backup = yesterdays(path)
    os.replace(backup, path)
    with pytest.raises(LedgerRolledBack, match="replaced while it was in use"):
        ledger.reserve(order())


def test_restore_charge_charges_everything_approved_and_goes_on(path: Path) -> None:
    with Ledger.open(path) as ledger:
        approve(ledger)
        answer(ledger, order(1))
        backup = yesterdays(path)
        answer(ledger, order(2))
        approve(ledger, OTHER_PLAN)
        ledger.reserve(order(plan_sha256=OTHER_PLAN, run="run-2"))
        approvals, sent = ledger.holds(), ledger.head
    os.replace(backup, path)
    with Ledger.open(path) as ledger:
        spent = ledger.restore_charge(approvals, seen_heads=[sent])
        assert spent.epsilon == pytest.approx(epsilon(*COST.events(), *COST.events()))
        assert ledger.balance().held.epsilon == 0
        assert ledger.check_head(sent) == "older"
        # What the lost rounds released is unknown, so no round of theirs is answered again.
        for asked in (order(1), order(2), order(3)):
            with pytest.raises(RefusedError):
                ledger.reserve(asked)
        again = ledger.restore_charge(approvals[:1], seen_heads=[sent])
        assert again.epsilon == spent.epsilon
        approve(ledger)
        assert ledger.reserve(order(1, run="run-3")).state == "new"


# Damage.


def filled(path: Path) -> dict[str, Any]:
    with Ledger.open(path) as ledger:
        approve(ledger)
        for number in range(1, 4):
            answer(ledger, order(number))
        return ledger.summary()


def test_a_flipped_byte_in_any_entry_is_found(path: Path) -> None:
    filled(path)
    content = path.read_bytes()
    entries = [
        row[0].encode() for row in sqlite3.connect(path).execute("SELECT entry FROM entries")
    ]
    rng = random.Random(0)
    for entry in entries:
        position = content.index(entry) + rng.randrange(len(entry))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(VerificationError):
            Ledger.open(path)


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(path: Path) -> None:
    before = filled(path)
    content = path.read_bytes()
    rng = random.Random(0)
    for position in (*range(0, 100, 3), *(rng.randrange(len(content)) for _ in range(60))):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with Ledger.open(path) as ledger:
                assert ledger.summary() == before
        except CytofedError:
            continue


@pytest.mark.parametrize(
    "edit",
    [
        "DELETE FROM entries WHERE seq = 3",
        "UPDATE entries SET entry = replace(entry, '\"steps\":4', '\"steps\":1') WHERE seq = 2",
        "UPDATE entries SET hash = hash || '0' WHERE seq = 4",
        "INSERT INTO entries SELECT 99, entry, hash FROM entries WHERE seq = 3",
        "DELETE FROM entries",
        "DROP TABLE entries",
    ],
)
def test_an_edited_ledger_does_not_open(path: Path, edit: str) -> None:
    filled(path)
    with sqlite3.connect(path) as db:
        if not edit.startswith(("INSERT", "DROP")):
            with pytest.raises(sqlite3.IntegrityError, match="only appended"):
                db.execute(edit)
        db.execute("DROP TRIGGER no_update")
        db.execute("DROP TRIGGER no_delete")
        db.execute(edit)
    with pytest.raises(VerificationError):
        Ledger.open(path)


def test_no_ledger_and_an_empty_one_are_no_fresh_budget(tmp_path: Path) -> None:
    with pytest.raises(LedgerMissing):
        Ledger.open(tmp_path / "none.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(LedgerMissing):
        Ledger.open(tmp_path / "empty.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database" * 100)
    with pytest.raises(VerificationError, match="damaged"):
        Ledger.open(tmp_path / "text.sqlite")


def test_creating_again_keeps_what_is_there(path: Path) -> None:
    before = filled(path)
    Ledger.create(path)
    with Ledger.open(path) as ledger:
        assert ledger.summary() == before
    assert path.stat().st_mode & 0o077 == 0


# Crashes and races. A witness file, written by the worker itself, holds what really happened.


def work(
    path: Path, witness: Path, rounds: int, before_sql: Callable[[str], None] | None = None
) -> None:
    """A lab's loop from approval to settling, resumable at any point. Noise is new each time."""
    log = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    Ledger.create(path)
    ledger = Ledger.open(path)
    ledger._db.set_trace_callback(before_sql)
    ledger.hold(federation="marrow", plan_sha256=PLAN, cost=COST.with_rounds(rounds))
    reserved = [event["round"] for event in ledger.summary()["events"]]
    for number in range(max(reserved, default=1), rounds + 1):
        try:
            update = ledger.reserve(order(number)).release_sha256
        except AlreadyAnswered:
            continue  # overtaken by another worker
        if update is None:
            os.write(log, f"trained {number}\n".encode())
            update = secrets.token_hex(4)
            try:
                ledger.release(order(number), update)
            except VerificationError:
                continue  # another worker's update leaves
        os.write(log, f"sent {number} {update}\n".encode())
        ledger.settle(order(number))


def run_in_child(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)


def check_truth(path: Path, witness: Path) -> None:
    """Spend is never below the truth, and the chain holds."""
    lines = witness.read_text().splitlines() if witness.exists() else []
    if not path.exists() or not path.stat().st_size:
        assert not lines
        return
    Ledger.create(path)  # a kill within the first creation is completed
    with Ledger.open(path) as ledger:
        summary = ledger.summary()
    reserved = [event["round"] for event in summary["events"]]
    sent = defaultdict(set)
    for kind, number, *update in (line.split() for line in lines):
        assert int(number) in reserved
        if kind == "sent":
            sent[int(number)].update(update)
    assert len(reserved) == len(set(reserved))
    assert all(len(updates) == 1 for updates in sent.values())
    if reserved:
        steps = 4 * len({line.split()[1] for line in lines} or "1")
        truth = price([replace(TRAINING, steps=steps)], 1e-3).epsilon - 0.015  # PRV's error
        assert summary["spent"]["epsilon"] >= truth


def test_killed_between_any_two_statements_it_never_understates(tmp_path: Path) -> None:
    rounds = 2
    for kill_at in itertools.count(1):
        path, witness = tmp_path / f"{kill_at}.sqlite", tmp_path / f"{kill_at}.txt"
        left = [kill_at]

        def kill(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        _, status = os.waitpid(run_in_child(partial(work, path, witness, rounds, kill)), 0)
        check_truth(path, witness)
        if os.WIFEXITED(status):  # it went through: all statements were killed once
            assert os.WEXITSTATUS(status) == 0
            assert kill_at > 30
            return
        _, status = os.waitpid(run_in_child(partial(work, path, witness, rounds)), 0)
        assert status == 0, "the next start works"
        check_truth(path, witness)


@pytest.mark.parametrize(
    "kills", [40, pytest.param(300, marks=pytest.mark.faults)], ids=["40", "300"]
)
def test_killed_at_random_moments_it_never_understates(tmp_path: Path, kills: int) -> None:
    path, witness, rng = tmp_path / "ledger.sqlite", tmp_path / "witness.txt", random.Random(0)
    for _ in range(kills):
        pid = run_in_child(partial(work, path, witness, 10_000))
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        check_truth(path, witness)
    assert "sent" in witness.read_text()


def test_workers_that_race_share_one_reservation_and_one_update(tmp_path: Path) -> None:
    path, witness = tmp_path / "ledger.sqlite", tmp_path / "witness.txt"
    children = [run_in_child(partial(work, path, witness, 10)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    check_truth(path, witness)
    with Ledger.open(path) as ledger:
        assert ledger.balance().spent.epsilon == PRICE


def test_approvals_that_race_do_not_pass_the_limit_together(path: Path) -> None:
    limits = Limits(epsilon=1.2 * PRICE)

    def approve_one(plan: str) -> None:
        with Ledger.open(path, limits=limits) as ledger:
            approve(ledger, plan)

    children = [run_in_child(partial(approve_one, letter * 64)) for letter in "abcd"]
    exits = [os.waitpid(child, 0)[1] for child in children]
    assert exits.count(0) == 1
    with Ledger.open(path) as ledger:
        assert len(ledger.holds()) == 1


ACTIONS = st.tuples(
    st.sampled_from(["hold", "reserve", "reserve", "retry", "slot", "answer", "free", "reopen"]),
    st.sampled_from([PLAN, OTHER_PLAN]),
    st.integers(1, 8),
)


@given(st.lists(ACTIONS, min_size=5, max_size=25))
@settings(max_examples=12, deadline=None)
def test_spent_never_falls_and_spent_with_held_never_passes_the_limit(
    actions: list[tuple[str, str, int]],
) -> None:
    limits = Limits(epsilon=1.2 * PRICE)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger.create(path)
        ledger, spent, seen = Ledger.open(path, limits=limits), 0.0, [""]
        for action, plan, number in actions:
            asked = order(number, plan_sha256=plan, run=f"run {plan[0]}")
            try:
                match action:
                    case "hold":
                        approve(ledger, plan)
                    case "reserve" | "retry":
                        ledger.reserve(asked)
                    case "slot":
                        ledger.reserve(replace(asked, slot=number, order_sha256=str(number)))
                    case "answer":
                        answer(ledger, asked)
                    case "free":
                        ledger.free(federation="marrow", plan_sha256=plan, reason="test")
                    case "reopen":
                        ledger.close()
                        ledger = Ledger.open(path, limits=limits)
            except RefusedError:
                pass
            balance = ledger.balance()
            assert balance.spent.epsilon >= spent
            assert limits.epsilon is not None
            assert balance.spent.epsilon <= balance.total.epsilon <= limits.epsilon
            spent = balance.spent.epsilon
            assert ledger.check_head(seen[-1]) in ("none", "current", "older")
            seen.append(ledger.head)
        ledger.close()
