"""One lab's own daemon and a coordinator that says whatever a test has it say, without a network.

What comes to the daemon is what a link would hand it: sealed, signed, with the coordinator's own
keys. What leaves goes through the lab's egress log, as over a link. Only the coordinator lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from cytofed.arrays import Parts
from cytofed.client.daemon import Daemon
from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import EgressLog, read_report
from cytofed.client.fleet import Answer
from cytofed.client.policy import open_ledger
from cytofed.client.settings import fresh_yaml
from cytofed.documents import Decision, Offer, Roster, Start
from cytofed.files import write_atomically
from cytofed.messages import ERROR_CODE, Kind, Order, Step, new_message, pack_order, pack_step
from cytofed.objects import deflate, inflate, read_tree
from cytofed.plan import Plan, from_dict
from cytofed.privacy.identity import Identity
from cytofed.sealed_message import new_content, text_of
from cytofed.server.asking import ask, content_of
from cytofed.server.directory import ServerDirectory
from cytofed.server.sealed_grid import SealedGrid, SealedRun
from cytofed.start import read_start, write_start
from cytofed.strategies import make_strategy
from tests.deployment import joined
from tests.deployment.conftest import deal

LAB = "lab-1"
LABS = (LAB, "lab-2", "lab-3")
PLAN: dict[str, Any] = {
    "labels": {"scale": {"size_px": 32}},
    "model": {"width": 8},
    "train": {"rounds": 1, "steps_per_round": 1, "batch": 8},
    "cohort": {"min_labs": 1},
}


def plan_of(**sections: Any) -> Plan:
    return from_dict({**PLAN, **sections})


@dataclass
class _Line(Grid):
    """Hands messages to the daemon, and its answers back."""

    boundary: Boundary
    replies: dict[str, Message] = field(default_factory=dict)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [1]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return new_message(
            content, kind=message_type, node=dst_node_id, group=group_id, ttl_s=ttl or 1.0
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            came = _carried(message)
            number = came.metadata.message_id
            answer = self.boundary.tell(came)
            if answer is not None:
                said = answer.content or Error(ERROR_CODE, answer.reason)
                self.replies[number] = Message(said, reply_to=came)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in message_ids if number in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@dataclass
class Boundary:
    """See the module. ``notes``: what the lab has told its people."""

    server: ServerDirectory
    lab: ClientDirectory
    daemon: Daemon
    identities: Mapping[str, Identity]
    notes: list[str]
    working: contextlib.ExitStack

    def restart(self) -> None:
        """The lab's process has died, and another has taken over."""
        self.working.close()
        self.daemon = Daemon(self.lab, note=self.notes.append)
        self.working.enter_context(self.daemon.at_work())

    @property
    def coordinator(self) -> Identity:
        return self.server.identity()

    @property
    def egress(self) -> EgressLog:
        return self.daemon._egress

    def tell(self, message: Message) -> Answer | None:
        """As a link does: what is answered is in the egress log before it leaves."""
        answer = self.daemon.respond(message)
        if answer is not None:
            self.egress.record(answer.outgoing)
            answer.sent()
        return answer

    def offer(self, plan: Plan, run: str = "run-1", roster: Roster | None = None) -> Offer:
        """Offered to the lab."""
        made = Offer(run, plan, roster or self.server.roster())
        self.send_offer(made.signed(self.coordinator))
        return made

    def send_offer(self, document: bytes) -> Answer | None:
        content = RecordDict({"offer": ConfigRecord({"document": document})})
        return self.tell(new_message(content, kind="query.offer", node=1, group="0", ttl_s=1.0))

    def approve(self, offer: Offer) -> None:
        with open_ledger(self.lab.settings()) as book:
            self.lab.plans().approve(offer.sha256, self.lab.settings(), book)

    def approved(self, plan: Plan, run: str = "run-1") -> Offer:
        offer = self.offer(plan, run)
        self.approve(offer)
        return offer

    def start(self, offer: Offer) -> bytes:
        """The signed start of a run with all labs, who approved it."""
        decisions = {}
        for name, identity in self.identities.items():
            decision = Decision(
                lab=name,
                verdict="approved",
                run=offer.run,
                plan_sha256=offer.plan.sha256,
                roster_sha256=offer.roster.sha256,
                max_weight=32,
                at=datetime.now(UTC),
            )
            decisions[name] = decision.signed(identity)
        start = Start(offer.run, offer.plan.sha256, offer.roster.sha256, decisions)
        return start.signed(self.coordinator)

    def ask(self, offer: Offer, kind: str, number: int, content: RecordDict) -> RecordDict:
        """One order through the coordinator's own sealing. Errors: BadMessage with the reason."""
        sealed = SealedRun(
            identity=self.coordinator,
            roster=offer.roster,
            run=offer.run,
            plan_sha256=offer.plan.sha256,
            start=self.start(offer),
            nodes={LAB: 1},
        )
        grid = SealedGrid(
            _Line(self),
            sealed,
            reply_bytes=1 << 24,
            spool=self.server.root / "spool",
            heads=self.server,
        )
        [(_, reply)] = ask(grid, sealed.nodes, kind, number, content, timeout_s=0.05)
        return content_of(reply).content

    def train(
        self, offer: Offer, number: int, *, kind: Kind = "train", **changes: Any
    ) -> RecordDict:
        """An order to train or to evaluate; the weights are those of the plan's own start."""
        order = Order(
            kind=kind,
            run=offer.run,
            round=number,
            plan_sha256=offer.plan.sha256,
            parts=changes.pop("parts", None) or self.weights(offer),
            **changes,
        )
        return self.ask(offer, kind, number, pack_order(order))

    def evaluate(self, offer: Offer, number: int, **changes: Any) -> RecordDict:
        return self.train(offer, number, kind="evaluate", **changes)

    def step(self, offer: Offer, step: str, body: bytes = b"") -> RecordDict:
        return self.ask(offer, "query.secagg", 0, pack_step(Step(offer.run, step, body)))

    def finish(self, offer: Offer) -> None:
        content = new_content({"status": "completed", "card": "a card"}, file=b"a model")
        found = self.ask(offer, "query.result", offer.plan.train.rounds, content)
        assert text_of(found, "state") == "received"

    def weights(self, offer: Offer) -> Parts:
        """What a coordinator sends in round 1."""
        folder = self.server.root / "starts" / offer.plan.sha256
        folder.mkdir(parents=True, exist_ok=True)
        if read_start(folder) is None:
            write_start(offer.plan, folder)
        found = read_start(folder)
        assert found is not None
        strategy = make_strategy(offer.plan.strategy)
        state: Mapping[str, Any] = strategy.init(found.weights_P)
        return {name: np.asarray(state[name]) for name in strategy.down}

    def left(self, *types: str) -> list[tuple[str, int]]:
        """Type and round of all that left and may hold something of an image, in order."""
        wanted = types or ("update", "masked", "evaluation", "secagg")
        report = read_report(self.lab.egress, self.lab.identity().public)
        found = [(str(r.body["type"]), int(r.body["round"])) for r in report.messages]
        return [(type_, number) for type_, number in found if type_ in wanted]


