"""Rounds of a deployed federation: time and memory beyond training.

``python benchmarks/deployment.py [--quick] [--large] [--json]``; one JSON line last. A coordinator
(``cytofed server start``) and three labs (``cytofed client start``) as processes of their own, over
TLS on loopback, with sealing and secure aggregation on. Training is one step on one small image;
what a round takes beyond it is its overhead: distribution, sealing, masking, upload, the secure
sum and the checkpoint.

``--large`` adds 400 MB of weights. The figures of Flower's stock processes are quoted, not
measured here: they were 12 to 13 s a round without sealing and secure aggregation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from PIL import Image

from cytofed.client.daemon import Daemon
from cytofed.client.directory import ClientDirectory, join
from cytofed.client.policy import open_ledger
from cytofed.documents import Invite
from cytofed.messages import Masked, Step, pack_masked, pack_step, unpack_order, unpack_step
from cytofed.server.directory import ServerDirectory
from cytofed.strategies import make_strategy

PATIENCE_S = 240.0
LABS = 3
MANY_LABS = 30
MIB = 1 << 20
SMALL_WIDTH = 30

PLAN = """\
name: overhead
labels: {{scale: {{size_px: 16, field_um: 21.6}}}}
model: {{width: {width}}}
train: {{rounds: {rounds}, steps_per_round: 1, batch: 1}}
evaluation: {{every: {rounds}}}
cohort: {{min_labs: {labs}, wait_s: 120, round_timeout_s: 200}}
secure_aggregation: {{enabled: true}}
"""

QUOTED_PEER_S = 12.0
"""Flower's SuperLink and SuperNodes, a trivial round on loopback, without sealing and secure
aggregation: 12 to 13 s"""


@dataclass(frozen=True)
class Size:
    """A model of ``width`` channels: 45 MB are 11.2 M float32."""

    name: str
    width: int
    rounds: int
    limit_s: float | None = None
    """wanted overhead of a round"""


SIZES = (Size("1 MB", SMALL_WIDTH, 6, 0.5), Size("45 MB", 200, 5, 1.5), Size("100 MB", 299, 4))
LARGE = Size("400 MB", 598, 3)


@dataclass
class Federation:
    """A coordinator and its labs below one folder; what runs is ended at the end."""

    root: Path
    labs: tuple[str, ...]
    directory: ServerDirectory
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> int:
        return self.running["coordinator"].pid

    def start(self, who: str, command: list[str]) -> None:
        with (self.root / f"{who}.log").open("wb") as log:
            self.running[who] = subprocess.Popen(
                [sys.executable, *command],
                env=_environment(self.root, who),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_lab(self, lab: str) -> None:
        self.start(lab, ["-m", "cytofed.cli", "client", "start", str(self.root / lab)])

    def command(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "cytofed.cli", "server", *arguments, "--json"],
            env=_environment(self.root, "coordinator"),
            stdout=subprocess.PIPE,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Measured:
    """One run. Seconds per round, the first and the last (with set-up and scores) left out."""

    overhead_s: float
    rounds_s: tuple[float, ...]
    setup_s: float
    """the first round's overhead, with the set-up of secure aggregation"""
    peak_bytes: int
    weights_bytes: int
    coordinator_cpu_s: float
    """processor time per round"""


