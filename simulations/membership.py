"""Membership inference on the model that a run released: who was trained on?

LiRA, Carlini et al., "Membership inference attacks from first principles", IEEE S&P 2022,
arXiv:2112.03570. Of each image the attacker knows how confident models are that were trained with
it and models that were not (``cytofed.simulations.shadows``); the released model's confidence is
held against both. Online variant with one variance for all images and for both sides, as the paper
advises for few shadows, and for the same reason what training on an image does to its score is
shrunk to the mean over images; scores of a model are first put on the scale of the others by their
median and quartiles, since a shadow is trained less than the model that it stands for. A patient's
score is the mean over the patient's images, against that mean in the shadows.

Members are images that labs trained on, the others held-out images; no patient is on both sides.
A weak attack is no evidence of privacy: what is printed is "no violation found" at best.

Shapes: N images (or patients), U patients, S shadows.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import rankdata, t

from cytofed.console import stderr
from cytofed.errors import CytofedError, InputError
from cytofed.simulations import shadows
from cytofed.simulations.attacks import why_missing
from cytofed.simulations.shadows import Recipe, Subjects
from cytofed.whose import whose

FALSE_ALARMS = 0.01
CONFIDENCE = 0.95
_CURVE_POINTS = 200

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Area:
    """Area under the ROC curve with its interval; .5 is chance."""

    auc: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """How well members are told from others. ``curve``: (false alarms, members found)."""

    area: Area
    found: float
    """share of members found at ``FALSE_ALARMS``"""
    members: int
    others: int
    curve: tuple[tuple[float, float], ...]

    @property
    def above_chance(self) -> bool:
        return self.area.low > 0.5


def infer_members(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The attack on a simulated run, as the object ``membership`` of audit.json.

    Shadows that are there are used, the others made. A folder without what the attack needs gets
    ``{"missing": reason}``. Errors: CytofedError when shadows cannot be trained.
    """
    try:
        subjects = shadows.subjects_of(run_dir)
    except InputError as error:
        return {"missing": why_missing(error)}
    _make_shadows(run_dir, tell)
    found = [shadows.read_scores(run_dir, number) for number in range(shadows.SHADOWS + 1)]
    released_N, *shadow_N = [scores for scores in found if scores is not None]
    return report(subjects, released_N, np.stack(shadow_N))


def report(subjects: Subjects, released_N: Floats, shadow_SN: Floats) -> dict[str, Any]:
    """Both levels of the attack on scores of the released model and of all shadows."""
    recipe = Recipe.of(subjects)
    images, patients = both_levels(
        released_N, shadow_SN, subjects.patient_N, subjects.in_SU, subjects.member_N
    )
    return {
        "attack": "LiRA, online, one variance, shrunk (Carlini et al. 2022)",
        "shadows": len(shadow_SN),
        "reduced": list(recipe.reduced),
        "pseudo_patients": subjects.pseudo,
        "false_alarms": FALSE_ALARMS,
        "confidence": CONFIDENCE,
        "image": _told(images),
        "patient": _told(patients),
    }


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "auc": outcome.area.auc,
        "interval": [outcome.area.low, outcome.area.high],
        "found": outcome.found,
        "members": outcome.members,
        "others": outcome.others,
        "above_chance": outcome.above_chance,
        "curve": [list(point) for point in outcome.curve],
    }


# --- the attack


def both_levels(
    released_N: Floats, shadow_SN: Floats, patient_N: Ints, in_SU: Bools, member_N: Bools
) -> tuple[Outcome, Outcome]:
    """By image and by patient. ``in_SU``: whether a shadow was trained on a patient."""
    released_N, shadow_SN = _levelled(released_N), np.stack([_levelled(row) for row in shadow_SN])
    ratio_N = likelihood_ratio(released_N, shadow_SN, in_SU[:, patient_N])
    count_U = np.bincount(patient_N)

    def mean(scores_N: Floats) -> Floats:
        return np.bincount(patient_N, scores_N) / count_U

    ratio_U = likelihood_ratio(mean(released_N), np.stack([mean(r) for r in shadow_SN]), in_SU)
    member_U = np.bincount(patient_N, member_N) > 0
    alone_U = np.arange(len(count_U))
    return outcome_of(ratio_N, member_N, patient_N), outcome_of(ratio_U, member_U, alone_U)


def _levelled(scores_N: Floats) -> Floats:
    """A model's scores with median 0 and quartiles 1 apart: whoever attacks knows them all."""
    low, middle, high = np.quantile(scores_N, (0.25, 0.5, 0.75))
    levelled_N: Floats = (scores_N - middle) / max(float(high - low), 1e-9)
    return levelled_N


def likelihood_ratio(released_N: Floats, shadow_SN: Floats, in_SN: Bools) -> Floats:
    """Log likelihood of "trained on" less that of "not" (N,), both Gaussians of one variance.

    What training on an image does to its score is, of few shadows, mostly noise: each image's
    figure is drawn to the mean of all by as much as its variance is due to that (James and Stein).
    """
    shadows, ins_N = len(shadow_SN), in_SN.sum(axis=0)
    in_N = (shadow_SN * in_SN).sum(axis=0) / ins_N
    out_N = (shadow_SN * ~in_SN).sum(axis=0) / (shadows - ins_N)
    off_SN = shadow_SN - np.where(in_SN, in_N, out_N)
    # Two means were taken off each image's scores.
    variance = max(float((off_SN**2).mean()) * shadows / max(1, shadows - 2), 1e-12)
    gain_N = in_N - out_N
    by_chance = variance * float(np.mean(1 / ins_N + 1 / (shadows - ins_N)))
    kept = max(0.0, 1 - by_chance / max(float(gain_N.var()), 1e-12))
    gain_N = gain_N.mean() + kept * (gain_N - gain_N.mean())
    ratio_N: Floats = gain_N * (released_N - (in_N + out_N) / 2) / variance
    return ratio_N


