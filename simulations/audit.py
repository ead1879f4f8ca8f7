"""``cytofed audit RUN``: what a run claims of privacy, held against what can be measured.

Three kinds of findings, each with a verdict. *Checks* hold the claim against the run's plan and
the code that trains: composition over all steps, self-checks with the run's mechanism and net,
canaries. *Leaves* is what else the run directory tells a reader. *Controls* plant known faults and
show which check would have caught them. Nothing here can show that a run is private; a weak lower
bound reads "no violation found".

A run keeps no gradient, so canaries go through the optimizer that is installed, at the run's
noise, rate and steps: they audit this version of cytofed, not the machines of that day.

Shapes: K labs, C classes, N images.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cytofed.errors import InputError, VerificationError
from cytofed.files import write_atomically
from cytofed.plan import Plan
from cytofed.privacy.accounting import shown
from cytofed.privacy.losses import Steps, loss_law
from cytofed.privacy.terms import Terms, terms_of
from cytofed.simulations.attacks import lines as attack_lines
from cytofed.simulations.audit_job import (
    ATTACKS,
    DECLARED,
    REHEARSAL,
    at_work,
    control_names,
)
from cytofed.simulations.audit_report import (
    PRIVATE_PAGE,
    VERSION,
    private_page,
    without_pictures,
    write_figures,
)
from cytofed.simulations.membership import infer_members
from cytofed.simulations.membership import lines as membership_lines
from cytofed.simulations.report import Run, read_run, write_report
from cytofed.whose import made_up, whose, whose_of

if TYPE_CHECKING:
    from cytofed.privacy.audit import Bound, Claim
    from cytofed.privacy.gradients import Mechanism

Json = Mapping[str, Any]
Verdict = Literal["PASS", "VIOLATION", "NOTE"]

SMALL = 5
"""counts below it may single a patient out"""
_CALIBRATION = 400
_NOISE_COORDINATES = 1 << 20
_ESTIMATE = 0.005
"""of epsilon by ``losses``"""


@dataclass(frozen=True)
class Finding:
    """One line of an audit: what is claimed, what was found, and what that means."""

    what: str
    claimed: str
    found: str
    verdict: Verdict
    remark: str = ""

    def __str__(self) -> str:
        parts = [self.claimed or self.what, self.found, self.verdict]
        return " | ".join(parts) + (f": {self.remark}" if self.remark else "")


def audit(
    run_dir: Path,
    *,
    controls: bool = False,
    attacks: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Audit a run, write its ``audit.json`` and its report anew; returns what was written.

    Errors: InputError for a folder that holds no finished run.
    """
    started_s = time.monotonic()
    run = read_run(run_dir)
    terms = terms_of(run.plan, pseudo=made_up(run.summary))
    found: dict[str, Any] = {
        "version": VERSION,
        "plan_sha256": run.plan.sha256,
        "unit": run.plan.privacy.unit,
        "per": whose(run.plan.privacy.unit, pseudo=made_up(run.summary)),
        "claim": None if terms is None else str(terms.guarantee),
        "false_alarms": None,
        "controls": None,
        "attacks": None,
    }
    planted = control_names() if controls else ()
    others = [*[ATTACKS] * attacks, *[REHEARSAL] * (terms is not None)]
    with at_work(run_dir, [*others, *planted], tell) as parts:
        if terms is None:
            checks = [_nothing_claimed()]
        else:
            elsewhere = parts[REHEARSAL]
            checks, found["false_alarms"] = _claim_checks(run_dir, run, terms, elsewhere, tell)
        if run.plan.secure_aggregation.enabled:
            tell("mask keys")
            checks.append(_mask_keys())
        if controls:
            found["controls"] = _controls([parts[name].result() for name in planted])
        if attacks:
            found["attacks"] = parts[ATTACKS].result()
    if attacks:
        found["attacks"]["membership"] = infer_members(run_dir, tell)
    leaves = _leaves(run)
    found["attacks"] = _without_pictures(run_dir, found["attacks"])
    found["checks"] = [asdict(finding) for finding in checks]
    found["leaves"] = [asdict(finding) for finding in leaves]
    found["violations"] = sum(f.verdict == "VIOLATION" for f in (*checks, *leaves))
    found["seconds"] = round(time.monotonic() - started_s, 1)
    write_atomically(run_dir / "audit.json", json.dumps(found, indent=1) + "\n")
    write_figures(found, run_dir / "figures")
    write_report(run_dir)
    return found


