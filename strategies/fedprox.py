"""FedProx: a proximal term at each lab.

Li et al., MLSys 2020, arXiv:1812.06127. The local objective gains mu/2 * |w - w_global|^2, whose
gradient is mu * (w - w_global).
"""

from __future__ import annotations

from cytofed.arrays import Parts
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.strategy import Correction, LabHalf, Strategy


def fedprox(mu: float = 0.01, server_lr: float = 1.0) -> Strategy:
    """FedAvg whose local training is held near the global model with strength ``mu``."""

    def prepare(_order: Parts, _memory: Parts) -> Correction:
        return Correction(pull=mu)

    average = fedavg(server_lr)
    return Strategy("fedprox", average.init, average.step, LabHalf(prepare=prepare))
