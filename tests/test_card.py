"""Claims about the model card."""

from __future__ import annotations

from typing import Any

import pytest
from markdown_it import MarkdownIt

from cytofed.card import model_card
from cytofed.errors import InputError
from cytofed.plan import Plan, from_dict

PLAN = from_dict({"name": "marrow", "train": {"rounds": 12}})
SCORES: dict[str, Any] = {
    "macro_f1": 0.61,
    "balanced_accuracy": 0.63,
    "accuracy": 0.72,
    "weighted_f1": 0.71,
    "ece": 0.04,
    "images": 1602,
    "per_class": {
        "BLA": {"precision": 0.7, "recall": 0.6, "f1": 0.65, "support": 60},
        "ABE": {"precision": 0.1, "recall": 0.2, "f1": 0.13, "support": 2},
        "KSC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    },
    "tolerant": {"macro_f1": 0.7, "per_class": {}},
}


def made_summary(**keys: Any) -> dict[str, Any]:
    """The summary of an ordinary run, some keys changed."""
    summary: dict[str, Any] = {
        "status": "completed",
        "plan_name": "marrow",
        "plan_sha256": "ab" * 32,
        "weights_sha256": "5f" * 32,
        "seed": 1,
        "rounds": 12,
        "global": SCORES,
        "labs": {"lab-1": {"macro_f1": 0.5}, "lab-2": {"macro_f1": 0.6}},
        "partition": {
            "labs": ["lab-1", "lab-2"],
            "codes": ["ABE", "BLA", "KSC"],
            "train_counts_KC": [[5, 100, 0], [1, 200, 0]],
        },
        "privacy": {"unit": "none"},
    }
    return summary | keys


def private(unit: str, **keys: Any) -> dict[str, Any]:
    """The summary of a run with differential privacy."""
    figures = {"epsilon": 7.96, "delta": 1e-3, "sigma": 1.31, "sampling_rate": 0.25, "steps": 96}
    return made_summary(privacy={"unit": unit, **figures}, **keys)


def section(card: str, title: str) -> str:
    """The text under one heading, on one line."""
    parts = card.split("\n## ")
    return " ".join(next(p for p in parts if p.startswith(title)).split())


def test_card_has_the_sections_of_the_paper() -> None:
    card = model_card(made_summary(), PLAN)
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == [
        "Intended use",
        "Data",
        "Training",
        "Results",
        "Privacy",
        "Limits",
        "Identity",
        "Licence and attribution",
    ]


def test_card_says_that_it_is_no_medical_device() -> None:
    assert "**Not a medical device**" in section(model_card(made_summary(), PLAN), "Intended use")


def test_card_identifies_weights_and_plan() -> None:
    text = section(model_card(made_summary(), PLAN), "Identity")
    assert "5f" * 32 in text
    assert "ab" * 32 in text


def test_model_without_privacy_is_said_to_have_none_and_not_to_be_anonymous() -> None:
    text = section(model_card(made_summary(), PLAN), "Privacy")
    assert "not differentially private" in text
    assert "not anonymous by itself (EDPB Opinion 28/2024)" in text
    assert "epsilon" not in text


def test_epsilon_stands_with_delta_unit_and_adversary() -> None:
    text = section(model_card(private("patient"), PLAN), "Privacy")
    assert "epsilon 7.96 at delta 0.001, per patient, add-or-remove" in text
    assert "the coordinator, other labs, users of the model" in text
    assert "not anonymous by itself" in text


def test_scores_that_were_paid_for_are_part_of_the_epsilon() -> None:
    summary = private("patient")
    summary["privacy"] |= {"total": {"epsilon": 8.4101}, "evaluation": {"releases": 3}}
    text = section(model_card(summary, PLAN), "Privacy")
    assert "epsilon 8.42 at delta 0.001" in text, "rounded up"
    assert "3 releases of noised scores; training alone: epsilon 7.96" in text


def test_noise_of_a_simulation_is_said_to_protect_nobody() -> None:
    summary = private("patient")
    assert "protects nobody" not in model_card(summary, PLAN)
    summary["privacy"]["noise"] = "seeded: this run can be repeated, so it protects nobody"
    assert "protects nobody" in section(model_card(summary, PLAN), "Privacy")


def test_exact_and_released_scores_are_told_apart() -> None:
    assert section(model_card(made_summary(), PLAN), "Results").startswith("Results On held-out")
    released = private("patient", released={"macro_f1": 0.4321})
    text = section(model_card(released, PLAN), "Results")
    assert text.startswith("Results Exact scores")
    assert "macro F1 0.432" in text
    deployed = private("patient", scores={"noised": True})
    assert section(model_card(deployed, PLAN), "Results").startswith("Results Released scores")


def test_pseudo_patients_are_never_called_patients() -> None:
    partition = made_summary()["partition"] | {"pseudo_patients": True}
    text = section(model_card(private("patient", partition=partition), PLAN), "Privacy")
    assert "per pseudo-patient, add-or-remove" in text
    assert "no real person is protected" in text


def test_image_unit_is_said_to_protect_patients_less() -> None:
    text = section(model_card(private("image"), PLAN), "Privacy")
    assert "per image, add-or-remove" in text
    assert "protected far less" in text


def test_overlapping_patients_are_said_to_add_up() -> None:
    plan = from_dict({"patients": "may_overlap"})
    assert "epsilons of the labs add up" in section(model_card(private("patient"), plan), "Privacy")
    summary = private("patient")
    summary["privacy"]["federation"] = {"epsilon": 23.456}
    assert "add up, to 23.46." in section(model_card(summary, plan), "Privacy")


def test_classes_that_were_barely_or_never_seen_are_named() -> None:
    card = model_card(made_summary(), PLAN)
    assert "not to be trusted: KSC" in section(card, "Data")
    assert "Scores of ABE rest on fewer than 10" in section(card, "Limits")
    assert "Not tested at all: KSC" in section(card, "Limits")


def test_model_of_an_incomplete_run_says_so() -> None:
    card = model_card(made_summary(status="incomplete", rounds=7), PLAN)
    assert "**The run is incomplete**" in card
    assert "7 of 12 rounds" in card


def test_run_without_a_model_has_no_card() -> None:
    with pytest.raises(InputError, match="without a model"):
        model_card(made_summary(status="failed", weights_sha256=None), PLAN)


def test_model_that_was_not_evaluated_has_a_card() -> None:
    card = model_card(made_summary(labs=None, partition=None, **{"global": None}), PLAN)
    assert "not evaluated" in section(card, "Results")


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a | b", "[x](javascript:alert(1))", "# *b* `c`"]
)
def test_names_show_as_they_are_and_inject_no_markup(name: str) -> None:
    partition = {"labs": [name, "lab-2"], "codes": ["BLA"], "train_counts_KC": [[3], [4]]}
    card = model_card(made_summary(plan_name=name, partition=partition), Plan())
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    shown = MarkdownIt("commonmark").parseInline(card.splitlines()[0][2:])[0].children or []
    assert "<img" not in html
    assert "<a " not in html
    assert "".join(t.content for t in shown) == f"Model card: {name}"
    assert html.count("<h1>") == 1
