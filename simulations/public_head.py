"""A start for private heads: an encoder and a last layer that knows public images already.

``python -m cytofed.simulations.public_head --encoder NAME --data DIR --out FILE.safetensors``

With few patients the noise lets a head learn what some ten cells of a class would teach it, so
what public images teach comes first. Two things are made of the images that the encoder was
trained on, and of no others:

- The features are scaled. Whitening makes all directions alike, those too in which public images
  hardly differ, and private heads pay for each with noise. A ridge as large as the mean variance
  leaves the strong directions as they are and makes the weak ones small. The root mean square
  norm becomes ``_NORM``, so that a ``max_norm`` of 1 clips a patient's gradient.
- The head is multinomial regression with an L2 penalty, each class of the same total weight, and
  without bias: how frequent a class is here says nothing of how frequent it is at a lab, and one
  without an image here must not start as impossible.

Shapes: N images, F features, C classes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cytofed import models
from cytofed.arrays import Float32
from cytofed.client import training
from cytofed.client.cache import default_cache_dir
from cytofed.client.cells import Cells, open_cells
from cytofed.client.features import frozen_features
from cytofed.encoder import EncoderCard, card_of, sha256_of, start_file
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.model_file import read_model
from cytofed.plan import Model, Train

_NORM = 12.0
_RIDGE = 1.0
"""added to the variance of each direction, as a share of their mean"""
_PENALTY = 0.3
_STEPS = 100


def make(encoder: str, data: tuple[Path, ...], out: Path) -> EncoderCard:
    """Write the encoder with scaled features and its public head to ``out``, and the card.

    Errors: InputError for an encoder without card, one that whitens nothing, or other images.
    """
    base = card_of(start_file(encoder))
    weights, info = read_model(start_file(encoder))
    if base is None or "encoder.project.weight" not in weights:
        raise InputError(f"{encoder} is no encoder of `cytofed pretrain` with its card")
    scheme = load_scheme(info.scheme)
    cells = open_cells(
        data,
        scheme,
        size_px=info.size_px,
        field_um=info.field_um,
        cache_dir=default_cache_dir(),
    )
    if sorted(cells.file_sha256()) != list(base.images_sha256):
        raise InputError(f"these are not the images of the card of {encoder}")
    net = models.build(Model(arch="encoder+head", start=encoder), len(scheme.codes), seed=0)
    features_NF = frozen_features(net, cells, torch.device("cpu"), Train())
    scale_F = _scale(weights["encoder.project.weight"], base.recipe["ridge"], features_NF)
    with training.steady(1):
        weight_CF = _fit(torch.from_numpy(features_NF * scale_F), cells)
    weights["encoder.project.weight"] *= scale_F[:, None]
    weights["encoder.project.bias"] *= scale_F
    weights["head.weight"] = weight_CF.numpy()
    weights["head.bias"] = np.zeros(len(weight_CF), np.float32)
    models.save_model(out, weights, replace(info, codes=scheme.codes))
    card = replace(
        base,
        name=out.stem,
        statement=f"{base.statement} The encoder is {encoder} with scaled features; the head was "
        "fitted to the same images.",
        model_sha256=sha256_of(out),
        recipe={
            **base.recipe,
            "head": {"encoder_sha256": base.model_sha256, "norm": _NORM, "ridge": _RIDGE,
                     "penalty": _PENALTY, "steps": _STEPS},
        },
        measured=[],
    )  # fmt: skip
    card.write(out.with_suffix(".json"))
    return card


def _scale(project_FS: Float32, ridge: float, features_NF: Float32) -> Float32:
    """Factors of the features that turn the ridge of their whitening into ``_RIDGE``.

    A row of the whitening is a unit vector over the root of its variance with the ridge.
    """
    ridged_F = 1 / np.square(np.linalg.norm(project_FS.astype(np.float64), axis=1))
    mean = ridged_F.mean() / (1 + ridge)
    scale_F = np.sqrt(ridged_F / (ridged_F + (_RIDGE - ridge) * mean))
    scale_F *= _NORM / math.sqrt(np.square(features_NF * scale_F).sum(axis=1).mean())
    return np.asarray(scale_F, np.float32)


def _fit(features_NF: Tensor, cells: Cells) -> Tensor:
    """Weights (C, F) of the head; images whose class is one of a set take no part."""
    exact_N = torch.from_numpy(cells.class_N >= 0)
    class_N = torch.from_numpy(cells.class_N)[exact_N].long()
    features_NF = features_NF[exact_N]
    classes, features = cells.targets_NC.shape[1], features_NF.shape[1]
    share_C = 1 / torch.bincount(class_N, minlength=classes).float()
    share_N = share_C[class_N] / share_C[class_N].sum()
    weight_CF = torch.zeros(classes, features, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CF], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses_N = nn.functional.cross_entropy(features_NF @ weight_CF.T, class_N, reduction="none")
        penalty = 0.5 * _PENALTY * (_NORM * weight_CF).square().sum() / features
        total: Tensor = (share_N * losses_N).sum() + penalty
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight_CF.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="blood")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(make(options.encoder, tuple(options.data), options.out).statement)


if __name__ == "__main__":
    main()
