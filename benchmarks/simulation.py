"""What a simulation costs beyond its training.

``python benchmarks/simulation.py [--quick] [--json]``

1. Time: rounds of the real simulation against bare training loops, on the same images, batches and
   seeds, in as many processes of one thread. Rounds are taken in turn, after one that warms up.
   Not in either: start-up and evaluation. In ours: messages, aggregation, checkpoints on disk.
2. Overhead per lab and round with 45 MB of weights, ResNet-18's, that a trivial lab changes a
   little. Ours: our grid, where they are one vector. Peer: Flower's Ray simulation with Flower's
   FedAvg, where they are 62 arrays, as Flower sets it up (two cores a lab). Besides: the same with
   one core a lab, and our round loop on it. Overhead is wall time less the labs' own seconds over
   the number of workers. Ours is taken before and after Ray's, whose idle processes take their
   share of the cores.
3. Memory: a whole simulation of 100 and of 1,000 virtual labs over the same images, and its peak,
   parent and workers together (PSS: shared pages count once). Each lab trains one small step.

One JSON line last. With CYTOFED_TEST_DATA (default ../shared/data) on real marrow images, else on
the sample of the package, with fewer labs in 3.

K labs, P parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from cytofed.arrays import Float32
from cytofed.client.cells import open_cells
from cytofed.files import write_atomically
from cytofed.labels import load_scheme
from cytofed.messages import Order, Update, pack_order, pack_update, unpack_order, unpack_update
from cytofed.plan import Plan, dump_plan, load_plan
from cytofed.seeds import derive
from cytofed.server.asking import ask
from cytofed.server.checkpoints import Progress, Record, save_progress
from cytofed.server.rounds import Run, run_rounds
from cytofed.simulations.inprocess import InProcessGrid
from cytofed.simulations.partitions import assign, parse_partition
from cytofed.simulations.ray_backend import run_on_ray, to_bytes
from cytofed.simulations.simulate import make_start
from cytofed.simulations.virtual import FEDERATION, VirtualLabs, cut
from cytofed.strategies.fedavg import fedavg

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
LABS, ROUNDS = 8, 5
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Images:
    """Where the images are, and how many labs they are enough for."""

    folder: Path
    real: bool


def images() -> Images:
    data = Path(os.environ.get("CYTOFED_TEST_DATA", REPO.parent / "shared" / "data"))
    if (data / "bone_marrow_128").is_dir():
        return Images(data / "bone_marrow_128", real=True)
    return Images(REPO / "src" / "cytofed" / "sample" / "marrow", real=False)


class Silent:
    """A watch that notes who was absent: nobody may be."""

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None: ...
    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None: ...
    def round(self, run: str, record: Record) -> None: ...
    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None:
        raise RuntimeError(f"{lab} is absent from round {round_}: {reason}")


# --- 1: rounds against bare training loops


def loops_plan(found: Images, *, quick: bool) -> Plan:
    epochs = 0.5 if found.real else 4
    changes = [f"train.rounds={(2 if quick else ROUNDS) + 1}", f"train.local_epochs={epochs}"]
    if quick and found.real:
        changes.append("train.steps_per_round=8")
    return load_plan("marrow", [*changes, f"simulation.labs={LABS}", "simulation.partition=iid"])


def prepare_labs(found: Images, plan: Plan, folder: Path) -> VirtualLabs:
    """Labs of equal size."""
    scale = plan.labels.scale
    cells = open_cells(
        [found.folder],
        load_scheme(plan.labels.scheme),
        size_px=scale.size_px,
        field_um=scale.field_um,
        cache_dir=folder / "cache",
    )
    unit_N = np.arange(len(cells))
    partition = assign(
        parse_partition("iid"), LABS, targets_NC=cells.targets_NC, unit_N=unit_N, seed=0
    )
    labs = cut(plan, cells, partition, np.zeros(len(cells), dtype=bool), folder)
    labs.save()
    return labs


def measure_loops(found: Images, *, quick: bool) -> dict[str, Any]:
    plan = loops_plan(found, quick=quick)
    ours_s: list[float] = []
    bare_s: list[float] = []
    bare_train_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan_file = folder / "plan.yaml"
        plan_file.write_text(dump_plan(plan))
        with InProcessGrid(folder, plan_file=plan_file, workers=WORKERS) as grid:
            labs = prepare_labs(found, plan, folder)
            start = grid.wait_for_start()
            cohort = {lab: k for k, lab in enumerate(labs.names)}
            grid.nodes = {k: float(len(labs.rows(k, 1))) for k in range(LABS)}
            scheme = load_scheme(plan.labels.scheme)
            run = Run(FEDERATION, plan, fedavg(), scheme, cohort, start.manifest.size)

            with bare_processes(folder) as bare:

                def after_round(progress: Progress) -> None:
                    started = time.monotonic()
                    save_progress(folder / "saved", progress, plan_sha256=plan.sha256)
                    lines = "".join(json.dumps(record) + "\n" for record in progress.records)
                    write_atomically(folder / "metrics.jsonl", lines)
                    record = progress.records[-1]
                    ours_s.append(record["wall_s"] + time.monotonic() - started)
                    wall_s, train_s = bare(progress.round)
                    bare_s.append(wall_s)
                    bare_train_s.append(train_s)

                run_rounds(
                    grid,
                    run,
                    Progress(0, run.strategy.init(start.weights_P)),
                    checkpoint=after_round,
                    watch=Silent(),
                    evaluate_rounds=False,
                )
    # The first round warms up: torch compiles its primitives, pages are read.
    return {
        "labs": LABS,
        "rounds": len(ours_s) - 1,
        "workers": WORKERS,
        "ours_s": ours_s[1:],
        "bare_s": bare_s[1:],
        "bare_train_over_workers_s": [seconds / WORKERS for seconds in bare_train_s[1:]],
    }


Bare = Callable[[int], tuple[float, float]]
"""Train all labs of a round: wall seconds, and the sum of the labs' own seconds."""


