"""Figures of reports: matplotlib ``Figure`` values, and their SVG for a page in light or dark.

Figures are drawn in the palette of light paper. ``inline_svg`` turns each colour of the palette
into a CSS variable with that colour as its fallback, so that one SVG serves both themes. Beyond
``MANY_LABS`` labs a figure shows their distribution instead of a row for each, so that its size
does not grow with their number. No pyplot: nothing global, the same figure gives the same bytes.

Shapes: K labs, C classes, R rounds.
"""

from __future__ import annotations

import functools
import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cytofed.files import atomically
from cytofed.page import FIRST, GRID, INK, MUTED, PAPER, SECOND, THIRD

MANY_LABS = 30
MANY_ROUNDS = 60
MANY_SERIES = 6

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    FIRST: "first",
    SECOND: "second",
    THIRD: "third",
}

_STYLE: Any = {  # Any: the keys' type differs between matplotlib's versions
    "svg.fonttype": "none",
    "text.parse_math": False,  # a lab may be called "$x$"
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}

P = ParamSpec("P")
T = TypeVar("T")


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw under our settings; matplotlib reads many of them only while it draws."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with mpl.rc_context(_STYLE), warnings.catch_warnings():
            # The reader's own fonts show the text, whatever DejaVu lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            return draw(*args, **kwargs)

    return styled


