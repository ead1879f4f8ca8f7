"""The same simulation on Flower's own runtime, which runs on Ray (the extra ``cytofed[ray]``).

Virtual labs, round loop and seeds are those of the in-process backend, so are the weights. It is
for Ray clusters (``RAY_ADDRESS``; the folders must be shared) and to check one backend against the
other; on one machine the in-process backend is much faster.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from cytofed.console import RunProgress
from cytofed.errors import CytofedError, InputError
from cytofed.messages import ERROR_CODE, Order, pack_order, unpack_hello
from cytofed.plan import Plan
from cytofed.server.asking import ask
from cytofed.simulations.simulate import Request, Results, World, make_start, run_all
from cytofed.simulations.virtual import CENTRAL, open_app
from cytofed.start import Start, read_start

Answer = Callable[[Message, Context], Message]
"""A ClientApp is called like this, and nothing else is asked of it. Ray pickles it."""

_T = TypeVar("_T")
_NODES_S = 120.0
"""how long Flower may take until its nodes exist"""


class RayBackend:
    """Runs the virtual labs of a simulation on Ray; see the module.

    Errors: InputError when Ray is not installed.
    """

    def __init__(self, request: Request, private: Path, progress: RunProgress) -> None:
        if find_spec("ray") is None:
            raise InputError("backend ray: Ray is not installed", hint='pip install "cytofed[ray]"')
        self._request, self._private = request, private
        self._threads = request.plan.train.threads

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self) -> Start:
        """The start model. Errors: CytofedError when it cannot be built."""
        found = read_start(self._private)
        return found or make_start(self._request.out / "plan.yaml", self._private)

    def run(self, world: World) -> Results:
        """All runs of the simulation. Errors: whatever the round loop raises, unchanged."""
        names = (*world.labs.names, CENTRAL)

        def main(grid: Grid) -> Results:
            return run_all(grid, find_labs(grid, names, world.plan), world)

        return run_on_ray(
            functools.partial(_answer, str(self._private.resolve())),
            len(names),
            main,
            workers=self._request.jobs or max(1, (os.cpu_count() or 1) // self._threads),
            threads=self._threads,
        )


@functools.cache
def _opened(folder: str) -> ClientApp:
    return open_app(Path(folder))


def _answer(folder: str, message: Message, context: Context) -> Message:
    """In a Ray worker. The app is opened once there; what travels with a message is its folder."""
    return to_bytes(_opened(folder)(message, context))


def to_bytes(message: Message) -> Message:
    """The message with its arrays as ``bytes``: what Ray can pickle."""
    if message.has_content():
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                for array in record.values():
                    array.data = bytes(array.data)  # no copy where they are
    return message


def run_on_ray(
    answer: Answer, nodes: int, main: Callable[[Grid], _T], *, workers: int, threads: int = 1
) -> _T:
    """``main`` over the Grid of Flower's simulation with ``nodes`` nodes that run ``answer``.

    ``workers`` Ray processes with ``threads`` threads each; on a cluster (``RAY_ADDRESS``) one per
    core of the cluster. ``KeyboardInterrupt`` ends Ray and passes through.
    Errors: what ``main`` raises, unchanged; CytofedError when Flower or Ray fails.
    """
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # workers see the GPU as we do
    import ray
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # errors arrive as replies
    stop = threading.Event()
    outcome: Future[_T] = Future()
    server = ServerApp()

    @server.main()
    def _(grid: Grid, context: Context) -> None:  # noqa: ARG001
        try:
            outcome.set_result(main(_StoppableGrid(grid, stop)))
        except BaseException as error:
            outcome.set_exception(error)

    # Short, for Ray puts Unix sockets deep below it and their paths may have 107 characters.
    short = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="cf-", dir=short)
    try:
        ray.init(**_ray_settings(folder, workers, threads))
        run_simulation(
            server,
            cast(ClientApp, answer),
            nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    except Exception as error:
        if not outcome.done():
            raise CytofedError(f"Flower's Ray simulation failed: {error}") from error
    finally:
        stop.set()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return outcome.result(timeout=_NODES_S)


def _ray_settings(folder: str, workers: int, threads: int) -> dict[str, Any]:
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    own = {"num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}
    return {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        **({} if os.environ.get("RAY_ADDRESS") else own),
    }


def find_labs(grid: Grid, names: tuple[str, ...], plan: Plan) -> Mapping[str, int]:
    """Node id of every lab: Flower gives nodes random ids, so each is asked for its name.

    Errors: CytofedError when a node does not answer or a name is missing.
    """
    deadline = time.monotonic() + _NODES_S
    while len(ids := list(grid.get_node_ids())) < len(names):
        if time.monotonic() > deadline:
            raise CytofedError(f"Flower made {len(ids)} of {len(names)} nodes in {_NODES_S:g} s")
        time.sleep(0.02)
    question = pack_order(Order("query", "hello", 0, plan.sha256))
    timeout_s = plan.cohort.round_timeout_s
    found = {}
    everyone = {str(node): node for node in ids}
    for node, reply in ask(grid, everyone, "query", 0, question, timeout_s=timeout_s):
        if reply is None:
            raise CytofedError(f"node {node} did not say its name within {timeout_s:g} s")
        if reply.has_error():
            raise CytofedError(f"node {node} did not say its name: {reply.error.reason}")
        found[unpack_hello(reply).lab] = int(node)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise CytofedError(f"no node answers as {', '.join(missing)}")
    return found


def _brief(reply: Message) -> Message:
    """An error of Ray's as one line; its reason is a traceback of many."""
    if reply.has_error() and reply.error.code != ERROR_CODE:
        lines = (reply.error.reason or "").strip().splitlines() or [f"error {reply.error.code}"]
        reply.error = Error(reply.error.code, f"Ray: {lines[-1][-300:]}")
    return reply


class _StoppableGrid(Grid):
    """Flower's Grid until ``stop`` is set; then its next use raises and so ends the round loop.

    Flower runs the loop in a thread of its own and, interrupted, would wait for it for ever.
    """

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid, self._stop = grid, stop

    def _checked(self) -> Grid:
        if self._stop.is_set():
            raise CytofedError("the simulation was stopped")
        return self._grid

    def set_run(self, run: Run) -> None:
        self._checked().set_run(run)

    @property
    def run(self) -> Run:
        return self._checked().run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        grid = self._checked()
        return to_bytes(grid.create_message(content, message_type, dst_node_id, group_id, ttl))

    def get_node_ids(self) -> Iterable[int]:
        return self._checked().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._checked().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return map(_brief, self._checked().pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._checked().send_and_receive(messages, timeout=timeout)
