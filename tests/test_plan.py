"""Plans: every key has a default, every mistake is named, and the hash is the plan's identity."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.plan import (
    PRIVATE_DEFAULTS,
    PRIVATE_HEAD,
    Plan,
    builtin_plans,
    dump_plan,
    from_dict,
    load_plan,
    to_dict,
    with_overrides,
)
from cytofed.plan_check import LARGE_STEP, STEP_IMAGES, check_plan, large_steps
from cytofed.strict import read_yaml

OTHER: dict[str, Any] = {
    "name": "other",
    "patients": "may_overlap",
    "labels.scheme": "pbc-8",
    "labels.scale.size_px": 48,
    "labels.scale.field_um": 30.0,
    "model.arch": "resnet18",
    "model.start": "weights.safetensors",
    "model.trainable": "head",
    "model.width": 16,
    "train.rounds": 3,
    "train.local_epochs": 0.5,
    "train.steps_per_round": 7,
    "train.batch": 8,
    "train.steps_per_epoch": 64,
    "train.optimizer": "sgd",
    "train.lr": 0.1,
    "train.momentum": 0.5,
    "train.weight_decay": 0.0,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.balance": "sampler",
    "train.class_prior": {"BLA": 0.2},
    "train.mask_absent": "declared",
    "train.label_smoothing": 0.1,
    "train.ema": 0.9,
    "train.augment.flip": False,
    "train.augment.rotate": False,
    "train.augment.shift": 0.0,
    "train.augment.scale": 0.0,
    "train.augment.stain": 0.0,
    "train.precision": "float32",
    "train.device": "cuda:1",
    "train.threads": 2,
    "train.seed": 5,
    "strategy.name": "fedprox",
    "strategy.mu": 0.1,
    "privacy.unit": "patient",
    "privacy.epsilon": 8.0,
    "privacy.sigma": 1.1,
    "privacy.delta": 1e-5,
    "privacy.max_norm": 0.5,
    "privacy.sampling_rate": 0.1,
    "privacy.cells_per_patient": 8,
    "privacy.declared_patients": 100,
    "privacy.multiplicity": 2,
    "privacy.noise_drift": 0.1,
    "secure_aggregation.enabled": True,
    "secure_aggregation.threshold": 3,
    "secure_aggregation.min_cohort": 4,
    "secure_aggregation.bits": 16,
    "secure_aggregation.range": 0.5,
    "secure_aggregation.control_range": 4.0,
    "model.views": 8,
    "cohort.min_labs": 2,
    "cohort.approval_days": 1.0,
    "cohort.wait_s": 5.0,
    "cohort.round_timeout_s": 9.0,
    "evaluation.fraction": 0.3,
    "evaluation.fold": 2,
    "evaluation.calibration": 0.1,
    "evaluation.every": 2,
    "evaluation.per_lab": False,
    "evaluation.sigma": 2.0,
    "simulation.labs": 6,
    "simulation.partition": "dirichlet:0.5",
    "simulation.baselines": "central",
    "simulation.baseline_train": {"batch": 16, "steps_per_epoch": None, "optimizer": "sgd"},
    "simulation.population.dropout": 0.2,
    "simulation.population.stragglers": 0.1,
    "simulation.population.nan_labs": 1,
    "simulation.pseudo_patient_cells": 8,
}
"""For every key a valid value that is not its default."""

WRONG: dict[str, Any] = {
    "name": "../up",
    "labels.scale.size_px": 8,
    "labels.scale.field_um": 0,
    "model.arch": "resnet34",
    "model.width": 1e6,
    "simulation.baselines": "centre",
    "train.rounds": 0,
    "train.local_epochs": -1,
    "train.steps_per_round": 0,
    "train.batch": 2.5,
    "train.steps_per_epoch": 0,
    "train.lr": "fast",
    "train.momentum": 1,
    "train.device": "gpu",
    "train.seed": -1,
    "train.mask_absent": "sometimes",
    "train.augment.stain": float("nan"),
    "train.augment": [1, 2],
    "strategy.server_lr": "high",
    "privacy.epsilon": 0,
    "privacy.delta": 1,
    "privacy.sampling_rate": 0,
    "privacy.declared_patients": "many",
    "secure_aggregation.bits": 24,
    "secure_aggregation.min_cohort": 2,
    "cohort.min_labs": 0,
    "cohort.wait_s": float("inf"),
    "evaluation.fraction": 1.5,
    "evaluation.fold": 5,
    "simulation.population.dropout": 2,
    "simulation.labs": None,
}


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    """All keys of a nested dict, written with dots."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leaves(value, where)
        else:
            yield where


