"""``cytofed client``: a lab's commands."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cytofed.console import Commands, note, say
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.words import log_to_stderr

if TYPE_CHECKING:
    from cytofed.client.policy import Entry

_FOLDER = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_folder = click.argument("folder", metavar="DIR", type=_FOLDER)


@click.group(cls=Commands)
def client() -> None:
    """Take part in a federation as a lab: approve plans, train, get the model."""


@client.command()
@click.argument("invite", type=_FOLDER)
@click.option("--dir", "folder", required=True, type=_FOLDER, help="The lab's new directory.")
@click.option("--data", required=True, type=_FOLDER, help="Folder or CSV with this lab's images.")
@click.option("--labels", help="Label map: a name or a YAML file; found by itself if left out.")
@click.option("--patients", help="Who is who: column:NAME, folder:DEPTH, name:REGEX or none.")
@click.option("--patients-declared", type=click.IntRange(1), help="Public, rounded number.")
@click.option(
    "--pool", default="default", help="Whose budget: labs with the same patients share it."
)
@click.option("--proxy", help="http://host:port of an HTTPS proxy.")
def join(
    invite: Path,
    folder: Path,
    data: Path,
    labels: str | None,
    patients: str | None,
    patients_declared: int | None,
    pool: str,
    proxy: str | None,
) -> int:
    """Make this lab's keys and enrol them with INVITE."""
    from cytofed.client.directory import join as join_federation
    from cytofed.documents import Invite

    read = Invite.load(invite)
    made = join_federation(
        read,
        folder,
        data=data,
        labels=labels,
        patients=patients,
        patients_declared=patients_declared,
        pool=pool,
        proxy=proxy,
    )
    say(f"joined {read.federation} as {read.lab}; compare by phone:")
    say(f"  coordinator {made.coordinator().fingerprint}")
    say(f"  this lab    {made.identity().public.fingerprint}")
    say(f"next: cytofed client start {folder}")
    return 0


@client.command()
@_folder
def start(folder: Path) -> int:
    """Stay connected and carry out approved plans, in the foreground."""
    from cytofed.client.daemon import Daemon
    from cytofed.client.directory import ClientDirectory
    from cytofed.heap import keep_blocks

    log_to_stderr(quiet=("flwr", "httpx", "httpcore", "torch"))
    directory = ClientDirectory.open(folder)
    if directory.left:
        raise InputError(f"this lab has left {directory.membership().federation}")

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # everything on the disk is whole at any moment

    signal.signal(signal.SIGTERM, end)
    keep_blocks()
    try:
        Daemon(directory, note=lambda text: note(f"cytofed: {text}")).run()
    except KeyboardInterrupt:
        return 0
    return 0


@client.command()
@_folder
@_json
def status(folder: Path, as_json: bool) -> int:
    """What the daemon does or waits for, in one line, and whose fingerprints to compare."""
    from cytofed.client.directory import ClientDirectory

    directory = ClientDirectory.open(folder)
    membership, said = directory.membership(), directory.said()
    found = {
        "federation": membership.federation,
        "lab": membership.lab,
        "address": membership.address,
        "daemon": dict(said) or None,
        "paused": directory.paused,
        "left": directory.left,
        "fingerprints": {
            "coordinator": membership.fingerprint,
            "lab": directory.identity().public.fingerprint,
        },
    }
    if as_json:
        _print_json(found)
        return 0
    say(f"{membership.lab} in {membership.federation}: {said.get('text', 'never started')}")
    if said:
        at = f", round {said['round']} of run {said['run']}" if said["run"] else ""
        say(f"since {said['at']}, cytofed {said['version']}{at}")
    if directory.paused and not directory.left:
        say(f"paused: no order is carried out until `cytofed client resume {folder}`")
    if directory.left:
        say(f"this lab has left {membership.federation}")
    say(f"coordinator {membership.fingerprint}")
    say(f"this lab    {directory.identity().public.fingerprint}")
    return 0


