"""The round loop: whatever labs answer, the model stays sane and every absence has a name.

The transport here is a small Grid in memory; what labs answer is chosen by each test.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun

from cytofed.arrays import Float32
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.messages import (
    ERROR_CODE,
    MAX_UPDATE,
    MAX_WEIGHT,
    Evaluation,
    Order,
    Update,
    new_message,
    pack_evaluation,
    pack_order,
    pack_update,
    unpack_order,
)
from cytofed.metrics import Tally
from cytofed.plan import Plan, from_dict
from cytofed.server.asking import ask
from cytofed.server.checkpoints import Progress
from cytofed.server.rounds import Run, Scores, final_weights, run_rounds, status
from cytofed.strategies import make_strategy

SIZE = 3
SCHEME = load_scheme("pbc-8")
Answer = RecordDict | Error | None
"""A lab's reply; None: it never replies."""
Lab = Callable[[str, Order], Answer]


def honest(name: str, order: Order, /, **changes: Any) -> Answer:
    """Moves every weight by .25 towards 1; gets everything right."""
    if order.kind == "evaluate":
        tally = Tally.empty(len(SCHEME.codes))
        tally.confusion_CC[0, 0] = 5
        return pack_evaluation(Evaluation(name, order.run, order.round, tally))
    update_P = np.sign(1 - order.parts["weights"]) * np.float32(0.25)
    values: dict[str, Any] = {
        "lab": name,
        "run": order.run,
        "round": order.round,
        "weight": 10.0,
        "parts": {"weights": update_P.astype(np.float32)},
        "loss": 1.0,
        "train_s": 0.25,
    }
    return pack_update(Update(**{**values, **changes}))


def trains(**changes: Any) -> Lab:
    """Evaluates honestly; its updates have these changes."""

    def answer(lab: str, order: Order) -> Answer:
        return honest(lab, order, **(changes if order.kind == "train" else {}))

    return answer


def only_in(rounds: Iterable[int], inside: Lab, outside: Lab) -> Lab:
    """One behaviour in some rounds, another in the others."""
    chosen = set(rounds)
    return lambda lab, order: (inside if order.round in chosen else outside)(lab, order)


def silent(_lab: str, _order: Order) -> Answer:
    return None


def vector(*values: float) -> dict[str, Float32]:
    return {"weights": np.array(values, np.float32)}