@contextlib.contextmanager
def federation(labs: int) -> Iterator[Federation]:
    """A coordinator that runs and labs that have joined, in a folder that is removed."""
    root = Path(tempfile.mkdtemp(prefix="cytofed-benchmark-"))
    names = tuple(f"lab-{number:02d}" for number in range(1, labs + 1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = ServerDirectory.create(
        root / "coordinator", name="benchmark", address=f"127.0.0.1:{port}"
    )
    settings = directory.root / "server.yaml"
    text = settings.read_text().replace("offer_every_s: 5 ", "offer_every_s: 0.5 ")
    settings.write_text(text.replace("enrolments_per_minute: 30", "enrolments_per_minute: 900"))
    made = Federation(root, names, directory)
    try:
        made.start("coordinator", ["-m", "cytofed.cli", "server", "start", str(directory.root)])
        _until(lambda: _answers(port), "the coordinator answers")
        for lab in names:
            _join(made, lab)
        yield made
    finally:
        made.end()
        shutil.rmtree(root, ignore_errors=True)


def _join(made: Federation, lab: str) -> None:
    """Two images and an enrolment."""
    data = made.root / "data" / lab
    noise = np.random.default_rng(int(lab.rpartition("-")[2]))
    for code in ("BLA", "EOS"):
        (data / code).mkdir(parents=True)
        for number in range(3):
            pixels_HW3 = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels_HW3).save(data / code / f"{number}.png")
    invite = made.root / f"{lab}.invite"
    invite.write_text(made.directory.invite(lab).to_text())
    os.environ["XDG_STATE_HOME"] = _environment(made.root, lab)["XDG_STATE_HOME"]
    join(Invite.load(invite), made.root / lab, data=data)


def measure(made: Federation, size: Size) -> Measured:
    """A run of ``size`` from its offer to its end."""
    plan = made.root / "plan.yaml"
    plan.write_text(PLAN.format(width=size.width, rounds=size.rounds, labs=len(made.labs)))
    cpu_before = _cpu_s(made.coordinator)
    queued = made.command("run", str(made.directory.root), str(plan))
    for lab in made.labs:
        _approve(made, lab, queued["plan_sha256"])
    folder = made.directory.runs / queued["run"]
    _until((folder / "summary.json").is_file, "the run has ended")
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "completed":
        raise SystemExit(f"the run {summary['status']}: {summary.get('reason')}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    walls_s = _round_times(made.root / "coordinator.log", queued["run"])
    over_s = [
        wall_s - record["train_s"] / len(made.labs)
        for wall_s, record in zip(walls_s, records, strict=False)
    ]
    weights_bytes = records[0]["down_bytes"] // len(made.labs)
    return Measured(
        overhead_s=float(np.median(over_s[1:])),
        rounds_s=tuple(round(value, 3) for value in over_s[1:]),
        setup_s=over_s[0],
        peak_bytes=_memory(made.coordinator, "VmHWM"),
        weights_bytes=weights_bytes,
        coordinator_cpu_s=(_cpu_s(made.coordinator) - cpu_before) / size.rounds,
    )


def _approve(made: Federation, lab: str, plan_sha256: str) -> None:
    directory = ClientDirectory.open(made.root / lab)
    plans = directory.plans()

    def waits() -> list[str]:
        return [e.sha256 for e in plans.entries() if e.plan_sha256 == plan_sha256]

    _until(waits, f"{lab} has the plan")
    settings = directory.settings()
    with open_ledger(settings) as book:
        plans.approve(waits()[-1], settings, book)


def _round_times(log: Path, run: str) -> list[float]:
    """Seconds from each round's first order to the next one's, checkpoint and all.

    The last round ends with an evaluation, and is left out.
    """
    marks = []
    for line in log.read_text().splitlines():
        if f" {run}: train, round " in line:
            stamp = time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
            marks.append(time.mktime(stamp) + int(line[20:23]) / 1000)
    return [after - before for before, after in itertools.pairwise(marks)]


# --- labs as threads: many of them, without a net each


def light_labs(folders: list[Path]) -> None:
    """Labs of this process that speak the whole protocol and train nothing."""
    daemons = [Daemon(ClientDirectory.open(folder), note=print) for folder in folders]
    for daemon in daemons:
        daemon._app = _untrained(daemon)  # type: ignore[assignment]
        threading.Thread(target=daemon.run, daemon=True).start()
    threading.Event().wait()


def _untrained(daemon: Daemon) -> Callable[[Message, Context], Message]:
    """What a lab half answers, with an update of zeros and a tally of nothing."""

    def answer(message: Message, _: Context) -> Message:
        kind = message.metadata.message_type
        assert daemon._open is not None
        lab = daemon._open.lab
        secure = lab.secure
        assert secure is not None
        if kind == "query.secagg":
            step: Step = secure.answer(unpack_step(message))
            return _reply(pack_step(step), message)
        order = unpack_order(message)
        if kind == "train":
            zeros = {name: np.zeros_like(order.parts["weights"]) for name in order.parts}
            strategy = make_strategy(lab.plan.strategy)
            words_W = secure.mask(order, lab.plan, strategy, zeros, 1.0).words_W
        else:
            from cytofed.metrics import Tally

            words_W = secure.mask_tally(order, Tally.empty(len(lab.scheme.codes)))
        masked = Masked(lab.name, order.run, order.round, order.slot, words_W)
        return _reply(pack_masked(masked), message)

    return answer


def _reply(content: RecordDict, message: Message) -> Message:
    return Message(content, reply_to=message)


# --- processes


def _environment(root: Path, who: str) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_STATE_HOME": str(root / "state" / who),
        "XDG_CACHE_HOME": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(happened: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > end:
            raise SystemExit(f"waited in vain until {what}")
        time.sleep(0.05)


def _memory(pid: int, what: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {what} of process {pid}")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _imports_torch(pid: int) -> bool:
    return "torch" in Path(f"/proc/{pid}/maps").read_text()


# --- the figures


def overheads(sizes: tuple[Size, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ours by size, and the goals."""
    ours: dict[str, Any] = {}
    goals = []
    with federation(LABS) as made:
        for lab in made.labs:
            made.start_lab(lab)
        _until(lambda: _online(made) == LABS, "all labs are connected")
        idle_bytes = _memory(made.coordinator, "VmRSS")
        ours["idle_mib"] = round(idle_bytes / MIB, 1)
        for size in sizes:
            found = measure(made, size)
            above = (found.peak_bytes - idle_bytes) / found.weights_bytes
            ours[size.name] = {
                "overhead_s": round(found.overhead_s, 3),
                "rounds_s": found.rounds_s,
                "first_round_s": round(found.setup_s, 3),
                "coordinator_cpu_s": round(found.coordinator_cpu_s, 3),
                "peak_mib": round(found.peak_bytes / MIB, 1),
                "peak_above_idle_in_weights": round(above, 2),
            }
            if size.limit_s is not None:
                name = f"overhead of a round, {size.name} x {LABS} labs [s]"
                goals.append(_goal(name, found.overhead_s, "<=", size.limit_s))
            if size in SIZES[1:]:
                name = f"coordinator's peak above idle, {size.name} [weights]"
                goals.append(_goal(name, above, "<=", 4.0))
        ours["imports_torch"] = _imports_torch(made.coordinator)
        goals.append(_goal("coordinator imports torch", float(ours["imports_torch"]), "<=", 0.0))
    return ours, goals


def growth() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The coordinator's peak with few labs and with many, one small model."""
    ours: dict[str, Any] = {}
    for labs in (LABS, MANY_LABS):
        with federation(labs) as made:
            folders = [str(made.root / lab) for lab in made.labs]
            made.start("labs", [__file__, "--labs", *folders])
            _until(lambda labs=labs, made=made: _online(made) == labs, "all labs are connected")  # type: ignore[misc]
            found = measure(made, Size(f"{labs} labs", SMALL_WIDTH, 3))
            ours[f"{labs} labs"] = {
                "peak_mib": round(found.peak_bytes / MIB, 1),
                "overhead_s": round(found.overhead_s, 3),
                "coordinator_cpu_s": round(found.coordinator_cpu_s, 3),
            }
    ratio = ours[f"{MANY_LABS} labs"]["peak_mib"] / ours[f"{LABS} labs"]["peak_mib"]
    name = f"coordinator's peak with {MANY_LABS} labs over that with {LABS}"
    return ours, [_goal(name, ratio, "<=", 1.1)]


def _online(made: Federation) -> int:
    found = made.command("status", str(made.directory.root))
    return sum(lab["online"] for lab in found["labs"])


def _goal(name: str, value: float, op: str, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "op": op, "limit": limit, "met": value <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 and 45 MB only")
    parser.add_argument("--large", action="store_true", help="400 MB of weights too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--labs", nargs="*", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else what was started would go on
    if chosen.labs:
        light_labs(chosen.labs)
        return
    sizes = SIZES[:2] if chosen.quick else (*SIZES, *([LARGE] if chosen.large else []))
    ours, goals = overheads(sizes)
    if not chosen.quick:
        found, more = growth()
        ours["growth"], goals = found, [*goals, *more]
    result = {
        "name": "deployment",
        "ours": ours,
        "peer": {"round_s": QUOTED_PEER_S, "quoted": True},
        "goals": goals,
    }
    if not chosen.json:
        for goal in goals:
            print(f"{goal['name']}: {goal['value']:.3g} {goal['op']} {goal['limit']:g} "
                  f"{'met' if goal['met'] else 'MISSED'}")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
