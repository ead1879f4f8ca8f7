"""The dossier: one page for the data-protection officer, made from this lab's own records.

What left, on whose approval, at what price in privacy, under which keys, over which connection,
for how long, and how to stop it; in the words of GDPR Art. 30 and 35, so that it can be filed.

Each number carries the hash it comes from: of a record of the egress log, of the log's head where
it is a sum over the log, of the privacy ledger's head, or of a plan. Who doubts a number looks up
the hash: ``cytofed client egress DIR --verify --json`` and ``cytofed client budget DIR --json``.

The page is one file without scripts; nothing is loaded, nothing is sent. What only the lab knows
(controller, contacts, legal basis) is left to be filled in, and marked so. It is no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from cytofed import __version__
from cytofed.client.egress import FIELDS, ROUTINE, EgressReport, Record
from cytofed.client.policy import BY_RULE, Entry, fingerprints
from cytofed.client.settings import Settings
from cytofed.files import write_atomically
from cytofed.page import page
from cytofed.privacy.accounting import shown
from cytofed.privacy.identity import PublicIdentity

SHORT = 12
"""digits of a hash that are shown; the whole one is in the title of each"""
MANY_ROWS = 40


@dataclass(frozen=True)
class Facts:
    """All that a dossier is made from. ``budget``: of ``Ledger.summary``."""

    own: PublicIdentity
    federation: str
    coordinator: PublicIdentity
    address: str
    settings: Settings
    egress: EgressReport
    budget: Mapping[str, Any]
    plans: Sequence[Entry]
    made_at: datetime


def write_dossier(path: Path, facts: Facts) -> None:
    """Write the page; readable by its owner only, for fingerprints and plans are in it."""
    write_atomically(path, render(facts), mode=0o600)


def render(facts: Facts) -> str:
    """The page as text. Guarantees: the same facts give the same bytes; all text is escaped."""
    sections = (
        _left(facts),
        _approved(facts),
        _budget(facts),
        _record_of_processing(facts),
        _impact(facts),
        _network(facts),
        _keys(facts),
        _retention(facts),
        _withdrawal(),
        _threats(),
        _check(facts),
    )
    title = f"Data-protection dossier of {facts.own.name}"
    return page(
        title=title,
        heading=title,
        headline=_headline(facts),
        sections="\n".join(sections),
        css=_CSS,
        footer=_FOOTER,
    )


# --- numbers and where they come from


def _hash(kind: str, value: str) -> str:
    """A hash to look up; the whole of it is in the title."""
    if not value:
        return ""
    label = f"{kind} {value}"
    return f'<code class="ref" title="{escape(label)}">{escape(value[:SHORT])}</code>'


def _from_record(record: Record) -> str:
    return _hash(f"egress record {record.number},", record.hash)


def _from_log(facts: Facts) -> str:
    return _hash("head of the egress log,", facts.egress.head)


def _from_ledger(facts: Facts) -> str:
    return _hash("head of the privacy ledger,", str(facts.budget["head"]))


def _epsilon(guarantee: Mapping[str, Any], unit: str) -> str:
    value = guarantee["epsilon"]
    if value is None:
        return "unbounded: without differential privacy"
    by = f", by {guarantee['accountant']}" if guarantee.get("accountant") else ""
    return f"epsilon {shown(float(value))} at delta {guarantee['delta']:g}, per {unit}{by}"


def _since(budget: Mapping[str, Any]) -> str:
    """Since when, and by which run, nothing bounds what may be known; empty where it is bounded."""
    found = budget.get("unbounded")
    return "" if not found else f"since {found['since'][:10]}, run {found['run']}"


def _day(at: datetime) -> str:
    return f"<span class=day>{at:%Y-%m-%d}</span>"


def _bytes(count: int) -> str:
    """A size as HTML, with a space that does not break."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f}&nbsp;{unit}" if unit == "bytes" else f"{size:.1f}&nbsp;{unit}"
        size /= 1000
    return f"{size:.1f}&nbsp;GB"


# --- sections


