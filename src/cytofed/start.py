"""The start model of a plan, made by a process that may import torch.

The coordinator never does; it runs ``python -m cytofed.start PLAN FOLDER`` and reads the two files
that this writes: ``start.safetensors`` (all tensors) and ``manifest.json`` (what is trained).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cytofed.arrays import Float32, Manifest
from cytofed.files import write_atomically
from cytofed.labels import load_scheme
from cytofed.model_file import ModelInfo, read_model, write_model
from cytofed.plan import Plan, load_plan
from cytofed.seeds import derive

START_FILE = "start.safetensors"
_MANIFEST_FILE = "manifest.json"
_CLOSED = -100.0
"""Bias of a class that must not be predicted: a softmax gives it no probability in float32."""


@dataclass(frozen=True)
class Start:
    """The start model: all tensors by name, and which of them are trained, in what order."""

    manifest: Manifest
    tensors: dict[str, Float32] = field(repr=False)
    info: ModelInfo

    @property
    def weights_P(self) -> Float32:
        """The P trained weights, as one vector of their own."""
        parts = [self.tensors[name].reshape(-1) for name in self.manifest.names]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    @property
    def bare(self) -> Start:
        """The same without its tensors: what is needed as long as a run lasts."""
        return replace(self, tensors={})

    def with_weights(self, weights_P: Float32) -> dict[str, Float32]:
        """All tensors, the trained ones taken from ``weights_P``."""
        return {**self.tensors, **self.manifest.split(weights_P)}

    def released(self, weights_P: Float32, temperature: float | None = None) -> Float32:
        """``weights_P`` as a model that is used: classes that no lab had are never predicted.

        ``temperature``: the logits are divided by it, through the head's weights.

        A class without an image at any lab is masked everywhere, so its row of a fresh head is
        still all zeros. Left open it would take probability from the others, which masked losses
        do not push up against it. Training goes on from ``weights_P`` itself.
        """
        weights_P = weights_P.copy()
        tensors = self.manifest.split(weights_P)
        if not {"head.weight", "head.bias"} <= tensors.keys():
            return weights_P
        rows_CF, bias_C = tensors["head.weight"], tensors["head.bias"]
        untrained_C = (bias_C == 0) & (rows_CF == 0).all(axis=1)
        if temperature is not None:
            rows_CF /= np.float32(temperature)
            bias_C /= np.float32(temperature)
        if not untrained_C.all():
            bias_C[untrained_C] = _CLOSED
        return weights_P


def write_start(plan: Plan, folder: Path) -> None:
    """Build the plan's net and write its start model to ``folder``. Imports torch."""
    from cytofed import models

    scheme = load_scheme(plan.labels.scheme)
    net = models.build(plan.model, len(scheme.codes), seed=derive(plan.train.seed, "start"))
    arch, encoder, width = models.describe(plan.model)
    info = ModelInfo(
        arch=arch,
        width=width,
        scheme=plan.labels.scheme,
        codes=scheme.codes,
        size_px=plan.labels.scale.size_px,
        field_um=plan.labels.scale.field_um,
        plan_sha256=plan.sha256,
        encoder=encoder,
    )
    manifest = models.manifest(net, plan.model.trainable)
    write_model(folder / START_FILE, models.tensors_of(net), info)
    write_atomically(folder / _MANIFEST_FILE, manifest.to_json())  # last: says that both are there


def read_start(folder: Path, *, trained: bool = True) -> Start | None:
    """What ``write_start`` wrote, or None where it has not (yet).

    ``trained`` off: without the tensors that are trained, where their start is of no use any more.
    """
    manifest_file = folder / _MANIFEST_FILE
    if not manifest_file.is_file():
        return None
    manifest = Manifest.from_json(manifest_file.read_text())
    skip = () if trained else manifest.names
    tensors, info = read_model(folder / START_FILE, skip=skip)
    return Start(manifest, tensors, info)


def main() -> None:
    plan_file, folder = sys.argv[1:]
    write_start(load_plan(plan_file), Path(folder))


if __name__ == "__main__":
    main()