class ChosenGrid(Grid):
    """A Grid in memory: replies are those of ``labs``, one a pull, the last order first."""

    def __init__(self, labs: Mapping[str, Lab], unreachable: frozenset[str] = frozenset()) -> None:
        self._labs = dict(enumerate(labs.items(), start=1))
        self._unreachable = unreachable
        self._replies: dict[str, Message] = {}
        self.orders: list[Order] = []

    @property
    def cohort(self) -> dict[str, int]:
        return {name: node for node, (name, _) in self._labs.items()}

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return new_message(
            content, kind=message_type, node=dst_node_id, group=group_id, ttl_s=ttl or 1.0
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name, answer = self._labs[message.metadata.dst_node_id]
            if name in self._unreachable:
                ids.append("")
                continue
            number = f"{len(self.orders)}"
            message.metadata.__dict__["_message_id"] = number
            order = unpack_order(message)
            self.orders.append(order)
            reply = answer(name, order)
            if reply is not None:
                self._replies[number] = Message(reply, reply_to=message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [i for i in message_ids if i in self._replies]
        return [self._replies.pop(ready[-1])] if ready else []

    def get_node_ids(self) -> Iterable[int]:
        return list(self._labs)

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@dataclass
class Notes:
    """A Watch that writes down what it is told."""

    absent_labs: list[tuple[str, int, str]] = field(default_factory=list)

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None: ...
    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None: ...
    def round(self, run: str, record: Mapping[str, Any]) -> None: ...
    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None:
        self.absent_labs.append((kind, round_, lab))


@dataclass(frozen=True)
class Ended:
    """A run after its rounds."""

    run: Run
    progress: Progress
    notes: Notes
    grid: ChosenGrid
    checkpoints: list[Progress]

    @property
    def status(self) -> str:
        return status(self.run, self.progress)

    @property
    def weights(self) -> Float32:
        return final_weights(self.run, self.progress)

    def records(self, key: str) -> list[Any]:
        return [record[key] for record in self.progress.records]


def plan(rounds: int = 2, *, strategy: str = "fedavg", **cohort: Any) -> Plan:
    tree = {
        "train": {"rounds": rounds},
        "strategy": {"name": strategy},
        "cohort": {"round_timeout_s": 0.1, **cohort},
    }
    return from_dict(tree)


def federate(
    labs: Mapping[str, Lab],
    a_plan: Plan | None = None,
    *,
    unreachable: Iterable[str] = (),
    start: Progress | None = None,
    signed_weights: Mapping[str, float] = {},
) -> Ended:
    chosen = a_plan or plan()
    strategy = make_strategy(chosen.strategy)
    grid = ChosenGrid(labs, frozenset(unreachable))
    run = Run(
        "federation", chosen, strategy, SCHEME, grid.cohort, SIZE, signed_weights=signed_weights
    )
    begin = start or Progress(0, strategy.init(np.zeros(SIZE, np.float32)))
    notes, checkpoints = Notes(), list[Progress]()
    progress = run_rounds(grid, run, begin, checkpoint=checkpoints.append, watch=notes)
    return Ended(run, progress, notes, grid, checkpoints)


# --- all is well


def test_honest_labs_complete_a_run_and_move_the_model() -> None:
    ended = federate({"leeds": honest, "ulm": honest}, plan(3))
    assert ended.status == "completed"
    assert ended.weights.tolist() == [0.75] * SIZE
    assert ended.records("received") == [["leeds", "ulm"]] * 3
    assert ended.records("absent") == [{}] * 3
    assert ended.progress.records[-1]["global"]["accuracy"] == 1.0
    assert [p.round for p in ended.checkpoints] == [1, 2, 3]


def test_orders_carry_the_plan_the_round_and_the_present_weights() -> None:
    ended = federate({"leeds": honest}, plan(2))
    trained = [order for order in ended.grid.orders if order.kind == "train"]
    assert [order.round for order in trained] == [1, 2]
    assert {order.plan_sha256 for order in ended.grid.orders} == {ended.run.plan.sha256}
    assert [order.parts["weights"].tolist() for order in trained] == [[0.0] * 3, [0.25] * 3]


def test_replies_that_are_there_in_time_count_however_long_it_takes_to_read_them() -> None:
    class Slow(ChosenGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            time.sleep(0.06)
            return super().pull_messages(message_ids)

    grid = Slow(dict.fromkeys(("leeds", "ulm", "york"), honest))
    order = pack_order(Order("train", "federation", 1, "", vector(0.0, 0.0, 0.0)))
    answered = ask(grid, grid.cohort, "train", 1, order, timeout_s=0.1)
    assert [lab for lab, reply in answered if reply is not None] == ["york", "ulm", "leeds"]


def test_labs_weigh_as_many_images_as_they_have() -> None:
    labs = {
        "leeds": trains(parts=vector(1, 0, 0), weight=30.0),
        "ulm": trains(parts=vector(0, 1, 0), weight=10.0),
    }
    assert federate(labs, plan(1)).weights.tolist() == [0.75, 0.25, 0.0]


def test_order_of_labs_and_of_replies_does_not_change_one_bit() -> None:
    rng = np.random.default_rng(0)
    labs = {
        f"lab-{k}": trains(parts=vector(*rng.normal(size=3)), weight=float(k + 1)) for k in range(7)
    }
    turned = dict(reversed(labs.items()))
    assert federate(labs).weights.tobytes() == federate(turned).weights.tobytes()


def test_evaluation_is_every_so_many_rounds_and_in_the_last() -> None:
    often = replace(plan(5), evaluation=replace(Plan().evaluation, every=2))
    ended = federate({"leeds": honest}, often)
    scored = [record["round"] for record in ended.progress.records if record["global"]]
    assert scored == [2, 4, 5]


def test_a_run_goes_on_from_its_progress() -> None:
    whole = federate({"leeds": honest}, plan(4))
    rest = federate({"leeds": honest}, plan(4), start=whole.checkpoints[1])
    assert {order.round for order in rest.grid.orders} == {3, 4}
    assert rest.weights.tobytes() == whole.weights.tobytes()
    assert rest.records("round") == [1, 2, 3, 4]


# --- faulty and hostile labs

BAD: dict[str, tuple[Lab, str]] = {
    "NaN": (trains(parts=vector(0, math.nan, 0)), "NaN"),
    "infinite": (trains(parts=vector(math.inf, 0, 0)), "inf"),
    "huge": (trains(parts=vector(MAX_UPDATE * 2, 0, 0)), "above"),
    "wrong shape": (trains(parts=vector(1, 1)), "shape"),
    "no parts": (trains(parts={}), "parts"),
    "negative weight": (trains(weight=-5.0), "weight"),
    "NaN weight": (trains(weight=math.nan), "weight"),
    "weight of all": (trains(weight=MAX_WEIGHT), "weight"),
    "weight of next to nothing": (trains(weight=5e-324), "weight"),
    "another's name": (trains(lab="ulm"), "ulm"),
    "another run": (trains(run="local-ulm"), "local-ulm"),
    "another round": (trains(round=7), "7"),
    "refusal": (lambda _l, _o: Error(ERROR_CODE, "plan not approved"), "plan not approved"),
    "error without a reason": (lambda _l, _o: Error(3), "error 3"),
    "garbage": (lambda _l, _o: RecordDict({}), "header"),
    "silence": (silent, "deadline"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lab_is_absent_by_name_and_reason_and_the_others_go_on(kind: str) -> None:
    lab, reason = BAD[kind]
    ended = federate({"leeds": lab, "ulm": honest, "york": honest}, plan(2))
    assert ended.records("received") == [["ulm", "york"]] * 2
    for absent in ended.records("absent"):
        assert absent.keys() == {"leeds"}
        assert reason in absent["leeds"]
    assert ("train", 2, "leeds") in ended.notes.absent_labs
    assert ended.weights.tolist() == [0.5] * SIZE, "the model is what the others made of it"
    assert ended.status == "incomplete", "a lab that never contributed is not forgotten"


def test_order_of_labs_does_not_decide_who_is_refused_for_weight() -> None:
    greedy = trains(weight=MAX_WEIGHT)
    for labs in (
        {"greedy": greedy, "ulm": honest, "york": honest},
        {"york": honest, "ulm": honest, "greedy": greedy},
    ):
        assert federate(labs).records("received") == [["ulm", "york"]] * 2


def test_lab_that_weighs_more_than_it_signed_is_absent_by_name() -> None:
    labs = {"greedy": trains(weight=1e6), "ulm": honest, "york": honest}
    signed = {"greedy": 16.0, "ulm": 16.0, "york": 10.0}
    ended = federate(labs, plan(1), signed_weights=signed)
    assert ended.records("received") == [["ulm", "york"]]
    assert ended.records("absent")[0]["greedy"].endswith("approved with one of 16 at most")


@pytest.mark.parametrize("labs", [9, 11, 40])
def test_labs_that_all_take_the_largest_weight_end_no_run(labs: int) -> None:
    """A sum of equal shares of floating point may be above the whole."""
    names = [f"lab-{number}" for number in range(labs)]
    for weight in (MAX_WEIGHT / labs, MAX_WEIGHT // labs):
        ended = federate({name: trains(weight=weight) for name in names}, plan(1))
        [received] = ended.records("received")
        assert received == (sorted(names) if weight == MAX_WEIGHT // labs else [])


def test_lab_that_cannot_be_reached_is_absent_by_name() -> None:
    ended = federate({"leeds": honest, "ulm": honest}, unreachable=["ulm"])
    assert [*ended.records("absent")[0]] == ["ulm"]
    assert ended.status == "incomplete"


def test_records_stay_valid_json_and_printable_whatever_labs_write() -> None:
    labs: dict[str, Lab] = {
        "nan": trains(loss=math.nan, train_s=math.nan),
        "infinite": trains(loss=math.inf, train_s=math.inf),
        "back in time": trains(loss=-math.inf, train_s=-1e308),
        "loud": lambda _l, _o: Error(ERROR_CODE, "\x1b[2J\n\r\x07" + "x" * 100_000),
    }
    ended = federate(labs)
    for record in ended.progress.records:
        text = json.dumps(record, allow_nan=False)
        assert len(text) < 5000
        assert record["absent"]["loud"].isprintable()
        assert record["train_s"] == 0
    assert ended.weights.tolist() == [0.5] * SIZE


def test_evaluation_of_a_bad_lab_is_left_out_and_named() -> None:
    def absurd(lab: str, order: Order) -> Answer:
        if order.kind == "train":
            return honest(lab, order)
        tally = Tally.empty(len(SCHEME.codes))
        tally.confusion_CC[0, 1] = 2**50
        return pack_evaluation(Evaluation(lab, order.run, order.round, tally))

    def liar(lab: str, order: Order) -> Answer:
        return honest("ulm" if order.kind == "evaluate" else lab, order)

    ended = federate({"absurd": absurd, "liar": liar, "ulm": honest})
    assert ended.progress.records[-1]["labs"].keys() == {"ulm"}
    assert ended.progress.records[-1]["global"]["accuracy"] == 1.0
    named = {lab for kind, _, lab in ended.notes.absent_labs if kind == "evaluate"}
    assert named == {"absurd", "liar"}


# --- how a run ends


def test_round_with_too_few_labs_does_not_move_the_model() -> None:
    labs = {
        "leeds": honest,
        "ulm": only_in([2], silent, honest),
        "york": only_in([2], silent, honest),
    }
    ended = federate(labs, plan(3, min_labs=2))
    assert ended.records("applied") == [True, False, True]
    assert ended.records("received")[1] == ["leeds"]
    assert [*ended.records("absent")[1]] == ["ulm", "york"]
    assert ended.weights.tolist() == [0.5] * SIZE
    assert ended.status == "incomplete", "a round is missing"


def test_run_in_which_every_lab_contributed_at_least_once_is_completed() -> None:
    labs = {"leeds": only_in([1], silent, honest), "ulm": only_in([2], silent, honest)}
    ended = federate(labs, plan(2))
    assert ended.status == "completed"
    assert [[*absent] for absent in ended.records("absent")] == [["leeds"], ["ulm"]]


def test_contribution_to_a_round_that_was_not_applied_does_not_count() -> None:
    labs = {"leeds": honest, "ulm": honest, "york": only_in([2], honest, silent)}
    labs["leeds"] = labs["ulm"] = only_in([2], silent, honest)
    ended = federate(labs, plan(3, min_labs=2))
    assert ended.records("received") == [["leeds", "ulm"], ["york"], ["leeds", "ulm"]]
    assert ended.status == "incomplete"


def test_run_without_any_applied_round_failed_and_has_the_start_weights() -> None:
    ended = federate({"leeds": silent, "ulm": silent}, plan(2))
    assert ended.status == "failed"
    assert ended.weights.tolist() == [0.0] * SIZE
    assert federate({"leeds": honest}, plan(2, min_labs=2)).status == "failed"


# --- strategies that need single updates


def test_robust_strategy_withstands_a_hostile_lab_in_the_loop() -> None:
    hostile = trains(parts=vector(*[MAX_UPDATE] * 3), weight=1e6)
    labs = {"evil": hostile, **{f"lab-{k}": honest for k in range(4)}}
    for name in ("median", "trimmed_mean", "krum"):
        ended = federate(labs, plan(2, strategy=name))
        assert ended.weights.tolist() == [0.5] * SIZE, name
        assert ended.status == "completed", name
    assert federate(labs, plan(2)).weights[0] > 10, "and the plain mean does not"


def test_cohort_too_small_for_a_robust_strategy_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="krum as planned needs 5 labs, found 4"):
        federate({f"lab-{k}": honest for k in range(4)}, plan(2, strategy="krum"))


def test_round_with_too_few_updates_for_a_robust_strategy_is_not_applied() -> None:
    labs = {f"lab-{k}": honest for k in range(4)} | {"ulm": only_in([1], silent, honest)}
    ended = federate(labs, plan(2, strategy="krum"))
    assert ended.records("applied") == [False, True]
    assert ended.status == "incomplete"


# --- killed between the last round and its scores


@pytest.mark.parametrize("told", [False, True])
def test_final_scores_are_asked_for_again_after_a_kill_unless_they_were_kept(told: bool) -> None:
    labs = {"leeds": honest, "ulm": honest}
    whole = federate(labs, plan(2))
    bare = {key: value for key, value in whole.progress.records[-1].items() if key != "global"}
    cut = (*whole.progress.records[:-1], {**bare, "evaluated": False})
    killed = replace(whole.progress, records=cut)
    grid, kept = ChosenGrid(labs), list[tuple[int, Scores]]()
    checkpoints = list[Progress]()
    progress = run_rounds(
        grid,
        replace(whole.run, cohort=grid.cohort),
        killed,
        checkpoint=checkpoints.append,
        watch=Notes(),
        on_scores=lambda number, scores: kept.append((number, scores)),
        known_scores=Scores(exact=tally_of_five(labs=2)) if told else None,
    )
    asked = [(order.kind, order.round) for order in grid.orders]
    assert asked == ([] if told else [("evaluate", 2)] * 2)
    assert [number for number, _ in kept] == ([] if told else [2])
    assert progress.records[-1]["evaluated"]
    assert progress.records[-1]["global"] == whole.progress.records[-1]["global"]
    assert progress.records == checkpoints[-1].records
    np.testing.assert_array_equal(progress.state["weights"], whole.progress.state["weights"])


def tally_of_five(labs: int) -> Tally:
    """What so many honest labs told, added up."""
    tally = Tally.empty(len(SCHEME.codes))
    tally.confusion_CC[0, 0] = 5 * labs
    return tally
