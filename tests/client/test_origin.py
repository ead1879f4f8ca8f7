"""A lab knows the models that it helped to train again, whatever their files say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cytofed.client.origin import Known, known_of, origin_told, refuse_disguised
from cytofed.documents import Member, Offer, Roster
from cytofed.encoder import Given
from cytofed.errors import VerificationError
from cytofed.lineage import Lineage, link_of
from cytofed.model_file import write_model
from cytofed.plan import Plan, from_dict
from cytofed.privacy.identity import Identity
from cytofed.start import read_start, write_start

ROSTER = Roster("f", 1, tuple(Member(Identity.generate(lab).public, "", 50) for lab in "abc"))


def plan_of(unit: str, *, start: str = "random", seed: int = 0) -> Plan:
    privacy: dict[str, object] = {"unit": "none"}
    if unit != "none":
        privacy = {"unit": unit, "sigma": 4.0, "delta": 1e-3, "declared_patients": 50}
    return from_dict(
        {
            "labels": {"scale": {"size_px": 32}},
            "model": {"width": 8, "start": start},
            "train": {"rounds": 5, "steps_per_round": 4, "seed": seed},
            "privacy": privacy,
        }
    )


def result(root: Path, plan: Plan, run: str, *, claims: str = "") -> tuple[Offer, Path]:
    """A run that the lab took part in, and the model that came to it."""
    offer = Offer(run, plan, ROSTER)
    folder = root / "models" / offer.sha256
    folder.mkdir(parents=True)
    write_start(replace(plan, model=replace(plan.model, start="random")), folder)
    start = read_start(folder)
    assert start is not None
    file = folder / "model.safetensors"
    write_model(file, start.tensors, replace(start.info, lineage=claims))
    return offer, file


def of(root: Path, *offers: Offer) -> Known:
    return known_of(root / "models", offers)


def test_the_price_of_what_the_lab_took_part_in_is_of_its_own_approved_plans(
    tmp_path: Path,
) -> None:
    """The first file claims to begin with random weights and no run."""
    first, file = result(tmp_path, plan_of("none"), "r1", claims=Lineage("random").to_text())
    second_plan = plan_of("patient", start=str(Given.of(file)), seed=1)
    told = origin_told(second_plan, of(tmp_path, first))
    assert "unbounded: run r1 trained without differential privacy" in told
    second, file = result(tmp_path, second_plan, "r2")
    third = plan_of("patient", start=str(Given.of(file)), seed=2)
    assert "run r1, r2, in which" in origin_told(third, of(tmp_path, first, second))


def test_two_private_runs_are_told_with_the_epsilon_of_both(tmp_path: Path) -> None:
    first, file = result(tmp_path, plan_of("patient"), "r1")
    plan = plan_of("patient", start=str(Given.of(file)), seed=1)
    told = origin_told(plan, of(tmp_path, first))
    both = Lineage("random", links=(
        link_of(first.plan, run="r1", federation="f"), link_of(plan, run="r2", federation="f"),
    )).whole()  # fmt: skip
    assert str(both) in told


def test_a_lab_that_never_took_part_is_told_so_and_counts_nothing(tmp_path: Path) -> None:
    _, file = result(tmp_path, plan_of("none"), "r1")
    plan = plan_of("patient", start=str(Given.of(file)), seed=1)
    nobody = of(tmp_path)
    assert "never came here" in origin_told(plan, nobody)
    assert nobody.own_links(plan) == ()
    refuse_disguised(plan, file, nobody)
    assert origin_told(plan_of("patient"), nobody) == ""
    assert origin_told(plan_of("patient", start="blood"), nobody) == ""


@pytest.mark.parametrize("tells", [True, False])
def test_the_labs_own_model_under_another_hash_is_refused(tmp_path: Path, tells: bool) -> None:
    """The coordinator writes its line away, or names it under a file that never came here."""
    first, file = result(tmp_path, plan_of("none"), "r1")
    start = read_start(file.parent)
    assert start is not None
    line = Lineage("random")
    if tells:
        line = line.then(link_of(first.plan, run="r1", federation="f"))
        start.tensors["head.bias"] += 1  # trained on elsewhere
    other = tmp_path / "other.safetensors"
    write_model(other, start.tensors, replace(start.info, lineage=line.to_text()))
    plan = plan_of("patient", start=str(Given.of(other)), seed=1)
    known = of(tmp_path, first)
    assert "never came here" in origin_told(plan, known)
    with pytest.raises(VerificationError, match="in which this lab took part"):
        refuse_disguised(plan, other, known)
    refuse_disguised(plan_of("patient", start=str(Given.of(file)), seed=1), file, known)
