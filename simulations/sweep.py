"""``cytofed sweep``: a grid or list of simulations with seeds, and one table of what came out.

Each run is ``simulate`` in a process of its own with one worker, in a run directory below
``OUT/runs`` whose name tells its values and identifies plan and data. The table is made from run
directories alone and each run is a function of data, plan and seed, so a sweep that was killed at
any moment ends, resumed, with the table of one that was not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cytofed.console import SweepProgress
from cytofed.errors import CytofedError, InputError
from cytofed.files import write_atomically
from cytofed.labels import load_map
from cytofed.plan import Plan, builtin_plans, to_dict, with_seed
from cytofed.plan_check import check_plan
from cytofed.sections import read_tree, shown, unknown_key
from cytofed.simulations.partitions import parse_partition
from cytofed.simulations.simulate import Request, make_request
from cytofed.simulations.sweep_job import to_line
from cytofed.simulations.sweep_table import (
    failed_row,
    key_text,
    row_of,
    summarised,
    write_tables,
)

_FILE_KEYS = ("name", "plan", "data", "labels", "patients", "set", "grid", "list", "seeds")
_SHORT = ("plan", "data", "labels", "patients", "labs", "partition", "seed")
"""what ``simulate`` takes besides keys of the plan"""
_SAME = {"labs": "simulation.labs", "partition": "simulation.partition", "seed": "train.seed"}
MOST_RUNS = 10_000
_RUNS = "runs"


@dataclass(frozen=True)
class SweptRun:
    """One run: the name of its folder, the values that set it apart, and what is asked for."""

    name: str
    values: Mapping[str, Any]
    request: Request = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep file. ``keys``: what is swept, in the file's order, without the seed."""

    name: str
    keys: tuple[str, ...]
    runs: tuple[SweptRun, ...] = field(repr=False)
    text: str = field(repr=False)


# --- the file


def read_sweep(path: Path, *, data: Sequence[Path] = ()) -> Sweep:
    """The sweep of a YAML file, every plan of it checked. ``data`` takes the place of the file's.

    Paths in the file are relative to it.

    Errors: InputError for an unknown key (it names the nearest), a value that a plan cannot have,
    data that is not there, or two runs that are the same.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read sweep file {path}: {error}", hint="give a YAML file with a grid or a list"
        ) from None
    source = str(path)
    tree = read_tree(
        text,
        source,
        hint="expected plan, set, grid, list, seeds",
        never_empty=("set", "grid", "list", "seeds"),
    )
    for key in tree:
        if key not in _FILE_KEYS:
            raise unknown_key(str(key), str(key), _FILE_KEYS, source)
    name = tree.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .-]{0,63}", name):
        raise InputError(
            f"{source}: name is {shown(name)}, expected up to 64 letters, digits, spaces, . _ or -"
        )
    common: dict[str, Any] = {
        key: tree[key] for key in ("plan", "data", "labels", "patients") if key in tree
    }
    common |= _flat(tree.get("set"), "set", source)
    if data:
        common["data"] = [str(folder.resolve()) for folder in data]
    keys, settings = _settings(tree, source)
    seeds = _seeds(tree.get("seeds"), source)
    taken = {_SAME.get(key, key) for key in (*keys, *common)}
    if seeds != [None] and "train.seed" in taken:
        raise InputError(f"{source}: seeds is given, and the seed is set elsewhere too")
    if len(settings) * len(seeds) > MOST_RUNS:
        raise InputError(
            f"{source}: {len(settings) * len(seeds):,} runs, expected at most {MOST_RUNS:,}"
        )
    runs, checked = [], set[str]()
    for setting, seed in itertools.product(settings, seeds):
        values = setting if seed is None else setting | {"seed": seed}
        told = ", ".join(f"{key}={_text(value)}" for key, value in values.items())
        try:
            runs.append(_run(common | values, values, path.parent, checked))
        except InputError as error:
            where = f"{source}: with {told}" if told else source
            raise InputError(f"{where}: {error.message}", hint=error.hint) from None
    _refuse_twins(runs, source)
    keys = [key for key in keys if _SAME.get(key, key) != "train.seed"]
    return Sweep(name, tuple(keys), tuple(runs), text)


def _settings(tree: Mapping[str, Any], source: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Swept keys, and each combination of their values: the list's entries times the grid's."""
    listed = tree.get("list") or [{}]
    if not isinstance(listed, list):
        raise InputError(f"{source}: list is {shown(listed)}, expected a list of keys and values")
    entries = [_flat(entry, f"list entry {i}", source) for i, entry in enumerate(listed, start=1)]
    grid = _flat(tree.get("grid"), "grid", source)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(
                f"{source}: {key} of the grid is {shown(values)}, expected a list of values",
                hint="a value that is the same for all runs belongs under set",
            )
    keys = list(dict.fromkeys([*itertools.chain.from_iterable(entries), *grid]))
    names = [_SAME.get(key, key) for key in (*_flat(tree.get("set"), "set", source), *grid)]
    for entry in entries:
        for name in [_SAME.get(key, key) for key in entry]:
            if name in names:
                raise InputError(f"{source}: {name} is given twice, in list and in grid or set")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{source}: {min(twice)} is given twice, in grid and set")
    if math.prod(len(values) for values in grid.values()) * len(entries) > MOST_RUNS:
        raise InputError(f"{source}: more than {MOST_RUNS:,} runs")
    combinations = [
        entry | dict(zip(grid, values, strict=True))
        for entry in entries
        for values in itertools.product(*grid.values())
    ]
    return keys, combinations