@contextlib.contextmanager
def bare_processes(folder: Path) -> Iterator[Bare]:
    """As many processes as the simulation has workers; each takes the next lab when it is free."""
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--bare", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # as our workers: Linux shares its time out by session
        )
        for _ in range(WORKERS)
    ]

    def bare(round_: int) -> tuple[float, float]:
        waiting: SimpleQueue[int] = SimpleQueue()
        for lab in range(LABS):
            waiting.put(lab)

        def drive(process: subprocess.Popen[str]) -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            seconds = 0.0
            while not waiting.empty():
                process.stdin.write(f"{waiting.get()} {round_}\n")
                process.stdin.flush()
                seconds += float(process.stdout.readline())
            return seconds

        started = time.monotonic()
        with ThreadPoolExecutor(WORKERS) as threads:
            seconds = sum(threads.map(drive, processes))
        return time.monotonic() - started, seconds

    try:
        yield bare
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bare_main(folder: Path) -> None:
    """The bare side: nothing but ``training.train`` on a net that is there."""
    import torch

    torch.set_num_threads(1)
    from cytofed import models
    from cytofed.client import training

    virtual = VirtualLabs.load(folder)
    plan = virtual.plan
    labs = [virtual.lab(k) for k in range(len(virtual.names))]
    net, _ = models.load_model(labs[0].start)
    start = {name: values.clone() for name, values in net.state_dict().items()}
    for line in sys.stdin:
        number, round_ = map(int, line.split())
        lab = labs[number]
        net.load_state_dict(start)
        trained = training.train(
            net,
            lab.train,
            plan,
            progress_start=(round_ - 1) / plan.train.rounds,
            progress_end=round_ / plan.train.rounds,
            absent_C=lab.absent_C,
            seed=derive(plan.train.seed, "train", FEDERATION, lab.name, round_),
        )
        print(trained.train_s, flush=True)


# --- 2: overhead per lab and round


def warm_up(plan_file: Path, folder: Path) -> None:
    """This module stands for the virtual labs; see cytofed.simulations.worker."""


def open_app(folder: Path, *, on_step: object = None) -> ClientApp:  # noqa: ARG001
    """A lab whose training is to change its weights a little."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = unpack_order(message)
        started = time.perf_counter()
        weights_P = order.parts["weights"] * np.float32(1e-3)
        update = Update(
            lab=f"lab-{context.node_config['partition-id']}",
            run=order.run,
            round=order.round,
            weight=1.0,
            parts={"weights": weights_P},
            loss=0.0,
            train_s=time.perf_counter() - started,
        )
        return Message(pack_update(update), reply_to=message)

    return app


@functools.cache
def ray_apps() -> tuple[ClientApp, ClientApp]:
    """Our trivial lab, and the same as a user of Flower writes it."""
    flower = ClientApp()

    @flower.train()
    def train(message: Message, context: Context) -> Message:  # noqa: ARG001
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        started = time.perf_counter()
        arrays = [values * np.float32(1.001) for values in arrays]
        train_s = time.perf_counter() - started
        metrics = MetricRecord({"num-examples": 1, "train_s": train_s})
        reply = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(reply, reply_to=message)

    return open_app(Path()), flower


def ray_answer(message: Message, context: Context) -> Message:
    """In a Ray worker: Flower's own round loop sends ``arrays``, ours ``parts``."""
    ours, flower = ray_apps()
    return to_bytes((flower if "arrays" in message.content else ours)(message, context))