@client.command()
@_folder
@_json
def plans(folder: Path, as_json: bool) -> int:
    """Plans that were offered, with their price and what changed since the last approval."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.plan_words import summary_lines
    from cytofed.client.policy import open_ledger

    directory = ClientDirectory.open(folder)
    settings, book_of_plans = directory.settings(), directory.plans()
    with open_ledger(settings) as book:
        listing = book_of_plans.listing(settings, book)
    book_of_plans.shown(item["offer"] for item in listing["plans"])
    if as_json:
        _print_json(listing)
        return 0
    if not listing["plans"]:
        say("no plan was offered yet")
    for item in listing["plans"]:
        for line in summary_lines(item, folder):
            say(line)
    return 0


@client.group(cls=Commands)
def plan() -> None:
    """One offered plan."""


@plan.command("show")
@_folder
@click.argument("offer", metavar="OFFER")
@_json
def plan_show(folder: Path, offer: str, as_json: bool) -> int:
    """All of an offered plan in words: price, budget, labs, changes, warnings, every key.

    OFFER: the offer's id, as `plans` prints it, or its plan's hash.
    """
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.plan_words import plan_in_words
    from cytofed.client.policy import open_ledger
    from cytofed.plan import to_dict

    directory = ClientDirectory.open(folder)
    settings, book_of_plans = directory.settings(), directory.plans()
    entry = book_of_plans.find(offer, "waiting", "approved")
    with open_ledger(settings) as book:
        listed = book_of_plans.listed(entry, settings, book)
        budget = book.summary()
    if as_json:
        kept = {key: budget[key] for key in ("pool", "unit", "spent", "held", "limit")}
        _print_json({**listed, "budget": kept, "plan": to_dict(entry.offer.plan)})
    else:
        for line in plan_in_words(entry, listed, settings):
            say(line)
    book_of_plans.shown([entry.sha256], also=True)
    return 0


@client.command()
@_folder
@click.argument("offer", metavar="OFFER")
@click.option("--by", default=None, help="Who approves; client.yaml can ask for several persons.")
@click.option("--note", default="", help="For this lab's own record.")
@_json
def approve(folder: Path, offer: str, by: str | None, note: str, as_json: bool) -> int:
    """Approve an offer: its price is set aside, and its labs' keys are pinned.

    OFFER: its id, as `plans` prints it; or its plan's hash, where only one offer of the plan came
    and `plans` has shown it. Never asks a question.
    """
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.plan_words import plan_in_words
    from cytofed.client.policy import open_ledger

    directory = ClientDirectory.open(folder)
    settings, book_of_plans = directory.settings(), directory.plans()
    if by is not None and not by.strip():
        raise InputError("--by has no name", hint="name the person who approves, or leave it out")
    with open_ledger(settings) as book:
        before = book_of_plans.entries()
        entry = book_of_plans.approve(offer, settings, book, by=by or "", note=note)
        ended = [e for e in book_of_plans.entries() if e.ended and not _of(before, e).ended]
        listed = book_of_plans.listed(entry, settings, book)
    if as_json:
        _print_json({key: listed[key] for key in _DECIDED})
        return 0
    for line in plan_in_words(entry, listed, settings):
        say(line)
    given, needed = len(entry.approvals), settings.approvals
    if _of(before, entry).state == "approved":
        say(f"offer {entry.sha256} was approved before: nothing is changed")
        if by or note:
            say("the name and the note given now are not kept; to decide anew, reject it first")
    elif entry.state == "approved":
        for other in ended:
            say(f"run {other.run} is over for this lab: one approval pays for one run of a plan")
        say(f"approved offer {entry.sha256}, plan {entry.plan_sha256}, for run {entry.run}")
    else:
        say(f"{given} of {needed} approved; it waits for another person:")
        say(f"cytofed client approve {folder} {entry.sha256} --by NAME")
    return 0


def _of(entries: Iterable[Entry], entry: Entry) -> Entry:
    """The same offer as it stood before."""
    return next((known for known in entries if known.sha256 == entry.sha256), entry)


_DECIDED = (
    "offer", "plan_sha256", "state", "run", "reason", "approvals", "approvals_needed",
)  # fmt: skip


@client.command()
@_folder
@click.argument("offer", metavar="OFFER")
@click.option("--reason", default="", help="For this lab's own record.")
@_json
def reject(folder: Path, offer: str, reason: str, as_json: bool) -> int:
    """Reject an offer, or take an approval back; by its plan's hash, all offers of that plan."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.policy import open_ledger

    directory = ClientDirectory.open(folder)
    settings, book_of_plans = directory.settings(), directory.plans()
    with open_ledger(settings) as book:
        entry = book_of_plans.reject(offer, book, reason=reason)
        listed = book_of_plans.listed(entry, settings, book)
    if as_json:
        _print_json({key: listed[key] for key in _DECIDED})
    else:
        say(f"rejected offer {entry.sha256}, plan {entry.plan_sha256}, for run {entry.run}")
    return 0


