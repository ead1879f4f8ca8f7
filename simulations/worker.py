"""A worker process of a simulation: answers messages for whichever virtual lab they are meant.

Started as ``python -m cytofed.simulations.worker FD LABS FOLDER PLAN``: one end of a pipe to the
grid, and where the labs come from: the module LABS has ``warm_up(plan_file, folder)``, called at
once, and ``open_app(folder, on_step=...)``, called at the first task. It ends when the pipe does,
or when its parent is gone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cytofed.messages import Order, new_message
from cytofed.simulations import exchange
from cytofed.simulations.exchange import Answer, Step

if TYPE_CHECKING:
    from cytofed.client.training import Progress

_STEP_INTERVAL_S = 0.25


def serve(
    connection: Connection,
    open_app: Callable[[Callable[[Order, Progress], None]], ClientApp],
) -> None:
    """Answer tasks until the other end closes."""
    node = 0
    last_step = 0.0

    def report(order: Order, step: Progress) -> None:
        nonlocal last_step
        now = time.monotonic()
        if now - last_step >= _STEP_INTERVAL_S:
            last_step = now
            share = step.step / max(step.steps, 1)
            _send(connection, Step(order.run, node, order.round, share, step.loss))

    # Mappings of the files that came back last; the grid hands out few, the last one first.
    slot_of = lru_cache(maxsize=4)(lambda path: exchange.Slot(Path(path)))
    app: ClientApp | None = None
    cached: tuple[int, RecordDict | None] = (-1, None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if app is None:
            app = open_app(report)
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
        _send(connection, _answer(task.message_id, reply, slot_of(task.reply_path)))


def _send(connection: Connection, value: Step | Answer) -> None:
    try:
        connection.send(value)
    except OSError:
        os._exit(1)  # the grid is gone, and nobody is left to tell


def _answer(message_id: str, reply: Message, slot: exchange.Slot) -> Answer:
    if reply.has_error():
        return Answer(message_id, None, (reply.error.code, reply.error.reason or ""))
    return Answer(message_id, exchange.pack(reply.content, slot))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    file_number, labs_module, folder, plan_file = sys.argv[1:]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    labs = import_module(labs_module)
    labs.warm_up(Path(plan_file), Path(folder))  # while the parent reads the data
    serve(
        Connection(int(file_number)),
        lambda report: labs.open_app(Path(folder), on_step=report),
    )


if __name__ == "__main__":
    main()
