"""What a model was trained from: the runs before it, and what they promised, composed.

An epsilon is of one training. Whoever holds the model holds what earlier trainings put into it too,
so a model file carries its line: what it began with, and each run since with the events of its
mechanism. Over a line the events compose as those of one run do; one link without privacy, or one
that nobody knows, and nothing bounds what the model says of a patient who was in it.

A line is what files say of themselves. A lab trusts none of it for its own patients: its ledger has
every event of theirs, and it knows again, by hash, the models that it helped to train.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cytofed.encoder import Given, card_of, start_file
from cytofed.errors import InputError
from cytofed.model_file import ModelInfo, read_info
from cytofed.plan import Plan
from cytofed.privacy.accounting import (
    Event,
    Guarantee,
    NonPrivate,
    event_from_dict,
    event_to_dict,
    price,
    times,
)
from cytofed.privacy.terms import delta_of, terms_of
from cytofed.strict import read_json

Begins = Literal["random", "images", "unknown"]

FORMAT = "cytofed-lineage-1"


@dataclass(frozen=True)
class Link:
    """One run that a model went through. ``events``: what a patient of every round paid."""

    run: str
    federation: str  # empty for a simulation
    plan_sha256: str
    unit: str
    delta: float
    events: tuple[Event, ...]
    pseudo: bool = False
    """its patients are made up by a simulation"""

    @property
    def seeded(self) -> bool:
        """A simulation's noise is seeded: whoever knows the seed takes it off."""
        return not self.federation

    @property
    def guarantee(self) -> Guarantee:
        """Of this run alone."""
        return replace(price(self.events, self.delta), pseudo=self.pseudo)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "federation": self.federation,
            "plan_sha256": self.plan_sha256,
            "unit": self.unit,
            "delta": self.delta,
            "pseudo": self.pseudo,
            "events": [event_to_dict(event) for event in self.events],
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Link:
        return Link(
            run=str(tree["run"]),
            federation=str(tree["federation"]),
            plan_sha256=str(tree["plan_sha256"]),
            unit=str(tree["unit"]),
            delta=float(tree["delta"]),
            events=tuple(event_from_dict(event) for event in tree["events"]),
            pseudo=bool(tree["pseudo"]),
        )


@dataclass(frozen=True)
class Lineage:
    """What a model began with, and every run since, the oldest first.

    ``begins``: random weights, an encoder whose card lists its images, or nobody knows what.
    """

    begins: Begins
    encoder: str = ""
    links: tuple[Link, ...] = field(default=())

    def then(self, link: Link) -> Lineage:
        """The line of a model that a further run trained."""
        return replace(self, links=(*self.links, link))

    def unbounded(self, *, deployed: bool = True) -> tuple[str, ...]:
        """Why nothing bounds what the model says of a patient of the line; empty: epsilon does.

        ``deployed`` off: in a simulation seeded noise stands for that of a deployment.
        """
        found = []
        if self.begins == "unknown":
            found.append("it begins with a model whose origin is not known")
        for link in self.links:
            if any(isinstance(event, NonPrivate) for event in link.events) or not link.events:
                found.append(f"run {link.run} trained without differential privacy")
            elif deployed and link.seeded:
                found.append(f"run {link.run} is a simulation, whose noise is seeded")
        private = [link for link in self.links if link.unit != "none"]
        if len({(link.unit, link.pseudo) for link in private}) > 1:
            found.append("its runs protect different units")
        return tuple(found)

    def whole(self, *, deployed: bool = True) -> Guarantee:
        """What holds for one who was in every run of the line; epsilon infinite where none does.

        Errors: InputError for a line without a run.
        """
        if not self.links:
            raise InputError("a line without a run has no guarantee")
        last = self.links[-1]
        events = tuple(event for link in self.links for event in link.events)
        if self.unbounded(deployed=deployed):
            events = (NonPrivate(),)
        unit = last.events[0].unit if last.events else "none"
        return replace(price(events, last.delta), unit=unit, pseudo=last.pseudo)

    @property
    def sole(self) -> bool:
        """Whether the last run's own epsilon is all there is to say."""
        return self.begins != "unknown" and len(self.links) <= 1

    def described(self) -> str:
        """In words, for people."""
        began = {
            "random": "random weights",
            "images": f"encoder {self.encoder}, of images that its card lists by hash",
            "unknown": "a model whose origin is not known",
        }[self.begins]
        return "; then ".join([began, *(_told(link) for link in self.links)])

    def to_text(self) -> str:
        """For a model file's metadata."""
        links = [link.to_json() for link in self.links]
        tree = {"format": FORMAT, "begins": self.begins, "encoder": self.encoder, "links": links}
        return json.dumps(tree, separators=(",", ":"))

    @staticmethod
    def from_text(text: str, *, source: str) -> Lineage:
        """Inverse of ``to_text``. Errors: InputError for a line that cannot be read."""
        try:
            tree = read_json(text)
            begins = tree["begins"]
            if tree["format"] != FORMAT or begins not in ("random", "images", "unknown"):
                raise ValueError(f"format {tree['format']!r:.40}, begins {begins!r:.40}")
            links = tuple(Link.from_json(link) for link in tree["links"])
            return Lineage(begins, str(tree["encoder"]), links)
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{source}: its lineage cannot be read: {error}") from None

    def summary(self, *, deployed: bool) -> dict[str, Any]:
        """``lineage`` of ``summary.json``: the line in full, and what it comes to."""
        reasons, found = self.unbounded(deployed=deployed), None
        if not reasons:
            found = self.whole(deployed=deployed)
        return {
            "begins": self.begins,
            "encoder": self.encoder or None,
            "links": [link.to_json() for link in self.links],
            "described": self.described(),
            "sole": self.sole,
            "whole": {
                "epsilon": None if found is None else found.epsilon,
                "delta": None if found is None else found.delta,
                "accountant": None if found is None else found.accountant,
                "per": None if found is None else found.per,
                "statement": _unbounded(reasons) if found is None else str(found),
                "unbounded": list(reasons),
            },
        }


