"""``python faulty.py FAULT ... -- ARGS``: the cytofed command with faults planted in its process.

::

    kill:MODULE:NAME:before|after:N    SIGKILL when NAME is called for the Nth time, or returns
    sleep:MODULE:NAME:SECONDS          every call of NAME takes so much longer
    skip:MODULE:NAME                   calls of NAME do nothing
    clock:SECONDS                      the clock that signs requests is off by so much
    tell:LAB                           the coordinator tells LAB the truth and the others not
    claim:BITS                         a lab says that it weighs two to the power of BITS
    deal                               a lab deals shares of other seeds than it committed to
    stumble:N                          the coordinator answers every Nth request with HTTP 500
    fail:MODULE:NAME:WHEN:ERROR        calls of NAME raise ERROR, an exception or a number of errno:
                                       the Nth, or all while the file WHEN is there
    words:MODULE:NAME                  NAME gives a text with escape sequences, lines and markup
    shape:MODULE:NAME                  manifests of NAME have another array, empty and of a shape
                                       that no array can have
    lie:MODULE:NAME                    NAME of a module beside this one puts its lie in place
"""

from __future__ import annotations

import builtins
import errno
import functools
import importlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def replace(place: str, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap`` around what ``name`` (dotted for methods) of module ``place`` calls."""
    owner: Any = importlib.import_module(place)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, wrap(getattr(owner, last)))


def kill(place: str, name: str, when: str, number: str) -> None:
    calls = itertools.count(1)

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            now = next(calls) == int(number)
            if now and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            found = original(*args, **kwargs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return wrapped

    replace(place, name, wrap)


def sleep(place: str, name: str, seconds: str) -> None:
    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            time.sleep(float(seconds))
            return original(*args, **kwargs)

        return wrapped

    replace(place, name, wrap)


def skip(place: str, name: str) -> None:
    replace(place, name, lambda original: functools.wraps(original)(lambda *_args, **_kw: None))


def fail(place: str, name: str, when: str, error: str) -> None:
    calls = itertools.count(1)

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if (next(calls) == int(when)) if when.isdigit() else Path(when).exists():
                number = getattr(errno, error, None)
                raise OSError(number, "planted") if number else getattr(builtins, error)("planted")
            return original(*args, **kwargs)

        return wrapped

    replace(place, name, wrap)


WORDS = (
    "\x1b[2Jgone\r\n2026-01-01 INFO forged\u202e![x](http://evil.example/a)<img src=//evil.example>"
)


def words(place: str, name: str) -> None:
    replace(place, name, lambda original: functools.wraps(original)(lambda *_args, **_kw: WORDS))


def shape(place: str, name: str) -> None:
    from cytofed.privacy import wire

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            manifest, payload = original(*args, **kwargs)
            rows = wire.decode(manifest)
            return wire.encode([*rows, ["more", [0, 2**62, 2**62], "<f4"]]), payload

        return wrapped

    replace(place, name, wrap)


def clock(seconds: str) -> None:
    off = timedelta(seconds=float(seconds))
    replace("flwr.supernode.node_auth_http_interceptor", "now", lambda now: lambda: now() + off)


def stumble(number: str) -> None:
    from starlette.responses import PlainTextResponse

    requests = itertools.count(1)

    def middleware(app: Any) -> Any:
        async def stumbling(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and next(requests) % int(number) == 0:
                app_ = PlainTextResponse("internal error", status_code=500)
                await app_(scope, receive, send)
            else:
                await app(scope, receive, send)

        return stumbling

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def new_app(*args: Any, **kwargs: Any) -> Any:
            return middleware(original(*args, **kwargs))

        return new_app

    replace("cytofed.server.fleet", "Fleet.app", wrap)


def lie(place: str, name: str) -> None:
    getattr(importlib.import_module(place), name)()


def tell(victim: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.attacks.evil import one_after_the_other, tells

    sent = tells(one_after_the_other(victim))
    replace("cytofed.server.secure", "SecureRun._sent", lambda _original: sent)


def claim(bits: str) -> None:
    replace("cytofed.client.daemon", "public_bound", lambda _original: lambda _: 2.0 ** int(bits))


def deal() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.attacks.evil import of_another_seed

    replace("cytofed.privacy.secagg_lab", "_deal", of_another_seed)


FAULTS: dict[str, Callable[..., None]] = {
    "kill": kill,
    "sleep": sleep,
    "skip": skip,
    "clock": clock,
    "tell": tell,
    "claim": claim,
    "deal": deal,
    "stumble": stumble,
    "fail": fail,
    "shape": shape,
    "lie": lie,
    "words": words,
}


if __name__ == "__main__":
    end = sys.argv.index("--")
    for fault in sys.argv[1:end]:
        kind, *arguments = fault.split(":")
        FAULTS[kind](*arguments)
    sys.argv[1:] = sys.argv[end + 1 :]
    from cytofed.cli import main

    main()
