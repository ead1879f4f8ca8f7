"""What a lab's persons approved is what is carried out: no swap, no flood and no late approval gets
around them, and a limit that they write down holds at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from cytofed.client.egress import read_report
from cytofed.client.policy import open_ledger
from cytofed.documents import Decision, Ended, Member, Offer, Roster
from cytofed.errors import InputError, RefusedError
from cytofed.messages import BadMessage, new_message
from cytofed.privacy.identity import Identity
from cytofed.sealed_message import new_content
from tests.attacks.boundary import LAB, Boundary, boundary, plan_of

TWO_ROUNDS = {"rounds": 3, "steps_per_round": 1, "batch": 8}
PRIVATE = {"unit": "patient", "sigma": 2.0, "declared_patients": 20, "delta": 1e-3}


@pytest.fixture
def stage(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boundary]:
    with boundary(tmp_path, sample, monkeypatch) as found:
        yield found


def swapped(roster: Roster) -> Roster:
    """The roster with the coordinator's own keys behind every other lab's name."""
    members = tuple(
        m if m.name == LAB else Member(Identity.generate(m.name).public, m.node_key_sha256, 20)
        for m in roster.members
    )
    return replace(roster, members=members)


def looked(stage: Boundary) -> None:
    """As `cytofed client plans` does."""
    plans = stage.lab.plans()
    plans.shown(entry.sha256 for entry in plans.entries())


def approve(stage: Boundary, reference: str) -> None:
    settings = stage.lab.settings()
    with open_ledger(settings) as book:
        stage.lab.plans().approve(reference, settings, book)


def held(stage: Boundary) -> float:
    with open_ledger(stage.lab.settings()) as book:
        return book.balance().held.epsilon


def end(stage: Boundary, offer: Offer, why: str = "failed: 1 lab approved the plan") -> None:
    """Told by the coordinator, signed, as when a run is over for this lab."""
    document = Ended(offer.federation, offer.run, offer.sha256, why).signed(stage.coordinator)
    content = RecordDict({"end": ConfigRecord({"document": document})})
    stage.tell(new_message(content, kind="query.end", node=1, group="0", ttl_s=1.0))


def write_limit(stage: Boundary, text: str) -> None:
    """As a person writes it into client.yaml, while the daemon runs."""
    path = stage.lab.root / "client.yaml"
    before = path.stat()
    path.write_text(f"{path.read_text()}\n{text}\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def decisions(stage: Boundary) -> list[dict[str, object]]:
    report = read_report(stage.lab.egress, stage.lab.identity().public)
    return [
        {field["name"]: field["value"] for field in record.body["fields"]}
        for record in report.messages
        if record.body["type"] == "decision"
    ]


def test_a_roster_swapped_between_look_and_approval_is_not_approved(stage: Boundary) -> None:
    plan = plan_of()
    seen = stage.offer(plan)
    looked(stage)
    other = stage.offer(plan, seen.run, swapped(seen.roster))
    for reference in (plan.sha256, plan.sha256[:8]):
        with pytest.raises(InputError, match="showed last"):
            approve(stage, reference)
    with pytest.raises(RefusedError, match=f"replaced by offer {other.sha256}"):
        approve(stage, seen.sha256)
    for offer in (seen, other):
        stage.send_offer(offer.signed(stage.coordinator))
        with pytest.raises(BadMessage):
            stage.train(offer, 1)
    assert decisions(stage) == []
    assert stage.left() == []


def test_a_swapped_roster_that_only_another_process_listed_is_not_approved(
    stage: Boundary,
) -> None:
    """A program that asks for `plans --json` every minute has seen it; the person has not."""
    plan = plan_of()
    seen = stage.offer(plan)
    looked(stage)
    other = stage.offer(plan, seen.run, swapped(seen.roster))
    looked(stage)
    with pytest.raises(InputError, match="its labs or its run may be others"):
        approve(stage, plan.sha256)
    approve(stage, other.sha256)  # its id says which is meant


def test_a_run_that_ended_undecided_is_not_swapped_for_another_of_its_plan(
    stage: Boundary,
) -> None:
    plan = plan_of()
    seen = stage.offer(plan)
    looked(stage)
    end(stage, seen)
    stage.offer(plan, "run-2", swapped(seen.roster))
    looked(stage)
    with pytest.raises(InputError, match="its labs or its run may be others"):
        approve(stage, plan.sha256)


def test_no_flood_of_offers_hides_the_one_that_was_seen(
    stage: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cytofed.client.policy.MAX_CLOSED", 5)
    plan = plan_of()
    seen = stage.offer(plan)
    looked(stage)
    for epoch in range(100, 109):
        stage.offer(plan, seen.run, replace(seen.roster, epoch=epoch))
    entries = stage.lab.plans().entries()
    assert entries[0].sha256 == seen.sha256
    assert entries[0].state == "replaced"
    assert len(entries) == 6
    with pytest.raises(InputError, match="showed last"):
        approve(stage, plan.sha256)
    assert stage.left() == []


@pytest.mark.parametrize("approved_first", [True, False])
def test_the_end_of_a_run_frees_its_hold_and_no_approval_follows(
    stage: Boundary, approved_first: bool
) -> None:
    offer = stage.offer(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    if approved_first:
        stage.approve(offer)
        assert held(stage) > 0
    end(stage, offer)
    assert held(stage) == 0
    with pytest.raises(RefusedError, match=r"over.*failed: 1 lab approved the plan"):
        stage.approve(offer)
    assert held(stage) == 0
    stage.send_offer(offer.signed(stage.coordinator))
    assert decisions(stage) == []
    with pytest.raises(BadMessage):
        stage.train(offer, 1)
    assert stage.left() == []


@pytest.mark.parametrize("how", ["rejected, then ended", "ended, then rejected", "replaced"])
def test_no_way_around_leads_to_the_approval_of_what_is_over(stage: Boundary, how: str) -> None:
    offer = stage.offer(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    if how == "replaced":
        stage.offer(offer.plan, offer.run, replace(offer.roster, epoch=9))
    if how == "ended, then rejected":
        end(stage, offer)
    with open_ledger(stage.lab.settings()) as book:
        stage.lab.plans().reject(offer.sha256, book, reason="no")
    if how == "rejected, then ended":
        end(stage, offer)
    with pytest.raises(RefusedError, match="over"):
        stage.approve(offer)
    assert held(stage) == 0
    assert next(e for e in stage.lab.plans().entries() if e.sha256 == offer.sha256).reason == "no"


def test_a_lab_that_approves_after_the_end_learns_it_and_frees_the_hold(stage: Boundary) -> None:
    """The word of the end came late: the lab was not there."""
    offer = stage.approved(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    assert held(stage) > 0
    end(stage, offer, "started without this lab")
    assert held(stage) == 0
    [entry] = stage.lab.plans().entries()
    assert (entry.state, entry.ended, entry.reason) == (
        "approved", True, "started without this lab",
    )  # fmt: skip


@pytest.mark.parametrize("file", [b"another model", None])
def test_the_result_of_a_run_is_not_replaced_by_a_later_one(
    stage: Boundary, file: bytes | None
) -> None:
    """It is what clinicians use, and what tells the lab its own line in a later plan's start."""
    offer = stage.approved(plan_of())
    stage.finish(offer)
    stage.finish(offer)  # as where the coordinator never learnt that it is here
    folder = stage.lab.model_folder(offer)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    content = new_content({"status": "completed", "card": "of another"}, file=file)
    with pytest.raises(BadMessage, match="another result"):
        stage.ask(offer, "query.result", 1, content)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    assert before == after
    assert after["model.safetensors"] == b"a model"


