"""What came out of a run: ``report.html``, one file that needs nothing else, and a table.

The page is made from the files of a run directory alone (summary.json, metrics.jsonl,
plan.yaml), so that it can be made again, elsewhere and without the images. It holds no script
and loads nothing: a content security policy in the page says so to the browser.

Whatever comes from a file is untrusted text: names of labs and reasons of failures were written
by others, and each passes through ``html.escape``.

Shapes: K labs, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cytofed import figures
from cytofed.card import delta_told, holds_against
from cytofed.errors import InputError
from cytofed.files import write_atomically
from cytofed.labels import Scheme, load_scheme
from cytofed.metrics import spread
from cytofed.page import page
from cytofed.plan import Plan, dump_plan, load_plan
from cytofed.simulations.audit_report import VERSION, audit_section
from cytofed.simulations.parts import (
    CSS,
    drawing,
    in_bytes,
    in_epsilon,
    in_seconds,
    number,
    scroll,
    section,
    table_of,
    token,
    warning_box,
)
from cytofed.whose import made_up, whose_of

MANY_ROWS = 30
"""Longer tables show only their first or worst rows and count the rest."""
FEW_ROWS = 10

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Neighbour:
    """A finished run beside this one that differs in its privacy alone; by its folder's name.

    ``epsilon`` of its training as its summary tells it; None: no privacy.
    """

    name: str
    epsilon: float | None
    macro_f1: float


@dataclass(frozen=True)
class Run:
    """The files of a run directory, read."""

    summary: Json
    rounds: tuple[Json, ...]
    plan: Plan
    scheme: Scheme | None
    """None when the plan's label scheme is a file that is not at hand"""
    neighbours: tuple[Neighbour, ...] = ()
    """what accuracy against epsilon is compared with; none for a run without privacy"""
    audit: Json | None = None
    """audit.json, where ``cytofed audit`` has looked at this run"""


def read_run(run_dir: Path) -> Run:
    """Read summary.json, plan.yaml and, if there are rounds, metrics.jsonl.

    A round that was run again after a crash counts as its last line says; a last line that a
    crash cut off is skipped.

    Errors: InputError when a file is missing or is not what it should be.
    """
    summary = _read_summary(run_dir / "summary.json")
    plan = load_plan(run_dir / "plan.yaml")
    try:
        scheme = load_scheme(plan.labels.scheme)
    except InputError:
        scheme = None
    rounds = _read_rounds(run_dir / "metrics.jsonl")
    neighbours = _read_neighbours(run_dir, summary, plan)
    return Run(summary, rounds, plan, scheme, neighbours, _read_audit(run_dir, plan))


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run directory and return its path.

    Guarantees: the same files give the same bytes; an old report stays whole until the new one
    is; no script, nothing loaded from elsewhere.

    Errors: InputError when the run directory lacks a file or holds a broken one.
    """
    page = render_page(read_run(run_dir))
    path = run_dir / "report.html"
    write_atomically(path, page)
    return path


def _read_summary(path: Path) -> Json:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not (path.parent / "plan.yaml").is_file():
            raise InputError(
                f"{path.parent} is no run directory", hint="give the folder that --out named"
            ) from None
        raise InputError(
            f"no summary.json in {path.parent}",
            hint=f"finish the run first: cytofed simulate --resume --out {path.parent}",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(summary, dict) or "status" not in summary:
        raise InputError(f"{path} is not the summary of a run: it has no status")
    return summary


def _read_rounds(path: Path) -> tuple[Json, ...]:
    if not path.exists():
        return ()
    rounds: dict[int, Json] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            rounds[int(entry["round"])] = entry
        except (ValueError, KeyError, TypeError):
            if at == len(lines):
                break
            raise InputError(
                f"{path}, line {at} is not a round: {line[:60]!r}",
                hint="run again with --resume, or remove the line",
            ) from None
    return tuple(rounds[r] for r in sorted(rounds))


def _read_audit(run_dir: Path, plan: Plan) -> Json | None:
    """The audit of this plan's run; None where there is none, or one of another plan."""
    path = run_dir / "audit.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ours = found["plan_sha256"] == plan.sha256 and found["version"] == VERSION
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not what an audit writes", hint="remove it, and audit again"
        ) from None
    return found if ours else None


def _read_neighbours(run_dir: Path, summary: Json, plan: Plan) -> tuple[Neighbour, ...]:
    """Finished runs in the same parent, of the same data and seed and, but for epsilon and sigma
    or for all of ``privacy``, the same plan. What cannot be read is no run to compare with."""
    if plan.privacy.unit == "none":
        return ()
    here = run_dir.resolve()
    found = []
    for folder in sorted(here.parent.iterdir()):
        if folder.resolve() == here or not (folder / "summary.json").is_file():
            continue
        try:
            other = _read_summary(folder / "summary.json")
            same = ("data_sha256", "seed", "status")
            if other.get("global") and all(other.get(k) == summary.get(k) for k in same):
                theirs = load_plan(folder / "plan.yaml")
                if _but_for_privacy(theirs, plan) == _but_for_privacy(plan, plan):
                    score = float(other["global"]["macro_f1"])
                    found.append(Neighbour(folder.name, _training(other["privacy"]), score))
        except (InputError, KeyError, TypeError, ValueError):
            continue
    return tuple(found)


