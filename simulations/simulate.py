"""``cytofed simulate``: cut a data set into virtual labs and run the federation on them.

The lab half and the round loop are those of a deployment; only the Grid and the way a lab is
opened are a simulation's own. Everything is a function of data, plan and seed, to the bit.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

import cytofed
from cytofed.arrays import weights_sha256
from cytofed.canonical import digest
from cytofed.card import model_card
from cytofed.client.cache import default_cache_dir
from cytofed.client.cells import Cells, open_cells
from cytofed.client.opening import held_out, indivisible
from cytofed.client.reader import NOBODY, patient_columns, refuse_unsaid_patients
from cytofed.console import RunProgress
from cytofed.encoder import refuse_seen, seen
from cytofed.errors import CytofedError, InputError
from cytofed.files import write_atomically
from cytofed.labels import LabelMap, Scheme, load_map, load_scheme
from cytofed.lineage import Lineage, lineage_in, link_of, start_warnings
from cytofed.metrics import Tally, absent_recall, gap, spread, summarise, summarise_labs
from cytofed.model_file import write_model
from cytofed.plan import Plan, dump_plan, load_plan, to_dict, with_overrides
from cytofed.plan_check import check_plan, large_steps, privacy_price, score_prices
from cytofed.privacy.accounting import PlanUse, across_labs, spend, times
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.terms import delta_of, patients_told, terms_of, with_delta
from cytofed.server.checkpoints import Progress, load_progress, save_progress
from cytofed.server.rounds import (
    Run,
    Scores,
    evaluate,
    evaluate_exactly,
    evaluated_weights,
    final_weights,
    run_rounds,
    status,
)
from cytofed.simulations.exchange import Step
from cytofed.simulations.inprocess import InProcessGrid
from cytofed.simulations.partitions import Partition, assign, parse_partition
from cytofed.simulations.secure import make_keys, open_secure_run
from cytofed.simulations.split import image_keys, pseudo_patients
from cytofed.simulations.virtual import CENTRAL, FEDERATION, VirtualLabs, baseline_plan, cut
from cytofed.start import Start, read_start
from cytofed.strategies import make_strategy
from cytofed.strategies.fedavg import fedavg
from cytofed.strategies.strategy import Strategy

_PRIVATE = "checkpoints"
"""Below the run directory: what is needed to resume, with paths of this machine; not to publish."""


@dataclass(frozen=True)
class Request:
    """What a simulation is asked to do. ``data`` empty: the sample that ships in the package."""

    plan: Plan
    out: Path
    data: tuple[Path, ...] = ()
    labels: tuple[str, ...] = ()
    patients: str | None = None
    backend: str = "inprocess"
    jobs: int | None = None
    resume: bool = False
    cache_dir: Path | None = None


def simulate(request: Request, progress: RunProgress) -> dict[str, Any]:
    """Run a simulation to its end and write its run directory; returns ``summary.json``.

    Errors: InputError for anything that cannot be used, CytofedError when workers fail.
    KeyboardInterrupt passes through; a later call with ``resume`` goes on from the last round.
    """
    check_plan(request.plan)
    strategy = make_strategy(request.plan.strategy)
    partition = parse_partition(request.plan.simulation.partition)
    new = not (request.out / "plan.yaml").is_file()
    made = [path for path in (request.out, *request.out.parents) if not path.exists()]
    finished = _prepare_folder(request)
    if finished is not None:
        return finished
    private = request.out / _PRIVATE
    private.mkdir(mode=0o700, exist_ok=True)
    started = time.monotonic()
    try:
        with _open_grid(request, private, progress) as backend:
            cells = _read(request, progress)
            labs = _cut(request, partition, cells, private)
            earlier = start_warnings(labs.plan, deployed=False, pseudo=_pseudo(labs))
            for warning in (*_large_steps(labs), *earlier):
                progress.warn(warning)
            start = backend.start()
            world = World(
                replace(request, plan=labs.plan), labs, start, strategy, private, progress
            )
            results = backend.run(world)
    except InputError:
        if new and not (request.out / "metrics.jsonl").is_file():
            _discard(request.out, made)  # so that the corrected command may use the same --out
        raise
    return _finish(world, results, time.monotonic() - started)


@dataclass(frozen=True)
class World:
    """A simulation once its labs are cut and its start model is there."""

    request: Request
    labs: VirtualLabs
    start: Start
    strategy: Strategy
    private: Path
    watch: RunProgress

    @property
    def plan(self) -> Plan:
        return self.request.plan

    @property
    def scheme(self) -> Scheme:
        return load_scheme(self.plan.labels.scheme)

    @property
    def line(self) -> Lineage:
        """What the model is trained from, this run among it."""
        return lineage_in(self.start.info).then(
            link_of(
                self.plan,
                run=self.plan.name,
                pseudo=_pseudo(self.labs),
                labs=len(self.labs.names),
            )
        )

    def run(self, cohort: Mapping[str, int]) -> Run:
        """The federation itself."""
        size = self.start.manifest.size
        secure = open_secure_run(self.private, self.plan, self.strategy, size=size, nodes=cohort)
        return Run(
            FEDERATION,
            self.plan,
            self.strategy,
            self.scheme,
            cohort,
            size,
            secure,
            tell_exact=self.plan.privacy.unit != "none",
            release=self.start.released,
        )

    def baseline(self, name: str, cohort: Mapping[str, int]) -> Run:
        """A model that is not federated, at the same amount of training."""
        plan = baseline_plan(self.plan)
        return Run(
            name,
            plan,
            fedavg(),
            self.scheme,
            cohort,
            self.start.manifest.size,
            release=self.start.released,
        )


@dataclass(frozen=True)
class Results:
    """What the runs of a simulation ended with."""

    federation: Progress
    scores: Scores
    baselines: Mapping[str, Mapping[str, Tally]]
    """name of a baseline run -> its final model's tally at every lab"""
    baselines_s: float
    nodes: Mapping[str, int]


