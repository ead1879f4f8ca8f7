"""A Flower Grid over worker processes of this machine.

``push_messages`` queues, the largest labs first; each worker answers one message at a time;
``pull_messages`` gives what has arrived. Results do not depend on the number of workers or on
which worker answers: labs keep nothing in a process.
"""

from __future__ import annotations

import heapq
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from cytofed.errors import CytofedError
from cytofed.messages import ERROR_CODE, content_bytes, new_message
from cytofed.simulations import exchange
from cytofed.simulations.exchange import Answer, Step, Task
from cytofed.start import Start, read_start

_UNREAD_BYTES = 1 << 29
"""Workers pause while replies of this size wait to be pulled; free slots keep no more."""

_RESTARTS = 3


@dataclass
class _Content:
    """A content shared by messages, and how many of them are still to be answered."""

    packed: exchange.Packed
    slot: exchange.Slot
    number: int
    open: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection


@dataclass(order=True)
class _Queued:
    rank: tuple[float, int]
    message: Message = field(compare=False)
    deadline: float = field(compare=False)
    """when nobody waits for the reply any more (monotonic seconds)"""


class InProcessGrid(Grid):
    """See the module. Close it (or use ``with``) to end the worker processes.

    ``folder``: description of the virtual labs, read by a worker at its first message. The workers
    build the start model of the plan in it as soon as they are up (``wait_for_start``).
    ``labs``: the module that makes the labs' app, see ``cytofed.simulations.worker``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        plan_file: Path,
        workers: int,
        threads: int = 1,
        on_step: Callable[[Step], None] | None = None,
        labs: str = "cytofed.simulations.virtual",
    ) -> None:
        self._folder, self._threads, self._on_step = folder, threads, on_step
        self._plan_file, self._labs = plan_file, labs
        self._exchange = exchange.open_folder()
        self._slots = exchange.Slots(self._exchange, keep_bytes=_UNREAD_BYTES)
        self._changed = threading.Condition()
        self._queue: list[_Queued] = []
        self._numbers = itertools.count()
        self._contents: dict[int, _Content] = {}
        self._replies: dict[str, Message] = {}
        self._unread_bytes = 0
        self._closed = False
        self._failure: CytofedError | None = None
        self.nodes: Mapping[int, float] = {}
        """node id -> cost of a message; set once the virtual labs are known"""
        self._workers = [self._start_worker() for _ in range(workers)]
        self._threads_running = [
            threading.Thread(target=self._drive, args=(index,), daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads_running:
            thread.start()

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once; what they were doing is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
        for thread in self._threads_running:
            thread.join(timeout=5)
        shutil.rmtree(self._exchange, ignore_errors=True)

    def wait_for_start(self) -> Start:
        """The start model, once a worker has written it. Errors: CytofedError if none does."""
        while True:
            start = read_start(self._folder)
            if start is not None:
                return start
            ended = [w.process.returncode for w in self._workers if w.process.poll() is not None]
            if len(ended) == len(self._workers):
                raise CytofedError(f"no worker could start: {_exit_text(ended[0])}")
            time.sleep(0.02)

    # --- Flower's Grid

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("a simulation has no Flower run")

    @property
    def run(self) -> Run:
        raise NotImplementedError("a simulation has no Flower run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return new_message(
            content, kind=message_type, node=dst_node_id, group=group_id, ttl_s=ttl or 43200.0
        )

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        with self._changed:
            for message in messages:
                number = next(self._numbers)
                message.metadata.__dict__["_message_id"] = str(number)
                self._share(message.content)
                cost = self.nodes.get(message.metadata.dst_node_id, 0.0)
                deadline = time.monotonic() + message.metadata.ttl
                heapq.heappush(self._queue, _Queued((-cost, number), message, deadline))
                ids.append(str(number))
            self._changed.notify_all()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived; waits up to a second for the first."""
        wanted = set(message_ids)
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._closed or wanted & self._replies.keys(), timeout=1.0
            )
            if self._failure:
                raise self._failure
            found = [self._replies.pop(i) for i in wanted & self._replies.keys()]
            self._unread_bytes -= sum(_size(reply) for reply in found)
            self._changed.notify_all()
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError("cytofed's round loop pushes and pulls")

    # --- workers

    def _start_worker(self) -> _Worker:
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
        }
        arguments = [theirs.fileno(), self._labs, self._folder, self._plan_file]
        process = subprocess.Popen(
            [sys.executable, "-m", "cytofed.simulations.worker", *map(str, arguments)],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # whatever a library prints must not get into --json
            start_new_session=True,  # Ctrl-C goes to the parent alone, which ends the workers
        )
        theirs.close()
        return _Worker(process, ours)

    def _drive(self, index: int) -> None:
        """Feed one worker until the grid closes; an error here ends the simulation, not a hang."""
        try:
            self._feed(index)
        except Exception as error:
            failure = CytofedError(f"a worker's thread failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(failure)

    def _feed(self, index: int) -> None:
        """Give one worker a message after the other; replace it when it dies."""
        deaths = 0
        while (queued := self._next()) is not None:
            if time.monotonic() > queued.deadline:
                self._deliver(queued, Message(Error(ERROR_CODE, "late"), reply_to=queued.message))
                continue
            worker = self._workers[index]
            try:
                reply = self._ask(worker, queued.message)
            except (EOFError, OSError):
                reason = f"the lab's process ended with {_exit_text(worker.process.wait())}"
                deaths += 1
                if deaths > _RESTARTS:
                    self._fail(CytofedError(f"workers die again and again: {reason}"))
                    return
                if not self._replace_worker(index):
                    return
                reply = Message(Error(ERROR_CODE, reason), reply_to=queued.message)
            self._deliver(queued, reply)

    def _replace_worker(self, index: int) -> bool:
        """Start another worker, unless the grid is closing."""
        with self._changed:
            if self._closed:
                return False
            self._workers[index] = self._start_worker()
            return True

    def _next(self) -> _Queued | None:
        """The message to answer next, when there is room for its reply; None: the grid closes."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._queue and self._unread_bytes < _UNREAD_BYTES)
            )
            return None if self._closed else heapq.heappop(self._queue)

    def _ask(self, worker: _Worker, message: Message) -> Message:
        metadata = message.metadata
        content = self._contents[id(message.content)]
        slot = self._slots.take()
        task = Task(
            metadata.message_id,
            metadata.message_type,
            metadata.dst_node_id,
            metadata.group_id,
            metadata.ttl,
            content.packed,
            content.number,
            str(slot.path),
        )
        try:
            worker.connection.send(task)
            got = worker.connection.recv()
            while not isinstance(got, Answer):
                if self._on_step:
                    self._on_step(got)
                got = worker.connection.recv()
        except BaseException:
            self._slots.give_back(slot)
            raise
        if got.content is not None and got.content.path:
            return Message(self._slots.lend(got.content, slot), reply_to=message)
        self._slots.give_back(slot)
        if got.content is None:
            return Message(Error(*got.error), reply_to=message)
        return Message(exchange.unpack(got.content), reply_to=message)

    def _share(self, content: RecordDict) -> None:
        """Put a content where workers find it, once for all messages that carry it."""
        shared = self._contents.get(id(content))
        if shared is None:
            slot = self._slots.take()
            packed = exchange.pack(content, slot)
            shared = _Content(packed, slot, next(self._numbers))
            self._contents[id(content)] = shared
        shared.open += 1

    def _deliver(self, queued: _Queued, reply: Message) -> None:
        message = queued.message
        with self._changed:
            shared = self._contents[id(message.content)]
            shared.open -= 1
            if shared.open == 0:
                del self._contents[id(message.content)]
                self._slots.give_back(shared.slot)
            if time.monotonic() < queued.deadline:  # later nobody pulls it
                self._replies[message.metadata.message_id] = reply
                self._unread_bytes += _size(reply)
            self._changed.notify_all()

    def _fail(self, failure: CytofedError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()


def _size(reply: Message) -> int:
    return content_bytes(reply.content) if reply.has_content() else 0


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