def test_nobody_but_the_coordinator_ends_a_run(stage: Boundary) -> None:
    offer = stage.approved(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    before = held(stage)
    for federation, signer in (
        (offer.federation, Identity.generate("coordinator")),
        ("another", stage.coordinator),
    ):
        document = Ended(federation, offer.run, offer.sha256, "no").signed(signer)
        content = RecordDict({"end": ConfigRecord({"document": document})})
        stage.tell(new_message(content, kind="query.end", node=1, group="0", ttl_s=1.0))
    assert held(stage) == before
    stage.train(offer, 1)
    assert stage.left() == [("update", 1)]


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("limits: {secure_aggregation_required: true}", "secure_aggregation_required"),
        ("limits: {min_cohort: 9}", "min_cohort"),
        ("limits: {allowed_models: [resnet18]}", "allowed_models"),
        ("limits: {max_bytes_per_round: 1}", "max_bytes_per_round"),
        ("limits: {max_epsilon: 0.0001}", "over the limit 0.0001"),
        ("limits: {min_cohort: }", "InputError at the lab"),
    ],
)
def test_a_limit_written_down_stops_the_next_round_of_a_running_run(
    stage: Boundary, written: str, named: str
) -> None:
    offer = stage.approved(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    stage.train(offer, 1)
    write_limit(stage, written)
    with pytest.raises(BadMessage) as caught:
        stage.train(offer, 2)
    assert named in caught.value.message
    assert stage.left() == [("update", 1)]


def test_limits_on_the_cohort_that_it_keeps_let_a_run_go_on(stage: Boundary) -> None:
    trusted = stage.identities["lab-2"].public.fingerprint
    offer = stage.approved(plan_of(train=TWO_ROUNDS, cohort={"min_labs": 3}))
    write_limit(
        stage,
        f"limits: {{min_cohort: 3, min_trusted_peers: 1, trusted_peers: {{lab-2: {trusted}}}}}",
    )
    stage.train(offer, 1)
    stage.restart()
    stage.train(offer, 2)
    assert stage.left() == [("update", 1), ("update", 2)]


def test_a_peer_that_is_trusted_no_more_stops_the_next_round(stage: Boundary) -> None:
    offer = stage.approved(plan_of(train=TWO_ROUNDS))
    stage.train(offer, 1)
    write_limit(stage, f"limits: {{trusted_peers: {{lab-2: {'ab' * 32}}}}}")
    with pytest.raises(BadMessage, match="trusted_peers"):
        stage.train(offer, 2)
    assert stage.left() == [("update", 1)]


def test_a_limit_that_is_taken_back_lets_the_run_go_on(stage: Boundary) -> None:
    offer = stage.approved(plan_of(train=TWO_ROUNDS, privacy=PRIVATE))
    before = (stage.lab.root / "client.yaml").read_text()
    write_limit(stage, "limits: {secure_aggregation_required: true}")
    with pytest.raises(BadMessage, match="secure_aggregation_required"):
        stage.train(offer, 1)
    (stage.lab.root / "client.yaml").write_text(before)
    stage.train(offer, 1)
    assert stage.left() == [("update", 1)]


def test_the_signed_decision_binds_the_persons_and_names_none(stage: Boundary) -> None:
    write_limit(stage, "approvals: 2")
    offer = stage.offer(plan_of())
    settings = stage.lab.settings()
    with open_ledger(settings) as book:
        for name in ("Ada Roe", "Ben Poe"):
            stage.lab.plans().approve(offer.sha256, settings, book, by=name, note="seen")
            if name == "Ada Roe":
                stage.send_offer(offer.signed(stage.coordinator))
                assert decisions(stage) == []
    answer = stage.send_offer(offer.signed(stage.coordinator))
    assert answer is not None
    assert answer.content is not None
    record = answer.content["answer"]
    assert isinstance(record, ConfigRecord)
    signed = record["decision"]
    assert isinstance(signed, bytes)
    decision = Decision.verified(signed, stage.lab.identity().public, offer)
    [entry] = stage.lab.plans().entries()
    assert decision.record_sha256 == entry.record_sha256 != ""
    [told] = decisions(stage)
    assert (told["offer_sha256"], told["record_sha256"]) == (offer.sha256, entry.record_sha256)
    assert b"Ada" not in signed
    assert b"Ben" not in stage.lab.egress.read_bytes()
