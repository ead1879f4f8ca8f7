"""What a plan asks for, in steps, epochs and waiting, and what is refused as too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.plan import from_dict, load_plan
from cytofed.plan_check import check_plan
from cytofed.work import MOST_EPOCHS, MOST_ROUNDS, MOST_STEPS, work_of


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.rounds=1000000000"], r"train\.rounds=1,000,000,000, at most 100,000"),
        (["train.rounds=50000", "train.steps_per_round=20000"], "1,000,000,000 steps"),
        (["train.steps_per_round=4611686018427387904"], "steps at each lab"),
        (["train.rounds=100000", "train.local_epochs=20000"], "2,000,000,000 epochs"),
        (["train.local_epochs=1e12"], r"train\.local_epochs"),
        (["train.steps_per_epoch=9000000", "train.local_epochs=9000"], "steps at each lab"),
        (["privacy.unit=patient", "privacy.sampling_rate=1e-310"], r"privacy\.sampling_rate"),
        (["privacy.unit=patient", "privacy.sampling_rate=1e-6", "train.local_epochs=5",
          "train.rounds=1000"], "steps at each lab"),
        (["cohort.approval_days=1e9"], r"cohort\.approval_days"),
        (["cohort.wait_s=1e9"], r"cohort\.wait_s"),
        (["cohort.round_timeout_s=1e300"], r"cohort\.round_timeout_s"),
        (["train.batch=1000000000"], r"train\.batch"),
    ],
)  # fmt: skip
def test_absurd_amounts_of_work_are_refused_by_name(overrides: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_plan(load_plan("demo", overrides))


@given(
    rounds=st.integers(1, 2**62),
    per_round=st.none() | st.integers(1, 2**62),
    epochs=st.floats(1e-300, 1e5),
    per_epoch=st.none() | st.integers(1, 10**7),
    wait_s=st.floats(1e-3, 30 * 86400),
    secure=st.booleans(),
)
def test_what_is_offered_is_within_bounds_and_its_waiting_is_finite(
    rounds: int,
    per_round: int | None,
    epochs: float,
    per_epoch: int | None,
    wait_s: float,
    secure: bool,
) -> None:
    train = {
        "rounds": rounds,
        "steps_per_round": per_round,
        "local_epochs": epochs,
        "steps_per_epoch": per_epoch,
    }
    tree = {
        "train": train,
        "cohort": {"wait_s": wait_s, "round_timeout_s": wait_s},
        "secure_aggregation": {"enabled": secure},
    }
    try:
        work = work_of(from_dict(tree))
    except InputError:
        return
    assert work.rounds <= MOST_ROUNDS
    assert (work.steps or 0) <= MOST_STEPS
    assert (work.epochs or 0) <= MOST_EPOCHS
    assert rounds * wait_s <= work.waiting_s < 1e13
    assert all(len(line) < 100 for line in work.lines())


def test_work_of_the_built_in_plan_in_words() -> None:
    assert work_of(load_plan("marrow")).lines() == [
        "1,600 steps at each lab, 2 a round; 20 evaluations",
        "at most 34 days if labs let every deadline pass",
    ]
