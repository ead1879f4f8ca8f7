"""FedNAG: labs that share their momentum as they share their weights.

Yang et al., IEEE TPDS 2022, arXiv:2009.08716; for SGD in general Yu, Jin & Yang, ICML 2019,
arXiv:1905.03817. A lab's optimizer goes on from the mean of all labs' momenta, not from rest. With
a few steps a round the labs together then walk as one optimizer over all images would: momentum
that starts anew each round never builds up, and momentum kept at the coordinator alone
(``fedavgm``) counts rounds in place of steps. Few steps also leave labs of other classes no room
to drift, so no control variates are needed. The momentum follows from the (clipped, noised)
gradients alone, so under differential privacy it costs nothing beyond training itself.
"""

from __future__ import annotations

import numpy as np

from cytofed.arrays import Float32, Parts
from cytofed.strategies.strategy import (
    Correction,
    LabHalf,
    LocalRound,
    Mean,
    State,
    Strategy,
    add_mean,
)


def fednag(server_lr: float = 1.0) -> Strategy:
    """FedAvg of the weights and of SGD's momentum. For ``train.optimizer: sgd`` with momentum."""

    def init(weights_P: Float32) -> State:
        return {"weights": weights_P, "momentum": np.zeros_like(weights_P)}

    def step(state: State, mean: Mean) -> State:
        return {"weights": add_mean(state, mean, server_lr), "momentum": mean.parts["momentum"]}

    parts = ("weights", "momentum")
    return Strategy("fednag", init, step, LabHalf(parts, prepare=_prepare, finish=_finish), parts)


def _prepare(order: Parts, _memory: Parts) -> Correction:
    return Correction(momentum_P=order["momentum"])


def _finish(_order: Parts, _memory: Parts, local: LocalRound) -> tuple[Parts, Parts]:
    assert local.momentum_P is not None, "asked for by the correction"
    return {"weights": local.end_P - local.start_P, "momentum": local.momentum_P}, {}
