"""What the encoder that ships knows of marrow, which it has never seen: a linear probe.

    python benchmarks/encoder.py [--quick] [--json]

Logistic regression on frozen features of real marrow images, tested on images that it was not
fitted to: five folds, with near-duplicates on one side. Its ridge is chosen on a fifth of the
training part. Ours: ``blood``, by the means over eight turned and mirrored forms of an image (what
``encoder+head`` trains on), and by the image as it is. Peer: the same net with random weights, by
the same forms.

``--quick`` is one fold. Features take two minutes of one core the first time, then they are in the
cache; the fits take two more.

N images, F features, C classes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytofed import models
from cytofed.client import training
from cytofed.client.cache import default_cache_dir
from cytofed.client.cells import Cells, open_cells
from cytofed.client.check import near_duplicate_groups
from cytofed.client.features import frozen_features
from cytofed.client.split import hold_out
from cytofed.encoder import seen
from cytofed.labels import load_scheme
from cytofed.metrics import summarise, tally
from cytofed.plan import Model, Train, load_plan

SCHEME = load_plan("marrow").labels.scheme
REPO = Path(__file__).resolve().parent.parent
FOLDS = 5
RIDGES = (1e-2, 3e-3, 1e-3, 3e-4)
"""penalties of the squared weights, beside the mean loss of an image"""
STEPS = 200
PROBE = 0.72
"""macro F1 from which an encoder is worth freezing"""
ENCODERS = {
    "blood, 8 forms": (Model(arch="encoder+head", start="blood"), 8),
    "blood, as it is": (Model(arch="encoder+head", start="blood"), 1),
    "random weights, 8 forms": (Model(arch="stagenet", width=32), 8),
    "random weights, as it is": (Model(arch="stagenet", width=32), 1),
}


def open_marrow() -> Cells:
    data = Path(os.environ.get("CYTOFED_TEST_DATA", REPO.parent / "shared" / "data"))
    root = data / "bone_marrow_128"
    if not root.is_dir():
        raise SystemExit(f"real data not found in {data}: set CYTOFED_TEST_DATA")
    labels = load_plan("marrow").labels
    return open_cells(
        (root,),
        load_scheme(labels.scheme),
        size_px=labels.scale.size_px,
        field_um=labels.scale.field_um,
        cache_dir=default_cache_dir(),
    )


def features_of(cells: Cells, model: Model, views: int) -> Tensor:
    """Frozen features (N, F), float64."""
    net = models.build(model, cells.targets_NC.shape[1], seed=0)
    net.views = views
    return torch.from_numpy(frozen_features(net, cells, torch.device("cpu"), Train())).double()


def held_out(cells: Cells, fold: int) -> np.ndarray[Any, Any]:
    """True where an image is in the fold."""
    return hold_out(
        cells.class_N,
        near_duplicate_groups(cells.dhash_N, images=cells.images),
        cells.paths(),
        cells.dhash_N,
        cells.source_N,
        fraction=1 / FOLDS,
        fold=fold,
        seed=0,
    )


class Probe:
    """Logistic regression on features that are scaled to one deviation each.

    Fitted for the largest penalty first; each next fit goes on from the one before.
    """

    def __init__(self, features_NF: Tensor, class_N: np.ndarray[Any, Any]) -> None:
        self.codes_C, class_N = np.unique(class_N, return_inverse=True)
        self.mean_F = features_NF.mean(0)
        self.scale_F = features_NF.std(0) + 1e-9
        self.class_N = torch.from_numpy(class_N)
        self.given_NF = self._scaled(features_NF)
        shape = len(self.codes_C), self.given_NF.shape[1]
        self.weight_CF = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def _scaled(self, features_NF: Tensor) -> Tensor:
        """With a column of ones for the bias, which pays no penalty."""
        scaled_NF = (features_NF - self.mean_F) / self.scale_F
        return torch.cat([scaled_NF, torch.ones(len(scaled_NF), 1, dtype=scaled_NF.dtype)], 1)

    def fit(self, ridge: float) -> None:
        optimizer = torch.optim.LBFGS(
            [self.weight_CF], max_iter=STEPS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = nn.functional.cross_entropy(self.given_NF @ self.weight_CF.T, self.class_N)
            total: Tensor = found + ridge * self.weight_CF[:, :-1].square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    def test(self, features_NF: Tensor, cells: Cells) -> dict[str, Any]:
        """Scores on other images, as `cytofed evaluate` tells them."""
        logits_NC = self._scaled(features_NF) @ self.weight_CF.detach().T
        probs_NC = np.zeros(cells.targets_NC.shape)
        probs_NC[:, self.codes_C] = logits_NC.softmax(1).numpy()
        return summarise(tally(probs_NC, cells.targets_NC), load_scheme(SCHEME))


def probed(features_NF: Tensor, cells: Cells, test_N: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Scores of held-out images by what the others teach."""
    train_N, test_N = np.flatnonzero(~test_N), np.flatnonzero(test_N)
    kept_N = held_out(cells.take(train_N), 0)
    fitted_N, kept_N = train_N[~kept_N], train_N[kept_N]
    trial = Probe(features_NF[fitted_N], cells.class_N[fitted_N])
    scores = []
    for ridge in RIDGES:
        trial.fit(ridge)
        scores.append(trial.test(features_NF[kept_N], cells.take(kept_N))["macro_f1"])
    final = Probe(features_NF[train_N], cells.class_N[train_N])
    final.fit(RIDGES[int(np.argmax(scores))])
    return final.test(features_NF[test_N], cells.take(test_N))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one fold")
    parser.add_argument("--json", action="store_true", help="accepted: the last line is JSON")
    options = parser.parse_args()
    cells = open_marrow()
    known = seen("blood", cells.file_sha256())
    folds = [held_out(cells, fold) for fold in range(1 if options.quick else FOLDS)]
    found: dict[str, float] = {}
    for name, (model, views) in ENCODERS.items():
        features_NF = features_of(cells, model, views)
        with training.steady(1):
            scores = [probed(features_NF, cells, test_N)["macro_f1"] for test_N in folds]
        found[name] = float(np.mean(scores))
        each = ", ".join(f"{score:.3f}" for score in scores)
        print(f"| {name} | {found[name]:.3f} | {each} |", file=sys.stderr, flush=True)
    ours, peer = found["blood, 8 forms"], found["random weights, 8 forms"]
    line = {
        "name": "encoder",
        "quick": options.quick,
        "ours": {k: v for k, v in found.items() if k.startswith("blood")},
        "peer": {k: v for k, v in found.items() if k.startswith("random")},
        "ratio": ours / peer,
        "goals": [
            {"name": "linear probe on marrow, macro F1", "value": ours, "op": ">=", "limit": PROBE,
             "met": ours >= PROBE},
            {"name": "marrow images seen", "value": known, "op": "<=", "limit": 0,
             "met": known == 0},
        ],
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
