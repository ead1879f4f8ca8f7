"""The lab half: what it answers, what it refuses, and what leaves with an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from cytofed.arrays import Float32, Parts
from cytofed.client.app import Lab, lab_app
from cytofed.client.budget import LedgerBudget
from cytofed.client.cells import open_cells
from cytofed.labels import load_scheme
from cytofed.messages import (
    Order,
    Update,
    new_message,
    pack_order,
    unpack_evaluation,
    unpack_hello,
    unpack_update,
)
from cytofed.plan import Plan, Privacy, from_dict
from cytofed.privacy.accounting import NonPrivate, PlanCost
from cytofed.privacy.ledger import Ledger
from cytofed.start import START_FILE, Start, read_start, write_start
from cytofed.strategies import make_strategy

PLAN = from_dict(
    {
        "labels": {"scale": {"size_px": 32}},
        "model": {"width": 8},
        "train": {"rounds": 4, "steps_per_round": 2, "batch": 8},
    }
)
SCHEME = load_scheme(PLAN.labels.scheme)


@dataclass
class Remembering:
    """A lab's memory in a dict."""

    kept: dict[tuple[str, int], Parts] = field(default_factory=dict)

    def load(self, run: str, round_: int) -> Parts:
        rounds = [r for name, r in self.kept if name == run and r < round_]
        return self.kept[run, max(rounds)] if rounds else {}

    def save(self, run: str, round_: int, parts: Parts) -> None:
        self.kept[run, round_] = parts


@dataclass(frozen=True)
class Desk:
    """One lab with its app; ``send`` gives it an order."""

    lab: Lab
    start: Start
    app: Callable[[Message, Context], Message]

    def send(self, kind: str = "train", **changes: Any) -> Message:
        values: dict[str, Any] = {
            "run": "federation",
            "round": 1,
            "plan_sha256": self.lab.plan.sha256,
            "parts": {"weights": self.start.weights_P},
        }
        order: Any = Order("train", **{**values, **changes})
        return self.give(pack_order(order), kind)

    def give(self, content: RecordDict, kind: str = "train") -> Message:
        message = new_message(content, kind=kind, node=1, group="1", ttl_s=60, message_id="order-1")
        return self.app(message, Context(0, 1, {}, RecordDict(), {}))

    def train(self, **changes: Any) -> Update:
        reply = self.send(**changes)
        assert not reply.has_error(), reply.error
        parts = make_strategy(self.lab.plan.strategy).lab.up
        return unpack_update(reply, parts=parts, size=self.start.manifest.size)

    def refusal(self, reply: Message) -> str:
        assert reply.has_error()
        assert reply.error.reason is not None
        return reply.error.reason


