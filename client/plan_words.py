"""An offered plan in words: what a person reads before they decide, and again as they do.

Text from the other side (names of runs and plans) is made fit to be shown; nothing is cut off that
counts: hashes and fingerprints are whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cytofed.client.policy import Entry, flat
from cytofed.client.settings import Settings
from cytofed.plan import Plan
from cytofed.privacy.accounting import shown
from cytofed.words import one_line

_WIDTH = 13


def plan_in_words(entry: Entry, listed: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """Lines about one offer. ``listed``: of ``PlanBook.listed``, priced as of now."""
    plan, run = entry.offer.plan, one_line(entry.run, most=64)
    yield f"offer {entry.sha256}"
    yield _line("state", _state(listed))
    yield _line("federation", one_line(entry.offer.federation, most=64))
    yield _line("run", run)
    yield _line("plan", f"{one_line(plan.name, most=64)}, {entry.plan_sha256}")
    yield _line("offered", f"{listed['offered_at'][:16]}, to be approved by "
                           f"{listed['expires_at'][:16]} UTC")  # fmt: skip
    yield from _work(plan, listed["price"])
    yield from _price(listed["price"])
    yield from _secure(plan)
    yield from _labs(entry, settings)
    for change in listed["changes"]:
        yield _line("change", one_line(change, most=400))
    for warning in (listed["price"] or {}).get("warnings", ()):
        yield _line("warning", one_line(warning, most=400))
    if listed["refused"]:
        yield _line("refused", one_line(listed["refused"], most=400))
    yield from _decisions(listed)
    yield "every key of the plan:"
    for key, value in flat(plan).items():
        yield f"  {key}: {one_line(json.dumps(value, ensure_ascii=False), most=400)}"


def summary_lines(listed: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """The same offer in a list of all: what tells it from others, and its price."""
    price = listed["price"]
    yield f"offer {listed['offer']}  {_state(listed)}"
    yield _line("plan", f"{one_line(listed['name'], most=64)}, {listed['plan_sha256']}")
    yield _line("run", one_line(listed["run"], most=64))
    if price:
        yield from _price(price)
        yield _line("model", f"{price['model']['arch']}, {price['model']['parameters']:,} "
                             f"parameters, from {price['model']['start']}")  # fmt: skip
        for lab, fingerprint in price["roster"]["labs"].items():
            yield _line("lab", f"{one_line(lab, most=64)} {fingerprint}")
    for change in listed["changes"]:
        yield _line("change", one_line(change, most=400))
    for warning in (price or {}).get("warnings", ()):
        yield _line("warning", one_line(warning, most=400))
    yield from _decisions(listed)
    if listed["refused"]:
        yield _line("refused", one_line(listed["refused"], most=400))
    if listed["state"] == "waiting":
        yield _line("look", f"cytofed client plan show {folder} {listed['offer']}")


def _line(name: str, text: str) -> str:
    return f"  {name:{_WIDTH}} {text}"


def _state(listed: Mapping[str, Any]) -> str:
    """The state of an offer, with what a person needs to know of it."""
    state, reason = str(listed["state"]), one_line(listed["reason"])
    told = {
        "waiting": f"waiting, {len(listed['approvals'])} of {listed['approvals_needed']} approvals",
        "replaced": f"replaced by offer {listed['replaced_by']}: it can't be approved any more",
        "expired": "expired: nobody decided in time",
        "ended": "ended before anybody decided",
        "approved": "approved, and over" if listed["ended"] else "approved",
    }.get(state, state)
    if reason and (listed["ended"] or state in ("rejected", "ended")):
        told += f" ({reason})"
    return told


def _decisions(listed: Mapping[str, Any]) -> Iterator[str]:
    """Who approved, and which other runs here an approval ends."""
    for other in listed["ends"]:
        yield _line("ends", f"run {one_line(other['run'], most=64)}, offer {other['offer']}: one "
                            "approval pays for one run of a plan")  # fmt: skip
    given = len(listed["approvals"])
    needed = listed["approvals_needed"] if listed["state"] == "waiting" else given
    for number, approval in enumerate(listed["approvals"], start=1):
        note = f": {approval['note']}" if approval["note"] else ""
        who = approval["by"] or "a person who gave no name"
        yield _line("approved by", f"{number} of {max(given, needed)} by {who}, "
                                   f"{approval['at'][:16]} UTC{note}")  # fmt: skip


def _work(plan: Plan, price: Mapping[str, Any] | None) -> Iterator[str]:
    train, rounds = plan.train, plan.train.rounds
    size = f", {price['model']['parameters']:,} numbers leave in a round" if price else ""
    yield _line("model", f"{plan.model.arch} from {plan.model.start}, trains "
                         f"{plan.model.trainable}{size}")  # fmt: skip
    steps = price and price["steps_per_round"]
    yield _line("rounds", f"{rounds}" + (f" of {steps} steps" if steps else
                f" of {train.local_epochs:g} epochs over this lab's images"))  # fmt: skip
    yield _line("strategy", plan.strategy.name)
    yield _line("labels", f"scheme {plan.labels.scheme}")
    scores = "no scores of this lab's images leave"
    if plan.releases_scores:
        scores = f"scores on held-out images leave every {plan.evaluated_every} rounds, and last"
    yield _line("evaluation", scores)


def _price(price: Mapping[str, Any] | None) -> Iterator[str]:
    if price is None:
        return
    privacy = price["privacy"]
    yield _line("privacy", privacy["statement"])
    if privacy["unit"] != "patient":
        yield _line("", "NOBODY IS PROTECTED BY DIFFERENTIAL PRIVACY" if privacy["unit"] == "none"
                    else "protects single images, not patients")  # fmt: skip
    for key, name in (("spent", "spent so far"), ("held", "set aside"), ("after", "after it")):
        yield _line(name, _epsilon(privacy[key]))
    if since := privacy.get("unbounded"):
        yield _line("", f"unbounded since {since['since'][:10]}, run "
                        f"{one_line(since['run'], most=64)}: without privacy")  # fmt: skip
    if privacy["limit"] is None:
        yield _line("limit", "none is set in client.yaml")
    else:
        left = math.floor(privacy["left"] * 100) / 100  # never more than there is
        yield _line("limit", f"epsilon {privacy['limit']:g}, {left:.2f} left before "
                             f"it; {privacy['fitting_rounds']} rounds would fit")  # fmt: skip
    out = price["bytes_out"]
    yield _line("bytes out", f"{out['per_round']:,} a round, {out['total']:,} in all")


def _epsilon(of: Mapping[str, Any]) -> str:
    if of["epsilon"] is None:
        return "unbounded"
    by = f", by {of['accountant']}" if of.get("accountant") else ""
    return f"epsilon {shown(float(of['epsilon']))} at delta {of['delta']:g}, per {of['unit']}{by}"


def _secure(plan: Plan) -> Iterator[str]:
    secure = plan.secure_aggregation
    if not secure.enabled:
        yield _line("secure sum", "OFF: the coordinator sees this lab's update by itself")
        return
    threshold = "more than two thirds of the labs"
    if secure.threshold is not None:
        threshold = f"{secure.threshold} labs or more"
    yield _line("secure sum", f"on: the coordinator sees sums of {secure.min_cohort} labs or more; "
                              f"{threshold} have to open one")  # fmt: skip


def _labs(entry: Entry, settings: Settings) -> Iterator[str]:
    trusted = settings.limits.trusted_peers
    roster, own = entry.offer.roster, entry.offer.plan.cohort.min_labs
    yield _line("labs", f"{len(roster.members)} may take part, {own} at least; their keys, which "
                        "approval pins:")  # fmt: skip
    for member in roster.members:
        key = member.identity.fingerprint
        peer = ", trusted peer" if trusted.get(member.name) == key else ""
        patients = f", declares {member.declared_patients:,} patients"
        yield _line("", f"{one_line(member.name, most=64)} {key}"
                        f"{patients if member.declared_patients else ''}{peer}")  # fmt: skip