@_styled
def inline_svg(figure: Figure, *, name: str, label: str, min_width_px: int = 0) -> str:
    """The figure as an ``<svg>`` element for an HTML page.

    ``name`` keeps element ids apart on one page; ``label`` is read to those who cannot see it;
    ``min_width_px``: below this width the page scrolls the figure sideways.

    Guarantees: the same figure and arguments give the same text; no script, no reference outside
    the element; text of the figure is escaped.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    viewbox = re.search(r'viewBox="([^"]+)"', text)
    assert viewbox is not None
    style = f' style="min-width:{min_width_px}px"' if min_width_px else ""
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'role="img" aria-label="{html.escape(label)}" viewBox="{viewbox[1]}"{style} '
        'stroke-linejoin="round" stroke-linecap="butt">'
    )
    text = re.sub(r"<svg.*?>", lambda _: root, text, count=1, flags=re.DOTALL)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"<g/>| transform=\"rotate\(-0 [^)]*\)\"", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return re.sub(r"\n\s*", "\n", text).strip()


def tolerance_order(tolerance_CC: NDArray[np.bool_], weight_C: NDArray[Any]) -> list[int]:
    """An order of classes in which tolerated pairs are neighbours where that can be.

    Chains of tolerated pairs (the maturation lines) come first, heaviest chain first, then the
    other classes by ``weight_C``.
    """
    classes = len(tolerance_CC)
    near = {c: [int(d) for d in np.flatnonzero(tolerance_CC[c]) if d != c] for c in range(classes)}
    chains: list[list[int]] = []
    seen: set[int] = set()
    for start in sorted(range(classes), key=lambda c: (len(near[c]), c)):
        chain, stack = [], [start]
        while stack:
            c = stack.pop()
            if c not in seen:
                seen.add(c)
                chain.append(c)
                stack.extend(reversed(near[c]))
        if chain:
            chains.append(chain)
    chains.sort(key=lambda chain: (len(chain) == 1, -sum(weight_C[c] for c in chain), chain))
    return [c for chain in chains for c in chain]


@_styled
def partition_figure(
    labs: Sequence[str], codes: Sequence[str], counts_KC: NDArray[np.int64]
) -> Figure:
    """Who holds what: training images of each lab and class, or of many labs their spread."""
    if len(labs) > MANY_LABS:
        return _partition_of_many(codes, counts_KC)
    rows, columns = counts_KC.shape
    figure = Figure(figsize=(max(4.6, 1.1 + 0.36 * (columns + 2)), 0.7 + 0.3 * rows))
    axes = figure.subplots()
    # Square root: a class of 8 images is to be seen next to one of 29,000.
    strength_KC = np.sqrt(counts_KC / max(1, counts_KC.max()))
    for k, c in zip(*np.nonzero(counts_KC), strict=True):
        _cell(axes, int(c), int(k), float(strength_KC[k, c]), _short(int(counts_KC[k, c])))
    for k, c in zip(*np.nonzero(counts_KC == 0), strict=True):
        dot = axes.text(c, k, "·", ha="center", va="center", color=MUTED)
        dot.set_in_layout(False)
    for k, total in enumerate(counts_KC.sum(axis=1)):
        axes.text(columns + 0.1, k, f"{total:,}", ha="left", va="center", color=INK, fontsize=8)
    axes.text(columns + 0.1, -0.85, "all", ha="left", va="center", color=MUTED, fontsize=8)
    _matrix_axes(axes, columns, rows, list(codes), [_clip(lab) for lab in labs])
    axes.set_xlim(-0.5, columns + 1.6)
    return figure


def _partition_of_many(codes: Sequence[str], counts_KC: NDArray[np.int64]) -> Figure:
    figure = Figure(figsize=(7.6, 2.9))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    low_C, middle_C, high_C = np.quantile(counts_KC, (0.05, 0.5, 0.95), axis=0)
    x_C = np.arange(len(codes))
    left.vlines(x_C, low_C, high_C, color=FIRST, linewidth=5, alpha=0.3)
    left.plot(x_C, middle_C, "o", color=FIRST, markersize=4)
    left.set_xticks(x_C, codes, rotation=90)
    left.set_ylabel("training images per lab")
    left.set_title(f"median of {len(counts_KC):,} labs, 5-95% of them as bars", loc="left")
    left.set_ylim(bottom=0)
    right.hist(counts_KC.sum(axis=1), bins=20, color=FIRST, alpha=0.75)
    right.set_xlabel("training images of a lab")
    right.set_ylabel("labs")
    for axes in (left, right):
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
    return figure


@_styled
def score_figure(
    rounds_R: Sequence[int],
    scores: Mapping[str, Sequence[float | None]],
    levels: Mapping[str, float],
) -> Figure:
    """Scores over rounds, with horizontal ``levels`` (baselines) to compare with."""
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    styles = (("-", FIRST), ("--", THIRD), (":", MUTED))
    for (name, values), (dash, colour) in zip(scores.items(), styles, strict=False):
        points = [(r, v) for r, v in zip(rounds_R, values, strict=True) if v is not None]
        marker = "o" if len(points) <= MANY_ROUNDS else ""
        axes.plot(
            *zip(*points, strict=True) if points else ([], []),
            linestyle=dash,
            color=colour,
            marker=marker,
            markersize=3,
            label=name,
        )
    for (name, level), dashes in zip(levels.items(), ((6, 2), (2, 2)), strict=False):
        axes.axhline(level, color=SECOND, linewidth=1.2, dashes=dashes, label=f"{name} {level:.3f}")
    axes.set_ylim(0, 1)
    _rounds_axis(axes)
    return _legend_below(figure, axes)


@_styled
def loss_figure(rounds_R: Sequence[int], losses: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss over rounds: mean over labs, and each lab or the spread of many."""
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    rows = [(r, row) for r, row in zip(rounds_R, losses, strict=True) if row]
    rounds = [r for r, _ in rows]
    labs = sorted({lab for _, row in rows for lab in row})
    if len(labs) <= MANY_LABS:
        for i, lab in enumerate(labs):
            points = [(r, row[lab]) for r, row in rows if lab in row]
            name = "each lab" if i == 0 else None
            axes.plot(*zip(*points, strict=True), color=MUTED, alpha=0.5, linewidth=1, label=name)
    else:
        bands = np.array([np.quantile(list(row.values()), (0.05, 0.95)) for _, row in rows])
        axes.fill_between(
            rounds, bands[:, 0], bands[:, 1], color=MUTED, alpha=0.25, linewidth=0, label="5-95%"
        )
    means = [float(np.mean(list(row.values()))) for _, row in rows]
    marker = "o" if len(rounds) <= MANY_ROUNDS else ""
    axes.plot(rounds, means, color=FIRST, marker=marker, markersize=3, label="mean of labs")
    axes.set_ylim(bottom=0)
    _rounds_axis(axes)
    return _legend_below(figure, axes)


