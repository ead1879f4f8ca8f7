"""A person reads all of an offer in words, whole where it counts, each on its own line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cytofed.client.plan_words import plan_in_words, summary_lines
from cytofed.client.policy import Entry, PlanBook, open_ledger
from cytofed.client.settings import Limits, Settings
from cytofed.plan import to_dict
from tests.client.test_policy import KEYS, offer_of, offered, plan_of, roster_of
from tests.client.test_policy import lab as lab  # noqa: PLC0414 - fixtures
from tests.client.test_policy import plans as plans  # noqa: PLC0414

HOSTILE = "r1\x1b[2J\nstate approved\u202e"


def words(plans: PlanBook, settings: Settings, entry: Entry) -> str:
    with open_ledger(settings) as book:
        return "\n".join(plan_in_words(entry, plans.listed(entry, settings, book), settings))


def test_words_tell_price_budget_labs_and_every_key(plans: PlanBook, lab: Settings) -> None:
    york = KEYS["york"].public.fingerprint
    limited = replace(lab, limits=Limits(max_epsilon=20.0, trusted_peers={"york": york}))
    entry = offered(plans, offer_of())
    told = words(plans, limited, entry)
    for whole in (entry.sha256, entry.plan_sha256, *(k.public.fingerprint for k in KEYS.values())):
        assert whole in told
    for part in (
        "waiting, 0 of 1 approvals",
        "spent so far",
        "set aside",
        "limit         epsilon 20, ",
        "sums of 3 labs or more",
        f"{york}, declares 100 patients, trusted peer",
        "10 of 5 steps",
        "epsilon",
    ):
        assert part in told, part
    tree = to_dict(entry.offer.plan)
    for section in ("train", "privacy", "secure_aggregation", "cohort"):
        for key in tree[section]:
            assert f"\n  {section}.{key}" in told


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"privacy": {}, "evaluation": {}}, "NOBODY IS PROTECTED"),
        ({"secure_aggregation": {"enabled": False}}, "OFF: the coordinator sees this lab's update"),
    ],
)
def test_what_is_off_is_said_aloud(
    plans: PlanBook, lab: Settings, plan: dict[str, object], told: str
) -> None:
    assert told in words(plans, lab, offered(plans, offer_of(plan_of(**plan))))


def test_changes_refusals_and_approvals_are_told(plans: PlanBook, lab: Settings) -> None:
    first = offered(plans, offer_of())
    two = replace(lab, approvals=2, limits=Limits(allowed_models=("resnet18",)))
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
        later = offered(plans, offer_of(run="r2", roster=roster_of("leeds", "york")))
        seen = plans.approve(
            later.sha256, replace(lab, approvals=2), book, by="Ada Roe", note="priced"
        )
    told = words(plans, two, seen)
    assert "change        lab porto is gone" in told
    assert "refused       plan" in told
    assert "allowed_models" in told
    assert "approved by   1 of 2 by Ada Roe" in told
    assert "UTC: priced" in told


def test_a_replaced_offer_says_by_which(plans: PlanBook, lab: Settings) -> None:
    offered(plans, offer_of())
    later = offered(plans, offer_of(roster=replace(roster_of(), epoch=2)))
    assert f"replaced by offer {later.sha256}" in words(plans, lab, plans.entries()[0])


def test_words_of_the_coordinator_stay_on_their_line(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.ended(entry.sha256, book, why=HOSTILE)
        [entry] = plans.entries()
        listed = plans.listed(entry, lab, book)
    lines = [*plan_in_words(entry, listed, lab), *summary_lines(listed, Path("lab"))]
    assert all(line.isprintable() for line in lines)
    assert not any(line.strip().startswith("state approved") for line in lines)
    assert "ended before anybody decided (r1 [2J state approved )" in "\n".join(lines)


def test_the_list_has_the_warnings_and_the_command_for_this_lab(
    plans: PlanBook, lab: Settings
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        listed = plans.listed(entry, lab, book)
    assert listed["price"]["warnings"]
    told = "\n".join(summary_lines(listed, Path("lab")))
    for warning in listed["price"]["warnings"]:
        assert warning[:60] in told
    assert f"cytofed client plan show lab {entry.sha256}" in told


def test_an_approval_that_ends_another_run_of_the_plan_says_so_before(
    plans: PlanBook, lab: Settings
) -> None:
    first = offered(plans, offer_of())
    with open_ledger(lab) as book:
        plans.approve(first.sha256, lab, book)
    second = offered(plans, offer_of(run="r2"))
    assert f"ends          run r1, offer {first.sha256}" in words(plans, lab, second)


def test_approvals_asked_for_later_do_not_make_an_earlier_one_half(
    plans: PlanBook, lab: Settings
) -> None:
    entry = offered(plans, offer_of())
    with open_ledger(lab) as book:
        entry = plans.approve(entry.sha256, lab, book, by="Ada Roe")
    assert "approved by   1 of 1 by Ada Roe" in words(plans, replace(lab, approvals=2), entry)


def test_what_is_left_of_a_limit_is_never_told_too_high(plans: PlanBook, lab: Settings) -> None:
    entry = offered(plans, offer_of())
    limited = replace(lab, limits=Limits(max_epsilon=12.0))
    with open_ledger(limited) as book:
        listed = plans.listed(entry, limited, book)
        listed["price"]["privacy"]["left"] = 4.0031
    assert "epsilon 12, 4.00 left" in "\n".join(plan_in_words(entry, listed, limited))