def _but_for_privacy(plan: Plan, like: Plan) -> Plan:
    """The plan without its name, and with that of ``like`` where two plans may differ."""
    if plan.privacy.unit == "none":
        return replace(plan, name="", privacy=like.privacy, evaluation=like.evaluation)
    same = replace(plan.privacy, epsilon=like.privacy.epsilon, sigma=like.privacy.sigma)
    return replace(plan, name="", privacy=same)


def _training(privacy: Json) -> float | None:
    """Epsilon of the object ``privacy`` of a summary, training alone."""
    return None if privacy["unit"] == "none" else float(privacy["epsilon"])


# --- the page -----------------------------------------------------------------------------------


def render_page(run: Run) -> str:
    """The whole page as text."""
    sections = [
        _partition(run),
        _learning(run),
        _classes(run),
        _labs(run),
        _calibration(run),
        _participation(run),
        _cost(run),
        _privacy(run),
        audit_section(run.audit),
        _plan(run),
        _references(run),
    ]
    name = _plan_name(run)
    return page(
        title=f"{name}: cytofed run",
        heading=name,
        headline=_headline(run),
        sections="\n".join(s for s in sections if s),
        css=CSS,
        footer="Made by cytofed. For research; not a medical device.",
    )


def _headline(run: Run) -> str:
    summary = run.summary
    status = str(summary["status"])
    tiles = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>'
        f"<p>{escape(note)}</p></div>"
        for label, value, note in _tiles(run)
    )
    notes = [str(w) for w in summary.get("warnings") or []]
    if summary.get("status") != "completed":
        notes.insert(0, _why_not_completed(run))
    if (summary.get("scores") or {}).get("noised"):
        notes.append("All scores are released scores: computed from counts with noise.")
    boxes = "".join(f'<p class="warning">{escape(n)}</p>' for n in notes)
    return (
        f'<p class="status {token(status)}">{escape(status)}</p>'
        f'<p class="lead">{escape(_in_one_sentence(run))}</p>{boxes}'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _in_one_sentence(run: Run) -> str:
    summary = run.summary
    scores = summary.get("global")
    labs = _cohort(run)
    who = f"{len(labs):,} lab{'s' if len(labs) != 1 else ''}"
    if not scores:
        return f"A run over {who} that left no model to score."
    images = scores.get("images")
    over = f" on {images:,} held-out images" if images else " on held-out images"
    text = f"One model, trained by {who} without sharing images, has macro F1 "
    text += f"{scores['macro_f1']:.3f}{over}."
    central, local = central_gap(summary), local_gaps(summary)
    if central is not None:
        side = "below" if central < 0 else "above"
        text += f" That is {abs(central):.3f} {side} training on all images in one place"
        if local:
            mean = float(np.mean(list(local.values())))
            side = "above" if mean >= 0 else "below"
            text += f", and {abs(mean):.3f} {side} a lab's own model on average"
        text += "."
    elif local:
        mean = float(np.mean(list(local.values())))
        side = "above" if mean >= 0 else "below"
        text += f" That is {abs(mean):.3f} {side} a lab's own model on average."
    return text


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and note of each figure on top of the page."""
    summary = run.summary
    scores = summary.get("global") or {}
    tiles = []
    if scores:
        tolerant = (scores.get("tolerant") or {}).get("macro_f1")
        ends = _interval(scores.get("macro_f1_interval"))
        note = ends or (f"tolerant {tolerant:.3f}" if tolerant is not None else "")
        tiles.append(("macro F1", f"{scores['macro_f1']:.3f}", note))
        accuracy = f"accuracy {scores['accuracy']:.3f}"
        tiles.append(("balanced accuracy", f"{scores['balanced_accuracy']:.3f}", accuracy))
    central = central_gap(summary)
    if central is not None:
        recorded = ((summary.get("gaps") or {}).get("central")) or {}
        ends = _interval([recorded.get("low"), recorded.get("high")])
        tiles.append(("against central", f"{central:+.3f}", ends or "macro F1, same test images"))
    local = local_gaps(summary)
    if local:
        better = sum(g > 0 for g in local.values())
        note = f"better for {better:,} of {len(local):,} labs"
        tiles.append(("against own models", f"{np.mean(list(local.values())):+.3f}", note))
    labs = summary.get("labs")
    if labs:
        result = spread({lab: s["macro_f1"] for lab, s in labs.items()})
        tiles.append(
            ("worst lab", f"{result.worst:.3f}", f"{result.worst_lab}, SD {result.sd:.3f}")
        )
    privacy = summary.get("privacy") or {}
    if privacy.get("unit", "none") == "none":
        tiles.append(("privacy", "none", "not differentially private"))
    else:
        note = f"at delta {delta_told(run.summary)}, per {whose_of(run.summary)}, add-or-remove"
        tiles.append(("epsilon", _epsilon(_whole(privacy)), note))
    timing = summary.get("timing") or {}
    if timing.get("wall_s") is not None:
        tiles.append(("time", in_seconds(timing["wall_s"]), f"{summary.get('rounds', 0)} rounds"))
    return tiles


def _why_not_completed(run: Run) -> str:
    summary = run.summary
    rounds = summary.get("participation") or []
    expected = {lab for entry in rounds for lab in entry.get("expected") or []}
    never = sorted(expected - {lab for entry in rounds for lab in entry.get("received") or []})
    parts = []
    if summary.get("rounds") is not None and summary["rounds"] < run.plan.train.rounds:
        parts.append(f"{summary['rounds']} of {run.plan.train.rounds} rounds were applied")
    if never:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        parts.append(f"never contributed: {', '.join(never[:10])}{more}")
    if summary.get("error"):
        parts.append(str(summary["error"]))
    return f"This run is {summary['status']}" + (f": {'; '.join(parts)}." if parts else ".")


def _partition(run: Run) -> str:
    partition = run.summary.get("partition")
    if not partition or not partition.get("labs"):
        return ""
    labs, codes = list(partition["labs"]), list(partition["codes"])
    counts_KC = np.array(partition["train_counts_KC"], dtype=np.int64).reshape(len(labs), -1)
    held_C = counts_KC.sum(axis=0) > 0
    shown = [code for code, held in zip(codes, held_C, strict=True) if held]
    figure = figures.partition_figure(labs, shown, counts_KC[:, held_C])
    caption = "Training images per lab and class. A dot: the lab has none of this class."
    if len(labs) > figures.MANY_LABS:
        caption = f"Training images per class over {len(labs):,} labs, and sizes of labs."
    note = ""
    if made_up(run.summary):
        note = warning_box(
            "Patients of this run are pseudo-patients: the data names none, so the simulation "
            "made groups of images. What they pay shows what the method costs, not how any "
            "real person is protected."
        )
    test_KC = partition.get("test_counts_KC")
    tested = int(np.sum(test_KC)) if test_KC is not None else 0
    lead = f"Cut by <code>{escape(str(partition.get('spec', '')))}</code>: "
    lead += f"{int(counts_KC.sum()):,} images to train on"
    lead += f", {tested:,} held out for tests." if tested else "."
    label = f"training images of {len(labs)} labs by class"
    return section(
        "Who holds what",
        f"<p>{lead}</p>{note}" + drawing(figure, "partition", label, caption),
    )


def _learning(run: Run) -> str:
    scored = [e for e in run.rounds if e.get("global")]
    losses = [e.get("loss") or {} for e in run.rounds]
    parts = []
    if scored:
        names = {
            "macro F1": "macro_f1",
            "balanced accuracy": "balanced_accuracy",
            "accuracy": "accuracy",
        }
        numbers = [int(e["round"]) for e in scored]
        scores = {name: [e["global"].get(key) for e in scored] for name, key in names.items()}
        baselines = run.summary.get("baselines") or {}
        levels = {}
        if baselines.get("central"):
            levels["central, macro F1"] = float(baselines["central"]["macro_f1"])
        if baselines.get("local"):
            own = [s["macro_f1"] for s in baselines["local"].values()]
            levels["mean of own models"] = float(np.mean(own))
        figure = figures.score_figure(numbers, scores, levels)
        caption = "Scores of the global model on all held-out images."
        parts.append(drawing(figure, "scores", "scores over rounds", caption))
    if any(losses):
        figure = figures.loss_figure([int(e["round"]) for e in run.rounds], losses)
        caption = "Training loss at the labs, each on its own images."
        parts.append(drawing(figure, "loss", "training loss over rounds", caption))
    if not parts:
        return ""
    return section("Learning", f'<div class="grid">{"".join(parts)}</div>')


def _classes(run: Run) -> str:
    scores = run.summary.get("global")
    if not scores:
        return ""
    parts = [_confusion(run), _per_class(run, scores)]
    return section("Classes", "".join(parts))


def _confusion(run: Run) -> str:
    confusion = run.summary.get("confusion")
    if not confusion:
        return ""
    codes = list(confusion["codes"])
    # Noise under differential privacy can push counts below 0.
    counts_CC = np.maximum(np.array(confusion["counts"], dtype=np.int64), 0)
    tolerance_CC = np.eye(len(codes), dtype=bool)
    caption = "Percent of each true class given to each class."
    if run.scheme is not None and codes == list(run.scheme.codes):
        tolerance_CC = np.asarray(run.scheme.tolerance_CC, dtype=bool)
        if run.scheme.tolerated:
            caption += " Framed: pairs that the tolerant scores count as right."
    figure = figures.confusion_figure(codes, counts_CC, tolerance_CC)
    return drawing(figure, "confusion", "confusion matrix", caption)


def _per_class(run: Run, scores: Json) -> str:
    per_class = scores.get("per_class") or {}
    codes = [code for code, s in per_class.items() if s["support"] > 0]
    if not codes:
        return ""
    loose = (scores.get("tolerant") or {}).get("per_class")
    figure = figures.class_figure(
        codes,
        [per_class[c]["f1"] for c in codes],
        [loose[c]["f1"] for c in codes] if loose else None,
        [per_class[c]["support"] for c in codes],
    )
    caption = "F1 per class, most test images first."
    order = sorted(codes, key=lambda c: (-per_class[c]["support"], c))
    head = ["class", "", "images", "precision", "recall", "F1"]
    head += ["tolerant precision", "tolerant recall", "tolerant F1"] if loose else []
    rows = []
    for code in order:
        strict = per_class[code]
        name = run.scheme.names.get(code, "") if run.scheme else ""
        row = [code, name, f"{strict['support']:,}", *_prf(strict)]
        rows.append(row + (_prf(loose[code]) if loose else []))
    without = scores.get("macro_f1_without_tiny")
    tiny = sorted(c for c in codes if per_class[c]["support"] < 10)
    note = ""
    if tiny and without is not None:
        note = (
            f"<p>Without the classes of fewer than 10 test images ({escape(', '.join(tiny))}) "
            f"macro F1 is {without:.3f}: with so few images their scores are mostly chance.</p>"
        )
    return (
        '<div class="grid uneven">'
        + drawing(figure, "classes", "F1 per class", caption)
        + f"<div>{note}{scroll(table_of(head, rows, texts=2))}</div></div>"
    )


def _prf(scores: Json) -> list[str]:
    """Two digits, as published: one image of a hundred is the third."""
    return [f"{scores[key]:.2f}" for key in ("precision", "recall", "f1")]


def _labs(run: Run) -> str:
    summary = run.summary
    labs: Json = summary.get("labs") or {}
    if not labs:
        if summary.get("global") and run.plan.privacy.unit != "none":
            text = (
                "Scores per lab are off (evaluation.per_lab is false): under differential privacy "
                "only the sum over labs is told, with noise."
            )
            return section("Labs", f"<p>{text}</p>")
        return ""
    baselines = summary.get("baselines") or {}
    own = {lab: float(s["macro_f1"]) for lab, s in (baselines.get("local_own") or {}).items()}
    federated = {lab: float(s["macro_f1"]) for lab, s in labs.items()}
    result = spread(federated)
    lead = (
        f"Macro F1 over labs: mean {result.mean:.3f}, standard deviation {result.sd:.3f}, worst "
        f"{result.worst:.3f} ({escape(result.worst_lab)}). Each on the lab's own test images."
    )
    pooled = local_gaps(summary)
    shown = list(labs)
    if len(labs) > MANY_ROWS:
        shown = sorted(labs, key=lambda lab: (federated[lab], lab))[:FEW_ROWS]
    trained = _trained_images(summary)
    head = ["lab", "trained on", "macro F1", "own model", "difference", "on all test images"]
    head += ["blast recall"] if _blasts(labs) else []
    head += (
        ["recall of classes it lacks"] if any(labs[k].get("absent_recall") for k in labs) else []
    )
    rows = []
    for lab in shown:
        row = [lab, f"{trained[lab]:,}" if lab in trained else "", f"{federated[lab]:.3f}"]
        row += [f"{own[lab]:.3f}", f"{federated[lab] - own[lab]:+.3f}"] if lab in own else ["", ""]
        row.append(f"{pooled[lab]:+.3f}" if lab in pooled else "")
        if _blasts(labs):
            blast = labs[lab].get("blasts")
            row.append(_with_interval(blast) if blast else "–")
        if "recall of classes it lacks" in head:
            lacking = labs[lab].get("absent_recall") or {}
            row.append(f"{np.mean(list(lacking.values())):.3f}" if lacking else "–")
        rows.append(row)
    empty = {i for i in range(3, 6) if not any(row[i] for row in rows)}
    head = [h for i, h in enumerate(head) if i not in empty]
    rows = [[v for i, v in enumerate(row) if i not in empty] for row in rows]
    more = ""
    if len(labs) > len(shown):
        more = f"<p>The {len(shown)} worst of {len(labs):,} labs; all are in summary.json.</p>"
    figure = figures.lab_figure(federated, own)
    caption = "Macro F1 of the federated model at each lab"
    caption += ", and of the model the lab trained alone." if own else "."
    note = ""
    if pooled:
        note = (
            "<p><b>Difference</b>: federated minus the lab's own model, on the lab's own test "
            "images. <b>On all test images</b>: the same on the test images of all labs.</p>"
        )
    return section(
        "Labs",
        f'<p>{lead}</p><div class="grid uneven">'
        + drawing(figure, "labs", "macro F1 per lab", caption)
        + f"<div>{scroll(table_of(head, rows, texts=1))}{more}{note}</div></div>",
    )


def _blasts(labs: Json) -> bool:
    return any(scores.get("blasts") for scores in labs.values())


def _with_interval(blasts: Json) -> str:
    return f"{blasts['recall']:.3f} ({blasts['low']:.2f} to {blasts['high']:.2f})"


def _trained_images(summary: Json) -> dict[str, int]:
    partition = summary.get("partition") or {}
    totals = [int(sum(row)) for row in partition.get("train_counts_KC") or []]
    return dict(zip(partition.get("labs") or [], totals, strict=False))


def _calibration(run: Run) -> str:
    scores = run.summary.get("global") or {}
    points = scores.get("reliability")
    if not points:
        return ""
    caption = f"Expected calibration error {scores['ece']:.3f} (15 bins). Below the line: "
    caption += "overconfident."
    found = scores.get("calibration")
    if found:
        caption += (
            f" Temperature {found['temperature']:.2f}, fitted to images that labs kept from "
            f"training; without it the error was {found['ece_before']:.3f}."
        )
    figure = figures.reliability_figure(points)
    parts = [drawing(figure, "reliability", "accuracy against confidence", caption)]
    if scores.get("accuracy_coverage"):
        figure = figures.coverage_figure(scores["accuracy_coverage"])
        caption = "What is gained by leaving the least certain images to a person."
        parts.append(drawing(figure, "coverage", "accuracy against coverage", caption))
    blasts, lead = scores.get("blasts"), ""
    if blasts:
        lead = (
            f"<p>Recall of blasts {_with_interval(blasts)}: 95 % interval (Wilson) over "
            f"{blasts['images']:,} images, as if each were of another patient.</p>"
        )
    return section("Confidence", f'{lead}<div class="grid">{"".join(parts)}</div>')


def _participation(run: Run) -> str:
    entries = run.summary.get("participation") or []
    if not entries:
        return ""
    labs = _cohort(run)
    figure = figures.participation_figure(
        [int(e["round"]) for e in entries],
        labs,
        [list(e.get("expected") or []) for e in entries],
        [list(e.get("received") or []) for e in entries],
    )
    absences = [
        [str(e["round"]), lab, str(reason)]
        for e in entries
        for lab, reason in (e.get("absent") or {}).items()
    ]
    text = "<p>Every lab contributed to every round.</p>"
    if absences:
        times = f"{len(absences):,} time{'s' if len(absences) > 1 else ''}"
        text = f"<p>Labs were absent {times}"
        text += f"; the first {MANY_ROWS}:" if len(absences) > MANY_ROWS else ":"
        head = ["round", "lab", "reason"]
        text += "</p>" + scroll(table_of(head, absences[:MANY_ROWS], texts=3))
    picture = drawing(figure, "participation", "which lab contributed in which round", "")
    return section("Participation", picture + text)


def _cost(run: Run) -> str:
    summary = run.summary
    wire, timing = summary.get("wire") or {}, summary.get("timing") or {}
    parts = []
    rounds = [e for e in run.rounds if e.get("wall_s") is not None]
    if rounds:
        figure = figures.time_figure(
            [int(e["round"]) for e in rounds],
            [float(e["wall_s"]) for e in rounds],
            [float(e.get("train_s") or 0) for e in rounds],
        )
        text = ""
        if timing.get("wall_s"):
            text = f"{in_seconds(timing['wall_s'])} in all, {in_seconds(timing['train_s'])} of it "
            text += f"training; {in_seconds(timing['overhead_s'])} for everything else."
        parts.append(drawing(figure, "time", "seconds per round", text))
    moved = [e for e in run.rounds if e.get("up_bytes") is not None]
    if moved:
        figure = figures.bytes_figure(
            [int(e["round"]) for e in moved],
            [int(e["up_bytes"]) for e in moved],
            [int(e.get("down_bytes") or 0) for e in moved],
        )
        text = ""
        if wire.get("up_bytes_per_lab_round") is not None:
            text = f"A lab sends {in_bytes(wire['up_bytes_per_lab_round'])} a round and receives "
            text += f"{in_bytes(wire.get('down_bytes_per_lab_round') or 0)}. "
            sums = "sums of labs only" if wire.get("secure_aggregation") else "each lab's update"
            text += f"The coordinator sees {sums}."
        parts.append(drawing(figure, "bytes", "bytes per round", text))
    return section("Cost", f'<div class="grid">{"".join(parts)}</div>') if parts else ""


def _privacy(run: Run) -> str:
    privacy = run.summary.get("privacy") or {}
    unit = str(privacy.get("unit", "none"))
    anonymous = (
        "A trained model is not anonymous by itself (EDPB Opinion 28/2024): whoever has it can "
        "ask it questions about its training images."
    )
    if unit == "none":
        text = "Not differentially private. The images stayed at the labs, but nothing bounds "
        text += f"what the model, or a lab's updates, say about one patient. {anonymous}"
        return section("Privacy", warning_box(text))
    parts = []
    if unit == "image":
        parts.append(
            warning_box(
                "The unit is one image, not one patient: a patient with many images is protected "
                "much less than epsilon says."
            )
        )
    if made_up(run.summary):
        parts.append(
            warning_box("The patients are pseudo-patients: this epsilon protects no real person.")
        )
    if str(privacy.get("noise", "")).startswith("seeded"):
        parts.append(
            warning_box(
                "The noise of this simulation is seeded, so that it can be repeated: whoever knows "
                "the seed can take it off. Epsilon is what the same plan gives in a deployment."
            )
        )
    claim = (
        f"epsilon {_epsilon(_whole(privacy))} at delta {delta_told(run.summary)}, per "
        f"{whose_of(run.summary)}, add-or-remove"
    )
    scores = privacy.get("evaluation")
    spent = "It is for training; no scores were paid for."
    if scores:
        spent = (
            f"It is for all that a lab tells: training alone costs {_epsilon(privacy)}, the "
            f"{number(scores.get('releases'))} releases of noised scores alone "
            f"{_epsilon(scores)} (sigma {number(scores.get('sigma'))})."
        )
    how = (
        f"Noise of {number(privacy.get('sigma'))} times the clipping norm is added at each lab, "
        f"{number(privacy.get('steps'))} steps, sampling rate "
        f"{number(privacy.get('sampling_rate'))}. {holds_against(run.summary)}"
    )
    together = (
        "A patient may be known to several labs: the epsilons of these labs add up."
        if run.plan.patients == "may_overlap"
        else "A patient is at one lab: the largest epsilon of a lab counts."
    )
    labs = privacy.get("labs") or {}
    worst = sorted(labs, key=lambda lab: (-(labs[lab].get("epsilon") or math.inf), lab))
    listed = worst if len(worst) <= MANY_ROWS else worst[:FEW_ROWS]
    rows = [[lab, _epsilon(labs[lab])] for lab in listed]
    table = scroll(table_of(["lab", "epsilon"], rows, texts=1)) if rows else ""
    if len(labs) > len(listed):
        table += f"<p>The {len(listed)} largest of {len(labs):,}.</p>"
    text = f"{escape(spent)} {escape(how)} {together}"
    parts.append(f'<p class="claim">{escape(claim)}</p><p>{text}</p>{table}')
    parts.append(_released(run))
    parts.append(_accuracy_against_epsilon(run))
    parts.append(f"<p>{anonymous} Epsilon bounds how much.</p>")
    return section("Privacy", "".join(parts))


def _released(run: Run) -> str:
    """Scores as labs let them out, beside the exact ones that only a simulation has."""
    released = run.summary.get("released")
    if not released:
        return ""
    exact = run.summary.get("global") or {}
    lead = (
        "Released scores are what a deployment would see: computed from the counts of "
        f"{number(released.get('labs'))} labs, with noise of standard deviation "
        f"{number(released.get('noise_sd'))} on each count. All other scores of this page are "
        "exact, and stay in the simulation."
    )
    if released.get("missing"):
        return f"<p>{escape(lead)} Here there are none: {escape(str(released['missing']))}.</p>"
    names = {
        "macro_f1": "macro F1",
        "balanced_accuracy": "balanced accuracy",
        "accuracy": "accuracy",
        "weighted_f1": "weighted F1",
    }
    rows = [
        [name, _score(released.get(key)), _score(exact.get(key))] for key, name in names.items()
    ]
    return f"<p>{escape(lead)}</p>" + scroll(table_of(["", "released", "exact"], rows, texts=1))


def _accuracy_against_epsilon(run: Run) -> str:
    privacy = run.summary.get("privacy") or {}
    spent = [(float(e["epsilon"]), float(e["macro_f1"])) for e in privacy.get("by_round") or []]
    if not spent:
        return ""
    levels = [n.macro_f1 for n in run.neighbours if n.epsilon is None]
    figure = figures.epsilon_figure(
        spent,
        {n.name: (n.epsilon, n.macro_f1) for n in run.neighbours if n.epsilon is not None},
        max(levels, default=None),
        meaning=f"delta {number(privacy.get('delta'))}, per {whose_of(run.summary)}, add-or-remove",
    )
    caption = (
        "Macro F1 of the model after each round, against what a lab that came to every round had "
        "spent on training by then: composed round by round by RDP, and never more than the price "
        "of the whole training by PRV, which a part of it cannot pass."
    )
    table = ""
    if run.neighbours:
        caption += " Other runs: those beside this one with the same data, seed and plan."
        score = (run.summary.get("global") or {}).get("macro_f1", math.nan)
        this = Neighbour("this run", privacy.get("epsilon"), score)
        ends = sorted((this, *run.neighbours), key=lambda n: (n.epsilon or math.inf, n.name))
        rows = [[n.name, in_epsilon(n.epsilon), f"{n.macro_f1:.3f}"] for n in ends[:MANY_ROWS]]
        table = scroll(table_of(["run", "epsilon of training", "macro F1"], rows, texts=1))
        table += "<p>A dash: without differential privacy.</p>" if levels else ""
    picture = drawing(figure, "epsilon", "macro F1 against epsilon", caption)
    return f'<div class="grid">{picture}<div>{table}</div></div>'


def _plan(run: Run) -> str:
    summary = run.summary
    seed = summary.get("seed", run.plan.train.seed)
    command = f"cytofed simulate plan.yaml --data DIR --seed {seed} --out again"
    command = str(summary.get("command") or command)
    versions = summary.get("versions") or {}
    facts = [["plan", str(summary.get("plan_sha256", ""))]]
    facts += [["weights", str(summary.get("weights_sha256") or "none")], ["seed", str(seed)]]
    facts += [[str(name), str(version)] for name, version in versions.items()]
    return section(
        "Plan, and how to reproduce",
        f"<p>In the run directory, with the same images and versions:</p>"
        f"{scroll(f'<pre>{escape(command)}</pre>')}"
        f"<p>gives the same weights, hash for hash.</p>"
        f"{scroll(table_of(['', ''], facts, texts=2, wrap=True))}"
        f"<details><summary>The plan, all keys written out</summary>"
        f"{scroll(f'<pre>{escape(dump_plan(run.plan))}</pre>')}</details>",
    )


def _references(run: Run) -> str:
    entries = [
        "Matek et al., Highly accurate differentiation of bone marrow cell morphologies using "
        "deep neural networks, Blood 2021, doi:10.1182/blood.2020010568 (tolerant scores).",
        "McMahan et al., Communication-efficient learning of deep networks from decentralized "
        "data, AISTATS 2017, arXiv:1602.05629 (federated averaging).",
        "Guo et al., On calibration of modern neural networks, ICML 2017, arXiv:1706.04599 "
        "(calibration error).",
    ]
    if run.plan.privacy.unit != "none":
        entries.append(
            "Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133."
        )
    if run.audit:
        entries.append(
            "Steinke, Nasr, Jagielski, Privacy auditing with one (1) training run, NeurIPS 2023, "
            "arXiv:2305.08846."
        )
    if (run.summary.get("wire") or {}).get("secure_aggregation"):
        entries.append(
            "Bonawitz et al., Practical secure aggregation for privacy-preserving machine "
            "learning, CCS 2017, doi:10.1145/3133956.3133982."
        )
    entries += [str(a) for a in run.summary.get("attribution") or []]
    items = "".join(f"<li>{escape(e)}</li>" for e in entries)
    scores = (
        "<p>Macro: mean over classes with test images. Tolerant: a prediction in a tolerated pair "
        "of the truth counts as right for its precision and its recall. Images whose label allows "
        "several classes are in no score.</p>"
    )
    return section("Scores and references", f"{scores}<ul>{items}</ul>")


# --- what sections are made of ------------------------------------------------------------------


def central_gap(summary: Json) -> float | None:
    """Macro F1, federated minus central, on the same test images; None without the baseline."""
    central = (summary.get("baselines") or {}).get("central")
    if not central or not summary.get("global"):
        return None
    return float(summary["global"]["macro_f1"]) - float(central["macro_f1"])


def local_gaps(summary: Json) -> dict[str, float]:
    """Macro F1, federated minus each lab's own model, on the test images of all labs."""
    local = (summary.get("baselines") or {}).get("local")
    if not local or not summary.get("global"):
        return {}
    ours = float(summary["global"]["macro_f1"])
    return {lab: ours - float(scores["macro_f1"]) for lab, scores in local.items()}


def _cohort(run: Run) -> list[str]:
    """All labs, in the order of the partition where there is one."""
    labs = dict.fromkeys((run.summary.get("partition") or {}).get("labs") or [])
    for entry in run.summary.get("participation") or []:
        labs.update(dict.fromkeys(entry.get("expected") or []))
    return list(labs or run.summary.get("labs") or {})


def _plan_name(run: Run) -> str:
    return str(run.summary.get("plan_name") or run.plan.name)


def _whole(privacy: Json) -> Json:
    """What the object ``privacy`` of a summary promises for all that left: scores too."""
    whole: Json = privacy.get("total") or privacy
    return whole


def _epsilon(guarantee: Json) -> str:
    return in_epsilon(guarantee.get("epsilon"))


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float | None] | None) -> str:
    if not ends or ends[0] is None or ends[1] is None:
        return ""
    return f"95% interval {ends[0]:.3f} to {ends[1]:.3f}"


