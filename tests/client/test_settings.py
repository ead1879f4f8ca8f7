"""client.yaml says what a lab agrees to; nothing in it is silently ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.client.settings import (
    AutoApprove,
    Limits,
    Settings,
    fresh_yaml,
    load_settings,
    read_settings,
)
from cytofed.errors import InputError
from cytofed.strict import read_yaml

HERE = Path("/labs/leeds")
LEEDS = "ab" * 32


def read(text: str) -> Settings:
    return read_settings(f"data: images\n{text}", folder=HERE)


def test_a_fresh_file_sets_no_limits_and_approves_nothing_by_itself() -> None:
    fresh = read_settings(fresh_yaml(data=Path("/images")), folder=HERE)
    assert fresh.limits == Limits()
    assert not fresh.limits.of_ledger().any
    assert fresh.auto_approve == AutoApprove()
    assert not fresh.auto_approve.enabled
    assert (fresh.data, fresh.labels, fresh.proxy) == (Path("/images"), None, None)


@settings(deadline=None, max_examples=50)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    declared=st.none() | st.integers(1, 10**6),
)
def test_what_join_was_given_is_what_the_file_says(name: str, declared: int | None) -> None:
    text = fresh_yaml(
        data=Path("/images") / "x",
        labels=name,
        patients=f"column:{name}",
        patients_declared=declared,
        pool=f"a{name}",
    )
    found = read_settings(text, folder=HERE)
    assert (found.labels, found.patients) == (name, f"column:{name}")
    assert (found.patients_declared, found.pool) == (declared, f"a{name}")


def test_every_key_is_in_the_fresh_file() -> None:
    """A person finds every setting by reading the file, none only in the documentation."""
    tree = read_yaml(all_of_it(fresh_yaml(data=Path("/images"))), "client.yaml")
    fresh = read_settings(fresh_yaml(data=Path("/images")), folder=HERE)
    for section in (fresh, fresh.limits, fresh.auto_approve, fresh.timeouts):
        keys = tree if section is fresh else tree[_name_of(fresh, section)]
        assert set(keys) == set(section.__dataclass_fields__)


def all_of_it(fresh: str) -> str:
    """A fresh file with the # taken away from every setting."""
    return re.sub(r"(?m)^# (?=\w+:|  )", "", fresh)


def test_the_examples_of_a_fresh_file_are_limits_once_their_mark_is_away() -> None:
    found = read_settings(all_of_it(fresh_yaml(data=Path("/images"))), folder=HERE)
    assert found.auto_approve.enabled
    assert found.limits.secure_aggregation_required
    assert all(getattr(found.limits, name) for name in found.limits.__dataclass_fields__)


@pytest.mark.parametrize("before", [True, False])
def test_limits_pasted_into_a_fresh_file_are_the_limits(before: bool) -> None:
    pasted, fresh = "limits:\n  max_epsilon: 3\n  min_cohort: 5\n", fresh_yaml(data=Path("/i"))
    found = read_settings(pasted + fresh if before else fresh + pasted, folder=HERE).limits
    assert (found.max_epsilon, found.min_cohort) == (3.0, 5)


def test_no_limit_is_taken_away_by_a_key_that_is_given_twice() -> None:
    limits = "limits:\n  secure_aggregation_required: true\n  min_cohort: 5\n"
    for text, key in (
        (f"{limits}proxy:\nlimits:\n  max_epsilon: 3\n", "limits"),
        (f"{limits}limits:\n", "limits"),
        (f"{limits}'limits': {{}}\n", "limits"),
        (f"{limits}  min_cohort: 0\n", "limits.min_cohort"),
        ("pool: marrow\npool: other\n", "pool"),
    ):
        with pytest.raises(InputError, match=f'"{key}" is given twice') as caught:
            read(text)
        assert re.search(r"^client\.yaml, line \d+: ", caught.value.message)