@client.command()
@_folder
def pause(folder: Path) -> int:
    """Refuse all orders until `resume`; nothing is lost."""
    from cytofed.client.directory import ClientDirectory

    ClientDirectory.open(folder).pause()
    say("paused")
    return 0


@client.command()
@_folder
def resume(folder: Path) -> int:
    """Take orders again."""
    from cytofed.client.directory import ClientDirectory

    ClientDirectory.open(folder).resume()
    say("resumed")
    return 0


@client.command()
@_folder
def leave(folder: Path) -> int:
    """Leave the federation and tell the coordinator. Nothing of the lab's is deleted."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.egress import EgressLog, LogInUse
    from cytofed.client.fleet import tell_leave
    from cytofed.client.policy import open_ledger

    directory = ClientDirectory.open(folder)
    directory.leave()
    with open_ledger(directory.settings()) as book:
        directory.plans().left(book)
    say("left; keys, ledger, logs and models stay here")
    try:
        with EgressLog(directory.egress, directory.identity()) as log:
            tell_leave(directory, log)
    except LogInUse:
        say("the daemon tells the coordinator, and ends")
    except RefusedError:
        say("the coordinator does not know this lab any more")
    except CytofedError as error:
        raise CytofedError(
            f"this lab has left, and the coordinator could not be told: {error.message}",
            hint=f"cytofed client leave {folder}, again when it can be reached",
        ) from None
    else:
        say("the coordinator knows")
    return 0


@client.command()
@_folder
@click.option("--out", required=True, type=_FOLDER, help="File to write the model to.")
def model(folder: Path, out: Path) -> int:
    """The newest model of a run that this lab took part in, with its card."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.files import write_atomically

    directory = ClientDirectory.open(folder)
    results = sorted(
        (json.loads(file.read_text())["received_at"], file.parent)
        for file in (directory.root / "models").glob("*/result.json")
        if (file.parent / "model.safetensors").is_file()
    )
    if not results:
        raise InputError("no model has arrived yet", hint="see `cytofed client status`")
    newest = results[-1][1]
    write_atomically(out, (newest / "model.safetensors").read_bytes())
    card = out.with_suffix(".card.md")
    write_atomically(card, (newest / "model_card.md").read_text())
    kept = json.loads((newest / "result.json").read_text())
    say(f"model of run {kept['run']} ({kept['status']}) in {out}, card in {card}")
    return 0


