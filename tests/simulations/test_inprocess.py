"""The grid over worker processes: order, deaths and deadlines change nothing but who is absent.

This module is also what the workers load: trivial labs, so that no worker imports torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cytofed.arrays import Float32
from cytofed.errors import CytofedError
from cytofed.labels import load_scheme
from cytofed.messages import Order, Update, pack_order, pack_update, unpack_order, unpack_update
from cytofed.plan import load_plan
from cytofed.server.asking import ask
from cytofed.server.checkpoints import Progress, Record
from cytofed.server.rounds import Run, run_rounds
from cytofed.simulations import inprocess
from cytofed.simulations.exchange import open_folder
from cytofed.simulations.inprocess import InProcessGrid
from cytofed.strategies.fedavg import fedavg

LABS = 5
SIZE = 1 << 16
"""parameters: enough to go through shared memory"""
COHORT = {f"lab-{k}": k for k in range(LABS)}


def warm_up(_plan_file: Path, folder: Path) -> None:
    """A worker's first call."""
    (folder / f"worker-{os.getpid()}").touch()


def open_app(folder: Path, *, on_step: object = None) -> ClientApp:  # noqa: ARG001
    """Labs that answer with noise of their own; a file ``FATE-LAB`` in ``folder`` decides more."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, number = unpack_order(message), int(context.node_config["partition-id"])
        if (folder / f"dies-{number}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder / f"sleeps-{number}").exists():
            time.sleep(float((folder / f"sleeps-{number}").read_text()))
        rng = np.random.default_rng([number, order.round])
        parts = {"weights": order.parts["weights"] * rng.normal(size=SIZE).astype(np.float32)}
        name, weight = f"lab-{number}", float(1 + number)
        return Message(
            pack_update(Update(name, order.run, order.round, weight, parts)), reply_to=message
        )

    return app


class Watch:
    """Notes who was absent and why."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[int, str], str] = {}

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None: ...
    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None: ...
    def round(self, run: str, record: Record) -> None: ...
    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None:
        self.reasons[round_, lab] = reason


Open = Callable[[int], InProcessGrid]


@pytest.fixture
def open_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Grids with so many workers, closed at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    opened = []

    def open_(workers: int) -> InProcessGrid:
        grid = InProcessGrid(
            tmp_path, plan_file=tmp_path / "plan.yaml", workers=workers, labs="test_inprocess"
        )
        grid.nodes = {k: float(k) for k in range(LABS)}
        opened.append(grid)
        return grid

    yield open_
    for grid in opened:
        grid.close()


def run_on(grid: InProcessGrid, *, rounds: int) -> tuple[Progress, Watch]:
    plan = load_plan("demo", [f"train.rounds={rounds}"])
    scheme, watch = load_scheme(plan.labels.scheme), Watch()
    run = Run("federation", plan, fedavg(), scheme, COHORT, SIZE)
    progress = Progress(0, run.strategy.init(np.ones(SIZE, np.float32)))
    end = run_rounds(
        grid, run, progress, checkpoint=lambda _: None, watch=watch, evaluate_rounds=False
    )
    return end, watch


def ask_all(grid: InProcessGrid, number: int, *, timeout_s: float) -> dict[str, Float32 | None]:
    """Each lab's answer, None where there is none."""
    order = pack_order(Order("train", "r", number, "", {"weights": np.ones(SIZE, np.float32)}))
    found: dict[str, Float32 | None] = {}
    for lab, reply in ask(grid, COHORT, "train", number, order, timeout_s=timeout_s):
        update = None if reply is None else unpack_update(reply, parts=("weights",), size=SIZE)
        found[lab] = None if update is None else update.parts["weights"]
    return found


