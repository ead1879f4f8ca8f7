"""Small runs for tests: a few shipped images, and a transport without processes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun

from cytofed.console import RunProgress
from cytofed.messages import new_message
from cytofed.plan import Plan, load_plan
from cytofed.simulations import simulate as simulation
from cytofed.simulations.simulate import Request, Results, World, run_all
from cytofed.simulations.virtual import CENTRAL, virtual_app
from cytofed.start import Start, read_start, write_start

SMALL = Path(__file__).with_name("small.yaml")


class DirectGrid(Grid):
    """A Grid without a network or processes: the app answers while a message is pushed."""

    def __init__(self, app: ClientApp) -> None:
        self._app = app
        self._lock = threading.Lock()  # baselines push from several threads
        self._replies: dict[str, Message] = {}
        self._pushed = 0

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return new_message(
            content, kind=message_type, node=dst_node_id, group=group_id, ttl_s=ttl or 60.0
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with self._lock:
            ids = []
            for message in messages:
                node = message.metadata.dst_node_id
                self._pushed += 1
                message.metadata.__dict__["_message_id"] = str(self._pushed)
                context = Context(0, node, {"partition-id": node}, RecordDict(), {})
                self._replies[str(self._pushed)] = self._app(message, context)
                ids.append(str(self._pushed))
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def get_node_ids(self) -> Iterable[int]:
        raise NotImplementedError

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


class Simulate(Protocol):
    """Runs a request; the report takes most of a small run's time and is left out if not asked."""

    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


class DirectBackend:
    """What ``simulate`` asks of a backend, in this process."""

    def __init__(self, request: Request, private: Path, _progress: RunProgress) -> None:
        self._plan, self._private = request.plan, private

    def __enter__(self) -> DirectBackend:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> Start:
        if read_start(self._private) is None:
            write_start(self._plan, self._private)
        start = read_start(self._private)
        assert start is not None
        return start

    def run(self, world: World) -> Results:
        names = (*world.labs.names, CENTRAL)
        grid = DirectGrid(virtual_app(world.labs))
        return run_all(grid, {name: number for number, name in enumerate(names)}, world)


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulate]:
    """``simulate`` as it is, over a transport without processes: seconds less per run."""
    monkeypatch.setattr(simulation, "_open_grid", DirectBackend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the plan says; sums differ in the last bit with more

    def run(request: Request, *, report: bool = False) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            if not report:
                patch.setattr(simulation, "_write_report", lambda _: None)
            return simulation.simulate(request, RunProgress(quiet=True))

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 marrow cells of four classes."""
    folder = tmp_path_factory.mktemp("few")
    for code in ("BLA", "EOS", "LYT", "NGS"):
        (folder / code).mkdir()
        for image in sorted((sample / "marrow" / code).iterdir())[:12]:
            shutil.copy(image, folder / code)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(few: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., Request]:
    """A request of a few seconds: ``small("train.rounds=3", out=..., resume=True)``."""

    def request(*overrides: str, **changes: Any) -> Request:
        values: dict[str, Any] = {
            "plan": small_plan(*overrides),
            "out": tmp_path / "run",
            "data": (few,),
            "cache_dir": cache_dir,
        }
        return Request(**{**values, **changes})

    return request


def small_plan(*overrides: str) -> Plan:
    return load_plan(SMALL, overrides)