def _flat(tree: Any, where: str, source: str, path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; their first parts must be keys of a plan or of ``simulate``."""
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise InputError(f"{source}: {where} is {shown(tree)}, expected keys and values")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if not path:
            _refuse_unknown(name, source)
        nested = isinstance(value, Mapping) and value
        here = _flat(value, where, source, f"{name}.") if nested else {name: value}
        twice = sorted(found.keys() & here.keys())  # as train: {lr: 1} and as train.lr: 1
        if twice:
            raise InputError(f"{source}: {twice[0]} is given twice in {where}")
        found |= here
    return found


def _refuse_unknown(key: str, source: str) -> None:
    head, _, rest = key.partition(".")
    sections = [f.name for f in fields(Plan)]
    if head in sections or (head in _SHORT and not rest):
        return
    raise unknown_key(key, head, [*sections, *_SHORT], source)


def _seeds(given: Any, source: str) -> list[int | None]:
    """``seeds: 3`` is 0, 1, 2; left out, the plan's own."""
    if given is None:
        return [None]
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= MOST_RUNS:
        return list(range(given))
    whole = isinstance(given, list) and all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in given
    )
    if not whole or not given:
        raise InputError(
            f"{source}: seeds is {shown(given)}, expected how many or a list of whole numbers"
        )
    return list(given)


def _run(
    asked: Mapping[str, Any], values: Mapping[str, Any], folder: Path, checked: set[str]
) -> SweptRun:
    """One run, its plan checked; ``checked`` holds what was checked under another seed."""
    flags = {key: value for key, value in asked.items() if key in _SHORT and value is not None}
    if flags.get("patients") in ("disjoint", "may_overlap"):  # a key of the plan, too
        del flags["patients"]
    others = [f"{k}={json.dumps(v)}" for k, v in asked.items() if k not in flags and v is not None]
    others += [f"{k}=null" for k, v in asked.items() if v is None and k not in _SHORT]
    data = [_folder(name, folder) for name in _many(flags.get("data"), "data")]
    labels = [_file(name, folder) for name in _many(flags.get("labels"), "labels")]
    plan = flags.get("plan")
    request = make_request(
        None if plan is None else _plan(plan, folder),
        data=data,
        labels=labels,
        patients=flags.get("patients"),
        labs=flags.get("labs"),
        partition=flags.get("partition"),
        seed=flags.get("seed"),
        overrides=others,
        out=Path(),
    )
    tree = json.dumps(to_dict(with_seed(request.plan, 0)), sort_keys=True)
    if tree not in checked:
        check_plan(request.plan)
        parse_partition(request.plan.simulation.partition)
        for name in labels:
            load_map(name)
        checked.add(tree)
    return SweptRun(_name(values, request), values, request)