def _headline(facts: Facts) -> str:
    report, messages = facts.egress, facts.egress.messages
    approved = [entry for entry in facts.plans if entry.state == "approved"]
    total = sum(int(record.body["nbytes"]) for record in messages)
    spent = facts.budget["spent"]["epsilon"]
    tiles = (
        ("messages that left", f"{len(messages):,}", _from_log(facts)),
        ("bytes in them", _bytes(total), _from_log(facts)),
        ("plans approved", str(len(approved)), " ".join(_plan_refs(approved))),
        (
            f"epsilon spent, per {facts.budget['unit']}",
            escape(f"unbounded {_since(facts.budget)}") if spent is None else shown(float(spent)),
            _from_ledger(facts),
        ),
    )
    begin = report.records[0].at
    return (
        f"<p class=lead>Lab <b>{escape(facts.own.name)}</b> in the federation "
        f"<b>{escape(facts.federation)}</b>, {begin:%Y-%m-%d} to {facts.made_at:%Y-%m-%d}. "
        "No image, file name or patient identifier is among what left: the log below lists every "
        "message, and its program sends nothing that is not listed.</p>"
        "<dl class=tiles>"
        + "".join(
            f'<div class="tile"><dt>{escape(name)}</dt><dd>{value}</dd><p>{ref}</p></div>'
            for name, value, ref in tiles
        )
        + "</dl>"
    )


def _plan_refs(entries: Iterable[Entry]) -> list[str]:
    return [_hash("plan", sha) for sha in dict.fromkeys(e.plan_sha256 for e in entries)][:4]


_MEANING = {
    "update": "change of the model's weights (and momentum, or control variate) after training",
    "masked": "change of weights, or counts, under masks: readable only in the cohort's sum",
    "evaluation": "counts of right and wrong predictions; noised where the plan is private",
    "hello": "the lab's name and, without privacy, how many images it has",
    "secagg": "keys and sealed shares of secure aggregation; nothing about images",
    "refusal": "a reason for not doing what was asked",
    "decision": "approval or rejection of a plan",
    "enrolment": "public keys and the declared number of patients, once",
    "renewal": "a request for a new certificate",
    "status": "that the lab is up, its version and clock",
    "leave": "that the lab left",
}


def _left(facts: Facts) -> str:
    by_type: dict[str, list[Record]] = {}
    for record in facts.egress.messages:
        by_type.setdefault(str(record.body["type"]), []).append(record)
    rows = []
    for kind, records in sorted(by_type.items()):
        total = sum(int(record.body["nbytes"]) for record in records)
        names = dict.fromkeys(
            _field(field) for record in records[-3:] for field in record.body["fields"]
        )
        rows.append(
            (
                escape(kind),
                escape(_MEANING.get(kind, "")),
                escape(", ".join(names)),
                f"{len(records):,}",
                _bytes(total),
                f"{_day(records[0].at)}<br>{_day(records[-1].at)}",
                f"{_from_record(records[0])}<br>{_from_record(records[-1])}",
            )
        )
    routine = [
        (
            escape(kind),
            f"{sum(sizes.values()):,}",
            _bytes(sum(size * count for size, count in sizes.items())),
            _bytes(max(sizes)),
            _from_log(facts),
        )
        for kind, sizes in sorted(facts.egress.routine.items())
    ]
    open_ = facts.egress.routine_at_most
    uncounted = (
        f"<p>At most {open_:,} more routine messages left in times that a crash ended, or since "
        f"the last record {_from_log(facts)}.</p>"
        if open_
        else ""
    )
    silent = [kind for kind in FIELDS if kind not in by_type]
    return _section(
        "What left this lab",
        "<p>Every message is written into a signed, hash-chained log before it leaves. What is "
        "not on the list of its type is refused by the lab's own program.</p>"
        + _table(
            ("type", "what it is", "fields", "messages", "bytes", "first, last", "records"), rows
        )
        + f"<p>Types that may leave and did not: {escape(', '.join(silent) or 'none')}.</p>"
        + "<h3>Routine messages</h3>"
        "<p>Requests without content of the lab's: asking for work, telling that it is up.</p>"
        + _table(("kind", "messages", "bytes", "largest", "record"), routine)
        + uncounted
        + "<h3>Each round</h3>"
        + _rounds(facts),
    )


def _field(field: Mapping[str, Any]) -> str:
    shape = "×".join(str(size) for size in field["shape"])
    return f"{field['name']} ({field['dtype']} {shape})" if shape else str(field["name"])


def _rounds(facts: Facts) -> str:
    answers = [r for r in facts.egress.messages if r.body["type"] in ("update", "masked")]
    rows = []
    for record in answers[-MANY_ROWS:]:
        body, privacy = record.body, record.body["protection"]
        rows.append(
            (
                f"{record.at:%Y-%m-%d %H:%M}",
                escape(str(body["run"])),
                str(body["round"]) + (" (again)" if body.get("again") else ""),
                f"{int(body['nbytes']):,}",
                _number(privacy["clip"]),
                _number(privacy["sigma"]),
                _number(privacy["epsilon"]),
                _hash("privacy ledger at", str(body["ledger_head"])),
                _from_record(record),
            )
        )
    more = len(answers) - len(rows)
    note = f"<p>{more:,} earlier ones are in the log {_from_log(facts)}.</p>" if more > 0 else ""
    head = ("time", "run", "round", "bytes", "clip", "sigma", "epsilon so far", "ledger", "record")
    return _table(head, rows) + note


