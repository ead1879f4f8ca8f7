"""A plan's privacy settings in steps, noise and price."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from cytofed.cli import cli
from cytofed.errors import InputError
from cytofed.plan import Plan, load_plan
from cytofed.plan_check import check_plan
from cytofed.privacy.accounting import epsilon_for
from cytofed.privacy.terms import (
    declared_of,
    delta_of,
    patients_of,
    private_steps,
    terms_of,
    with_delta,
)


def private(*overrides: str) -> Plan:
    return load_plan("demo", ["privacy.unit=patient", *overrides])


def test_a_unit_alone_gives_the_documented_defaults() -> None:
    terms = terms_of(private())
    assert terms is not None
    assert (terms.delta, terms.training.sampling_rate) == (1e-5, 0.25)
    assert (terms.max_norm, terms.cells_per_unit) == (1.0, 16)
    assert 7.9 < terms.guarantee.epsilon <= 8.0
    assert "per patient, add-or-remove" in str(terms.guarantee)


def test_no_unit_has_no_terms() -> None:
    assert terms_of(load_plan("demo")) is None


def test_epsilon_and_sigma_follow_from_each_other_over_all_steps() -> None:
    terms = terms_of(private("privacy.epsilon=3"))
    assert terms is not None
    assert terms.steps == private_steps(private()) * private().train.rounds
    back = terms_of(private(f"privacy.sigma={terms.training.sigma!r}"))
    assert back is not None
    assert back.guarantee.epsilon == pytest.approx(terms.guarantee.epsilon, abs=1e-6)
    whole = epsilon_for(terms.training.sigma, 1e-5, 0.25, terms.steps)
    assert whole == pytest.approx(terms.guarantee.epsilon, abs=1e-6)


def test_local_epochs_become_steps_by_the_sampling_rate() -> None:
    assert private_steps(private("train.local_epochs=3", "privacy.sampling_rate=0.25")) == 12
    assert private_steps(private("train.local_epochs=0.1")) == 1
    assert private_steps(private("train.steps_per_round=7")) == 7


@pytest.mark.parametrize("key", ["epsilon", "sigma"])
def test_an_epsilon_without_a_unit_is_no_silent_training_without_privacy(key: str) -> None:
    with pytest.raises(InputError, match=r"privacy\.unit is none") as refusal:
        check_plan(load_plan("demo", [f"privacy.{key}=3"]))
    assert "privacy.unit=patient" in refusal.value.hint
    check_plan(load_plan("demo", [f"privacy.{key}=null"]))


def test_both_epsilon_and_sigma_are_refused() -> None:
    with pytest.raises(InputError, match="both"):
        private("privacy.epsilon=1", "privacy.sigma=1")


def test_the_default_delta_is_a_number_once_the_labs_are_known() -> None:
    one = private("privacy.declared_patients=3000")
    assert one.privacy.delta is None
    assert with_delta(one, 3 * 3000).privacy.delta == 1e-5
    assert with_delta(one, 20 * 3000).privacy.delta == 1 / 600_000
    assert with_delta(load_plan("demo"), 60_000).privacy.delta is None, "nobody is protected"
    listed = private("privacy.declared_patients={leeds: 20000, york: 5000}")
    assert (patients_of(listed), patients_of(one), patients_of(one, 4)) == (25_000, 3000, 12_000)
    assert delta_of(listed) == 1 / 250_000


def test_a_delta_above_half_a_patient_of_all_labs_is_refused() -> None:
    named = private("privacy.declared_patients=1000", "privacy.delta=5e-4")
    assert terms_of(named) is not None
    with pytest.raises(InputError, match="N=2000 patients"):
        with_delta(named, patients_of(named, 2) or 0)
    with pytest.raises(InputError, match="N=1001 patients"):
        terms_of(private("privacy.declared_patients=1001", "privacy.delta=5e-4"))
    with pytest.raises(InputError, match="N=1200 patients"):
        terms_of(private("privacy.declared_patients={a: 600, b: 600}", "privacy.delta=5e-4"))


def test_a_delta_at_which_a_whole_ledger_would_say_nothing_is_refused() -> None:
    """A ledger states everything at the smallest delta of any plan that was approved."""
    with pytest.raises(InputError, match="Expected 1e-12 <= "):
        private("privacy.delta=1e-20")


def test_plan_show_and_check_say_where_delta_comes_from() -> None:
    asked = ["demo", "--set", "privacy.unit=patient", "--set"]
    for command in ("show", "check"):
        two = [*asked, "privacy.declared_patients={a: 20000, b: 5000}"]
        out = CliRunner().invoke(cli, ["plan", command, *two]).output
        assert "delta    4e-06 by the rule min(1e-5, 1/(10 N)); N is 25,000, of 2 labs" in out
        assert ("(x 25,000 patients: 0.1)" in out) == (command == "show")
        one = [*asked, "privacy.declared_patients=150"]
        out = CliRunner().invoke(cli, ["plan", command, *one]).output
        assert "N is 150 for one lab, and that for each lab of a run" in out


def test_a_lab_that_the_plan_does_not_list_is_named() -> None:
    plan = private("privacy.declared_patients={lab-1: 40}")
    assert declared_of(plan, "lab-1") == 40
    with pytest.raises(InputError, match="lab-2"):
        declared_of(plan, "lab-2")


@pytest.mark.parametrize("balance", ["sampler", "weights", "logits"])
def test_class_counts_of_private_images_are_refused(balance: str) -> None:
    with pytest.raises(InputError, match=balance):
        check_plan(private(f"train.balance={balance}"))


def test_a_public_prior_of_the_plan_is_no_class_count() -> None:
    prior = "train.class_prior={BLA: 0.2, LYT: 0.8}"
    check_plan(private("train.balance=logits", prior))
    with pytest.raises(InputError, match="weights"):
        check_plan(private("train.balance=weights", prior))
    with pytest.raises(InputError, match="nothing would use it"):
        check_plan(private(prior))
    with pytest.raises(InputError, match="'XYZ'"):
        check_plan(private("train.balance=logits", "train.class_prior={XYZ: 1.0}"))


def test_built_in_plans_keep_no_images_for_calibration_under_privacy() -> None:
    assert load_plan("demo").evaluation.calibration > 0
    assert private().evaluation.calibration == 0
    with pytest.raises(InputError, match=r"evaluation\.calibration"):
        check_plan(private("evaluation.calibration=0.1"))


def test_scores_of_single_labs_are_refused_and_off_by_default() -> None:
    with pytest.raises(InputError, match="per_lab"):
        check_plan(private("evaluation.per_lab=true"))
    assert not private().reports_per_lab
    assert load_plan("demo").reports_per_lab


def test_image_units_are_labelled() -> None:
    warnings = check_plan(load_plan("demo", ["privacy.unit=image"]))
    assert any("one image" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("costly", "better"),
    [
        ("train.optimizer=adamw", "train.optimizer=sgd"),
        ("model.start=random", "model.trainable=head"),
        ("privacy.declared_patients=40", "privacy.sampling_rate=1"),
        ("privacy.declared_patients={lab-1: 40, lab-2: 900}", "privacy.sampling_rate=1"),
        ("evaluation.sigma=2", "evaluation.every"),
    ],
)
def test_what_costs_much_for_little_is_warned_of_with_the_way_out(costly: str, better: str) -> None:
    [warning] = [w for w in check_plan(private(costly)) if better in w]
    frugal = ("model.trainable=head", "privacy.declared_patients=400", "evaluation.sigma=60")
    assert warning not in check_plan(private(*frugal))


def test_robust_rules_and_secure_aggregation_do_not_go_together() -> None:
    overrides = ["strategy.name=median", "secure_aggregation.enabled=true"]
    with pytest.raises(InputError, match="median"):
        check_plan(load_plan("demo", overrides))


@pytest.mark.parametrize(("labs", "threshold"), [(4, 2), (2, 2), (41, 28)])
def test_unsafe_thresholds_and_cohorts_are_refused(labs: int, threshold: int) -> None:
    overrides = [
        "secure_aggregation.enabled=true",
        f"secure_aggregation.threshold={threshold}",
        f"simulation.labs={labs}",
    ]
    with pytest.raises(InputError):
        check_plan(load_plan("demo", overrides))
