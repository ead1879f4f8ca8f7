"""The dossier says what the records say, and every number carries the hash it comes from."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cytofed.client.dossier import SHORT, Facts, render, write_dossier
from cytofed.client.egress import EgressLog, Outgoing, Protection, fields_of, verify
from cytofed.client.policy import PlanBook, open_ledger
from cytofed.client.settings import AutoApprove, Settings
from cytofed.documents import COORDINATOR, Member, Offer, Roster
from cytofed.plan import from_dict
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger, Order

CENTRE = Identity.generate(COORDINATOR)
KEYS = {lab: Identity.generate(lab) for lab in ("leeds", "york")}
LEEDS = KEYS["leeds"]
PLAN = from_dict(
    {
        "name": "marrow",
        "train": {"rounds": 4, "steps_per_round": 5},
        "privacy": {"unit": "patient", "sigma": 2.0, "delta": 1e-5, "declared_patients": 100},
    }
)
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """A lab that approved a plan and answered two rounds."""
    folder = tmp_path_factory.mktemp("lab")
    Ledger.create(folder / "ledger.sqlite")
    settings = Settings(
        data=folder / "images",
        ledger=folder / "ledger.sqlite",
        labels="marrow",
        patients="column:patient",
        patients_declared=100,
        proxy="http://user:secret@proxy:3128",
    )
    plans = PlanBook(
        folder / "plans",
        verified=partial(Offer.verified, coordinator=CENTRE.public),
        own=LEEDS.public,
    )
    roster = Roster("f", 1, tuple(Member(key.public, "", 100) for key in KEYS.values()))
    entry = plans.offered(Offer("run-1", PLAN, roster).signed(CENTRE), parameters=1000)
    EgressLog.create(folder / "egress.log", LEEDS)
    with open_ledger(settings) as book, EgressLog(folder / "egress.log", LEEDS) as log:
        entry = plans.approve(entry.sha256, settings, book, by="Ada Roe", note="<i>seen</i>")
        told = {"verdict": "approved", "offer_sha256": entry.sha256}
        log.record(
            Outgoing(
                type="decision",
                destination="coordinator:8443",
                fields=fields_of({**told, "record_sha256": entry.record_sha256}),
                nbytes=300,
                sha256="dd" * 32,
            )
        )
        for round_ in (1, 2):
            order = Order("f/leeds", HOSTILE, round_, 0, PLAN.sha256, "bb" * 32, f"{round_:064x}")
            book.reserve(order)
            book.release(order, "cc" * 32)
            log.record(
                Outgoing(
                    type="update",
                    destination="coordinator:8443",
                    fields=fields_of({"lab": "leeds"}, {"weights": np.zeros(1000, np.float32)}),
                    nbytes=5000 + round_,
                    sha256=f"{round_:064x}",
                    run=HOSTILE,
                    round=round_,
                    plan_sha256=PLAN.sha256,
                    protection=Protection("patient", 1.0, 2.0, 0.5 * round_, 1e-3),
                    ledger_head=book.head,
                )
            )
            log.routine("poll", 90)
        budget = book.summary()
    return Facts(
        own=LEEDS.public,
        federation="f",
        coordinator=CENTRE.public,
        address="coordinator.example:8443",
        settings=settings,
        egress=verify(folder / "egress.log", LEEDS.public),
        budget=budget,
        plans=plans.entries(),
        made_at=datetime(2026, 6, 1, tzinfo=UTC),
    )


class _Page(HTMLParser):
    """Tags, references and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.refs: list[tuple[str, str]] = []  # title, shown
        self.text = ""
        self._ref = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.urls += [v or "" for k, v in found.items() if k in ("src", "href", "action")]
        if found.get("class") == "ref":
            self._ref = found["title"] or ""

    def handle_data(self, data: str) -> None:
        if self._ref:
            self.refs.append((self._ref, data))
            self._ref = ""
        self.text += data


def test_the_page_is_whole_in_itself_and_runs_nothing(facts: Facts) -> None:
    page = _Page(render(facts))
    assert not page.urls
    assert not {"script", "link", "img", "iframe", "form", "object"} & set(page.tags)
    assert "url(" not in render(facts)
    assert "default-src 'none'" in render(facts)
    assert HOSTILE in page.text  # as text
    assert render(facts) == render(facts)


