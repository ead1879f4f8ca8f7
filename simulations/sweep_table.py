"""The table of a sweep: a row per run, a row per setting over its seeds; CSV, Markdown, LaTeX.

A row holds nothing that differs between two runs of the same plan, data and seed: times are in a
file of their own. A setting is what is left of a run without its seed.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cytofed.files import write_atomically
from cytofed.intervals import half_width
from cytofed.plan import Plan
from cytofed.privacy.accounting import shown
from cytofed.whose import whose_of

Json = Mapping[str, Any]
Row = dict[str, Any]

SCORES = (
    "macro_f1",
    "tolerant_macro_f1",
    "balanced_accuracy",
    "accuracy",
    "weighted_f1",
    "ece",
    "worst_lab_macro_f1",
    "central_macro_f1",
    "central_worst_lab_macro_f1",
    "local_macro_f1",
    "best_local_macro_f1",
    "labs_that_gain",
)
"""columns whose mean and interval over seeds is told"""
_TIMES = ("wall_s", "train_s", "overhead_s", "workers")


def row_of(
    name: str, keys: Sequence[str], values: Mapping[str, Any], plan: Plan, summary: Json
) -> Row:
    """The row of a finished run: its ``summary.json`` in flat columns."""
    scores = summary.get("global") or {}
    over_labs = summary.get("over_labs") or {}
    baselines = summary.get("baselines") or {}
    local = [float(s["macro_f1"]) for s in (baselines.get("local") or {}).values()]
    central = [float(s["macro_f1"]) for s in (baselines.get("central_labs") or {}).values()]
    labs = summary.get("labs") or {}
    gains = [
        float(labs[lab]["macro_f1"]) >= float(own["macro_f1"])
        for lab, own in (baselines.get("local_own") or {}).items()
        if lab in labs
    ]
    privacy = summary.get("privacy") or {}
    whole = privacy.get("total") or privacy
    wire = summary.get("wire") or {}
    partition = summary.get("partition") or {}
    rounds = int(summary.get("rounds") or 0)
    row = _begun(name, keys, values, plan)
    row |= {
        "status": str(summary["status"]),
        "error": _why(summary),
        "weights_sha256": summary.get("weights_sha256"),
        "data_sha256": summary.get("data_sha256"),
        "labs": len(partition.get("labs") or []),
        "rounds": rounds,
        "test_images": scores.get("images"),
        **{key: scores.get(key) for key in SCORES},
        "tolerant_macro_f1": (scores.get("tolerant") or {}).get("macro_f1"),
        "worst_lab_macro_f1": over_labs.get("worst"),
        "central_macro_f1": (baselines.get("central") or {}).get("macro_f1"),
        "central_worst_lab_macro_f1": min(central, default=None),
        "local_macro_f1": float(np.mean(local)) if local else None,
        "best_local_macro_f1": max(local, default=None),
        "labs_that_gain": float(np.mean(gains)) if gains else None,
        "privacy_unit": whose_of(summary),
        "epsilon": whole.get("epsilon"),
        "delta": privacy.get("delta"),
        "sigma": privacy.get("sigma"),
        "secure_aggregation": bool(wire.get("secure_aggregation")),
        "up_bytes_per_lab_round": wire.get("up_bytes_per_lab_round"),
        "down_bytes_per_lab_round": wire.get("down_bytes_per_lab_round"),
        "bytes_per_lab": rounds
        * (
            int(wire.get("up_bytes_per_lab_round") or 0)
            + int(wire.get("down_bytes_per_lab_round") or 0)
        ),
        "times": {key: (summary.get("timing") or {}).get(key) for key in _TIMES},
    }
    return row


def failed_row(
    name: str, keys: Sequence[str], values: Mapping[str, Any], plan: Plan, error: str
) -> Row:
    """The row of a run that left no summary."""
    return _begun(name, keys, values, plan) | {"status": "failed", "error": error}


def _begun(name: str, keys: Sequence[str], values: Mapping[str, Any], plan: Plan) -> Row:
    return {
        "run": name,
        "values": {key: values.get(key) for key in keys},
        "seed": plan.train.seed,
        "plan_sha256": plan.sha256,
        "test_share": plan.evaluation.fraction,
    }


def _why(summary: Json) -> str:
    """What kept a run from being completed."""
    if summary["status"] == "completed":
        return ""
    reasons = [
        f"{lab}: {reason}"
        for entry in summary.get("participation") or []
        for lab, reason in (entry.get("absent") or {}).items()
    ]
    return str(summary.get("error") or (reasons[0] if reasons else "no lab answered"))


def summarised(name: str, keys: Sequence[str], rows: Sequence[Row], *, text: str) -> dict[str, Any]:
    """What ``sweep.json`` holds: status, rows, settings over seeds, times, the file's text.

    Status: completed when every run is; failed when none left a model; else incomplete.
    """
    scored = [row for row in rows if row.get("macro_f1") is not None]
    completed = sum(row["status"] == "completed" for row in rows)
    status = "completed" if completed == len(rows) else "incomplete" if scored else "failed"
    times = {row["run"]: row["times"] for row in rows if "times" in row}
    plain = [{k: v for k, v in row.items() if k != "times"} for row in rows]
    return {
        "status": status,
        "name": name,
        "keys": list(keys),
        "completed": completed,
        "runs": plain,
        "settings": settings_of(plain),
        "times": times,
        "sweep": text,
    }


def settings_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Runs with the same values, over their seeds: mean and 95% interval of each score.

    Seeds split the same images, so the interval is the corrected one of ``cytofed.intervals``.
    ``low`` and ``high`` are None for a single seed: one run tells nothing about others.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["values"], sort_keys=True), []).append(row)
    found = []
    for group in groups.values():
        scored = [row for row in group if row.get("macro_f1") is not None]
        setting: dict[str, Any] = {
            "values": group[0]["values"],
            "runs": len(group),
            "scored": len(scored),
            "seeds": [row["seed"] for row in scored],
        }
        for key in ("labs", "privacy_unit", "epsilon", "delta", "secure_aggregation"):
            setting[key] = _common([row[key] for row in scored])
        for key in ("bytes_per_lab",):
            setting[key] = float(np.mean([row[key] for row in scored])) if scored else None
        for key in SCORES:
            values = [float(row[key]) for row in scored if row[key] is not None]
            whole = bool(values) and len(values) == len(scored)
            share = max((float(row["test_share"]) for row in scored), default=0.0)
            setting[key] = interval(values, test_share=share) if whole else None
        found.append(setting)
    return found


def _common(values: Sequence[Any]) -> Any:
    """The one value of all seeds; of numbers that differ the largest, which is the promise."""
    if not values:
        return None
    if len(set(values)) > 1 and all(isinstance(value, int | float) for value in values):
        return max(values)
    return values[0]


def interval(values: Sequence[float], *, test_share: float) -> dict[str, Any]:
    """Mean and 95% interval over splits that each test ``test_share`` of the same images."""
    mean = float(np.mean(values))
    half = half_width(values, test_share=test_share, confidence=0.975)
    known = math.isfinite(half)
    return {
        "mean": mean,
        "low": mean - half if known else None,
        "high": mean + half if known else None,
        "values": list(values),
    }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto front: points than which no other costs at most as much and scores higher.

    ``points``: (cost, score); the answer is their positions, cheapest first.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, kept = -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


# --- files


def write_tables(found: Json, out: Path) -> None:
    """``table.csv`` (a row per run), ``times.csv``, and settings as Markdown and LaTeX."""
    write_atomically(out / "table.csv", _csv(found))
    times = [[name, *(times[key] for key in _TIMES)] for name, times in found["times"].items()]
    write_atomically(out / "times.csv", _csv_text(["run", *_TIMES], times))
    head, body = settings_table(found)
    write_atomically(out / "table.md", _markdown(head, body, caption(found)))
    write_atomically(out / "table.tex", _latex(head, body, caption(found)))


def _csv(found: Json) -> str:
    keys = list(found["keys"])
    columns = [key for row in found["runs"] for key in row]
    shared = [key for key in dict.fromkeys(columns) if key not in ("run", "values", "seed")]
    swept = [f"set {key}" if key in (*shared, "run", "seed") else key for key in keys]
    body = [
        [row["run"], *(row["values"][key] for key in keys), row["seed"]]
        + [row.get(key) for key in shared]
        for row in found["runs"]
    ]
    return _csv_text(["run", *swept, "seed", *shared], body)


def _csv_text(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in body)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else value


def settings_table(found: Json) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of settings; columns that say nothing are left out."""
    keys = list(found["keys"])
    head = [*keys, "runs", "macro F1", "tolerant", "balanced accuracy", "worst lab", "central"]
    head += ["own models", "epsilon", "MB per lab"]
    body = []
    for setting in found["settings"]:
        scored = setting["scored"]
        count = str(scored) if scored == setting["runs"] else f"{scored} of {setting['runs']}"
        row = [value_text(setting["values"][key]) for key in keys] + [count]
        row += [
            spread_text(setting[key])
            for key in (
                "macro_f1",
                "tolerant_macro_f1",
                "balanced_accuracy",
                "worst_lab_macro_f1",
                "central_macro_f1",
                "local_macro_f1",
            )
        ]
        epsilon, sent = setting["epsilon"], setting["bytes_per_lab"]
        row.append("" if epsilon is None else shown(epsilon))
        row.append("" if sent is None else f"{sent / 1e6:.3g}")
        body.append(row)
    kept = [i for i in range(len(head)) if i < len(keys) or any(row[i] for row in body)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in body]


