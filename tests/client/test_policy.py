"""A plan waits with its price until a person approves it, and never gets past the lab's limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cytofed.client.policy import (
    Entry,
    PlanBook,
    TooManyOffers,
    bytes_out,
    ledger_federation,
    open_ledger,
    price_of,
    refuse,
    refuse_cohort,
    restore_charge,
)
from cytofed.client.settings import AutoApprove, Settings
from cytofed.documents import COORDINATOR, Member, Offer, Roster
from cytofed.errors import InputError, RefusedError, VerificationError
from cytofed.plan import Plan, from_dict
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger, NotApproved, Order, OverBudget

CENTRE = Identity.generate(COORDINATOR)
KEYS = {lab: Identity.generate(lab) for lab in ("leeds", "porto", "york")}
LEEDS = KEYS["leeds"].public
P = 1000
PRIVATE = {
    "unit": "patient",
    "sigma": 2.0,
    "delta": 1e-5,
    "declared_patients": 100,
    "sampling_rate": 0.1,
}


def plan_of(**sections: Any) -> Plan:
    tree: dict[str, Any] = {
        "train": {"rounds": 10, "steps_per_round": 5},
        "privacy": PRIVATE,
        "secure_aggregation": {"enabled": True},
        "evaluation": {"sigma": 4.0, "every": 5},
    }
    return from_dict({**tree, **sections})


def roster_of(*labs: str, keys: dict[str, Identity] | None = None) -> Roster:
    found = {**KEYS, **(keys or {})}
    return Roster("f", 1, tuple(Member(found[lab].public, "", 100) for lab in labs or KEYS))


def offer_of(plan: Plan | None = None, run: str = "r1", roster: Roster | None = None) -> Offer:
    return Offer(run, plan or plan_of(), roster or roster_of())


@pytest.fixture
def lab(tmp_path: Path) -> Settings:
    Ledger.create(tmp_path / "ledger.sqlite")
    return Settings(
        data=tmp_path / "images",
        ledger=tmp_path / "ledger.sqlite",
        labels="marrow",
        patients="column:patient",
        patients_declared=100,
    )


def with_limits(lab: Settings, **limits: Any) -> Settings:
    return replace(lab, limits=replace(lab.limits, **limits))


@pytest.fixture
def plans(tmp_path: Path) -> PlanBook:
    days = iter(range(1000))
    return PlanBook(
        tmp_path / "plans",
        verified=partial(Offer.verified, coordinator=CENTRE.public),
        own=LEEDS,
        clock=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=next(days)),
    )


def offered(plans: PlanBook, offer: Offer) -> Entry:
    return plans.offered(offer.signed(CENTRE), parameters=P)


# --- limits


@pytest.mark.parametrize(
    ("limits", "plan", "names"),
    [
        ({"allowed_models": ("resnet18",)}, {}, ("cytonet", "allowed_models", "resnet18")),
        ({"allowed_strategies": ("fedprox",)}, {}, ("fedavg", "allowed_strategies")),
        (
            {"secure_aggregation_required": True},
            {"secure_aggregation": {"enabled": False}},
            ("secure_aggregation_required",),
        ),
        ({"min_cohort": 4}, {}, ("3 labs", "min_cohort is 4")),
        (
            {"min_cohort": 3},
            {"secure_aggregation": {"enabled": False}, "cohort": {"min_labs": 2}},
            ("2 labs", "min_cohort is 3"),
        ),
        ({"max_bytes_per_round": 4000}, {}, ("max_bytes_per_round is 4000",)),
        (
            {"trusted_peers": {"bath": "ab" * 32}, "min_trusted_peers": 1},
            {},
            ("min_trusted_peers is 1",),
        ),
        ({"trusted_peers": {"york": "ab" * 32}}, {}, ("york", "ab" * 8)),
    ],
)
def test_each_limit_refuses_by_name_with_value_and_way_out(
    lab: Settings, limits: dict[str, Any], plan: dict[str, Any], names: tuple[str, ...]
) -> None:
    offer = offer_of(plan_of(**plan))
    refuse(offer, lab, own=LEEDS, parameters=P)
    with pytest.raises(RefusedError) as caught:
        refuse(offer, with_limits(lab, **limits), own=LEEDS, parameters=P)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    for name in names:
        assert name in caught.value.message


@pytest.mark.parametrize("stated", [None, 90, {"leeds": 99, "york": 100}])
def test_a_plan_with_another_number_of_patients_is_refused(lab: Settings, stated: object) -> None:
    offer = offer_of(plan_of(privacy={**PRIVATE, "declared_patients": stated}))
    with pytest.raises(RefusedError, match="declares 100"):
        refuse(offer, lab, own=LEEDS, parameters=P)


@pytest.mark.parametrize(
    ("delta", "said"),
    [(1e-3, None), (1.7e-3, "N=300 patients"), (None, "names no delta")],
)
def test_a_delta_is_held_against_the_patients_of_the_whole_roster(
    lab: Settings, plans: PlanBook, delta: float | None, said: str | None
) -> None:
    """Of one lab's hundred patients, 1.7e-3 would be fewer than a half."""
    offer = offer_of(plan_of(privacy={**PRIVATE, "delta": delta}))
    if said is None:
        refuse(offer, lab, own=LEEDS, parameters=P)
        with open_ledger(lab) as book:
            told = price_of(offer, lab, book, lab="leeds", parameters=P).to_json()["privacy"]
        assert told["plan"]["delta_times_patients"] == pytest.approx(0.3)
        assert "at delta 0.001 (x 300 patients: 0.3), per patient" in told["statement"]
        return
    entry = offered(plans, offer)
    with open_ledger(lab) as book, pytest.raises(RefusedError, match=said) as caught:
        plans.approve(entry.sha256, lab, book)
    assert caught.value.exit_code == 3


