"""How near a federation comes to training in one place, and what privacy costs in accuracy.

``python benchmarks/accuracy.py [--quick] [--out DIR] [--part NAME ...] [--recorded] [--finished]
[--write]``

Sweeps of ``cytofed simulate`` on real marrow images, five folds of two seeds each: every
image is tested once a seed.

- ``head``: a head on the frozen ``blood`` encoder, over labs that are alike, that differ by scanner
  and stain, by class, and by all of it; beside each the same in one place and at each lab alone.
- ``whole``: the built-in ``marrow`` plan, which trains the encoder too, over the same labs and in
  one place. Where labs have lost images, and have their own stain, one place is without these
  images and has these stains too.
- ``alone``: the same with each lab alone, and scored lab by lab, on two folds.
- ``longer``: the same nets of all these labs, and in one place, trained up to twelve times as
  long, and on larger images, on one fold: where the limit is, and whether labs still reach it.
- ``privacy``: the same encoder, frozen, without privacy and at epsilon 8, 3 and 1 per
  pseudo-patient, for pseudo-patients of several sizes: a curve over the number of patients.
- ``sources``: a marrow lab and a blood lab with label schemes of their own, from random weights, by
  the classes that their losses leave out; in one place and at each lab alone too.

Runs are resumed: a second call goes on where the first was interrupted, and one of a finished
sweep only writes its table again; ``--finished`` shows that of what has run so far. Of two
cores, ``head`` and ``privacy`` take half an hour each, ``alone`` and ``sources`` one each and
``whole`` three (six or seven where the processor does not multiply in bfloat16): six hours in all.
``longer`` takes almost four more. ``--quick`` is one fold of one seed at a tenth of the training,
to see that all of it works: some 20 minutes.

A finished part's table goes into docs/results.md between the part's marks, with its plot and the
rows of its runs, one a line, in docs/results; with ``--finished --write`` also one of which a part
has run, and it says how much. ``--recorded`` takes these rows for runs of the same plan, whichever
part they are of, and runs what is left: so a grid can be run on several days and machines.

A condition's gap is central minus federated macro F1 on the same test images, over folds and
seeds; its bound is the upper end of a one-sided 95 % interval for runs that share images (corrected
resampled t-test, Nadeau and Bengio 2003). The worst lab is the one
whose own test images fare worst: once with the federated model, once with that of one place.
Alone: the labs' own models on all test images, their mean and the best; a lab gains where its own
test images fare no worse with the federated model than with its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from cytofed.console import SweepProgress
from cytofed.encoder import is_shipped, sha256_of, start_file
from cytofed.figures import Gap, Point, gap_figure, save, trade_figure
from cytofed.files import write_atomically
from cytofed.intervals import half_width
from cytofed.plan import load_plan, to_dict
from cytofed.simulations.sweep import Sweep, SweptRun, finished_rows, read_sweep, run_sweep

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results.md"
"""tables; plots and rows are in the folder of that name beside it"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """Labs that differ in a way, and what the federation may lose against training in one place."""

    name: str
    labs: int
    partition: str
    limit: float


RECIPE: dict[str, Any] = {
    "train.steps_per_epoch": None,
    "train.batch": 16,
    "train.lr": 0.02,
}
"""the best training that we know for whole nets in one place, and of labs alone"""
RIVALS = {key.replace("train.", "simulation.baseline_train."): v for key, v in RECIPE.items()}
"""the same for the baselines of a run"""
CONDITIONS = (
    Condition("alike", 8, "iid", 0.005),
    Condition("scanner and stain", 4, "acquisition", 0.01),
    Condition("classes, Dirichlet .3", 6, "dirichlet:0.3", 0.02),
    Condition("classes, stain, missing", 6, "dirichlet:0.1+stain:0.1+missing:1", 0.03),
)
ONE_PLACE: dict[str, Any] = {
    "labs": 1,
    "partition": "iid",
    "strategy.name": "fedavg",
    "train.rounds": 20,
    "train.local_epochs": 1.0,
    **RECIPE,
}
"""whole nets in one place, at as many epochs as the plan has"""
HEAD: dict[str, Any] = {
    "model.arch": "encoder+head",
    "model.start": "blood",
    "strategy.name": "scaffold",
    "train.rounds": 60,
    "train.local_epochs": 1.0,
    "train.steps_per_epoch": None,
    "train.batch": 32,
    "train.lr": 0.05,
    "evaluation.calibration": 0.0,
}
"""a last layer on frozen features: seconds of training, so many rounds"""
MARGIN = 0.01
"""what the upper end of the interval may be above a condition's limit"""
WORST_LAB = 0.03
STRONG = 0.88
"""macro F1 in one place, of the longest training, against which a gap counts"""
EPSILONS = {8: 0.03, 3: 0.06, 1: 0.10}
SIZES = ((4, 20), (4, 10), (4, 5), (4, 2), (4, 1), (2, 2))
"""labs, and cells of a pseudo-patient: the fewer they are, the more patients the images make"""
MORE_STEPS: dict[str, Any] = {
    "train.rounds": 3000,
    "train.local_epochs": 2 / 300,
    "train.steps_per_epoch": 300,
    "evaluation.every": 500,
}
"""the labs of ``sources`` have three times the images of marrow's: steps of as few of them"""
SOURCES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("declared", {}),
    ("missing", {}),
    ("none", {}),
    ("declared", MORE_STEPS),
    ("none", MORE_STEPS),
)
"""``train.mask_absent``, the plan's way first, and what else is not the plan's"""
BASELINES = (
    "central_macro_f1", "central_worst_lab_macro_f1", "local_macro_f1", "best_local_macro_f1",
)  # fmt: skip
"""what a row has of one place and of labs alone"""
TRAINED = 4611
"""images of bone_marrow_128 outside a test fold"""
TEST_SHARE = 0.2
"""of all images in a test fold"""


