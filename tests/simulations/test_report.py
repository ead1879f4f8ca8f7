"""Claims about the report and the terminal table of a run.

Shapes: K labs, C classes.
"""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cytofed import figures
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.metrics import Tally, gap, summarise
from cytofed.plan import dump_plan, from_dict
from cytofed.simulations.report import render_summary, write_report

SCHEME = load_scheme("bone-marrow-21")
HOSTILE = '<script>alert("1")</script> & $x_1$ \u4e2d'
VOID = {"meta", "img", "br", "hr", "link", "input"}


def made_tally(rng: np.random.Generator, skill: float, images: int) -> Tally:
    """A tally of a made-up model that errs towards tolerated neighbours and at random."""
    classes = len(SCHEME.codes)
    share_C = rng.dirichlet(np.full(classes, 0.7))
    near_CC = SCHEME.tolerance_CC / SCHEME.tolerance_CC.sum(axis=1, keepdims=True)
    chance_CC = skill * np.eye(classes) + (1 - skill) * (0.7 * near_CC + 0.3 / classes)
    confusion_CC = np.stack(
        [rng.multinomial(round(images * s), row) for s, row in zip(share_C, chance_CC, strict=True)]
    )
    bins_B3 = Tally.empty(classes).bins_B3
    count_B = rng.multinomial(int(confusion_CC.sum()), rng.dirichlet(np.arange(1, 16)))
    confidence_B = (np.arange(15) + 0.5) / 15
    bins_B3[:, 0] = count_B
    bins_B3[:, 1] = np.rint(1e6 * count_B * confidence_B)
    bins_B3[:, 2] = rng.binomial(count_B, 0.9 * confidence_B)
    return Tally(confusion_CC.astype(np.int64), bins_B3)