def _number(value: object) -> str:
    return "–" if not isinstance(value, int | float) else f"{value:.4g}"


def _approved(facts: Facts) -> str:
    rows = []
    for entry in facts.plans:
        privacy = (entry.price or {}).get("privacy") or {}
        out = (entry.price or {}).get("bytes_out") or {}
        decided = "–" if entry.decided_at is None else _day(entry.decided_at)
        changes = "<br>".join(escape(change) for change in entry.changes[:8])
        more = len(entry.changes) - 8
        rows.append(
            (
                f"{escape(entry.offer.plan.name)}<br>{_hash('plan', entry.plan_sha256)}",
                f"{escape(entry.run)}<br>{_hash('offer', entry.sha256)}",
                escape(_state(entry)),
                decided,
                _persons(facts, entry),
                _price(entry, str(privacy.get("statement", "–"))),
                _bytes(int(out["total"])) if out else "–",
                str(len(entry.offer.roster.members)),
                changes + (f"<br>and {more} more" if more > 0 else "") or "–",
            )
        )
    head = (
        "plan", "run, offer", "state", "decided", "by", "price", "bytes out", "labs", "changes",
    )  # fmt: skip
    return _section(
        "What this lab decided",
        "<p>Nothing is trained before a person here has approved an offer: a plan, for one run, "
        "over labs with these keys. Any change is another offer with another id, and waits anew; "
        "one that was replaced stays in this table. "
        + _how_many(facts.settings)
        + "Who approved stands in a record of this lab; the lab's signed decision carries its "
        "hash, and no name leaves. "
        + (
            "Plans within strict limits are approved without a person: <b>auto_approve is on</b>."
            if facts.settings.auto_approve.enabled
            else "Approval without a person is off."
        )
        + "</p>"
        + _table(head, rows),
    )


def _price(entry: Entry, statement: str) -> str:
    """What was promised as the plan was approved, and what that is not the whole of: before all
    what the model that it starts from was trained on."""
    warnings = (entry.price or {}).get("warnings") or []
    return "<br>".join(escape(text) for text in (statement, *map(str, warnings)))


def _how_many(settings: Settings) -> str:
    if settings.approvals > 1:
        return f"Each needs the approvals of <b>{settings.approvals} persons</b>. "
    return "One person's approval is enough (<code>approvals</code> in client.yaml). "


def _state(entry: Entry) -> str:
    told = entry.state + (", run over" if entry.ended else "")
    return f"{told}: {entry.reason}" if entry.reason else told


def _persons(facts: Facts, entry: Entry) -> str:
    """Who approved, and the record of the egress log in which the signed decision left."""
    if not entry.approvals:
        return "–"
    told = []
    for approval in entry.approvals:
        note = f": {approval.note}" if approval.note else ""
        who = "a rule of client.yaml" if approval.by == BY_RULE else approval.by or "no name given"
        told.append(escape(f"{who}, {approval.at:%Y-%m-%d %H:%M}{note}"))
    return "<br>".join((*told, _decision_record(facts, entry))).removesuffix("<br>")


def _decision_record(facts: Facts, entry: Entry) -> str:
    for record in reversed(facts.egress.messages):
        values = {field["name"]: field.get("value") for field in record.body["fields"]}
        if values.get("verdict") == "approved" and values.get("offer_sha256") == entry.sha256:
            if values.get("record_sha256") == entry.record_sha256:
                return _from_record(record)
            return f"<b class=warning>NOT as it was signed</b> {_from_record(record)}"
    return ""


