"""A lab that answers something else than it was asked, or with another lab's words. One claim each.

The lies pass the coordinator's own sealed grid; see mutate.py for the proof that each guard is
needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from cytofed.documents import LedgerHead, Roster
from cytofed.errors import VerificationError
from cytofed.messages import BadMessage, Masked, Order, new_message, pack_masked
from cytofed.privacy.encoding import one_range
from cytofed.privacy.identity import Identity
from cytofed.privacy.sealing import seal
from cytofed.sealed_message import Parcel, new_content, pack_content, pack_parcel
from cytofed.server.asking import ask, content_of
from cytofed.server.sealed_grid import SealedGrid, SealedRun
from cytofed.server.secure import _masked
from tests.attacks.boundary import _Line
from tests.attacks.stage import PLAN, guarded_by
from tests.deployment import joined

LABS = ("lab-1", "lab-2")


@cache
def federation() -> tuple[Identity, Roster, dict[str, Identity]]:
    """Two labs that have enrolled."""
    with tempfile.TemporaryDirectory() as folder:
        server = joined.coordinator(Path(folder))
        labs = {name: joined.join(server, name, Path(folder) / name) for name in LABS}
        identities = {name: lab.identity() for name, lab in labs.items()}
        return server.identity(), server.roster(), identities


@dataclass
class Heads:
    noted: dict[str, bytes] = field(default_factory=dict)

    def seen_head(self, lab: str) -> bytes:
        return self.noted.get(lab, b"")

    def note_head(self, lab: str, document: bytes) -> None:
        self.noted[lab] = document


@dataclass
class Liar:
    """What lab-1 sends for whatever it is asked."""

    sealed: SealedRun
    kind: str
    sends: RecordDict

    def tell(self, message: Message) -> Any:
        _, _, identities = federation()
        manifest, payload = pack_content(self.sends)
        round_ = int(message.metadata.group_id)
        place = self.sealed.context(round_, 0, self.kind, lab="lab-1", to_lab=False)
        receiver = self.sealed.identity.public
        body = seal(
            payload, place, sender=identities["lab-1"], receiver=receiver, manifest=manifest
        )
        parcel = pack_parcel(Parcel("run-1", round_, 0, self.kind, body))
        return _Answer(parcel)


@dataclass
class _Answer:
    content: RecordDict
    reason: str = ""


def answered(kind: str, sends: RecordDict, heads: Any = None) -> RecordDict:
    """What the round loop gets for an order to train. Errors: BadMessage."""
    identity, roster, _ = federation()
    sealed = SealedRun(identity, roster, "run-1", PLAN, b"", {"lab-1": 1})
    line: Any = _Line(Liar(sealed, kind, sends))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        grid = SealedGrid(
            line, sealed, reply_bytes=1 << 20, spool=Path(folder), heads=heads or Heads()
        )
        content = new_content({"run": "run-1"})
        [(_, reply)] = ask(grid, {"lab-1": 1}, "train", 1, content, timeout_s=0.05)
        return content_of(reply).content


def test_honest_answer_comes_through() -> None:
    assert answered("train", new_content({"said": "yes"}))["header"]["said"] == "yes"


class Silent:
    def tell(self, _message: Message) -> None:
        return None


def test_what_a_lab_never_answers_does_not_add_up(tmp_path: Path) -> None:
    identity, roster, _ = federation()
    sealed = SealedRun(identity, roster, "run-1", PLAN, b"", {"lab-1": 1})
    line: Any = _Line(Silent())  # type: ignore[arg-type]
    grid = SealedGrid(line, sealed, reply_bytes=1 << 20, spool=tmp_path, heads=Heads())
    for number in range(1, 20):
        content = new_content({"run": "run-1"})
        assert list(ask(grid, {"lab-1": 1}, "train", number, content, timeout_s=0.0)) == [
            ("lab-1", None)
        ]
    assert len(grid._places) == 1


@guarded_by("answer-kind")
def test_answer_to_another_question_is_refused() -> None:
    """Well sealed by the lab itself, for the same round: but as scores, where it should train."""
    with pytest.raises(BadMessage, match="answers a train order with 'evaluate'"):
        answered("evaluate", new_content({"said": "yes"}))


@guarded_by("ledger-head")
def test_lab_signs_no_ledger_head_of_another() -> None:
    """It would come back to that lab, and make it believe that its own ledger is old."""
    identity, roster, identities = federation()
    sealed = SealedRun(identity, roster, "run-1", PLAN, b"", {"lab-1": 1, "lab-2": 2})
    heads, nobody = Heads(), _Line(None)  # type: ignore[arg-type]
    grid = SealedGrid(nobody, sealed, reply_bytes=1, spool=Path(), heads=heads)
    head = LedgerHead(roster.federation, "lab-2", "ab" * 32)
    with pytest.raises(VerificationError):
        grid._note_head(head.signed(identities["lab-1"]), "lab-2")
    assert heads.noted == {}
    grid._note_head(head.signed(identities["lab-2"]), "lab-2")
    assert set(heads.noted) == {"lab-2"}


def places() -> Iterable[dict[str, Any]]:
    yield {"lab": "lab-2"}
    yield {"run": "run-0"}
    yield {"round": 1}
    yield {"slot": 4}


@guarded_by("masked-place")
def test_masked_vector_of_another_lab_round_or_slot_is_added_to_no_sum() -> None:
    """Nothing would cancel its masks: the sum would be noise, and nobody be named."""
    encoding = one_range(6, 1.0, bits=32, cohort=4)
    order = Order("train", "run-1", 2, PLAN, slot=5)
    true = {"lab": "lab-1", "run": "run-1", "round": 2, "slot": 5}
    for lie in places():
        words_W = np.zeros(encoding.words, np.uint32)
        content = pack_masked(Masked(**{**true, **lie}, words_W=words_W))
        reply = new_message(content, kind="train", node=1, group="2", ttl_s=1.0)
        with pytest.raises(BadMessage, match="answers as"):
            _masked("lab-1", order, encoding, reply)
