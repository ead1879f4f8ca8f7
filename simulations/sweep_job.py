"""The process of one run of a sweep: ``simulate`` on a request that comes as a line of stdin.

Started as ``python -m cytofed.simulations.sweep_job``. It ends when its stdin does: then the sweep
is interrupted or gone, and a later ``--resume`` goes on from the run's last round.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cytofed.console import RunProgress, print_error
from cytofed.errors import CytofedError
from cytofed.plan import from_dict, to_dict
from cytofed.simulations.simulate import Request, simulate

_PATIENCE_S = 5.0
"""how long an interrupted run has to end its worker"""


def to_line(request: Request) -> str:
    """A request as the line that ``main`` reads."""
    tree = {
        "plan": to_dict(request.plan),
        "out": str(request.out),
        "data": [str(path) for path in request.data],
        "labels": list(request.labels),
        "patients": request.patients,
    }
    return json.dumps(tree) + "\n"


def from_line(line: str) -> Request:
    """One worker, and always resumed: a run directory that was begun is gone on with."""
    tree: dict[str, Any] = json.loads(line)
    return Request(
        plan=from_dict(tree["plan"]),
        out=Path(tree["out"]),
        data=tuple(Path(path) for path in tree["data"]),
        labels=tuple(tree["labels"]),
        patients=tree["patients"],
        jobs=1,
        resume=True,
    )


def _end_with_stdin() -> None:
    while sys.stdin.read(1 << 10):
        pass
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)
    time.sleep(_PATIENCE_S)
    os._exit(130)


def main() -> None:
    # A sweep in the background of a shell has Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        request = from_line(sys.stdin.readline())
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        simulate(request, RunProgress())
    except CytofedError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
