"""The start model of a plan, made by a process that may import torch.

The coordinator never does; it runs ``python -m cytofed.start PLAN FOLDER`` and reads the two files
that this writes: ``start.safetensors`` (all tensors) and ``manifest.json`` (what is trained).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cytofed.arrays import Float32, Manifest
from cytofed.encoder import Given, card_of, is_shipped
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.files import write_atomically
from cytofed.labels import load_scheme
from cytofed.lineage import lineage_of_start
from cytofed.model_file import ModelInfo, read_model, write_model
from cytofed.plan import Model, Plan, load_plan
from cytofed.seeds import derive

START_FILE = "start.safetensors"
GIVEN_FILE = "given.safetensors"
"""the file that a plan starts from, where it names one by its content; its card is beside it"""
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


def with_absolute_start(plan: Plan) -> Plan:
    """The plan with a start model's file as another process finds it too."""
    start = plan.model.start
    if start == "random" or is_shipped(start) or Given.named(start):
        return plan
    return replace(plan, model=replace(plan.model, start=str(Path(start).absolute())))


def give_start(plan: Plan, folder: Path) -> Plan:
    """The plan with its start named by content where it is a file, which is copied to ``folder``.

    The file is read once: what becomes of it later changes nothing. Errors: InputError.
    """
    source = Path(plan.model.start)
    if plan.model.start == "random" or is_shipped(plan.model.start):
        return plan
    if Given.named(plan.model.start):
        raise InputError(
            f"model.start is {plan.model.start}, a file by its content, which is not here",
            hint="name the file itself: its content is found again",
        )
    kept = folder / GIVEN_FILE
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(source.with_suffix(".json"), kept.with_suffix(".json"))
    try:
        shutil.copyfile(source, kept)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    card_of(kept)  # is of this very file
    return replace(plan, model=replace(plan.model, start=str(Given.of(kept))))


def take_start(given: Given, folder: Path, data: bytes, card: bytes) -> None:
    """Keep a start model that was given, and its card where it has one.

    Errors: VerificationError for another model than the plan names; nothing is kept then.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != given.sha256:
        raise VerificationError(
            f"the start model that came has SHA-256 {found}, the plan names {given.sha256}"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = folder / GIVEN_FILE
    if card:
        write_atomically(kept.with_suffix(".json"), card, mode=0o600)
    write_atomically(kept, data, mode=0o600)
    try:
        given.check(kept)
        card_of(kept)
    except CytofedError:
        kept.unlink()
        kept.with_suffix(".json").unlink(missing_ok=True)
        raise


def model_of(plan: Plan, folder: Path) -> Model:
    """The plan's model; a start that is named by its content is the file of ``folder``.

    Errors: VerificationError where that is another; RefusedError where there is none yet.
    """
    given = Given.named(plan.model.start)
    if given is None:
        return plan.model
    if not (folder / GIVEN_FILE).is_file():
        raise RefusedError("the start model that the plan names has not come yet")
    given.check(folder / GIVEN_FILE)
    return replace(plan.model, start=str(folder / GIVEN_FILE))


def write_start(plan: Plan, folder: Path) -> None:
    """Build the plan's net and write its start model to ``folder``. Imports torch.

    Errors: as ``model_of``.
    """
    from cytofed import models

    scheme = load_scheme(plan.labels.scheme)
    model = model_of(plan, folder)
    net = models.build(model, len(scheme.codes), seed=derive(plan.train.seed, "start"))
    arch, encoder, width = models.describe(model)
    before = lineage_of_start(model.start)
    info = ModelInfo(
        arch=arch,
        width=width,
        scheme=plan.labels.scheme,
        codes=scheme.codes,
        size_px=plan.labels.scale.size_px,
        field_um=plan.labels.scale.field_um,
        plan_sha256=plan.sha256,
        encoder=encoder,
        views=net.views,
        lineage=before.to_text(),
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
