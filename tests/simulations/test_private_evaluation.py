"""Scores that may leave: noised by each lab, in the secure sum, or not at all; and self-checks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cytofed.client import app as lab_half
from cytofed.client import convolution
from cytofed.client.app import Lab, lab_app
from cytofed.client.training import Trained
from cytofed.console import RunProgress
from cytofed.errors import RefusedError
from cytofed.messages import Order, Update, new_message, pack_order, unpack_evaluation
from cytofed.metrics import Tally
from cytofed.privacy import evaluation, selfcheck
from cytofed.privacy.gradients import PatientOptimizer
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.noise import SimulatedRandomness, SystemRandomness
from cytofed.server import rounds
from cytofed.server.rounds import Run, Scores, evaluate_exactly
from cytofed.simulations import simulate as simulation
from cytofed.simulations import virtual
from cytofed.simulations.partitions import parse_partition
from cytofed.simulations.simulate import Request
from cytofed.start import read_start, write_start

Small = Callable[..., Request]
Directly = Callable[[Request], dict[str, Any]]
PRIVATE = (
    "privacy.unit=patient",
    "privacy.sigma=2",
    "simulation.pseudo_patient_cells=3",
    "train.steps_per_round=1",
)
SCORED = (*PRIVATE, "evaluation.sigma=0.1", "simulation.labs=2")
SECURE = ("secure_aggregation.enabled=true", "simulation.labs=4")


def records(request: Request) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (request.out / "metrics.jsonl").read_text().splitlines()]


def events(request: Request, lab: str = "lab-1") -> list[dict[str, Any]]:
    path = request.out / "checkpoints" / "ledgers" / f"{lab}.sqlite"
    with Ledger.open(path, pool="federation") as ledger:
        assert ledger.balance().held.epsilon == 0, "all that was held was reserved"
        found: list[dict[str, Any]] = ledger.summary()["events"]
        return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Tally]]:
    """What each lab let out by order to evaluate: (lab, round, tally)."""
    found: list[tuple[str, int, Tally]] = []
    real = lab_half._evaluate

    def evaluate(order: Order, lab: Lab, net: Any) -> Tally:
        tally = real(order, lab, net)
        found.append((lab.name, order.round, tally))
        return tally

    monkeypatch.setattr(lab_half, "_evaluate", evaluate)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[Scores, Tally]]:
    """By round: what the coordinator came to know, and the sum of the labs' exact tallies."""
    found: dict[int, tuple[Scores, Tally]] = {}
    real = rounds.evaluate

    def evaluate(grid: Any, run: Run, number: int, parts: Any, watch: Any) -> Scores:
        scores = real(grid, run, number, parts, watch)
        exact = evaluate_exactly(grid, run, number, parts, watch)
        whole = sum(exact.values(), Tally.empty(len(run.scheme.codes)))
        found[number] = (scores, whole)
        return scores

    monkeypatch.setattr(rounds, "evaluate", evaluate)
    return found


# --- noised scores


def test_noised_scores_are_told_beside_the_exact_ones_of_a_simulation(
    small: Small, directly: Directly
) -> None:
    request = small(
        *PRIVATE, "simulation.labs=2", "evaluation.sigma=0.01"
    )  # a dozen cells: more would hide them
    summary = directly(request)
    released, exact = summary["released"], summary["global"]
    assert released["sigma"] == 0.01
    assert released["noise_sd"] == pytest.approx(0.01 * math.sqrt(16) * math.sqrt(2))
    assert released["labs"] == 2
    assert abs(released["accuracy"] - exact["accuracy"]) < 0.35
    assert "ece" in exact
    assert "ece" not in released
    assert any("Scores are exact" in warning for warning in summary["warnings"])
    for record in records(request):
        assert record["released"].keys() == record["global"].keys()
        assert record["labs"] is None
        assert record["evaluation_failed"] is None


