"""The mean update as a gradient for an optimizer at the coordinator.

FedAvgM: Hsu et al. 2019, arXiv:1909.06335. FedAdam, FedYogi: Reddi et al., ICLR 2021,
arXiv:2003.00295 (no bias correction, as in the paper).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cytofed.arrays import Float32
from cytofed.strategies.strategy import Mean, State, Strategy


def fedavgm(server_lr: float = 1.0, momentum: float = 0.9) -> Strategy:
    """FedAvg with momentum: ``v = momentum * v + mean``; weights move by ``server_lr * v``."""

    def init(weights_P: Float32) -> State:
        return {"weights": weights_P, "momentum": np.zeros_like(weights_P)}

    def step(state: State, mean: Mean) -> State:
        velocity = np.float32(momentum) * state["momentum"] + mean.parts["weights"]
        return {
            "weights": state["weights"] + np.float32(server_lr) * velocity,
            "momentum": velocity,
        }

    return Strategy("fedavgm", init, step)


def fedadam(
    server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Adam at the coordinator; ``tau`` bounds the step where updates are tiny."""

    def second(moment_P: Float32, square_P: Float32) -> Float32:
        return np.float32(beta2) * moment_P + np.float32(1 - beta2) * square_P

    return _adaptive("fedadam", server_lr, beta1, tau, second)


def fedyogi(
    server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Yogi at the coordinator: the second moment moves by a bounded amount."""

    def second(moment_P: Float32, square_P: Float32) -> Float32:
        change_P = square_P * np.sign(moment_P - square_P)
        return np.asarray(moment_P - np.float32(1 - beta2) * change_P)

    return _adaptive("fedyogi", server_lr, beta1, tau, second)


def _adaptive(
    name: str,
    server_lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Float32, Float32], Float32],
) -> Strategy:
    def init(weights_P: Float32) -> State:
        zeros = np.zeros_like(weights_P)
        return {"weights": weights_P, "first": zeros, "second": zeros}

    def step(state: State, mean: Mean) -> State:
        update_P = mean.parts["weights"]
        first = np.float32(beta1) * state["first"] + np.float32(1 - beta1) * update_P
        moment = second(state["second"], np.square(update_P))
        move = np.float32(server_lr) * first / (np.sqrt(moment) + np.float32(tau))
        return {"weights": state["weights"] + move, "first": first, "second": moment}

    return Strategy(name, init, step)
