"""What a strategy is: a value with a coordinator half and a lab half.

P parameters, K labs. Both halves are plain functions of named float32 vectors ("parts"), so that
an algorithm reads as in its paper and is tested without a network, a net or torch.

Coordinator: ``init`` makes the state, ``step`` moves it by the labs' mean update.
Lab: ``prepare`` turns an order into a correction of the local gradient, ``finish`` says which
parts leave besides the update and what the lab remembers. The correction is added after clipping
and noise, so a lab half never sees more than privatised gradients (design: privacy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cytofed.arrays import Float32, Parts, Role

State = Mapping[str, Float32]
"""The coordinator's memory between rounds; ``weights`` is the global model."""


@dataclass(frozen=True)
class Correction:
    """Added to every local gradient: ``pull * (w - w_start) + offset_P``.

    ``momentum_P``: what the optimizer's momentum starts from; left out, it starts from rest.
    """

    pull: float = 0.0
    offset_P: Float32 | None = None
    momentum_P: Float32 | None = None


@dataclass(frozen=True)
class LocalRound:
    """What a lab knows after its local training of one round.

    ``reach``: how far a weight would have gone whose gradient was 1 all along; with plain SGD the
    sum of the learning rates. ``momentum_P``: the optimizer's at the end, where the correction gave
    one at the start.
    """

    start_P: Float32
    end_P: Float32
    reach: float
    momentum_P: Float32 | None = None


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the updates received, part by part."""

    parts: Parts
    received: int
    cohort: int


def _no_correction(_order: Parts, _memory: Parts) -> Correction | None:
    return None


def _update_only(_order: Parts, _memory: Parts, local: LocalRound) -> tuple[Parts, Parts]:
    return {"weights": local.end_P - local.start_P}, {}


@dataclass(frozen=True)
class LabHalf:
    """The part of a strategy that runs at a lab.

    ``up``: names of the parts that leave. ``local_roles``: tensors of these roles continue from
    the lab's own values instead of the global ones.
    """

    up: tuple[str, ...] = ("weights",)
    local_roles: frozenset[Role] = frozenset()
    prepare: Callable[[Parts, Parts], Correction | None] = _no_correction
    finish: Callable[[Parts, Parts, LocalRound], tuple[Parts, Parts]] = _update_only


@dataclass(frozen=True)
class Strategy:
    """An algorithm. ``down`` names the parts of the state that an order carries.

    ``combine`` is set where single updates are needed (median, Krum): it replaces the mean, takes
    the labs' updates in the order of their names, and rules out secure aggregation.
    ``min_updates``: with fewer the strategy does not keep what it promises, so a round with fewer
    does not move the model, and a run of fewer labs is refused.
    """

    name: str
    init: Callable[[Float32], State]
    step: Callable[[State, Mean], State]
    lab: LabHalf = field(default_factory=LabHalf)
    down: tuple[str, ...] = ("weights",)
    combine: Callable[[Sequence[Float32]], Float32] | None = None
    min_updates: int = 1

    @property
    def needs_single_updates(self) -> bool:
        return self.combine is not None


def weights_only(weights_P: Float32) -> State:
    """The state of a strategy that remembers nothing but the model."""
    return {"weights": weights_P}


def add_mean(state: State, mean: Mean, server_lr: float = 1.0) -> Float32:
    """The weights moved by the mean update times ``server_lr``."""
    update_P = mean.parts["weights"]
    if server_lr != 1.0:
        update_P = np.float32(server_lr) * update_P
    return np.asarray(state["weights"] + update_P)
