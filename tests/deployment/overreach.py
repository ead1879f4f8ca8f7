"""A coordinator that wants more than was approved: lies to plant in its process, see faulty.py."""

from __future__ import annotations

import importlib
import logging
import secrets
from dataclasses import replace
from typing import Any

from cytofed.messages import BadMessage, Kind, Order, pack_order

FLOOD = 60
"""offers that nobody asked for"""

_KINDS: tuple[Kind, ...] = ("train", "evaluate")

MORE = 6
"""rounds beyond the plan's"""


def flood() -> None:
    """Before the first honest offer come others: of its run with another seed, and of many runs."""
    from flwr.app import ConfigRecord, RecordDict

    from cytofed.documents import Offer
    from cytofed.server.approvals import Approvals

    honest = Approvals.ask
    done: set[str] = set()

    def ask(self: Any, folder: Any, offer: Offer) -> None:
        for lab, node in self._fleet.nodes.items():
            if lab in done or not self._fleet.presence(lab).online:
                continue
            done.add(lab)
            for number in range(FLOOD):
                train = replace(offer.plan.train, seed=number + 1)
                run = offer.run if number % 2 else f"run-{number}"
                lie = Offer(run, replace(offer.plan, train=train), offer.roster)
                record = ConfigRecord({"document": lie.signed(self._identity)})
                content = RecordDict({"offer": record})
                message = self._grid.create_message(content, "query.offer", node, "0", ttl=60.0)
                self._grid.push_messages([message])
        honest(self, folder, offer)

    Approvals.ask = ask  # type: ignore[method-assign]


def demand_more() -> None:
    """When all is done: more rounds, more scores, and the first ones again with other weights."""
    from cytofed.server.asking import ask, content_of

    app: Any = importlib.import_module("cytofed.server.app")
    honest, log = app.run_rounds, logging.getLogger("cytofed.lie")

    def run_rounds(grid: Any, run: Any, progress: Any, **others: Any) -> Any:
        after = honest(grid, run, progress, **others)
        parts = {name: after.state[name] + 1 for name in run.strategy.down}
        last = run.plan.train.rounds
        for number in (*range(last + 1, last + 1 + MORE), *range(last, 0, -1)):
            for kind in _KINDS:
                order = Order(kind, run.name, number, run.plan.sha256, parts)
                content = pack_order(order)
                for lab, reply in ask(grid, run.cohort, kind, number, content, timeout_s=60.0):
                    try:
                        content_of(reply)
                        log.warning("LIE WORKED: %s %d at %s", kind, number, lab)
                    except BadMessage as error:
                        log.warning("lie refused: %s %d: %s", kind, number, error.message)
        return after

    app.run_rounds = run_rounds


def forge_heads() -> None:
    """Each order tells the lab of an entry of its ledger that never was."""
    from cytofed.documents import LedgerHead
    from cytofed.server.directory import ServerDirectory

    def seen_head(self: ServerDirectory, lab: str) -> bytes:
        federation = self.settings().name
        return LedgerHead(federation, lab, secrets.token_hex(32)).signed(self.identity())

    ServerDirectory.seen_head = seen_head  # type: ignore[method-assign]


def swap_roster() -> None:
    """Once a file ``swap`` is there: the run's offer again, with keys of the coordinator's own
    behind the name of every other lab, once for each lab."""
    from flwr.app import ConfigRecord, RecordDict

    from cytofed.documents import Offer
    from cytofed.privacy.identity import Identity
    from cytofed.server.approvals import Approvals

    honest = Approvals.ask
    done: set[tuple[str, str]] = set()

    def ask(self: Any, folder: Any, offer: Offer) -> None:
        if not (folder.root.parent.parent / "swap").is_file():
            honest(self, folder, offer)
            return
        for lab, node in self._fleet.nodes.items():
            if (folder.name, lab) in done or not self._fleet.presence(lab).online:
                continue
            done.add((folder.name, lab))
            members = tuple(
                m if m.name == lab else replace(m, identity=Identity.generate(m.name).public)
                for m in offer.roster.members
            )
            lie = replace(offer, roster=replace(offer.roster, members=members))
            record = ConfigRecord({"document": lie.signed(self._identity)})
            content = RecordDict({"offer": record})
            message = self._grid.create_message(content, "query.offer", node, "0", ttl=60.0)
            self._grid.push_messages([message])

    Approvals.ask = ask  # type: ignore[method-assign]