def tree_with(key: str, value: Any) -> dict[str, Any]:
    *parents, last = key.split(".")
    tree: dict[str, Any] = {last: value}
    for parent in reversed(parents):
        tree = {parent: tree}
    return tree


def value_of(plan: Plan, key: str) -> Any:
    found: Any = to_dict(plan)
    for name in key.split("."):
        found = found[name]
    return found


def test_every_key_has_a_default() -> None:
    assert from_dict({}) == Plan()
    sections = [f.name for f in dataclasses.fields(Plan) if f.name not in ("name", "patients")]
    assert from_dict(dict.fromkeys(sections)) == Plan(), "a section without keys is all defaults"


def test_the_table_of_this_test_covers_every_key() -> None:
    assert set(leaves(to_dict(Plan()))) == set(OTHER) - {"strategy.mu"}


@pytest.mark.parametrize("key", OTHER)
def test_every_key_can_be_set_and_survives_yaml(key: str) -> None:
    plan = from_dict(tree_with(key, OTHER[key]))
    assert value_of(plan, key) == OTHER[key]
    assert from_dict(read_yaml(dump_plan(plan), "dumped")) == plan


@pytest.mark.parametrize("key", OTHER)
def test_hash_changes_with_every_key_but_those_of_the_simulation(key: str) -> None:
    plan = from_dict(tree_with(key, OTHER[key]))
    assert (plan.sha256 == Plan().sha256) == key.startswith("simulation.")


def test_hash_does_not_depend_on_how_a_number_is_written() -> None:
    written = from_dict({"train": {"lr": "1e-1", "batch": 8.0}, "secure_aggregation": {"bits": 16}})
    plain = from_dict({"secure_aggregation": {"bits": 16.0}, "train": {"batch": 8, "lr": 0.1}})
    assert written.sha256 == plain.sha256


@pytest.mark.parametrize("key", OTHER)
def test_set_takes_every_key(key: str) -> None:
    text = yaml.safe_dump(OTHER[key], default_flow_style=True, width=1000).splitlines()[0]
    assert value_of(load_plan("demo", [f"{key}={text}"]), key) == OTHER[key]


@pytest.mark.parametrize(
    ("override", "lr"), [("train.lr=1e-3", 1e-3), ("train.lr=5E-4", 5e-4), ("train.lr=1", 1.0)]
)
def test_set_reads_numbers_that_yaml_takes_for_text(override: str, lr: float) -> None:
    assert load_plan("demo", [override]).train.lr == lr


def test_set_wins_over_the_file() -> None:
    assert load_plan("demo", ["train.rounds=5"]).train.rounds == 5


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.rounds=2", "train.rounds=5"], "train.rounds is given twice"),
        (["train.rounds=2", " train.rounds =2"], "train.rounds is given twice"),
        (["privacy.unit=patient", "privacy={sigma: 1}"], "privacy.unit is set, and privacy too"),
        (["privacy={unit: patient}", "privacy.unit=none"], "privacy is set, and privacy.unit too"),
        (["privacy={unit: patient, unit: none}"], '"unit" is given twice'),
        (["train={lr: 1, lr: 1}"], '"lr" is given twice'),
        (["privacy=null"], "privacy is empty"),
        (["privacy={}"], "privacy is empty"),
        (["secure_aggregation=~"], "secure_aggregation is empty"),
        (["privacy.epsilon="], "has no value"),
        (["privacy.epsilon=  # none"], "has no value"),
    ],
)
def test_no_set_undoes_another_and_none_is_empty(overrides: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        load_plan("demo", overrides)
    with pytest.raises(InputError, match=re.escape(told)):
        with_overrides(load_plan("demo"), overrides)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("privacy: {unit: patient}\nname: a\nprivacy: {epsilon: 3}", '"privacy" is given twice'),
        ("privacy: {unit: patient}\nprivacy:\n", '"privacy" is given twice'),
        ("privacy: {unit: patient, unit: none}", '"privacy.unit" is given twice'),
        ("privacy:\n", '"privacy" has no value'),
        ("privacy: {}", "privacy is empty"),
        ("privacy: null", "privacy is empty"),
        ("secure_aggregation:\n", '"secure_aggregation" has no value'),
        ("secure_aggregation: {enabled: true, threshold: }", "threshold"),
        ("x: &x {unit: none}\nprivacy: {unit: patient, <<: *x}", "merged"),
        ("x: &x {unit: none}\nprivacy: *x", "alias"),
    ],
)
def test_no_second_or_empty_section_of_a_plan_switches_privacy_off(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(told)):
        load_plan(file)


