"""Claims about a sweep's table, figures and page, on made-up runs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cytofed.errors import InputError
from cytofed.plan import from_dict
from cytofed.simulations.sweep_report import is_sweep, read_found, trades_of, write_report
from cytofed.simulations.sweep_table import (
    Row,
    failed_row,
    front,
    interval,
    render_sweep,
    row_of,
    settings_of,
    summarised,
    write_tables,
)

from .test_report import HOSTILE, StrictPage

PLAN = from_dict({"name": "made"})
KEYS = ("privacy.epsilon", "labs", "note")


def made_summary(score: float, *, labs: int, epsilon: float | None, status: str) -> dict[str, Any]:
    names = [f"lab-{k + 1}" for k in range(labs)]
    private = {"unit": "patient", "epsilon": epsilon, "delta": 1e-3, "sigma": 1.3}
    return {
        "status": status,
        "weights_sha256": "5f" * 32,
        "data_sha256": "a0" * 32,
        "rounds": 5,
        "global": {"macro_f1": score, "balanced_accuracy": score, "accuracy": score, "images": 90},
        "over_labs": {"worst": score - 0.1},
        "participation": [{"round": 1, "expected": names, "received": [], "absent": {}}],
        "privacy": {"unit": "none"} if epsilon is None else private,
        "wire": {"up_bytes_per_lab_round": 1000 * labs, "down_bytes_per_lab_round": 500},
        "timing": {"wall_s": 7.0, "train_s": 5.0, "overhead_s": 2.0, "workers": 1},
        "partition": {"labs": names, "pseudo_patients": epsilon is not None},
    }


def made_sweep(*, seeds: int = 3, fail: bool = False) -> dict[str, Any]:
    """Four epsilons (one: none) times two numbers of labs, with seeds."""
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for epsilon in (None, 1.0, 4.0, 16.0):
        for labs in (2, 4):
            for seed in range(seeds):
                values = {"privacy.epsilon": epsilon, "labs": labs, "note": HOSTILE}
                name = f"epsilon-{epsilon}-labs-{labs}-seed-{seed}"
                score = 0.6 if epsilon is None else 0.5 * epsilon / (1 + epsilon) / labs
                score += 0.02 * float(rng.normal())
                if fail and seed == 1:
                    rows.append(failed_row(name, KEYS, values, PLAN, f"died of {HOSTILE}"))
                else:
                    made = made_summary(score, labs=labs, epsilon=epsilon, status="completed")
                    rows.append(row_of(name, KEYS, values, PLAN, made))
    return summarised("made", KEYS, rows, text=f"# {HOSTILE}\ngrid: {{}}\n")


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """A sweep's directory with tables and page."""
    found = made_sweep(fail=True)
    (tmp_path / "sweep.yaml").write_text(found["sweep"])
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    write_tables(found, tmp_path)
    write_report(tmp_path)
    return tmp_path


# --- statistics


def test_interval_counts_that_seeds_split_the_same_images() -> None:
    found = interval([0.1, 0.2, 0.3], test_share=0.2)
    assert found["mean"] == pytest.approx(0.2)
    error = 0.1 * (1 / 3 + 1 / 4) ** 0.5
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * error, rel=1e-6)
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])


def test_one_seed_has_no_interval() -> None:
    assert interval([0.4], test_share=0.2)["low"] is None


def test_front_is_what_nothing_beats_at_its_cost() -> None:
    rng = np.random.default_rng(1)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 9, (60, 2))]
    kept = front(points)
    beaten = {
        i
        for i, (cost, score) in enumerate(points)
        if any((c <= cost and s > score) or (c < cost and s >= score) for c, s in points)
    }
    assert {points[i] for i in kept} == {p for i, p in enumerate(points) if i not in beaten}
    assert kept == sorted(kept, key=lambda i: points[i][0])


def test_a_setting_is_its_runs_over_seeds_and_counts_those_that_failed() -> None:
    settings = made_sweep(fail=True)["settings"]
    assert len(settings) == 8
    assert {(s["runs"], s["scored"]) for s in settings} == {(3, 2)}
    assert settings_of([])[:1] == []


def test_status_tells_whether_some_or_all_runs_are_lost() -> None:
    assert made_sweep()["status"] == "completed"
    assert made_sweep(fail=True)["status"] == "incomplete"
    rows = [failed_row("a", KEYS, dict.fromkeys(KEYS), PLAN, "no")]
    assert summarised("x", KEYS, rows, text="")["status"] == "failed"


