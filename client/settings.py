"""client.yaml: what a lab decides for itself, as one frozen value.

The lab's data, what it will agree to, how it reaches the coordinator. Nothing in it comes from
outside. An unknown key is an error that names the nearest one: a misspelt limit must not pass for
no limit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cytofed.client.storage import check_spec
from cytofed.errors import InputError
from cytofed.privacy import ledger
from cytofed.privacy.accounting import check_delta
from cytofed.sections import build, read_tree

MOST_APPROVALS = 5
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_NEVER_EMPTY = ("limits", "approvals", "auto_approve", "pool", "ledger", "storage_key")
"""what protects patients: an empty value of it is a slip, never a wish"""


@dataclass(frozen=True)
class Limits:
    """What this lab refuses. None, empty or 0 is no limit, which a file says by leaving it out."""

    max_epsilon: float | None = None
    """of everything ever spent and held on the pool, per patient"""
    max_epsilon_per_year: float | None = None
    delta: float | None = None
    """at which the two above are stated; left out: the smallest of any approved plan"""
    min_cohort: int = 0
    """labs of a plan's cohort, this one among them"""
    trusted_peers: Mapping[str, str] = field(default_factory=dict)
    """lab -> fingerprint, compared by phone"""
    min_trusted_peers: int = 0
    """how many of them a cohort must have: without, a coordinator could invent the other labs"""
    secure_aggregation_required: bool = False
    allowed_models: tuple[str, ...] = ()
    allowed_strategies: tuple[str, ...] = ()
    max_bytes_per_round: int | None = None
    max_run_days: float | None = None
    """from a run's first order to its last"""

    def of_ledger(self) -> ledger.Limits:
        """The part that the privacy ledger enforces."""
        return ledger.Limits(self.max_epsilon, self.max_epsilon_per_year, self.delta)


@dataclass(frozen=True)
class AutoApprove:
    """When a plan within all limits needs no person. Off unless a lab switches it on."""

    enabled: bool = False
    max_epsilon: float | None = None
    """of one plan, per patient; a plan without patient-level privacy is never approved so"""
    secure_aggregation: bool = True
    """only plans with secure aggregation"""
    known_labs_only: bool = True
    """only cohorts whose every key this lab has approved before"""


@dataclass(frozen=True)
class Timeouts:
    """Seconds. What waits longer tries again, for ever, and says so."""

    connect_s: float = 10.0
    request_s: float = 60.0
    poll_s: float = 0.5
    heartbeat_s: float = 12.0
    retry_max_s: float = 30.0
    """the longest pause between two tries to reach the coordinator"""


@dataclass(frozen=True)
class Settings:
    """client.yaml, read and checked.

    ``data``: folder or CSV of images. ``labels``: label map; None finds it, which
    private plans do not take. ``patients``: who is who, such as ``column:patient``; ``none`` where
    a column of that name is none. ``patients_declared``: this lab's public, rounded number of
    patients. ``images_per_patient``: the most that one patient has, for plans that protect single
    images. ``pool``: whose budget is spent: labs that share patients share a pool's name.
    """

    data: Path
    ledger: Path
    labels: str | None = None
    patients: str | None = None
    patients_declared: int | None = None
    images_per_patient: int | None = None
    pool: str = "default"
    storage_key: str | None = None
    """where the key is that encrypts what is kept: see cytofed.client.storage; None: storage.key"""
    cache: Path | None = None
    """folder for decoded images; None: that of the user"""
    limits: Limits = field(default_factory=Limits)
    approvals: int = 1
    """how many persons have to approve a plan, each by another name"""
    auto_approve: AutoApprove = field(default_factory=AutoApprove)
    proxy: str | None = field(default=None, repr=False)  # may hold a password
    timeouts: Timeouts = field(default_factory=Timeouts)


def default_ledger() -> Path:
    """The one ledger of this machine's user: a second federation draws on the same budget."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "cytofed" / "ledger.sqlite"


def load_settings(path: Path) -> Settings:
    """Read client.yaml; relative paths in it are relative to its folder.

    Errors: InputError for an unknown key (with the nearest), a wrong type or value, no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"no {path.name} in {path.parent}",
            hint="join a federation first: cytofed client join INVITE --dir DIR --data DATA",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return read_settings(text, folder=path.parent, source=str(path))