def outcome_of(score_N: Floats, member_N: Bools, cluster_N: Ints) -> Outcome:
    """What a score of membership finds; ``cluster_N``: images of one patient go together."""
    curve = _curve(score_N, member_N)
    found = max(hit for alarm, hit in curve if alarm <= FALSE_ALARMS)
    step = -(-len(curve) // _CURVE_POINTS)
    thin = (*curve[:-1:step], curve[-1])
    members = int(member_N.sum())
    area = area_of(score_N, member_N, cluster_N)
    return Outcome(area, found, members, len(member_N) - members, thin)


def _curve(score_N: Floats, member_N: Bools) -> list[tuple[float, float]]:
    order = np.argsort(-score_N, kind="stable")
    hits, alarms = np.cumsum(member_N[order]), np.cumsum(~member_N[order])
    ends = np.flatnonzero(np.append(np.diff(score_N[order]) != 0, True))  # ties are one step
    points = zip(
        (alarms[ends] / alarms[-1]).tolist(), (hits[ends] / hits[-1]).tolist(), strict=True
    )
    return [(0.0, 0.0), *points]


def area_of(score_N: Floats, member_N: Bools, cluster_N: Ints) -> Area:
    """AUC and its interval: DeLong's, for clusters (Obuchowski, Biometrics 1997).

    Cells of one patient rise and fall together, so patients are what varies. Student's t with as
    many degrees of freedom as the side with fewer patients has, and no less than half a patient
    of that side: a perfect separation of few patients is no proof either.
    """
    ours, theirs = score_N[member_N], score_N[~member_N]
    ranks_N = rankdata(np.concatenate([ours, theirs]))
    m, n = len(ours), len(theirs)
    above_M = (ranks_N[:m] - rankdata(ours)) / n  # others below each member
    below_N = 1 - (ranks_N[m:] - rankdata(theirs)) / m
    auc = float(above_M.mean())
    variance, fewest = 0.0, math.inf
    for part, clusters in ((above_M, cluster_N[member_N]), (below_N, cluster_N[~member_N])):
        _, number = np.unique(clusters, return_inverse=True)
        sums = np.bincount(number, part - auc)
        count = len(sums)
        fewest = min(fewest, count)
        variance += count / max(1, count - 1) * float((sums**2).sum()) / len(part) ** 2
    deviation = max(math.sqrt(variance), 1 / (2 * fewest))
    half = deviation * float(t.ppf((1 + CONFIDENCE) / 2, max(1, fewest - 1)))
    return Area(auc, max(0.0, auc - half), min(1.0, auc + half))


# --- shadows in processes of their own


def _make_shadows(run_dir: Path, tell: Callable[[str], None]) -> None:
    """Make what is missing on all cores, one shadow after the other on each."""
    total = shadows.SHADOWS + 1

    def done() -> int:
        return sum(shadows.read_scores(run_dir, number) is not None for number in range(total))

    missing = total - done()
    if not missing:
        return
    workers = min(missing, os.cpu_count() or 1)
    processes = [_start(run_dir, first, workers) for first in range(workers)]
    try:
        with _bar() as bar:
            task = bar.add_task("membership: shadow models", total=total, completed=total - missing)
            told = 0
            while any(process.poll() is None for process in processes):
                time.sleep(0.2)
                made = done()
                bar.update(task, completed=made)
                if not stderr.is_terminal and made >= told + 4:
                    told = made
                    tell(f"membership: {made} of {total} models")
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            raise CytofedError(f"a shadow model could not be trained: {errors.strip()[-500:]}")


def _start(run_dir: Path, first: int, step: int) -> subprocess.Popen[str]:
    arguments = [str(run_dir), str(first), str(step)]
    return subprocess.Popen(
        [sys.executable, "-m", "cytofed.simulations.shadows", *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to the parent alone, which ends them
    )


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}")
    return Progress(
        *columns,
        TextColumn("of {task.total}"),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


# --- in words


def lines(found: Json, *, private: bool) -> list[str]:
    """One line for each level, and what the attack was."""
    if "missing" in found:
        return [f"membership inference: {found['missing']}"]
    told = []
    who = whose("patient", pseudo=found["pseudo_patients"]) + "s"
    for level, name in (("image", "images"), ("patient", who)):
        part = found[level]
        low, high = part["interval"]
        line = (
            f"membership inference, {name} | AUC {part['auc']:.3f} ({low:.2f} to {high:.2f}, "
            f"{found['confidence']:.0%}), finds {part['found']:.1%} of {part['members']:,} members "
            f"at {found['false_alarms']:.0%} false alarms among {part['others']:,} others | NOTE: "
        )
        told.append(line + verdict(part, private=private))
    reduced = "; ".join(found["reduced"])
    told.append(f"{found['attack']}, {found['shadows']} shadows, cheaper than the run: {reduced}")
    return told


def verdict(part: Json, *, private: bool) -> str:
    """What one level's figures mean, and what they do not."""
    if part["above_chance"]:
        meant = "above chance: the released model tells who was trained on"
        return meant + ("; epsilon bounds how well, and allows some" if private else "")
    return "at chance: no violation found; a weak attack is no evidence of privacy"