def run_all(grid: Grid, nodes: Mapping[str, int], world: World) -> Results:
    """The federation and, where the plan asks for them, its baselines, over any Grid.

    ``nodes``: name -> node id of every lab and of ``central``.
    """
    labs = {name: nodes[name] for name in world.labs.names}
    run = world.run(labs)
    last: dict[int, Scores] = {}
    federation = _resumed(grid, run, world, on_scores=last.__setitem__)
    if run.rounds not in last:  # resumed after its last round
        final = {"weights": evaluated_weights(run, federation)}
        last[run.rounds] = evaluate(grid, run, run.rounds, final, world.watch)
    baselines: dict[str, Mapping[str, Tally]] = {}
    started = time.monotonic()
    if world.plan.simulation.baselines:
        cohorts = {CENTRAL: {CENTRAL: nodes[CENTRAL]}}
        if world.plan.simulation.baselines != "central":
            cohorts |= {f"local-{name}": {name: labs[name]} for name in world.labs.names}
        with ThreadPoolExecutor(max_workers=len(cohorts)) as threads:
            # All at once: the central model on one core, the labs' own on the others.
            futures = {
                name: threads.submit(_baseline, grid, world, name, cohort, labs)
                for name, cohort in cohorts.items()
            }
            baselines = {name: future.result() for name, future in futures.items()}
    baselines_s = time.monotonic() - started
    return Results(federation, last[run.rounds], baselines, baselines_s, labs)


def _baseline(
    grid: Grid,
    world: World,
    name: str,
    cohort: Mapping[str, int],
    labs: Mapping[str, int],
) -> Mapping[str, Tally]:
    """A federation of one: as many epochs over the same images, then tested at every lab."""
    run = world.baseline(name, cohort)
    progress = _resumed(grid, run, world, evaluate_rounds=False)
    everyone, final = replace(run, cohort=labs), {"weights": evaluated_weights(run, progress)}
    return evaluate_exactly(grid, everyone, run.rounds, final, world.watch)