def test_the_page_tells_who_approved_as_the_signed_log_has_it(facts: Facts) -> None:
    page = render(facts)
    assert "Ada Roe" in page
    assert "&lt;i&gt;seen&lt;/i&gt;" in page
    assert "One person" in page
    assert "NOT as it was signed" not in page
    [entry] = facts.plans
    someone = replace(entry.approvals[0], by="Eve Moe")
    altered = replace(facts, plans=(replace(entry, approvals=(someone,)),))
    assert "NOT as it was signed" in render(altered)
    two = replace(facts, settings=replace(facts.settings, approvals=2))
    assert "approvals of <b>2 persons</b>" in render(two)


def test_every_hash_on_the_page_is_one_of_the_records(facts: Facts) -> None:
    page = _Page(render(facts))
    known = {record.hash for record in facts.egress.records}
    known |= {str(r.body["ledger_head"]) for r in facts.egress.messages}
    known |= {str(facts.budget["head"]), PLAN.sha256, facts.plans[0].sha256}
    assert len(page.refs) > 15
    for title, shown in page.refs:
        assert title.split()[-1] in known
        assert title.split()[-1].startswith(shown)
        assert len(shown) == SHORT


def test_what_left_adds_up_to_the_log(facts: Facts) -> None:
    text = render(facts)
    total = sum(int(r.body["nbytes"]) for r in facts.egress.messages)
    assert f"{total / 1000:.1f}&nbsp;kB" in text
    for record in facts.egress.messages:
        row = next(line for line in text.split("<tr>") if f"{record.body['nbytes']:,}" in line)
        assert record.hash in row
        assert str(record.body["ledger_head"]) in row
    assert "weights (float32 1000)" in text
    assert re.search(r"<th scope=row>poll</th><td>2</td>", text)


def test_the_officer_finds_the_texts_they_must_file(facts: Facts) -> None:
    text = _Page(render(facts)).text
    for words in (
        "GDPR Art. 30(1)",
        "GDPR Art. 35(7)",
        "Art. 5(5)",
        "AI Act",
        "28/2024",
        "controller",
        "recipients",
        "erasure",
        "Retention",
        "How to withdraw",
        "Threat model",
        "Not covered",
        "to be filled in by the lab",
    ):
        assert words in text
    assert "cytofed client leave DIR" in text
    assert "at delta 1e-05, per patient" in text


def test_keys_and_network_are_those_of_the_lab(facts: Facts) -> None:
    text = render(facts)
    for key in (LEEDS, CENTRE, KEYS["york"]):
        assert key.public.fingerprint in text
    assert "TCP 8443" in text
    assert "coordinator.example" in text
    assert "proxy:3128" in text
    assert "secret" not in text.replace("secret keys", "")


def test_what_weakens_the_promise_is_said(facts: Facts) -> None:
    unbounded = {"since": "2026-03-04T05:06:07+00:00", "run": "plain-1"}
    spent = {**facts.budget["spent"], "epsilon": None}
    budget = {**facts.budget, "other_units": ["none"], "unbounded": unbounded, "spent": spent}
    text = render(replace(facts, budget=budget, plans=()))
    assert "unbounded since 2026-03-04, run plain-1" in text
    assert "since then no epsilon says what can be learnt about one of them" in text
    assert "since then no epsilon" not in render(facts)
    assert "no plan here is private per patient" in text
    automatic = replace(facts.settings, auto_approve=AutoApprove(enabled=True, max_epsilon=1.0))
    assert "auto_approve is on" in render(replace(facts, settings=automatic))


def test_the_file_is_for_its_owner(facts: Facts, tmp_path: Path) -> None:
    write_dossier(tmp_path / "dossier.html", facts)
    assert (tmp_path / "dossier.html").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "dossier.html").read_text() == render(facts)


def test_a_price_comes_with_what_it_is_not_the_whole_of(facts: Facts) -> None:
    told = "model.start is the model of run run-0, in which this lab took part: unbounded <b>"
    entry = facts.plans[0]
    assert entry.price is not None
    priced = replace(entry, price={**entry.price, "warnings": [told]})
    html = render(replace(facts, plans=(priced,)))
    assert "in which this lab took part: unbounded &lt;b&gt;" in html