@pytest.mark.parametrize("nothing", ["", " null", " ~", " Null", " !!null x"])
@pytest.mark.parametrize(
    "key",
    [*(f"limits.{name}" for name in Limits.__dataclass_fields__), "limits", "auto_approve",
     "auto_approve.max_epsilon", "auto_approve.secure_aggregation", "pool", "ledger"],
)  # fmt: skip
def test_an_empty_value_is_an_error_and_no_limit(key: str, nothing: str) -> None:
    *section, name = key.split(".")
    text = f"{section[0]}:\n  {name}:{nothing}\n" if section else f"{name}:{nothing}\n"
    with pytest.raises(InputError, match=re.escape(key)):
        read(text)


def test_approval_without_a_person_needs_a_limit_over_all_plans() -> None:
    with pytest.raises(InputError, match=r"without limits\.max_epsilon"):
        read("auto_approve: {enabled: true, max_epsilon: 1}")
    assert read(
        "auto_approve: {enabled: true, max_epsilon: 1}\nlimits: {max_epsilon: 4}"
    ).auto_approve.enabled


def _name_of(whole: Settings, section: object) -> str:
    return next(n for n in whole.__dataclass_fields__ if getattr(whole, n) is section)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("limits: {max_epsilonn: 3}", "max_epsilon"),
        ("limits: {min_cohorts: 3}", "min_cohort"),
        ("patient: column:x", "patients"),
        ("auto_approve: {enable: true}", "enabled"),
    ],
)
def test_a_misspelt_limit_is_an_error_that_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(InputError, match="unknown key") as caught:
        read(text)
    assert repr(near) in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "limits: {max_epsilon: -1}",
        "limits: {max_epsilon: .nan}",
        "limits: {max_epsilon: lots}",
        "limits: {delta: 1.5}",
        "limits: {delta: 0.006}\npatients_declared: 100",
        "images_per_patient: 0",
        "limits: {min_cohort: yes}",
        "limits: {min_cohort: -1}",
        "limits: {max_bytes_per_round: 0}",
        "limits: {allowed_models: cytonet}",
        "limits: {trusted_peers: {york: 1234}}",
        "limits: {trusted_peers: {york: abcd}}",
        "limits: {min_trusted_peers: 1}",
        "limits: 8",
        "limits: {secure_aggregation_required: maybe}",
        "auto_approve: {enabled: true}",
        "patients_declared: 0",
        "timeouts: {connect_s: 0}",
        "pool: ' '",
        "data: 7",
        "- a list",
        "{",
    ],
)
def test_values_that_limit_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        read(text)


def test_data_must_be_named() -> None:
    with pytest.raises(InputError, match="data is missing"):
        read_settings("pool: marrow\n", folder=HERE)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text("data: images\nledger: ledger.sqlite\n")
    found = load_settings(tmp_path / "client.yaml")
    assert (found.data, found.ledger) == (tmp_path / "images", tmp_path / "ledger.sqlite")


def test_two_directories_of_one_user_share_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one = read_settings(fresh_yaml(data=Path("/images")), folder=Path("/a"))
    other = read_settings(fresh_yaml(data=Path("/images")), folder=Path("/b"))
    assert one.ledger == other.ledger == tmp_path / "cytofed" / "ledger.sqlite"
    assert one.pool == other.pool


def test_limits_are_read() -> None:
    found = read(
        "limits: {max_epsilon: 8, delta: 1e-4, min_cohort: 3, trusted_peers: {leeds: "
        f"{LEEDS}}}, min_trusted_peers: 1, allowed_models: [cytonet]}}"
    ).limits
    assert (found.max_epsilon, found.delta, found.min_cohort) == (8.0, 1e-4, 3)
    assert (found.trusted_peers, found.allowed_models) == ({"leeds": LEEDS}, ("cytonet",))
    assert found.of_ledger().epsilon == 8.0


def test_a_proxy_password_is_in_no_message() -> None:
    good = read("proxy: http://user:secret@proxy:3128")
    assert good.proxy == "http://user:secret@proxy:3128"
    assert "secret" not in repr(good)
    with pytest.raises(InputError) as caught:
        read("proxy: https://user:secret@proxy")
    assert "secret" not in str(caught.value) + caught.value.hint


def test_a_missing_file_says_how_to_join(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(tmp_path / "client.yaml")
    assert "join" in caught.value.hint
