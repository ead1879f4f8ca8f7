"""Membership inference: the statistics on scores with known answers, and the attack on models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from cytofed.plan import Plan, load_plan
from cytofed.simulations import membership, shadows
from cytofed.simulations.membership import area_of, both_levels, infer_members, lines, outcome_of
from cytofed.simulations.shadows import (
    folder_of,
    logit_confidence,
    make_scores,
    read_scores,
    subjects_of,
)
from cytofed.simulations.simulate import Request

SHADOWS, PATIENTS, CELLS = 16, 200, 5


def halves(rng: np.random.Generator) -> NDArray[Any]:
    return rng.random((SHADOWS, PATIENTS)).argsort(axis=0).argsort(axis=0) < SHADOWS // 2


def played(leak: float, *, seed: int = 0) -> tuple[NDArray[Any], ...]:
    """Models that are ``leak`` standard deviations surer of what they were trained on."""
    rng = np.random.default_rng(seed)
    patient_N = np.repeat(np.arange(PATIENTS), CELLS)
    in_SU, member_U = halves(rng), np.arange(PATIENTS) < PATIENTS // 2
    hardness_N = rng.normal(size=len(patient_N))

    def scores(in_U: NDArray[Any]) -> NDArray[Any]:
        noise_N = 0.5 * rng.normal(size=len(patient_N))
        return 3 * hardness_N + noise_N + leak * 0.5 * in_U[patient_N]

    shadow_SN = np.stack([scores(in_U) for in_U in in_SU])
    return 10 + 4 * scores(member_U), shadow_SN, patient_N, in_SU, member_U[patient_N]


def test_a_model_that_remembers_is_found_out() -> None:
    image, patient = both_levels(*played(leak=1.0))
    assert image.area.low > 0.55
    assert patient.area.auc > image.area.auc > 0.7
    assert patient.found > 0.1


def test_a_model_that_remembers_nothing_is_at_chance() -> None:
    covered = [
        not outcome.above_chance and outcome.area.high >= 0.5
        for seed in range(10)
        for outcome in both_levels(*played(leak=0.0, seed=seed))
    ]
    assert sum(covered) >= 18  # of 20, at 95%


def test_noise_of_few_shadows_does_not_hide_a_small_gain_that_all_images_have() -> None:
    found = [both_levels(*played(leak=0.3, seed=seed))[0].area.auc for seed in range(5)]
    assert np.mean(found) > 0.56  # .58 if the gain were known, .53 by each image's own figure


def test_an_interval_covers_what_it_says_although_cells_of_a_patient_go_together() -> None:
    rng = np.random.default_rng(0)
    cluster_N = np.repeat(np.arange(60), 10)
    member_N = cluster_N < 30
    covered = 0
    for _ in range(200):
        score_N = rng.normal(size=60)[cluster_N] + 0.3 * rng.normal(size=600)
        area = area_of(score_N, member_N, cluster_N)
        covered += area.low <= 0.5 <= area.high
    assert covered >= 182


def test_an_interval_for_images_on_their_own_is_that_of_delong() -> None:
    rng = np.random.default_rng(1)
    member_N = np.arange(400) < 200
    score_N = rng.normal(size=400) + member_N
    area = area_of(score_N, member_N, np.arange(400))
    above = [(score_N[~member_N] < s).mean() for s in score_N[member_N]]
    below = [(score_N[member_N] > s).mean() for s in score_N[~member_N]]
    deviation = (np.var(above, ddof=1) / 200 + np.var(below, ddof=1) / 200) ** 0.5
    assert area.auc == pytest.approx(np.mean(above))
    assert area.high - area.auc == pytest.approx(1.972 * deviation, rel=1e-3)


def test_a_perfect_separation_of_few_patients_has_an_interval() -> None:
    member_N = np.arange(12) < 6
    area = area_of(member_N.astype(float), member_N, np.arange(12))
    assert area.auc == 1.0
    assert area.low < 0.9


def test_members_found_at_few_false_alarms_are_read_off_the_curve() -> None:
    member_N = np.arange(300) < 100
    score_N = np.where(member_N, np.arange(300) % 2, 0.0)  # half of the members stand out
    outcome = outcome_of(score_N, member_N, np.arange(300))
    assert outcome.found == 0.5
    assert outcome.curve[0] == (0.0, 0.0)
    assert outcome.curve[-1] == (1.0, 1.0)


def test_a_confidence_near_one_keeps_its_digits() -> None:
    probs_NC = np.array([[1.0, 1e-20, 0.0], [0.25, 0.25, 0.5]], np.float32)
    targets_NC = np.array([[True, False, False], [True, True, False]])
    scores_N = logit_confidence(probs_NC, targets_NC)
    assert scores_N[0] == pytest.approx(20 * np.log(10), rel=1e-3)
    assert scores_N[1] == pytest.approx(0.0, abs=1e-6)


def test_a_weak_attack_is_not_called_private() -> None:
    part = {
        "auc": 0.52,
        "interval": [0.45, 0.59],
        "found": 0.01,
        "members": 100,
        "others": 100,
        "above_chance": False,
    }
    found = {
        "attack": "LiRA",
        "shadows": 16,
        "reduced": ["fewer steps"],
        "pseudo_patients": True,
        "false_alarms": 0.01,
        "confidence": 0.95,
        "image": part,
        "patient": part,
    }
    text = "\n".join(lines(found, private=True))
    assert "no violation found; a weak attack is no evidence of privacy" in text
    assert "cheaper than the run: fewer steps" in text


# --- on models


class Simulate(Protocol):
    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


HEAD = (
    "model.arch=encoder+head",
    "model.start=blood",
    "simulation.pseudo_patient_cells=2",
    "evaluation.fraction=0.4",
    "train.batch=8",
)


def small_run(sample: Path, tmp_path: Path, *overrides: str) -> Request:
    """A head on the shipped encoder, which trains in a second, over the sample's marrow."""
    plan: Plan = load_plan(Path(__file__).with_name("small.yaml"), (*HEAD, *overrides))
    return Request(plan=plan, out=tmp_path / "run", data=(sample / "marrow",))


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: to start others takes most of the time."""
    monkeypatch.setattr(shadows, "SUBJECTS", 280)
    monkeypatch.setattr(shadows, "HEAD_STEPS", 600)
    monkeypatch.setattr(membership, "_make_shadows", lambda run_dir, _: make_scores(run_dir))


@pytest.mark.usefixtures("cheap")
def test_an_overfitted_model_tells_its_members_and_a_private_one_does_not(
    sample: Path, tmp_path: Path, directly: Simulate
) -> None:
    overfitted = small_run(
        sample, tmp_path / "a", "train.rounds=4", "train.steps_per_round=150", "train.lr=0.01"
    )
    directly(overfitted)
    found = infer_members(overfitted.out)
    assert found["image"]["interval"][0] > 0.55
    assert found["patient"]["interval"][0] > 0.55
    private = small_run(
        sample, tmp_path / "b", "privacy.unit=patient", "privacy.epsilon=4", "train.rounds=2"
    )
    directly(private)
    found = infer_members(private.out)
    for level in ("image", "patient"):
        low, high = found[level]["interval"]
        assert low <= 0.5 <= high


def test_scores_are_made_once_and_repeat_to_the_bit(
    sample: Path, tmp_path: Path, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadows, "SHADOWS", 2)
    request = small_run(sample, tmp_path, "train.rounds=1", "train.steps_per_round=3")
    directly(request)
    made: list[int] = []
    make_scores(request.out, first=1, tell=made.append)  # as if killed before the first
    make_scores(request.out, tell=made.append)
    assert made == [1, 2, 0]
    before = [read_scores(request.out, number) for number in range(3)]
    for file in folder_of(request.out).iterdir():
        file.unlink()
    make_scores(request.out)
    for number, scores_N in enumerate(before):
        np.testing.assert_array_equal(read_scores(request.out, number), scores_N)
    (request.out / "model.safetensors").write_bytes(b"another model")
    assert read_scores(request.out, 0) is None
    assert read_scores(request.out, 1) is not None


def test_no_patient_is_on_both_sides_and_each_is_in_half_of_the_shadows(
    sample: Path, tmp_path: Path, directly: Simulate
) -> None:
    request = small_run(sample, tmp_path, "train.rounds=1", "train.steps_per_round=1")
    directly(request)
    subjects = subjects_of(request.out)
    members = set(subjects.patients_N[subjects.member_N])
    assert not members & set(subjects.patients_N[~subjects.member_N])
    assert (subjects.in_SU.sum(axis=0) == shadows.SHADOWS // 2).all()
    assert subjects.pseudo


def test_a_run_that_does_not_say_who_was_trained_on_is_told_so(tmp_path: Path) -> None:
    found = infer_members(tmp_path)
    assert "needs a simulation's folder" in found["missing"]
    assert str(tmp_path) not in found["missing"]
    assert lines(found, private=False) == [f"membership inference: {found['missing']}"]
