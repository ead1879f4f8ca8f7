"""A worker process of a simulation: answers messages for whichever virtual lab they are meant.

Started as ``python -m cytofed.simulations.worker FD FOLDER EXCHANGE PLAN``: one end of a pipe to
the grid, the description of the virtual labs, a folder in shared memory, the plan's file. It ends
when the pipe does, or when its parent is gone.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from cytofed.messages import Order, new_message
from cytofed.plan import load_plan
from cytofed.simulations import exchange
from cytofed.simulations.exchange import Answer, Step
from cytofed.start import read_start, write_start

if TYPE_CHECKING:
    from cytofed.client.training import Progress

_STEP_INTERVAL_S = 0.25


def serve(connection: Connection, folder: Path, exchange_folder: Path) -> None:
    """Answer tasks until the other end closes."""
    from cytofed.simulations.virtual import VirtualLabs, virtual_app

    labs: VirtualLabs | None = None
    node = 0
    last_step = 0.0

    def report(order: Order, step: Progress) -> None:
        nonlocal last_step
        now = time.monotonic()
        if now - last_step >= _STEP_INTERVAL_S:
            last_step = now
            share = step.step / max(step.steps, 1)
            connection.send(Step(order.run, node, order.round, share, step.loss))

    app = None
    numbers = itertools.count()
    cached: tuple[int, RecordDict | None] = (-1, None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if app is None:
            labs = VirtualLabs.load(folder)
            app = virtual_app(labs, on_step=report)
        node = task.node
        if cached[0] != task.content_id:
            cached = (task.content_id, exchange.unpack(task.content))
        content = cached[1]
        assert content is not None
        message = new_message(
            content,
            kind=task.kind,
            node=task.node,
            group=task.group,
            ttl_s=task.ttl_s,
            message_id=task.message_id,
        )
        reply = app(message, Context(0, task.node, {"partition-id": task.node}, RecordDict(), {}))
        path = exchange_folder / f"up-{os.getpid()}-{next(numbers)}"
        connection.send(_answer(task.message_id, reply, path))


def _answer(message_id: str, reply: Message, path: Path) -> Answer:
    if reply.has_error():
        return Answer(message_id, None, (reply.error.code, reply.error.reason or ""))
    return Answer(message_id, exchange.pack(reply.content, path))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    file_number, folder, exchange_folder, plan_file = sys.argv[1:]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Before the first task, while the parent reads the data: torch and the start model. Workers
    # that do so at the same time write the same bytes.
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if read_start(Path(folder)) is None:
        write_start(load_plan(plan_file), Path(folder))
    serve(Connection(int(file_number)), Path(folder), Path(exchange_folder))


if __name__ == "__main__":
    main()
