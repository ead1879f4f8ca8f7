"""Run every benchmark and write the table of their goals: ``python benchmarks/table.py [--quick]``.

Each script prints one JSON line last; the table goes to benchmarks/RESULTS.md and the terminal.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run(script: Path, arguments: list[str]) -> dict[str, Any]:
    """The JSON line of one benchmark; a crash is a result with an error."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"name": script.stem, "goals": [], "error": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row per goal."""
    rows = [
        f"Measured {time.strftime('%Y-%m-%d')}, {platform.machine()}, Python "
        f"{platform.python_version()}. Ratios are of one run, ours against the peer.",
        "",
        "| benchmark | goal | measured | wanted | met |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        if "error" in result:
            rows.append(f"| {result['name']} | | {result['error']} | | no |")
        for goal in result["goals"]:
            rows.append(
                f"| {result['name']} | {goal['name']} | {goal['value']:.4g} | "
                f"{goal['op']} {goal['limit']:g} | {'yes' if goal['met'] else 'no'} |"
            )
    return "\n".join(rows) + "\n"


def main() -> None:
    scripts = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)
    results = []
    for script in scripts:
        print(f"{script.name} ...", file=sys.stderr, flush=True)
        results.append(run(script, sys.argv[1:]))
    text = table(results)
    (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