@pytest.fixture(scope="module")
def desk(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan], Desk]:
    """A lab with the shipped lymphocytes and eosinophils, for any plan."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    images = folder / "images"
    for code in ("EOS", "LYT"):
        (images / code).mkdir(parents=True)
        for image in sorted((sample / "marrow" / code).iterdir())[:12]:
            (images / code / image.name).write_bytes(image.read_bytes())
    cells = open_cells(
        [images], SCHEME, size_px=32, field_um=21.6, cache_dir=tmp_path_factory.mktemp("cache")
    )
    test_N = np.arange(len(cells)) % 4 == 0

    def made(plan: Plan) -> Desk:
        place = folder / plan.sha256
        place.mkdir(exist_ok=True)
        write_start(plan, place)
        start = read_start(place)
        assert start is not None
        train = cells.take(np.flatnonzero(~test_N))
        lab = Lab(
            name="leeds",
            plan=plan,
            scheme=SCHEME,
            train=train,
            test=cells.take(np.flatnonzero(test_N)),
            absent_C=np.asarray(~train.targets_NC.any(axis=0)),
            start=place / START_FILE,
            memory=Remembering(),
        )
        return Desk(lab, start, lab_app(lambda _context, _run: lab))

    return made


def with_strategy(name: str, **options: float) -> Plan:
    return replace(PLAN, strategy=replace(PLAN.strategy, name=name, options=options))


def test_train_order_gives_a_sane_update_under_the_lab_s_name(desk: Callable[..., Desk]) -> None:
    at = desk(PLAN)
    update = at.train(round=2)
    assert (update.lab, update.run, update.round) == ("leeds", "federation", 2)
    assert update.weight == len(at.lab.train) == 18
    assert np.abs(update.parts["weights"]).max() > 0
    assert update.train_s > 0


def test_same_order_gives_the_same_bits_whatever_the_run_is_called_and_another_round_others(
    desk: Callable[..., Desk],
) -> None:
    at, twin = desk(PLAN), desk(PLAN)
    first = at.train(round=2).parts["weights"]
    at.train(round=3)  # what came between leaves no trace in the warm net
    assert at.train(round=2).parts["weights"].tobytes() == first.tobytes()
    assert twin.train(round=2).parts["weights"].tobytes() == first.tobytes()
    assert at.train(round=3).parts["weights"].tobytes() != first.tobytes()
    # A deployment names its runs, a simulation has one name for all: both train the same.
    assert at.train(round=2, run="marrow-2026").parts["weights"].tobytes() == first.tobytes()


def test_evaluate_order_counts_the_held_out_images(desk: Callable[..., Desk]) -> None:
    at = desk(PLAN)
    found = unpack_evaluation(at.send("evaluate"), classes=len(SCHEME.codes))
    assert (found.lab, found.round) == ("leeds", 1)
    assert found.tally.images == len(at.lab.test) == 6
    truth_C = found.tally.confusion_CC.sum(axis=1)
    assert {SCHEME.codes[c]: int(truth_C[c]) for c in np.flatnonzero(truth_C)} == {
        "EOS": 3,
        "LYT": 3,
    }


def test_query_says_who_answers_and_how_many_images_it_counts(desk: Callable[..., Desk]) -> None:
    hello = unpack_hello(desk(PLAN).send("query", parts={}))
    assert (hello.lab, hello.images) == ("leeds", 18)


# --- what it refuses


def test_order_of_a_plan_that_was_not_approved_is_refused(desk: Callable[..., Desk]) -> None:
    at = desk(PLAN)
    for kind in ("train", "evaluate"):
        reason = at.refusal(at.send(kind, plan_sha256="f" * 64))
        assert "f" * 12 in reason
        assert PLAN.sha256[:12] in reason


@pytest.mark.parametrize("change", ["short", "long", "none", "NaN", "inf"])
def test_orders_with_unusable_weights_are_refused(change: str, desk: Callable[..., Desk]) -> None:
    at = desk(PLAN)
    good = at.start.weights_P
    weights: dict[str, Float32] = {
        "short": good[:-1],
        "long": np.append(good, np.float32(0)),
        "none": good[:0],
        "NaN": np.where(np.arange(len(good)) == 5, np.nan, good).astype(np.float32),
        "inf": np.where(np.arange(len(good)) == 5, np.inf, good).astype(np.float32),
    }
    for kind in ("train", "evaluate"):
        assert at.send(kind, parts={"weights": weights[change]}).has_error()
    assert at.train().weight == 18, "and the lab goes on"


def test_garbage_and_missing_parts_are_answered_with_an_error(desk: Callable[..., Desk]) -> None:
    at = desk(PLAN)
    assert "header" in at.refusal(at.give(RecordDict({})))
    assert at.send(parts={}).has_error()
    assert at.send(round=-1).has_error()


def test_lab_without_training_images_says_so(desk: Callable[..., Desk]) -> None:
    lab = desk(PLAN).lab
    empty = replace(lab, train=lab.train.take(np.zeros(0, dtype=np.int64)))
    at = Desk(empty, desk(PLAN).start, lab_app(lambda _context, _run: empty))
    assert at.refusal(at.send()) == "leeds has no image to train on"


class Unlimited:
    """A budget that lets everything pass."""

    def reserve(self, order: Order) -> None: ...
    def release(self, order: Order, parts: Parts) -> None: ...


def test_under_privacy_a_lab_of_nobody_sends_noise_as_any_other(
    desk: Callable[..., Desk],
) -> None:
    plan = replace(PLAN, privacy=Privacy(unit="image", sigma=1.0, declared_patients=10))
    lab = desk(plan).lab
    nobody = replace(
        lab,
        train=lab.train.take(np.zeros(0, dtype=np.int64)),
        budget=Unlimited(),
        declared_patients=10,
    )
    at = Desk(nobody, desk(plan).start, lab_app(lambda _context, _run: nobody))
    assert float(np.abs(at.train().parts["weights"]).min()) > 0


def test_of_an_unexpected_error_only_its_type_leaves(desk: Callable[..., Desk]) -> None:
    def broken(_context: Context, _run: str) -> Lab:
        raise OSError("/data/patients/Jane_Doe_1961.tif is not readable")

    at = Desk(desk(PLAN).lab, desk(PLAN).start, lab_app(broken))
    reason = at.refusal(at.send())
    assert reason == "internal error at the lab: OSError"


# --- memory of strategies


def test_local_norms_keep_the_lab_s_own_layers_and_take_the_others(
    desk: Callable[..., Desk],
) -> None:
    at = desk(with_strategy("local_norms"))
    norm_P = at.start.manifest.mask("norm")
    assert 0 < norm_P.sum() < len(norm_P)
    first = at.train(round=1)
    own_P = at.start.weights_P + first.parts["weights"]
    changed = at.start.weights_P + np.float32(0.25)

    # Whatever the global norms are, the lab goes on from its own: the same end in both cases.
    ends = []
    for norms in (changed, at.start.weights_P):
        order_P = np.where(norm_P, norms, changed)
        ends.append(order_P + at.train(round=2, parts={"weights": order_P}).parts["weights"])
    np.testing.assert_allclose(ends[0][norm_P], ends[1][norm_P], atol=1e-6)
    np.testing.assert_allclose(ends[0][~norm_P], ends[1][~norm_P], atol=1e-6)
    assert np.abs(ends[0][norm_P] - own_P[norm_P]).max() < 0.2, "near its own, not the global"

    # With FedAvg they do matter.
    plain, orders = desk(PLAN), (changed, np.where(norm_P, at.start.weights_P, changed))
    one, two = (o + plain.train(round=2, parts={"weights": o}).parts["weights"] for o in orders)
    assert np.abs(one[norm_P] - two[norm_P]).max() > 0.1


def test_local_norms_are_used_in_evaluation_of_the_round_they_were_trained_in(
    desk: Callable[..., Desk],
) -> None:
    at = desk(with_strategy("local_norms"))
    spoilt = np.where(at.start.manifest.mask("norm"), np.float32(0), at.start.weights_P)
    trained = at.train(round=1)
    mixed = {"weights": spoilt + trained.parts["weights"] * ~at.start.manifest.mask("norm")}
    whole = {"weights": at.start.weights_P + trained.parts["weights"]}
    classes = len(SCHEME.codes)
    with_own = unpack_evaluation(at.send("evaluate", parts=mixed), classes=classes)
    expected = unpack_evaluation(desk(PLAN).send("evaluate", parts=whole), classes=classes)
    assert (with_own.tally.vector_D == expected.tally.vector_D).all()


def test_fednag_sends_its_momentum_and_remembers_nothing(desk: Callable[..., Desk]) -> None:
    plan = replace(
        with_strategy("fednag"), train=replace(PLAN.train, optimizer="sgd", lr=0.01, warmup=0)
    )
    at = desk(plan)
    zeros = np.zeros_like(at.start.weights_P)
    first = at.train(round=2, parts={"weights": at.start.weights_P, "momentum": zeros}).parts
    assert first["momentum"].any()
    assert not at.lab.memory.load("federation", 3)
    on = {"weights": at.start.weights_P, "momentum": first["momentum"]}
    carried = at.train(round=2, parts=on).parts
    faster = np.linalg.norm(carried["weights"]) / np.linalg.norm(first["weights"])
    assert faster > 1.3, "it starts with what was shared"


def test_scaffold_sends_and_remembers_its_control_variate(desk: Callable[..., Desk]) -> None:
    plan = replace(
        with_strategy("scaffold"), train=replace(PLAN.train, optimizer="sgd", lr=0.01, warmup=0)
    )
    at = desk(plan)
    zeros = np.zeros_like(at.start.weights_P)
    orders = {"weights": at.start.weights_P, "control": zeros}
    first = at.train(round=1, parts=orders).parts["control"]
    kept = at.lab.memory.load("federation", 2)["control"]
    assert (kept == first).all(), "from zero, the change is the new value"
    again = at.train(round=1, parts=orders).parts["control"]
    assert again.tobytes() == first.tobytes(), "a round that is run again starts from the former"
    second = at.train(round=2, parts=orders).parts["control"]
    after = at.lab.memory.load("federation", 3)["control"]
    np.testing.assert_allclose(after, kept + second, atol=1e-5)


def test_without_privacy_too_a_lab_reserves_before_it_looks_at_a_patient(
    desk: Callable[..., Desk], tmp_path: Path
) -> None:
    at = desk(PLAN)
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path)
    lab = replace(at.lab, budget=LedgerBudget(path, "default", "f", "patient"))
    app = lab_app(lambda _context, _run: lab)
    at = replace(at, lab=lab, app=app)
    for asked in ("train", "evaluate"):
        assert "is not approved at this lab" in at.refusal(at.send(asked))
    with Ledger.open(path) as book:
        cost = PlanCost(1e-5, 1, PLAN.train.rounds, NonPrivate())
        book.hold(federation="f", plan_sha256=PLAN.sha256, cost=cost)
    kinds: tuple[Literal["train", "evaluate"], ...] = ("train", "evaluate")
    for kind in kinds:
        order = Order(kind, "federation", 1, PLAN.sha256, {"weights": at.start.weights_P})
        assert not at.give(pack_order(order), kind).has_error()
    with Ledger.open(path) as book:
        found = book.summary()
    assert [event["task"] for event in found["events"]] == ["train", "evaluate"]
    assert found["unbounded"]["run"] == "federation"
    assert found["spent"]["epsilon"] is None