def test_privacy_changes_the_defaults_and_nothing_that_the_user_names(tmp_path: Path) -> None:
    private = load_plan("marrow", ["privacy.unit=patient", "model.arch=cytonet"])
    for key, value in PRIVATE_DEFAULTS["train"].items():
        assert value_of(private, f"train.{key}") == value
    assert private.train != load_plan("marrow").train
    assert load_plan("marrow", ["train.lr=0.1", "privacy.unit=patient"]).train.lr == 0.1
    file = tmp_path / "plan.yaml"
    file.write_text("model: {width: 8}\ntrain: {optimizer: adamw}\nprivacy: {unit: patient}\n")
    assert load_plan(file).train.optimizer == "adamw", "the user's own file"
    assert load_plan(file).train.lr == PRIVATE_DEFAULTS["train"]["lr"]
    file.write_text(dump_plan(private))
    assert load_plan(file) == private
    assert load_plan(file, ["privacy.unit=none"]).train == private.train, "all is named there"


def test_start_of_a_builtin_plan_goes_with_its_architecture() -> None:
    assert load_plan("marrow").model.start == "blood"
    assert load_plan("marrow", ["model.width=8"]).model.start == "random"
    assert load_plan("marrow", ["model.arch=cytonet"]).model.start == "random"
    named = load_plan("marrow", ["model.arch=encoder+head", "model.start=blood"])
    assert (named.model.arch, named.model.start) == ("encoder+head", "blood")
    assert load_plan("marrow", ["model.trainable=norms"]).model.start == "blood"


