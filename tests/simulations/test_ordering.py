"""Control variates help where labs have other classes: SCAFFOLD before FedAvg at Dirichlet .1.

The order of Karimireddy et al. 2020 and of NVFLARE's CIFAR-10 benchmark, on real marrow cells. The
labs train a head on frozen features of the shipped encoder, so that it takes seconds: their halves
are those of a run, between them is a plain weighted mean.

N images, K labs, P parameters, F features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cytofed import models
from cytofed.arrays import Float32, Parts
from cytofed.client import training
from cytofed.client.cells import Cells, open_cells
from cytofed.client.split import hold_out
from cytofed.labels import load_scheme
from cytofed.metrics import summarise, tally
from cytofed.plan import Labels, Model, Plan, Scale, Train, with_seed
from cytofed.simulations.partitions import assign, parse_partition
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.scaffold import scaffold
from cytofed.strategies.strategy import LocalRound, Mean, Strategy

SCHEME = load_scheme("bone-marrow-21")
PLAN = Plan(
    labels=Labels(scale=Scale(size_px=48)),
    model=Model(arch="encoder+head", start="blood", trainable="head"),
    train=Train(rounds=20, optimizer="sgd", lr=0.01, weight_decay=5e-4, mask_absent="declared"),
)
LABS = 6


def features_of(net: models.Classifier, cells: Cells) -> Float32:
    """The encoder's features, (N, F), of the images as they lie."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(cells), 256):
            index = np.arange(start, min(start + 256, len(cells)))
            images = models.images_of(torch.from_numpy(cells.images(index)))
            found.append(net.encoder(models.normalise(images)).numpy())
    return np.concatenate(found)


def federated_macro_f1(
    strategy: Strategy, net: models.Classifier, cells: Cells, features_NF: Float32, seed: int
) -> float:
    """Of the federation of one seed, on the held-out images of all labs."""
    plan, unit_N = with_seed(PLAN, seed), np.arange(len(cells))
    test_N = hold_out(
        cells.class_N, unit_N, cells.paths(), cells.dhash_N, cells.source_N, fraction=0.2, seed=0
    )
    partition = assign(
        parse_partition("dirichlet:0.1"),
        LABS,
        targets_NC=cells.targets_NC,
        unit_N=unit_N,
        seed=seed,
        train_N=~test_N,
    )
    rows_K = [np.flatnonzero(~test_N & (partition.lab_N == lab)) for lab in range(LABS)]
    manifest, rounds = models.manifest(net, "head"), plan.train.rounds
    state = strategy.init(np.zeros(manifest.size, np.float32))
    memories: list[Parts] = [{} for _ in rows_K]
    for round_ in range(rounds):
        order = {name: state[name] for name in strategy.down}
        updates = []
        for lab, rows in enumerate(rows_K):
            models.load_flat(net, manifest, order["weights"])
            trained = training.train(
                net,
                cells.take(rows),
                plan,
                progress_start=round_ / rounds,
                progress_end=(round_ + 1) / rounds,
                correction=strategy.lab.prepare(order, memories[lab]),
                features_NF=features_NF[rows],
                seed=1000 * seed + 10 * round_ + lab,
                device="cpu",
            )
            end_P = models.flatten(net, manifest)
            local = LocalRound(order["weights"], end_P, trained.reach)
            parts, memories[lab] = strategy.lab.finish(order, memories[lab], local)
            updates.append(parts)
        images_K = [len(rows) for rows in rows_K]
        mean = {
            name: np.average([u[name] for u in updates], axis=0, weights=images_K).astype("f4")
            for name in strategy.lab.up
        }
        state = strategy.step(state, Mean(mean, received=LABS, cohort=LABS))
    models.load_flat(net, manifest, state["weights"])
    test = cells.take(np.flatnonzero(test_N))
    probs_NC = training.predict(net, test, features_NF=features_NF[test_N], device="cpu")
    return float(summarise(tally(probs_NC, test.targets_NC), SCHEME)["macro_f1"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_scaffold_comes_before_fedavg_where_labs_have_other_classes(
    real_data: Path, tmp_path: Path
) -> None:
    scale = PLAN.labels.scale
    cells = open_cells(
        [real_data / "bone_marrow_128"],
        SCHEME,
        size_px=scale.size_px,
        field_um=scale.field_um,
        cache_dir=tmp_path,
    )
    net = models.build(PLAN.model, len(SCHEME.codes), seed=0)
    with training.steady(1):
        features_NF = features_of(net, cells)
    gains = [
        federated_macro_f1(scaffold(), net, cells, features_NF, seed)
        - federated_macro_f1(fedavg(), net, cells, features_NF, seed)
        for seed in (0, 1, 2)
    ]
    assert min(gains) > 0, gains
    assert np.mean(gains) > 0.01, gains
