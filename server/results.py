"""What a deployed run ends with: summary, model, card. The same files as a simulation's."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np

import cytofed
from cytofed.arrays import weights_sha256
from cytofed.card import model_card
from cytofed.documents import Offer
from cytofed.files import write_atomically
from cytofed.lineage import lineage_in, link_of
from cytofed.metrics import Tally, summarise, summarise_labs
from cytofed.model_file import write_model
from cytofed.plan import Plan
from cytofed.plan_check import privacy_price, score_prices
from cytofed.privacy.accounting import across_labs
from cytofed.privacy.terms import declared_of, patients_of, patients_told, terms_of
from cytofed.server.checkpoints import Progress
from cytofed.server.rounds import Run, Scores, final_weights, status
from cytofed.server.runs import RunFolder
from cytofed.start import Start

_log = logging.getLogger("cytofed.coordinator")


def keep_scores(folder: RunFolder, number: int, scores: Scores) -> None:
    """Write what was told of a round's model, for a run that is resumed after its last round."""
    kept = {
        "round": number,
        "exact": _vector(scores.exact),
        "released": _vector(scores.released),
        "answered": scores.answered,
        "failed": scores.failed,
        "labs": {lab: _vector(tally) for lab, tally in scores.labs.items()},
    }
    write_atomically(folder.private / "scores.json", json.dumps(kept), mode=0o600)


def read_scores(folder: RunFolder, number: int, classes: int) -> Scores | None:
    """What ``keep_scores`` wrote for this round; None where it did not."""
    file = folder.private / "scores.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("round") != number:
        return None
    return Scores(
        exact=_tally(kept["exact"], classes),
        labs={
            lab: tally
            for lab, vector in kept["labs"].items()
            if (tally := _tally(vector, classes)) is not None
        },
        released=_tally(kept["released"], classes),
        answered=kept["answered"],
        failed=kept["failed"],
    )


def write_results(
    folder: RunFolder,
    run: Run,
    offer: Offer,
    progress: Progress,
    scores: Scores,
    start: Start,
    *,
    reason: str = "",
) -> dict[str, Any]:
    """Write metrics, model and card, and last of all the summary, which says that it is finished.

    A run without a single applied round leaves no model. ``reason``: why it ended before its end;
    it is then not completed.
    """
    line = lineage_in(start.info).then(
        link_of(run.plan, run=offer.run, federation=offer.federation, labs=len(run.cohort))
    )
    summary = _summary(run, offer, progress, scores, start)
    summary["lineage"] = line.summary(deployed=True)
    if reason:
        unfinished = "incomplete" if summary["status"] == "completed" else summary["status"]
        summary = {**summary, "status": unfinished, "reason": reason}
    if summary["status"] != "failed":
        write_model(
            folder.root / "model.safetensors",
            start.with_weights(final_weights(run, progress)),
            replace(start.info, plan_sha256=run.plan.sha256, lineage=line.to_text()),
        )
        write_atomically(folder.root / "model_card.md", model_card(summary, run.plan))
    write_atomically(folder.root / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def write_report(folder: RunFolder) -> None:
    """The run's report.html, by a process of its own: this one never imports matplotlib.

    A run whose report cannot be drawn has all its other results; the log says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "cytofed.cli", "report", folder.root],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        _log.warning("run %s: no report: %s", folder.name, done.stderr.strip()[-300:])


def failed_summary(offer: Offer, reason: str, absent: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a run that never came to a round."""
    plan = offer.plan
    return {
        "status": "failed",
        "reason": reason,
        "absent": dict(absent),
        "plan_name": plan.name,
        "plan_sha256": plan.sha256,
        "weights_sha256": None,
        "seed": plan.train.seed,
        "rounds": 0,
        "global": None,
        "labs": None,
        "baselines": {},
        "participation": [],
        "privacy": privacy_price(plan, patients_of(plan, len(offer.roster.members))),
    }


def write_metrics(folder: RunFolder, progress: Progress) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in progress.records)
    write_atomically(folder.root / "metrics.jsonl", lines)