def made_run(
    folder: Path,
    *,
    labs: int = 4,
    rounds: int = 12,
    names: dict[int, str] | None = None,
    unit: str = "none",
    pseudo: bool = False,
    baselines: bool = True,
    drawn: bool = True,
) -> Path:
    """A run directory as ``simulate`` leaves it, from made-up figures.

    Without ``drawn`` it holds nothing to draw: for claims about words, in little time.
    """
    rng = np.random.default_rng(0)
    lab_names = [(names or {}).get(k, f"lab-{k + 1}") for k in range(labs)]
    plan = from_dict({"name": "marrow", "train": {"rounds": rounds}, "privacy": {"unit": unit}})
    tallies = {lab: made_tally(rng, 0.6, 400) for lab in lab_names}
    total = sum(tallies.values(), Tally.empty(21))
    central = made_tally(rng, 0.7, 1600)
    absences: dict[int, dict[str, str]] = {
        2: {lab_names[-1]: "dropped out (simulated)"},
        5: {lab_names[0]: "update holds 3 values that are not finite"},
    }
    lines, participation = [], []
    for r in range(1, rounds + 1):
        absent = absences.get(r, {})
        received = [lab for lab in lab_names if lab not in absent]
        participation.append(
            {"round": r, "expected": lab_names, "received": received, "absent": absent}
        )
        score = 0.6 * (1 - np.exp(-r / 4))
        scores = {"macro_f1": score, "balanced_accuracy": score + 0.05, "accuracy": score + 0.1}
        lines.append(
            {
                **participation[-1],
                "loss": {lab: 2 * np.exp(-r / 5) + 0.1 * rng.random() for lab in received},
                "global": scores,
                "labs": None,
                "up_bytes": 1_240_000 * len(received),
                "down_bytes": 1_236_000 * labs,
                "wall_s": 11.0 + rng.random(),
                "train_s": 9.5 + rng.random(),
            }
        )
    own = {lab: summarise(made_tally(rng, 0.35, 400), SCHEME) for lab in lab_names[:40]}
    counts_KC = rng.poisson(60 * rng.dirichlet(np.full(21, 0.5), labs) * 21)
    pixels = base64.b64encode(b"\xff\xd8\xff\xe0 not really").decode()
    private = {
        "epsilon": 7.96,
        "delta": 1e-3,
        "sigma": 1.31,
        "sampling_rate": 0.25,
        "steps": 96,
        "by_round": [
            {"round": r, "epsilon": 8.9 * np.sqrt(r / rounds), "macro_f1": 0.4 * r / rounds}
            for r in range(1, rounds + 1)
        ],
    }
    summary: dict[str, Any] = {
        "status": "completed",
        "plan_name": plan.name,
        "plan_sha256": plan.sha256,
        "weights_sha256": "5f" * 32,
        "seed": 1,
        "rounds": rounds,
        "global": summarise(total, SCHEME),
        "labs": {lab: summarise(t, SCHEME) for lab, t in tallies.items()},
        "participation": participation,
        "privacy": {"unit": unit}
        if unit == "none"
        else {"unit": unit, **private, "labs": {lab: {"epsilon": 7.96} for lab in lab_names}},
        "wire": {
            "up_bytes_per_lab_round": 1_240_000,
            "down_bytes_per_lab_round": 1_236_000,
            "secure_aggregation": False,
        },
        "timing": {"wall_s": 141.2, "train_s": 122.8, "overhead_s": 18.4},
        "partition": {
            "labs": lab_names,
            "codes": list(SCHEME.codes),
            "train_counts_KC": counts_KC.tolist(),
            "test_counts_KC": (counts_KC // 4).tolist(),
            "spec": "acquisition",
            "pseudo_patients": pseudo,
            "examples": {lab_names[0]: [f"data:image/jpeg;base64,{pixels}", "https://evil/x.png"]},
        },
        "confusion": {"codes": list(SCHEME.codes), "counts": total.confusion_CC.tolist()},
        "warnings": ["not differentially private: privacy.unit is none"] if unit == "none" else [],
        "versions": {"cytofed": "0.1.0", "torch": "2.12.0"},
    }
    if baselines:
        summary["baselines"] = {
            "central": summarise(central, SCHEME),
            "local": own,
            "local_own": own,
        }
        summary["gaps"] = {"central": gap(total, central, SCHEME, rng=rng, draws=50)}
    if not drawn:
        lines = []
        summary["global"] = {k: v for k, v in summary["global"].items() if isinstance(v, float)}
        summary |= {"confusion": None, "participation": [], "labs": None}
        summary["partition"] = {"pseudo_patients": pseudo}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plan.yaml").write_text(dump_plan(plan))
    return folder


def change(folder: Path, **keys: Any) -> Path:
    """Set keys of the run's summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


class StrictPage(HTMLParser):
    """Reads a page strictly: tags must nest; notes what it holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + " "

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an ordinary run, with its report."""
    folder = made_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder_of_a_run: Path) -> StrictPage:
    """The report of an ordinary run."""
    return StrictPage((folder_of_a_run / "report.html").read_text(encoding="utf-8"))


def test_report_loads_nothing_and_runs_nothing(page: StrictPage) -> None:
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form"}
    assert not page.handlers
    assert all(link.startswith("#") for link in page.links)  # no image of the summary either
    assert len(page.ids) == len(set(page.ids))


def test_report_shows_every_part_of_a_run(page: StrictPage) -> None:
    for title in (
        "Who holds what",
        "Learning",
        "Classes",
        "Labs",
        "Confidence",
        "Participation",
        "Cost",
        "Privacy",
        "Plan, and how to reproduce",
        "Scores and references",
    ):
        assert title in page.text
    assert re.search(r"is 0\.\d{3} (below|above) training on all images in one place", page.text)
    assert "update holds 3 values that are not finite" in page.text
    assert "5f" * 32 in page.text


def test_report_of_a_run_without_privacy_says_so(page: StrictPage) -> None:
    assert "Not differentially private." in page.text
    assert "not anonymous by itself" in page.text


def test_names_and_reasons_from_labs_cannot_inject_markup(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", rounds=3, names={0: HOSTILE})
    change(folder, confusion=None, **{"global": None})
    change(folder, warnings=[HOSTILE], plan_name=HOSTILE, versions={HOSTILE: HOSTILE})
    raw = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in raw
    shown = StrictPage(raw)
    assert HOSTILE in shown.text
    assert "script" not in shown.tags


def test_same_run_gives_the_same_bytes(folder_of_a_run: Path, tmp_path: Path) -> None:
    again = made_run(tmp_path / "elsewhere")
    assert write_report(again).read_bytes() == (folder_of_a_run / "report.html").read_bytes()


def test_page_does_not_grow_with_labs_beyond_thirty(tmp_path: Path) -> None:
    sizes = {}
    for labs in (30, 240):
        folder = made_run(tmp_path / str(labs), labs=labs, rounds=2, baselines=False)
        slim = change(folder, confusion=None, **{"global": None})
        sizes[labs] = write_report(slim).stat().st_size
    assert sizes[240] < sizes[30]


def test_run_that_failed_before_its_first_round_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.yaml").write_text("name: small\n")
    failed = {"status": "failed", "error": "no lab came within 600 s", "global": None, "labs": None}
    (folder / "summary.json").write_text(json.dumps(failed))
    text = StrictPage(write_report(folder).read_text()).text
    assert "no lab came within 600 s" in text
    assert "left no model" in text


def test_incomplete_run_names_the_labs_that_never_contributed(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", rounds=2, drawn=False)
    entry = {"expected": ["lab-1", "lab-9"], "received": ["lab-1"], "absent": {"lab-9": "late"}}
    change(folder, status="incomplete", rounds=1, participation=[{"round": 1, **entry}])
    text = StrictPage(write_report(folder).read_text()).text
    assert "1 of 2 rounds were applied; never contributed: lab-9" in text


def test_epsilon_is_never_shown_without_delta_and_unit(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", unit="patient", pseudo=True, drawn=False)
    text = StrictPage(write_report(folder).read_text()).text
    assert "epsilon 7.96 at delta 0.001, per pseudo-patient, add-or-remove" in text
    assert "protects no real person" in text
    assert "Not differentially private" not in text


def test_scores_that_were_paid_for_are_shown_as_released_and_part_of_epsilon(
    tmp_path: Path,
) -> None:
    folder = made_run(tmp_path / "run", unit="patient", drawn=False)
    privacy = json.loads((folder / "summary.json").read_text())["privacy"] | {
        "evaluation": {"epsilon": 1.2, "releases": 3, "sigma": 40.0},
        "total": {"epsilon": 8.4101},
        "noise": "seeded: this run can be repeated, so it protects nobody",
    }
    told = {"labs": 4, "noise_sd": 81.5, "macro_f1": 0.4321, "accuracy": 0.5}
    page = StrictPage(write_report(change(folder, privacy=privacy, released=told)).read_text())
    for words in (
        "epsilon 8.42 at delta 0.001, per patient, add-or-remove",
        "training alone costs 7.96, the 3 releases of noised scores alone 1.20",
        "noise of standard deviation 81.5",
        "0.432",
        "is seeded",
    ):
        assert words in page.text
    assert (
        "epsilon 8.42 at delta 0.001, per patient, add-or-remove, training and scores"
        in printed(json.loads((folder / "summary.json").read_text()))
    )
    deployed = change(folder, released=None, scores={"noised": True})
    assert "All scores are released scores" in StrictPage(write_report(deployed).read_text()).text


def private_run(folder: Path, **privacy: Any) -> Path:
    """A run of a private plan with these settings, on the same data as every other."""
    made_run(folder, rounds=3, unit="patient", drawn=False)
    tree: dict[str, Any] = {"name": "marrow", "train": {"rounds": 3}}
    plan = from_dict({**tree, "privacy": {"unit": "patient", **privacy}})
    (folder / "plan.yaml").write_text(dump_plan(plan))
    return change(folder, data_sha256="ab" * 32)


def test_accuracy_is_shown_against_epsilon_with_the_runs_beside_it(tmp_path: Path) -> None:
    folder = private_run(tmp_path / "eight", epsilon=8)
    alone = StrictPage(write_report(folder).read_text())
    assert "epsilon of training, delta 0.001, per patient, add-or-remove" in alone.text
    assert "other runs" not in alone.text
    for number, name in enumerate(("one", HOSTILE.replace("/", "")), start=1):
        private_run(tmp_path / name, epsilon=number)
    change(made_run(tmp_path / "open", rounds=3, drawn=False), data_sha256="ab" * 32)
    beside = StrictPage(write_report(folder).read_text())
    assert "other runs, at their end" in beside.text
    assert "without privacy 0." in beside.text
    for name in ("one", "open", "this run", HOSTILE.replace("/", "")):
        assert name in beside.text
    assert "script" not in beside.tags


@pytest.mark.parametrize("difference", ["data", "seed", "plan", "unfinished", "broken"])
def test_run_of_anything_else_is_not_compared_with(tmp_path: Path, difference: str) -> None:
    folder = private_run(tmp_path / "this", epsilon=8)
    before = write_report(folder).read_bytes()
    settings = {"max_norm": 0.5} if difference == "plan" else {}
    other = private_run(tmp_path / "other", epsilon=1, **settings)
    if difference == "data":
        change(other, data_sha256="cd" * 32)
    elif difference == "seed":
        change(other, seed=2)
    elif difference == "unfinished":
        change(other, status="incomplete")
    elif difference == "broken":
        (other / "summary.json").write_text("{")
    assert write_report(folder).read_bytes() == before


def test_image_unit_is_labelled_as_weaker_than_patient(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", unit="image", drawn=False)
    text = StrictPage(write_report(folder).read_text()).text
    assert "per image, add-or-remove" in text
    assert "protected much less than epsilon says" in text


def test_scores_per_lab_may_be_off(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", unit="patient", drawn=False)
    assert "Scores per lab are off" in StrictPage(write_report(folder).read_text()).text


def test_round_run_again_after_a_crash_counts_once_and_a_torn_line_is_skipped(
    tmp_path: Path,
) -> None:
    folder = made_run(tmp_path / "run", rounds=3)
    change(folder, **{"global": None, "labs": None, "partition": {}, "participation": []})
    whole = write_report(folder).read_bytes()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[0], *lines[1:], lines[2][:40]]))
    assert write_report(folder).read_bytes() == whole


def test_broken_line_inside_the_metrics_is_an_error_with_its_number(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", rounds=3)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "{not json", *lines[1:]]))
    with pytest.raises(InputError, match="line 2"):
        write_report(folder)


def test_folder_without_a_summary_says_how_to_finish_the_run(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").touch()
    with pytest.raises(InputError, match=r"no summary\.json") as caught:
        write_report(tmp_path)
    assert "--resume" in caught.value.hint


def test_figure_is_drawn_in_variables_that_both_themes_set(folder_of_a_run: Path) -> None:
    raw = (folder_of_a_run / "report.html").read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", raw, flags=re.DOTALL)
    assert len(svgs) >= 9
    for svg in svgs:
        bare = re.sub(r"var\(--\w+, #\w{6}\)", "", svg)
        assert not re.findall(r"(?:fill|stroke): #\w+", bare)
    dark = raw[raw.index("prefers-color-scheme:dark") :]
    for variable in figures.VARIABLES.values():
        assert f"--{variable}:" in dark


def test_tolerated_pairs_stand_next_to_each_other_in_the_confusion_matrix() -> None:
    order = figures.tolerance_order(SCHEME.tolerance_CC, np.ones(21))
    place = {SCHEME.codes[c]: position for position, c in enumerate(order)}
    assert sorted(order) == list(range(21))
    assert all(abs(place[a] - place[b]) == 1 for a, b in SCHEME.tolerated)


def printed(summary: dict[str, Any], **options: Any) -> str:
    """What the terminal shows."""
    stream = io.StringIO()
    render_summary(summary, Console(file=stream, width=100), **options)
    return stream.getvalue()


def test_terminal_shows_scores_labs_and_where_the_report_is(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", rounds=2, names={0: "[red]leeds[/red]"})
    text = printed(json.loads((folder / "summary.json").read_text()), run_dir=folder)
    for words in ("completed", "macro F1", "minus central", "[red]leeds[/red]", "(worst)"):
        assert words in text
    assert "not differentially private" in text
    assert str(folder / "report.html") in text


def test_terminal_shows_few_of_many_labs(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", labs=200, rounds=2)
    text = printed(json.loads((folder / "summary.json").read_text()))
    assert "the 5 worst of 200 labs" in text
    assert len(text.splitlines()) < 50


def test_terminal_shows_a_failed_run() -> None:
    assert "failed" in printed({"status": "failed", "global": None})