@dataclass(frozen=True)
class Line:
    """A learning curve of ``longer``: each number of epochs is a training of its own."""

    labs: Condition | None
    """None: one place"""
    size_px: int
    epochs: tuple[int, ...]

    @property
    def name(self) -> str:
        told = f"{self.labs.labs}: {self.labs.name}" if self.labs else "one place"
        return f"{told}, {self.size_px} pixels"

    def values(self) -> dict[str, Any]:
        """What is swept, but for the number of rounds."""
        labs = labs_of(self.labs) if self.labs else ONE_PLACE
        return {**labs, "labels.scale.size_px": self.size_px}

    def rounds(self, epochs: int) -> int:
        """Rounds of so many epochs."""
        per_round = load_plan("marrow").train.local_epochs if self.labs else 1.0
        return round(epochs / per_round)


LINES = (
    Line(None, 64, (20, 40, 60, 120)),
    Line(CONDITIONS[0], 64, (20, 40, 60)),
    *(Line(condition, 64, (20, 60)) for condition in CONDITIONS[1:]),
    Line(None, 96, (20, 60, 120, 240)),
    Line(CONDITIONS[0], 96, (20, 60, 120)),
)


def data_folder() -> Path:
    return Path(os.environ.get("CYTOFED_TEST_DATA", HERE.parents[1] / "shared" / "data"))