@_styled
def confusion_figure(
    codes: Sequence[str], counts_CC: NDArray[np.int64], tolerance_CC: NDArray[np.bool_]
) -> Figure:
    """Share of each true class (rows) given to each class (columns), tolerated pairs framed."""
    order = tolerance_order(tolerance_CC, counts_CC.sum(axis=1))
    seen_C = (counts_CC.sum(axis=0) + counts_CC.sum(axis=1)) > 0
    order = [c for c in order if seen_C[c]]
    size = len(order)
    matrix_CC = counts_CC[np.ix_(order, order)]
    support_C = matrix_CC.sum(axis=1)
    share_CC = matrix_CC / np.maximum(1, support_C)[:, None]
    figure = Figure(figsize=(max(4.2, 1.6 + 0.33 * size), max(3.2, 0.9 + 0.31 * size)))
    axes = figure.subplots()
    for row, column in zip(*np.nonzero(matrix_CC), strict=True):
        share = float(share_CC[row, column])
        text = f"{100 * share:.0f}" if share >= 0.005 else ""
        _cell(axes, int(column), int(row), share, text)
    tolerated_CC = tolerance_CC[np.ix_(order, order)] & ~np.eye(size, dtype=bool)
    for row, column in zip(*np.nonzero(tolerated_CC), strict=True):
        corner = (column - 0.45, row - 0.45)
        frame = Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=SECOND, linewidth=1.1)
        frame.set_in_layout(False)
        axes.add_patch(frame)
    for row, support in enumerate(support_C):
        axes.text(
            size - 0.3, row, f"{support:,}", ha="left", va="center", color=MUTED, fontsize=7.5
        )
    axes.text(size - 0.3, -0.9, "images", ha="left", va="center", color=MUTED, fontsize=7.5)
    names = [codes[c] for c in order]
    _matrix_axes(axes, size, size, names, names)
    axes.set_xlim(-0.5, size + 1.1)
    axes.set_xlabel("predicted")
    axes.xaxis.set_label_position("top")
    axes.set_ylabel("truth")
    return figure