def _without_pictures(run_dir: Path, attacks: Json | None) -> Any:
    """The attacks as others may read them; their pictures go to a page that is the lab's alone."""
    page = run_dir / PRIVATE_PAGE
    if attacks is None:
        page.unlink(missing_ok=True)  # of another audit
        return None
    write_atomically(page, private_page(attacks), mode=0o600)
    return without_pictures(attacks)


def _claim_checks(
    run_dir: Path, run: Run, terms: Terms, elsewhere: Future[Any], tell: Callable[[str], None]
) -> tuple[list[Finding], dict[str, Any]]:
    """What holds the claim against plan and code, and how often its bounds cry wolf."""
    tell("composition")
    checks = _composition(run, terms)
    mechanism = _mechanism(run, terms)
    tell("self-checks")
    checks += _self_checks(run_dir, run, mechanism)
    tell("rehearsal")
    checks.append(_rehearsal(mechanism, elsewhere))
    tell("canaries")
    bounds, false_alarms = _canaries(run, terms, mechanism)
    return checks + bounds, false_alarms


def refuse_violation(found: Json) -> None:
    """Errors: VerificationError for an audit that found a violation or missed a planted fault."""
    if found["violations"]:
        raise VerificationError(
            f"{found['violations']} of this audit's findings are violations",
            hint="do not rely on the run's epsilon; the lines say VIOLATION",
        )
    if found["controls"] and not found["controls"]["all_caught"]:
        missed = [row["fault"] for row in found["controls"]["faults"] if not row["caught"]]
        wrong = "a fault was found in what ships" if not missed else f"not caught: {missed}"
        raise VerificationError(f"the audit's controls failed: {wrong}")


# --- the claim


def _nothing_claimed() -> Finding:
    return Finding(
        "claim",
        "no differential privacy is claimed",
        "no bound to hold it against",
        "NOTE",
        "nothing limits what the model or a lab's updates say of one patient",
    )


def _claimed(run: Run, epsilon: float, delta: float) -> str:
    privacy = run.summary["privacy"]
    adversary = privacy.get("adversary", "add-or-remove")
    return f"claimed epsilon {shown(epsilon)} ({delta:g}) [{whose_of(run.summary)}, {adversary}]"


