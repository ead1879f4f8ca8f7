"""``report.html`` of a sweep, and its figures as SVG and PDF, from ``sweep.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cytofed import figures
from cytofed.errors import InputError
from cytofed.figures import Point
from cytofed.files import write_atomically
from cytofed.page import page
from cytofed.simulations.parts import (
    CSS,
    drawing,
    in_epsilon,
    in_seconds,
    scroll,
    section,
    table_of,
    token,
    warning_box,
)
from cytofed.simulations.sweep_table import (
    caption,
    front,
    key_text,
    settings_table,
    spread_text,
    value_text,
)

Json = Mapping[str, Any]
MANY_RUNS = 200
"""the page shows so many runs; table.csv has all"""


@dataclass(frozen=True)
class Trade:
    """A figure of scores against a cost, with what is read to those who cannot see it."""

    name: str
    title: str
    caption: str
    figure: Figure


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.yaml").is_file()


def read_found(out: Path) -> dict[str, Any]:
    """``sweep.json``. Errors: InputError when it is missing or is none."""
    path = out / "sweep.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no sweep.json in {out}", hint="finish the sweep first: add --resume to its command"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict) or not {"status", "runs", "settings", "keys"} <= found.keys():
        raise InputError(f"{path} is not what a sweep writes")
    return found


def write_report(out: Path) -> Path:
    """Write ``report.html`` and ``figures/`` of a sweep and return the page's path."""
    found = read_found(out)
    trades = trades_of(found)
    folder = out / "figures"
    if trades:
        folder.mkdir(exist_ok=True)
    for trade in trades:
        for ending in ("svg", "pdf"):
            figures.save(trade.figure, folder / f"{trade.name}.{ending}")
    path = out / "report.html"
    write_atomically(path, _render(found, trades))
    return path


# --- figures


def trades_of(found: Json) -> list[Trade]:
    """The figures that say something: those whose cost differs between settings."""
    made = (_epsilon(found), _bytes(found), _labs(found))
    return [trade for trade in made if trade is not None]


def _epsilon(found: Json) -> Trade | None:
    told = [s for s in found["settings"] if s["macro_f1"] and s["epsilon"] is not None]
    if not told:
        return None
    keys = [k for k in found["keys"] if not k.startswith(("privacy.", "evaluation."))]
    series = _series(found, keys, lambda s: s["epsilon"])
    levels: dict[str, float] = {}
    for setting in found["settings"]:
        if setting["macro_f1"] and setting["epsilon"] is None:
            levels[_told(setting, keys)] = setting["macro_f1"]["mean"]
    if len({s["epsilon"] for s in told}) == 1 and not levels:
        return None
    claims = {f"delta {s['delta']:.4g}, per {s['privacy_unit']}" for s in told}
    meaning = claims.pop() if len(claims) == 1 else "delta and unit as in the table"
    figure = figures.trade_figure(
        series,
        levels,
        label=f"epsilon at {meaning}, add-or-remove",
        joined=True,
        best=_front(told, lambda s: s["epsilon"]),
    )
    text = "Macro F1 against epsilon of all that leaves a lab, as the plan promises it."
    return Trade("epsilon", "Privacy", text, figure)


def _bytes(found: Json) -> Trade | None:
    def cost(setting: Json) -> float:
        return float(setting["bytes_per_lab"]) / 1e6

    told = [s for s in found["settings"] if s["macro_f1"]]
    costs = [cost(s) for s in told]
    if not costs or max(costs) < 1.01 * min(costs):  # lengths of names and of their signatures
        return None
    few = len(told) <= figures.MANY_SERIES
    series = _series(found, found["keys"] if few else [], cost)
    figure = figures.trade_figure(
        series,
        {},
        label="megabytes that a lab sends and receives, whole run",
        joined=False,
        best=_front(told, cost),
    )
    text = "Macro F1 against the bytes of one lab over the whole run."
    return Trade("bytes", "Communication", text, figure)


def _labs(found: Json) -> Trade | None:
    told = [s for s in found["settings"] if s["macro_f1"]]
    if len({s["labs"] for s in told}) < 2:
        return None
    keys = [k for k in found["keys"] if k not in ("labs", "simulation.labs")]
    series = _series(found, keys, lambda s: s["labs"])
    figure = figures.trade_figure(series, {}, label="labs", joined=True)
    text = "Macro F1 against the number of labs that the same images are dealt to."
    return Trade("labs", "Labs", text, figure)


def _series(
    found: Json, keys: list[str], cost: Callable[[Json], float | None]
) -> dict[str, list[Point]]:
    """Points by the values of ``keys``."""
    series: dict[str, list[Point]] = {}
    for setting in found["settings"]:
        score, x = setting["macro_f1"], cost(setting) if setting["macro_f1"] else None
        if score is not None and x is not None:
            point = Point(float(x), score["mean"], score["low"], score["high"], (*score["values"],))
            series.setdefault(_told(setting, keys), []).append(point)
    return series


def _told(setting: Json, keys: list[str]) -> str:
    parts = [
        f"{key_text(key)} {value_text(setting['values'][key])}"
        for key in keys
        if setting["values"][key] is not None
    ]
    return ", ".join(parts)