def our_overhead_s(grid: Grid, nodes: Mapping[str, int], rounds: int, weights_P: Float32) -> float:
    """Seconds per lab and round beyond training, of our round loop over any Grid."""
    plan = load_plan("marrow", [f"train.rounds={rounds}"])
    scheme = load_scheme(plan.labels.scheme)
    run = Run("overhead", plan, fedavg(), scheme, nodes, len(weights_P))
    started = time.monotonic()
    end = run_rounds(
        grid,
        run,
        Progress(0, run.strategy.init(weights_P)),
        checkpoint=lambda _: None,
        watch=Silent(),
        evaluate_rounds=False,
    )
    wall_s = time.monotonic() - started
    train_s: float = sum(record["train_s"] for record in end.records)
    return (wall_s - train_s / WORKERS) / (len(nodes) * rounds)


def flower_overhead_s(
    grid: Grid, rounds: int, arrays: list[Float32], *, workers: int = WORKERS
) -> float:
    """The same of Flower's FedAvg on Flower's Ray simulation with so many labs at a time."""
    train_s = 0.0

    def total(replies: list[RecordDict], _: str) -> MetricRecord:
        nonlocal train_s
        train_s += sum(float(r["metrics"]["train_s"]) for r in replies)  # type: ignore
        return MetricRecord()

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=LABS,
        min_available_nodes=LABS,
        train_metrics_aggr_fn=total,
    )
    started = time.monotonic()
    strategy.start(grid, ArrayRecord(arrays), num_rounds=rounds)
    return (time.monotonic() - started - train_s / workers) / (LABS * rounds)


def flower_as_it_comes(arrays: list[Float32], rounds: int, repeats: int) -> list[float]:
    """Overheads of a simulation that is set up as Flower does it without being told."""
    from flwr.simulation import run_simulation

    server, found = ServerApp(), list[float]()
    workers = max(1, WORKERS // 2)

    @server.main()
    def _(grid: Grid, context: Context) -> None:  # noqa: ARG001
        while len(list(grid.get_node_ids())) < LABS:
            time.sleep(0.02)
        flower_overhead_s(grid, 1, arrays)  # warms up
        for _ in range(repeats):
            found.append(flower_overhead_s(grid, rounds, arrays, workers=workers))

    client = import_module("simulation").ray_apps()[1]  # by its name, not as __main__
    run_simulation(server, client, LABS)
    return found


def ray_nodes(grid: Grid) -> dict[str, int]:
    """Node id of every lab, which Flower draws at random; and every Ray worker is warm."""
    while len(ids := list(grid.get_node_ids())) < LABS:
        time.sleep(0.02)
    order = pack_order(Order("train", "names", 0, "", {"weights": np.zeros(1, np.float32)}))
    nodes = {}
    for node, reply in ask(grid, {str(i): i for i in ids}, "train", 0, order, timeout_s=120.0):
        assert reply is not None
        nodes[unpack_update(reply, parts=("weights",), size=1).lab] = int(node)
    return nodes


def measure_overhead(*, quick: bool) -> dict[str, Any]:
    rounds, repeats = (1, 1) if quick else (3, 3)
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.yaml"
        plan_file.write_text(dump_plan(load_plan("marrow", ["model.arch=resnet18"])))
        start = make_start(plan_file, Path(folder))
    weights_P, arrays = start.weights_P, list(start.manifest.split(start.weights_P).values())
    found: dict[str, list[float]] = {"ours": [], "flower_one_core": [], "our_loop_on_ray": []}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])

    def ours() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            InProcessGrid(
                Path(folder), plan_file=Path(folder) / "none", workers=WORKERS, labs="simulation"
            ) as grid,
        ):
            own = {f"lab-{k}": k for k in range(LABS)}
            grid.nodes = dict.fromkeys(own.values(), 1.0)
            our_overhead_s(grid, own, 2, weights_P)  # warms up
            for _ in range(repeats):
                found["ours"].append(our_overhead_s(grid, own, 4 * rounds, weights_P))

    def on_ray(grid: Grid) -> None:
        nodes = ray_nodes(grid)
        flower_overhead_s(grid, 1, arrays)
        for _ in range(repeats):
            found["flower_one_core"].append(flower_overhead_s(grid, rounds, arrays))
            found["our_loop_on_ray"].append(our_overhead_s(grid, nodes, rounds, weights_P))

    ours()
    # By its name, not as __main__: so Ray's workers find it.
    run_on_ray(import_module("simulation").ray_answer, LABS, on_ray, workers=WORKERS)
    found["flower"] = flower_as_it_comes(arrays, rounds, repeats)
    ours()
    size = {"megabytes": weights_P.nbytes / 1e6, "arrays_of_flower": len(arrays)}
    return {**size, "labs": LABS, "rounds": rounds, **found}