def _carried(message: Message) -> Message:
    """The message as it comes out of its objects at the other end."""
    objects = deflate(message)

    def fetched(number: str) -> bytes:
        return b"".join(part[:] for part in objects.parts(number))

    return inflate(read_tree(objects.tree), fetched, max_bytes=1 << 30)


@contextlib.contextmanager
def boundary(root: Path, sample: Path, patch: pytest.MonkeyPatch) -> Iterator[Boundary]:
    """A lab with images and patients that has joined, and works; its coordinator, and two labs more
    that have joined."""
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    deal(sample, root, (LAB,))
    server = joined.coordinator(root)
    (server.root / "spool").mkdir(exist_ok=True)
    home = root / LAB
    home.mkdir()
    text = fresh_yaml(
        data=root / "data" / LAB,
        labels="marrow",
        patients="name:_0*([0-9])",
        patients_declared=20,
        ledger=home / "ledger.sqlite",
    )
    write_atomically(home / "client.yaml", text)
    labs = {name: joined.join(server, name, root / name) for name in LABS}
    identities = {name: lab.identity() for name, lab in labs.items()}
    notes: list[str] = []
    with contextlib.ExitStack() as working:
        daemon = Daemon(labs[LAB], note=notes.append)
        working.enter_context(daemon.at_work())
        yield Boundary(server, labs[LAB], daemon, identities, notes, working)