def _front(settings: list[Json], cost: Callable[[Json], float]) -> list[tuple[float, float]]:
    points = [(float(cost(s)), float(s["macro_f1"]["mean"])) for s in settings]
    return [points[i] for i in front(points)]


# --- the page


def _render(found: Json, trades: list[Trade]) -> str:
    name = str(found["name"])
    sections = [_figures(trades), _settings(found), _runs(found), _file(found)]
    return page(
        title=f"{name}: cytofed sweep",
        heading=name,
        headline=_headline(found),
        sections="\n".join(s for s in sections if s),
        css=CSS,
        footer="Made by cytofed. For research; not a medical device.",
    )


def _headline(found: Json) -> str:
    runs, settings = found["runs"], found["settings"]
    status = str(found["status"])
    scored = [s for s in settings if s["macro_f1"]]
    lead = f"{len(settings)} settings, {len(runs)} runs."
    tiles = [("completed", f"{found['completed']} of {len(runs)}", "runs")]
    if scored:
        best = max(scored, key=lambda s: float(s["macro_f1"]["mean"]))
        told = _told(best, list(found["keys"])) or "the plan"
        lead += f" The best mean macro F1 is {spread_text(best['macro_f1'])}, with {told}."
        tiles.append(("best macro F1", f"{best['macro_f1']['mean']:.3f}", told))
        epsilons = sorted({s["epsilon"] for s in scored if s["epsilon"] is not None})
        if epsilons:
            ends = dict.fromkeys(in_epsilon(e) for e in (epsilons[0], epsilons[-1]))
            claim = caption(found).partition("Epsilon ")[2].partition(". ")[0]
            tiles.append(("epsilon", " to ".join(ends), claim))
        labs = sorted({s["labs"] for s in scored})
        tiles.append(("labs", " to ".join(dict.fromkeys(map(str, (labs[0], labs[-1])))), ""))
    seconds = sum(times.get("wall_s") or 0 for times in found.get("times", {}).values())
    if seconds:
        tiles.append(("time", in_seconds(seconds), "of all runs, one after the other"))
    shown = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>'
        f"<p>{escape(note)}</p></div>"
        for label, value, note in tiles
    )
    boxes = ""
    lost = len(runs) - int(found["completed"])
    if lost:
        boxes = warning_box(
            f"{lost} of {len(runs)} runs did not complete; each has its error in the table of runs."
        )
    if any(row.get("privacy_unit") == "pseudo-patient" for row in runs):
        boxes += warning_box(
            "The patients are pseudo-patients: these epsilons show what the method costs, and "
            "protect no real person."
        )
    return (
        f'<p class="status {token(status)}">{escape(status)}</p>'
        f'<p class="lead">{escape(lead)}</p>{boxes}<dl class="tiles">{shown}</dl>'
    )


def _figures(trades: list[Trade]) -> str:
    drawn = "".join(
        drawing(trade.figure, trade.name, f"macro F1 against {trade.name}", trade.caption)
        for trade in trades
    )
    if not drawn:
        return ""
    text = (
        "<p>Dots are means over seeds, bars their 95% intervals, dashes single seeds. The grey "
        "steps are the Pareto front: settings that nothing beats at their cost. Intervals are over "
        "seeds: other splits, starts and draws of the same images, not other hospitals.</p>"
    )
    return section("Trade-offs", f'{text}<div class="grid">{drawn}</div>')


def _settings(found: Json) -> str:
    head, body = settings_table(found)
    table = scroll(table_of(head, body, texts=max(1, len(found["keys"]))))
    return section("Settings", f"<p>{escape(caption(found))}</p>{table}")


def _runs(found: Json) -> str:
    keys = list(found["keys"])
    head = ["run", *keys, "seed", "status", "macro F1", "epsilon", "labs", "weights"]
    body = []
    for row in found["runs"][:MANY_RUNS]:
        told = str(row["status"]) + (f": {row['error']}" if row["error"] else "")
        score = row.get("macro_f1")
        body.append(
            [
                str(row["run"]),
                *(value_text(row["values"][key]) for key in keys),
                str(row["seed"]),
                told,
                "" if score is None else f"{score:.3f}",
                in_epsilon(row.get("epsilon")),
                str(row.get("labs") or ""),
                str(row.get("weights_sha256") or "")[:12],
            ]
        )
    table = scroll(table_of(head, body, texts=len(head)))
    more = ""
    if len(found["runs"]) > len(body):
        more = f"<p>The first {len(body)} of {len(found['runs']):,}; all are in table.csv.</p>"
    opened = " open" if found["completed"] < len(found["runs"]) or len(body) <= 12 else ""
    text = "<p>Each has a report of its own in <code>runs/</code>.</p>"
    return section(
        "Runs", f"{text}<details{opened}><summary>All runs</summary>{table}{more}</details>"
    )


def _file(found: Json) -> str:
    written = scroll(f"<pre>{escape(str(found['sweep']))}</pre>")
    text = (
        "<p><code>cytofed sweep sweep.yaml --out again</code> gives the same table.csv, hash for "
        "hash, with the same images and versions. Also here: table.csv (a row per run), times.csv, "
        "table.md, table.tex, figures/ as SVG and PDF.</p>"
    )
    return section("Sweep file, and how to reproduce", text + written)
