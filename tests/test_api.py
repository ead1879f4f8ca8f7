"""``from cytofed import simulate, load_plan, Run``: the command line's code, for notebooks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cytofed
from cytofed import Run, load_plan, simulate
from cytofed.errors import InputError

SMALL = Path(__file__).parent / "simulations" / "small.yaml"


@pytest.fixture(scope="module")
def run(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(
        load_plan(SMALL, ["train.rounds=3"]),
        data=sample / "marrow",
        labs=2,
        set={"train.steps_per_round": 1, "name": "a run"},
        seed=4,
        jobs=1,
        out=tmp_path_factory.mktemp("api") / "run",
        quiet=True,
    )


def test_importing_cytofed_imports_nothing_heavy() -> None:
    code = (
        "import sys, cytofed; print(sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'flwr', 'torch', 'numpy', 'yaml', 'matplotlib', 'rich'}), dir(cytofed)[:1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['Run']"


def test_names_of_the_package_are_found_and_others_are_not() -> None:
    assert set(cytofed.__all__) <= set(dir(cytofed))
    with pytest.raises(AttributeError, match="simulated"):
        _ = cytofed.simulated  # type: ignore[attr-defined]


def test_run_has_what_its_files_have(run: Run) -> None:
    summary = json.loads((run.path / "summary.json").read_text())
    assert run.status == "completed"
    assert run.summary == summary
    assert run.metrics == summary["global"]
    assert run.privacy["unit"] == "none"
    assert sorted(run.labs) == ["lab-1", "lab-2"]
    assert run.plan.train.seed == 4
    assert run.plan.train.steps_per_round == 1
    assert run.model.is_file()
    assert run.report.is_file()


def test_history_has_a_column_for_each_figure_and_a_row_for_each_round(run: Run) -> None:
    history = run.history
    assert history["round"] == [1, 2, 3]
    assert {len(column) for column in history.values()} == {3}
    assert history["macro_f1"][-1] == pytest.approx(run.metrics["macro_f1"])
    assert all(loss > 0 for loss in history["loss"])


def test_confusion_counts_the_held_out_images_of_the_scores(run: Run) -> None:
    support = [run.metrics["per_class"][code]["support"] for code in run.classes]
    assert run.confusion_CC.sum(axis=1).tolist() == support
    correct = np.trace(run.confusion_CC) / run.confusion_CC.sum()
    assert correct == pytest.approx(run.metrics["accuracy"])


def test_a_cell_executed_again_gives_the_finished_run(run: Run) -> None:
    again = simulate(out=run.path, resume=True, quiet=True)
    assert again == Run(run.path)
    assert again.summary == run.summary


def test_notebook_shows_a_table_in_which_nothing_is_markup(run: Run, tmp_path: Path) -> None:
    shown = run._repr_html_()
    assert "macro F1" in shown
    assert "not differentially private" in shown
    hostile = json.loads((run.path / "summary.json").read_text())
    hostile["plan_name"] = "<script>alert(1)</script>"
    (tmp_path / "summary.json").write_text(json.dumps(hostile))
    (tmp_path / "plan.yaml").write_text((run.path / "plan.yaml").read_text())
    assert "<script>" not in Run(tmp_path)._repr_html_()


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key"):
        simulate("demo", set={"train.roundz": 3}, out=tmp_path / "run")
    with pytest.raises(InputError, match="no run directory"):
        _ = Run(tmp_path / "nowhere").summary