class FollowedSettings:
    """client.yaml while a daemon runs: a limit that a person writes into it holds from then on,
    for running runs too. All else is as at the start, until a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._seen()
        self._settings = load_settings(path)

    def now(self) -> Settings:
        """Errors: InputError while the file can't be read: no limit is known, nothing goes on."""
        stamp = self._seen()
        if stamp != self._stamp:
            written = load_settings(self._path)
            self._settings = dataclasses.replace(
                self._settings,
                limits=written.limits,
                approvals=written.approvals,
                auto_approve=written.auto_approve,
            )
            self._stamp = stamp
        return self._settings

    def _seen(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def read_settings(text: str, *, folder: Path, source: str = "client.yaml") -> Settings:
    """As ``load_settings``, from text."""
    written = read_tree(text, source, never_empty=_NEVER_EMPTY)
    _refuse_null(written, source)
    tree = {"ledger": str(default_ledger()), **_filled(written)}
    if "data" not in tree:
        raise InputError(f"{source}: data is missing", hint="name the folder with the images")
    settings = build(Settings, tree, source, folder=folder)
    _check(settings, source)
    return settings


def fresh_yaml(
    *,
    data: Path,
    labels: str | None = None,
    patients: str | None = None,
    patients_declared: int | None = None,
    pool: str = "default",
    ledger: Path | None = None,
    proxy: str | None = None,
) -> str:
    """The commented client.yaml that ``join`` writes. It sets no limits: approval decides."""

    def value(of: object) -> str:
        return "" if of is None else f" {json.dumps(of, ensure_ascii=False)}"

    return _FRESH.format(
        data=value(str(data.absolute())),
        labels=value(labels),
        patients=value(patients),
        patients_declared=value(patients_declared),
        pool=value(pool),
        # Written out: a daemon with another home must find the same ledger as its admin.
        ledger=value(str((ledger or default_ledger()).absolute())),
        proxy=value(proxy),
        example="0123456789abcdef" * 4,
    )


_FRESH = """\
# This lab's settings for cytofed. Only this lab reads and changes this file.
# Limits hold from the next order on, for running runs too; approvals and auto_approve for what is
# decided from then on. Other changes: restart `cytofed client start`, then `cytofed client check`.

# --- images (they never leave; nor do file names and patient identifiers)
data:{data}
labels:{labels}                # label map: a name or a YAML file (private plans need it)
patients:{patients}              # who is who: column:NAME, folder:DEPTH, name:REGEX or none
# public, rounded number of this lab's patients; private plans must carry it
patients_declared:{patients_declared}
# images_per_patient: 200            # at most, for plans that protect images and not patients
cache:                         # folder for decoded images; empty: ~/.cache/cytofed

# --- whose budget
# All federations that use the same patients must name the same pool and ledger.
pool:{pool}
ledger:{ledger}

# --- the key that encrypts what is kept between attempts at a round: the file storage.key, unless
# it is bound to the machine, or to a passphrase (docs/lab.md, Keys).
# storage_key: credential:cytofed-storage

# --- limits: what breaks one is refused by its name. None is set: your approval decides.
# Take the # away from `limits:` and from each line that you fill in. No value may be empty, and
# no key may stand twice.
# limits:
#   max_epsilon: 10                     # of everything ever spent and held, per patient
#   max_epsilon_per_year: 5
#   delta: 1e-5                         # at which they are stated
#   min_cohort: 3                       # least number of labs, with this one
#   trusted_peers: {{leeds: {example}}}  # lab: fingerprint, as compared by phone
#   min_trusted_peers: 1                # how many of them must take part
#   secure_aggregation_required: true
#   allowed_models: [cytonet, encoder+head]
#   allowed_strategies: [fedavg, fedprox]
#   max_bytes_per_round: 100000000      # of what leaves
#   max_run_days: 7                     # from a run's first order to its last

# --- how many persons have to approve a plan, each by another name (--by NAME)
# approvals: 1

# --- approval without a person: off. It needs limits.max_epsilon, too.
# auto_approve:
#   enabled: true
#   max_epsilon: 1                      # highest price of one plan, per patient
#   secure_aggregation: true            # only plans with secure aggregation
#   known_labs_only: true               # only labs whose keys were approved here before

# --- network: one outbound connection to the coordinator
proxy:{proxy}                         # http://[user:password@]host:port (HTTPS CONNECT)
timeouts:
  connect_s: 10
  request_s: 60
  poll_s: 0.5
  heartbeat_s: 12
  retry_max_s: 30
"""


def _refuse_null(tree: Mapping[str, Any], source: str) -> None:
    """No limit is taken away by a value that is none."""
    for name in _NEVER_EMPTY:
        below = tree.get(name, "")
        within = below if isinstance(below, Mapping) else {}
        nulls = [name] if below is None else [f"{name}.{k}" for k, v in within.items() if v is None]
        if nulls:
            raise InputError(
                f"{source}: {nulls[0]} is null",
                hint="write a value, or take the line out, and its default holds",
            )


def _filled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without empty keys: an empty key is its default."""
    return {
        key: _filled(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value is not None
    }


def _check(settings: Settings, source: str) -> None:
    limits, auto = settings.limits, settings.auto_approve
    try:
        limits.of_ledger()
        if limits.delta is not None and settings.patients_declared:
            check_delta(limits.delta, settings.patients_declared)
    except InputError as error:
        raise InputError(f"{source}: {error.message}") from None
    least: dict[str, tuple[float | None, float]] = {
        "patients_declared": (settings.patients_declared, 1),
        "approvals": (settings.approvals, 1),
        "images_per_patient": (settings.images_per_patient, 1),
        "limits.min_cohort": (limits.min_cohort, 0),
        "limits.min_trusted_peers": (limits.min_trusted_peers, 0),
        "limits.max_bytes_per_round": (limits.max_bytes_per_round, 1),
        "limits.max_run_days": (limits.max_run_days, 1e-3),
        "auto_approve.max_epsilon": (auto.max_epsilon, 1e-9),
        **{
            f"timeouts.{name}": (value, 1e-3)
            for name, value in dataclasses.asdict(settings.timeouts).items()
        },
    }
    for where, (value, low) in least.items():
        if value is not None and not value >= low:
            raise InputError(f"{source}: Expected {where}={value:g} >= {low:g}")
    for lab, fingerprint in limits.trusted_peers.items():
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise InputError(
                f"{source}: limits.trusted_peers.{lab} is {fingerprint!r:.80}, expected a "
                "fingerprint of 64 lower-case hex digits",
                hint="`cytofed client status DIR` shows them; compare by phone",
            )
    if limits.min_trusted_peers > len(limits.trusted_peers):
        raise InputError(
            f"{source}: limits.min_trusted_peers={limits.min_trusted_peers}, and "
            f"{len(limits.trusted_peers)} trusted_peers are listed: no plan could pass"
        )
    if auto.enabled and auto.max_epsilon is None:
        raise InputError(
            f"{source}: auto_approve is enabled without auto_approve.max_epsilon",
            hint="state the highest price of a plan that needs no person",
        )
    if auto.enabled and limits.max_epsilon is None:
        raise InputError(
            f"{source}: auto_approve is enabled without limits.max_epsilon: plan after plan would "
            "be approved, each within auto_approve.max_epsilon",
            hint="state under limits what all of them together may spend",
        )
    if settings.storage_key is not None:
        check_spec(settings.storage_key)
    if settings.approvals > MOST_APPROVALS:
        raise InputError(f"{source}: Expected approvals={settings.approvals} <= {MOST_APPROVALS}")
    if auto.enabled and settings.approvals > 1:
        raise InputError(
            f"{source}: auto_approve is enabled, and approvals={settings.approvals} persons have "
            "to approve: it is one or the other"
        )
    if not settings.pool.strip():
        raise InputError(f"{source}: pool is empty, expected a name")
    proxy = settings.proxy
    if proxy is not None and not re.fullmatch(r"http://[^/\s]+:\d{1,5}/?", proxy):
        # The value may hold a password: it is not repeated.
        raise InputError(
            f"{source}: proxy is not http://host:port",
            hint="for example http://proxy.hospital.example:3128; user:password@ before the host",
        )