def folders_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"cytofed-{pid}-*"))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def eventually(holds: Callable[[], bool], *, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_sum_does_not_depend_on_the_number_of_workers(open_grid: Open) -> None:
    one, watch = run_on(open_grid(1), rounds=3)
    two, _ = run_on(open_grid(2), rounds=3)
    assert watch.reasons == {}
    assert one.state["weights"].tobytes() == two.state["weights"].tobytes()
    assert not np.array_equal(one.state["weights"], np.ones(SIZE, np.float32))


def test_a_lab_whose_process_dies_is_absent_by_name_and_the_worker_is_replaced(
    open_grid: Open, tmp_path: Path
) -> None:
    (tmp_path / "dies-3").touch()
    end, watch = run_on(open_grid(1), rounds=2)
    reason = "the lab's process ended with signal 9"
    assert watch.reasons == {(1, "lab-3"): reason, (2, "lab-3"): reason}
    for record in end.records:
        assert record["received"] == [lab for lab in COHORT if lab != "lab-3"]
    assert len(list(tmp_path.glob("worker-*"))) == 3  # the first, and one for each death


def test_workers_that_always_die_end_the_run_with_an_error(
    open_grid: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess, "_RESTARTS", 1)
    for number in range(LABS):
        (tmp_path / f"dies-{number}").touch()
    with pytest.raises(CytofedError, match="die again and again"):
        run_on(open_grid(1), rounds=1)


def test_a_late_answer_is_absent_and_not_taken_for_the_next_rounds(
    open_grid: Open, tmp_path: Path
) -> None:
    grid = open_grid(1)
    first = ask_all(grid, 1, timeout_s=60.0)
    assert all(answer is not None for answer in first.values())
    (tmp_path / "sleeps-4").write_text("2")  # lab-4 costs most, so it is asked first
    assert ask_all(grid, 2, timeout_s=1.0) == dict.fromkeys(COHORT)
    (tmp_path / "sleeps-4").unlink()
    third = ask_all(grid, 3, timeout_s=60.0)
    for number, answer in enumerate(third[lab] for lab in COHORT):
        expected = np.random.default_rng([number, 3]).normal(size=SIZE).astype(np.float32)
        assert np.array_equal(answer, expected)  # type: ignore[arg-type]


def test_answers_that_are_kept_are_not_overwritten_by_later_rounds(open_grid: Open) -> None:
    grid = open_grid(1)
    first = ask_all(grid, 1, timeout_s=60.0)
    copies = {lab: np.array(answer) for lab, answer in first.items()}
    ask_all(grid, 2, timeout_s=60.0)
    assert all(np.array_equal(first[lab], copies[lab]) for lab in COHORT)  # type: ignore[arg-type]
    # Five answers were kept; one order, and answers that were dropped at once, need no more files.
    assert len(list(folders_of(os.getpid())[0].iterdir())) <= 2 * LABS + 1


def test_a_closed_grid_leaves_no_process_and_no_file(open_grid: Open, tmp_path: Path) -> None:
    grid = open_grid(2)
    ask_all(grid, 1, timeout_s=60.0)
    workers = [int(file.name.split("-")[1]) for file in tmp_path.glob("worker-*")]
    grid.close()
    assert not any(alive(pid) for pid in workers)
    assert folders_of(os.getpid()) == []


PARENT = """
import sys
from pathlib import Path
import test_inprocess as t

folder = Path(sys.argv[1])
grid = t.InProcessGrid(folder, plan_file=folder / "plan.yaml", workers=2, labs="test_inprocess")
grid.nodes = {k: float(k) for k in range(t.LABS)}
t.ask_all(grid, 1, timeout_s=60.0)
(folder / "ready").touch()
(folder / "sleeps-4").write_text("600")
t.ask_all(grid, 2, timeout_s=600.0)
"""


def test_a_killed_parent_takes_its_workers_along_and_the_next_start_cleans_up(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    try:
        assert eventually((tmp_path / "ready").exists, within_s=60.0)
        workers = [int(file.name.split("-")[1]) for file in tmp_path.glob("worker-*")]
        assert folders_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    # One worker is idle, one in the middle of its training.
    assert eventually(lambda: not any(alive(pid) for pid in workers))
    open_folder().rmdir()
    assert folders_of(parent.pid) == []
