"""A coordinator that asks one lab's own daemon for what it may not have. One claim each; see
mutate.py for the proof that each guard is needed. ``boundary.py`` has the stage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cytofed.client.daemon import MAX_OFFER_BYTES
from cytofed.client.opening import open_images
from cytofed.documents import Offer, Start
from cytofed.errors import InputError, VerificationError
from cytofed.messages import BadMessage, Order, pack_order
from cytofed.plan import Plan
from cytofed.sealed_message import new_content
from tests.attacks.boundary import LAB, Boundary, boundary, plan_of
from tests.attacks.stage import guarded_by

SAMPLE = Path(__file__).resolve().parents[2] / "src" / "cytofed" / "sample"


@contextmanager
def staged() -> Iterator[Boundary]:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        boundary(Path(folder), SAMPLE, patch) as found,
    ):
        yield found


def started(stage: Boundary, offer: Offer, *labs: str) -> Any:
    """The papers of an order that say that these labs take part."""
    signed = Start.verified(stage.start(offer), stage.coordinator.public, offer).decisions
    chosen = {name: signed[name] for name in labs}
    start = Start(offer.run, offer.plan.sha256, offer.roster.sha256, chosen)
    return SimpleNamespace(papers=start.signed(stage.coordinator))


@guarded_by("start-pinned", "lab-in-cohort")
def test_cohort_is_the_one_that_the_run_started_with() -> None:
    """With another one in each round, sums would differ by single labs."""
    with staged() as stage:
        offer = stage.approved(plan_of())
        with pytest.raises(VerificationError, match="this lab is not in the cohort"):
            stage.daemon._check_start(offer, started(stage, offer, "lab-2", "lab-3"))
        stage.daemon._check_start(offer, started(stage, offer, LAB, "lab-2", "lab-3"))
        with pytest.raises(VerificationError, match="has another cohort than when it started"):
            stage.daemon._check_start(offer, started(stage, offer, LAB, "lab-2"))


@guarded_by("order-place")
def test_order_that_says_another_round_than_its_seal_is_refused() -> None:
    """What the ledger and the outbox know of it would be the seal's round, or the order's."""
    with staged() as stage:
        offer = stage.approved(plan_of(train={"rounds": 2, "steps_per_round": 1, "batch": 8}))
        order = Order("train", offer.run, 2, offer.plan.sha256, stage.weights(offer))
        with pytest.raises(BadMessage, match="its seal another place"):
            stage.ask(offer, "train", 1, pack_order(order))
        assert stage.left() == []


@guarded_by("paused")
def test_order_to_a_paused_lab_is_refused() -> None:
    with staged() as stage:
        offer = stage.approved(plan_of())
        stage.lab.pause()
        with pytest.raises(BadMessage, match="paused by this lab"):
            stage.train(offer, 1)


def test_start_model_that_the_plan_does_not_name_is_refused() -> None:
    with staged() as stage:
        offer = stage.approved(plan_of())
        with pytest.raises(BadMessage, match="a start model came for a plan that asks for none"):
            stage.ask(offer, "query.start", 0, new_content({}, file=b"a model"))


def kept(stage: Boundary) -> int:
    return len(stage.lab.plans().entries())


@guarded_by("offer-federation")
def test_offer_of_another_federation_is_not_kept() -> None:
    with staged() as stage:
        roster = replace(stage.server.roster(), federation="another")
        stage.offer(plan_of(), roster=roster)
        assert kept(stage) == 0


@guarded_by("offer-size")
def test_offer_without_end_is_not_read() -> None:
    with staged() as stage:
        answer = stage.send_offer(bytes(MAX_OFFER_BYTES + 1))
        assert answer is not None
        assert "bytes, more than" in answer.reason


def private() -> Plan:
    unit = {"unit": "patient", "epsilon": 8, "delta": 1e-3, "declared_patients": 20}
    return plan_of(privacy=unit)


@guarded_by("declared-labels")
def test_no_patient_chooses_the_label_map_of_all_others() -> None:
    with staged() as stage:
        settings = replace(stage.lab.settings(), labels=None)
        with pytest.raises(InputError, match="the label map is declared"):
            open_images(private(), settings, Path())


@guarded_by("whose-images")
def test_images_without_patients_are_not_trained_on_as_if_each_were_one() -> None:
    with staged() as stage:
        settings = replace(stage.lab.settings(), patients=None)
        with pytest.raises(InputError, match="does not say which image is whose"):
            open_images(private(), settings, Path())