def _many(value: Any, key: str) -> list[str]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{key} is {shown(value)}, expected a name or a list of names")
    return names


def _folder(name: str, base: Path) -> Path:
    path = (base / Path(name).expanduser()).resolve()
    if not path.exists():
        raise InputError(f"no data folder {name}", hint="paths are relative to the sweep file")
    return path


def _file(name: str, base: Path) -> str:
    """A name of the package as it is, a file relative to the sweep file."""
    path = base / Path(name).expanduser()
    return str(path.resolve()) if path.is_file() else name


def _plan(name: Any, base: Path) -> str:
    if not isinstance(name, str):
        raise InputError(f"plan is {shown(name)}, expected a file or a name")
    return name if name in builtin_plans() else _file(name, base)


def _name(values: Mapping[str, Any], request: Request) -> str:
    """Of the run's folder: its values for a person, and a hash of plan and data."""
    identity = [
        to_dict(request.plan),
        [str(path) for path in request.data],
        list(request.labels),
        request.patients,
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    told = "-".join(f"{key_text(key)}-{_text(value)}" for key, value in values.items())
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', told)[:60] or 'run'}-{digest}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(Path(str(item)).name for item in value)
    return "none" if value is None else str(value)


def _refuse_twins(runs: Sequence[SweptRun], source: str) -> None:
    seen: dict[str, SweptRun] = {}
    for run in runs:
        digest = run.name[-12:]
        if digest in seen:
            raise InputError(
                f"{source}: two runs are the same: {run.name} and {seen[digest].name}",
                hint="remove one of the values or seeds",
            )
        seen[digest] = run


def default_out(sweep: Sweep) -> Path:
    """``sweeps/NAME-TIME`` below the current folder."""
    return Path("sweeps") / f"{sweep.name}-{time.strftime('%Y%m%d-%H%M%S')}"


# --- running


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    jobs: int | None = None,
    resume: bool = False,
    watch: SweepProgress,
) -> dict[str, Any]:
    """Run what is not finished yet and write table, figures and report; returns ``sweep.json``.

    ``jobs``: runs at once, each a process with one worker; at most one per core. A run that fails
    is a row with its error; a resume tries it again. KeyboardInterrupt passes through once the
    runs under way have ended.

    Errors: InputError when ``out`` cannot be used or another sweep is at work in it.
    """
    _prepare_folder(sweep, out, resume=resume)
    with _locked(out) as lock:
        rows = {row["run"]: row for row in finished_rows(sweep, out)}
        waiting = [run for run in sweep.runs if run.name not in rows]
        watch.finished(len(rows))
        most = min(jobs or _cores(), _jobs_that_fit(sweep))

        def ended(run: SweptRun, error: str) -> None:
            rows[run.name] = _row(sweep, run, out, error)
            watch.end(run.name, rows[run.name])

        _Jobs(out, lock, watch).run(waiting, most, ended)
        ordered = [rows[run.name] for run in sweep.runs]
    found = summarised(sweep.name, sweep.keys, ordered, text=sweep.text)
    _write(found, out)
    return found


