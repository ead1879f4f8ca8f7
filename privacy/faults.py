"""Known ways to break the private path, planted one at a time, and the checks that catch them.

``cytofed audit --controls`` shows that the audit would have found them: a check that was never
seen to fail proves little. Every fault goes in through a seam of a check, next to the code that
ships; nothing that trains imports this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

from cytofed.errors import VerificationError
from cytofed.privacy.accounting import price
from cytofed.privacy.audit import Claim, OneRun, audit_one_run
from cytofed.privacy.gradients import Mechanism, PatientOptimizer
from cytofed.privacy.losses import Steps, loss_law
from cytofed.privacy.maskcheck import KeyOf, check_mask_keys, self_mask_key
from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness
from cytofed.privacy.selfcheck import noise_of_small_labs, replay_small_lab
from cytofed.privacy.terms import Terms

CHECKS = (
    "sensitivity replay",
    "noise self-test",
    "canaries, Steinke",
    "canaries, Gaussian",
    "composition",
    "mask keys",
)


class NoiseOff(PatientOptimizer):
    def add_noise(self) -> None:
        pass


class NoiseHalved(PatientOptimizer):
    def add_noise(self) -> None:
        self.noise_multiplier = self.mechanism.sigma / 2
        super().add_noise()


class NotClipped(PatientOptimizer):
    def clip_and_accumulate(self) -> None:
        self.max_grad_norm = 1e9
        super().clip_and_accumulate()
        self.max_grad_norm = self.mechanism.max_norm


class ClippedAfterAveraging(NotClipped):
    """The mean of all patients is clipped, none of them is."""

    def add_noise(self) -> None:
        norm = float(self.summed_P.norm()) / max(len(self._seen), 1)
        self.summed_P.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
        super().add_noise()


class PatientSplit(PatientOptimizer):
    """Two physical batches of one patient, each clipped on its own: sensitivity 2 max_norm."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        super().clip_and_accumulate()


def seeded() -> Randomness:
    """The same seed at every lab and in every round."""
    return SimulatedRandomness(0)


def priced_whole(terms: Terms) -> float:
    """The epsilon of training that a plan claims."""
    return terms.guarantee.epsilon


def priced_by_round(terms: Terms) -> float:
    """A new accountant in each round: it prints the first round's epsilon for ever."""
    return price([terms.training], terms.delta).epsilon


def key_of_32_bits(secret: bytes) -> bytes:
    """A generator that takes 32 bits of seed, as torch's and NumPy's old one do."""
    seed = hashlib.sha256(secret).digest()[:4]
    return hashlib.sha256(seed).digest()


@dataclass(frozen=True)
class Implementation:
    """The private path as it ships, but for what is planted."""

    name: str
    optimizer_type: type[PatientOptimizer] = PatientOptimizer
    new_randomness: Callable[[], Randomness] = SystemRandomness
    priced: Callable[[Terms], float] = priced_whole
    mask_key: KeyOf = field(default=self_mask_key, repr=False)


SHIPPED = Implementation("as shipped")
FAULTS = (
    replace(SHIPPED, name="noise off", optimizer_type=NoiseOff),
    replace(SHIPPED, name="noise halved", optimizer_type=NoiseHalved),
    replace(SHIPPED, name="noise seeded", new_randomness=seeded),
    replace(SHIPPED, name="no clipping", optimizer_type=NotClipped),
    replace(SHIPPED, name="clipping after averaging", optimizer_type=ClippedAfterAveraging),
    replace(SHIPPED, name="a patient split in two", optimizer_type=PatientSplit),
    replace(SHIPPED, name="epsilon reset each round", priced=priced_by_round),
    replace(SHIPPED, name="masks with 32-bit seeds", mask_key=key_of_32_bits),
)


@dataclass(frozen=True)
class Looked:
    """What each check of ``CHECKS`` said of an implementation; an empty text: it passed."""

    name: str
    found: dict[str, str]

    @property
    def caught(self) -> bool:
        return any(self.found.values())


def look(implementation: Implementation, terms: Terms, declared_patients: int) -> Looked:
    """Put an implementation through all checks, with the mechanism of ``terms``."""
    mechanism = Mechanism(
        terms.training.sigma, terms.max_norm, terms.training.sampling_rate, declared_patients
    )
    optimizer_type = implementation.optimizer_type
    claimed = implementation.priced(terms)
    found = {
        "sensitivity replay": _said(lambda: replay_small_lab(mechanism, optimizer_type)),
        "noise self-test": _said(
            lambda: noise_of_small_labs(mechanism, optimizer_type, implementation.new_randomness)
        ),
        "composition": _said(lambda: check_composition(terms, claimed)),
        "mask keys": _said_of_masks(implementation.mask_key),
    }
    claim = Claim.of(mechanism, terms.steps, claimed, terms.delta)
    run = audit_one_run(
        claim, optimizer_type=optimizer_type, new_randomness=implementation.new_randomness
    )
    found |= violations(run)
    return Looked(implementation.name, {check: found[check] for check in CHECKS})


def violations(run: OneRun) -> dict[str, str]:
    """By check: how far a bound is above the claim, empty where it is not."""
    return {
        f"canaries, {bound.name}": f"epsilon is at least {bound.lower:.2f}, claimed "
        f"{bound.claimed:.2f} at delta {bound.delta:g}"
        if bound.violated
        else ""
        for bound in run.bounds
    }


def composed(terms: Terms, rounds: int, *, delta: float) -> float:
    """Epsilon of the training of ``rounds`` rounds, by an accountant that is not Opacus'."""
    event = terms.training
    return loss_law([Steps(event.sampling_rate, event.sigma, event.steps * rounds)]).epsilon(delta)


def check_composition(terms: Terms, claimed: float) -> float:
    """Epsilon of all steps of the plan, at most ``claimed``. Errors: VerificationError."""
    epsilon = composed(terms, terms.rounds, delta=terms.delta)
    if not epsilon <= claimed + _TOLERANCE:
        raise VerificationError(
            f"composition: {terms.steps} steps cost epsilon {epsilon:.2f} at delta "
            f"{terms.delta:g}, claimed {claimed:.2f}"
        )
    return epsilon


_TOLERANCE = 0.005
"""of the estimate by ``losses``"""


def _said(check: Callable[[], object]) -> str:
    try:
        check()
    except VerificationError as error:
        return error.message
    return ""


@cache  # two seconds, and most implementations derive masks as what ships
def _said_of_masks(mask_key: KeyOf) -> str:
    return _said(lambda: check_mask_keys(mask_key))