def caption(found: Json) -> str:
    """What the numbers of the table of settings are."""
    text = (
        "Mean and 95% interval over seeds (corrected for shared images)."
        if _has_intervals(found)
        else "One seed each."
    )
    claims = {
        f"delta {s['delta']:.4g}, per {s['privacy_unit']}, add-or-remove"
        for s in found["settings"]
        if s["epsilon"] is not None and s["delta"] is not None
    }
    if claims:
        text += f" Epsilon at {'; '.join(sorted(claims))}."
    return text + " MB per lab: sent and received over the whole run."


def _has_intervals(found: Json) -> bool:
    return any((s["macro_f1"] or {}).get("low") is not None for s in found["settings"])


def spread_text(score: Json | None) -> str:
    """``0.412 ± 0.021``; without an interval the mean alone."""
    if score is None:
        return ""
    if score["low"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} ± {score['mean'] - score['low']:.3f}"


def key_text(key: str) -> str:
    """The part of a key that tells what it is: ``privacy.epsilon`` is epsilon, and
    ``strategy.name`` is strategy."""
    *sections, last = key.split(".")
    return sections[-1] if sections and last in ("name", "enabled", "unit") else last


def value_text(value: Any) -> str:
    """A swept value as text; of a path its last part."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value)
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else str(value)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], told: str) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(head) + line("---" for _ in head) + "".join(map(line, body)) + f"\n{told}\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _latex(head: Sequence[str], body: Sequence[Sequence[str]], told: str) -> str:
    """A ``table`` environment with rules of the package booktabs."""
    keys = head.index("runs")
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_tex(told)}}}",
        f"\\begin{{tabular}}{{{'l' * keys}{'r' * (len(head) - keys)}}}",
        "\\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        "\\midrule",
        *(" & ".join(map(_tex, row)) + r" \\" for row in body),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


# --- the terminal


def render_sweep(found: Json, console: Console, *, out: Path) -> None:
    """Print what came out of a sweep: status, settings, failures, where the files are."""
    colour = {"completed": "green", "incomplete": "yellow"}.get(str(found["status"]), "red")
    runs = found["runs"]
    told = f", {found['completed']} of {len(runs)} runs"
    console.print(Text.assemble("sweep ", (str(found["status"]), colour), told))
    head, body = settings_table(found)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i < len(found["keys"]) else "right")
    for row in body:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(caption(found)), soft_wrap=True)
    for row in runs:
        if row["status"] != "completed":
            text = Text(f"{row['status']}: {row['run']}: {row['error']}", style="yellow")
            console.print(text, soft_wrap=True)
    console.print(Text(f"table    {out / 'table.csv'}"), soft_wrap=True)
    console.print(Text(f"report   {out / 'report.html'}"), soft_wrap=True)
