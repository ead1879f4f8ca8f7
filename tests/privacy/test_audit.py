"""The one-run audit: its law of losses, its bounds, and what it does and does not catch."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import special

from cytofed.errors import InputError, VerificationError
from cytofed.plan import load_plan
from cytofed.privacy import audit, faults
from cytofed.privacy.accounting import epsilon_for
from cytofed.privacy.audit import Bound, Claim, audit_one_run, calibrate, steinke_bound
from cytofed.privacy.gradients import Correction, Mechanism, PatientOptimizer, Step
from cytofed.privacy.losses import Steps, loss_law
from cytofed.privacy.maskcheck import check_mask_keys, check_mask_secrets
from cytofed.privacy.noise import SimulatedRandomness
from cytofed.privacy.terms import Terms, terms_of

torch.set_num_threads(1)  # more would spin, and these nets are tiny

# Exact values of pure PLD accountants (Google's and Microsoft's agree on them).
REFERENCE = [
    (0.01, 1.0, 1000, 1e-5, 1.8282),
    (0.032, 1.2, 2000, 1e-5, 6.9396),
    (0.1, 2.0, 500, 1e-3, 3.9803),
    (1.0, 10.0, 50, 1e-3, 2.0533),
    (0.004, 0.8, 5000, 1e-6, 2.9073),
    (0.0625, 0.6, 320, 1e-4, 20.8219),
    (1.0, 1.0, 1, 1e-5, 4.3772),
]


def claim(epsilon: float | None = None, *, sigma: float = 1.2, steps: int = 6) -> Claim:
    """Of steps at rate 1/2; claimed is what they cost, where nothing else is said."""
    mechanism = Mechanism(sigma, 0.8, 0.5, 30)
    cost = epsilon_for(sigma, 1e-5, 0.5, steps)
    return Claim.of(mechanism, steps, cost if epsilon is None else epsilon, 1e-5)


@pytest.mark.parametrize("point", REFERENCE, ids=str)
def test_law_of_losses_agrees_with_exact_accountants(
    point: tuple[float, float, int, float, float],
) -> None:
    rate, sigma, steps, delta, epsilon = point
    assert loss_law([Steps(rate, sigma, steps)]).epsilon(delta) == pytest.approx(epsilon, abs=0.005)


def test_laws_of_two_mechanisms_compose() -> None:
    halves = loss_law([Steps(0.2, 1.0, 15), Steps(0.2, 1.0, 25)])
    assert halves.epsilon(1e-4) == pytest.approx(loss_law([Steps(0.2, 1.0, 40)]).epsilon(1e-4))
    both = loss_law([Steps(0.2, 1.0, 40), Steps(1.0, 3.0, 1)])
    assert both.epsilon(1e-4) > halves.epsilon(1e-4)


def test_best_test_of_one_gaussian_release_is_that_of_neyman_and_pearson() -> None:
    for alarms in (0.01, 0.2, 0.7):
        least = float(special.ndtr(special.ndtri(1 - alarms) - 1 / 1.5))
        assert loss_law([Steps(1.0, 1.5, 1)]).misses(alarms) == pytest.approx(least, abs=1e-4)


def test_no_law_without_noise() -> None:
    with pytest.raises(InputError, match="no law"):
        loss_law([Steps(0.5, 0.0, 3)])


def test_steinke_bound_of_pure_privacy_is_that_of_a_biased_coin() -> None:
    # 95 of 100 right: the least accuracy not refuted is Clopper and Pearson's lower end.
    bound = steinke_bound(100, 100, 95, delta=0.0, wrong=0.05)
    assert 1 / (1 + math.exp(-bound)) == pytest.approx(0.8978, abs=1e-3)


def test_steinke_bound_is_vacuous_at_large_delta_and_for_guesses_of_chance() -> None:
    assert steinke_bound(2000, 160, 160, delta=1e-2, wrong=0.05) == 0.0
    assert steinke_bound(2000, 160, 160, delta=1e-3, wrong=0.05) < 0.5
    assert steinke_bound(2000, 160, 80, delta=1e-5, wrong=0.05) == 0.0
    assert steinke_bound(2000, 160, 160, delta=1e-5, wrong=0.05) > 3.0


@pytest.mark.parametrize("seed", range(3))
def test_what_ships_passes_and_is_seen_to_leak(seed: int) -> None:
    held = claim()
    run = audit_one_run(
        held,
        new_randomness=lambda: SimulatedRandomness(seed, "audit"),
        coins=np.random.default_rng(seed),
    )
    assert not any(bound.violated for bound in run.bounds)
    assert 0.3 * held.epsilon < run.gaussian.lower <= held.epsilon


def test_false_alarms_are_rarer_than_promised() -> None:
    for held in (claim(), claim(sigma=0.6), claim(sigma=6.0)):
        alarms = calibrate(held, range(200))
        assert max(alarms.steinke, alarms.gaussian) <= 10


def test_a_claim_of_half_the_truth_is_a_violation() -> None:
    true = claim()
    run = audit_one_run(
        claim(true.epsilon / 2),
        new_randomness=lambda: SimulatedRandomness(1, "audit"),
        coins=np.random.default_rng(1),
    )
    assert run.gaussian.violated


def test_a_bound_above_the_claim_is_a_violation_only_if_new_canaries_say_so_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit, "CANARIES", 200)

    def seen(of_truth: float) -> Bound:
        return audit_one_run(
            claim(of_truth * claim().epsilon),
            new_randomness=lambda: SimulatedRandomness(5, "audit"),
            coins=np.random.default_rng(5),
        ).gaussian

    once, again, both = seen(10.0), seen(0.75), seen(0.2)
    assert again.claimed < once.lower  # the first canaries were lucky
    assert again.lower < again.claimed
    assert not again.violated
    assert both.lower == again.lower
    assert both.violated


def test_a_step_that_releases_nothing_stops_the_audit() -> None:
    class Silent(PatientOptimizer):
        def finish(self, correction: Correction | None = None) -> Step:
            return Step(0, 0)

    with pytest.raises(VerificationError, match="step 1 released 0"):
        audit_one_run(claim(), optimizer_type=Silent)


CAUGHT_BY = {
    "noise off": "noise self-test",
    "noise halved": "noise self-test",
    "noise seeded": "noise self-test",
    "no clipping": "sensitivity replay",
    "clipping after averaging": "sensitivity replay",
    "a patient split in two": "sensitivity replay",
    "epsilon reset each round": "composition",
    "masks with 32-bit seeds": "mask keys",
}


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> Terms:
    monkeypatch.setattr(audit, "CANARIES", 600)
    found = terms_of(load_plan("demo", ["privacy.unit=patient", "privacy.epsilon=3"]))
    assert found is not None
    return found


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault: faults.Implementation, terms: Terms) -> None:
    looked = faults.look(fault, terms, declared_patients=40)
    assert looked.found[CAUGHT_BY[fault.name]]


def test_no_check_finds_a_fault_in_what_ships(terms: Terms) -> None:
    assert not faults.look(faults.SHIPPED, terms, declared_patients=40).caught


def test_production_masks_have_all_their_entropy() -> None:
    check_mask_keys()
    check_mask_secrets()


def test_mask_keys_of_the_first_32_bits_are_caught() -> None:
    def truncated(secret: bytes) -> bytes:
        return hashlib.sha256(secret[:4]).digest()

    with pytest.raises(VerificationError, match="bit 32 of a self-mask"):
        check_mask_keys(self_key=truncated)
    with pytest.raises(VerificationError, match="bit 32 of a pair-mask"):
        check_mask_keys(pair_key=truncated)