def link_of(
    plan: Plan, *, run: str, federation: str = "", pseudo: bool = False, labs: int = 1
) -> Link:
    """A run of a plan as a link: at its full price, whatever rounds it came to.

    Where the same patient may be at several of the ``labs``, what all of them released of it.
    """
    terms = terms_of(plan)
    events: tuple[Event, ...] = (NonPrivate(),)
    if terms is not None:
        events = (times(terms.training, terms.rounds),)
        if terms.evaluation is not None:
            events = (*events, times(terms.evaluation, terms.evaluations))
    if plan.patients == "may_overlap":
        events = tuple(times(event, max(labs, 1)) for event in events)
    return Link(run, federation, plan.sha256, plan.privacy.unit, delta_of(plan), events, pseudo)


def lineage_of(file: Path) -> Lineage:
    """The line of a model file, from its metadata and its card.

    Errors: InputError for what is no model file, or a line or card that is damaged.
    """
    told = read_info(file).lineage
    if told:
        return Lineage.from_text(told, source=str(file))
    card = card_of(file)
    return Lineage("unknown") if card is None else Lineage("images", card.name)


def lineage_in(info: ModelInfo) -> Lineage:
    """The line that a start model of a run was written with. Errors: InputError."""
    if not info.lineage:
        return Lineage("unknown")
    return Lineage.from_text(info.lineage, source="the start model")


def lineage_of_start(start: str) -> Lineage:
    """The line of a plan's ``model.start``; of a file named by its hash alone nothing is known."""
    if start == "random":
        return Lineage("random")
    if Given.named(start) is not None:
        return Lineage("unknown")
    return lineage_of(start_file(start))


def start_warnings(plan: Plan, *, deployed: bool, pseudo: bool = False) -> list[str]:
    """What a private plan's epsilon does not cover of the model that it starts from.

    ``pseudo``: the plan's patients are made up by a simulation.
    """
    start = plan.model.start
    if plan.privacy.unit == "none" or Given.named(start) is not None:
        return []  # what a file is that has not come yet, its lab tells by hash
    before = lineage_of_start(start)
    if before.begins != "unknown" and not before.links:
        return []
    where = "-" if deployed else ""
    line = before.then(link_of(plan, run="of this plan", federation=where, pseudo=pseudo))
    if reasons := line.unbounded(deployed=deployed):
        whole = _unbounded(reasons)
    else:
        whole = str(line.whole(deployed=deployed))
    return [
        f"model.start {start} was trained before ({before.described()}): the plan's epsilon is of "
        f"its own training; of the model, for a patient of all trainings: {whole}"
    ]


def _told(link: Link) -> str:
    found = link.guarantee
    promised = "no privacy" if math.isinf(found.epsilon) else str(found)
    where = f"of federation {link.federation}" if link.federation else "a simulation"
    return f"run {link.run} ({where}, {promised})"


def _unbounded(reasons: tuple[str, ...]) -> str:
    return f"unbounded: {'; '.join(reasons)}"
