"""Aggregation that bounds the harm of a hostile lab; needs every single update.

Coordinate-wise median and trimmed mean: Yin et al., ICML 2018, arXiv:1803.01498. Krum: Blanchard
et al., NeurIPS 2017. The aggregation itself is Flower's; shapes and values have been checked
before it is called. Labs count equally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from cytofed.arrays import Float32
from cytofed.errors import InputError
from cytofed.messages import new_message
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.strategy import Strategy


def median(server_lr: float = 1.0) -> Strategy:
    """The global model moves by the coordinate-wise median update."""
    return _robust("median", server_lr, lambda _: FedMedian(), min_updates=3)


def trimmed_mean(trim: float = 0.2, server_lr: float = 1.0) -> Strategy:
    """The mean without the lowest and highest fraction ``trim`` of each coordinate.

    At least one value goes on either side unless ``trim`` is 0: of four labs a fifth is none, and
    one hostile lab would move the mean at will.
    """
    if not 0 <= trim < 0.5:
        raise InputError(f"Expected 0 <= strategy.trim={trim:g} < 0.5")

    def make(labs: int) -> FedAvg:
        most = (labs - 1) // 2
        cut = min(max(math.floor(trim * labs + 1e-9), 1), most) if trim else 0
        return FedTrimmedAvg(beta=(cut + 0.25) / labs if cut else 0.0)  # safe from rounding

    return _robust("trimmed_mean", server_lr, make, min_updates=3 if trim else 1)


def krum(hostile: float = 1, server_lr: float = 1.0) -> Strategy:
    """The one update nearest to its neighbours; tolerates ``hostile`` labs out of 2*hostile+3."""
    if hostile < 0 or int(hostile) != hostile:
        raise InputError(f"Expected strategy.hostile={hostile:g} as a whole number >= 0")
    tolerated = int(hostile)
    return _robust(
        "krum",
        server_lr,
        lambda _: Krum(num_malicious_nodes=tolerated),
        min_updates=2 * tolerated + 3,
    )


def _robust(
    name: str, server_lr: float, make: Callable[[int], FedAvg], *, min_updates: int
) -> Strategy:
    def combine(updates: Sequence[Float32]) -> Float32:
        return _flower(make(len(updates)), updates)

    average = fedavg(server_lr)
    return Strategy(name, average.init, average.step, combine=combine, min_updates=min_updates)


def _flower(strategy: FedAvg, updates: Sequence[Float32]) -> Float32:
    replies = [_reply(node, update_P) for node, update_P in enumerate(updates, start=1)]
    arrays, _ = strategy.aggregate_train(1, replies)
    if arrays is None:
        raise InputError(f"{type(strategy).__name__} gave no result for {len(updates)} updates")
    return np.asarray(arrays["update"].numpy(), dtype=np.float32)


def _reply(node: int, update_P: Float32) -> Message:
    """The update in the form of a message, which is what Flower's strategies take."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"update": Array(update_P)}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return new_message(content, kind="train", node=node, group="", ttl_s=1.0)
