"""What ``benchmarks/accuracy.py`` makes of the runs of its sweeps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cytofed.simulations.sweep_table import SCORES

FILE = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def row(labs: int, partition: str, fold: int, score: float | None, **more: Any) -> dict[str, Any]:
    values = {"labs": labs, "partition": partition, "evaluation.fold": fold}
    return {"values": values, "seed": 0, **dict.fromkeys(SCORES), "macro_f1": score, **more}


def test_a_gap_is_against_one_place_on_the_same_fold_and_its_bound_counts_shared_images(
    accuracy: ModuleType,
) -> None:
    rows = [row(1, "iid", fold, one) for fold, one in enumerate((0.80, 0.84))]
    rows += [row(8, "iid", fold, score) for fold, score in enumerate((0.79, 0.85))]
    rows += [row(8, "iid", 2, 0.9), row(8, "iid", 3, None)]  # no rival; did not finish
    found = accuracy.skew_results(rows)
    assert found.figures["alike"]["gap"] == pytest.approx(0.0)
    # 6.314 standard errors of the mean of two, each .01 from it, that test a fifth each.
    error = 0.01 * (1 / 2 + 1 / 4) ** 0.5 / (1 / 2) ** 0.5
    assert found.figures["alike"]["bound"] == pytest.approx(6.3138 * error, abs=1e-4)
    met = {goal["name"]: goal["met"] for goal in found.goals}
    assert met["gap, alike"]
    assert not met["bound, alike"]
    assert found.lines[2] == "| 8: alike | 2 | 0.820 | 0.820 | +0.000 | +0.077 |"


def test_a_runs_own_baseline_goes_before_the_run_of_one_lab(accuracy: ModuleType) -> None:
    hard = accuracy.CONDITIONS[-1]
    rows = [row(1, "iid", 0, 0.85), row(hard.labs, hard.partition, 0, 0.80, central_macro_f1=0.82)]
    assert accuracy.skew_results(rows).figures[hard.name]["gap"] == pytest.approx(0.02)


def test_labs_gain_if_the_federation_is_above_the_best_of_them(accuracy: ModuleType) -> None:
    own = {"local_macro_f1": 0.6, "best_local_macro_f1": 0.75, "labs_that_gain": 0.875}
    found = accuracy.skew_results([row(8, "iid", 0, 0.7, central_macro_f1=0.7, **own)])
    met = {goal["name"]: goal["met"] for goal in found.goals}
    assert not met["gain over the best lab alone, alike"]
    assert not met["labs that gain on their own, alike"]
    assert found.lines[2] == "| 8: alike | 1 | 0.700 | 0.700 | +0.000 | 0.600 | 0.750 | 0.875 |"


def test_two_sources_are_compared_with_one_place_and_with_each_lab_whatever_is_masked(
    accuracy: ModuleType,
) -> None:
    beside = {
        "central_macro_f1": 0.7,
        "central_worst_lab_macro_f1": 0.6,
        "local_macro_f1": 0.2,
        "best_local_macro_f1": 0.3,
    }
    rows = [row(2, "sources", 0, 0.72, worst_lab_macro_f1=0.55, labs_that_gain=0.5, **beside)]
    rows += [row(2, "sources", 0, 0.65, worst_lab_macro_f1=0.5), row(2, "sources", 1, 0.1)]
    for masked, each in zip(("declared", "none", "none"), rows, strict=True):
        each["values"] = {**each["values"], "train.mask_absent": masked}
    found = accuracy.sources_results(rows)
    assert found.lines[2:] == [
        "| declared | 1 | 0.720 | 0.700 | -0.020 | 0.550 | 0.600 | 0.200 | 0.300 | 0.500 |",
        "| none | 1 | 0.650 | 0.700 | +0.050 | 0.500 | 0.600 | 0.200 | 0.300 |  |",
    ]
    met = {goal["name"]: goal["met"] for goal in found.goals}
    assert not met["labs that gain on their own, masked declared"]
    assert met["gain over the best lab alone, masked none"]
    assert not met["worst lab below central, masked none"]


def test_the_price_of_privacy_is_against_as_many_labs_without_it_on_the_same_split(
    accuracy: ModuleType,
) -> None:
    def of(labs: int, fold: int, score: float, **values: Any) -> dict[str, Any]:
        made = row(labs, "iid", fold, score)
        return {**made, "values": {**made["values"], **values}}

    private = {"privacy.epsilon": 8, "simulation.pseudo_patient_cells": 20}
    rows = [of(4, fold, one, **{"privacy.unit": "none"}) for fold, one in enumerate((0.8, 0.7))]
    rows += [of(4, 0, 0.74, **private), of(4, 1, 0.66, **private), of(4, 2, 0.1, **private)]
    rows += [of(2, 0, 0.1, **{"privacy.unit": "none"})]
    found = accuracy.privacy_results(rows)
    assert found.figures == {"4 labs of 58 patients, epsilon 8": pytest.approx(0.05)}
    # .06 and .04: 6.314 standard errors above their mean, counting shared images.
    assert found.lines[2:] == ["| 4 | 20 | 58 | 0.750 |  | 0.700 (-0.050, -0.127) |  |  |"]


@pytest.mark.parametrize(("alone", "pays"), [(0.71, False), (0.69, True)])
def test_private_training_is_held_against_each_lab_alone_without_noise(
    accuracy: ModuleType, alone: float, pays: bool
) -> None:
    plain = row(4, "iid", 0, 0.75, local_macro_f1=alone)
    private = row(4, "iid", 0, 0.7)
    plain["values"] |= {"privacy.unit": "none"}
    private["values"] |= {"privacy.epsilon": 3, "simulation.pseudo_patient_cells": 5}
    found = accuracy.privacy_results([plain, private])
    told = "**0.700**" if pays else "0.700"
    line = f"| 4 | 5 | 231 | 0.750 | {alone:.3f} |  | {told} (-0.050) |  |"
    assert found.lines[2:] == [line]
    met = {goal["name"]: goal["met"] for goal in found.goals}
    assert met["gain over alone at epsilon 3, 4 labs of 231"] is pays


def test_each_point_of_a_learning_curve_is_a_run_of_its_own(accuracy: ModuleType) -> None:
    rows = []
    for tree in accuracy.sweeps(Path(), quick=False)["longer"]["list"]:
        score = tree["train.rounds"] / (200 if tree["labs"] == 1 else 8000)
        score += tree["labels.scale.size_px"] / 1000 + tree["labs"] / 100
        central = 0.5 if "simulation.baselines" in tree else None
        made = row(tree["labs"], tree["partition"], 0, score, central_macro_f1=central)
        rows.append({**made, "values": tree})
    found = accuracy.longer_results(rows)
    assert found.lines[2:] == [
        "| one place, 64 pixels | 0.174 | 0.274 | 0.374 | 0.674 |  |",
        "| 8: alike, 64 pixels | 0.244 | 0.344 | 0.444 |  |  |",
        "| 4: scanner and stain, 64 pixels | 0.204 |  | 0.404 |  |  |",
        "| 6: classes, Dirichlet .3, 64 pixels | 0.224 |  | 0.424 |  |  |",
        "| 6: classes, stain, missing, 64 pixels | 0.224 |  | 0.424 |  |  |",
        "| 6: classes, stain, missing, 64 pixels, in one place | 0.500 |  | 0.500 |  |  |",
        "| one place, 96 pixels | 0.206 |  | 0.406 | 0.706 | 1.306 |",
        "| 8: alike, 96 pixels | 0.276 |  | 0.476 | 0.776 |  |",
    ]
    assert [(goal["value"], goal["met"]) for goal in found.goals] == [(1.306, True)]
    quick = accuracy.sweeps(Path(), quick=True)["longer"]["list"]
    rows = [{**row(tree["labs"], tree["partition"], 0, 0.5), "values": tree} for tree in quick]
    assert accuracy.longer_results(rows).lines[0] == "| macro F1 after epochs | 2 |"
    assert len(accuracy.longer_results(rows).lines) == 2 + len(rows) == 2 + len(accuracy.LINES)


def test_a_goal_of_one_place_needs_runs_of_one_place(accuracy: ModuleType) -> None:
    trees = accuracy.sweeps(Path(), quick=False)["longer"]["list"]
    rows = [{**row(tree["labs"], tree["partition"], 0, 0.5), "values": tree} for tree in trees]
    without = [each for each in rows if each["values"]["labs"] > 1]
    assert accuracy.longer_results(without).goals == []


def test_tables_go_between_the_marks_of_their_part_and_nothing_else_changes(
    accuracy: ModuleType, tmp_path: Path
) -> None:
    place = tmp_path / "results.md"
    marks = "<!-- accuracy, {0}: begin -->\n{1}\n<!-- accuracy, {0}: end -->\n"
    place.write_text(f"before\n{marks.format('head', 'old')}between\n{marks.format('whole', 'x')}")
    found = accuracy.skew_results([row(1, "iid", 0, 0.8), row(8, "iid", 0, 0.7)])
    accuracy.write_results("head", found, "2 of 4 runs", place)
    text = place.read_text()
    assert text.startswith("before\n<!-- accuracy, head: begin -->\n")
    assert text.endswith(f"<!-- accuracy, head: end -->\nbetween\n{marks.format('whole', 'x')}")
    assert "old" not in text
    assert "2 of 4 runs." in text
    assert "| 8: alike | 1 | 0.700 | 0.800 | +0.100 |" in text
    assert "![head](results/head.svg)" in text
    assert "8: alike" in (tmp_path / "results" / "head.svg").read_text()
    with pytest.raises(SystemExit, match="lacks the marks"):
        accuracy.write_results("alone", found, "", place)


def read_part(accuracy: ModuleType, data: Path, part: str) -> Any:
    """Its sweep over a data folder of nothing."""
    for name in ("bone_marrow_128", "pbc_128"):
        (data / name).mkdir(parents=True, exist_ok=True)
    file = data / f"{part}.yaml"
    file.write_text(accuracy.yaml.safe_dump(accuracy.sweeps(data, quick=False)[part]))
    return accuracy.read_sweep(file)


def test_rows_on_record_count_for_the_same_labs_and_plan_wherever_the_data_are(
    accuracy: ModuleType, tmp_path: Path
) -> None:
    there = read_part(accuracy, tmp_path / "there", "whole")
    scored = [
        {**row(1, "iid", 0, i / 100), "run": run.name} for i, run in enumerate(there.runs[:12])
    ]
    file = tmp_path / "whole.jsonl"
    accuracy.write_rows(file, there, [*scored, {"run": there.runs[12].name, "macro_f1": None}])
    here = read_part(accuracy, tmp_path / "here", "whole")
    assert here.runs[0].name != there.runs[0].name  # names have the data's path in them
    recorded = accuracy.read_rows(tmp_path, here)
    rows = accuracy.rows_of(here, tmp_path / "out", recorded, finished=True)
    assert [row["run"] for row in rows] == [run.name for run in here.runs[:12]]
    assert [row["macro_f1"] for row in rows] == [row["macro_f1"] for row in scored]
    # The sweep of other labs, whose plan is the same but for its simulation.
    assert accuracy.read_rows(tmp_path, read_part(accuracy, tmp_path / "here", "alone")) == {}


def test_a_run_that_two_parts_have_counts_for_both(accuracy: ModuleType, tmp_path: Path) -> None:
    whole, longer = (read_part(accuracy, tmp_path, part) for part in ("whole", "longer"))
    scored = [{**row(1, "iid", 0, i / 100), "run": run.name} for i, run in enumerate(whole.runs)]
    accuracy.write_rows(tmp_path / "rows" / "whole.jsonl", whole, scored)
    found = accuracy.read_rows(tmp_path / "rows", longer)
    lines = accuracy.longer_results(list(found.values())).lines[2:]
    assert len(found) == len(lines) == 5  # one place, and four kinds of labs, for 20 epochs
    assert lines[0] == "| one place, 64 pixels | 0.000 |"
    assert lines[-1].startswith("| 6: classes, stain, missing, 64 pixels")


def test_nothing_runs_again_that_is_on_record(accuracy: ModuleType, tmp_path: Path) -> None:
    sweep = read_part(accuracy, tmp_path, "whole")  # its data can't be trained on
    scored = [{**row(1, "iid", 0, 0.5), "run": run.name} for run in sweep.runs]
    file = tmp_path / "rows" / "whole.jsonl"
    accuracy.write_rows(file, sweep, scored)
    recorded = accuracy.read_rows(file.parent, sweep)
    assert len(accuracy.rows_of(sweep, tmp_path / "out", recorded, finished=False)) == 50


def test_every_part_has_marks_in_the_results_and_its_sweep_can_be_read(
    accuracy: ModuleType, tmp_path: Path
) -> None:
    text = accuracy.RESULTS.read_text()
    for name in ("bone_marrow_128", "pbc_128"):
        (tmp_path / name).mkdir()
    for quick in (True, False):
        for part, tree in accuracy.sweeps(tmp_path, quick=quick).items():
            assert f"<!-- accuracy, {part}: begin -->" in text
            file = tmp_path / f"{part}.yaml"
            file.write_text(accuracy.yaml.safe_dump(tree, sort_keys=False))
            runs = accuracy.read_sweep(file).runs
            assert runs
            private = [run.request.plan for run in runs if run.request.plan.privacy.unit != "none"]
            assert len({plan.train.rounds for plan in private}) <= 1
            if quick:
                rounds = [
                    r.request.plan.train.rounds for r in runs if r.request.plan not in private
                ]
                assert set(rounds) <= {2, 6, 80, 300}, "a tenth of 20, 60, 800 and 3,000"
