"""The command line. Commands read flags, call one function and print what it returns.

Exit codes: 0 done; 1 failed run or internal error; 2 bad input or usage; 3 refused by policy or
budget; 4 run incomplete; 5 verification failed; 130 interrupted (resumable).
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cytofed import __version__
from cytofed.client.cli import client
from cytofed.console import Commands, note, print_error, say, stdout
from cytofed.errors import CytofedError, InputError
from cytofed.server.cli import server

_FOLDER = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


class _Sections(Commands):
    """A group whose help lists commands in the order in which they are written here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cytofed", message="%(prog)s %(version)s")
def cli() -> None:
    """Labs train one cell-morphology classifier together; no image leaves a lab.

    \b
    Try it:          cytofed simulate
    On your images:  cytofed data check DIR
                     cytofed simulate --data DIR --labs 4 --partition acquisition

    Every command that prints a result takes --json.
    """


# --- simulate


@cli.command()
@click.argument("plan", required=False)
@click.option("--data", multiple=True, type=_FOLDER, help="Folder with images; may be repeated.")
@click.option("--labels", multiple=True, help="Label map: a name or a YAML file, one per --data.")
@click.option("--patients", help="Who is who: column:NAME, folder:DEPTH, name:REGEX or none.")
@click.option("--labs", type=int, help="How many virtual labs.")
@click.option(
    "--partition",
    help="Who holds what: iid, dirichlet:ALPHA, quantity:SIGMA, classes:K, acquisition, sources, "
    "column:NAME; with +stain:STRENGTH and +missing:K.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any key of the plan.")