def _resumed(
    grid: Grid,
    run: Run,
    world: World,
    *,
    evaluate_rounds: bool = True,
    on_scores: Callable[[int, Scores], None] = lambda _round, _scores: None,
) -> Progress:
    folder = world.private / run.name
    plan_sha256 = run.plan.sha256
    progress = load_progress(folder, plan_sha256=plan_sha256)
    if progress is None:
        progress = Progress(0, run.strategy.init(world.start.weights_P))
    return run_rounds(
        grid,
        run,
        progress,
        checkpoint=lambda p: _checkpoint(p, run, world),
        watch=world.watch,
        evaluate_rounds=evaluate_rounds,
        on_scores=on_scores,
    )


def _checkpoint(progress: Progress, run: Run, world: World) -> None:
    save_progress(world.private / run.name, progress, plan_sha256=run.plan.sha256)
    if run.name == FEDERATION:
        lines = "".join(json.dumps(record) + "\n" for record in progress.records)
        write_atomically(world.request.out / "metrics.jsonl", lines)


# --- before the rounds


def _prepare_folder(request: Request) -> dict[str, Any] | None:
    """Make or check the run directory; the summary where the run is already finished."""
    out = request.out
    plan_file = out / "plan.yaml"
    if plan_file.is_file():
        if not request.resume:
            raise InputError(
                f"{out} already holds a run",
                hint="add --resume to go on with it, or choose another --out",
            )
        before, now = to_dict(load_plan(plan_file)), to_dict(request.plan)
        if request.plan.privacy.delta is None:  # the run has made a number of it
            now["privacy"]["delta"] = before["privacy"]["delta"]
        if before != now:
            raise InputError(
                f"{out} holds a run of another plan: {_difference(before, now)}",
                hint="resume with the same plan and flags, or choose another --out",
            )
        summary_file = out / "summary.json"
        if summary_file.is_file():
            if not (out / "report.html").is_file():  # killed between the two
                _write_report(out)
            summary: dict[str, Any] = json.loads(summary_file.read_text())
            return summary
        return None
    if out.exists() and not (out.is_dir() and _only_begun(out)):
        raise InputError(f"{out} is not empty and holds no run", hint="choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make run directory {out}: {error.strerror}") from None
    (out / _PRIVATE).mkdir(mode=0o700, exist_ok=True)
    asked = {
        "data": [str(path.resolve()) for path in request.data],
        "labels": list(request.labels),
        "patients": request.patients,
        "backend": request.backend,
    }
    write_atomically(out / _PRIVATE / "request.json", json.dumps(asked), mode=0o600)
    write_atomically(plan_file, dump_plan(request.plan))  # last: says that the folder is a run
    return None


def _only_begun(out: Path) -> bool:
    """An empty folder, or what a run leaves that was killed before its plan was written."""
    begun = {_PRIVATE, f"{_PRIVATE}/request.json"}
    found = {path.relative_to(out) for path in out.rglob("*")}
    return all(str(path) in begun or path.suffix == ".part" for path in found)


def _discard(out: Path, made: Sequence[Path]) -> None:
    """Remove a run that never trained, and the folders ``made`` for it that nobody else uses."""
    shutil.rmtree(out / _PRIVATE)
    (out / "plan.yaml").unlink()
    with suppress(OSError):  # not empty
        for folder in made:
            folder.rmdir()


def earlier_request(out: Path) -> dict[str, Any]:
    """Data, maps and patients of the run in ``out``, for a resume that does not repeat them."""
    try:
        found: dict[str, Any] = json.loads((out / _PRIVATE / "request.json").read_text())
    except OSError:
        raise InputError(f"{out} holds no run to resume", hint="leave --resume out") from None
    return found


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            deeper = _difference(old, new, f"{path}{key}.")
            if deeper:
                return deeper
        elif old != new:
            return f"{path}{key} was {old}, is {new}"
    return ""


def sample_folder() -> Path:
    """The images that ship in the package."""
    return Path(str(resources.files("cytofed"))) / "sample"


