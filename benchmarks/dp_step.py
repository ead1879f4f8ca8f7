"""A step of patient-level DP-SGD against plain training, and against Opacus' hooks.

    python benchmarks/dp_step.py [--quick] [--json]

ResNet-18 with GroupNorm, 64 px, 32 patients of 16 cells a step, one thread, float32. Ours is the
whole of ``client.private.train_privately``: draw, images from the cache, augmentation, one
backward pass a patient, clip, noise from the operating system's generator, optimizer. Plain is
``client.training.train`` on the same images in batches of 32 (the plan's default); batches of 16
and 512 are reported too. Opacus: ``GradSampleModule`` and ``DPOptimizer`` on the same images,
clipped per image (it has no patients), in virtual steps of 16 images. It is timed on fewer of the
images and without the noise and the optimizer at its step's end, which is in its favour.
``--quick`` leaves out the batch of 512 and most repetitions.

Times are CPU seconds of this one thread: the ratios then hold on a machine that others use too.
Runs take turns; figures are medians, ratios those of neighbours. Memory: the peak of a process of
its own minus what it held before training.

N images, F features, C classes.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cytofed.client.cells import Cells, open_cells
from cytofed.labels import load_scheme
from cytofed.plan import Plan, from_dict

REPO = Path(__file__).resolve().parent.parent
PATIENTS, CELLS_EACH, SIZE_PX, FEATURES = 32, 16, 64, 512
IMAGES = PATIENTS * CELLS_EACH
CLASSES = 21
OPACUS_BATCH = 16
PLAIN_BATCH = 32


def open_marrow(scratch: Path) -> Cells:
    """512 real marrow images of 32 pretended patients; the cache is in ``scratch``."""
    data = Path(os.environ.get("CYTOFED_TEST_DATA", REPO.parent / "shared" / "data"))
    root = data / "bone_marrow_128"
    if not root.is_dir():
        root = REPO / "src" / "cytofed" / "sample" / "marrow"
    paths = sorted(root.glob("*/*.jpg"))
    for number in range(IMAGES):
        path = paths[number * len(paths) // IMAGES]
        folder = scratch / "images" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}-{path.name}").unlink(missing_ok=True)
        (folder / f"{number}-{path.name}").symlink_to(path)
    scheme = load_scheme("bone-marrow-21")
    cells = open_cells(
        [scratch / "images"], scheme, size_px=SIZE_PX, field_um=21.6, cache_dir=scratch / "cache"
    )
    # Taken in turn, so that a patient's cells are of several classes.
    return replace(cells, patients_N=np.array([f"p{n % PATIENTS:02d}" for n in range(IMAGES)]))


def make_plan(images: int, *, private: bool, batch: int = PLAIN_BATCH) -> Plan:
    """One step over all images: every patient is drawn, or an epoch of plain batches."""
    privacy = {
        "unit": "patient",
        "sigma": 1.0,
        "sampling_rate": 1.0,
        "cells_per_patient": CELLS_EACH,
        "declared_patients": images // CELLS_EACH,
    }
    return from_dict(
        {
            "labels": {"scheme": "bone-marrow-21", "scale": {"size_px": SIZE_PX}},
            "model": {"arch": "resnet18"},
            "train": {
                "batch": batch,
                "steps_per_round": 1 if private else images // batch,
                "rounds": 1,
                "lr": 1e-4,
                "threads": 1,
                "precision": "float32",  # Opacus' hooks know no other
            },
            "privacy": privacy if private else {},
        }
    )


def private_task(cells: Cells) -> Callable[[], None]:
    """A step of ours, on a net of its own."""
    from cytofed import models
    from cytofed.client.private import train_privately
    from cytofed.privacy.noise import SystemRandomness
    from cytofed.privacy.terms import terms_of

    plan = make_plan(len(cells), private=True)
    terms = terms_of(plan)
    assert terms is not None
    net = models.build(plan.model, CLASSES, seed=0)

    def step() -> None:
        done = train_privately(
            net,
            cells,
            plan,
            terms,
            declared_patients=len(cells) // CELLS_EACH,
            randomness=SystemRandomness(),
            progress_start=0.5,
            progress_end=1.0,
            absent_C=np.zeros(CLASSES, bool),
            device="cpu",
        )
        assert (done.patients, done.non_finite) == (len(cells) // CELLS_EACH, 0)

    return step


def plain_task(cells: Cells, batch: int) -> Callable[[], None]:
    """The same images once without privacy, with the same convolutions as ours."""
    from cytofed import models
    from cytofed.client.convolution import adopt
    from cytofed.client.training import train

    plan = make_plan(len(cells), private=False, batch=batch)
    net = models.build(plan.model, CLASSES, seed=0)
    adopt(net)

    def epoch() -> None:
        done = train(net, cells, plan, progress_start=0.5, progress_end=1.0, seed=1, device="cpu")
        assert done.images == len(cells)

    return epoch


def opacus_task(cells: Cells, images: int) -> Callable[[], None]:
    """Opacus' gradients, clipped and summed, of the first ``images`` of them."""
    import torch
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from cytofed import models
    from cytofed.client import training
    from cytofed.client.augment import augment

    plan = make_plan(IMAGES, private=False)
    net = models.build(plan.model, CLASSES, seed=0)
    wrapped = GradSampleModule(net, loss_reduction="mean")
    inner = training.make_optimizer(list(net.parameters()), plan.train)
    optimizer = DPOptimizer(
        inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=IMAGES
    )
    objective = training.Objective(torch.ones(CLASSES, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with training.steady(1):
            for start in range(0, images, OPACUS_BATCH):
                index_B = np.arange(start, start + OPACUS_BATCH)
                pixels = training.load_pixels(cells, index_B, None)
                inputs = augment(pixels, plan.train.augment, generator)
                inputs = inputs.contiguous(memory_format=torch.channels_last)
                objective(wrapped(inputs), torch.from_numpy(cells.targets_NC[index_B])).backward()  # type: ignore[no-untyped-call]
                optimizer.signal_skip_step(do_skip=True)  # clip and accumulate only
                optimizer.step()
                optimizer.zero_grad()

    return step


def head_tasks() -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """The head on 512 features: ours, plain with the loss of training, plain cross-entropy."""
    import torch
    from torch import nn
    from torch.nn import functional

    from cytofed.client import training
    from cytofed.privacy.gradients import Mechanism, PatientOptimizer, private_head_step
    from cytofed.privacy.noise import SystemRandomness
    from cytofed.privacy.sampling import draw, units_of

    features_NF = torch.randn(IMAGES, FEATURES, generator=torch.Generator().manual_seed(0))
    class_N = torch.arange(IMAGES) % CLASSES
    targets_NC = functional.one_hot(class_N, CLASSES).bool()
    present_C = torch.ones(CLASSES, dtype=torch.bool)
    settings = make_plan(IMAGES, private=False).train
    randomness = SystemRandomness()
    units = units_of("patient", IMAGES, [f"p{n % PATIENTS:02d}" for n in range(IMAGES)])

    private_head = nn.Linear(FEATURES, CLASSES)
    optimizer = PatientOptimizer(
        training.make_optimizer(list(private_head.parameters()), settings),
        private_head,
        mechanism=Mechanism(1.0, 1.0, 1.0, PATIENTS),
        randomness=randomness,
    )

    drawn = draw(units, sampling_rate=1.0, cells_per_unit=CELLS_EACH, randomness=randomness)
    rows_N = np.concatenate(drawn.rows)

    def ours() -> None:
        private_head_step(optimizer, drawn, private_head, features_NF, targets_NC)

    def plain(loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        head = nn.Linear(FEATURES, CLASSES)
        inner = training.make_optimizer(list(head.parameters()), settings)

        def step() -> None:
            index_N = torch.from_numpy(rows_N)
            inner.zero_grad()
            loss_of(head(features_NF.index_select(0, index_N)), index_N).backward()  # type: ignore[no-untyped-call]
            inner.step()

        return step

    objective = training.Objective(present_C)
    return (
        ours,
        plain(lambda logits_NC, index_N: objective(logits_NC, targets_NC.index_select(0, index_N))),
        plain(
            lambda logits_NC, index_N: functional.cross_entropy(
                logits_NC, class_N.index_select(0, index_N)
            )
        ),
    )


# --- measuring


def cpu_s(task: Callable[[], None], calls: int = 1) -> float:
    start = time.process_time()
    for _ in range(calls):
        task()
    return (time.process_time() - start) / calls


def in_turn(repeats: int, calls: int, **tasks: Callable[[], None]) -> dict[str, list[float]]:
    """CPU seconds of a call of each task; neighbours in a list's place were neighbours in time."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            times[name].append(cpu_s(task, calls))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over neighbours in time: what slowed one slowed the other."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def measure_net(cells: Cells, *, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of a whole step: ours, plain, and Opacus' for as many images."""
    opacus_images = (2 if quick else 8) * OPACUS_BATCH
    share = IMAGES / opacus_images
    tasks: dict[str, Callable[[], None]] = {
        "plain": plain_task(cells, PLAIN_BATCH),
        "private": private_task(cells),
        "opacus": opacus_task(cells, opacus_images),
    }
    if not quick:
        tasks["plain_one_batch"] = plain_task(cells, IMAGES)
    opacus_task(cells, OPACUS_BATCH)()  # the first calls compile and load
    times = in_turn(1 if quick else 3, 1, **tasks)
    ours = {
        "step_s": statistics.median(times["private"]),
        "step_to_plain": ratio(times, "private", "plain"),
    }
    peer = {
        "plain_s": statistics.median(times["plain"]),
        "opacus_images": opacus_images,
        "opacus_s": statistics.median(times["opacus"]) * share,
        "opacus_to_step": ratio(times, "opacus", "private") * share,
    }
    if not quick:
        ours["step_to_plain_one_batch"] = ratio(times, "private", "plain_one_batch")
        peer["plain_one_batch_s"] = statistics.median(times["plain_one_batch"])
    return ours, peer


def measure_head(*, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds: the best of many short runs, the others measure who else was at work."""
    import torch

    torch.set_num_threads(1)
    ours, plain, bare = head_tasks()
    in_turn(1, 20, ours=ours, plain=plain, bare=bare)  # the first calls compile
    times = in_turn(60 if quick else 200, 5, ours=ours, plain=plain, bare=bare)
    best = {name: min(seconds) for name, seconds in times.items()}
    return (
        {"head_s": best["ours"], "head_to_plain": best["ours"] / best["plain"]},
        {
            "head_plain_s": best["plain"],
            "head_cross_entropy_s": best["bare"],
            "head_to_cross_entropy": best["ours"] / best["bare"],
        },
    )


# --- memory, each in a process of its own


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def print_extra_bytes(kind: str, scratch: Path) -> None:
    """What a step holds at most above what the process held before it, net included.

    A quarter of the images: memory does not grow with more passes.
    """
    rows = np.flatnonzero(np.arange(IMAGES) % PATIENTS < PATIENTS // 4)
    cells = open_marrow(scratch).take(rows)
    if kind == "private":
        task = private_task(cells)
    elif kind == "opacus":
        task = opacus_task(cells, 2 * OPACUS_BATCH)
    else:
        task = plain_task(cells, int(kind))
    before = status_bytes("VmRSS")
    task()
    print(status_bytes("VmHWM") - before)


def extra_bytes(kind: str, scratch: Path) -> int:
    command = [sys.executable, __file__, "--extra-memory", kind, "--scratch", str(scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def measure_memory(scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = {
        kind: extra_bytes(kind, scratch) for kind in (str(PLAIN_BATCH), "16", "private", "opacus")
    }
    ours = {
        "extra_memory_bytes": found["private"],
        "extra_memory_to_plain": found["private"] / found[str(PLAIN_BATCH)],
        "extra_memory_to_plain_batch_16": found["private"] / found["16"],
    }
    peer = {
        "plain_extra_memory_bytes": found[str(PLAIN_BATCH)],
        "plain_batch_16_extra_memory_bytes": found["16"],
        "opacus_batch_16_extra_memory_bytes": found["opacus"],
    }
    return ours, peer


def measure(*, quick: bool, scratch: Path) -> dict[str, Any]:
    ours: dict[str, Any] = {"patients": PATIENTS, "cells_each": CELLS_EACH, "size_px": SIZE_PX}
    peer: dict[str, Any] = {
        "plain_batch": PLAIN_BATCH,
        "opacus_batch": OPACUS_BATCH,
        "opacus_clips": "per image",
    }
    cells = open_marrow(scratch)
    for mine, theirs in (
        measure_head(quick=quick),
        measure_net(cells, quick=quick),
        measure_memory(scratch),
    ):
        ours |= mine
        peer |= theirs
    return {
        "name": "dp_step",
        "ours": rounded(ours),
        "peer": rounded(peer),
        "goals": [
            goal("private step / plain training, time", ours["step_to_plain"], "<=", 1.35),
            goal("private step, times Opacus' speed", peer["opacus_to_step"], ">=", 5),
            goal("private step / plain training, memory", ours["extra_memory_to_plain"], "<=", 3),
            goal("private head / plain autograd, time", ours["head_to_plain"], "<=", 1),
        ],
    }


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in figures.items()
    }


def goal(name: str, value: float, op: str, limit: float) -> dict[str, Any]:
    met = value <= limit if op == "<=" else value >= limit
    return {"name": name, "value": round(value, 3), "op": op, "limit": limit, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer images and repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON line last")
    parser.add_argument("--extra-memory", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Opacus' hooks on a net whose input has no gradient
    if options.extra_memory:
        print_extra_bytes(options.extra_memory, options.scratch)
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(quick=options.quick, scratch=Path(scratch))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