def _budget(facts: Facts) -> str:
    budget, unit = facts.budget, str(facts.budget["unit"])
    limit = budget["limit"]
    ref = _from_ledger(facts)
    rows = [
        ("spent", escape(_epsilon(budget["spent"], unit)), ref),
        ("set aside for approved plans", escape(_epsilon(budget["held"], unit)), ref),
        ("spent in the last year", escape(_epsilon(budget["last_year"], unit)), ref),
        (
            "limit",
            "none set"
            if limit["epsilon"] is None
            else f"epsilon {float(limit['epsilon']):g}, per {escape(unit)}",
            "client.yaml",
        ),
    ]
    events: dict[tuple[str, str], int] = {}
    for event in budget["events"]:
        key = (str(event.get("run", event["state"])), str(event["plan_sha256"]))
        events[key] = events.get(key, 0) + 1
    spent = [
        (escape(run), f"{count:,}", _hash("plan", plan)) for (run, plan), count in events.items()
    ]
    other = ", ".join(budget.get("other_units") or [])
    return _section(
        "What it cost the patients in privacy",
        "<p>Differential privacy bounds what anybody can learn about one patient from all that "
        "left: with epsilon e, no conclusion about whether a patient's images took part becomes "
        "more than exp(e) times as likely as without them (save with probability delta). The "
        "ledger counts over all federations, plans and retries of the patient pool "
        f"<b>{escape(str(budget['pool']))}</b>, and never goes down.</p>"
        + _table(("", "", "from"), rows)
        + _table(("run", "rounds and scores paid for", "plan"), spent)
        + (
            "<p class=warning>These patients were used without differential privacy, or in a way "
            f"that nothing bounds, {escape(_since(budget))}: since then no epsilon says what can "
            "be learnt about one of them.</p>"
            if budget.get("unbounded")
            else ""
        )
        + (
            f"<p>Some of it was promised for another unit ({escape(other)}); above it stands as it "
            f"counts for one {escape(unit)}.</p>"
            if other
            else ""
        ),
    )


def _record_of_processing(facts: Facts) -> str:
    settings = facts.settings
    blank = '<span class="blank">to be filled in by the lab</span>'
    rows = [
        ("(a) controller, joint controllers, data-protection officer", blank),
        (
            "(b) purposes",
            "joint training and evaluation of a classifier of blood and bone-marrow cells; "
            f"research. Legal basis (Art. 6, Art. 9(2)): {blank}",
        ),
        (
            "(c) data subjects and data",
            "patients whose smears were imaged; single-cell images with labels, read from "
            f"<code>{escape(str(settings.data))}</code>"
            + (
                f"; declared number of patients: {settings.patients_declared}"
                if settings.patients_declared
                else ""
            )
            + ". Health data (Art. 9)",
        ),
        (
            "(d) recipients",
            f"the coordinator of {escape(facts.federation)} at "
            f"<code>{escape(facts.address)}</code>; the labs of each approved plan get the model. "
            "They get what the section above lists, never images",
        ),
        ("(e) transfers to third countries", f"where coordinator and labs are: {blank}"),
        ("(f) time limits for erasure", "see Retention below; images stay where they were"),
        (
            "(g) technical and organisational measures (Art. 32)",
            "data stay at the lab; approval by a person; limits of the lab's own; differential "
            "privacy per patient where the plan says so; secure aggregation where the plan says "
            "so; encryption in transit and of each message (TLS 1.3, HPKE with ML-KEM-768 and "
            "X25519, AES-256-GCM); signed messages and pinned keys; signed log of all that "
            "leaves; no inbound connection; no code from outside",
        ),
    ]
    return _section(
        "Record of processing activities (GDPR Art. 30(1))",
        _table(("", "entry"), [(escape(name), text) for name, text in rows], wide=True),
    )