def _training_claim(run: Run) -> tuple[float, float]:
    """Epsilon and delta of training, as the summary has them. Errors: InputError."""
    privacy = run.summary.get("privacy") or {}
    try:
        return float(privacy["epsilon"]), float(privacy["delta"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"the plan asks for privacy per {run.plan.privacy.unit}, and summary.json claims none",
            hint="was the summary written by this plan's run?",
        ) from None


def _mechanism(run: Run, terms: Terms) -> Mechanism:
    from cytofed.privacy.gradients import Mechanism

    labs = (run.summary["privacy"].get("labs") or {}).values()
    declared = [int(lab["declared_patients"]) for lab in labs if lab.get("declared_patients")]
    # The smallest lab's: noise is relative to it, and no bound depends on it.
    return Mechanism(
        terms.training.sigma,
        terms.max_norm,
        terms.training.sampling_rate,
        min(declared, default=DECLARED),
    )


def _composition(run: Run, terms: Terms) -> list[Finding]:
    """Epsilons of the summary against an accountant of the audit's own."""
    epsilon, delta = _training_claim(run)
    training = terms.training
    steps = Steps(training.sampling_rate, training.sigma, terms.steps)
    cost = loss_law([steps]).epsilon(delta)
    found = [_composed("training, all rounds", run, epsilon, delta, cost)]
    total = run.summary["privacy"].get("total")
    scores = terms.evaluation
    if total and scores is not None:
        noised = Steps(1.0, scores.sigma, terms.evaluations)
        cost = loss_law([steps, noised]).epsilon(delta)
        claimed = float(total["epsilon"])
        found.append(_composed("training and scores", run, claimed, delta, cost))
    labs = run.summary["privacy"].get("labs") or {}
    rounds = dict.fromkeys(labs, 0)
    for record in run.rounds:
        for lab in record.get("received") or ():
            rounds[lab] = rounds.get(lab, 0) + 1
    for lab, answered in rounds.items():
        claimed = float((labs.get(lab) or {}).get("epsilon") or 0.0)
        least = (
            loss_law([replace(steps, count=training.steps * answered)]).epsilon(delta)
            if answered
            else 0.0
        )
        if least > claimed + _ESTIMATE:
            found.append(_composed(f"{lab}, {answered} rounds", run, claimed, delta, least))
    return found


def _composed(what: str, run: Run, claimed: float, delta: float, cost: float) -> Finding:
    over = cost > claimed + _ESTIMATE
    return Finding(
        f"composition: {what}",
        _claimed(run, claimed, delta),
        f"composed epsilon {cost:.2f} ({what}; an accountant of the audit's own)",
        "VIOLATION" if over else "PASS",
    )


# --- the code that trains


def _self_checks(run_dir: Path, run: Run, mechanism: Mechanism) -> list[Finding]:
    from cytofed.client.app import self_check
    from cytofed.privacy.noise import SystemRandomness
    from cytofed.privacy.selfcheck import check_production_path

    return [
        _checked("self-check: the private path", lambda: str(self_check(SystemRandomness))),
        _checked(
            "self-check: with the run's noise, norm and rate",
            lambda: str(check_production_path(mechanism=mechanism)),
        ),
        _checked("self-check: with the run's net", lambda: check_net(run_dir, run.plan, mechanism)),
    ]


def _rehearsal(mechanism: Mechanism, elsewhere: Future[Any]) -> Finding:
    """Orders to a lab of made-up patients. ``elsewhere``: the noise of another process."""
    from cytofed.client.rehearsal import rehearse

    def check() -> str:
        seen = rehearse(sigma=mechanism.sigma, sampling_rate=mechanism.sampling_rate)
        if not set(seen.noises).isdisjoint(elsewhere.result()["noises"]):
            raise VerificationError("two processes have the same noise: it has a seed")
        return str(seen)

    return _checked("rehearsal: made-up patients, from the plan to what leaves", check)


def _checked(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "", check(), "PASS")
    except VerificationError as error:
        return Finding(what, "", error.message, "VIOLATION")


def check_net(run_dir: Path, plan: Plan, mechanism: Mechanism) -> str:
    """Sensitivity replay and noise self-test on the run's net, with images of noise.

    Errors: VerificationError.
    """
    import torch

    from cytofed import models
    from cytofed.client import convolution, training
    from cytofed.privacy.gradients import PatientOptimizer
    from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness
    from cytofed.privacy.sampling import Draw, Rows
    from cytofed.privacy.selfcheck import Setup, check_noise, check_sensitivity, empty_steps

    whole, info = models.load_model(run_dir / "model.safetensors")
    trained = models.manifest(whole, plan.model.trainable)
    patients, cells, size = 4, 2, plan.labels.scale.size_px
    uniform = SimulatedRandomness(0, "audit images").uniforms(patients * cells * size * size * 3)
    pixels_NHW3 = torch.from_numpy((256 * uniform).astype(np.uint8)).view(-1, size, size, 3)
    images_N3HW = models.images_of(pixels_NHW3)
    class_N = torch.arange(patients * cells) % len(info.codes)
    targets_NC = torch.nn.functional.one_hot(class_N, len(info.codes)).bool()
    objective = training.Objective(torch.ones(len(info.codes), dtype=torch.bool))

    def optimizer_of(randomness: Randomness) -> tuple[torch.nn.Module, PatientOptimizer]:
        net = copy.deepcopy(whole).to(memory_format=torch.channels_last)
        convolution.adopt(net)
        inner = torch.optim.SGD(training.select(net, trained), lr=0.0)
        return net, PatientOptimizer(inner, net, mechanism=mechanism, randomness=randomness)

    def setup(chosen: tuple[int, ...]) -> Setup:
        net, optimizer = optimizer_of(SimulatedRandomness(0, "audit noise"))

        def patient_loss(rows_K: Rows) -> torch.Tensor:
            rows = torch.from_numpy(rows_K)
            return objective(net(images_N3HW[rows]), targets_NC[rows])

        rows = tuple(np.arange(cells) + cells * patient for patient in chosen)
        return Setup(net, optimizer, Draw(chosen, rows), patient_loss)

    with training.steady(2):
        largest = check_sensitivity(setup, tuple(range(patients)), mechanism, remove=2)
        releases = [
            release[:: 1 + len(release) // _NOISE_COORDINATES]
            for _lab in range(2)
            for release in empty_steps(optimizer_of(SystemRandomness())[1], steps=2)
        ]
        ratio, correlation = check_noise(np.array(releases), mechanism)
    return (
        f"{trained.size:,} trained weights: sensitivity {largest:.3f} of max_norm, "
        f"noise {ratio:.3f} of sigma, largest correlation {correlation:.4f}"
    )


def _claim_of(run: Run, terms: Terms, mechanism: Mechanism) -> Claim:
    from cytofed.privacy.audit import Claim

    return Claim.of(mechanism, terms.steps, *_training_claim(run))


def _canaries(run: Run, terms: Terms, mechanism: Mechanism) -> tuple[list[Finding], dict[str, Any]]:
    from cytofed.client.training import steady
    from cytofed.privacy.audit import CONFIDENCE, audit_one_run, calibrate

    claim = _claim_of(run, terms, mechanism)
    with steady(1):  # one canary's gradient is too small to share
        outcome = audit_one_run(claim)
    alarms = calibrate(claim, range(_CALIBRATION))
    guesses = outcome.guesses
    told = {
        "steinke": f"{guesses.right} of {guesses.made} guesses right, {guesses.canaries} canaries",
        "gaussian": f"{guesses.alarms} of {guesses.out} false alarms, {guesses.misses} of "
        f"{guesses.in_} misses",
    }
    found = [_bound(run, bound, told[bound.name.lower()], CONFIDENCE) for bound in outcome.bounds]
    calibration = {**asdict(alarms), "confidence": CONFIDENCE}
    return found, calibration


def _bound(run: Run, bound: Bound, told: str, confidence: float) -> Finding:
    return Finding(
        f"canaries: {bound.name}",
        _claimed(run, bound.claimed, bound.delta),
        f"audited lower bound {math.floor(bound.lower * 100) / 100:.2f}, {confidence:.0%} "
        f"({bound.name}, assumes {bound.assumes}; {told})",
        "VIOLATION" if bound.violated else "PASS",
        "" if bound.violated else "no violation found",
    )


def _mask_keys() -> Finding:
    from cytofed.privacy.maskcheck import check_mask_keys, check_mask_secrets

    def check() -> str:
        check_mask_keys()
        check_mask_secrets()
        return "each bit of a secret changes its key; no repeats in 262,144; 64 fresh bytes a slot"

    return _checked("self-check: mask keys of secure aggregation", check)


def _controls(rows: Sequence[Json]) -> dict[str, Any]:
    """The table of planted faults against checks; ``rows``: the code that ships first."""
    from cytofed.privacy.faults import CHECKS
    from cytofed.simulations.planted import CHECK

    shipped, *faults = rows
    return {
        "checks": [*CHECKS, CHECK],
        "shipped": shipped,
        "faults": faults,
        "all_caught": not shipped["caught"] and all(row["caught"] for row in faults),
    }


# --- what leaves besides weights


def _leaves(run: Run) -> list[Finding]:
    """What the run directory tells a reader that no epsilon covers."""
    summary, private = run.summary, run.plan.privacy.unit != "none"
    simulated = "partition" in summary
    found = []

    def add(what: str, told: str, learns: str, *, violates: bool = False) -> None:
        found.append(Finding(what, what, told, "VIOLATION" if violates else "NOTE", learns))

    scores = summary.get("global")
    noised = bool((summary.get("scores") or {}).get("noised"))
    if private and scores and not noised:
        add(
            "scores of held-out images",
            f"exact, {'in a simulation' if simulated else 'in a deployment'}",
            "epsilon does not cover them; whoever knows all held-out patients but one learns how "
            "that one was classified",
            violates=not simulated,
        )
    if summary.get("labs"):
        add(
            "scores per lab",
            f"of {len(summary['labs'])} labs",
            "how each lab's images differ, and which classes it has",
            violates=private and not noised,
        )
    told = [entry for entry in run.rounds if entry.get("loss")]
    if told:
        add(
            "training loss per lab and round",
            f"in {len(told)} rounds",
            "whether a lab's images are hard for the model, round by round",
            violates=private,
        )
    for name, counts in _counts(summary).items():
        small = int(((counts > 0) & (counts < SMALL)).sum())
        what = f"{counts.size} counts, {small} of 1 to {SMALL - 1}"
        learns = "exact numbers of images"
        if small:
            learns += "; a small one may be a single patient"
        add(name, what, learns, violates=private and not simulated and not noised)
    if summary.get("problems"):
        add(
            "names of files that could not be read",
            f"{len(summary['problems'])} files",
            "names may hold identifiers of patients",
            violates=not simulated,
        )
    if summary.get("data_sha256"):
        add(
            "hash of all names, labels and images",
            "data_sha256",
            "whoever guesses the whole data set can tell that the guess is right",
        )
    if str((summary.get("privacy") or {}).get("noise", "")).startswith("seeded"):
        add(
            "seed of the noise",
            f"train.seed {summary.get('seed')}",
            "all noise of this simulation: epsilon is what a deployment of this plan would have",
        )
    return found


def _counts(summary: Json) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Exact counts of the run directory by name."""
    partition = summary.get("partition") or {}
    tables = {
        "training images per lab and class": partition.get("train_counts_KC"),
        "held-out images per lab and class": partition.get("test_counts_KC"),
        "confusion matrix": (summary.get("confusion") or {}).get("counts"),
    }
    return {name: np.array(table, np.int64) for name, table in tables.items() if table}


# --- the terminal


def render_audit(found: Json, console: Console, *, run_dir: Path) -> None:
    """Print the findings, one line each, and the table of controls."""
    lines: list[str] = []
    for part in ("checks", "leaves"):
        for values in found[part]:
            finding = Finding(**values)
            style = {"VIOLATION": "red", "PASS": "green"}.get(finding.verdict, "")
            console.print(Text(str(finding), style=style), soft_wrap=True)
    alarms = found["false_alarms"]
    if alarms:
        console.print(Text(false_alarms_line(alarms)), soft_wrap=True)
    if found["controls"]:
        _print_controls(found["controls"], console)
    if found["attacks"]:
        private = found["unit"] != "none"
        lines = [f"pictures {run_dir / PRIVATE_PAGE}: of patients; private, not to be published"]
        for line in (
            *attack_lines(found["attacks"]),
            *membership_lines(found["attacks"]["membership"], private=private),
        ):
            console.print(Text(line), soft_wrap=True)
    lines += [f"{found['violations']} violations, in {found['seconds']:.0f} s"]
    lines.append(f"report   {run_dir / 'report.html'}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def false_alarms_line(alarms: Json) -> str:
    """How often the bounds are wrong; one that is above the claim is looked at again."""
    promised = f"{1 - alarms['confidence']:.0%}"
    return (
        f"above the claim in {alarms['audits']} looks at a correct mechanism: Steinke "
        f"{alarms['steinke']}, Gaussian {alarms['gaussian']} (at most {promised} are promised)"
    )


_HEADINGS = {
    "sensitivity replay": "replay",
    "noise self-test": "noise",
    "canaries, Steinke": "Steinke",
    "canaries, Gaussian": "Gaussian",
    "composition": "composed",
    "mask keys": "masks",
    "rehearsal": "lab",
}
"""of checks, for 80 columns"""


def _mark(said: str | None) -> str:
    """Of a check on a fault: caught, not seen, or not tried."""
    return "" if said is None else "caught" if said else "–"


def _print_controls(controls: Json, console: Console) -> None:
    rows = [controls["shipped"], *controls["faults"]]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("planted fault", no_wrap=True)
    for check in controls["checks"]:
        table.add_column(_HEADINGS.get(check, check))
    of_a_lab = [row for row in rows if len(row["checks"]) == 1]
    for row in rows:
        if row not in of_a_lab:
            marks = [_mark(row["checks"].get(check)) for check in controls["checks"]]
            table.add_row(Text(row["fault"]), *marks)
    console.print(table)
    if of_a_lab:
        (check,) = of_a_lab[0]["checks"]
        console.print(Text(f"planted in a lab, and looked for by the {check} alone", style="dim"))
    for row in of_a_lab:
        console.print(Text(f"{row['fault']}: {'caught' if row['caught'] else 'not caught'}"))
    caught = sum(row["caught"] for row in controls["faults"])
    console.print(Text(f"{caught} of {len(controls['faults'])} planted faults caught"))