def test_privacy_alone_trains_a_head_on_frozen_public_features(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("privacy: {unit: patient}\n")
    for private in (load_plan("demo", ["privacy.unit=patient"]), load_plan(file)):
        assert (private.model.arch, private.model.start) == ("encoder+head", "blood-head")
        assert private.strategy.name == "fedavg"
        assert private.labels.scale.size_px == PRIVATE_HEAD["labels"]["scale"]["size_px"]
        assert private.privacy.noise_drift == PRIVATE_HEAD["privacy"]["noise_drift"]
    file.write_text("model: {width: 8}\nlabels: {scale: {size_px: 32}}\nprivacy: {unit: patient}\n")
    own = load_plan(file)
    assert (own.model.arch, own.labels.scale.size_px) == ("cytonet", 32), "all as the user's"
    assert own.train.lr == PRIVATE_DEFAULTS["train"]["lr"]


def test_who_names_the_rate_or_the_optimizer_gets_that_rate(tmp_path: Path) -> None:
    for named in ("train.lr=0.5", "train.optimizer=adamw", "train.momentum=0.5"):
        chosen = load_plan("marrow", ["privacy.unit=patient", named])
        assert chosen.privacy.noise_drift is None, named
        assert load_plan("marrow", ["privacy.unit=patient", named, "train.rounds=3"]) != chosen
    file = tmp_path / "plan.yaml"
    file.write_text("privacy: {unit: patient}\ntrain: {lr: 0.5}\n")
    own = load_plan(file)
    assert (own.train.lr, own.privacy.noise_drift) == (0.5, None)


@pytest.mark.parametrize("other", ["train.momentum=0.9", "train.optimizer=adamw"])
def test_a_drift_of_noise_is_told_of_plain_steps_only(other: str) -> None:
    with pytest.raises(InputError, match="noise_drift is for") as refused:
        load_plan("marrow", ["privacy.unit=patient", "privacy.noise_drift=0.1", other])
    assert refused.value.hint is not None
    assert "noise_drift=null" in refused.value.hint


@pytest.mark.parametrize("override", ["train.rounds", "=3", "train.rounds.x=3", "x y", "", "."])
def test_malformed_set_is_refused(override: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_plan("demo", [override])
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("key", [k for k, v in WRONG.items() if v is not None])
def test_wrong_value_is_named_with_its_key(key: str) -> None:
    with pytest.raises(InputError) as refusal:
        from_dict(tree_with(key, WRONG[key]))
    message = refusal.value.message
    assert key in message
    shown = str(WRONG[key])
    assert shown in message or f"{WRONG[key]:g}" in message, message
    assert "expect" in message.lower(), "the message says what would be right"


@pytest.mark.parametrize("text", ["{rate: 0.1}", "{batch: 0}", "{optimizer: adam}"])
def test_baselines_train_by_what_a_plan_could_have(text: str) -> None:
    with pytest.raises(InputError, match=r"^simulation\.baseline_train: "):
        load_plan("demo", [f"simulation.baseline_train={text}"])


def test_recipe_of_baselines_alone_is_refused_with_privacy() -> None:
    flags = ["privacy.unit=patient", "privacy.epsilon=3", "simulation.baseline_train={batch: 8}"]
    with pytest.raises(InputError, match="differential privacy"):
        load_plan("marrow", flags)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"),
        ("train.round", "rounds"),
        ("train.augment.stian", "stain"),
        ("labels.scale.size", "size_px"),
        ("simulation.population.droput", "dropout"),
        ("secure_agregation", "secure_aggregation"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InputError) as refusal:
        from_dict(tree_with(key, 1), source="my.yaml")
    assert refusal.value.message == f"my.yaml: unknown key {key!r}"
    assert nearest in refusal.value.hint


def test_key_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(InputError) as refusal:
        from_dict({"cohort": {"zzzz": 1}})
    for name in ("min_labs", "approval_days", "wait_s", "round_timeout_s"):
        assert name in refusal.value.hint


def test_wrong_choice_names_the_nearest() -> None:
    with pytest.raises(InputError) as refusal:
        from_dict({"train": {"optimizer": "adam"}})
    assert "sgd, adamw" in refusal.value.message
    assert "adamw" in refusal.value.hint


def test_epsilon_and_sigma_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"epsilon=8 .*sigma=1"):
        from_dict({"privacy": {"epsilon": 8, "sigma": 1}})


def test_patients_may_be_declared_by_lab() -> None:
    plan = from_dict({"privacy": {"declared_patients": {"leeds": 100, "ulm": 50}}})
    assert plan.privacy.declared_patients == {"leeds": 100, "ulm": 50}
    with pytest.raises(InputError, match="declared_patients"):
        from_dict({"privacy": {"declared_patients": {"leeds": 0}}})


@pytest.mark.parametrize("name", builtin_plans())
def test_builtin_plans_hold_together(name: str) -> None:
    assert any("not differentially private" in line for line in check_plan(load_plan(name)))


def test_a_secure_sum_without_noise_is_warned_of() -> None:
    def told(*overrides: str) -> str:
        return "\n".join(
            check_plan(load_plan("demo", ["secure_aggregation.enabled=true", *overrides]))
        )

    assert "hides whose an update is, not what it is made of" in told()
    assert "not what it is made of" not in told("privacy.unit=patient", "privacy.sigma=4")


def test_more_images_than_a_plan_was_made_for_are_told_with_steps_that_suit_them() -> None:
    marrow = load_plan("marrow")
    assert marrow.train.steps_per_epoch is not None
    assert large_steps(marrow, LARGE_STEP * marrow.train.steps_per_epoch) == []
    (told,) = large_steps(marrow, 17_400)
    assert "a step sees 217" in told
    advised = load_plan("marrow", [word for word in told.split() if word.startswith("train.")][1:])
    assert large_steps(advised, 17_400) == []
    train, before = advised.train, marrow.train
    assert train.steps_per_epoch == round(17_400 / STEP_IMAGES)
    assert round(train.local_epochs * train.steps_per_epoch) == 2, "as many steps a round"
    epochs = before.rounds * before.local_epochs
    assert train.rounds * train.local_epochs == pytest.approx(epochs, rel=0.01)


def test_steps_of_private_and_of_small_batches_are_not_told_as_large() -> None:
    assert large_steps(load_plan("marrow", ["privacy.unit=patient"]), 17_400) == []
    assert large_steps(load_plan("marrow", ["train.steps_per_epoch=null"]), 17_400) == []


def test_unknown_strategy_and_option_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError) as refusal:
        check_plan(from_dict({"strategy": {"name": "fedporx"}}))
    assert "fedprox" in refusal.value.hint
    with pytest.raises(InputError) as refusal:
        check_plan(from_dict({"strategy": {"name": "fedprox", "nu": 1}}))
    assert "mu" in refusal.value.hint


