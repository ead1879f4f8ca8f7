"""One order, one answer: a retry sends the same bytes and trains nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cytofed.client.egress import EgressLog, EgressRefused, Outgoing, fields_of, verify
from cytofed.client.outbox import (
    Fresh,
    Outbox,
    SameBytes,
    SameUpdate,
)
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import AlreadyAnswered, Order
from cytofed.privacy.sealing import Sealed

LEEDS = Identity.generate("leeds")
KEY = os.urandom(32)
HEADER: dict[str, int | float | str] = {"lab": "leeds", "run": "r1", "round": 1, "weight": 100.0}


def order_of(round_: int = 1, slot: int = 0, weights: str = "bb", **changes: str) -> Order:
    text = f"{round_} {slot} {weights} {changes}"
    order = Order(
        federation="f",
        run="r1",
        round=round_,
        slot=slot,
        plan_sha256="aa" * 32,
        weights_sha256=weights * 32,
        order_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    return replace(order, **changes)  # type: ignore[arg-type]


def outgoing_of(sealed: bytes, order: Order) -> Outgoing:
    return Outgoing(
        type="update",
        destination="coordinator:8443",
        fields=fields_of({"lab": "leeds"}, {"weights": np.zeros(3, np.float32)}),
        nbytes=len(sealed),
        sha256=hashlib.sha256(sealed).hexdigest(),
        run=order.run,
        round=order.round,
        slot=order.slot,
    )


def parts_of(round_: int) -> dict[str, np.ndarray]:
    values = np.full(300, round_ + 0.5, np.float32)
    return {"weights": values, "control": -values}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EgressLog]:
    EgressLog.create(tmp_path / "egress.jsonl", LEEDS)
    with EgressLog(tmp_path / "egress.jsonl", LEEDS) as log:
        yield log


@pytest.fixture
def box(tmp_path: Path, log: EgressLog) -> Outbox:
    return Outbox(tmp_path / "outbox", KEY, log)


def reopened(box: Outbox, log: EgressLog) -> Outbox:
    return Outbox(box.folder, KEY, log)


def put(box: Outbox, order: Order, sealed: bytes = b"sealed") -> None:
    box.put(order, sealed_of(sealed), outgoing_of(sealed, order))


def sealed_of(data: bytes) -> Sealed:
    return Sealed(data[:3], memoryview(data)[3:])


def test_the_same_order_gets_the_same_bytes_after_a_restart(box: Outbox, log: EgressLog) -> None:
    sealed = os.urandom(5000)
    assert isinstance(box.take(order_of()), Fresh)
    put(box, order_of(), sealed)
    answer = reopened(box, log).take(order_of())
    assert isinstance(answer, SameBytes)
    assert answer.sealed == sealed
    assert answer.outgoing == outgoing_of(sealed, order_of())
    with pytest.raises(AlreadyAnswered):
        put(box, order_of(), b"other bytes")


def test_the_next_slot_gets_the_same_update_to_mask_anew(box: Outbox, log: EgressLog) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1))
    put(box, order_of())
    answer = reopened(box, log).take(order_of(slot=1))
    assert isinstance(answer, SameUpdate)
    assert answer.header == HEADER
    assert list(answer.parts) == ["weights", "control"]
    for name, values in parts_of(1).items():
        np.testing.assert_array_equal(answer.parts[name], values)


def test_a_crash_after_training_trains_no_more(box: Outbox, log: EgressLog) -> None:
    """The update is kept before it is masked and sealed; the retry starts from there."""
    box.keep_update(order_of(), HEADER, parts_of(1))
    assert isinstance(reopened(box, log).take(order_of()), SameUpdate)


@pytest.mark.parametrize(
    "order",
    [
        order_of(1, 1, "cc"),
        order_of(1, 0, "cc"),
        order_of(1, 0, order_sha256="0" * 64),
        order_of(1, 1, plan_sha256="dd" * 32),
        order_of(0, 5),
    ],
)
def test_another_order_for_an_answered_round_is_refused(box: Outbox, order: Order) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1))
    put(box, order_of())
    with pytest.raises(AlreadyAnswered):
        box.take(order)


def test_other_weights_are_refused_before_anything_was_sealed(box: Outbox) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1))
    with pytest.raises(AlreadyAnswered, match="other weights"):
        box.take(order_of(weights="cc"))
    with pytest.raises(AlreadyAnswered, match="another update"):
        box.keep_update(order_of(), HEADER, parts_of(2))


def test_the_next_round_forgets_the_last(box: Outbox) -> None:
    box.keep_update(order_of(1), HEADER, parts_of(1))
    put(box, order_of(1))
    box.keep_update(order_of(2), HEADER, parts_of(2))
    names = {path.name for path in next(box.folder.iterdir()).iterdir()}
    assert names == {"train-000002.update", "train.update.spare", "train.sealed.spare"}
    with pytest.raises(AlreadyAnswered, match="already answered"):
        box.take(order_of(1))


def test_what_is_over_is_written_over(box: Outbox) -> None:
    """However long a run is, and whether answers grow or shrink."""
    for round_, length in enumerate((9000, 50, 20_000, 300), 1):
        kept = parts_of(round_)
        box.keep_update(order_of(round_), HEADER, kept)
        sealed = os.urandom(length)
        put(box, order_of(round_), sealed)
        answer = box.take(order_of(round_))
        assert isinstance(answer, SameBytes)
        assert answer.sealed.endswith(sealed)
        again = box.take(order_of(round_, 1))
        assert isinstance(again, SameUpdate)
        assert np.array_equal(again.parts["weights"], kept["weights"])
        assert len(list(next(box.folder.iterdir()).iterdir())) <= 4


def test_training_and_evaluation_of_a_round_are_apart(box: Outbox) -> None:
    put(box, order_of())
    scored = replace(order_of(), task="evaluate", order_sha256="ee" * 32)
    assert isinstance(box.take(scored), Fresh)
    put(box, scored, b"scores")
    assert isinstance(box.take(order_of()), SameBytes)
    box.end_run("r1", "f")
    assert isinstance(box.take(order_of()), Fresh)
    assert list(box.folder.iterdir()) == []


def test_a_kept_answer_has_its_egress_record(box: Outbox, log: EgressLog) -> None:
    put(box, order_of())
    for _ in range(2):
        answer = box.take(order_of())
        assert isinstance(answer, SameBytes)
        log.record(answer.outgoing)
    sent = verify(log.path, LEEDS.public).messages
    assert [record.body["again"] for record in sent] == [False, True]


def test_what_may_not_leave_is_not_kept(box: Outbox, log: EgressLog) -> None:
    bad = replace(outgoing_of(b"x", order_of()), type="pixels")
    with pytest.raises(EgressRefused):
        box.put(order_of(), sealed_of(b"x"), bad)
    assert isinstance(box.take(order_of()), Fresh)
    with pytest.raises(InputError, match="not of these bytes"):
        box.put(order_of(), sealed_of(b"y"), outgoing_of(b"x", order_of()))
    assert verify(log.path, LEEDS.public).messages == ()


def test_nothing_readable_is_on_the_disk(box: Outbox) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1))
    values = parts_of(1)["weights"].tobytes()
    for path in (p for p in box.folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        assert values[:16] not in data
        assert b"weights" not in data
        assert path.stat().st_mode & 0o077 == 0


def test_a_changed_file_is_never_sent_or_masked(box: Outbox, log: EgressLog) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1))
    put(box, order_of())
    folder = next(box.folder.iterdir())
    for name, order in ((".sealed", order_of()), (".update", order_of(slot=1))):
        path = next(p for p in folder.iterdir() if p.suffix == name)
        whole = path.read_bytes()
        for at in (0, 20, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises((VerificationError, AlreadyAnswered)):
                reopened(box, log).take(order)
        path.write_bytes(whole[:10])
        with pytest.raises(VerificationError):
            box.take(order)
        path.write_bytes(whole)
    other = Outbox(box.folder, os.urandom(32), log)
    with pytest.raises(VerificationError):
        other.take(order_of(slot=1))


def torn(whole: bytes) -> Iterator[bytes]:
    """What a crash of the machine may leave of a file that was not on the disk yet."""
    for size in (0, 5, 17, 40, len(whole) // 2, len(whole) - 1):
        yield whole[:size]
        yield whole[:size] + bytes(len(whole) - size)


def test_a_torn_draft_counts_as_none_and_the_round_is_trained_again(
    box: Outbox, log: EgressLog
) -> None:
    box.keep_update(order_of(), HEADER, parts_of(1), durable=False)
    [path] = box.folder.rglob("*.draft")
    whole = path.read_bytes()
    for number, left in enumerate(torn(whole), 2):
        path.write_bytes(left)
        after = reopened(box, log)
        assert isinstance(after.take(order_of()), Fresh)
        after.keep_update(order_of(), HEADER, parts_of(number), durable=False)
        kept = after.take(order_of())
        assert isinstance(kept, SameUpdate)
        assert np.array_equal(kept.parts["weights"], parts_of(number)["weights"])
    put(box, order_of())  # and what was answered stays answered
    path.write_bytes(b"")
    assert isinstance(reopened(box, log).take(order_of()), SameBytes)
    with pytest.raises(AlreadyAnswered):
        reopened(box, log).take(order_of(weights="cc"))


def test_what_was_spent_for_is_on_the_disk_before_anything_goes_on(
    box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    box.keep_update(order_of(1), HEADER, parts_of(1), durable=False)
    assert synced == []
    box.keep_update(order_of(2), HEADER, parts_of(2))
    assert [name.startswith(".train-000002.update.") for name in synced] == [True, False]
    for left in torn(next(box.folder.rglob("*.update")).read_bytes()):
        next(box.folder.rglob("*.update")).write_bytes(left)
        with pytest.raises(VerificationError, match="altered"):
            box.take(order_of(2))


def test_an_update_of_another_round_does_not_open(box: Outbox) -> None:
    box.keep_update(order_of(1), HEADER, parts_of(1))
    folder = next(box.folder.iterdir())
    (folder / "train-000001.update").rename(folder / "train-000002.update")
    with pytest.raises(VerificationError):
        box.take(order_of(2))


def test_a_run_named_like_a_path_stays_in_the_outbox(box: Outbox, tmp_path: Path) -> None:
    order = order_of(run="../../etc/x")
    put(box, order)
    assert {p.parent for p in tmp_path.rglob("*.sealed")} == set(box.folder.iterdir())
    with pytest.raises(InputError):
        put(box, replace(order_of(2), order_sha256="../x"))


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, log: EgressLog) -> None:
    (tmp_path / "outbox").write_text("a file where the folder should be")
    box = Outbox(tmp_path / "outbox", KEY, log)
    with pytest.raises(CytofedError, match="cannot be written"):
        box.keep_update(order_of(), HEADER, parts_of(1))


class Retries(RuleBasedStateMachine):
    """Whatever is asked, in whatever order: one (round, slot) gives one answer, trained once."""

    @initialize(folder=st.uuids())
    def start(self, folder: object) -> None:
        import tempfile

        self.tmp = tempfile.TemporaryDirectory()
        path = Path(self.tmp.name) / "egress.jsonl"
        EgressLog.create(path, LEEDS)
        self.log = EgressLog(path, LEEDS)
        self.box = Outbox(Path(self.tmp.name) / "outbox", KEY, self.log)
        self.answers: dict[tuple[int, int], bytes] = {}
        self.trained: dict[int, str] = {}

    @rule(round_=st.integers(1, 3), slot=st.integers(0, 2), weights=st.sampled_from(["bb", "cc"]))
    def ask(self, round_: int, slot: int, weights: str) -> None:
        order = order_of(round_, slot, weights)
        try:
            answer = self.box.take(order)
        except AlreadyAnswered:
            return
        if isinstance(answer, SameBytes):
            assert answer.sealed == self.answers[round_, slot]
            return
        if isinstance(answer, Fresh):
            assert round_ not in self.trained
            assert all(round_ > done for done in self.trained)
            self.trained[round_] = weights
            self.box.keep_update(order, HEADER, parts_of(round_))
        else:
            np.testing.assert_array_equal(answer.parts["weights"], parts_of(round_)["weights"])
        assert self.trained[round_] == weights
        assert (round_, slot) not in self.answers
        self.answers[round_, slot] = os.urandom(8)
        put(self.box, order, self.answers[round_, slot])

    @rule()
    def restart(self) -> None:
        self.box = Outbox(self.box.folder, KEY, self.log)

    @invariant()
    def one_update_at_most(self) -> None:
        if hasattr(self, "box"):
            assert len(list(self.box.folder.rglob("*.update"))) <= 1

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
            self.tmp.cleanup()


TestRetries = Retries.TestCase
TestRetries.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