def _summary(
    run: Run, offer: Offer, progress: Progress, scores: Scores, start: Start
) -> dict[str, Any]:
    plan, records = run.plan, progress.records
    ended = status(run, progress)
    best = scores.best
    up = [record["up_bytes"] / max(len(record["received"]), 1) for record in records]
    down = [record["down_bytes"] / max(len(record["expected"]), 1) for record in records]
    train_s = sum(record["train_s"] for record in records)
    weights = weights_sha256(start.manifest, final_weights(run, progress))
    return {
        "status": ended,
        "plan_name": plan.name,
        "plan_sha256": plan.sha256,
        "weights_sha256": weights if ended != "failed" else None,
        "seed": plan.train.seed,
        "rounds": progress.round,
        "global": None if best is None else summarise(best, run.scheme, scores.temperature),
        "scores": {
            "noised": scores.exact is None and best is not None,
            "labs": scores.answered,
            "failed": scores.failed or None,
        },
        "labs": summarise_labs(scores.labs, run.scheme, scores.temperature)
        if plan.reports_per_lab
        else None,
        "baselines": {},
        "participation": [
            {key: record[key] for key in ("round", "expected", "received", "absent")}
            for record in records
        ],
        "privacy": _privacy(offer, tuple(run.cohort)),
        "wire": {
            "up_bytes_per_lab_round": int(max(up, default=0)),
            "down_bytes_per_lab_round": int(max(down, default=0)),
            "secure_aggregation": plan.secure_aggregation.enabled,
        },
        "timing": {
            "wall_s": round(progress.wall_s, 2),
            "train_s": round(train_s / max(len(run.cohort), 1), 2),
            "overhead_s": round(max(0.0, progress.wall_s - train_s / max(len(run.cohort), 1)), 2),
        },
        "confusion": None
        if best is None
        else {"codes": list(run.scheme.codes), "counts": best.confusion_CC.tolist()},
        "cohort": sorted(run.cohort),
        "roster_sha256": offer.roster.sha256,
        "warnings": _warnings(plan),
        "versions": _versions(),
    }


def _privacy(offer: Offer, labs: tuple[str, ...]) -> dict[str, Any]:
    """The plan's price. What a lab has really spent is in its own ledger, and nobody else's."""
    plan = offer.plan
    patients = patients_of(plan, len(offer.roster.members))
    shown = privacy_price(plan, patients)
    if plan.privacy.unit == "none":
        return shown
    terms = terms_of(plan, patients)
    assert terms is not None
    total = terms.total()
    priced = {
        lab: {"epsilon": total.epsilon, "declared_patients": declared_of(plan, lab)}
        for lab in sorted(labs)
    }
    whole = across_labs([total] * len(labs), plan.patients)
    federation = {
        "patients": plan.patients,
        "epsilon": whole.epsilon,
        "delta": whole.delta,
        **patients_told(whole),
        "statement": str(whole),
    }
    return {**shown, **score_prices(plan, patients), "labs": priced, "federation": federation}


def _warnings(plan: Plan) -> list[str]:
    if plan.privacy.unit == "none":
        return ["Not differentially private (privacy.unit: none): it may reveal single patients."]
    if plan.privacy.unit == "image":
        return ["privacy.unit is image: the guarantee is for one image, not for a patient."]
    return []


def _versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("flwr", "numpy", "torch")}
    return {"cytofed": cytofed.__version__, "python": platform.python_version(), **found}


def _vector(tally: Tally | None) -> list[int] | None:
    return None if tally is None else tally.vector_D.tolist()


def _tally(vector: list[int] | None, classes: int) -> Tally | None:
    return None if vector is None else Tally.from_vector(np.asarray(vector, np.int64), classes)
