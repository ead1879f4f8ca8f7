"""Local normalisation layers: each lab keeps its own, the rest is averaged.

The idea of FedBN (Li et al., ICLR 2021, arXiv:2102.07623) for GroupNorm. A lab's layers still
leave as part of the one update vector, so the released model has their mean; but the lab goes on
from its own values, and is evaluated with them.
"""

from __future__ import annotations

from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.strategy import LabHalf, Strategy


def local_norms(server_lr: float = 1.0) -> Strategy:
    """FedAvg in which scale and shift of normalisation stay each lab's own."""
    average = fedavg(server_lr)
    lab = LabHalf(local_roles=frozenset({"norm"}))
    return Strategy("local_norms", average.init, average.step, lab)
