"""SCAFFOLD: control variates against client drift.

Karimireddy et al., ICML 2020, arXiv:1910.06378, Algorithm 1 with option II: a lab's new control
variate is c_i - c + (x - y) / (K * lr). For K * lr stands the reach of the local optimizer, which
momentum .9 makes up to ten times the sum of the rates: without it the variates would overshoot as
much. They follow from the (clipped, noised) local path alone, so under differential privacy they
cost nothing beyond training itself.
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


def scaffold(server_lr: float = 1.0) -> Strategy:
    """Local gradients are corrected by c - c_i; c moves by the cohort's share of the mean."""

    def init(weights_P: Float32) -> State:
        return {"weights": weights_P, "control": np.zeros_like(weights_P)}

    def step(state: State, mean: Mean) -> State:
        share = np.float32(mean.received / mean.cohort)
        return {
            "weights": add_mean(state, mean, server_lr),
            "control": state["control"] + share * mean.parts["control"],
        }

    return Strategy(
        "scaffold",
        init,
        step,
        LabHalf(up=("weights", "control"), prepare=_prepare, finish=_finish),
        down=("weights", "control"),
    )


def _own(order: Parts, memory: Parts) -> Float32:
    return memory.get("control", np.zeros_like(order["control"]))


def _prepare(order: Parts, memory: Parts) -> Correction:
    return Correction(offset_P=order["control"] - _own(order, memory))


def _finish(order: Parts, memory: Parts, local: LocalRound) -> tuple[Parts, Parts]:
    own = _own(order, memory)
    gradient = (local.start_P - local.end_P) / np.float32(local.reach)
    new = own - order["control"] + gradient
    return {"weights": local.end_P - local.start_P, "control": new - own}, {"control": new}