@_styled
def class_figure(
    codes: Sequence[str],
    strict_C: Sequence[float],
    tolerant_C: Sequence[float] | None,
    support_C: Sequence[int],
) -> Figure:
    """F1 per class, strict and tolerant, the classes with most test images on top."""
    order = sorted(range(len(codes)), key=lambda c: (-support_C[c], codes[c]))
    figure = Figure(figsize=(5.2, 0.8 + 0.24 * len(codes)))
    axes = figure.subplots()
    y_C = np.arange(len(order))
    if tolerant_C is not None:
        axes.barh(
            y_C,
            [tolerant_C[c] for c in order],
            height=0.7,
            color=FIRST,
            alpha=0.3,
            label="tolerant",
        )
    axes.barh(y_C, [strict_C[c] for c in order], height=0.36, color=FIRST, label="strict")
    for y, c in enumerate(order):
        axes.text(1.02, y, f"{support_C[c]:,}", va="center", color=MUTED, fontsize=7.5)
    axes.text(1.02, -0.95, "images", va="center", color=MUTED, fontsize=7.5)
    axes.set_yticks(y_C, [codes[c] for c in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return _legend_below(figure, axes)


@_styled
def lab_figure(
    federated: Mapping[str, float], local: Mapping[str, float], *, central: float | None = None
) -> Figure:
    """Macro F1 of the federated model at each lab, next to the lab's own model, worst marked."""
    if len(federated) > MANY_LABS:
        return _many_labs(federated, local, central)
    figure = Figure(figsize=(5.2, 1.0 + 0.32 * len(federated)))
    axes = figure.subplots()
    labs = list(federated)
    worst = min(labs, key=lambda lab: (federated[lab], lab))
    axes.add_patch(Rectangle((0, 0), 0, 0, color=FIRST, label="federated"))  # for the legend
    for y, lab in enumerate(labs):
        colour = SECOND if lab == worst and len(labs) > 1 else FIRST
        axes.barh(y, federated[lab], height=0.6, color=colour)
        if lab in local:
            name = "the lab's own model" if lab == next(iter(local)) else None
            axes.plot([local[lab]] * 2, [y - 0.38, y + 0.38], color=INK, linewidth=2.2, label=name)
        note = f"{federated[lab]:.3f}" + (" worst" if colour == SECOND else "")
        axes.text(1.02, y, note, va="center", color=MUTED, fontsize=7.5)
    if central is not None:
        axes.axvline(
            central, color=THIRD, linewidth=1.2, dashes=(4, 2), label="central, all images"
        )
    axes.set_yticks(range(len(labs)), [_clip(lab) for lab in labs])
    axes.set_ylim(len(labs) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro F1")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return _legend_below(figure, axes)


def _many_labs(
    federated: Mapping[str, float], local: Mapping[str, float], central: float | None
) -> Figure:
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    order = sorted(federated, key=lambda lab: (federated[lab], lab))
    if local:
        pairs = [(rank, local[lab]) for rank, lab in enumerate(order) if lab in local]
        step = -(-len(pairs) // 500)  # at most 500 dots, evenly taken
        axes.plot(
            *zip(*pairs[::step], strict=True),
            ".",
            color=MUTED,
            markersize=3,
            label="the lab's own model",
        )
    axes.plot([federated[lab] for lab in order], color=FIRST, label="federated")
    axes.plot(0, federated[order[0]], "o", color=SECOND, markersize=5, label="worst lab")
    if central is not None:
        axes.axhline(
            central, color=THIRD, linewidth=1.2, dashes=(4, 2), label="central, all images"
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"{len(order):,} labs, worst to best")
    axes.set_ylabel("macro F1")
    axes.grid(axis="y")
    return _legend_below(figure, axes)


@_styled
def epsilon_figure(
    spent_R: Sequence[tuple[float, float]],
    others: Mapping[str, tuple[float, float]],
    level: float | None,
    *,
    meaning: str,
) -> Figure:
    """Macro F1 against epsilon: a run round by round, and the ends of other runs by name.

    ``spent_R``, ``others``: (epsilon, macro F1). ``level``: macro F1 without privacy.
    ``meaning``: delta, unit and adversary, without which no epsilon is shown.
    """
    figure = Figure(figsize=(5.2, 3.3))
    axes = figure.subplots()
    marker = "o" if len(spent_R) <= MANY_ROUNDS else ""
    x, y = zip(*spent_R, strict=True) if spent_R else ((), ())
    axes.plot(x, y, color=FIRST, marker=marker, markersize=3, label="this run, round by round")
    if others:
        axes.plot(
            *zip(*others.values(), strict=True),
            "s",
            color=THIRD,
            markersize=6,
            label="other runs, at their end",
        )
    for name, place in others.items():
        note = axes.annotate(
            _clip(name), place, (0, 7), textcoords="offset points", ha="center", fontsize=7.5
        )
        note.set_color(THIRD)
    if level is not None:
        axes.axhline(
            level, color=SECOND, linewidth=1.2, dashes=(6, 2), label=f"without privacy {level:.3f}"
        )
    scores = [*y, *(score for _, score in others.values())]
    axes.set_ylim(0, min(1.0, 1.2 * max([*scores, level or 0.0, 0.1])))
    widest = max([*x, *(epsilon for epsilon, _ in others.values()), 0.1])
    axes.set_xlim(0, 1.08 * widest)
    axes.set_xlabel(f"epsilon of training, {meaning}")
    axes.set_ylabel("macro F1")
    axes.grid()
    return _legend_below(figure, axes)


@dataclass(frozen=True)
class Point:
    """A setting of a sweep: its cost, and its score with the interval over seeds if it has one."""

    x: float
    score: float
    low: float | None = None
    high: float | None = None
    each: tuple[float, ...] = ()
    """the score of each seed"""


@_styled
def trade_figure(
    series: Mapping[str, Sequence[Point]],
    levels: Mapping[str, float],
    *,
    label: str,
    joined: bool,
    best: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Macro F1 of a sweep's settings against a cost.

    ``series``: points by name, drawn as a line where ``joined``; ``levels``: scores that have no
    place on the axis, by name of a series; ``best``: the Pareto front as (cost, score).
    """
    figure = Figure(figsize=(5.6, 3.6))
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys([*series, *levels])):
        colour = (FIRST, SECOND, THIRD)[i % 3] if i < MANY_SERIES else MUTED
        told = _clip(name, 44) if i < MANY_SERIES else None
        dash = ("-", "--", ":")[i // 3 % 3] if joined else "none"
        marker = "os^"[i // 3 % 3]
        points = sorted(series.get(name, ()), key=lambda p: p.x)
        if points:
            axes.plot(
                [p.x for p in points],
                [p.score for p in points],
                linestyle=dash,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                color=colour,
                label=told,
            )
        for p in points:
            if p.low is not None and p.high is not None:
                axes.plot([p.x, p.x], [p.low, p.high], color=colour, linewidth=1.2, alpha=0.8)
            if len(p.each) > 1:
                seeds = [p.x] * len(p.each)
                axes.plot(seeds, p.each, "_", color=colour, markersize=7, alpha=0.7)
        if name in levels:
            told = f"{_clip(name, 30)}, without privacy" if name else "without privacy"
            axes.axhline(
                levels[name],
                color=colour,
                linewidth=1.2,
                dashes=(6, 2),
                label=f"{told} {levels[name]:.3f}" if i < MANY_SERIES else None,
            )
    if len(best) > 1:
        x, y = zip(*best, strict=True)
        axes.step(x, y, where="post", color=MUTED, linewidth=1, zorder=0, label="Pareto front")
    scores = [v for points in series.values() for p in points for v in (p.score, *p.each)]
    ends = [p.high for points in series.values() for p in points if p.high is not None]
    top = max([*scores, *ends, *levels.values(), 0.1])
    axes.set_ylim(0, min(1.0, 1.12 * top))
    costs = [p.x for points in series.values() for p in points]
    if min(costs) > 0 and max(costs) >= 8 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.tick_params(which="minor", length=0)
        axes.set_xticks(sorted(set(costs))) if len(set(costs)) <= 8 else None
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("macro F1")
    axes.grid(axis="y")
    return _legend_below(figure, axes)


@dataclass(frozen=True)
class Gap:
    """What a federation loses against one place: each run, their mean, the upper end of its
    interval (None for a single run), and the most that is hoped for."""

    name: str
    each: tuple[float, ...]
    mean: float
    bound: float | None
    limit: float


@_styled
def gap_figure(gaps: Sequence[Gap]) -> Figure:
    """Macro F1 in one place minus federated, a row for each kind of labs."""
    figure = Figure(figsize=(5.6, 1.2 + 0.4 * len(gaps)))
    axes = figure.subplots()
    axes.axvline(0, color=MUTED, linewidth=0.8)
    told: Sequence[str | None] = ("each run", "upper end of the mean", "mean", "goal for the mean")
    for y, gap in enumerate(gaps):
        each, end, mean, limit = told if y == 0 else (None,) * 4
        axes.plot(gap.each, [y] * len(gap.each), "o", color=MUTED, markersize=3.5, label=each)
        until = gap.mean if gap.bound is None else gap.bound
        axes.plot([gap.mean, until], [y, y], color=FIRST, linewidth=2.4, label=end)
        axes.plot(gap.mean, y, "s", color=FIRST, markersize=6, label=mean)
        axes.plot([gap.limit] * 2, [y - 0.3, y + 0.3], color=SECOND, linewidth=2, label=limit)
    axes.set_yticks(range(len(gaps)), [_clip(gap.name, 30) for gap in gaps])
    axes.set_ylim(len(gaps) - 0.4, -0.6)
    axes.set_xlabel("macro F1 in one place minus federated")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return _legend_below(figure, axes)


@_styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG or PDF, by the file's ending; same figure, same bytes."""
    dates = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
    with mpl.rc_context({"svg.hashsalt": path.stem}), atomically(path) as part:
        figure.savefig(part, format=path.suffix[1:], metadata=dates)


@_styled
def reliability_figure(points: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy of predictions against their stated confidence, dot area by number of images."""
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(3, 3), label="perfect calibration")
    most = max((p["images"] for p in points), default=1)
    x = [p["confidence"] for p in points]
    y = [p["accuracy"] for p in points]
    axes.plot(x, y, color=FIRST, linewidth=1.2)
    area = [max(6.0, 90 * p["images"] / most) for p in points]
    axes.scatter(x, y, s=area, color=FIRST, alpha=0.75, linewidths=0, label="model, area = images")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.grid()
    return _legend_below(figure, axes)


@_styled
def coverage_figure(points: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy when the model answers only the images that it is most confident about."""
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    axes.plot(
        [100 * p["coverage"] for p in points],
        [p["accuracy"] for p in points],
        color=FIRST,
        marker="o",
        markersize=3,
    )
    axes.set_xlim(0, 101)
    axes.set_ylim(min([0.5, *(p["accuracy"] for p in points)]) - 0.02, 1.01)
    axes.set_xlabel("images answered, most confident first (%)")
    axes.set_ylabel("accuracy of the answers")
    axes.grid()
    return figure


@_styled
def participation_figure(
    rounds_R: Sequence[int],
    labs: Sequence[str],
    expected: Sequence[Sequence[str]],
    received: Sequence[Sequence[str]],
) -> Figure:
    """Which lab contributed in which round; of many labs or rounds, how many."""
    if len(labs) > MANY_LABS or len(rounds_R) > MANY_ROUNDS:
        return _participation_of_many(rounds_R, expected, received)
    width = max(4.6, 1.2 + 0.2 * len(rounds_R))
    figure = Figure(figsize=(width, 1.0 + 0.24 * len(labs)))
    axes = figure.subplots()
    row = {lab: y for y, lab in enumerate(labs)}
    present, absent = [], []
    for r, (asked, came) in enumerate(zip(expected, received, strict=True)):
        present += [(rounds_R[r], row[lab]) for lab in came if lab in row]
        absent += [(rounds_R[r], row[lab]) for lab in asked if lab in row and lab not in came]
    groups = ((present, "s", THIRD, "contributed"), (absent, "X", SECOND, "absent"))
    for points, marker, colour, name in groups:
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, markersize=8, markeredgewidth=0, label=name)
    axes.set_yticks(range(len(labs)), [_clip(lab) for lab in labs])
    axes.set_ylim(len(labs) - 0.4, -0.6)
    axes.set_xlim(min(rounds_R) - 0.6, max(rounds_R) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return _legend_below(figure, axes)


def _participation_of_many(
    rounds_R: Sequence[int], expected: Sequence[Sequence[str]], received: Sequence[Sequence[str]]
) -> Figure:
    figure = Figure(figsize=(5.2, 2.6))
    axes = figure.subplots()
    came = [len(labs) for labs in received]
    asked = [max(len(e), len(r)) for e, r in zip(expected, received, strict=True)]
    if len(rounds_R) <= MANY_ROUNDS:
        axes.bar(rounds_R, asked, color=SECOND, alpha=0.35, label="absent")
        axes.bar(rounds_R, came, color=THIRD, label="contributed")
    else:
        axes.fill_between(
            rounds_R, came, asked, color=SECOND, alpha=0.35, step="mid", linewidth=0, label="absent"
        )
        axes.fill_between(rounds_R, came, color=THIRD, step="mid", linewidth=0, label="contributed")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("labs")
    _rounds_axis(axes)
    return _legend_below(figure, axes)


@_styled
def bytes_figure(rounds_R: Sequence[int], up_R: Sequence[int], down_R: Sequence[int]) -> Figure:
    """Bytes of all labs per round: sent by labs, received by labs."""
    return _two_per_round(
        rounds_R,
        [b / 1e6 for b in up_R],
        [b / 1e6 for b in down_R],
        names=("from labs", "to labs"),
        unit="megabytes per round, all labs",
        stacked=False,
    )


@_styled
def time_figure(
    rounds_R: Sequence[int], wall_s_R: Sequence[float], train_s_R: Sequence[float]
) -> Figure:
    """Seconds of each round: training, and everything else."""
    train = [min(t, w) for t, w in zip(train_s_R, wall_s_R, strict=True)]
    rest = [w - t for t, w in zip(train, wall_s_R, strict=True)]
    return _two_per_round(
        rounds_R,
        train,
        rest,
        names=("training", "everything else"),
        unit="seconds per round",
        stacked=True,
    )


def _two_per_round(
    rounds_R: Sequence[int],
    one: Sequence[float],
    other: Sequence[float],
    *,
    names: tuple[str, str],
    unit: str,
    stacked: bool,
) -> Figure:
    figure = Figure(figsize=(5.2, 2.6))
    axes = figure.subplots()
    x = np.asarray(rounds_R, dtype=np.float64)
    if len(x) > MANY_ROUNDS:
        top = list(np.add(one, other)) if stacked else list(other)
        axes.plot(x, one, color=FIRST, label=names[0])
        axes.plot(x, top, color=THIRD, label="both" if stacked else names[1])
    elif stacked:
        axes.bar(x, one, width=0.7, color=FIRST, label=names[0])
        axes.bar(x, other, width=0.7, bottom=one, color=THIRD, alpha=0.5, label=names[1])
    else:
        axes.bar(x - 0.19, one, width=0.36, color=FIRST, label=names[0])
        axes.bar(x + 0.19, other, width=0.36, color=THIRD, label=names[1])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    _rounds_axis(axes)
    return _legend_below(figure, axes)


def _rounds_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("round")
    axes.grid(axis="y")


def _legend_below(figure: Figure, axes: Axes) -> Figure:
    """One legend under the axes, wherever their labels end."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def _cell(axes: Axes, x: int, y: int, strength: float, text: str) -> None:
    """A cell of a matrix; its number is dark on weak cells and light on strong ones."""
    patch = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=FIRST, alpha=max(0.06, strength))
    patch.set_linewidth(0)
    axes.add_patch(patch)
    colour = PAPER if strength > 0.7 else INK
    number = axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=7)
    # Cells lie inside the axes; to measure each for the layout would take most of the time.
    patch.set_in_layout(False)
    number.set_in_layout(False)


def _matrix_axes(
    axes: Axes, columns: int, rows: int, column_names: list[str], row_names: list[str]
) -> None:
    axes.set_xticks(range(columns), column_names, rotation=90)
    axes.set_yticks(range(rows), row_names)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _clip(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _short(count: int) -> str:
    return (
        str(count)
        if count < 1000
        else f"{count / 1000:.1f}k"
        if count < 9950
        else (f"{count / 1000:.0f}k")
    )


@_styled
def membership_figure(curves: Mapping[str, Sequence[Sequence[float]]], *, mark: float) -> Figure:
    """ROC curves of membership inference on logarithmic axes, where few false alarms count.

    ``curves``: (false alarms, members found) by name. ``mark``: the share of false alarms at which
    an attack is read off.
    """
    figure = Figure(figsize=(4.4, 3.9))
    axes = figure.subplots()
    least = 1e-3
    axes.plot([least, 1], [least, 1], color=MUTED, linewidth=1, dashes=(3, 3), label="chance")
    for colour, (name, curve) in zip((FIRST, SECOND, THIRD), curves.items(), strict=False):
        x, y = zip(*((max(a, least), max(b, least)) for a, b in curve), strict=True)
        axes.step(x, y, where="post", color=colour, linewidth=1.4, label=_clip(name, 40))
    axes.axvline(mark, color=GRID, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.tick_params(which="minor", length=0)
    axes.set_xlim(least, 1)
    axes.set_ylim(least, 1.05)
    axes.set_xlabel("false alarms")
    axes.set_ylabel("members found")
    axes.grid()
    return _legend_below(figure, axes)


@_styled
def collusion_figure(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    labs: int,
    threshold: int,
    lying_from: int,
) -> Figure:
    """Likeness of a rebuilt image against how many of ``labs`` labs collude, by what is sent."""
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    for colour, (name, points) in zip((FIRST, THIRD, SECOND), curves.items(), strict=False):
        label = f"a lab's update is of {name}"
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    axes.axvline(threshold, color=SECOND, linewidth=1.2, label=f"{threshold} labs' shares open all")
    axes.axvline(
        lying_from,
        color=SECOND,
        linewidth=1.2,
        dashes=(4, 2),
        label=f"{lying_from}, where the coordinator lies",
    )
    axes.set_xlim(-0.2, labs - 0.8)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(f"labs of {labs} that collude with the coordinator")
    axes.set_ylabel("likeness")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    return _legend_below(figure, axes)


@_styled
def sums_figure(
    images_S: Sequence[int], curves: Mapping[str, Sequence[float]], *, recognisable: float
) -> Figure:
    """Likeness of rebuilt images against how many are in a sum, by name.

    ``recognisable``: likeness from which on a cell is recognised.
    """
    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.subplots()
    for colour, (name, likeness_S) in zip((FIRST, MUTED, THIRD), curves.items(), strict=False):
        axes.plot(images_S, likeness_S, "o-", color=colour, markersize=4, label=name)
    label = "recognisable from here on"
    axes.axhline(recognisable, color=SECOND, linewidth=1.2, dashes=(4, 2), label=label)
    axes.set_xscale("log")
    axes.set_xticks(images_S)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("images in the sum, one step on each")
    axes.set_ylabel("likeness")
    axes.grid(axis="y")
    return _legend_below(figure, axes)
