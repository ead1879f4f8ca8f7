"""``cytofed server``: the coordinator's commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cytofed.console import Commands, note, say
from cytofed.errors import InputError
from cytofed.words import log_to_stderr, one_line

_FOLDER = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.group(cls=Commands)
def server() -> None:
    """Coordinate a federation: invite labs, run plans."""


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--name", required=True, help="Name of the federation.")
@click.option("--address", required=True, metavar="HOST:PORT", help="Where labs reach it.")
def init(folder: Path, name: str, address: str) -> int:
    """Make a coordinator's directory with keys and settings."""
    from cytofed.server.directory import ServerDirectory

    directory = ServerDirectory.create(folder, name=name, address=address)
    say(f"coordinator of {name} in {folder}")
    say(f"fingerprint {directory.identity().public.fingerprint}")
    say("labs compare it by phone when they join")
    return 0


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("lab")
@click.option("--out", required=True, type=_FOLDER, help="File to write the invite to.")
def invite(folder: Path, lab: str, out: Path) -> int:
    """Write a one-time invite for LAB. Send it over a channel that you trust."""
    from cytofed.files import write_atomically
    from cytofed.server.directory import ServerDirectory

    made = ServerDirectory.open(folder).invite(lab)
    write_atomically(out, made.to_text(), mode=0o600)
    say(f"invite for {lab} in {out}, good once until {made.expires:%Y-%m-%d %H:%M} UTC")
    return 0


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
def start(folder: Path) -> int:
    """Open the port for labs and carry out runs, in the foreground."""
    from cytofed.heap import give_blocks_back
    from cytofed.server.app import Coordinator
    from cytofed.server.directory import ServerDirectory

    log_to_stderr(quiet=("flwr", "httpx", "uvicorn.access", "uvicorn.error"))
    directory = ServerDirectory.open(folder)
    give_blocks_back()
    coordinator = Coordinator(directory)
    note(f"cytofed: coordinator at {directory.settings().address}, Ctrl-C ends it")
    coordinator.serve()
    return 0


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("plan")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any key of the plan.")
@click.option("--labs", default="", metavar="A,B,C", help="Offer it to these labs only.")
@click.option("--wait", is_flag=True, help="Return when the run has ended.")
@_json
def run(
    folder: Path, plan: str, overrides: tuple[str, ...], labs: str, wait: bool, as_json: bool
) -> int:
    """Offer PLAN to the labs that are enrolled now, and run it with those that approve.

    It starts when all of them have decided, or the plan's cohort.approval_days are over, or with
    `start-run`.
    """
    from cytofed.lineage import start_warnings
    from cytofed.plan import load_plan, to_dict
    from cytofed.server.app import wait_for
    from cytofed.server.control import send_command
    from cytofed.server.directory import ServerDirectory
    from cytofed.server.runs import RunFolder
    from cytofed.start import with_absolute_start

    directory = ServerDirectory.open(folder)
    chosen = with_absolute_start(load_plan(plan, overrides))
    for warning in start_warnings(chosen, deployed=True):
        note(f"cytofed: warning: {warning}")
    named = [lab.strip() for lab in labs.split(",") if lab.strip()]
    queued = send_command(directory.socket, "run", plan=to_dict(chosen), labs=named)
    name = queued["run"]
    note(f"run {name}: plan {queued['plan_sha256']} waits for the labs' approval")
    if not wait:
        if as_json:
            _print_json(queued)
        return 0
    summary = wait_for(RunFolder.open(directory.runs, name))
    if as_json:
        _print_json(summary)
    else:
        say(f"run {name}: {summary['status']}")
        if summary.get("reason"):
            say(one_line(summary["reason"]))
    return {"completed": 0, "incomplete": 4}.get(summary["status"], 1)


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@_json
def status(folder: Path, as_json: bool) -> int:
    """Labs and runs, a line each."""
    from cytofed.server.control import send_command
    from cytofed.server.directory import ServerDirectory
    from cytofed.server.pki import WARN_DAYS

    found = send_command(ServerDirectory.open(folder).socket, "status")
    if as_json:
        _print_json(found)
        return 0
    say(f"federation {found['federation']}, fingerprint {found['fingerprint']}")
    days = found["certificate_days"]
    soon = ": the next start renews it" if days < WARN_DAYS else ""
    say(f"this server's certificate: {days} days{soon}")
    rows = [
        [
            lab["lab"],
            "online" if lab["online"] else "away",
            lab["last_seen"] or "never seen",
            "in no round yet" if lab["round"] is None else f"round {lab['round']}",
            f"version {lab['version'] or 'unknown'}",
            f"clock {lab['clock_s']:+.1f} s",
            f"certificate {lab['certificate_days']} days"
            + (": its daemon renews it" if lab["certificate_days"] < WARN_DAYS else ""),
        ]
        for lab in found["labs"]
    ]
    _print_rows(rows or [["no labs: cytofed server invite DIR LAB --out FILE"]])
    _print_rows([[gone["lab"], f"{gone['why']} {gone['at']}"] for gone in found["gone"]])
    _print_rows(
        [
            [r["run"], r["status"], f"{r['rounds']} rounds", f"{len(r['cohort'])} labs", _told(r)]
            for r in found["runs"]
        ]
    )
    if found["trouble"]:
        say(f"trouble: {one_line(found['trouble'])}")
    return 0


def _told(run: Mapping[str, Any]) -> str:
    """Why a run is as it is: what it waits for, or why it ended."""
    if run["reason"]:
        return one_line(run["reason"])
    if run["status"] == "approval":
        told: dict[str, list[str]] = {}
        for lab, verdict in run["decisions"].items():
            told.setdefault(verdict or "waits for", []).append(lab)
        words = {"approved": "approved by", "rejected": "rejected by"}
        return "; ".join(
            f"{words.get(what, what)} {', '.join(labs)}" for what, labs in told.items()
        )
    if run["status"] == "rounds" and not run["at_work"]:
        return "waits for its turn"
    return ""


@server.command()
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("lab")
def revoke(folder: Path, lab: str) -> int:
    """Take LAB off the roster for good, at once."""
    from cytofed.server.control import send_command
    from cytofed.server.directory import ServerDirectory

    directory = ServerDirectory.open(folder)
    try:
        send_command(directory.socket, "revoke", lab=lab)
    except InputError:  # nothing runs: the directory is all there is
        directory.revoke(lab)
    say(f"{lab} is revoked; a new invite needs new keys")
    return 0


@server.command("start-run")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("name", metavar="RUN")
@_json
def start_run(folder: Path, name: str, as_json: bool) -> int:
    """Start RUN with the labs that have approved it by now, without waiting for others."""
    from cytofed.server.control import send_command
    from cytofed.server.directory import ServerDirectory

    found = send_command(ServerDirectory.open(folder).socket, "start-run", run=name)
    if as_json:
        _print_json({"run": name, **found})
    else:
        say(f"run {name} starts with {', '.join(found['labs'])}")
    return 0


@server.command("stop-run")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.argument("name", metavar="RUN")
def stop_run(folder: Path, name: str) -> int:
    """End RUN where it is; rounds that were applied stay."""
    from cytofed.server.directory import ServerDirectory
    from cytofed.server.runs import RunFolder

    directory = ServerDirectory.open(folder)
    RunFolder.open(directory.runs, name).ask_to_stop("stopped by the coordinator")
    say(f"run {name} ends as soon as its labs are no longer waited for")
    return 0


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def _print_rows(rows: list[list[str]]) -> None:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        say("  ".join([*padded, *row[len(widths) :]]).rstrip())
