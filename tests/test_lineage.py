"""A model's line: what it was trained from, and what the promises of all trainings come to."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytofed.encoder import start_file
from cytofed.errors import InputError
from cytofed.lineage import (
    Lineage,
    lineage_of,
    lineage_of_start,
    link_of,
    start_warnings,
)
from cytofed.model_file import ModelInfo, read_info, write_model
from cytofed.plan import Plan, from_dict
from cytofed.privacy.accounting import price
from cytofed.start import read_start, write_start


def plan_of(unit: str = "patient", *, start: str = "random", name: str = "p") -> Plan:
    privacy: dict[str, object] = {"unit": "none"}
    if unit != "none":
        privacy = {"unit": unit, "sigma": 4.0, "delta": 1e-3, "declared_patients": 50}
    return from_dict(
        {
            "name": name,
            "labels": {"scale": {"size_px": 32}},
            "model": {"width": 8, "start": start},
            "train": {"rounds": 5, "steps_per_round": 4},
            "privacy": privacy,
        }
    )


def deployed(plan: Plan, run: str = "r1") -> Lineage:
    return Lineage("random").then(link_of(plan, run=run, federation="f"))


def test_two_private_trainings_compose_as_one_of_all_steps_would() -> None:
    plan = plan_of()
    line = deployed(plan).then(link_of(plan, run="r2", federation="f"))
    once, both = deployed(plan).whole(), line.whole()
    events = [event for link in line.links for event in link.events]
    assert both.epsilon == pytest.approx(price(events, 1e-3).epsilon)
    assert once.epsilon < both.epsilon < 2 * once.epsilon
    assert both.unit == "patient"
    assert not line.sole
    assert deployed(plan).sole


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (deployed(plan_of("none")), "run r1 trained without differential privacy"),
        (Lineage("unknown"), "origin is not known"),
        (Lineage("random").then(link_of(plan_of(), run="sim")), "simulation, whose noise is"),
        (deployed(plan_of("image")), "different units"),
    ],
)
def test_one_link_that_promises_nothing_unbounds_the_line(line: Lineage, why: str) -> None:
    after = line.then(link_of(plan_of(), run="r2", federation="f"))
    assert math.isinf(after.whole().epsilon)
    told = after.summary(deployed=True)["whole"]
    assert told["epsilon"] is None
    assert why in told["statement"]
    assert told["statement"].startswith("unbounded")


def test_a_patient_of_several_labs_has_paid_at_each_of_them() -> None:
    plan = plan_of()
    shared = replace(plan, patients="may_overlap")
    begin = Lineage("random")
    alone = begin.then(link_of(plan, run="r", federation="f", labs=3)).whole()
    known_to_all = begin.then(link_of(shared, run="r", federation="f", labs=3)).whole()
    tripled = price(link_of(plan_of(), run="r").events * 3, 1e-3)
    assert alone.epsilon < known_to_all.epsilon == pytest.approx(tripled.epsilon)


def test_made_up_patients_and_real_ones_are_no_unit_of_one_line() -> None:
    """A real patient has images of many pseudo-patients: the first run bounds nothing for it."""
    made_up = Lineage("random").then(link_of(plan_of(), run="a", pseudo=True))
    line = made_up.then(link_of(plan_of(), run="b"))
    assert math.isinf(line.whole(deployed=False).epsilon)
    assert "different units" in line.summary(deployed=False)["whole"]["statement"]
    again = made_up.then(link_of(plan_of(), run="b", pseudo=True))
    assert math.isfinite(again.whole(deployed=False).epsilon)


def test_in_a_simulation_seeded_noise_stands_for_that_of_a_deployment() -> None:
    line = Lineage("random").then(link_of(plan_of(), run="a")).then(link_of(plan_of(), run="b"))
    assert math.isfinite(line.whole(deployed=False).epsilon)
    assert math.isinf(line.whole().epsilon)


def test_a_line_comes_back_from_text_and_a_damaged_one_is_refused() -> None:
    line = deployed(plan_of()).then(link_of(plan_of("none"), run="r2", federation="g"))
    assert Lineage.from_text(line.to_text(), source="x") == line
    tree = json.loads(line.to_text())
    for damaged in (
        "{",
        "[]",
        json.dumps(tree | {"begins": "nowhere"}),
        json.dumps(tree | {"links": [{}]}),
        json.dumps({key: tree[key] for key in ("format", "begins")}),
    ):
        with pytest.raises(InputError, match="lineage cannot be read"):
            Lineage.from_text(damaged, source="x")


def model_file(folder: Path, lineage: str) -> Path:
    """The start model of a plan as a run would end with it."""
    write_start(plan_of(), folder)
    start = read_start(folder)
    assert start is not None
    info = replace(start.info, lineage=lineage)
    write_model(folder / "model.safetensors", start.tensors, info)
    return folder / "model.safetensors"


def test_a_start_model_carries_the_line_of_what_it_starts_from(tmp_path: Path) -> None:
    line = deployed(plan_of("none"))
    file = model_file(tmp_path, line.to_text())
    assert lineage_of(tmp_path / "start.safetensors") == Lineage("random")
    assert lineage_of(file) == line
    next_folder = tmp_path / "next"
    next_folder.mkdir()
    write_start(plan_of(start=str(file)), next_folder)
    assert (
        Lineage.from_text(read_info(next_folder / "start.safetensors").lineage, source="") == line
    )


def test_a_file_without_a_line_is_of_unknown_origin_and_an_encoder_with_its_card_is_not(
    tmp_path: Path,
) -> None:
    assert lineage_of(model_file(tmp_path, "")) == Lineage("unknown")
    assert lineage_of_start("blood") == Lineage("images", "blood")
    shutil.copy(start_file("blood"), tmp_path / "bare.safetensors")
    assert lineage_of(tmp_path / "bare.safetensors").begins == "unknown"


def test_a_private_plan_from_a_model_without_privacy_is_warned_of(tmp_path: Path) -> None:
    file = model_file(tmp_path, deployed(plan_of("none")).to_text())
    (told,) = start_warnings(plan_of(start=str(file)), deployed=True)
    assert "run r1" in told
    assert "unbounded: run r1 trained without differential privacy" in told
    assert start_warnings(plan_of("none", start=str(file)), deployed=True) == []
    assert start_warnings(plan_of(), deployed=True) == []
    assert start_warnings(plan_of(start="blood"), deployed=True) == []


def test_metadata_of_a_model_file_keeps_the_line(tmp_path: Path) -> None:
    text = deployed(plan_of()).to_text()
    info = ModelInfo("cytonet", 8, "seven", tuple("ABCDEFG"), 32, 21.6, lineage=text)
    write_model(tmp_path / "m.safetensors", {"w": np.zeros(1, np.float32)}, info)
    assert read_info(tmp_path / "m.safetensors").lineage == text