# --- 3: memory


def measure_memory(found: Images) -> dict[str, Any]:
    few, many = (100, 1000) if found.real else (40, 400)
    peaks = {labs: peak_megabytes(found, labs) for labs in (few, many)}
    return {
        "labs": [few, many],
        "peak_megabytes": [round(peaks[few]["peak"], 1), round(peaks[many]["peak"], 1)],
        "wall_s": [round(peaks[few]["wall_s"], 1), round(peaks[many]["wall_s"], 1)],
        "status": [peaks[few]["status"], peaks[many]["status"]],
    }


def peak_megabytes(found: Images, labs: int) -> dict[str, Any]:
    """One ``cytofed simulate`` as a user runs it, report included."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "train.rounds": 1,
            "train.batch": 4,
            "train.steps_per_round": 1,
            "model.width": 8,
            "labels.scale.size_px": 32,
            "train.augment.rotate": "false",
        }
        command = "from cytofed.cli import main; main()"
        arguments = ["simulate", "marrow", "--data", found.folder, "--labs", labs, "--json"]
        arguments += ["--partition", "iid", "--out", Path(folder) / "run"]
        for key, value in changes.items():
            arguments += ["--set", f"{key}={value}"]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "XDG_CACHE_HOME": str(cache_folder())},
        )
        peak = 0.0
        with ThreadPoolExecutor(1) as thread:
            output = thread.submit(process.communicate)
            while not output.done():
                peak = max(peak, tree_megabytes(process.pid))
                time.sleep(0.1)
        summary = json.loads(output.result()[0] or "{}")
        wall_s = time.monotonic() - started
    return {"peak": peak, "wall_s": wall_s, "status": summary.get("status", "failed")}


@functools.cache
def cache_folder() -> Path:
    """Decoded once for both runs, so that the decoding's memory is in neither."""
    keep = tempfile.TemporaryDirectory()
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def tree_megabytes(root: int) -> float:
    """PSS of a process and all its descendants."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(stat[1])
    inside = {root}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    kilobytes = 0
    for pid in inside:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


# --- all of it


def goal(name: str, value: float, op: str, limit: float) -> dict[str, Any]:
    met = value <= limit if op == "<=" else value >= limit
    return {"name": name, "value": round(value, 4), "op": op, "limit": limit, "met": met}


def measure(*, quick: bool) -> dict[str, Any]:
    found = images()
    loops = measure_loops(found, quick=quick)
    overhead = measure_overhead(quick=quick)
    memory = measure_memory(found)
    ours_s = statistics.median(overhead["ours"])
    flower_s = statistics.median(overhead["flower"])
    on_ray_s = statistics.median(overhead["our_loop_on_ray"])
    few, many = memory["peak_megabytes"]
    finished = memory["status"][1] == "completed"
    return {
        "name": "simulation",
        "quick": quick,
        "images": "real" if found.real else "sample",
        "ours": {
            "rounds_s": sum(loops["ours_s"]),
            "overhead_ms": 1e3 * ours_s,
            "loops": loops,
            "memory": memory,
        },
        "peer": {
            "bare_loops_s": sum(loops["bare_s"]),
            "flower_ray_overhead_ms": 1e3 * flower_s,
            "flower_ray_one_core_overhead_ms": 1e3 * statistics.median(overhead["flower_one_core"]),
            "our_loop_on_ray_overhead_ms": 1e3 * on_ray_s,
            "overhead": overhead,
        },
        "goals": [
            goal(
                f"total time over bare training loops, {LABS} labs, {loops['rounds']} rounds",
                sum(loops["ours_s"]) / sum(loops["bare_s"]),
                "<=",
                1.05,
            ),
            goal(
                "overhead at 45 MB: Flower's Ray simulation over ours", flower_s / ours_s, ">=", 10
            ),
            goal(
                f"virtual labs that finish, of {memory['labs'][1]}",
                memory["labs"][1] if finished else 0,
                ">=",
                memory["labs"][1],
            ),
            goal(
                f"peak memory with {memory['labs'][1]} labs over {memory['labs'][0]}",
                many / few,
                "<=",
                1.15,
            ),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented text")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_main(options.bare)
        return
    if importlib.util.find_spec("ray") is None:
        parser.error("Ray is not installed: pip install 'cytofed[test]'")
    result = measure(quick=options.quick)
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