@client.command()
@_folder
@click.option("--restore-charge", is_flag=True, help="Charge all approved plans after a rollback.")
@_json
def budget(folder: Path, restore_charge: bool, as_json: bool) -> int:
    """What was spent and is held on this lab's patients."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.egress import accept_cut, read_report
    from cytofed.client.fleet import unknown_heads
    from cytofed.client.policy import budget as read_budget
    from cytofed.client.policy import restore_charge as charge
    from cytofed.privacy.accounting import shown

    directory = ClientDirectory.open(folder)
    settings = directory.settings()
    if restore_charge:
        report = read_report(directory.egress, directory.identity().public)
        heads = [str(r.body.get("ledger_head", "")) for r in report.messages]
        heads += unknown_heads(directory)
        found = charge(settings, directory.plans(), seen_heads=[h for h in heads if h])
        accept_cut(directory.egress)
    else:
        found = read_budget(settings)
    if as_json:
        _print_json(found)
        return 0
    say(f"pool {found['pool']}: everything ever spent and held, over all federations and plans")
    since = found["unbounded"]
    for key in ("spent", "held", "total"):
        value = found[key]
        if value["epsilon"] is None:
            when = f" since {since['since'][:10]}, run {since['run']}" if since else ""
            say(f"{key:6} unbounded{when}: without differential privacy")
            continue
        say(
            f"{key:6} epsilon {shown(value['epsilon'])} at delta {value['delta']:g}, per "
            f"{found['unit']}, by {value['accountant']}"
        )
    limits = [
        f"epsilon {found['limit'][key]:g}{of}"
        for key, of in (("epsilon", ""), ("epsilon_per_year", " in a year"))
        if found["limit"][key] is not None
    ]
    say(f"limit  {', '.join(limits) or 'none is set in client.yaml'}")
    return 0


@client.command()
@_folder
@click.option("--verify", "check", is_flag=True, help="Check chain and signatures; exit 0 or 5.")
@_json
def egress(folder: Path, check: bool, as_json: bool) -> int:
    """Everything that left this lab."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.egress import check_against_ledger, verify
    from cytofed.client.policy import ledger_federation, open_ledger

    directory = ClientDirectory.open(folder)
    membership = directory.membership()
    report = verify(directory.egress, directory.identity().public)
    if check:
        name = ledger_federation(membership.federation, membership.lab)
        with open_ledger(directory.settings()) as book:
            check_against_ledger(report, book, federation=name)
    if as_json:
        _print_json(report.to_json())
        return 0
    for record in report.messages:
        body = record.body
        say(f"{record.at:%Y-%m-%d %H:%M:%S}  {body['type']:10}  {body['nbytes']:>10,} bytes  "
            f"{_where(body)}{body['sha256'][:16]}")  # fmt: skip
    for kind, sizes in sorted(report.routine.items()):
        total = sum(size * count for size, count in sizes.items())
        say(f"routine              {kind:10}  {total:>10,} bytes  {sum(sizes.values())} requests")
    if check:
        say(f"verified: {len(report.messages)} messages, head {report.head[:16]}")
    return 0


def _where(body: Mapping[str, Any]) -> str:
    """Run and round of a message, where it is of one."""
    if not body["run"]:
        return ""
    return f"{body['run']} round {body['round']}  " if body["round"] else f"{body['run']}  "


@client.command()
@_folder
@click.option("--out", required=True, type=_FOLDER, help="HTML file to write.")
def dossier(folder: Path, out: Path) -> int:
    """One page for the data-protection officer, from this lab's own records."""
    from cytofed.client.directory import ClientDirectory
    from cytofed.client.dossier import Facts, write_dossier
    from cytofed.client.egress import verify
    from cytofed.client.policy import budget as read_budget

    directory = ClientDirectory.open(folder)
    membership, settings = directory.membership(), directory.settings()
    own = directory.identity().public
    facts = Facts(
        own=own,
        federation=membership.federation,
        coordinator=directory.coordinator(),
        address=membership.address,
        settings=settings,
        egress=verify(directory.egress, own),
        budget=read_budget(settings),
        plans=directory.plans().entries(),
        made_at=datetime.now(UTC),
    )
    write_dossier(out, facts)
    say(f"dossier of {membership.lab} in {out}")
    return 0


@client.command()
@_folder
@_json
def check(folder: Path, as_json: bool) -> int:
    """Look at everything that a run needs; each line is ok or says what to do."""
    from cytofed.client import doctor
    from cytofed.client.directory import ClientDirectory

    directory = ClientDirectory.open(folder)
    membership, settings, root = directory.membership(), directory.settings(), directory.root
    host, _, port = membership.address.rpartition(":")
    secrets = [root / name for name in ("identity.key", "node.key")]
    if not (settings.storage_key or "").startswith("credential:"):
        secrets.append(root / "storage.key")
    findings = doctor.examine(
        settings,
        doctor.Files(root, secrets, directory.egress),
        own=directory.identity().public,
        federation=membership.federation,
        coordinator=doctor.Coordinator(
            host=host.strip("[]"),
            port=int(port),
            ca=root / "ca.pem",
            certificate=root / "certificate.pem",
            key=root / "node.key",
            timeout_s=settings.timeouts.connect_s,
            proxy=settings.proxy,
        ),
    )
    if as_json:
        _print_json(doctor.to_json(findings))
    else:
        for finding in findings:
            say(f"{finding.state:4}  {finding.name}: {finding.detail}")
            if finding.way_out:
                say(f"      {finding.way_out}")
    if not doctor.passed(findings):
        raise VerificationError("the check found something to mend")
    return 0


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")
