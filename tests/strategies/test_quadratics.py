"""FedAvg, FedProx and SCAFFOLD on quadratic losses, where the right answer is known.

P = 2 parameters, K labs. Lab k's loss is (w - b_k)' A_k (w - b_k) / 2, its gradient A_k (w - b_k);
the sum of all has its minimum at (sum A_k)^-1 sum A_k b_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from cytofed.arrays import Float32, Parts
from cytofed.client.training import Reach
from cytofed.plan import Train
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.fednag import fednag
from cytofed.strategies.fedopt import fedadam, fedavgm, fedyogi
from cytofed.strategies.fedprox import fedprox
from cytofed.strategies.local_norms import local_norms
from cytofed.strategies.scaffold import scaffold
from cytofed.strategies.strategy import LocalRound, Mean, Strategy


@dataclass(frozen=True)
class Quadratic:
    """One lab."""

    a_PP: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    b_P: np.ndarray[tuple[int], np.dtype[np.float64]]
    weight: float = 1.0

    def gradient(self, w_P: Float32) -> Float32:
        return (self.a_PP @ (w_P - self.b_P)).astype(np.float32)


LABS = (
    Quadratic(np.diag([1.0, 0.1]), np.array([1.0, -3.0])),
    Quadratic(np.diag([0.2, 2.0]), np.array([-5.0, 2.0])),
    Quadratic(np.array([[0.8, 0.3], [0.3, 0.5]]), np.array([4.0, 0.5])),
)
START = np.array([3.0, 3.0], np.float32)


def optimum(labs: Sequence[Quadratic]) -> Float32:
    total = sum(lab.weight * lab.a_PP for lab in labs)
    pulls = sum(lab.weight * lab.a_PP @ lab.b_P for lab in labs)
    return np.linalg.solve(total, pulls).astype(np.float32)


def train(
    strategy: Strategy,
    lab: Quadratic,
    order: Parts,
    memory: Parts,
    steps: int,
    lr: float,
    momentum: float = 0.0,
    reach: float | None = None,
) -> tuple[Parts, Parts]:
    """Gradient descent at one lab with the strategy's correction."""
    correction = strategy.lab.prepare(order, memory)
    w_P = order["weights"].copy()
    given_P = None if correction is None else correction.momentum_P
    velocity_P = np.zeros_like(w_P) if given_P is None else given_P
    for _ in range(steps):
        gradient_P = lab.gradient(w_P)
        if correction is not None:
            gradient_P = gradient_P + correction.pull * (w_P - order["weights"])
            if correction.offset_P is not None:
                gradient_P = gradient_P + correction.offset_P
        velocity_P = (momentum * velocity_P + gradient_P).astype(np.float32)
        w_P = (w_P - lr * (gradient_P + momentum * velocity_P)).astype(np.float32)
    if reach is None:
        settings = Train(optimizer="sgd", momentum=momentum)
        carried = Reach(settings)
        for _ in range(steps):
            carried.step(lr)
        reach = carried.total
    ended_P = None if given_P is None else velocity_P
    return strategy.lab.finish(order, memory, LocalRound(order["weights"], w_P, reach, ended_P))


def federate(
    strategy: Strategy,
    labs: Sequence[Quadratic] = LABS,
    *,
    rounds: int,
    steps: int = 20,
    lr: float = 0.1,
    momentum: float = 0.0,
    reach: float | None = None,
    absent: int | None = None,
) -> Float32:
    """The weights after some rounds; lab number ``round % absent`` stays away in each."""
    state = strategy.init(START)
    memories: list[Parts] = [{} for _ in labs]
    for round_ in range(rounds):
        order = {name: state[name] for name in strategy.down}
        found: list[tuple[float, Parts]] = []
        for number, lab in enumerate(labs):
            if absent is not None and number == round_ % absent:
                continue
            parts, memories[number] = train(
                strategy, lab, order, memories[number], steps, lr, momentum, reach
            )
            assert tuple(parts) == strategy.lab.up
            found.append((lab.weight, parts))
        weights = [weight for weight, _ in found]
        mean = {
            name: np.average([p[name] for _, p in found], axis=0, weights=weights).astype("f4")
            for name in strategy.lab.up
        }
        state = strategy.step(state, Mean(mean, received=len(found), cohort=len(labs)))
    return state["weights"]


def distance(w_P: Float32, labs: Sequence[Quadratic] = LABS) -> float:
    return float(np.linalg.norm(w_P - optimum(labs)))


def test_fedavg_moves_by_the_mean_update() -> None:
    mean = Mean({"weights": np.array([1.0, -2.0], np.float32)}, received=2, cohort=2)
    assert fedavg().step({"weights": START}, mean)["weights"].tolist() == [4.0, 1.0]
    assert fedavg(0.5).step({"weights": START}, mean)["weights"].tolist() == [3.5, 2.0]


def test_fedavg_with_one_local_step_is_gradient_descent_on_the_sum() -> None:
    assert distance(federate(fedavg(), rounds=400, steps=1)) < 1e-3