def test_a_plan_that_protects_nobody_is_held_as_unbounded_and_refused_under_a_limit(
    lab: Settings, plans: PlanBook
) -> None:
    plan = plan_of(privacy={}, evaluation={"every": 5})
    entry = offered(plans, offer_of(plan))
    with open_ledger(lab) as book:
        with pytest.raises(RefusedError, match="protects nobody"):
            plans.approve(entry.sha256, with_limits(lab, max_epsilon=100.0), book)
        assert plans.approve(entry.sha256, lab, book).state == "approved"
        [hold] = book.holds()
        assert hold.remaining == {"train": 10, "evaluate": 2}
        assert book.summary()["held"]["epsilon"] is None
        assert json.dumps(plans.listing(lab, book), allow_nan=False)
        plans.ended(entry.sha256, book)
        assert book.summary()["total"]["epsilon"] == 0, "no round was asked for"
    again = offered(plans, offer_of(plan, "r2"))
    with open_ledger(lab) as book:
        plans.approve(again.sha256, lab, book)
        book.reserve(_order(again, 1))
        plans.ended(again.sha256, book)
        private = offered(plans, offer_of(run="r3"))
        found = price_of(private.offer, lab, book, lab="leeds", parameters=P).to_json()["privacy"]
        assert found["unbounded"]["run"] == "r2"
        assert found["spent"]["epsilon"] is found["after"]["epsilon"] is None
        assert found["plan"]["epsilon"] > 0
    limited = with_limits(lab, max_epsilon=100.0)
    with open_ledger(limited) as book:
        listed = plans.listing(limited, book)["plans"][-1]
        assert "unbounded since" in listed["refused"]
        with pytest.raises(OverBudget, match="run r2"):
            plans.approve(private.sha256, limited, book)