def _impact(facts: Facts) -> str:
    private = [e for e in facts.plans if e.offer.plan.privacy.unit == "patient"]
    plain = [e for e in facts.plans if e.offer.plan.privacy.unit != "patient"]
    secure = [e for e in facts.plans if e.offer.plan.secure_aggregation.enabled]
    count = len(facts.plans)

    def of(entries: Sequence[Entry]) -> str:
        return f"{len(entries)} of {count} plans {' '.join(_plan_refs(entries))}"

    rows = [
        (
            "(a) description",
            "the lab trains on its own images and sends changes of weights; see the sections above",
        ),
        (
            "(b) necessity and proportionality",
            "rare classes need more than one lab; images need not be shared for it. "
            "Without differential privacy: " + (of(plain) if plain else "no plan"),
        ),
        (
            "(c) risks: a patient's part is inferred from model or updates",
            "differential privacy per patient bounds it: "
            + (of(private) if private else "<b>no plan here is private per patient</b>"),
        ),
        (
            "(c) risks: the coordinator reads one lab's update",
            "secure aggregation shows it sums only: "
            + (of(secure) if secure else "<b>no plan here uses it</b>"),
        ),
        (
            "(c) risks: identifiers in file names and metadata",
            "never read into a message; <code>cytofed client check</code> reports them",
        ),
        (
            "(d) measures, and that they are met",
            f"the egress log verified when this page was made {_from_log(facts)}; "
            "<code>cytofed audit</code> tests the mechanism and attacks a finished model",
        ),
    ]
    pointers = [
        (
            "EDPB Opinion 28/2024",
            "A model trained on personal data is not anonymous by itself: whether it is depends "
            "on how likely data can be drawn from it, and the assessment must be documented. "
            "File the audit's attack results and the privacy statement of the model card here.",
        ),
        (
            "IVDR (EU) 2017/746 Art. 5(5)",
            "Use of the model for diagnosis inside one health institution needs, among others, a "
            "quality-management system, ISO 15189 or equivalent, a documented justification that "
            "no equivalent device is on the market, and a public declaration. This software is "
            "for research and claims no conformity.",
        ),
        (
            "EU AI Act (EU) 2024/1689 Art. 9 to 15",
            "Where a product made from the model is high-risk: risk management (9), data "
            "governance (10: the data check), technical documentation (11: model card, plan), "
            "logs (12: this log and the run's metrics), information (13), human oversight (14), "
            "accuracy and robustness (15: the report per class and lab).",
        ),
    ]
    return _section(
        "For the impact assessment (GDPR Art. 35(7))",
        _table(("", "entry"), [(escape(name), text) for name, text in rows], wide=True)
        + "<h3>Other texts</h3>"
        + _table(
            ("", "what it asks for"), [(escape(a), escape(b)) for a, b in pointers], wide=True
        ),
    )


def _network(facts: Facts) -> str:
    settings = facts.settings
    host, _, port = facts.address.rpartition(":")
    through = "directly"
    if settings.proxy:
        through = f"through the proxy {settings.proxy.rsplit('@', 1)[-1].removeprefix('http://')}"
    rows = [
        (
            "outbound",
            escape(f"this machine → {host}"),
            escape(f"TCP {port}"),
            escape(
                f"TLS 1.3, server pinned to the federation's own CA, client certificate; {through}"
            ),
        ),
        ("inbound", "none", "none", "the lab's program listens on no port"),
    ]
    kinds = ", ".join(f"{escape(kind)} (to {_bytes(size)})" for kind, size in ROUTINE.items())
    return _section(
        "Network",
        _table(("direction", "between", "port", "how"), rows)
        + f"<p>Routine requests and their largest size: {kinds}.</p>"
        "<p>No telemetry, no update check, no other destination. A proxy that opens TLS is "
        "refused: exempt this address from inspection.</p>",
    )


def _keys(facts: Facts) -> str:
    rows = [
        ("this lab", facts.own.name, facts.own.fingerprint),
        ("coordinator", facts.coordinator.name, facts.coordinator.fingerprint),
    ]
    seen: dict[tuple[str, str], list[str]] = {}
    for entry in facts.plans:
        if entry.state == "approved":
            for lab, key in fingerprints(entry.offer).items():
                if lab != facts.own.name:
                    seen.setdefault((lab, key), []).append(entry.plan_sha256)
    peers = [
        (
            "lab",
            escape(lab),
            f"<code>{escape(key)}</code>",
            " ".join(_hash("plan", sha) for sha in dict.fromkeys(plans)),
            "yes" if facts.settings.limits.trusted_peers.get(lab) == key else "no",
        )
        for (lab, key), plans in sorted(seen.items())
    ]
    own = [(escape(a), escape(b), f"<code>{escape(c)}</code>", "", "") for a, b, c in rows]
    return _section(
        "Keys",
        "<p>Fingerprints to compare by phone. The lab's secret keys lie in its directory, readable "
        "by its user only, and appear in no log.</p>"
        + _table(("who", "name", "fingerprint", "pinned by plan", "trusted peer"), [*own, *peers]),
    )


def _retention(facts: Facts) -> str:
    rows = [
        ("images", "where they were; only read", "the lab's own rules"),
        (
            "cache of decoded images and their features",
            "the user's cache folder of this machine",
            "delete at will",
        ),
        (
            "kept update",
            "encrypted, for retries",
            "until that of the round after next is written over it, or the run's end",
        ),
        (
            "egress log",
            "signed; personal data of nobody",
            "as long as accountability asks (Art. 5(2)); it is only ever appended to",
        ),
        (
            "privacy ledger",
            str(facts.settings.ledger),
            "as long as any of the pool's patients' data is used: without it the budget is unknown",
        ),
        ("plans and decisions", "in the lab's directory", "as the egress log"),
        ("models", "in the lab's directory, and at all labs of the plan", "the federation's rules"),
    ]
    return _section(
        "Retention",
        _table(
            ("what", "where", "how long"),
            [tuple(escape(cell) for cell in row) for row in rows],
            wide=True,
        ),
    )