def test_each_evaluation_is_an_event_of_its_own_and_all_are_paid_for(
    small: Small, directly: Directly
) -> None:
    request = small(*SCORED, "train.rounds=3", "evaluation.every=2")
    summary = directly(request)
    found = {(event["task"], event["round"]): event for event in events(request)}
    assert set(found) == {
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("evaluate", 2),
        ("evaluate", 3),
    }
    assert found["evaluate", 2]["mechanism"] == "gaussian"
    assert found["evaluate", 2]["sigma"] == 0.1
    assert {event["state"] for event in found.values()} == {"settled"}
    assert summary["privacy"]["evaluation"]["releases"] == 2
    for lab in summary["privacy"]["labs"].values():
        assert lab["epsilon"] == pytest.approx(summary["privacy"]["total"]["epsilon"], abs=1e-3)
    assert summary["privacy"]["epsilon"] < summary["privacy"]["total"]["epsilon"]
    assert records(request)[0]["released"] is None


def test_training_and_evaluation_of_a_round_do_not_share_noise(
    small: Small, directly: Directly, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = []

    def remembered(*context: Any) -> SimulatedRandomness:
        streams.append(context)
        return SimulatedRandomness(*context)

    monkeypatch.setattr(virtual, "SimulatedRandomness", remembered)
    directly(small(*SCORED))
    assert len(streams) > 4
    assert len(set(streams)) == len(streams)


def test_what_leaves_is_noise_around_at_most_so_many_cells_of_a_patient(
    small: Small, directly: Directly, told: list[tuple[str, int, Tally]]
) -> None:
    directly(small(*PRIVATE, "simulation.labs=2", "evaluation.sigma=20", "train.rounds=1"))
    assert len(told) == 2
    for _, _, tally in told:
        assert tally.confusion_CC.std() == pytest.approx(20 * 4, rel=0.2), "also of absent classes"
        assert not tally.bins_B3.any()
    assert not np.array_equal(told[0][2].confusion_CC, told[1][2].confusion_CC)


def test_without_sigma_a_simulation_tells_exact_scores_and_pays_nothing_for_them(
    small: Small, directly: Directly, told: list[tuple[str, int, Tally]]
) -> None:
    request = small(*PRIVATE, "simulation.labs=2")
    summary = directly(request)
    assert told == [], "no order to evaluate was answered"
    assert summary["released"] is None
    assert summary["global"]["macro_f1"] >= 0
    assert {event["task"] for event in events(request)} == {"train"}
    assert price_of(request) == pytest.approx(summary["privacy"]["epsilon"], abs=1e-3)


def price_of(request: Request) -> float:
    path = request.out / "checkpoints" / "ledgers" / "lab-1.sqlite"
    with Ledger.open(path, pool="federation") as ledger:
        return ledger.balance().spent.epsilon


# --- a deployed lab


def deployed(request: Request, **changes: Any) -> tuple[ClientApp, Lab]:
    """One lab and its app, as a deployment makes it."""
    folder = request.out / "checkpoints"
    folder.mkdir(parents=True)
    spec = parse_partition(request.plan.simulation.partition)
    cells = simulation._read(request, RunProgress(quiet=True))
    labs = simulation._cut(request, spec, cells, folder)
    write_start(request.plan, folder)
    lab = replace(labs.lab(0), **changes)
    return lab_app(lambda _context, _run: lab), lab


def asked(app: ClientApp, lab: Lab, kind: str, *, weights: float = 0.0, slot: int = 0) -> Message:
    """The lab's reply to an order of round 1."""
    start = read_start(lab.start.parent)
    assert start is not None
    parts = {"weights": start.weights_P + np.float32(weights)}
    order = pack_order(Order("train", "federation", 1, lab.plan.sha256, parts, slot=slot))
    message = new_message(order, kind=kind, node=0, group="1", ttl_s=60, message_id="1")
    reply: Message = app(message, Context(0, 0, {}, RecordDict(), {}))
    return reply


def refusal(reply: Message) -> str:
    assert reply.has_error()
    return reply.error.reason or ""


def test_a_deployed_lab_tells_no_score_that_is_not_paid_for(small: Small) -> None:
    app, lab = deployed(small(*PRIVATE, "simulation.labs=1"))
    assert "releases no scores" in refusal(asked(app, lab, "evaluate"))
    with pytest.raises(ValueError, match="exact"):  # Flower knows no such function
        asked(app, lab, "evaluate.exact")


def test_the_same_order_again_tells_the_same_or_nothing(small: Small) -> None:
    """With noise drawn anew, two answers would average to less noise than was paid for."""
    app, lab = deployed(
        small(*PRIVATE, "evaluation.sigma=0.1", "simulation.labs=1"),
        randomness=lambda _: SystemRandomness(),
    )
    first = unpack_evaluation(asked(app, lab, "evaluate"), classes=21, noised=True)
    assert first.tally.confusion_CC.any()
    assert "already released another" in refusal(asked(app, lab, "evaluate"))
    assert "other weights" in refusal(asked(app, lab, "evaluate", weights=0.5))


class Kept:
    """The outbox's part: what was released is kept, by kind and round."""

    def __init__(self) -> None:
        self.updates: dict[tuple[str, int], Update] = {}

    def load(self, order: Order) -> Update | None:
        return self.updates.get((order.kind, order.round))

    def save(self, order: Order, update: Update) -> None:
        self.updates[order.kind, order.round] = update


def test_a_second_attempt_at_an_evaluation_tells_the_kept_scores_and_costs_nothing(
    small: Small,
) -> None:
    request = small(*PRIVATE, "evaluation.sigma=0.1", "simulation.labs=1")
    app, lab = deployed(request, randomness=lambda _: SystemRandomness(), updates=Kept())
    found = [
        unpack_evaluation(asked(app, lab, "evaluate", slot=slot), classes=21, noised=True)
        for slot in (0, 1)
    ]
    assert (found[0].tally.vector_D == found[1].tally.vector_D).all()
    path = request.out / "checkpoints" / "ledgers" / "lab-1.sqlite"
    with Ledger.open(path, pool="federation") as ledger:
        assert len(ledger.summary()["events"]) == 1


# --- the secure sum


def test_the_secure_sum_of_tallies_is_the_plain_sum_exactly(
    small: Small,
    directly: Directly,
    seen: dict[int, tuple[Scores, Tally]],
) -> None:
    """Calibration's sums of millionths included; with 16 bits for updates too."""
    request = small(*SECURE, "secure_aggregation.bits=16")
    summary = directly(request)
    assert set(seen) == {1, 2}
    for scores, exact in seen.values():
        assert scores.labs == {}, "of single labs nothing is known"
        assert scores.exact is not None
        assert (scores.exact.vector_D == exact.vector_D).all()
        assert exact.images > 0
    assert summary["status"] == "completed"
    assert summary["labs"] is None
    assert summary["global"]["images"] == seen[2][1].images
    assert all(record["global"] is not None for record in records(request))


def test_noised_tallies_go_into_the_secure_sum_and_come_out_exactly(
    small: Small,
    directly: Directly,
    told: list[tuple[str, int, Tally]],
    seen: dict[int, tuple[Scores, Tally]],
) -> None:
    request = small(*SECURE, *PRIVATE, "evaluation.sigma=3", "evaluation.every=9")
    summary = directly(request)
    scores, _ = seen[2]
    assert scores.released is not None
    assert scores.answered == len(told) == 4
    expected_D = sum(tally.vector_D for _, _, tally in told)
    assert (scores.released.vector_D == expected_D).all()
    assert scores.released.confusion_CC.min() < 0
    assert summary["global"]["images"] > 0
    assert summary["labs"] is None
    assert summary["released"]["labs"] == 4


def test_below_the_threshold_the_evaluation_is_missing_and_the_run_goes_on(
    small: Small, directly: Directly, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lab_half._evaluate

    def evaluate(order: Order, lab: Lab, net: Any) -> Tally:
        if order.round == 1 and lab.name in ("lab-1", "lab-2"):
            raise RefusedError("not today")
        return real(order, lab, net)

    monkeypatch.setattr(lab_half, "_evaluate", evaluate)
    request = small(*SECURE)
    summary = directly(request)
    first, second = records(request)
    assert first["global"] is None
    assert "2" in first["evaluation_failed"]
    assert first["applied"]
    assert second["global"] is not None
    assert summary["status"] == "completed"
    assert summary["global"] is not None


def test_a_final_evaluation_that_is_missing_is_said_in_the_summary(
    small: Small, directly: Directly, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_order: Order, _lab: Lab, _net: Any) -> Tally:
        raise RefusedError("not today")

    monkeypatch.setattr(lab_half, "_evaluate", refuse)
    summary = directly(small(*SECURE, "train.rounds=1"))
    assert summary["status"] == "completed"
    assert summary["global"] is None
    assert any("was not evaluated" in warning for warning in summary["warnings"])


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_run_killed_around_an_evaluation_goes_on(
    kill_at: int, small: Small, directly: Directly, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labs close a round when they evaluate its model: it must not be trained again."""
    with monkeypatch.context() as patch:
        real, calls = simulation._checkpoint, []

        def checkpoint(*args: Any) -> None:
            calls.append(args)
            if kill_at == 2 and len(calls) == 2:  # after the evaluation, before it is saved
                raise KeyboardInterrupt
            real(*args)
            if kill_at == 1:  # before the evaluation
                raise KeyboardInterrupt

        patch.setattr(simulation, "_checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            directly(small(*SECURE))
    summary = directly(small(*SECURE, resume=True))
    assert summary["status"] == "completed"
    assert summary["global"] is not None


# --- self-checks before the first private order


add_noise = PatientOptimizer.add_noise
backward = convolution._Product.backward


def halved(self: PatientOptimizer) -> None:
    self.noise_multiplier = self.mechanism.sigma / 2
    add_noise(self)


def seeded(*_context: Any) -> SimulatedRandomness:
    return SimulatedRandomness(0)


def transposed(ctx: Any, gradient_BOHW: Any) -> Any:
    for_images, for_weight, *rest = backward(ctx, gradient_BOHW)
    assert for_weight is not None
    return for_images, for_weight.mT, *rest


def exact_tally(confusion_CC: Any, *_: Any) -> Tally:
    return Tally(np.rint(confusion_CC).astype(np.int64), Tally.empty(len(confusion_CC)).bins_B3)


@pytest.mark.parametrize(
    ("target", "name", "fault", "named"),
    [
        (PatientOptimizer, "add_noise", lambda _: None, "noise self-test"),
        (PatientOptimizer, "add_noise", halved, "standard deviation is 0.5"),
        (virtual, "SimulatedRandomness", seeded, "same noise"),
        (evaluation, "noised_tally", exact_tally, "evaluation: noise self-test"),
        (convolution._Product, "backward", staticmethod(transposed), "training self-test"),
    ],
    ids=[
        "noise off",
        "noise halved",
        "one seed for all rounds and labs",
        "scores without noise",
        "gradients in another order",
    ],
)
def test_a_lab_whose_self_check_fails_trains_nothing_and_says_why(
    target: Any,
    name: str,
    fault: Any,
    named: str,
    small: Small,
    directly: Directly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_args: Any, **_kwargs: Any) -> Trained:
        raise AssertionError("a lab trained")

    monkeypatch.setattr(target, name, fault)
    monkeypatch.setattr(lab_half, "_train_privately", never)
    request = small(*SCORED)
    summary = directly(request)
    assert summary["status"] == "failed"
    for record in summary["participation"]:
        assert record["received"] == []
        for reason in record["absent"].values():
            assert reason.startswith("self-check failed")
            assert named in reason
    assert not (request.out / "checkpoints" / "ledgers").exists(), "nothing was reserved"
    assert summary["released"]["labs"] == 0


def test_a_process_checks_itself_once(
    small: Small, directly: Directly, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], selfcheck.check_production_path

    def counted(**seams: Any) -> Any:
        calls.append(seams)
        return real(**seams)

    monkeypatch.setattr(selfcheck, "check_production_path", counted)
    directly(small(*PRIVATE, "simulation.labs=2"))
    assert len(calls) == 1
    directly(small("simulation.labs=2", out=Path(small().out).with_name("plain")))
    assert len(calls) == 1, "without privacy there is nothing to check"
