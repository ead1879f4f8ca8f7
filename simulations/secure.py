"""Keys and states of secure aggregation for virtual labs: the files that enrolment would leave.

In a deployment each party makes its own keys and labs pin each other's; here one process makes them
all, which is as good as no secrecy, and the protocol then runs as it would between machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cytofed.canonical import digest
from cytofed.client.secure import SecureLab
from cytofed.files import write_atomically
from cytofed.messages import Order
from cytofed.plan import Plan
from cytofed.privacy.identity import Identity
from cytofed.privacy.secagg import Cohort, check_rules
from cytofed.secure_round import at_most_half, public_bound
from cytofed.seeds import derive
from cytofed.server.secure import SecureRun
from cytofed.strategies.strategy import Strategy

COORDINATOR = "coordinator"
FEDERATION_RUN = "federation"


def make_keys(folder: Path, plan: Plan, weights: Mapping[str, float]) -> None:
    """Identities of all parties and the cohort that they pin; nothing where they are there.

    ``weights``: what each lab declares in public.

    Errors: InputError for a cohort, threshold or minimum that is not safe.
    """
    if not plan.secure_aggregation.enabled or (_folder(folder) / "cohort").is_file():
        return
    settings, names = plan.secure_aggregation, tuple(weights)
    threshold = check_rules(
        len(names), threshold=settings.threshold, min_cohort=settings.min_cohort
    )
    home = _folder(folder)
    home.mkdir(mode=0o700, exist_ok=True)
    parties = {name: Identity.generate(name) for name in (*names, COORDINATOR)}
    for name, identity in parties.items():
        write_atomically(home / f"{name}.identity", identity.to_bytes(), mode=0o600)
    cohort = Cohort(
        federation="simulation",
        run=FEDERATION_RUN,
        plan_sha256=plan.sha256,
        roster_sha256=digest("cytofed/1/simulated-roster", sorted(names)).hex(),
        coordinator=parties[COORDINATOR].public,
        labs=tuple(parties[name].public for name in sorted(names)),
        threshold=threshold,
        min_cohort=settings.min_cohort,
    )
    write_atomically(home / "weights.json", json.dumps(at_most_half(weights)), mode=0o600)
    write_atomically(home / "cohort", cohort.to_bytes(), mode=0o600)


def open_secure_lab(folder: Path, plan: Plan, name: str) -> SecureLab | None:
    """A virtual lab's half; None without secure aggregation or for what is no lab."""
    home = _folder(folder)
    if not plan.secure_aggregation.enabled or not (home / f"{name}.identity").is_file():
        return None

    def rounding(order: Order) -> np.random.Generator:
        return np.random.default_rng(derive(plan.train.seed, "round", name, order.round))

    return SecureLab(
        identity=Identity.from_bytes((home / f"{name}.identity").read_bytes()),
        cohort=_cohort(home),
        bounds=_bounds(home),
        states=FolderStates(home, name),
        rounding=rounding,
    )


def open_secure_run(
    folder: Path,
    plan: Plan,
    strategy: Strategy,
    *,
    size: int,
    nodes: Mapping[str, int],
) -> SecureRun | None:
    """The coordinator's half; None without secure aggregation."""
    if not plan.secure_aggregation.enabled:
        return None
    home = _folder(folder)
    return SecureRun(
        cohort=_cohort(home),
        identity=Identity.from_bytes((home / f"{COORDINATOR}.identity").read_bytes()),
        plan=plan,
        strategy=strategy,
        size=size,
        max_weight=public_bound(_bounds(home).values()),
        nodes=nodes,
        counter_file=home / "counter.json",
    )


@dataclass(frozen=True)
class FolderStates:
    """The protocol's state of one lab as a file."""

    folder: Path
    lab: str

    def load(self, run: str) -> bytes | None:
        path = self.folder / f"{self.lab}.{run}.state"
        return path.read_bytes() if path.is_file() else None

    def save(self, run: str, state: bytes) -> None:
        write_atomically(self.folder / f"{self.lab}.{run}.state", state, mode=0o600)


def _folder(folder: Path) -> Path:
    return folder / "secagg"


def _cohort(home: Path) -> Cohort:
    return Cohort.from_bytes((home / "cohort").read_bytes())


def _bounds(home: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((home / "weights.json").read_text())
    return found
