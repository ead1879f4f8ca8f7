"""The rehearsal catches what is planted between an approved plan and what a lab sends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from cytofed.client import made_up, rehearsal
from cytofed.client.daemon import Daemon
from cytofed.errors import VerificationError
from cytofed.simulations import planted
from cytofed.simulations.planted import FAULTS, OF_THE_OPTIMIZER, OF_THE_REVIEW, Planted, rehearsed

QUICK = {"max_norm doubled in the closed form", "cells weighted by everybody's mean count"}
"""those that a test of every change is for: a second each"""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A lab that refuses says so in its log."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def named(faults: list[Planted]) -> list[object]:
    return [
        pytest.param(fault, id=fault.name, marks=() if fault.name in QUICK else pytest.mark.faults)
        for fault in faults
    ]


@pytest.mark.parametrize("fault", named([*FAULTS, *OF_THE_OPTIMIZER.values()]))
def test_fault_is_caught_by_what_the_lab_answers(fault: Planted) -> None:
    assert rehearsed(fault).startswith("rehearsal")


def test_the_ten_faults_of_the_review_are_all_there() -> None:
    assert len({fault.name for fault in OF_THE_REVIEW}) == 10
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_what_ships(seed: int) -> None:
    """At 20 plans' noise and rates."""
    rng = np.random.default_rng(seed)
    sigma, rate = float(rng.uniform(0.5, 4)), float(rng.uniform(0.02, 1))
    rehearsal.rehearse(quick=seed % 4 != 0, sigma=sigma, sampling_rate=rate)


def test_a_lab_answers_no_private_order_before_the_rehearsal_has_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that finds a fault: the lab says which, to whoever asks, and trains nothing."""
    monkeypatch.setattr(Daemon, "respond", _as_at_work(Daemon.respond))
    (fault,) = (fault for fault in FAULTS if fault.name == "max_norm doubled in the closed form")
    plan = rehearsal._plan("a private plan", trainable="head")
    with planted.planted(fault), made_up.made_up(declared=10) as world:
        lab = world.lab([made_up.Patient("a", "ig", 2)])
        with pytest.raises(VerificationError, match="self-check failed"):
            lab.train(plan, 1)
        failure = lab.daemon._check.failure
    assert failure is not None
    assert "one patient moves weights of an update by" in failure.message


def _as_at_work(respond: object) -> object:
    """The first lab is one at work; those that it rehearses with are not."""
    first: list[Daemon] = []

    def answer(daemon: Daemon, message: Message) -> object:
        if not first:
            first.append(daemon)
            daemon._rehearsal = False
        return respond(daemon, message)  # type: ignore[operator]

    return answer


def test_noise_that_an_earlier_process_had_is_refused(tmp_path: Path) -> None:
    seen = tmp_path / "noise.seen"
    rehearsal.refuse_known_noise(seen, ["a" * 64, "b" * 64])
    rehearsal.refuse_known_noise(seen, ["c" * 64])
    with pytest.raises(VerificationError, match="earlier process"):
        rehearsal.refuse_known_noise(seen, ["d" * 64, "b" * 64])
    assert seen.stat().st_mode & 0o777 == 0o600


def test_a_rehearsal_leaves_the_lab_s_own_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with made_up.made_up(declared=10) as world:
        world.lab(rehearsal.PATIENTS).train(rehearsal._plan("a plan"), 1)
        world.lab(rehearsal.PATIENTS).train(rehearsal._plan("head", trainable="head"), 1)
        root = world.root
    assert not list(tmp_path.rglob("*"))
    assert not root.exists()


def test_what_a_plan_promises_is_its_own_arithmetic() -> None:
    """Three steps with momentum .5 from rest: 1.875, 1.75 and 1.5 times the rate."""
    plan = rehearsal._plan("momentum", steps=3, momentum=0.5, sigma=2.0, sampling_rate=0.5)
    rate, unit = 0.05, 0.1 / (0.5 * 10)
    assert rehearsal.most_moved(plan) == pytest.approx(rate * unit * (1.875 + 1.75 + 1.5))
    squares = 1.875**2 + 1.75**2 + 1.5**2
    assert rehearsal.noise_sd(plan) == pytest.approx(rate * 2.0 * unit * squares**0.5)
    drift = rehearsal._plan("drift", steps=4, drift=0.05, sampling_rate=0.5)
    rounds = drift.train.rounds
    assert rehearsal.noise_sd(drift) * rounds**0.5 == pytest.approx(0.05)
