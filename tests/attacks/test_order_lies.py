"""Lies in orders and in what labs declare: what a lab computes from, and how much it counts for.
One claim each; see mutate.py for the proof that each guard is needed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytofed.arrays import Manifest, Tensor
from cytofed.client.orders import check_parts
from cytofed.client.secure import SecureLab
from cytofed.documents import Decision
from cytofed.errors import RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.messages import Order
from cytofed.model_file import ModelInfo, write_model
from cytofed.plan import Plan, from_dict
from cytofed.secure_round import weight_bounds
from cytofed.start import START_FILE
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.scaffold import scaffold
from tests.attacks.stage import PLAN, guarded_by, identity, names, ready

A, B, C, D = names(4)
START_P = np.arange(6, dtype=np.float32)


@cache
def start_folder() -> Path:
    """A lab's own start model of six weights."""
    folder = Path(tempfile.mkdtemp(prefix="cytofed-test-"))
    info = ModelInfo(
        arch="cytonet", width=8, scheme="pbc-8", codes=("A",), size_px=8, field_um=8.0,
        plan_sha256=PLAN,
    )  # fmt: skip
    write_model(folder / START_FILE, {"w": START_P}, info)
    manifest = Manifest((Tensor("w", (6,), "body"),))
    write_atomically(folder / "manifest.json", manifest.to_json())
    return folder


def order(kind: Any = "train", round: int = 1, **parts: Any) -> Order:
    given = {"weights": START_P, **parts}
    kept = {name: part for name, part in given.items() if part is not None}
    return Order(kind, "run-1", round, PLAN, kept)


def refused(asked: Order, match: str, strategy: Any = fedavg) -> None:
    with pytest.raises(RefusedError, match=match):
        check_parts(asked, strategy(), size=6, folder=start_folder())


def test_honest_orders_are_carried_out() -> None:
    zeros = np.zeros_like(START_P)
    for asked, strategy in (
        (order(), fedavg()),
        (order(round=2, weights=START_P + 1), fedavg()),
        (order("evaluate", weights=START_P + 1), fedavg()),
        (order(control=zeros), scaffold()),
        (order("evaluate"), scaffold()),
    ):
        check_parts(asked, strategy, size=6, folder=start_folder())


@guarded_by("order-parts")
def test_order_without_a_vector_of_its_strategy_is_refused() -> None:
    refused(order(), "the order carries weights, strategy scaffold has weights, control", scaffold)


@guarded_by("order-parts")
def test_order_with_a_vector_too_many_is_refused() -> None:
    refused(order(own=START_P), "the order carries weights, own, strategy fedavg has weights")
    refused(order("evaluate", control=START_P), "strategy scaffold has weights for it", scaffold)


@guarded_by("order-size")
def test_order_of_another_net_is_refused() -> None:
    refused(order(round=2, weights=START_P[:5]), r"weights of shape \(5,\), the plan's net has")


@guarded_by("order-finite")
def test_order_with_values_that_are_no_numbers_is_refused() -> None:
    for value in (np.nan, np.inf):
        broken = START_P.copy()
        broken[3] = value
        refused(order(round=2, weights=broken), "weights has values that are no numbers")


@guarded_by("order-start")
def test_first_round_from_another_model_than_the_plans_is_refused() -> None:
    """A coordinator could train on from a model that gives a lab's images away."""
    refused(order(weights=START_P + np.float32(0.01)), "round 1 begins with other weights")


@guarded_by("order-start")
def test_first_round_with_a_control_variate_is_refused() -> None:
    """The strategy begins with zeros: a coordinator's own would steer every lab's gradient."""
    refused(order(control=np.ones_like(START_P)), "begins with other control", scaffold)


# ---- how much a lab counts for


def decision(lab: str, weight: int) -> Decision:
    return Decision(lab, "approved", "run-1", PLAN, PLAN, weight, datetime.now(UTC))


