"""FedAvgM, FedAdam and FedYogi step as Flower's own implementations do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from cytofed.arrays import Float32
from cytofed.messages import new_message
from cytofed.strategies.fedopt import fedadam, fedavgm, fedyogi
from cytofed.strategies.strategy import Mean, Strategy

SIZE, ROUNDS = 50, 8


def reply(node: int, weights_P: Float32, images: int) -> Message:
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights_P)}),
            "metrics": MetricRecord({"num-examples": images}),
        }
    )
    return new_message(content, kind="train", node=node, group="", ttl_s=1.0)


def agree(theirs: Any, ours: Callable[[int], Strategy], *, as_record: bool) -> None:
    """Both get the same random updates of three labs for some rounds.

    ``ours`` makes the strategy of a round, ``as_record`` says how theirs keeps its weights.
    """
    rng = np.random.default_rng(7)
    weights_P = rng.normal(size=SIZE).astype(np.float32)
    state = ours(1).init(weights_P)
    for round_ in range(1, ROUNDS + 1):
        scale = 10.0 ** rng.uniform(-4, 0)
        updates_KP = (scale * rng.normal(size=(3, SIZE))).astype(np.float32)
        images_K = rng.integers(1, 100, 3)

        theirs.current_arrays = (
            ArrayRecord({"w": Array(weights_P)}) if as_record else {"w": weights_P}
        )
        replies = [reply(k + 1, weights_P + updates_KP[k], int(images_K[k])) for k in range(3)]
        arrays, _ = theirs.aggregate_train(round_, replies)
        weights_P = np.asarray(arrays["w"].numpy(), np.float32)

        mean_P = np.average(updates_KP, axis=0, weights=images_K).astype(np.float32)
        state = ours(round_).step(state, Mean({"weights": mean_P}, received=3, cohort=3))
        np.testing.assert_allclose(state["weights"], weights_P, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.9), (0.3, 0.5), (0.5, 0.0)])
def test_fedavgm_steps_as_flower_s(lr: float, momentum: float) -> None:
    theirs = flower.FedAvgM(server_learning_rate=lr, server_momentum=momentum)
    agree(theirs, lambda _: fedavgm(lr, momentum), as_record=True)


def test_fedyogi_steps_as_flower_s() -> None:
    theirs = flower.FedYogi(eta=0.02, beta_1=0.8, beta_2=0.95, tau=1e-2)
    agree(theirs, lambda _: fedyogi(0.02, 0.8, 0.95, 1e-2), as_record=False)


def test_fedadam_steps_as_flower_s_but_for_its_bias_correction() -> None:
    # Flower scales the rate as Adam does; the paper that both name has no such correction.
    def corrected(round_: int) -> Strategy:
        scale = np.sqrt(1 - 0.95 ** (round_ + 1)) / (1 - 0.8 ** (round_ + 1))
        return fedadam(0.02 * scale, 0.8, 0.95, 1e-2)

    theirs = flower.FedAdam(eta=0.02, beta_1=0.8, beta_2=0.95, tau=1e-2)
    agree(theirs, corrected, as_record=False)


@pytest.mark.parametrize("make", [fedadam, fedyogi])
def test_no_update_moves_nothing(make: Callable[[], Strategy]) -> None:
    strategy = make()
    state = strategy.init(np.ones(3, np.float32))
    for _ in range(3):
        state = strategy.step(state, Mean({"weights": np.zeros(3, np.float32)}, 1, 1))
    assert state["weights"].tolist() == [1.0, 1.0, 1.0]
