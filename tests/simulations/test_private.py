"""A federation under patient-level differential privacy, each virtual lab on its own ledger."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from cytofed.client.split import hold_out_alone
from cytofed.errors import InputError
from cytofed.lineage import lineage_of
from cytofed.plan import load_plan
from cytofed.privacy.accounting import epsilon_for
from cytofed.privacy.ledger import Ledger
from cytofed.simulations.notebook import Run
from cytofed.simulations.simulate import Request

Small = Callable[..., Request]


class Simulate(Protocol):
    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


PRIVATE = ("privacy.unit=patient", "simulation.pseudo_patient_cells=4", "simulation.labs=2")


def test_every_lab_pays_what_one_accountant_over_all_steps_says(
    small: Small, directly: Simulate
) -> None:
    request = small(*PRIVATE, "train.rounds=3")
    privacy = directly(request)["privacy"]
    assert privacy["unit"] == "patient"
    assert privacy["steps"] == 3 * 2
    expected = epsilon_for(privacy["sigma"], 1e-5, 0.25, 6)
    assert privacy["epsilon"] == pytest.approx(expected)
    for lab in ("lab-1", "lab-2"):
        assert privacy["labs"][lab]["epsilon"] == pytest.approx(expected, abs=1e-3)
    one_round = epsilon_for(privacy["sigma"], 1e-5, 0.25, 2)
    assert privacy["labs"]["lab-1"]["epsilon"] > one_round + 0.1, "not reset each round"
    by_round = privacy["by_round"]
    assert [entry["round"] for entry in by_round] == [1, 2, 3]
    spent = [entry["epsilon"] for entry in by_round]
    assert one_round < spent[0] < spent[1] < spent[2]
    assert spent[2] == privacy["epsilon"] == privacy["labs"]["lab-1"]["epsilon"]


def test_a_lab_that_dropped_out_has_spent_less(small: Small, directly: Simulate) -> None:
    request = small(*PRIVATE, "train.rounds=2", "simulation.population.dropout=0.5")
    summary = directly(request)
    spent = {lab: entry["epsilon"] for lab, entry in summary["privacy"]["labs"].items()}
    trained = {
        lab: sum(lab in record["received"] for record in summary["participation"]) for lab in spent
    }
    assert sum(trained.values()) == 2
    for lab, epsilon in spent.items():
        assert (epsilon > 0) == (trained[lab] > 0)


def test_the_ledger_holds_one_settled_event_per_round(small: Small, directly: Simulate) -> None:
    request = small(*PRIVATE, "train.rounds=3")
    directly(request)
    path = request.out / "checkpoints" / "ledgers" / "lab-1.sqlite"
    with Ledger.open(path, pool="federation") as ledger:
        events = ledger.summary()["events"]
    assert [event["round"] for event in events] == [1, 2, 3]
    assert {event["state"] for event in events} == {"settled"}


def test_no_loss_and_no_score_of_a_single_lab_is_told(small: Small, directly: Simulate) -> None:
    request = small(*PRIVATE)
    summary = directly(request)
    assert summary["labs"] is None
    for line in (request.out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["loss"] == {}
        assert record["labs"] is None


def test_pseudo_patients_and_seeded_noise_are_labelled_everywhere(
    small: Small, directly: Simulate
) -> None:
    request = small(*PRIVATE)
    summary = directly(request, report=True)
    assert summary["privacy"]["pseudo_patients"] is True
    assert "seeded" in summary["privacy"]["noise"]
    assert any("pseudo-patients" in warning for warning in summary["warnings"])
    for name in ("model_card.md", "report.html"):
        text = (request.out / name).read_text()
        assert "pseudo-patient" in text
        assert "seeded" in text


def statements(tree: object) -> list[str]:
    """Every ``statement`` and ``per`` in a JSON tree."""
    if isinstance(tree, dict):
        own = [str(tree[key]) for key in ("statement", "per") if key in tree]
        return own + [told for value in tree.values() for told in statements(value)]
    return [told for value in tree for told in statements(value)] if isinstance(tree, list) else []


def test_nothing_that_a_run_over_pseudo_patients_says_is_of_patients(
    small: Small, directly: Simulate
) -> None:
    request = small(*PRIVATE, "evaluation.sigma=4")
    summary = directly(request, report=True)
    told = statements(summary)
    assert len(told) == 9, "training, scores, total, the federation and the model's line"
    assert all("pseudo-patient" in text for text in told)
    assert Run(request.out).privacy["per"] == "pseudo-patient"
    assert "per pseudo-patient" in Run(request.out)._repr_html_()
    for name in ("summary.json", "model_card.md", "report.html"):
        text = (request.out / name).read_text()
        assert "per patient" not in text, name
        assert not re.search(r"x [\d,]+ patients", text), name


@pytest.fixture
def of_patients(few: Path, tmp_path: Path) -> Path:
    """The few images once more, as a CSV that names 16 patients."""
    rows = ["path,label,patient"]
    for number, image in enumerate(sorted(few.rglob("*.jpg"))):
        rows.append(f"{image},{image.parent.name},p{number % 16}")
    shutil.copytree(few, tmp_path / "data")
    text = "\n".join(rows).replace(str(few), str(tmp_path / "data"))
    (tmp_path / "data" / "cells.csv").write_text(text)
    return tmp_path / "data"


def test_a_column_of_patients_is_used_or_asked_about_and_never_overlooked(
    small: Small, directly: Simulate, of_patients: Path
) -> None:
    with pytest.raises(InputError, match='column "patient"') as refused:
        directly(small(*PRIVATE, data=(of_patients,)))
    assert "--patients 'column:patient'" in str(refused.value.hint)
    made_up = directly(small(*PRIVATE, data=(of_patients,), patients="none"))
    assert made_up["privacy"]["pseudo_patients"] is True
    public = directly(small("simulation.labs=2", data=(of_patients,), out=of_patients / "public"))
    assert any("--patients 'column:patient'" in warning for warning in public["warnings"])


def test_real_patients_are_held_out_each_by_its_own_name(
    small: Small, directly: Simulate, of_patients: Path
) -> None:
    summary = directly(small(*PRIVATE, data=(of_patients,), patients="column:patient"))
    names = [f"p{number}" for number in range(16)]
    held = sum(hold_out_alone(names, fraction=0.2, seed=summary["seed"]))
    assert sum(map(sum, summary["partition"]["test_counts_KC"])) == 3 * held > 0
    assert any("holds nobody out" in warning for warning in summary["warnings"])


def test_same_seed_same_noise_same_weights(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    first = directly(small(*PRIVATE, out=tmp_path / "a"))
    again = directly(small(*PRIVATE, out=tmp_path / "b"))
    other = directly(small(*PRIVATE, "train.seed=1", out=tmp_path / "c"))
    assert first["weights_sha256"] == again["weights_sha256"] != other["weights_sha256"]


def test_delta_is_by_the_rule_over_the_patients_of_all_labs_and_in_the_plan_of_the_run(
    small: Small, directly: Simulate
) -> None:
    request = small(*PRIVATE, "privacy.declared_patients=30000", "train.rounds=1")
    summary = directly(request, report=True)
    assert summary["privacy"]["delta"] == 1 / 600_000
    told = f"delta {1 / 600_000:.4g} (x 60,000 pseudo-patients: 0.1)"
    for name in ("model_card.md", "report.html"):
        assert told in (request.out / name).read_text()
    assert summary["privacy"]["federation"]["delta_times_patients"] == pytest.approx(0.1)
    plan = load_plan(request.out / "plan.yaml")
    assert plan.privacy.delta == 1 / 600_000
    assert plan.sha256 == summary["plan_sha256"]
    assert directly(replace(request, resume=True))["plan_sha256"] == summary["plan_sha256"]


def test_a_delta_above_half_a_patient_of_all_labs_is_refused_before_training(
    small: Small, directly: Simulate
) -> None:
    asked = ("privacy.delta=1e-3", "privacy.declared_patients=300")  # 300 alone would pass
    request = small(*PRIVATE, *asked)
    with pytest.raises(InputError, match=r"delta=0\.001 <= .* N=600 patients") as refused:
        directly(request)
    assert "set privacy.delta=" in str(refused.value.hint)
    assert not request.out.exists()


def test_private_and_secure_go_together(small: Small, directly: Simulate) -> None:
    request = small(
        "privacy.unit=patient",
        "simulation.pseudo_patient_cells=3",
        "simulation.labs=4",
        "secure_aggregation.enabled=true",
    )
    summary = directly(request)
    assert summary["status"] == "completed"
    assert summary["privacy"]["labs"]["lab-4"]["epsilon"] > 0


@pytest.mark.parametrize("strategy", ["fedprox", "fednag", "scaffold", "local_norms", "fedadam"])
def test_strategies_train_under_privacy(strategy: str, small: Small, directly: Simulate) -> None:
    summary = directly(small(*PRIVATE, f"strategy.name={strategy}", "train.optimizer=sgd"))
    assert summary["status"] == "completed"


def test_a_simulation_of_the_head_alone_trains_in_closed_form(
    small: Small, directly: Simulate
) -> None:
    summary = directly(small(*PRIVATE, "model.trainable=head"))
    assert summary["status"] == "completed"
    assert summary["wire"]["up_bytes_per_lab_round"] < 20_000


def test_the_line_of_a_model_is_in_its_file_its_summary_and_its_card(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    public = small("simulation.labs=2", "train.rounds=1", out=tmp_path / "public")
    assert directly(public)["lineage"]["sole"]
    alone = small(*PRIVATE, "train.rounds=1", out=tmp_path / "alone")
    own = directly(alone)["lineage"]["whole"]
    assert "users of the model" in (alone.out / "model_card.md").read_text()
    for first, bounded in ((public, False), (alone, True)):
        start = f"model.start={first.out / 'model.safetensors'}"
        second = small(*PRIVATE, "train.rounds=1", start, out=tmp_path / f"from-{first.out.name}")
        summary, card = directly(second), second.out / "model_card.md"
        whole = summary["lineage"]["whole"]
        assert len(summary["lineage"]["links"]) == 2
        assert lineage_of(second.out / "model.safetensors").links[0].run == "small"
        assert any("was trained before" in warning for warning in summary["warnings"])
        if bounded:
            assert own["epsilon"] < whole["epsilon"] < math.inf
        else:
            assert whole["epsilon"] is None
            assert "unbounded: run small trained without differential privacy" in card.read_text()
        assert "users of the model." not in card.read_text()