GARBAGE = [
    b"",
    b"\x00",
    b"\xff\xfe\xfa",
    b"a: b: c",
    b"[" * 5_000,
    b"- a list",
    b"just text",
    b"train: 3",
    b"train: [1]",
    b"name: 2001-99-99",
    b"train: {rounds: 0x" + b"f" * 10_000 + b"}",
    b"train: {rounds: -0x" + b"f" * 10_000 + b"}",
    b"train: {lr: 0x" + b"f" * 10_000 + b"}",
    b"train: {rounds: " + b"9" * 10_000 + b"}",
    b"name: 0x" + b"f" * 10_000,
    b"? {a: b}\n: 1",
    b"? [train]\n: 1",
    b"1: 2",
    b"null: 2",
    b"train: !!python/object/apply:os.system ['true']",
    b"a: &a [*a]",
    b"labels: &x {scale: *x}",
    b"name: &x {a: *x}",
    b"name: &a [x,x]\ntrain: &b [*a,*a]\n" + b"".join(
        b"k%d: &c%d [%s]\n" % (i, i, b",".join([b"*b" if i == 0 else b"*c%d" % (i - 1)] * 9))
        for i in range(12)
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_is_refused_in_one_readable_message(number: int, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_bytes(GARBAGE[number])
    if GARBAGE[number] == b"":
        assert load_plan(file) == Plan()
        return
    with pytest.raises(InputError) as refusal:
        load_plan(file)
    assert len(refusal.value.message) < 1000


@pytest.mark.parametrize("name", ["nowhere.yaml", "dem", "", "x" * 5000, "a\0b", "/"])
def test_missing_plan_names_the_builtin_ones(name: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_plan(name)
    assert "plan" in refusal.value.message


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -(10**400), 2**63, "1e400", "nan", "-0", 1e308])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=5,
)
known = st.sampled_from([*OTHER, "train", "strategy", "model.zzz", "strategy.option"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(known, values, max_size=4))
def test_any_tree_makes_a_plan_or_an_input_error(settings_by_key: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for key, value in settings_by_key.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return
        node[last] = value
    with contextlib.suppress(InputError):
        plan = from_dict(tree)
        assert from_dict(read_yaml(dump_plan(plan), "dumped")).sha256 == plan.sha256


@settings(max_examples=100, deadline=None)
@given(values)
def test_any_value_in_place_of_a_plan_makes_a_plan_or_an_input_error(value: Any) -> None:
    with contextlib.suppress(InputError):
        from_dict(value)


@pytest.mark.parametrize(
    ("rounds", "every", "found"), [(1, None, 1), (20, None, 1), (200, None, 10), (200, 3, 3)]
)
def test_a_long_run_is_evaluated_some_twenty_times_unless_the_plan_says_how_often(
    rounds: int, every: int | None, found: int
) -> None:
    plan = from_dict({"train": {"rounds": rounds}, "evaluation": {"every": every}})
    assert plan.evaluated_every == found