def test_a_lab_gains_where_its_own_images_fare_no_worse_than_alone() -> None:
    scores = {"lab-1": 0.7, "lab-2": 0.9, "lab-3": 0.5}
    made = made_summary(0.7, labs=3, epsilon=None, status="completed") | {
        "labs": {lab: {"macro_f1": score} for lab, score in scores.items()},
        "baselines": {
            "central": {"macro_f1": 0.8},
            "central_labs": {"lab-1": {"macro_f1": 0.8}, "lab-2": {"macro_f1": 0.6}},
            "local": {"lab-1": {"macro_f1": 0.3}, "lab-2": {"macro_f1": 0.5}},
            "local_own": {"lab-1": {"macro_f1": 0.7}, "lab-2": {"macro_f1": 0.95}},
        },
    }
    found = row_of("a", KEYS, dict.fromkeys(KEYS), PLAN, made)
    assert found["labs_that_gain"] == 0.5
    assert (found["local_macro_f1"], found["best_local_macro_f1"]) == (0.4, 0.5)
    assert (found["central_macro_f1"], found["central_worst_lab_macro_f1"]) == (0.8, 0.6)


# --- tables


def test_csv_has_a_row_for_each_run_with_its_values_or_its_error(swept: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((swept / "table.csv").read_text())))
    assert len(rows) == 24
    assert {row["seed"] for row in rows} == {"0"}  # of the plan
    assert [row["error"] for row in rows if row["status"] == "failed"] == [f"died of {HOSTILE}"] * 8
    first = rows[6]
    assert (first["privacy.epsilon"], first["epsilon"], first["delta"]) == ("1.0", "1.0", "0.001")
    assert first["privacy_unit"] == "pseudo-patient"
    assert first["set labs"] == first["labs"] == "2"
    assert float(first["bytes_per_lab"]) == 5 * 2500


def test_times_are_in_a_file_of_their_own(swept: Path) -> None:
    table = (swept / "table.csv").read_text()
    assert not re.search(r"wall|train_s|overhead|workers", table.splitlines()[0])
    assert len((swept / "times.csv").read_text().splitlines()) == 1 + 16


def test_markdown_and_latex_have_a_row_for_each_setting_and_tell_what_epsilon_is(
    swept: Path,
) -> None:
    markdown, latex = (swept / "table.md").read_text(), (swept / "table.tex").read_text()
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == 2 + 8
    assert latex.count(r" \\") == 1 + 8
    assert r"\& \$x\_1\$" in latex
    assert "±" in markdown
    assert r"$\pm$" in latex
    for text in (markdown, latex.replace("\n", " ")):
        assert "delta 0.001, per pseudo-patient, add-or-remove" in text


def test_terminal_shows_settings_failures_and_where_the_files_are(swept: Path) -> None:
    text = io.StringIO()
    render_sweep(read_found(swept), Console(file=text, width=200), out=swept)
    shown = text.getvalue()
    assert "sweep incomplete, 16 of 24 runs" in shown
    assert f"died of {HOSTILE}" in shown
    assert "2 of 3" in shown
    assert str(swept / "report.html") in shown


# --- figures and page


def test_figures_are_drawn_where_their_cost_differs() -> None:
    assert [trade.name for trade in trades_of(made_sweep())] == ["epsilon", "bytes", "labs"]
    alone = made_sweep()
    alone["settings"] = alone["settings"][:1]
    assert trades_of(alone) == []


def test_figures_are_files_too_and_the_same_each_time(swept: Path) -> None:
    files = sorted((swept / "figures").iterdir())
    assert [file.name for file in files] == [
        f"{name}.{ending}" for name in ("bytes", "epsilon", "labs") for ending in ("pdf", "svg")
    ]
    before = [file.read_bytes() for file in files]
    page = (swept / "report.html").read_bytes()
    write_report(swept)
    assert [file.read_bytes() for file in files] == before
    assert (swept / "report.html").read_bytes() == page


def test_page_nests_loads_nothing_and_shows_hostile_text_as_text(swept: Path) -> None:
    page = StrictPage((swept / "report.html").read_text())
    assert "script" not in page.tags
    assert not page.handlers
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE in page.text
    assert "8 of 24 runs did not complete" in page.text
    assert "protect no real person" in page.text
    assert "per pseudo-patient, add-or-remove" in page.text


def test_folder_without_a_finished_sweep_is_told_so(tmp_path: Path) -> None:
    assert not is_sweep(tmp_path)
    (tmp_path / "sweep.yaml").touch()
    assert is_sweep(tmp_path)
    with pytest.raises(InputError, match=r"no sweep\.json"):
        read_found(tmp_path)
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(InputError, match="not what a sweep writes"):
        read_found(tmp_path)
