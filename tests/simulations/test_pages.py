"""Reports in a real browser: on a desk, on a phone in the dark, on paper, without a complaint."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cytofed.simulations.attacks import picture_of
from cytofed.simulations.audit_report import VERSION
from cytofed.simulations.report import write_report as write_run_report
from cytofed.simulations.sweep_report import write_report as write_sweep_report

from .browser import Browser, find_browser
from .test_report import StrictPage, made_run
from .test_sweep_report import made_sweep

KINDS = ("run", "sweep", "audit")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind, of made-up figures."""
    home = tmp_path_factory.mktemp("pages")
    run = made_run(home / "run", labs=5, rounds=8)
    audited = made_run(home / "audited", labs=3, rounds=4, unit="patient", pseudo=True)
    plan_sha256 = json.loads((audited / "summary.json").read_text())["plan_sha256"]
    check = {
        "what": "canaries, Gaussian",
        "claimed": "epsilon 8.00 (delta 0.001) [patient, whoever sees what a lab sends]",
        "found": "epsilon >= 4.10 at 95%",
        "verdict": "PASS: no violation found",
        "remark": "assumes a Gaussian mechanism",
    }
    controls = {
        "checks": ["replay", "noise"],
        "shipped": {"fault": "none", "checks": {}, "caught": False},
        "faults": [{"fault": "noise off", "checks": {"noise": "no noise"}, "caught": True}],
    }
    found = {
        "version": VERSION,
        "plan_sha256": plan_sha256,
        "violations": 0,
        "checks": [check, {**check, "what": "canaries, Steinke"}],
        "leaves": [{"what": "scores", "found": "exact", "verdict": "note", "remark": "r" * 90}],
        "controls": controls,
        "attacks": made_attacks(),
    }
    (audited / "audit.json").write_text(json.dumps(found))
    swept = home / "sweep"
    swept.mkdir()
    (swept / "sweep.json").write_text(json.dumps(made_sweep(fail=True)))
    return {
        "run": write_run_report(run),
        "sweep": write_sweep_report(swept),
        "audit": write_run_report(audited),
    }


def made_attacks() -> dict[str, Any]:
    pictures = [picture_of(np.zeros((8, 8, 3), np.float32))] * 4
    seen = {"likeness": 0.5, "recognised": 0.25, "matched": 0.5, "took_part": 1.0}
    way = {"way": "clipped and noised", **seen, "pictures": pictures}
    sums = [{"images": n, **seen, "held_out": 0.3, "noised": 0.1} for n in (1, 24)]
    of_round = {
        "way": "secure sum of 12 labs, clipped and noised",
        "of_plan": True,
        "noised": True,
        "likeness": 0.85,
        "held_out": 0.7,
        "recognised": 2,
        "recognised_held_out": 0,
        "images": 4000,
        "images_held_out": 1000,
        "gives_away": True,
        "auc": 0.51,
        "interval": [0.49, 0.53],
        "pictures": pictures,
        "nearest": pictures,
    }
    colluding = [
        {"colluding": k, "left": 3 - k, "opened": k == 2, "cosine": 0.5, **seen} for k in range(3)
    ]
    return {
        "membership": {"missing": "needs a simulation's folder"},
        "inversion": {
            "images": pictures,
            "sigma": 2.0,
            "max_norm": 1.0,
            "recognisable": 0.8,
            "ways": [way],
            "sums": sums,
        },
        "round": {
            "labs": 12,
            "images": 4000,
            "steps": 8.0,
            "changed": ["12 of 20 labs, which is easier for the attacker"],
            "confidence": 0.95,
            "recognisable": 0.8,
            "apart": 0.5,
            "rows": [of_round],
        },
        "seat": {
            "images": pictures,
            "candidates": 16,
            "labs": 8,
            "rows": [{**way, "holds": "one lab's masked upload"}],
        },
        "collusion": {
            "labs": 3,
            "threshold": 2,
            "lying_from": 1,
            "candidates": 16,
            "curves": [{"cells": 1, "rows": colluding}, {"cells": 6, "rows": colluding}],
        },
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium on this machine: reports are not looked at in a browser")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("kind", KINDS)
def test_report_has_no_reference_to_anything_outside(kind: str, pages: dict[str, Path]) -> None:
    text = pages[kind].read_text()
    page = StrictPage(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)


@pytest.mark.parametrize("kind", KINDS)
def test_browser_has_nothing_to_complain_about_and_nothing_runs_off_the_side(
    kind: str, pages: dict[str, Path], browser: Browser
) -> None:
    desk = browser.show(pages[kind])
    phone = browser.show(pages[kind], width_px=390, dark=True)
    paper = browser.show(pages[kind], width_px=794, medium="print")
    for shown in (desk, phone, paper):
        assert shown.complaints == []
        assert [url for url in shown.requests if not url.startswith("data:")] == [
            pages[kind].resolve().as_uri()
        ]
    assert desk.width_px == 1200
    assert phone.width_px == 390
    assert paper.width_px == 794
    assert phone.narrowest_px > 60
    assert brightness(desk.png) > 200
    assert brightness(phone.png) < 80
    assert brightness(paper.png) > 200


def brightness(png: bytes) -> float:
    """Of most of a page: the median over its pixels."""
    return float(np.median(np.asarray(Image.open(io.BytesIO(png)).convert("L"))))