def _read(request: Request, progress: RunProgress) -> Cells:
    plan = request.plan
    for root in request.data:
        if plan.privacy.unit == "patient":
            refuse_unsaid_patients(root, request.patients)
    if warning := _unsaid_patients(request):
        progress.warn(warning)
    scheme = load_scheme(plan.labels.scheme)
    maps: list[LabelMap | None] = [load_map(name) for name in request.labels]
    return open_cells(
        request.data or (sample_folder() / "marrow",),
        scheme,
        maps=maps or None,
        patients=request.patients,
        size_px=plan.labels.scale.size_px,
        field_um=plan.labels.scale.field_um,
        cache_dir=request.cache_dir or default_cache_dir(),
        progress=progress.reading,
    )


def _unsaid_patients(request: Request) -> str:
    """A warning where a CSV seems to name patients whom the test split does not know; or empty."""
    columns = () if request.patients else [c for d in request.data for c in patient_columns(d)]
    if not columns:
        return ""
    return (
        f'Column "{columns[0]}" seems to name the patients: images of one may be on both sides of '
        f"the test split, and scores too good. Add --patients 'column:{columns[0]}', or --patients "
        f"{NOBODY} where it does not."
    )


def _cut(request: Request, spec: Any, cells: Cells, private: Path) -> VirtualLabs:
    plan = request.plan
    seed = plan.train.seed
    if plan.privacy.unit != "none":
        refuse_seen(plan.model.start, cells.file_sha256())
    key_N = image_keys(cells.paths(), cells.dhash_N)
    unit_N = indivisible(cells, plan)
    test_N = held_out(cells, plan, unit_N, exact=True)
    _refuse_one_side(test_N, plan)
    partition: Partition = assign(
        spec,
        plan.simulation.labs or (None if spec.law in ("sources", "column") else 4),
        targets_NC=cells.targets_NC,
        unit_N=unit_N,
        seed=seed,
        train_N=~test_N,
        background_N3=cells.background_N3,
        source_N=cells.source_N,
        column_N=cells.column(spec.column) if spec.law == "column" else None,
    )
    if plan.privacy.unit == "patient" and cells.patients_N is None:
        patients_N = pseudo_patients(
            2 * partition.lab_N + test_N,
            unit_N,
            key_N,
            cells=plan.simulation.pseudo_patient_cells,
            seed=seed,
        )
        cells = replace(cells, patients_N=patients_N)
    labs = cut(plan, cells, partition, test_N, private)
    if patients := labs.patients:
        # At a lab this is an offer refused; here all of it is known before anything is trained.
        labs = replace(labs, plan=with_delta(plan, patients))
        write_atomically(request.out / "plan.yaml", dump_plan(labs.plan))
    _check_unchanged(labs, request.out)
    labs.save()
    make_keys(private, labs.plan, labs.weights())
    return labs


def _refuse_one_side(test_N: npt.NDArray[np.bool_], plan: Plan) -> None:
    """A simulation has images on both sides; who is held out by chance may be nobody or all."""
    if plan.evaluation.fraction > 0 and (test_N.all() or not test_N.any()):
        who = "everybody" if test_N.all() else "nobody"
        raise InputError(
            f"with evaluation.fraction={plan.evaluation.fraction:g} and "
            f"train.seed={plan.train.seed} chance holds out {who}: under differential privacy "
            "each patient is drawn alone",
            hint="choose another --seed, or more patients",
        )


def _check_unchanged(labs: VirtualLabs, out: Path) -> None:
    """A resumed run goes on over the very images, labels and labs that it began with."""
    patients_N = labs.cells.patients_N
    found = digest(
        "cytofed/1/simulated-labs",
        _data_sha256(labs.cells),
        labs.lab_N.tobytes(),
        labs.side_N.tobytes(),
        [] if patients_N is None else patients_N.tolist(),
    ).hex()
    file = out / _PRIVATE / "data.sha256"
    if not file.is_file():
        write_atomically(file, found)
    elif file.read_text() != found:
        raise InputError(
            f"the images, their labels or patients are not those that {out} began with",
            hint="resume with the same data, or choose another --out",
        )


# --- backends