def test_a_plan_is_approved_at_the_very_limit_that_it_is_shown_to_cost(
    lab: Settings, plans: PlanBook
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        told = plans.listing(lab, book)["plans"][0]["price"]["privacy"]
    limited = with_limits(lab, max_epsilon=told["plan"]["epsilon"])
    with open_ledger(limited) as book:
        assert told["after"]["epsilon"] == told["plan"]["epsilon"]
        plans.approve(entry.sha256, limited, book)
        summary = book.summary()
    assert summary["held"]["epsilon"] == summary["total"]["epsilon"] == told["plan"]["epsilon"]
    assert told["plan"]["accountant"] == summary["held"]["accountant"] == "PRV"
    assert told["plan"]["delta"] == summary["held"]["delta"]


def test_at_the_labs_own_delta_the_price_is_shown_that_is_held(
    lab: Settings, plans: PlanBook
) -> None:
    lab = with_limits(lab, delta=1e-7)
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        told = plans.listing(lab, book)["plans"][0]["price"]["privacy"]["plan"]
        plans.approve(entry.sha256, lab, book)
        held = book.summary()["held"]
    assert (told["epsilon"], told["delta"]) == (held["epsilon"], 1e-7)


def test_a_plan_for_images_is_priced_for_the_lab_s_largest_patient(lab: Settings) -> None:
    offer = offer_of(plan_of(privacy={**PRIVATE, "unit": "image"}))
    known = replace(lab, images_per_patient=40)
    for settings, finite in ((lab, False), (known, True), (replace(known, patients=None), False)):
        with open_ledger(settings) as book:
            found = price_of(offer, settings, book, lab="leeds", parameters=P)
        assert found.plan is not None
        assert found.plan.unit == "patient"
        assert math.isfinite(found.plan.epsilon) is finite
        assert any("per image" in warning for warning in found.warnings)


def test_patient_privacy_needs_to_know_the_patients(lab: Settings) -> None:
    with pytest.raises(RefusedError, match="which image is whose"):
        refuse(offer_of(), replace(lab, patients=None), own=LEEDS, parameters=P)
    with pytest.raises(RefusedError, match="which image is whose"):
        refuse(offer_of(), replace(lab, patients="none"), own=LEEDS, parameters=P)
    with pytest.raises(RefusedError, match="label map is found by itself"):
        refuse(offer_of(), replace(lab, labels=None), own=LEEDS, parameters=P)
    with pytest.raises(RefusedError, match="declares no number"):
        refuse(offer_of(), replace(lab, patients_declared=None), own=LEEDS, parameters=P)


def test_a_roster_with_another_key_for_this_lab_is_not_believed(lab: Settings) -> None:
    forged = roster_of(keys={"leeds": Identity.generate("leeds")})
    for roster in (forged, roster_of("porto", "york")):
        with pytest.raises(VerificationError):
            refuse(offer_of(roster=roster), lab, own=LEEDS, parameters=P)


def test_a_plan_opens_no_file_of_the_lab(lab: Settings, tmp_path: Path) -> None:
    for scheme in (str(tmp_path / "x.yaml"), "../x", "x.yaml"):
        with pytest.raises(RefusedError, match="open no files"):
            refuse(offer_of(plan_of(labels={"scheme": scheme})), lab, own=LEEDS, parameters=P)
    (tmp_path / "x.safetensors").write_bytes(b"")
    for start in (str(tmp_path / "x.safetensors"), "../x.safetensors", "/dev/zero"):
        with pytest.raises(RefusedError, match="open no files"):
            refuse(offer_of(plan_of(model={"start": start})), lab, own=LEEDS, parameters=P)


def test_a_plan_may_start_from_an_encoder_that_ships(lab: Settings) -> None:
    model = {"arch": "encoder+head", "start": "blood"}
    refuse(offer_of(plan_of(model=model)), lab, own=LEEDS, parameters=P)


def test_a_plan_may_start_from_a_file_that_it_names_by_its_content(lab: Settings) -> None:
    model = {"width": 8, "start": f"cytonet:8:sha256:{'a' * 64}"}
    refuse(offer_of(plan_of(model=model)), lab, own=LEEDS, parameters=P)


def test_the_cohort_of_a_start_keeps_the_limits_too(lab: Settings) -> None:
    peers = {"york": KEYS["york"].public.fingerprint}
    limited = with_limits(lab, min_cohort=2, trusted_peers=peers, min_trusted_peers=1)
    refuse_cohort(offer_of(), ["leeds", "york"], limited)
    with pytest.raises(RefusedError, match="min_trusted_peers"):
        refuse_cohort(offer_of(), ["leeds", "porto"], limited)
    with pytest.raises(RefusedError, match="min_cohort"):
        refuse_cohort(offer_of(), ["leeds"], limited)


# --- price


def test_the_price_names_all_that_a_person_decides_on(lab: Settings) -> None:
    with open_ledger(with_limits(lab, max_epsilon=20.0)) as book:
        price = price_of(
            offer_of(), with_limits(lab, max_epsilon=20.0), book, lab="leeds", parameters=P
        )
        tree = price.to_json()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert (tree["rounds"], tree["steps"]) == (10, 50)
    privacy = tree["privacy"]
    assert (privacy["spent"]["epsilon"], privacy["held"]["epsilon"]) == (0, 0)
    assert 0 < privacy["plan"]["epsilon"] <= privacy["after"]["epsilon"] < 20
    assert (privacy["limit"], privacy["left"]) == (20.0, 20.0)
    assert "per patient" in privacy["statement"]
    assert tree["roster"]["labs"] == {lab: key.public.fingerprint for lab, key in KEYS.items()}
    assert tree["bytes_out"]["total"] > 10 * 4 * P


@pytest.mark.parametrize("secure", [True, False])
def test_bytes_out_are_those_of_the_vectors(secure: bool) -> None:
    offer = offer_of(plan_of(secure_aggregation={"enabled": secure}))
    update, evaluation = bytes_out(offer, P)
    assert 4 * P <= update <= 4 * P + 4096
    assert evaluation > 0
    scaffold = replace(offer, plan=plan_of(strategy={"name": "scaffold"}))
    assert bytes_out(scaffold, P)[0] >= 8 * P
    assert bytes_out(replace(offer, plan=plan_of(evaluation={})), P)[1] == 0


# --- decisions


def test_a_run_that_is_over_gets_its_result_again_and_nothing_else(
    plans: PlanBook, lab: Settings
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(entry.sha256, lab, book)
        plans.ended(entry.sha256, book)
    assert plans.approved("r1", over=True).ended
    with pytest.raises(NotApproved):
        plans.approved("r1")


def test_nothing_is_approved_until_somebody_approves(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of())
    assert entry.state == "waiting"
    with pytest.raises(NotApproved) as caught:
        plans.approved("r1")
    assert caught.value.hint == f"cytofed client approve DIR {entry.sha256}"
    with open_ledger(lab) as book:
        approved = plans.approve(entry.sha256[:12], lab, book)
        assert plans.approve(entry.sha256, lab, book) == approved
        assert len(book.holds()) == 1
        assert book.balance().held.epsilon > 0
    assert plans.approved("r1") == approved
    assert plans.known(offer_of()) == approved


def test_any_change_waits_anew(plans: PlanBook, lab: Settings) -> None:
    first = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
    other_key = roster_of(keys={"york": Identity.generate("york")})
    for offer in (
        offer_of(plan_of(train={"rounds": 11, "steps_per_round": 5}), "r2"),
        offer_of(run="r2"),
        offer_of(run="r3", roster=other_key),
    ):
        assert offered(plans, offer).state == "waiting"
        with pytest.raises(NotApproved):
            plans.approved(offer.run)


def test_changes_since_the_last_approved_plan_are_named(plans: PlanBook, lab: Settings) -> None:
    first = offered(plans, offer_of(roster=roster_of("leeds", "porto", "york")))
    assert plans.changes(first) == ()
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
    new = Identity.generate("york")
    later = offered(
        plans,
        offer_of(
            plan_of(train={"rounds": 12, "steps_per_round": 5}, strategy={"name": "fedprox"}),
            "r2",
            roster_of("leeds", "york", keys={"york": new}),
        ),
    )
    changes = plans.changes(later)
    assert "train.rounds: 10 -> 12" in changes
    assert 'strategy.name: "fedavg" -> "fedprox"' in changes
    assert "lab porto is gone" in changes
    old_key = KEYS["york"].public.fingerprint
    assert f"lab york HAS ANOTHER KEY: {old_key} -> {new.public.fingerprint}" in changes
    assert len(changes) == 4


def test_over_budget_is_refused_whole_with_the_rounds_that_fit(
    plans: PlanBook, lab: Settings
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        whole = price_of(entry.offer, lab, book, lab="leeds", parameters=P).after.epsilon
    tight = with_limits(lab, max_epsilon=whole * 0.8)
    with open_ledger(tight) as book:
        with pytest.raises(OverBudget) as caught:
            plans.approve(entry.sha256, tight, book)
        assert book.balance().held.epsilon == 0
        fits = caught.value.fitting_rounds
        assert 0 < fits < 10
        assert caught.value.exit_code == 3
        listed = plans.listing(tight, book)["plans"][0]
        assert listed["state"] == "waiting"
        assert str(fits) in listed["refused"]
        fitting = plan_of(train={"rounds": fits, "steps_per_round": 5})
        plans.approve(offered(plans, offer_of(fitting, "r2")).sha256, tight, book)


def test_rejecting_frees_what_was_not_reserved(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(entry.sha256, lab, book)
        book.reserve(_order(entry, 1))
        assert plans.reject(entry.plan_sha256, book, reason="no").state == "rejected"
        assert book.balance().held.epsilon == 0
        assert book.balance().spent.epsilon > 0
    with pytest.raises(NotApproved):
        plans.approved("r1")


def _order(entry: Entry, round_: int) -> Order:
    federation = ledger_federation("f", "leeds")
    return Order(federation, entry.run, round_, 0, entry.plan_sha256, "bb" * 32, f"{round_:064x}")


def test_one_approval_pays_for_one_run(plans: PlanBook, lab: Settings) -> None:
    first = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
        book.reserve(_order(first, 1))
        second = offered(plans, offer_of(run="r2"))
        assert second.state == "waiting"
        plans.approve(second.sha256, lab, book)
        book.reserve(_order(second, 1))
        active = [hold for hold in book.holds() if hold.state == "active"]
        assert [hold.run for hold in active] == ["r2"]
    assert plans.approved("r2").run == "r2"
    with pytest.raises(NotApproved):
        plans.approved("r1")


def test_a_run_that_ended_gives_back_the_rest(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(entry.sha256, lab, book)
        book.reserve(_order(entry, 1))
        plans.ended(entry.sha256, book)
        plans.ended(entry.sha256, book)
        assert book.balance().held.epsilon == 0
        plans.left(book)


@pytest.mark.parametrize("crash", ["hold", "file"])
def test_a_crash_while_approving_leaves_nothing_approved_unpaid(
    plans: PlanBook, lab: Settings, crash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write may be the last one of a process; approving once more completes it."""
    entry = offered(plans, offer_of())

    def dies(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    with open_ledger(lab) as book:
        with monkeypatch.context() as patch:
            if crash == "hold":
                patch.setattr(book, "hold", dies)
            else:
                patch.setattr("cytofed.client.policy.write_atomically", dies)
            with pytest.raises(KeyboardInterrupt):
                plans.approve(entry.sha256, lab, book)
        with pytest.raises(NotApproved):
            plans.approved("r1")
        plans.approve(entry.sha256, lab, book)
        assert [hold.state for hold in book.holds()] == ["active"]


def test_a_forged_or_edited_file_is_no_plan(plans: PlanBook) -> None:
    offered(plans, offer_of())
    with pytest.raises(VerificationError):
        plans.offered(offer_of(run="r2").signed(Identity.generate(COORDINATOR)), parameters=P)
    path = next(plans.folder.glob("*.json"))
    text = path.read_text()
    assert (path.stat().st_mode & 0o777) == 0o600
    other = offer_of(plan_of(train={"rounds": 99, "steps_per_round": 5})).signed(CENTRE).hex()
    tree = json.loads(text)
    for altered in (text[:40], json.dumps({**tree, "document": other})):
        path.write_text(altered)
        with pytest.raises(VerificationError):
            plans.entries()


def test_find_asks_for_enough_digits(plans: PlanBook) -> None:
    with pytest.raises(InputError, match="no plan") as caught:
        plans.find("ab" * 32)
    assert "client start" in caught.value.hint
    entry = offered(plans, offer_of())
    with pytest.raises(InputError, match="too short: offers and plans") as caught:
        plans.find(entry.plan_sha256[:4])
    assert entry.plan_sha256 in caught.value.hint


# --- an approval is of an offer


def swapped(run: str = "r1") -> Offer:
    """The same plan and run, over a roster in which york is somebody else."""
    return offer_of(run=run, roster=roster_of(keys={"york": Identity.generate("york")}))


def test_a_new_offer_of_a_run_replaces_one_that_waits_and_both_stay_to_be_seen(
    plans: PlanBook, lab: Settings
) -> None:
    first = offered(plans, offer_of())
    assert offered(plans, offer_of()) == first
    later = offered(plans, swapped())
    old, new = plans.entries()
    assert (old.state, old.replaced_by, new) == ("replaced", later.sha256, later)
    assert offered(plans, offer_of()) == old, "offered again, it does not come back"
    with open_ledger(lab) as book:
        with pytest.raises(RefusedError, match=f"replaced by offer {later.sha256}"):
            plans.approve(first.sha256, lab, book)
        listed = plans.listing(lab, book)["plans"]
    assert [item["state"] for item in listed] == ["replaced", "waiting"]
    assert len({item["offer"] for item in listed}) == 2


def test_a_roster_swapped_after_a_person_looked_is_not_approved_by_the_plans_hash(
    plans: PlanBook, lab: Settings
) -> None:
    seen = offered(plans, offer_of())
    plans.shown([seen.sha256])
    other = offered(plans, swapped())
    with open_ledger(lab) as book:
        with pytest.raises(InputError, match="showed last") as caught:
            plans.approve(seen.plan_sha256, lab, book)
        assert caught.value.exit_code == 2
        assert f"cytofed client approve DIR {other.sha256}" in caught.value.hint
        assert book.holds() == ()
        plans.shown([seen.sha256, other.sha256])  # to another person or program, maybe
        with pytest.raises(InputError, match="not the only one"):
            plans.approve(seen.plan_sha256, lab, book)
        assert plans.approve(other.sha256, lab, book).sha256 == other.sha256


def test_a_plan_that_waits_for_two_runs_is_approved_by_an_offer_only(
    plans: PlanBook, lab: Settings
) -> None:
    entries = [offered(plans, offer_of(run=run)) for run in ("r1", "r2")]
    plans.shown(entry.sha256 for entry in entries)
    with open_ledger(lab) as book:
        with pytest.raises(InputError, match="waits in 2 offers, for runs r1, r2"):
            plans.approve(entries[0].plan_sha256, lab, book)
        assert plans.approve(entries[0].sha256, lab, book).run == "r1"


def test_what_no_person_was_shown_is_approved_by_its_offer_only(
    plans: PlanBook, lab: Settings
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        with pytest.raises(InputError, match="showed last"):
            plans.approve(entry.plan_sha256, lab, book)
        assert plans.approve(entry.sha256, lab, book).state == "approved"
        assert plans.approve(entry.plan_sha256, lab, book).state == "approved"


def test_offers_without_end_delete_none_and_are_taken_in_no_more(
    plans: PlanBook, lab: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cytofed.client.policy.MAX_CLOSED", 4)
    moments = iter(range(10**6))
    plans._clock = lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(moments))
    flood = [
        offered(plans, offer_of(roster=replace(roster_of(), epoch=epoch))) for epoch in range(1, 6)
    ]
    with pytest.raises(TooManyOffers, match="4 offers of the last 90 days"):
        offered(plans, swapped())
    found = {entry.sha256: entry.state for entry in plans.entries()}
    assert list(found) == [entry.sha256 for entry in flood]
    assert list(found.values()) == ["replaced"] * 4 + ["waiting"]
    with open_ledger(lab) as book:
        plans.ended(flood[-1].sha256, book)
        with pytest.raises(TooManyOffers):  # nor by ending them
            offered(plans, swapped("r2"))
        for entry in flood:
            assert plans.reject(entry.sha256, book).state == "rejected"
    assert offered(plans, swapped()).state == "waiting"


@pytest.mark.parametrize("told_first", [True, False])
def test_a_run_that_is_over_holds_nothing_and_is_not_approved(
    plans: PlanBook, lab: Settings, told_first: bool
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        if not told_first:
            plans.approve(entry.sha256, lab, book)
            assert book.balance().held.epsilon > 0
        plans.ended(entry.sha256, book, why="failed: 1 lab approved")
        assert book.balance().held.epsilon == 0
        for reference in (entry.sha256, entry.plan_sha256):
            with pytest.raises(RefusedError, match=r"over.*failed: 1 lab approved"):
                plans.approve(reference, lab, book)
        assert book.balance().held.epsilon == 0
        listed = plans.listing(lab, book)["plans"][0]
    assert (listed["state"], listed["ended"]) == (
        ("ended", False) if told_first else ("approved", True)
    )
    with pytest.raises(NotApproved):
        plans.approved("r1")


def test_the_end_of_one_offer_is_not_that_of_another_with_its_name(
    plans: PlanBook, lab: Settings
) -> None:
    first, other = offered(plans, offer_of()), offered(plans, offer_of(run="r2"))
    with open_ledger(lab) as book:
        plans.approve(other.sha256, lab, book)
        held = book.balance().held.epsilon
        plans.ended(first.sha256, book)
        plans.ended("ab" * 32, book)
        assert book.balance().held.epsilon == held > 0
    assert plans.approved("r2").sha256 == other.sha256


def test_nobody_approves_after_the_days_of_the_offer(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of(plan_of(cohort={"approval_days": 3})))
    assert entry.expires_at == entry.offered_at + timedelta(days=3)
    plans._clock = lambda: entry.expires_at + timedelta(seconds=1)
    with open_ledger(lab) as book:
        with pytest.raises(RefusedError, match="approval_days=3"):
            plans.approve(entry.sha256, lab, book)
        [expired] = plans.expire(lambda _entry: "nobody decided", book)
        assert expired.state == "expired"
        with pytest.raises(RefusedError, match="nobody decided"):
            plans.approve(entry.sha256, lab, book)


def test_approvals_of_two_are_by_two_persons_and_both_are_recorded(
    plans: PlanBook, lab: Settings
) -> None:
    entry, two = offered(plans, offer_of()), replace(lab, approvals=2)
    with open_ledger(lab) as book:
        with pytest.raises(InputError, match="approvals of 2 persons") as unnamed:
            plans.approve(entry.sha256, two, book)
        assert "--by NAME" in unnamed.value.hint
        first = plans.approve(entry.sha256, two, book, by="Dr. Ada  Roe", note="price seen")
        assert (first.state, [a.by for a in first.approvals]) == ("waiting", ["Dr. Ada Roe"])
        assert book.holds() == ()
        with pytest.raises(NotApproved):
            plans.approved("r1")
        for same in ("Dr. Ada Roe", "dr ada roe", " DR.ADA ROE "):
            with pytest.raises(RefusedError, match="1 of 2"):
                plans.approve(entry.sha256, two, book, by=same)
        listed = plans.listing(two, book)["plans"][0]
        assert (len(listed["approvals"]), listed["approvals_needed"]) == (1, 2)
        second = plans.approve(entry.sha256, two, book, by="Ben Poe", note="a\x1b[2J\nb")
        assert second.state == "approved"
        assert [(a.by, a.note) for a in second.approvals] == [
            ("Dr. Ada Roe", "price seen"),
            ("Ben Poe", "a [2J b"),
        ]
        assert book.balance().held.epsilon > 0
    assert plans.known(offer_of()) == second
    assert len(second.record_sha256) == 64
    forged = replace(second, approvals=second.approvals[:1])
    assert forged.record_sha256 != second.record_sha256
    assert replace(second, salt="").record_sha256 != second.record_sha256


def test_one_persons_approval_of_a_replaced_offer_does_not_count_for_the_next(
    plans: PlanBook, lab: Settings
) -> None:
    entry, two = offered(plans, offer_of()), replace(lab, approvals=2)
    with open_ledger(lab) as book:
        plans.approve(entry.sha256, two, book, by="Ada")
        other = offered(plans, swapped())
        assert plans.approve(other.sha256, two, book, by="Ben").state == "waiting"
    assert [a.by for a in plans.entries()[0].approvals] == ["Ada"]
    assert "persons" in plans.why_not_automatic(other, automatic(two), book)


def test_an_approved_offer_ends_another_of_its_run(plans: PlanBook, lab: Settings) -> None:
    first, other = offered(plans, offer_of()), None
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
        other = offered(plans, swapped())
        plans.approve(other.sha256, lab, book)
        assert [hold.state for hold in book.holds()] == ["freed", "active"]
    assert [entry.ended for entry in plans.entries()] == [True, False]
    assert plans.approved("r1").sha256 == other.sha256


# --- approval without a person


def automatic(lab: Settings, **rules: Any) -> Settings:
    return replace(lab, auto_approve=AutoApprove(enabled=True, **{"max_epsilon": 50.0, **rules}))


@pytest.mark.parametrize(
    ("change", "plan", "why"),
    [
        (lambda lab: lab, {}, "off"),
        (automatic, {"privacy": {}, "evaluation": {}}, "patients"),
        (automatic, {"secure_aggregation": {"enabled": False}}, "secure aggregation"),
        (partial(automatic, max_epsilon=0.01), {}, "max_epsilon"),
        (automatic, {}, "never approved"),
    ],
)
def test_a_person_is_asked_unless_every_rule_holds(
    plans: PlanBook,
    lab: Settings,
    change: Callable[[Settings], Settings],
    plan: dict[str, Any],
    why: str,
) -> None:
    entry = offered(plans, offer_of(plan_of(**plan)))
    with open_ledger(lab) as book:
        assert why in plans.why_not_automatic(entry, change(lab), book)


def test_known_labs_and_a_low_price_need_no_person(plans: PlanBook, lab: Settings) -> None:
    first = offered(plans, offer_of())
    with open_ledger(lab) as book:
        assert plans.why_not_automatic(first, automatic(lab, known_labs_only=False), book) == ""
        plans.approve(first.sha256, lab, book)
        second = offered(plans, offer_of(run="r2"))
        assert plans.why_not_automatic(second, automatic(lab), book) == ""


# --- after a ledger was lost


@pytest.mark.parametrize("lost", ["restored", "gone"])
def test_a_lost_ledger_is_charged_in_full_and_asks_again(
    plans: PlanBook, lab: Settings, lost: str
) -> None:
    lab = with_limits(lab, delta=1e-3)
    before = lab.ledger.read_bytes()
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(entry.sha256, lab, book)
        book.reserve(_order(entry, 1))
        head, full = book.head, book.balance().total.epsilon
    if lost == "gone":
        lab.ledger.unlink()
    else:
        lab.ledger.write_bytes(before)
    after = restore_charge(lab, plans, seen_heads=[head])
    assert math.isclose(after["spent"]["epsilon"], full, rel_tol=1e-9)
    assert plans.entries()[0].state == "waiting"
    with open_ledger(lab) as book:
        assert book.check_head(head) == "older"
        plans.approve(entry.sha256, lab, book)
        assert book.balance().total.epsilon > full