# --- the terminal -------------------------------------------------------------------------------


def render_summary(summary: Json, console: Console, *, run_dir: Path | None = None) -> None:
    """Print what came out of a run: status, scores, classes, labs, cost, where the report is."""
    colour = {"completed": "green", "incomplete": "yellow"}.get(str(summary["status"]), "red")
    rounds = summary.get("rounds", 0)
    console.print(
        Text.assemble(("run ", ""), (str(summary["status"]), colour), f", {rounds} rounds")
    )
    for warning in summary.get("warnings") or []:
        console.print(Text(f"warning: {warning}", style="yellow"))
    scores = summary.get("global")
    if scores:
        _print_scores(scores, summary, console)
        _print_classes(scores, console)
    if summary.get("labs"):
        _print_labs(summary, console)
    wire, timing = summary.get("wire") or {}, summary.get("timing") or {}
    lines = [privacy_line(summary)]
    if wire.get("up_bytes_per_lab_round") is not None:
        up, down = wire["up_bytes_per_lab_round"], wire.get("down_bytes_per_lab_round") or 0
        lines.append(f"bytes    {in_bytes(up)} up, {in_bytes(down)} down per lab and round")
    if timing.get("wall_s") is not None:
        lines.append(
            f"time     {in_seconds(timing['wall_s'])}, training "
            f"{in_seconds(timing['train_s'])}, everything else {in_seconds(timing['overhead_s'])}"
        )
    if summary.get("weights_sha256"):
        lines.append(f"weights  {summary['weights_sha256']}")
    if run_dir is not None:
        lines.append(f"report   {run_dir / 'report.html'}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def render_scores(scores: Json, console: Console) -> None:
    """Print the scores of one model: the object ``global`` of summary.json."""
    _print_scores(scores, {}, console)
    _print_classes(scores, console)


def _print_scores(scores: Json, summary: Json, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ["macro F1", "tolerant", "balanced accuracy", "accuracy", "weighted F1", "ECE"]
    values = [
        scores["macro_f1"],
        (scores.get("tolerant") or {}).get("macro_f1"),
        *(scores.get(key) for key in ("balanced_accuracy", "accuracy", "weighted_f1", "ece")),
    ]
    central, local = central_gap(summary), local_gaps(summary)
    cells = [f"{v:.3f}" if v is not None else "–" for v in values]
    if central is not None:
        names.append("minus central")
        cells.append(f"{central:+.3f}")
    if local:
        names.append("minus own models")
        cells.append(f"{np.mean(list(local.values())):+.3f}")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row(*cells)
    console.print(table)
    console.print()


def _print_classes(scores: Json, console: Console) -> None:
    per_class = scores.get("per_class") or {}
    loose = (scores.get("tolerant") or {}).get("per_class") or {}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("class")
    for name in ("images", "precision", "recall", "F1", "tolerant F1"):
        table.add_column(name, justify="right")
    shown = [code for code, s in per_class.items() if s["support"] > 0]
    for code in sorted(shown, key=lambda c: (-per_class[c]["support"], c)):
        strict = per_class[code]
        tolerant = f"{loose[code]['f1']:.2f}" if code in loose else "–"
        table.add_row(Text(code), f"{strict['support']:,}", *_prf(strict), tolerant)
    console.print(table)
    console.print()


def _print_labs(summary: Json, console: Console) -> None:
    labs: Json = summary["labs"]
    federated = {lab: float(s["macro_f1"]) for lab, s in labs.items()}
    own = (summary.get("baselines") or {}).get("local_own") or {}
    pooled, trained = local_gaps(summary), _trained_images(summary)
    result = spread(federated)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("lab")
    names = ["trained on", "macro F1"] + (["own model"] if own else [])
    for name in names + (["gain on all test images"] if pooled else []):
        table.add_column(name, justify="right")
    shown = list(labs)
    if len(labs) > MANY_ROWS:
        shown = sorted(labs, key=lambda lab: (federated[lab], lab))[:5]
    for lab in shown:
        row = [f"{trained[lab]:,}" if lab in trained else "–", f"{federated[lab]:.3f}"]
        if own:
            row.append(f"{own[lab]['macro_f1']:.3f}" if lab in own else "–")
        if pooled:
            row.append(f"{pooled[lab]:+.3f}" if lab in pooled else "–")
        mark = " (worst)" if lab == result.worst_lab and len(labs) > 1 else ""
        table.add_row(Text(lab + mark), *row)
    console.print(table)
    if len(labs) > len(shown):
        text = f"the {len(shown)} worst of {len(labs):,} labs; mean {result.mean:.3f}, "
        console.print(Text(text + f"standard deviation {result.sd:.3f}"))
    console.print()


def privacy_line(summary: Json) -> str:
    """The guarantee of a run in one line, never without its delta, unit and adversary."""
    privacy = summary.get("privacy") or {}
    who = whose_of(summary)
    if who == "none":
        return "privacy  none: this model is not differentially private"
    whole = _whole(privacy)
    line = (
        f"privacy  epsilon {_epsilon(whole)} at delta {delta_told(summary)}, per {who}, "
        "add-or-remove"
    )
    return line + (", training and scores" if privacy.get("evaluation") else "")
