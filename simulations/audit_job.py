"""Parts of an audit in processes of their own, one for each core: planted faults, and the attacks.

A process is started as ``python -m cytofed.simulations.audit_job RUN``. It gets the name of a part
as a line of stdin, and answers what was found as a line of JSON. It ends when its stdin does, or
when its parent is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cytofed.client.rehearsal import rehearse
from cytofed.errors import CytofedError
from cytofed.plan import Plan, load_plan
from cytofed.privacy.accounting import price, times
from cytofed.privacy.terms import Terms, terms_of
from cytofed.simulations.attacks import attack
from cytofed.simulations.shadows import end_with

ATTACKS = "attacks"
REHEARSAL = "rehearsal"
"""the parts that are no control"""
DECLARED = 40
"""patients of a lab, where the run does not tell"""


@contextmanager
def at_work(
    run_dir: Path, parts: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Mapping[str, Future[Any]]]:
    """What is found of each part, by its name, while processes are at work on them.

    The first parts are begun first. Errors, of a result: CytofedError.
    """
    processes = [_start(run_dir) for _ in range(min(len(parts), os.cpu_count() or 1))]
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def find(part: str) -> Any:
        process = idle.get()
        tell(part if part in (ATTACKS, REHEARSAL) else f"control: {part}")
        found = _ask(process, part)
        idle.put(process)
        if "error" in found:
            raise CytofedError(f"the audit's part {part!r} failed: {found['error']}")
        return found["found"]

    with ThreadPoolExecutor(max(1, len(processes))) as pool:
        try:
            yield {part: pool.submit(find, part) for part in parts}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
                process.wait()


def _ask(process: subprocess.Popen[str], part: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(part + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return {"error": "its process ended"}
    return answer


def _start(run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cytofed.simulations.audit_job", str(run_dir)],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to the parent alone, which ends them
    )


# --- the parts


def control_names() -> tuple[str, ...]:
    """The code that ships first, then each planted fault."""
    from cytofed.privacy import faults
    from cytofed.simulations import planted

    return tuple(fault.name for fault in (faults.SHIPPED, *faults.FAULTS, *planted.FAULTS))


def find(run_dir: Path, plan: Plan, part: str) -> dict[str, Any]:
    """What one part finds. Errors: CytofedError."""
    if part == ATTACKS:
        return attack(run_dir, terms_of(plan) or _usual_terms())
    if part == REHEARSAL:
        return {"noises": list(rehearse(quick=True).noises)}
    return _control(part, terms_of(plan) or _usual_terms())


@cache
def _usual_terms() -> Terms:
    """Protections that a run without privacy is shown: of a net trained whole, in few steps."""
    terms = terms_of(load_plan("demo", ["privacy.unit=patient", "model.trainable=all"]))
    assert terms is not None
    return terms


def _control(name: str, terms: Terms) -> dict[str, Any]:
    """An implementation against all checks, with the mechanism of ``terms``.

    One round alone could not show a reset, so there are two at least.
    """
    from cytofed.client.training import steady
    from cytofed.privacy.faults import FAULTS, SHIPPED, look
    from cytofed.simulations import planted

    of_a_lab = {fault.name: fault for fault in planted.FAULTS}
    if name in of_a_lab:
        said = planted.rehearsed(of_a_lab[name])
        return {"fault": name, "caught": bool(said), "checks": {planted.CHECK: said}}
    if terms.rounds < 2:
        whole = price([times(terms.training, 2)], terms.delta)
        terms = replace(terms, rounds=2, guarantee=whole)
    (implementation,) = (it for it in (SHIPPED, *FAULTS) if it.name == name)
    with steady(1):
        checks = look(implementation, terms, DECLARED).found
    if implementation is SHIPPED or name in planted.OF_THE_OPTIMIZER:
        checks[planted.CHECK] = planted.rehearsed(planted.OF_THE_OPTIMIZER.get(name))
    return {"fault": name, "caught": any(checks.values()), "checks": checks}


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    run_dir = Path(sys.argv[1])
    plan = load_plan(run_dir / "plan.yaml")
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = {"found": find(run_dir, plan, line.strip())}
        except CytofedError as error:
            answer = {"error": error.message}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