def _withdrawal() -> str:
    rows = [
        ("stop at once", "stop the service, or <code>cytofed client pause DIR</code>"),
        ("end one plan", "<code>cytofed client reject DIR OFFER</code>; others go on"),
        (
            "leave the federation",
            "<code>cytofed client leave DIR</code>; deletes nothing of the lab's, tells the "
            "coordinator",
        ),
        (
            "one patient objects (Art. 21) or asks for erasure (Art. 17)",
            "remove the patient's images from the data folder: no later round uses them. What "
            "earlier rounds contributed stays in models that were trained; under differential "
            "privacy per patient its influence is bounded by the epsilon above, without it the "
            "model has to be trained anew",
        ),
    ]
    return _section(
        "How to withdraw",
        _table(("", "how"), [(escape(name), text) for name, text in rows], wide=True),
    )


def _threats() -> str:
    rows = [
        (
            "network, TLS-inspecting proxy",
            "read, cut, replay, alter",
            "weights, scores, whether a patient took part; altered messages are refused",
        ),
        (
            "coordinator, curious",
            "see all that reaches it",
            "one lab's update, where secure aggregation is on: sums of the cohort only",
        ),
        (
            "coordinator, malicious",
            "send anything, lie about who is alive, swap keys, replay",
            "code execution here; less noise, more steps or a fresh budget; other keys than those "
            "approved; a cohort below the minimum",
        ),
        ("another lab, curious", "see the joint models, collude", "one other lab's update"),
        (
            "another lab, hostile",
            "send broken or poisoned updates",
            "a crash; poisoning is bounded by robust strategies only, which see single updates",
        ),
        ("thief of a disk", "read files", "a readable update; keys are for their user only"),
    ]
    return _section(
        "Threat model",
        _table(
            ("who", "can", "must not gain"),
            [tuple(escape(cell) for cell in row) for row in rows],
            wide=True,
        )
        + "<p>Not covered: a lab that lies about its own data; labs that the coordinator invents, "
        "unless <code>trusted_peers</code> and <code>min_trusted_peers</code> are set; privacy "
        "ledger and egress log restored together, with a colluding coordinator; side channels; "
        "attacks on the noise's floating-point arithmetic.</p>",
    )


def _check(facts: Facts) -> str:
    report = facts.egress
    return _section(
        "How to check this page",
        f"<p>{len(report.records):,} records of the egress log were verified, up to "
        f"{_from_log(facts)}, signed by <code>{escape(report.fingerprint)}</code>. The privacy "
        f"ledger stood at {_from_ledger(facts)}. Each number carries the hash that it comes from; "
        "the whole hash shows when the pointer rests on it.</p>"
        "<pre>cytofed client egress DIR --verify        the log, offline\n"
        "cytofed client egress DIR --json          each record with its hash\n"
        "cytofed client budget DIR --json          the ledger's events and head\n"
        "cytofed client plans DIR --json           each offer with its price\n"
        "cytofed client plan show DIR OFFER        all of it, in words</pre>",
    )


# --- the page


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = False) -> str:
    """A table of cells that are HTML already."""
    if not rows:
        return "<p class=none>none</p>"
    top = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{cell}</th>" if i == 0 else f"<td>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    kind = ' class="wide"' if wide else ""
    return (
        f"<div class=scroll tabindex=0><table{kind}><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


_CSS = """
h3{font-size:16px;margin:14px 0 6px}
section{margin:16px 0}
.blank{border-bottom:1.5px dashed var(--second);color:var(--second)}
.day{white-space:nowrap}.none{color:var(--muted)}
th,td{padding-right:12px;font-variant-numeric:tabular-nums}
.wide{width:100%}.wide th{width:28%}.wide td,td code{overflow-wrap:anywhere}
.ref{color:var(--first);font-size:12px;white-space:nowrap}
pre{margin:0;overflow-x:auto}
@media print{body{font-size:12px}.scroll,pre{overflow:visible;white-space:pre-wrap}
tr{break-inside:avoid}h3{break-after:avoid}}
"""
_FOOTER = (
    f"Made by cytofed {__version__} from this lab's own records. For research; not a medical "
    "device; no legal advice."
)
