"""How commands reach a coordinator that runs: a socket in its directory, which only its owner sees.

One line of JSON each way.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytofed.errors import CytofedError, InputError
from cytofed.plan import Plan, from_dict

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Command:
    """What was asked: a name and its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def text(self, key: str) -> str:
        value = self.arguments.get(key)
        if not isinstance(value, str):
            raise InputError(f"command {self.name} lacks {key}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; empty where there is none."""
        value = self.arguments.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InputError(f"command {self.name}: {key} is not a list of names")
        return tuple(value)

    def plan(self) -> Plan:
        tree = self.arguments.get("plan")
        if not isinstance(tree, dict):
            raise InputError(f"command {self.name} lacks a plan")
        return from_dict(tree)


@contextlib.contextmanager
def serve_commands(path: Path, answer: Callable[[Command], Mapping[str, Any]]) -> Iterator[None]:
    """Answer commands until the block ends.

    Errors: InputError where another process does so already.
    """
    if _is_served(path):
        raise InputError(
            f"a coordinator runs already in {path.parent}", hint="stop it before starting another"
        )
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, _short(path) as short:
        before = os.umask(0o177)
        try:
            listener.bind(short)
        finally:
            os.umask(before)
        listener.listen(8)
        thread = threading.Thread(target=_accept, args=(listener, answer), daemon=True)
        thread.start()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def send_command(path: Path, name: str, **arguments: Any) -> dict[str, Any]:
    """The answer of the coordinator that runs in the directory of ``path``.

    Errors: InputError where none does; whatever the coordinator refuses with.
    """
    with socket.socket(socket.AF_UNIX) as connection, _short(path) as short:
        try:
            connection.connect(short)
        except OSError:
            raise InputError(
                f"no coordinator runs in {path.parent}",
                hint=f"start it: cytofed server start {path.parent}",
            ) from None
        try:
            connection.sendall(json.dumps({"command": name, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as file:
                found = dict(json.loads(file.readline()))
        except (OSError, ValueError, TypeError):
            raise CytofedError(
                "the coordinator ended before it answered",
                hint=f"its log says why; start it: cytofed server start {path.parent}",
            ) from None
    if "error" in found:
        error = CytofedError(found["error"], hint=found.get("hint", ""))
        error.exit_code = int(found.get("exit_code", 1))
        raise error
    return dict(found)


def _accept(listener: socket.socket, answer: Callable[[Command], Mapping[str, Any]]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve_one, args=(connection, answer), daemon=True).start()


def _serve_one(connection: socket.socket, answer: Callable[[Command], Mapping[str, Any]]) -> None:
    with connection, connection.makefile("rb") as file:
        connection.settimeout(30)
        try:
            asked = json.loads(file.readline(_MAX_BYTES))
            found: Mapping[str, Any] = answer(Command(str(asked.pop("command")), asked))
        except CytofedError as error:
            found = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(found).encode() + b"\n")


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, _short(path) as short:
        return probe.connect_ex(short) == 0


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits into a socket's address, however deep its folder lies."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