def finished_rows(sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """Rows of the runs that are finished in ``out``, in the sweep's order."""
    finished = [run for run in sweep.runs if _is_finished(out / _RUNS / run.name)]
    return [_row(sweep, run, out) for run in finished]


def _write(found: dict[str, Any], out: Path) -> None:
    from cytofed.simulations.sweep_report import write_report  # matplotlib takes a second

    write_tables(found, out)
    write_atomically(out / "sweep.json", json.dumps(found, indent=1) + "\n")
    write_report(out)


def _prepare_folder(sweep: Sweep, out: Path, *, resume: bool) -> None:
    begun = (out / "sweep.yaml").is_file()
    if begun and not resume:
        raise InputError(
            f"{out} already holds a sweep",
            hint="add --resume to go on with it, or choose another --out",
        )
    if not begun and out.exists() and not (out.is_dir() and _only_begun(out)):
        raise InputError(f"{out} is not empty and holds no sweep", hint="choose another --out")
    names = {run.name for run in sweep.runs}
    strangers = []
    if begun and (out / _RUNS).is_dir():
        strangers = sorted(p.name for p in (out / _RUNS).iterdir() if p.name not in names)
    if strangers:
        raise InputError(
            f"{out} holds another sweep: its run {strangers[0]} is not in this one",
            hint="resume with the same file, data and version (the file may have more values or "
            "seeds), or choose another --out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make sweep directory {out}: {error.strerror}") from None
    write_atomically(out / "sweep.yaml", sweep.text)  # first: says that the folder is a sweep's
    (out / _RUNS).mkdir(exist_ok=True)


def _only_begun(out: Path) -> bool:
    """An empty folder, or what a sweep leaves that was killed before its file was written."""
    return all(path.suffix == ".part" for path in out.iterdir())


_LOCK_WAIT_S = 20.0
"""for the processes of a sweep that was killed a moment ago"""


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """One sweep at a time. The lock is its processes' too: it is free when the last has ended."""
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"another sweep is at work in {out}",
                        hint="wait for it, or choose another --out",
                    ) from None
                time.sleep(0.1)
        yield handle
    finally:
        os.close(handle)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _jobs_that_fit(sweep: Sweep) -> int:
    return max(1, _cores() // max(run.request.plan.train.threads for run in sweep.runs))


def _is_finished(run_dir: Path) -> bool:
    return all((run_dir / name).is_file() for name in ("summary.json", "report.html"))


def _row(sweep: Sweep, run: SweptRun, out: Path, error: str = "") -> dict[str, Any]:
    if error:
        return failed_row(run.name, sweep.keys, run.values, run.request.plan, error)
    summary = json.loads((out / _RUNS / run.name / "summary.json").read_text())
    return row_of(run.name, sweep.keys, run.values, run.request.plan, summary)


class _Jobs:
    """The processes of a sweep. Each holds its lock, and ends when its stdin is closed."""

    def __init__(self, out: Path, lock: int, watch: SweepProgress) -> None:
        self._out, self._lock, self._watch = out, lock, watch
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._closed = False

    def run(
        self, waiting: Sequence[SweptRun], jobs: int, ended: Callable[[SweptRun, str], None]
    ) -> None:
        """Run all; ``ended`` is told of each, with its error or an empty text."""
        with ThreadPoolExecutor(max_workers=jobs) as threads:
            futures = {threads.submit(self._one, run): run for run in waiting}
            try:
                for future in as_completed(futures):
                    ended(futures[future], future.result())
            except BaseException:
                self._close()
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _close(self) -> None:
        """Let what is running end where it is; nothing starts any more."""
        with self._guard:
            self._closed = True
            for process in self._running:
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()

    def _one(self, run: SweptRun) -> str:
        """Run one to its end. Errors: CytofedError when the sweep is closed meanwhile."""
        with self._guard:
            if self._closed:
                raise CytofedError("interrupted")
            # A session of its own: Ctrl-C is for the sweep, which then ends its runs.
            process = subprocess.Popen(
                [sys.executable, "-m", "cytofed.simulations.sweep_job"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                pass_fds=(self._lock,),
            )
            self._running.add(process)
        self._watch.begin(run.name)
        assert process.stdin is not None
        assert process.stderr is not None
        folder = self._out / _RUNS / run.name
        last: list[str] = []
        with contextlib.suppress(OSError):
            process.stdin.write(to_line(replace(run.request, out=folder.resolve())))
            process.stdin.flush()
        for line in process.stderr:
            last = [*last[-20:], line.strip()]
            self._watch.line(run.name, line.strip())
        code = process.wait()
        process.stderr.close()
        with self._guard:
            self._running.discard(process)
            with contextlib.suppress(OSError):
                process.stdin.close()
            if self._closed:
                raise CytofedError("interrupted")
        if code == 0 and _is_finished(folder):
            return ""
        told = [line for line in last if line.startswith("cytofed: error: ")]
        if told:
            return told[-1].removeprefix("cytofed: error: ")
        if code < 0:
            return f"killed by signal {-code}"
        return next((line for line in reversed(last) if line), f"ended with exit code {code}")