def sweeps(data: Path, *, quick: bool) -> dict[str, dict[str, Any]]:
    """The sweep files by part."""
    folds = [0] if quick else list(range(5))
    seeds = [0] if quick else [0, 1]
    marrow = str(data / "bone_marrow_128")
    conditions = [{"labs": c.labs, "partition": c.partition} for c in CONDITIONS]
    compared: dict[str, Any] = {
        "plan": "marrow",
        "data": marrow,
        "set": {"simulation.baselines": True, "evaluation.every": 100},
        "list": conditions,
        "grid": {"evaluation.fold": folds},
        "seeds": seeds,
    }
    head = {**compared, "name": "head", "set": {**compared["set"], **HEAD}}
    alone = {**compared, "name": "alone", "grid": {"evaluation.fold": folds[:2]}, "seeds": [0]}
    alone["set"] = {**compared["set"], **RIVALS}
    whole = {
        **compared,
        "name": "whole",
        "set": {"evaluation.every": 100},
        # One place is the same for all whose labs hold all images as they are: trained once a fold
        # and seed, not beside each condition.
        # Fold after fold: of a sweep that is interrupted, what has run is of all conditions alike.
        "grid": {},
        "list": [
            {"evaluation.fold": fold, **values}
            for fold in folds
            for values in (ONE_PLACE, *map(labs_of, CONDITIONS))
        ],
    }
    # As `cytofed plan check` advises where a lab has few patients: all of them in each step.
    private = {
        "privacy.unit": "patient",
        "privacy.sampling_rate": 1,
        "privacy.cells_per_patient": 20,
    }
    levels: list[dict[str, Any]] = [
        {"labs": labs, "privacy.unit": "none", "simulation.baselines": True, **HEAD}
        for labs in sorted({k for k, _ in SIZES})
    ]
    levels += [
        {
            **private,
            "labs": labs,
            "privacy.epsilon": epsilon,
            "simulation.pseudo_patient_cells": cells,
        }
        for labs, cells in SIZES
        for epsilon in EPSILONS
    ]
    privacy: dict[str, Any] = {
        "name": "privacy",
        "plan": "marrow",
        "data": marrow,
        "set": {"partition": "iid", "evaluation.every": 100},
        "list": levels,
        "grid": {"evaluation.fold": folds},
        "seeds": seeds,
    }
    beside = {"simulation.baselines": True, **RIVALS}
    sources = {
        "name": "sources",
        "plan": "marrow",
        "data": [marrow, str(data / "pbc_128")],
        "set": {"partition": "sources", "model.start": "random"},
        "list": [
            {**more, **(beside if i == 0 else {}), "train.mask_absent": masked}
            for i, (masked, more) in enumerate(SOURCES)
        ],
        "grid": {"evaluation.fold": folds[:2]},
        "seeds": [0],
    }
    longer = {
        **whole,
        "name": "longer",
        "list": [
            {
                "evaluation.fold": 0,
                **line.values(),
                "train.rounds": line.rounds(epochs),
            }
            # The longest first: so no core waits for the other at the end.
            for line in reversed(LINES)
            for epochs in (line.epochs[:1] if quick else reversed(line.epochs))
        ],
        "seeds": [0],
    }
    parts = {
        "head": head,
        "privacy": privacy,
        "sources": sources,
        "whole": whole,
        "alone": alone,
        "longer": longer,
    }
    return {part: a_tenth(tree) for part, tree in parts.items()} if quick else parts


