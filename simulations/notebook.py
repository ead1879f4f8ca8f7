"""For notebooks and scripts: ``from cytofed import simulate, load_plan, Run``.

``simulate`` is the command of that name, with its flags as arguments; ``Run`` reads a run directory
into plain lists, dicts and arrays. Errors are those of ``cytofed.errors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytofed.console import RunProgress
from cytofed.plan import Plan
from cytofed.simulations import report
from cytofed.simulations.simulate import make_request
from cytofed.simulations.simulate import simulate as run_request

_Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, init=False, repr=False)
class Run:
    """A finished run, read from its directory when first asked.

    Errors: InputError, on first use, when ``path`` holds no finished run.

    Shapes: C classes, R rounds.
    """

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @cached_property
    def _files(self) -> report.Run:
        return report.read_run(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: status, scores, labs, privacy, bytes, times."""
        return dict(self._files.summary)

    @property
    def status(self) -> str:
        """``completed``, ``incomplete`` or ``failed``."""
        return str(self._files.summary["status"])

    @property
    def metrics(self) -> dict[str, Any]:
        """Scores of the final model on all held-out images; empty for a failed run."""
        return dict(self._files.summary.get("global") or {})

    @property
    def labs(self) -> dict[str, dict[str, Any]]:
        """Scores of the final model at each lab; empty where a plan does not tell them."""
        return dict(self._files.summary.get("labs") or {})

    @property
    def privacy(self) -> dict[str, Any]:
        """Unit, epsilon, delta, sigma; ``unit`` is ``none`` without differential privacy."""
        return dict(self._files.summary.get("privacy") or {})

    @property
    def plan(self) -> Plan:
        return self._files.plan

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """``metrics.jsonl``: a dict for each round."""
        return [dict(entry) for entry in self._files.rounds]

    @property
    def history(self) -> dict[str, list[Any]]:
        """Columns over rounds, as ``pandas.DataFrame`` takes them; None where a round has none.

        ``loss`` is the mean over labs, ``up_bytes`` and ``down_bytes`` are sums over labs.
        """
        scores = ("macro_f1", "balanced_accuracy", "accuracy", "weighted_f1", "ece")
        columns: dict[str, list[Any]] = {"round": [int(r["round"]) for r in self._files.rounds]}
        for key in scores:
            columns[key] = [(r.get("global") or {}).get(key) for r in self._files.rounds]
        losses = [list((r.get("loss") or {}).values()) for r in self._files.rounds]
        columns["loss"] = [float(np.mean(values)) if values else None for values in losses]
        for key in ("up_bytes", "down_bytes", "wall_s", "train_s"):
            columns[key] = [r.get(key) for r in self._files.rounds]
        columns["received"] = [len(r.get("received") or []) for r in self._files.rounds]
        return columns

    @property
    def classes(self) -> list[str]:
        """Codes of the label scheme, in the order of ``confusion_CC``."""
        return list((self._files.summary.get("confusion") or {}).get("codes") or [])

    @property
    def confusion_CC(self) -> NDArray[np.int64]:
        """Held-out images by true class (rows) and predicted class (columns)."""
        counts = (self._files.summary.get("confusion") or {}).get("counts") or []
        return np.array(counts, dtype=np.int64).reshape(len(self.classes), len(self.classes))

    @property
    def model(self) -> Path:
        """The model file, for ``cytofed evaluate`` and ``predict``."""
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """A small table; whatever comes from a file is escaped."""
        summary = self.summary
        rows = [("status", self.status), ("rounds", str(summary.get("rounds", "")))]
        for key, name in (("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy")):
            if key in self.metrics:
                rows.append((name, f"{self.metrics[key]:.3f}"))
        labs = (summary.get("partition") or {}).get("labs") or []
        rows.append(("labs", str(len(labs))))
        rows.append(("privacy", report.privacy_line(summary).removeprefix("privacy").strip()))
        rows.append(("weights", str(summary.get("weights_sha256") or "none")[:16]))
        rows.append(("report", str(self.report)))
        body = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in rows
        )
        heading = escape(str(summary.get("plan_name") or self.plan.name))
        return f"<table><caption>{heading}</caption><tbody>{body}</tbody></table>"


def simulate(
    plan: str | Path | Plan | None = None,
    *,
    data: _Paths = (),
    labels: str | Sequence[str] = (),
    patients: str | None = None,
    labs: int | None = None,
    partition: str | None = None,
    set: Mapping[str, Any] | None = None,
    seed: int | None = None,
    backend: str = "inprocess",
    jobs: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Cut a data set into virtual labs and run a federation on them, as ``cytofed simulate`` does.

    ``plan``: a YAML file, a built-in name or what ``load_plan`` returned; left out, ``marrow`` with
    ``data`` and ``demo`` on the sample of the package. ``set``: any keys of the plan, dotted, such
    as ``{"privacy.unit": "patient", "privacy.epsilon": 8}``. ``out``: run directory, else
    ``runs/NAME-TIME``; with ``resume`` a run in it is gone on with, and returned when it is
    finished, so that a cell can be executed again.

    The same data, plan and seed give the same weights, to the bit, here and on the command line.

    Errors: InputError for what cannot be used, CytofedError when workers fail. A run that ends
    without some lab is returned; look at ``status``.
    """
    request = make_request(
        plan,
        data=[Path(path) for path in _several(data)],
        labels=[str(name) for name in _several(labels)],
        patients=patients,
        labs=labs,
        partition=partition,
        overrides=[f"{key}={json.dumps(value)}" for key, value in (set or {}).items()],
        seed=seed,
        backend=backend,
        jobs=jobs,
        out=None if out is None else Path(out),
        resume=resume,
    )
    with RunProgress(quiet=quiet) as progress:
        run_request(request, progress)
    return Run(request.out)


def _several(given: _Paths) -> Sequence[str | Path]:
    return (given,) if isinstance(given, str | Path) else given
