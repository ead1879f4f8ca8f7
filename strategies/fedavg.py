"""FedAvg: the weighted mean of local updates.

McMahan et al., AISTATS 2017, arXiv:1602.05629.
"""

from __future__ import annotations

from cytofed.strategies.strategy import Mean, State, Strategy, add_mean, weights_only


def fedavg(server_lr: float = 1.0) -> Strategy:
    """The global model moves by ``server_lr`` times the mean update."""

    def step(state: State, mean: Mean) -> State:
        return {"weights": add_mean(state, mean, server_lr)}

    return Strategy("fedavg", weights_only, step)