def plan(**privacy: Any) -> Plan:
    return from_dict({"secure_aggregation": {"enabled": True}, "privacy": privacy})


PLAIN = plan()
PRIVATE = plan(unit="patient", epsilon=8, delta=1e-5, declared_patients=40)


@guarded_by("absurd-weight")
def test_lab_that_would_decide_the_model_alone_is_named() -> None:
    given = {lab: decision(lab, 128) for lab in (A, B)} | {C: decision(C, 2**60)}
    with pytest.raises(
        VerificationError, match="lab-03 approved with a weight of 1152921504606846"
    ):
        weight_bounds(given, PLAIN)
    with pytest.raises(VerificationError, match="lab-03 approved with a weight of 0"):
        weight_bounds({**given, C: decision(C, 0)}, PLAIN)


@guarded_by("declared-weight")
def test_lab_that_weighs_other_patients_than_the_plan_declares_is_named() -> None:
    given = {lab: decision(lab, 40) for lab in (A, B)} | {C: decision(C, 41)}
    with pytest.raises(VerificationError, match="lab-03 approved with a weight of 41, the plan"):
        weight_bounds(given, PRIVATE)
    assert weight_bounds({**given, C: decision(C, 40)}, PRIVATE) == dict.fromkeys((A, B, C), 40.0)


def test_no_lab_counts_for_more_than_all_others_together() -> None:
    given = {A: decision(A, 64), B: decision(B, 32), C: decision(C, 4096)}
    assert weight_bounds(given, PLAIN) == {A: 64.0, B: 32.0, C: 96.0}


@dataclass
class Kept:
    """A lab's state in memory."""

    states: dict[str, bytes] = field(default_factory=dict)

    def load(self, run: str) -> bytes | None:
        return self.states.get(run)

    def save(self, run: str, state: bytes) -> None:
        self.states[run] = state


def secure_lab() -> SecureLab:
    """Lab A, ready to mask a vector, among labs that may weigh 100 each."""
    stage = ready(4)
    kept = Kept({"run-1": stage.states[A].to_bytes()})
    return SecureLab(identity(A), stage.cohort, dict.fromkeys(names(4), 100.0), kept)


def masks(lab: SecureLab, **changes: Any) -> Any:
    asked = replace(order(), **{"labs": 4, "max_weight": 128.0, **changes})
    return lab.mask(asked, PLAIN, fedavg(), {"weights": START_P / np.float32(10)}, 50.0)


@guarded_by("weight-bound")
def test_bound_that_does_not_follow_from_the_labs_decisions_is_refused() -> None:
    """Beside a bound of 2^60 this lab's update would be nothing, and another's be the sum."""
    lab = secure_lab()
    with pytest.raises(
        RefusedError, match=r"bound of 1.15292e\+18, the labs' signed decisions give"
    ):
        masks(lab, max_weight=2.0**60)
    assert len(masks(lab).words_W) == 6 + 3  # it is as it was, and answers what is right


@guarded_by("cohort-size")
def test_order_for_a_cohort_of_another_size_is_refused() -> None:
    with pytest.raises(RefusedError, match="order for a cohort of 3 labs, 4 were approved"):
        masks(secure_lab(), labs=3)


@guarded_by("kept-cohort")
def test_state_of_another_cohort_is_not_gone_on_with() -> None:
    """Keys of an old cohort, or of a run of the same name, would stay in use."""
    lab = secure_lab()
    other = replace(ready(4).states[A], cohort=replace(lab.cohort, plan_sha256="ab" * 32))
    lab.states.save("run-1", other.to_bytes())
    with pytest.raises(VerificationError, match="of another cohort than this run's"):
        masks(lab)


@guarded_by("run-approved")
def test_order_of_another_run_is_not_masked() -> None:
    with pytest.raises(RefusedError, match="run 'run-2' is not the approved one, 'run-1'"):
        masks(secure_lab(), run="run-2")
