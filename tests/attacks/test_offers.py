"""What a coordinator offers costs a lab nothing before a person has approved it, and belongs to
that offer alone, whatever its run is called."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from cytofed.client.pace import Pace
from cytofed.client.policy import MAX_WAITING, open_ledger
from cytofed.documents import LABEL_OFFER, Ended, Offer, secure_cohort
from cytofed.documents import Start as RunStart
from cytofed.messages import BadMessage, new_message
from cytofed.plan import Plan
from cytofed.privacy import secagg_coordinator as protocol
from cytofed.privacy.identity import sign
from cytofed.start import read_start, write_start
from tests.attacks.boundary import Boundary, boundary, plan_of

SECURE: dict[str, Any] = {"secure_aggregation": {"enabled": True}, "cohort": {"min_labs": 3}}


@pytest.fixture
def stage(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boundary]:
    with boundary(tmp_path, sample, monkeypatch) as found:
        yield found


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def reject(stage: Boundary, offer: Offer) -> None:
    with open_ledger(stage.lab.settings()) as book:
        stage.lab.plans().reject(offer.plan.sha256, book)


def of_seed(seed: int) -> Plan:
    """Plans of one size that differ in the weights that nobody trains."""
    train = {"rounds": 1, "steps_per_round": 1, "batch": 8, "seed": seed}
    return plan_of(train=train, model={"width": 8, "trainable": "head"})


def test_a_refused_offers_model_is_not_trained_under_an_approved_plan_of_that_run(
    stage: Boundary, tmp_path: Path
) -> None:
    reject(stage, stage.offer(of_seed(1)))
    good = stage.approved(of_seed(2))
    stage.train(good, 1)
    assert stage.left() == [("update", 1)]
    [folder] = (stage.lab.root / "runs").iterdir()
    assert folder.name == good.sha256
    write_start(good.plan, tmp_path)
    trained, approved = read_start(folder), read_start(tmp_path)
    assert trained is not None
    assert approved is not None
    assert trained.tensors.keys() == approved.tensors.keys()
    for name, values in approved.tensors.items():
        assert np.array_equal(values, trained.tensors[name]), name


def test_a_second_approved_offer_of_a_run_has_nothing_of_the_first(stage: Boundary) -> None:
    first = stage.approved(of_seed(1))
    stage.train(first, 1)
    second = stage.approved(of_seed(2))
    stage.train(second, 1)
    tensors = [read_start(stage.lab.run_folder(offer)) for offer in (first, second)]
    assert tensors[0] is not None
    assert tensors[1] is not None
    body = next(n for n in tensors[0].tensors if n not in tensors[0].manifest.names)
    assert not np.array_equal(tensors[0].tensors[body], tensors[1].tensors[body])


def test_an_old_cohorts_keys_are_not_used_for_another_offer_of_the_run(stage: Boundary) -> None:
    def advertised(offer: Offer) -> bytes:
        start = RunStart.verified(stage.start(offer), stage.coordinator.public, offer)
        cohort = secure_cohort(start, offer, stage.coordinator.public)
        opening = protocol.begin(cohort, stage.coordinator, setup=1, first_slot=0, slots=2)
        header = stage.step(offer, "advertise", opening.request)["header"]
        body = header["body"]
        assert isinstance(body, bytes)
        protocol.check_keys(opening, "lab-1", body)
        return body

    old = stage.approved(plan_of(**SECURE))
    known = advertised(old)
    roster = replace(old.roster, epoch=old.roster.epoch + 1)
    new = stage.offer(old.plan, old.run, roster)
    assert new.sha256 != old.sha256
    with pytest.raises(BadMessage):  # another roster is another offer: not approved yet
        advertised(new)
    stage.approve(new)
    assert advertised(new) != known


def test_nothing_is_built_or_stored_before_approval(stage: Boundary) -> None:
    before = files(stage.lab.root)
    offer = stage.offer(plan_of())
    made = files(stage.lab.root) - before
    assert {name.split("/")[0] for name in made} <= {"plans", "egress.log", "egress.head"}
    [entry] = stage.lab.plans().entries()
    write_start(offer.plan, stage.server.root)
    start = read_start(stage.server.root)
    assert start is not None
    assert entry.parameters == start.manifest.size


def test_a_rejected_offer_leaves_its_record_and_nothing_else(stage: Boundary) -> None:
    before = files(stage.lab.root)
    offer = stage.approved(plan_of())
    stage.train(offer, 1)
    assert any(name.startswith("runs/") for name in files(stage.lab.root))
    reject(stage, offer)
    stage.daemon._idle()
    left = files(stage.lab.root) - before
    assert {name.split("/")[0] for name in left} <= {"plans", "status.json"}
    with pytest.raises(BadMessage, match="approved"):
        stage.train(offer, 1)


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_an_absurd_model_is_refused_without_the_memory_that_it_would_take(
    stage: Boundary, trainable: str
) -> None:
    stage.offer(plan_of())  # torch is there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = {"arch": "stagenet", "width": 1024, "trainable": trainable}  # 5 GB of weights
    answer = stage.send_offer(
        Offer("huge", plan_of(model=model), stage.server.roster()).signed(stage.coordinator)
    )
    assert answer is not None
    assert answer.outgoing.type == "refusal"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10
    assert [entry.run for entry in stage.lab.plans().entries()] == ["run-1"]


def test_an_offer_of_a_megabyte_is_refused_unread(stage: Boundary) -> None:
    document = sign(stage.coordinator, LABEL_OFFER, bytes(1 << 20))
    answer = stage.send_offer(document)
    assert answer is not None
    assert "bytes" in answer.reason
    assert not stage.lab.plans().entries()


@pytest.mark.parametrize("asked", ["a known offer", "an order that is none", "the end of a run"])
def test_what_is_asked_without_end_is_answered_at_a_pace_and_the_log_does_not_grow(
    stage: Boundary, asked: str
) -> None:
    offer = stage.offer(plan_of())
    document = {
        "a known offer": ("query.offer", "offer", offer.signed(stage.coordinator)),
        "an order that is none": ("train", "order", b"none"),
        "the end of a run": (
            "query.end",
            "end",
            Ended(offer.federation, offer.run, offer.sha256, "over").signed(stage.coordinator),
        ),
    }
    kind, record, data = document[asked]
    content = RecordDict({record: ConfigRecord({"document": data})})
    message = new_message(content, kind=kind, node=1, group="0", ttl_s=1.0)
    answers = [stage.tell(message) for _ in range(1000)]
    assert all(answer is not None for answer in answers[:100])
    assert answers[-1] is None
    assert stage.lab.egress.stat().st_size < 1 << 20
    stage.daemon._pace = Pace(1, 60.0)  # a while later
    answer = stage.tell(message)
    assert answer is not None
    assert answer.outgoing.type == ("refusal" if kind == "train" else "status")


def test_a_message_has_room_for_what_its_plan_needs_and_not_for_much_more(
    stage: Boundary, tmp_path: Path
) -> None:
    assert stage.daemon._room() <= 1 << 20, "offers are all that there may be"
    offer = stage.approved(of_seed(1))
    write_start(offer.plan, tmp_path)
    largest = max(file.stat().st_size for file in tmp_path.iterdir() if file.is_file())
    assert largest < stage.daemon._room() < largest + (32 << 20)
    stage.train(offer, 1)
    stage.finish(offer)
    assert stage.left() == [("update", 1)]


def flood(stage: Boundary, count: int) -> None:
    stage.offer(plan_of(), "run-0")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    roster, coordinator = stage.server.roster(), stage.coordinator
    for number in range(1, count):
        # Of few runs many plans, and of many runs one: neither is kept without end.
        seed = {**plan_of().train.__dict__, "seed": number, "augment": {}}
        plan = plan_of(train=seed) if number % 2 else plan_of()
        run = f"run-{number}" if number % 3 else f"run-{number % 5}"
        stage.send_offer(Offer(run, plan, roster).signed(coordinator))
    entries = stage.lab.plans().entries()
    assert sum(entry.state == "waiting" for entry in entries) <= MAX_WAITING
    size = sum(path.stat().st_size for path in stage.lab.root.rglob("*") if path.is_file())
    assert size < 4 << 20, "of plans, keys and the log of what was answered"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10


def test_a_flood_of_offers_takes_neither_disk_nor_memory(stage: Boundary) -> None:
    flood(stage, 200)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_ten_thousand_offers_take_neither_disk_nor_memory(stage: Boundary) -> None:
    flood(stage, 10_000)