def test_fednag_with_one_local_step_is_nesterovs_method_on_the_sum_and_fedavg_is_not() -> None:
    one_place = [Quadratic(np.mean([k.a_PP for k in LABS], axis=0), optimum(LABS).astype(float))]
    for rounds in (1, 2, 7, 30):
        apart = federate(fednag(), rounds=rounds, steps=1, lr=0.05, momentum=0.9)
        together = federate(fednag(), one_place, rounds=rounds, steps=1, lr=0.05, momentum=0.9)
        np.testing.assert_allclose(apart, together, atol=1e-4)
    # One lab that shares with nobody is an optimizer that never stops.
    whole = federate(fedavg(), one_place, rounds=1, steps=30, lr=0.05, momentum=0.9)
    np.testing.assert_allclose(whole, together, atol=1e-4)
    restarted = federate(fedavg(), one_place, rounds=30, steps=1, lr=0.05, momentum=0.9)
    assert np.abs(restarted - whole).max() > 0.05


def test_fedavg_weighs_labs_by_their_images() -> None:
    heavy = [Quadratic(lab.a_PP, lab.b_P, w) for lab, w in zip(LABS, (1, 5, 2), strict=True)]
    found = federate(fedavg(), heavy, rounds=400, steps=1)
    assert distance(found, heavy) < 1e-3
    assert distance(found, LABS) > 0.1


def test_scaffold_reaches_the_optimum_where_fedavg_with_many_local_steps_does_not() -> None:
    drifted = distance(federate(fedavg(), rounds=200))
    assert drifted > 0.3, "heterogeneous labs pull FedAvg away"
    assert distance(federate(scaffold(), rounds=200)) < 0.01 * drifted


def test_scaffold_reaches_the_optimum_though_a_lab_is_absent_in_every_round() -> None:
    # Rounds of two of three labs are noisy draws of the sum: near, not there.
    drifted = distance(federate(fedavg(), rounds=300, absent=3))
    assert distance(federate(scaffold(0.5), rounds=300, absent=3)) < 0.3 * drifted


def test_scaffold_reaches_the_optimum_with_momentum_since_it_knows_how_far_that_reaches() -> None:
    drifted = distance(federate(fedavg(), rounds=200, lr=0.02, momentum=0.9))
    found = federate(scaffold(), rounds=200, lr=0.02, momentum=0.9)
    assert distance(found) < 0.01 * drifted
    with np.errstate(over="ignore", invalid="ignore"):
        lost = federate(scaffold(), rounds=200, lr=0.02, momentum=0.9, reach=20 * 0.02)
    assert not distance(lost) < drifted, "the sum of the rates understates it"


def test_scaffold_controls_become_the_labs_gradients_at_the_optimum() -> None:
    strategy = scaffold()
    state, memories = strategy.init(START), [dict[str, Float32]() for _ in LABS]
    for _ in range(300):
        found = []
        for number, lab in enumerate(LABS):
            parts, memory = train(strategy, lab, state, memories[number], 20, 0.1)
            memories[number] = dict(memory)
            found.append(parts)
        mean = {n: np.mean([p[n] for p in found], axis=0, dtype="f4") for n in strategy.lab.up}
        state = strategy.step(state, Mean(mean, received=3, cohort=3))
    for lab, memory in zip(LABS, memories, strict=True):
        np.testing.assert_allclose(memory["control"], lab.gradient(state["weights"]), atol=1e-3)
    np.testing.assert_allclose(state["control"], 0, atol=1e-3)
    np.testing.assert_allclose(
        state["control"], np.mean([m["control"] for m in memories], axis=0), atol=1e-4
    )


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
def test_fedprox_trains_each_lab_to_the_minimum_of_loss_plus_proximal_term(mu: float) -> None:
    for lab in LABS:
        parts, memory = train(fedprox(mu=mu), lab, {"weights": START}, {}, steps=800, lr=0.1)
        inner_PP = lab.a_PP + mu * np.eye(2)
        expected = np.linalg.solve(inner_PP, lab.a_PP @ lab.b_P + mu * START)
        np.testing.assert_allclose(START + parts["weights"], expected, atol=1e-3)
        assert not memory


def test_fedprox_drifts_less_the_stronger_it_pulls_and_is_fedavg_at_zero() -> None:
    drifts = [distance(federate(fedprox(mu=mu), rounds=300)) for mu in (0.0, 0.5, 5.0)]
    assert drifts[0] > drifts[1] > drifts[2]
    assert drifts[0] == distance(federate(fedavg(), rounds=300))


@pytest.mark.parametrize("strategy", [fedavgm(), fedadam(0.05), fedyogi(0.05)])
def test_coordinator_optimizers_reach_the_optimum_with_one_local_step(strategy: Strategy) -> None:
    assert distance(federate(strategy, rounds=1500, steps=1)) < 0.05


@pytest.mark.parametrize(
    "strategy",
    [fedavg(), fedprox(), fedavgm(), fednag(), fedadam(), fedyogi(), scaffold(), local_norms()],
    ids=lambda strategy: strategy.name,
)
def test_state_is_float32_and_a_step_leaves_the_old_state_alone(strategy: Strategy) -> None:
    state = strategy.init(START)
    before = {name: values.copy() for name, values in state.items()}
    mean = Mean({n: np.ones(2, np.float32) for n in strategy.lab.up}, received=1, cohort=2)
    after = strategy.step(state, mean)
    assert after.keys() == state.keys()
    for name, values in state.items():
        assert (values == before[name]).all()
        assert after[name].dtype == np.float32
        assert after[name].shape == (2,)