@click.option("--seed", type=int, help="Sets train.seed.")
@click.option("--backend", default="inprocess", type=click.Choice(["inprocess", "ray"]))
@click.option("--jobs", type=click.IntRange(1), help="Worker processes; default: one per core.")
@click.option("--out", type=_FOLDER, help="Run directory; default: runs/NAME-TIME.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@_json
def simulate(**flags: Any) -> int:
    """Cut a data set into virtual labs and run a federation on them.

    PLAN is a YAML file or a built-in plan: `marrow` is used when --data is given, `demo` on the
    sample images of the package otherwise. Results are the same for the same data, plan and seed.
    """
    from cytofed.console import RunProgress
    from cytofed.simulations.report import render_summary
    from cytofed.simulations.simulate import make_request
    from cytofed.simulations.simulate import simulate as run

    as_json = flags.pop("as_json")
    request = make_request(**flags)
    if not as_json:
        note(f"cytofed simulate: plan {request.plan.name}, results in {request.out}")
    with RunProgress() as progress:
        try:
            summary = run(request, progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"go on with: cytofed simulate --resume --out {request.out}"
            ) from None
    if as_json:
        _print_json(summary)
    else:
        render_summary(summary, stdout, run_dir=request.out)
    if summary["status"] == "failed":
        reasons = [
            text for record in summary["participation"] for text in record["absent"].values()
        ]
        note(f"no round moved the model; {reasons[0] if reasons else 'no lab answered'}")
    return {"completed": 0, "incomplete": 4}.get(summary["status"], 1)


@cli.command()
@click.argument("sweep", type=_FOLDER)
@click.option(
    "--data", multiple=True, type=_FOLDER, help="Folder with images, instead of the file's."
)
@click.option("--jobs", type=click.IntRange(1), help="Runs at once; default: one per core.")
@click.option("--out", type=_FOLDER, help="Sweep directory; default: sweeps/NAME-TIME.")
@click.option("--resume", is_flag=True, help="Go on with the sweep in --out.")
@_json
def sweep(
    sweep: Path,
    data: tuple[Path, ...],
    jobs: int | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Run a grid or list of simulations; one table, figures and a report.

    SWEEP is a YAML file: `plan`, `data`, `labels`, `patients`, `set`, `grid`, `list`, `seeds`. A
    run that fails is a row with its error. Exit code 4 when some run did not complete, 1 when none
    left a model.
    """
    from cytofed.console import SweepProgress
    from cytofed.simulations.sweep import default_out, read_sweep, run_sweep
    from cytofed.simulations.sweep_table import render_sweep

    asked = read_sweep(sweep, data=data)
    if resume and out is None:
        raise InputError("--resume needs the sweep's directory", hint="add --out DIR")
    folder = out or default_out(asked)
    if not as_json:
        note(f"cytofed sweep: {asked.name}, {len(asked.runs)} runs, results in {folder}")
    with SweepProgress(len(asked.runs)) as progress:
        try:
            found = run_sweep(asked, folder, jobs=jobs, resume=resume, watch=progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"go on with: cytofed sweep {sweep} --resume --out {folder}"
                + "".join(f" --data {path}" for path in data)
            ) from None
    if as_json:
        _print_json(found)
    else:
        render_sweep(found, stdout, out=folder)
    return {"completed": 0, "incomplete": 4}.get(found["status"], 1)


# --- models and runs


@cli.command()
@click.argument("model", type=_FOLDER)
@click.option("--data", multiple=True, required=True, type=_FOLDER, help="Labelled images.")
@click.option("--labels", multiple=True, help="Label map: a name or a YAML file, one per --data.")
@click.option("--only", help="Codes that count, comma-separated; images of others are left out.")
@_json
def evaluate(
    model: Path, data: tuple[Path, ...], labels: tuple[str, ...], only: str | None, as_json: bool
) -> int:
    """Score MODEL on labelled folders."""
    from cytofed.client.predict import evaluate_model
    from cytofed.simulations.report import render_scores

    codes = [code.strip() for code in only.split(",")] if only else []
    scores = evaluate_model(model, data, labels=labels, only=codes)
    if as_json:
        _print_json(scores)
    else:
        render_scores(scores, stdout)
    return 0


@cli.command()
@click.argument("model", type=_FOLDER)
@click.argument("images", nargs=-1, required=True, type=_FOLDER)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1))
@click.option("--field-um", type=float, help="Width of the images' field of view in um.")
@_json
def predict(
    model: Path, images: tuple[Path, ...], top: int, field_um: float | None, as_json: bool
) -> int:
    """The most likely classes of images, as CSV or with --json.

    IMAGES are files or folders. An image that cannot be read has its problem in its row.
    """
    from cytofed.client.predict import predict_images

    rows = predict_images(model, images, top=top, field_um=field_um)
    if as_json:
        _print_json(
            {
                "predictions": [
                    {"path": str(row.path), "problem": row.problem or None}
                    | {"classes": [{"code": c, "probability": p} for c, p in row.classes]}
                    for row in rows
                ]
            }
        )
        return 0
    first = next(rows)  # what cannot be used stops here, before anything is printed
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = [text for k in range(1, top + 1) for text in (f"code_{k}", f"probability_{k}")]
    writer.writerow(["path", *columns, "problem"])
    for row in itertools.chain([first], rows):
        values = [text for code, p in row.classes for text in (code, f"{p:.4f}")]
        writer.writerow([row.path, *values, *[""] * (2 * top - len(values)), row.problem])
    return 0


@cli.command()
@click.argument("run", type=_FOLDER)
@_json
def report(run: Path, as_json: bool) -> int:
    """Write the report.html of RUN, a run or a sweep, again and print its summary."""
    from cytofed.simulations.report import read_run, render_summary, write_report
    from cytofed.simulations.sweep_report import is_sweep, read_found
    from cytofed.simulations.sweep_report import write_report as write_sweep_report
    from cytofed.simulations.sweep_table import render_sweep

    if is_sweep(run):
        found = read_found(run)
        write_sweep_report(run)
        if as_json:
            _print_json(found)
        else:
            render_sweep(found, stdout, out=run)
        return 0
    summary = dict(read_run(run).summary)
    write_report(run)
    if as_json:
        _print_json(summary)
    else:
        render_summary(summary, stdout, run_dir=run)
    return 0


@cli.command()
@click.argument("run", type=_FOLDER)
@click.option("--controls", is_flag=True, help="Plant known faults; show which check catches each.")
@click.option(
    "--attacks",
    is_flag=True,
    help="Infer members, rebuild images, show the coordinator's view; with pictures.",
)
@_json
def audit(run: Path, controls: bool, attacks: bool, as_json: bool) -> int:
    """Hold RUN's claimed epsilon against what canaries prove, and tell what else it reveals.

    Writes RUN/audit.json and RUN's report.html. Exit code 5 for a violation, or for a planted
    fault that no check catches.
    """
    from cytofed.simulations.audit import audit as examine
    from cytofed.simulations.audit import refuse_violation, render_audit

    found = examine(run, controls=controls, attacks=attacks, tell=note)
    if as_json:
        _print_json(found)
    else:
        render_audit(found, stdout, run_dir=run)
    refuse_violation(found)
    return 0


@cli.command()
@click.option("--data", multiple=True, required=True, type=_FOLDER, help="Public images.")
@click.option("--labels", multiple=True, help="Label map: a name or a YAML file, one per --data.")
@click.option("--scheme", default="bone-marrow-21", show_default=True, help="Label scheme.")
@click.option(
    "--out", required=True, type=_FOLDER, help="FILE.safetensors; its card is FILE.json beside it."
)
@click.option(
    "--objective",
    default="both",
    show_default=True,
    type=click.Choice(["supervised", "contrastive", "both"]),
    help="Learn from labels, from pairs of views of one image, or from both.",
)
@click.option("--epochs", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--width", default=32, show_default=True, type=click.IntRange(8, 256))
@click.option("--size-px", default=64, show_default=True, type=click.IntRange(16, 512))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--licence", default="not stated", help="Of the images; goes to the card.")
@click.option("--attribution", default="not stated", help="Whose images they are; for the card.")
@click.option("--note", "remark", default="", help="One more sentence for the card.")
@click.option("--resume", is_flag=True, help="Go on with the run that --out began.")
@_json
def pretrain(
    data: tuple[Path, ...],
    labels: tuple[str, ...],
    scheme: str,
    out: Path,
    objective: Any,
    epochs: float,
    width: int,
    size_px: int,
    seed: int,
    licence: str,
    attribution: str,
    remark: str,
    resume: bool,
    as_json: bool,
) -> int:
    """Train an encoder on public images, to start plans from, with a card of what it has seen."""
    from cytofed.simulations.pretrain import Recipe, Request
    from cytofed.simulations.pretrain import pretrain as run

    recipe = Recipe(objective=objective, epochs=epochs, width=width, size_px=size_px, seed=seed)
    request = Request(data, out, recipe, scheme, labels, licence, attribution, remark, resume)
    try:
        card = run(request, note)
    except KeyboardInterrupt:
        raise Interrupted("add --resume to go on from the last checkpoint") from None
    if as_json:
        shown = {**asdict(card), "images_sha256": len(card.images_sha256)}
        _print_json(shown)
    else:
        say(f"{out}: {card.architecture['parameters']:,} parameters")
        say(f"{out.with_suffix('.json')}: card, {len(card.images_sha256):,} images")
    return 0


# --- plan


@cli.group(cls=_Sections)
def plan() -> None:
    """Check a plan and show what it asks of a lab."""


_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any key of the plan."
)


@plan.command("check")
@click.argument("plan")
@_overrides
@_json
def plan_check(plan: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check PLAN: keys, values, and that its parts fit together."""
    from cytofed.plan import load_plan
    from cytofed.plan_check import check_plan, delta_told

    chosen = load_plan(plan, overrides)
    warnings = check_plan(chosen)
    if as_json:
        found = {"plan_sha256": chosen.sha256, "ok": True, "warnings": warnings}
        _print_json(found)
    else:
        say(f"ok: plan {chosen.name}, sha256 {chosen.sha256}")
        if told := delta_told(chosen):
            say(told)
        for warning in warnings:
            say(f"warning: {warning}")
    return 0


@plan.command("show")
@click.argument("plan")
@_overrides
@_json
def plan_show(plan: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Show PLAN with every key, its hash and its price."""
    from cytofed.plan import dump_plan, load_plan, to_dict
    from cytofed.plan_check import check_plan, delta_told, price
    from cytofed.work import work_of

    chosen = load_plan(plan, overrides)
    warnings = check_plan(chosen)
    cost = price(chosen)
    if as_json:
        shown = {"plan_sha256": chosen.sha256, "plan": to_dict(chosen), "warnings": warnings}
        _print_json(shown | cost)
        return 0
    say(dump_plan(chosen))
    say(f"\nsha256   {chosen.sha256}")
    say(f"rounds   {cost['rounds']}")
    for line in work_of(chosen).lines():
        say(f"work     {line}")
    up, down = cost["bytes"]["up_per_lab_round"], cost["bytes"]["down_per_lab_round"]
    say(
        f"bytes    {up:,} up, {down:,} down, per lab and round "
        f"({cost['bytes']['parameters']:,} parameters)"
    )
    say(
        f"         {up * cost['rounds'] / 1e6:,.1f} MB up, {down * cost['rounds'] / 1e6:,.1f} MB "
        "down, per lab over the run"
    )
    say(f"privacy  {cost['privacy']['statement']}")
    if told := delta_told(chosen):
        say(f"         {told}")
    for name in ("evaluation", "total"):
        if cost.get(name):
            say(f"{name:<8} {cost[name]['statement']}")
    for warning in warnings:
        say(f"warning: {warning}")
    return 0


# --- data


@cli.group(cls=_Sections)
def data() -> None:
    """Look at a lab's images before anything is trained."""


@data.command("check")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--labels", help="Label map: a name or a YAML file.")
@click.option("--scheme", default="bone-marrow-21", show_default=True, help="Label scheme.")
@click.option("--patients", help="Who is who: column:NAME, folder:DEPTH, name:REGEX or none.")
@_json
def data_check(
    folder: Path, labels: str | None, scheme: str, patients: str | None, as_json: bool
) -> int:
    """Account for every file in DIR: classes, damage, duplicates, patients, identifiers."""
    from cytofed.client.check import check_data, render
    from cytofed.labels import load_map, load_scheme

    label_map = load_map(labels) if labels else None
    found = check_data(folder, load_scheme(scheme), label_map=label_map, patients=patients)
    if as_json:
        _print_json(found.to_json())
    else:
        render(found, stdout)
    return 0


# --- a federation of real labs

cli.add_command(server)
cli.add_command(client)


# --- running


class Interrupted(CytofedError):
    """Stopped by Ctrl-C; the hint says how to go on."""

    exit_code = 130

    def __init__(self, hint: str = "") -> None:
        super().__init__("interrupted", hint=hint)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        result = run()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "", file=sys.stderr)
        return 2
    except click.ClickException as error:
        print_error(_usage_error(error))
        return 2
    except (click.Abort, KeyboardInterrupt):
        print_error(Interrupted())
        return 130
    except CytofedError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("CYTOFED_DEBUG"):
            raise
        print_error(
            CytofedError(
                f"internal error: {type(error).__name__}: {error}",
                hint="set CYTOFED_DEBUG=1 to see where",
            )
        )
        return 1
    return result if isinstance(result, int) else 0


def _usage_error(error: click.ClickException) -> InputError:
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"see `{error.ctx.command_path} --help`"
    message = error.format_message()
    return InputError(message[:1].lower() + message[1:].rstrip("."), hint=hint)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: resumable
    sys.exit(_exit_code(lambda: cli.main(prog_name="cytofed", standalone_mode=False)))


if __name__ == "__main__":
    main()