class _InProcess:
    """Worker processes of this machine."""

    def __init__(self, request: Request, private: Path, progress: RunProgress) -> None:
        self._request, self._private, self._progress = request, private, progress
        threads = request.plan.train.threads
        workers = request.jobs or max(1, (os.cpu_count() or 1) // threads)
        self._names: tuple[str, ...] = ()
        self._grid = InProcessGrid(
            private,
            plan_file=request.out / "plan.yaml",
            workers=workers,
            threads=threads,
            on_step=self._on_step,
        )

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._grid.close()

    def start(self) -> Start:
        return self._grid.wait_for_start()

    def run(self, world: World) -> Results:
        self._names = (*world.labs.names, CENTRAL)
        images = [len(world.labs.rows(k, 1)) for k in range(len(self._names))]
        self._grid.nodes = dict(enumerate(map(float, images)))
        nodes = {name: k for k, name in enumerate(self._names)}
        return run_all(self._grid, nodes, world)

    def _on_step(self, step: Step) -> None:
        labs = len(self._names) - 1 if step.run == FEDERATION else 1
        lab = self._names[step.lab_node]
        self._progress.step(
            step.run, lab, round_=step.round, share=step.done, loss=step.loss, labs=labs
        )


def _open_grid(request: Request, private: Path, progress: RunProgress) -> Any:
    if request.backend == "inprocess":
        return _InProcess(request, private, progress)
    if request.backend == "ray":
        from cytofed.simulations.ray_backend import RayBackend

        return RayBackend(request, private, progress)
    raise InputError(f"unknown backend {request.backend!r}", hint="inprocess or ray")


def make_start(plan_file: Path, folder: Path) -> Start:
    """The start model, made by a process of its own so that this one stays without torch."""
    done = subprocess.run(
        [sys.executable, "-m", "cytofed.start", str(plan_file), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    start = read_start(folder)
    if done.returncode or start is None:
        raise CytofedError(f"could not build the start model: {done.stderr.strip()[-500:]}")
    return start


# --- after the rounds


def _finish(world: World, results: Results, wall_s: float) -> dict[str, Any]:
    out, plan = world.request.out, world.plan
    run = world.run(results.nodes)
    weights_P = final_weights(run, results.federation)
    summary = _summary(world, run, results, wall_s)
    write_model(
        out / "model.safetensors",
        world.start.with_weights(weights_P),
        replace(world.start.info, plan_sha256=plan.sha256, lineage=world.line.to_text()),
    )
    write_atomically(out / "model_card.md", model_card(summary, plan))
    # Says that the run is finished. The report reads it; where a kill comes between the two,
    # --resume writes the report.
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    _write_report(out)
    return summary


def _write_report(out: Path) -> None:
    from cytofed.simulations.report import write_report  # matplotlib takes a second

    write_report(out)


def _summary(world: World, run: Run, results: Results, wall_s: float) -> dict[str, Any]:
    plan, scheme, labs = world.plan, world.scheme, world.labs
    records = results.federation.records
    train_counts, test_counts = labs.counts_KC(1), labs.counts_KC(2)
    per_lab = plan.reports_per_lab
    pooled = results.scores.best
    temperature = results.scores.temperature
    lab_scores = summarise_labs(results.scores.labs, scheme, temperature)
    train_s = sum(record["train_s"] for record in records)
    baselines_s = results.baselines_s
    updates = sum(len(record["received"]) for record in records)
    orders = sum(len(record["expected"]) for record in records)
    workers = world.request.jobs or max(1, (os.cpu_count() or 1) // plan.train.threads)
    train_wall_s = train_s / min(workers, len(labs.names))
    return {
        "status": status(run, results.federation),
        "plan_name": plan.name,
        "plan_sha256": plan.sha256,
        "weights_sha256": weights_sha256(
            world.start.manifest, final_weights(run, results.federation)
        ),
        "data_sha256": _data_sha256(labs.cells),
        "seed": plan.train.seed,
        "rounds": results.federation.round,
        "global": None if pooled is None else summarise(pooled, scheme, temperature),
        "released": _released(plan, results.scores, scheme),
        "labs": _lab_scores(labs, results, train_counts, scheme) if per_lab else None,
        "over_labs": _over_labs(lab_scores) if per_lab else None,
        "baselines": _baselines(results, scheme),
        "gaps": _gaps(results, scheme),
        "participation": [
            {key: record[key] for key in ("round", "expected", "received", "absent")}
            for record in records
        ],
        "privacy": _privacy(world, run, records),
        "lineage": world.line.summary(deployed=False),
        "wire": {
            "up_bytes_per_lab_round": sum(r["up_bytes"] for r in records) // max(updates, 1),
            "down_bytes_per_lab_round": sum(r["down_bytes"] for r in records) // max(orders, 1),
            "secure_aggregation": plan.secure_aggregation.enabled,
        },
        "timing": {
            "wall_s": round(wall_s, 2),
            "train_s": round(train_wall_s, 2),
            "overhead_s": round(max(0.0, wall_s - baselines_s - train_wall_s), 2),
            "baselines_s": round(baselines_s, 2),
            "workers": workers,
            "lab_train_s": round(train_s, 2),
        },
        "partition": {
            "spec": plan.simulation.partition,
            "labs": list(labs.names),
            "codes": list(scheme.codes),
            "train_counts_KC": train_counts.tolist(),
            "test_counts_KC": test_counts.tolist(),
            "pseudo_patients": _pseudo(labs),
        },
        "confusion": None
        if pooled is None
        else {"codes": list(scheme.codes), "counts": pooled.confusion_CC.tolist()},
        "problems": [
            {"path": problem.path, "kind": problem.kind, "detail": problem.detail}
            for source in labs.cells.sources
            for problem in source.listing.problems
        ],
        "warnings": _warnings(world, results.scores),
        "command": _command(world.request),
        "attribution": _attribution(world.request),
        "versions": _versions(),
    }


def _released(plan: Plan, scores: Scores, scheme: Scheme) -> dict[str, Any] | None:
    """The pooled scores as labs let them out, with noise; None where the plan tells none.

    No calibration: its counts are not released. ``noise_sd`` is that of a count of the confusion
    matrix, before negative counts were made sensible; counts are of cells, scaled per patient.
    """
    terms = terms_of(plan)
    mechanism = None if terms is None else terms.tally
    if mechanism is None:
        return None
    told: dict[str, Any] = {
        "sigma": mechanism.sigma,
        "noise_sd": mechanism.noise_sd * scores.answered**0.5,
        "labs": scores.answered,
    }
    if scores.noised is None:
        return told | {"missing": scores.failed or "the noise hides all counts"}
    found = summarise(scores.noised, scheme)
    for key in ("ece", "calibration", "reliability", "accuracy_coverage"):
        del found[key]
    return told | found


def _pooled(tallies: Mapping[str, Tally], scheme: Scheme) -> Tally | None:
    pooled = sum(tallies.values(), Tally.empty(len(scheme.codes)))
    return pooled if pooled.confusion_CC.any() else None


def _lab_scores(
    labs: VirtualLabs, results: Results, train_counts_KC: Any, scheme: Scheme
) -> dict[str, dict[str, Any]]:
    """Scores of each lab; with the recall of classes that it had no training image of."""
    found = summarise_labs(results.scores.labs, scheme, results.scores.temperature)
    for k, name in enumerate(labs.names):
        if name in found:
            recall = absent_recall(results.scores.labs[name], train_counts_KC[k], scheme)
            found[name]["absent_recall"] = recall
    return found


def _gaps(results: Results, scheme: Scheme) -> dict[str, Any] | None:
    """Federated minus central macro F1 on the pooled test images, with a bootstrap interval."""
    ours, theirs = results.scores.best, None
    if CENTRAL in results.baselines:
        theirs = _pooled(results.baselines[CENTRAL], scheme)
    if ours is None or theirs is None:
        return None
    return {"central": gap(ours, theirs, scheme, rng=np.random.default_rng(0))}


def _privacy(world: World, run: Run, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plan's terms, and what each lab's ledger says was spent on its patients.

    ``federation`` is what one patient pays: at one lab, or at all where patients may overlap.
    ``by_round`` is what a lab that came to every round has spent on training by then.
    """
    plan, labs = world.plan, world.labs
    pseudo = _pseudo(labs)
    shown = privacy_price(plan, labs.patients, pseudo=pseudo)
    if plan.privacy.unit == "none":
        return shown
    spent: dict[str, Any] = {}
    guarantees = []
    for k, name in enumerate(labs.names):
        declared = labs.declared(k)
        found = spend([], delta_of(plan), unit=plan.privacy.unit)
        if labs.ledger_of(name).is_file():
            with Ledger.open(labs.ledger_of(name), pool=run.name, unit=plan.privacy.unit) as book:
                found = book.balance().spent
        guarantees.append(replace(found, patients=labs.patients, pseudo=pseudo))
        spent[name] = {"epsilon": found.epsilon, "declared_patients": declared}
    whole = across_labs(guarantees, plan.patients)
    return shown | {
        **score_prices(plan, labs.patients, pseudo=pseudo),
        "labs": spent,
        "federation": {
            "patients": plan.patients,
            "epsilon": whole.epsilon,
            "delta": whole.delta,
            **patients_told(whole),
            "statement": str(whole),
        },
        "by_round": _by_round(plan, records),
        "pseudo_patients": pseudo,
        "pseudo_patient_cells": plan.simulation.pseudo_patient_cells if pseudo else None,
        "noise": "seeded: this run can be repeated, so it protects nobody",
    }


def _by_round(plan: Plan, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    terms = terms_of(plan)
    assert terms is not None
    found = []
    whole = (times(terms.training, terms.rounds),)
    for record in records:
        if record.get("global"):
            use = PlanUse(whole, (times(terms.training, record["round"]),))
            spent = spend([use], terms.delta, unit=terms.training.unit)
            macro_f1 = record["global"]["macro_f1"]
            found.append({"round": record["round"], "epsilon": spent.epsilon, "macro_f1": macro_f1})
    return found


def _pseudo(labs: VirtualLabs) -> bool:
    patients_N = labs.cells.patients_N
    return patients_N is not None and bool(np.char.startswith(patients_N[:1], "pseudo-").all())


def _command(request: Request) -> str:
    """How to run this again; names of folders only, for the run directory gets published."""
    data = [f"--data {shlex.quote(path.name)}" for path in request.data]
    labels = [f"--labels {shlex.quote(Path(name).name)}" for name in request.labels]
    patients = [f"--patients {shlex.quote(request.patients)}"] if request.patients else []
    return " ".join(["cytofed simulate plan.yaml", *data, *labels, *patients])


def _attribution(request: Request) -> list[str]:
    if request.data:
        return []
    lines = (sample_folder() / "ATTRIBUTION.md").read_text().splitlines()
    return [line.removeprefix("> ") for line in lines if line.startswith("> ")]


def _over_labs(lab_scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if not lab_scores:
        return None
    found = spread({name: float(scores["macro_f1"]) for name, scores in lab_scores.items()})
    return {"mean": found.mean, "sd": found.sd, "worst": found.worst, "worst_lab": found.worst_lab}


def _baselines(results: Results, scheme: Scheme) -> dict[str, Any] | None:
    if not results.baselines:
        return None
    found: dict[str, Any] = {"central": None, "local": {}, "local_own": {}}
    for name, tallies in results.baselines.items():
        pooled = _pooled(tallies, scheme)
        if pooled is None:
            continue
        if name == CENTRAL:
            temperature = pooled.temperature
            found["central"] = summarise(pooled, scheme, temperature)
            found["central_labs"] = summarise_labs(tallies, scheme, temperature)
        else:
            lab = name.removeprefix("local-")
            temperature = tallies[lab].temperature
            found["local"][lab] = summarise(pooled, scheme, temperature)
            own = summarise_labs({lab: tallies[lab]}, scheme, temperature)
            found["local_own"].update(own)
    return found


def _data_sha256(cells: Cells) -> str:
    """Of names, labels and pixels at the plan's scale: the same data gives the same hash."""
    labels, pixels = np.packbits(cells.targets_NC), np.ascontiguousarray(cells.dhash_N)
    paths = list(cells.paths())
    return digest("cytofed/1/data", paths, labels.tobytes(), pixels.tobytes()).hex()


def _warnings(world: World, scores: Scores) -> list[str]:
    found = []
    if world.plan.privacy.unit == "none":
        found.append(
            "Not differentially private (privacy.unit: none): the model may reveal single patients."
        )
    else:
        found.append(
            "Scores are exact, which a simulation on public images may tell; a deployment would "
            "add noise to them."
        )
        if world.plan.evaluation.sigma is None and world.plan.evaluation.fraction > 0:
            found.append(
                "A deployment of this plan tells no scores, so it holds nobody out and trains on "
                "all patients; this simulation kept some to score."
            )
    found += start_warnings(world.plan, deployed=False, pseudo=_pseudo(world.labs))
    if scores.failed:
        found.append(f"The final model was not evaluated: {scores.failed}.")
    if _pseudo(world.labs):
        found.append(
            "The images have no patients: pseudo-patients of "
            f"{world.plan.simulation.pseudo_patient_cells} cells were made up."
        )
    if world.plan.privacy.unit == "image":
        found.append("privacy.unit is image: the guarantee is for one image, not for a patient.")
    start, labs = world.plan.model.start, world.labs
    tested = labs.cells.take(labs.rows(len(labs.names), 2))
    if count := seen(start, tested.file_sha256()):
        found.append(
            f"{count} of {len(tested)} test images were used to train the encoder {start} that the "
            "model starts from: its scores are too good (model.start=random gives honest ones)."
        )
    problems = sum(len(source.listing.problems) for source in world.labs.cells.sources)
    if problems:
        found.append(f"{problems} files could not be used; see `cytofed data check`.")
    if warning := _unsaid_patients(world.request):
        found.append(warning)
    return [*found, *_large_steps(labs)]


def _large_steps(labs: VirtualLabs) -> list[str]:
    return large_steps(labs.plan, len(labs.rows(len(labs.names), 1)))


def _versions() -> dict[str, str]:
    names = ("flwr", "torch", "numpy", "opacus")
    found = {name: metadata.version(name) for name in names}
    return {"cytofed": cytofed.__version__, "python": platform.python_version(), **found}


def default_out(plan: Plan) -> Path:
    """``runs/NAME-TIME`` below the current folder."""
    return Path("runs") / f"{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def make_request(
    plan: str | Path | Plan | None = None,
    *,
    data: Sequence[Path] = (),
    labels: Sequence[str] = (),
    patients: str | None = None,
    labs: int | None = None,
    partition: str | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    backend: str = "inprocess",
    jobs: int | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> Request:
    """What the command line, a notebook and a sweep ask for, as one request.

    ``plan`` left out: ``marrow`` for given data and ``demo`` for the sample. ``overrides``: texts
    KEY=VALUE. A resume takes from its run directory what is not given.

    Errors: InputError for a plan, key or value that cannot be used.
    """
    given = partition.partition(":")[0] if partition else ""
    named = [override.partition("=")[0].strip() for override in overrides]
    if labs is None and given in ("sources", "column") and "simulation.labs" not in named:
        overrides = ("simulation.labs=null", *overrides)  # as many as the data has
    for key, value in (
        ("simulation.labs", labs),
        ("simulation.partition", partition),
        ("train.seed", seed),
    ):
        if value is not None:
            overrides = (*overrides, f"{key}={value}")
    if resume and out is None:
        raise InputError("--resume needs the run's directory", hint="add --out DIR")
    if resume and out is not None and (out / "plan.yaml").is_file():
        earlier = earlier_request(out)
        plan = plan or out / "plan.yaml"
        data = data or tuple(Path(path) for path in earlier["data"])
        labels = labels or tuple(earlier["labels"])
        patients = patients or earlier["patients"]
        backend = earlier["backend"] if backend == "inprocess" else backend
    if isinstance(plan, Plan):
        chosen = with_overrides(plan, overrides) if overrides else plan
    else:
        chosen = load_plan(plan or ("marrow" if data else "demo"), overrides)
    return Request(
        plan=chosen,
        out=out or default_out(chosen),
        data=tuple(data),
        labels=tuple(labels),
        patients=patients,
        backend=backend,
        jobs=jobs,
        resume=resume,
    )