def a_tenth(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep with a tenth of its rounds; private heads, which have few, keep theirs."""
    planned = load_plan("marrow").train.rounds

    def shorter(values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get("privacy.unit") == "patient":
            return dict(values)
        return {**values, "train.rounds": values.get("train.rounds", planned) // 10}

    if "train.rounds" in tree["set"]:
        return {**tree, "set": shorter(tree["set"])}
    return {**tree, "list": [shorter(values) for values in tree["list"]]}


def labs_of(condition: Condition) -> dict[str, Any]:
    """Whole nets at a condition's labs as the plan has them, with every value that one place has
    otherwise; and one place beside, where labs do not hold all images, or not as they are."""
    plan = to_dict(load_plan("marrow"))
    keys = [key.split(".") for key in ONE_PLACE if "." in key]
    values = {f"{group}.{key}": plan[group][key] for group, key in keys}
    values |= {"labs": condition.labs, "partition": condition.partition}
    changed = "stain" in condition.partition or "missing" in condition.partition
    return {**values, "simulation.baselines": "central", **RIVALS} if changed else values


# --- what came out


def chosen(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Finished rows with these swept values; underscores stand for the dots of keys."""
    wanted = {key.replace("__", "."): value for key, value in values.items()}
    return [
        row
        for row in rows
        if row.get("macro_f1") is not None
        and all(row["values"].get(key) == value for key, value in wanted.items())
    ]


def patients_a_lab(labs: int, cells: int) -> int:
    """Pseudo-patients that train at one of so many labs that are alike."""
    return round(TRAINED / labs / cells)


def mean_and_bound(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the upper end of its one-sided 95 % interval (infinite for a single value).

    All folds and seeds share images: see ``cytofed.intervals``.
    """
    mean = float(np.mean(values))
    return mean, mean + half_width(values, test_share=TEST_SHARE, confidence=0.95)


def goal(name: str, value: float, limit: float, op: str = "<=") -> dict[str, Any]:
    met = value <= limit if op == "<=" else value >= limit
    return {"name": name, "value": round(value, 4), "op": op, "limit": limit, "met": met}


@dataclass(frozen=True)
class Found:
    """What a part has shown: its table, its goals, figures for JSON, and a plot."""

    lines: list[str]
    goals: list[dict[str, Any]]
    figures: dict[str, Any]
    plot: Figure | None = None


HEADS = (
    "labs", "runs", "federated", "in one place", "gap", "bound", "worst lab",
    "worst lab, in one place", "alone", "best lab alone", "labs that gain",
)  # fmt: skip
"""columns of a comparison; those in which nothing stands are left out"""


def compared_with_one_place(name: str, found: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    """Rows of one condition, each with one place's score: a line of the table, and its figures."""
    gap, bound = mean_and_bound(_gaps(found))
    told = {
        "federated": _mean(found, "macro_f1"),
        "central": _mean(found, "central_macro_f1"),
        "gap": gap,
        "bound": None if math.isinf(bound) else bound,
        "worst_lab": _mean(found, "worst_lab_macro_f1"),
        "worst_lab_in_one_place": _mean(found, "central_worst_lab_macro_f1"),
        "alone": _mean(found, "local_macro_f1"),
        "best_alone": _mean(found, "best_local_macro_f1"),
        "labs_that_gain": _mean(found, "labs_that_gain"),
    }
    shown = ["" if value is None else f"{value:.3f}" for value in told.values()]
    shown[2:4] = [f"{gap:+.3f}", "" if math.isinf(bound) else f"{bound:+.3f}"]
    return [name, str(len(found)), *shown], told


def _gaps(found: Sequence[Row]) -> tuple[float, ...]:
    return tuple(float(row["central_macro_f1"]) - float(row["macro_f1"]) for row in found)


def goals_of_labs(name: str, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each lab may expect: more than it has alone, and about what one place gives it."""
    goals = []
    if told["best_alone"] is not None:
        gain = told["federated"] - told["best_alone"]
        goals.append(goal(f"gain over the best lab alone, {name}", gain, 0.0, ">="))
    if told["labs_that_gain"] is not None:
        share = told["labs_that_gain"]
        goals.append(goal(f"labs that gain on their own, {name}", share, 1.0, ">="))
    if told["worst_lab_in_one_place"] is not None:
        below = told["worst_lab_in_one_place"] - told["worst_lab"]
        goals.append(goal(f"worst lab below central, {name}", below, WORST_LAB))
    return goals


def skew_results(rows: Sequence[Row]) -> Found:
    """Of ``head``, ``whole`` and ``alone``.

    One place is a run's own baseline, or the run of one lab over the same fold and seed.
    """
    table = [list(HEADS)]
    goals: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    gaps: list[Gap] = []
    one_place = {_split_of(row): float(row["macro_f1"]) for row in chosen(rows, labs=1)}
    for condition in CONDITIONS:
        found = [
            {**row, "central_macro_f1": row["central_macro_f1"] or one_place.get(_split_of(row))}
            for row in chosen(rows, labs=condition.labs, partition=condition.partition)
        ]
        found = [row for row in found if row["central_macro_f1"] is not None]
        if not found:
            continue
        name = f"{condition.labs}: {condition.name}"
        line, told = compared_with_one_place(name, found)
        table.append(line)
        figures[condition.name] = told
        gaps.append(Gap(name, _gaps(found), told["gap"], told["bound"], condition.limit))
        goals.append(goal(f"gap, {condition.name}", told["gap"], condition.limit))
        if told["bound"] is not None:
            limit = condition.limit + MARGIN
            goals.append(goal(f"bound, {condition.name}", told["bound"], limit))
        goals += goals_of_labs(condition.name, told)
    plot = gap_figure(gaps) if gaps else None
    return Found(_markdown(table), goals, figures, plot)


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """A table without the columns in which nothing stands below the head."""
    if len(table) == 1:
        return []
    full = [column for column in zip(*table, strict=True) if any(column[1:])]
    head, *rows = zip(*full, strict=True)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(full), *rows)]


def _mean(rows: Sequence[Row], key: str) -> Any:
    """None where a run does not have it."""
    values = [row[key] for row in rows]
    return None if None in values else float(np.mean(values))


def _split_of(row: Row) -> tuple[int, int]:
    """The fold and seed of a run: which images were tested."""
    return int(row["values"]["evaluation.fold"]), int(row["seed"])


def privacy_results(rows: Sequence[Row]) -> Found:
    """Of ``privacy``: for each number of patients the price of each epsilon, and its rival: what
    a lab reaches alone, without noise, since nobody else sees its model."""
    lines = [
        "| labs | cells a pseudo-patient | patients a lab | without noise | alone, without noise | "
        + " | ".join(f"epsilon {epsilon}" for epsilon in EPSILONS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(EPSILONS),
    ]
    goals: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    curves: dict[str, list[Point]] = {}
    levels: dict[str, float] = {}
    for labs, cells in SIZES:
        patients = patients_a_lab(labs, cells)
        without_noise = chosen(rows, labs=labs, privacy__unit="none")
        plain = {_split_of(row): float(row["macro_f1"]) for row in without_noise}
        alone = _mean(without_noise, "local_macro_f1") if without_noise else None
        shown = []
        for epsilon, limit in EPSILONS.items():
            swept = {"privacy__epsilon": epsilon, "simulation__pseudo_patient_cells": cells}
            found = [
                (plain[_split_of(row)], float(row["macro_f1"]))
                for row in chosen(rows, labs=labs, **swept)
                if _split_of(row) in plain
            ]
            if not found:
                shown.append("")
                continue
            price, bound = mean_and_bound([a - b for a, b in found])
            score = float(np.mean([b for _, b in found]))
            told = f"{-price:+.3f}" if math.isinf(bound) else f"{-price:+.3f}, {-bound:+.3f}"
            # Bold: above what a lab has without joining.
            mark = "**" if alone is not None and score > alone else ""
            shown.append(f"{mark}{score:.3f}{mark} ({told})")
            figures[f"{labs} labs of {patients} patients, epsilon {epsilon}"] = price
            curves.setdefault(f"epsilon {epsilon}", []).append(Point(patients, score))
            told = f"{labs} labs of {patients}"
            goals.append(goal(f"price at epsilon {epsilon}, {told}", price, limit))
            if alone is not None:
                gain = score - alone
                goals.append(goal(f"gain over alone at epsilon {epsilon}, {told}", gain, 0.0, ">="))
        if any(shown):
            without = float(np.mean(list(plain.values())))
            levels[""] = max(without, levels.get("", 0.0))
            lines.append(
                f"| {labs} | {cells} | {patients} | {without:.3f} | "
                f"{'' if alone is None else f'{alone:.3f}'} | " + " | ".join(shown) + " |"
            )
    plot = trade_figure(curves, levels, label="patients a lab", joined=True) if curves else None
    return Found(lines, goals, figures, plot)


def sources_results(rows: Sequence[Row]) -> Found:
    """Of ``sources``: by which classes each lab's loss leaves out, and in how many steps.

    One place and the labs alone have all their images at hand, so what a federation masks does
    not concern them: they are trained beside one of the runs of a split.
    """
    table = [["classes masked at a lab", *HEADS[1:]]]
    goals: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    beside = {
        _split_of(row): {key: row[key] for key in BASELINES}
        for row in chosen(rows)
        if row["central_macro_f1"] is not None
    }
    for masked, more in SOURCES:
        steps = more.get("train.steps_per_epoch")
        found = [
            {**row, **beside[_split_of(row)]}
            for row in chosen(rows, train__mask_absent=masked, train__steps_per_epoch=steps)
            if _split_of(row) in beside
        ]
        if found:
            name = f"{masked}, {steps} steps an epoch" if steps else masked
            line, figures[name] = compared_with_one_place(name, found)
            table.append(line)
            goals += goals_of_labs(f"masked {name}", figures[name])
    return Found(_markdown(table), goals, figures)


def longer_results(rows: Sequence[Row]) -> Found:
    """Of ``longer``: macro F1 after so many epochs."""
    figures: dict[str, dict[int, float]] = {}
    for line in LINES:
        swept = line.values()
        found = chosen(
            rows,
            labs=swept["labs"],
            partition=swept["partition"],
            labels__scale__size_px=line.size_px,
        )
        for row in sorted(found, key=_epochs):
            figures.setdefault(line.name, {})[_epochs(row)] = row["macro_f1"]
            if row["central_macro_f1"] is not None:
                beside = figures.setdefault(f"{line.name}, in one place", {})
                beside[_epochs(row)] = row["central_macro_f1"]
    every = sorted({epochs for scores in figures.values() for epochs in scores})
    table = [["macro F1 after epochs", *map(str, every)]]
    for name, scores in figures.items():
        shown = (f"{scores[epochs]:.3f}" if epochs in scores else "" for epochs in every)
        table.append([name, *shown])
    # Those that are trained for longest; with the others too it could not be read.
    names = [line.name for line in LINES if line.labs in (None, CONDITIONS[0])]
    curves = {
        name: [Point(epochs, score) for epochs, score in figures[name].items()]
        for name in names
        if name in figures
    }
    plot = trade_figure(curves, {}, label="epochs", joined=True) if curves else None
    central = [line.name for line in LINES if line.labs is None and line.name in figures]
    best = [max(figures[name].values()) for name in central]
    goals = [goal("macro F1 in one place", max(best), STRONG, ">=")] if best else []
    return Found(_markdown(table), goals, figures, plot)


def _epochs(row: Row) -> int:
    values = row["values"]
    return round(float(values["train.rounds"]) * float(values["train.local_epochs"]))


RESULTS_OF = {
    "head": skew_results,
    "privacy": privacy_results,
    "sources": sources_results,
    "whole": skew_results,
    "alone": skew_results,
    "longer": longer_results,
}


def identity(run: SweptRun) -> str:
    """Of what a run trains and on which labs, on any machine: its folder's name has paths in it.

    What a plan says of privacy counts where it has some. A delta that is left out is not one that
    is given: a run that had the number itself is another run.
    """
    plan = run.request.plan
    tree = to_dict(plan)
    if plan.privacy.unit == "none":
        tree["privacy"] = {"unit": "none"}
    start = plan.model.start
    content = sha256_of(start_file(start)) if is_shipped(start) else None
    told = json.dumps([tree, content], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_rows(folder: Path, sweep: Sweep) -> dict[str, Row]:
    """What is on record in ``folder`` of a sweep's runs, whichever part ran them, by their names
    here and with this sweep's values; no other row counts."""
    recorded = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            recorded[row["run"]] = row
    found: dict[str, Row] = {}
    for run in sweep.runs:
        row = recorded.get(identity(run))
        if row is not None:
            values = {key: run.values.get(key) for key in sweep.keys}
            found[run.name] = {**row, "run": run.name, "values": values}
    return found


def write_rows(file: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """Put the rows of finished runs on record, one a line in the sweep's order."""
    keys = {run.name: identity(run) for run in sweep.runs}
    kept = [{**row, "run": keys[row["run"]]} for row in chosen(rows)]
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))


def rows_of(
    sweep: Sweep, out: Path, recorded: Mapping[str, Row], *, finished: bool
) -> Sequence[Row]:
    """Rows of a sweep in its order: of what is on record, and of what has run in ``out``; unless
    ``finished``, what is left runs first."""
    # A run with a folder stays in the sweep, which takes no folder that is not of its own.
    left = [r for r in sweep.runs if r.name not in recorded or (out / "runs" / r.name).exists()]
    if left and not finished:
        with SweepProgress(len(left)) as watch:
            run_sweep(replace(sweep, runs=tuple(left)), out, resume=True, watch=watch)
    found = {**recorded, **{row["run"]: row for row in finished_rows(sweep, out)}}
    return [found[run.name] for run in sweep.runs if run.name in found]


def write_results(part: str, found: Found, told: str, place: Path) -> None:
    """Put a part's table between its marks in ``place``, its plot beside it; what people wrote
    around the marks stays. ``told``: how many runs it is of."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    lines = [f"`python benchmarks/accuracy.py --part {part}`, {machine}: {told}.", "", *found.lines]
    if found.plot is not None:
        plot = place.parent / place.stem / f"{part}.svg"
        plot.parent.mkdir(exist_ok=True)
        save(found.plot, plot)
        lines += ["", f"![{part}]({plot.relative_to(place.parent)})"]
    begin, end = (f"<!-- accuracy, {part}: {edge} -->" for edge in ("begin", "end"))
    text = place.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{place} lacks the marks {begin} and {end}")
    write_atomically(place, "\n".join([before + begin, *lines, end + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one fold, a tenth of the training")
    parser.add_argument("--out", type=Path, help="folder of the sweeps [runs/accuracy]")
    parser.add_argument(
        "--finished", action="store_true", help="tables of the runs that are there; train nothing"
    )
    parser.add_argument(
        "--recorded", action="store_true", help="count the rows in docs/results, run what is left"
    )
    parser.add_argument("--part", action="append", choices=sorted(RESULTS_OF), help="[all]")
    parser.add_argument("--write", action="store_true", help="put them into docs/results.md too")
    parser.add_argument("--json", action="store_true", help="accepted: the last line is JSON")
    options = parser.parse_args()
    data = data_folder()
    if not (data / "bone_marrow_128").is_dir():
        raise SystemExit(f"real data not found in {data}: set CYTOFED_TEST_DATA")
    out = options.out or Path("runs") / ("accuracy-quick" if options.quick else "accuracy")
    out.mkdir(parents=True, exist_ok=True)
    goals: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for part, tree in sweeps(data, quick=options.quick).items():
        if options.part and part not in options.part:
            continue
        swept = out / f"{part}.yaml"
        write_atomically(swept, yaml.safe_dump(tree, sort_keys=False))
        sweep = read_sweep(swept)
        file = RESULTS.parent / RESULTS.stem / f"{part}.jsonl"
        recorded = read_rows(file.parent, sweep) if options.recorded else {}
        rows = rows_of(sweep, out / part, recorded, finished=options.finished)
        found = RESULTS_OF[part](rows)
        figures[part] = found.figures
        goals += [{**goal, "name": f"{part}: {goal['name']}"} for goal in found.goals]
        print("\n".join([f"## {part}", *found.lines, ""]), file=sys.stderr)
        done = len(chosen(rows))
        if done and (options.write or not (options.quick or options.finished)):
            write_rows(file, sweep, rows)
            write_results(part, found, f"{done} of {len(sweep.runs)} runs", RESULTS)
    line = {"name": "accuracy", "quick": options.quick, "ours": figures, "peer": {}, "goals": goals}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
