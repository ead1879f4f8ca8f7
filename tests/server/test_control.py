"""The socket for commands, where either end breaks off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cytofed.errors import CytofedError, InputError
from cytofed.server.control import Command, send_command, serve_commands


@pytest.mark.parametrize("said", [b"", b'{"run": ', b"[1]\n", b"null\n", b"\xff\n"])
def test_coordinator_that_breaks_off_is_an_error_in_words(said: bytes, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(CytofedError, match="ended before it answered"):
            send_command(path, "status")
        thread.join(60)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"[]\n", b"7\n", b"{}\n", b"\xff\n", b"[" * 100_000, b'{"command": []}\n']
)
def test_no_line_ends_the_socket(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    def answer(command: Command) -> Mapping[str, Any]:
        if command.name != "status":
            raise InputError(f"unknown command {command.name!r:.40}")
        return {"said": "yes"}

    with serve_commands(path, answer):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            assert b"error" in connection.makefile("rb").readline()
        assert send_command(path, "status") == {"said": "yes"}
