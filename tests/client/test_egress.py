"""Everything that leaves is in the log first, and a log that was touched says where."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.client.egress import (
    FIELDS,
    ROUTINE,
    ROUTINE_ALLOWED,
    EgressAltered,
    EgressLog,
    EgressMissing,
    EgressRefused,
    EgressReport,
    Field,
    Outgoing,
    Protection,
    accept_cut,
    check_against_ledger,
    check_outgoing,
    fields_of,
    public_reason,
    verify,
)
from cytofed.errors import CytofedError, InputError, RefusedError
from cytofed.messages import Evaluation, pack_evaluation
from cytofed.metrics import Tally
from cytofed.plan import StrategySpec
from cytofed.privacy.accounting import PlanCost, SubsampledGaussian
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger, LedgerRolledBack, Order
from cytofed.strategies import STRATEGIES, make_strategy

if TYPE_CHECKING:
    from _typeshed import TraceFunction

LEEDS = Identity.generate("leeds")
YORK = Identity.generate("york")
HEADER: dict[str, int | float | str | bytes] = {
    "lab": "leeds",
    "run": "r1",
    "round": 1,
    "weight": 40.0,
    "loss": 0.7,
    "train_s": 1.0,
}
UPDATE = Outgoing(
    type="update",
    destination="coordinator:8443",
    fields=fields_of(HEADER, {"weights": np.zeros(5, np.float32)}),
    nbytes=1234,
    sha256="11" * 32,
    run="r1",
    round=1,
)
PRIVATE = Protection("patient", clip=1.0, sigma=2.0, epsilon=0.5, delta=1e-3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    EgressLog.create(tmp_path / "egress.jsonl", LEEDS)
    return tmp_path / "egress.jsonl"


def write(path: Path, *messages: Outgoing) -> EgressReport:
    with EgressLog(path, LEEDS) as log:
        for message in messages:
            log.record(message)
    return verify(path, LEEDS.public)


def numbered(count: int) -> list[Outgoing]:
    return [replace(UPDATE, round=n, sha256=f"{n:064x}", ledger_head=f"h{n}") for n in range(count)]


def test_a_record_says_all_of_a_message_before_it_leaves(path: Path) -> None:
    with EgressLog(path, LEEDS) as log:
        receipt = log.record(replace(UPDATE, protection=PRIVATE, fields=UPDATE.fields[:4]))
        # The log is open: what is on the disk now is what a crash would leave.
        found = verify(path, LEEDS.public).messages[-1]
    assert found.hash == receipt.hash
    assert Outgoing.from_dict({k: v for k, v in found.body.items() if k != "again"}) == replace(
        UPDATE, protection=PRIVATE, fields=UPDATE.fields[:4]
    )
    assert (path.stat().st_mode & 0o777) == 0o600


def test_fields_are_logged_with_shapes_and_public_values() -> None:
    found = {f.name: f for f in UPDATE.fields}
    assert found["weights"] == Field("weights", "float32", (5,))
    assert found["weight"] == Field("weight", "number", (), 40.0)
    assert fields_of({"loss": float("nan")})[0].value == "nan"
    assert fields_of({"body": b"secret"}) == (Field("body", "bytes", (6,)),)


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_no_type_takes_an_image_a_path_or_an_unlisted_field(kind: str) -> None:
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    for name in ("pixels", "file_name", "patient", *FIELDS[kind]):
        for fields in (fields_of({}, {name: pixels}), (Field(name, "pickle"),)):
            with pytest.raises(EgressRefused):
                check_outgoing(replace(UPDATE, type=kind, fields=fields))
    with pytest.raises(EgressRefused, match="twice"):
        check_outgoing(replace(UPDATE, fields=(*UPDATE.fields, UPDATE.fields[0])))


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_that_a_strategy_sends_may_leave(name: str) -> None:
    for part in make_strategy(StrategySpec(name)).lab.up:
        assert FIELDS["update"][part] == ("float32",)


def test_every_array_of_an_evaluation_may_leave_and_is_exact_without_noise() -> None:
    content = pack_evaluation(Evaluation("leeds", "r1", 1, Tally.empty(3)))
    arrays = content["parts"]
    assert isinstance(arrays, ArrayRecord)
    for name, array in arrays.items():
        message = replace(UPDATE, type="evaluation", fields=(Field(name, array.dtype),))
        check_outgoing(message)
        with pytest.raises(EgressRefused, match="patient"):
            check_outgoing(replace(message, protection=Protection("patient")))


def test_an_unknown_type_is_refused_and_nothing_is_written(path: Path) -> None:
    before = path.read_bytes()
    with EgressLog(path, LEEDS) as log, pytest.raises(EgressRefused, match="exfiltrate"):
        log.record(replace(UPDATE, type="exfiltrate"))
    assert verify(path, LEEDS.public).messages == ()
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("hello", fields_of({"lab": "leeds", "images": 512})),
        ("update", fields_of({"loss": 0.5})),
        ("update", fields_of({"train_s": 3.0})),
        ("evaluation", fields_of({}, {"confusion": np.zeros((3, 3), np.int64)})),
    ],
)
def test_private_plans_let_no_exact_number_of_patients_out(
    kind: str, fields: tuple[Field, ...]
) -> None:
    message = replace(UPDATE, type=kind, fields=fields)
    check_outgoing(message)
    with pytest.raises(EgressRefused, match="patient"):
        check_outgoing(replace(message, protection=Protection("patient")))


def test_noised_numbers_of_private_plans_may_leave() -> None:
    header: dict[str, int | float | str | bytes] = {**HEADER, "loss": float("nan"), "train_s": 0.0}
    fields = fields_of(header, {"weights": np.zeros(5, np.float32)})
    check_outgoing(replace(UPDATE, fields=fields, protection=PRIVATE))
    noised = fields_of({"lab": "leeds"}, {"confusion": np.zeros((3, 3), np.int64)})
    check_outgoing(replace(UPDATE, type="evaluation", fields=noised, protection=PRIVATE))


@pytest.mark.parametrize(
    "text",
    [
        "cannot read /srv/images/BLA/7.jpg",
        "C:\\images\\x",
        "15-48904.PB is damaged",
        "Smith_1962-04-13",
        "see marrow.csv",
    ],
)
def test_no_reason_carries_a_path_or_an_identifier(text: str) -> None:
    assert text not in public_reason(RefusedError(text))
    with pytest.raises(EgressRefused, match="reason"):
        check_outgoing(replace(UPDATE, type="refusal", fields=fields_of({"reason": text})))


def test_a_refusal_may_name_the_run_that_the_coordinator_named() -> None:
    run = "greedy-20261130-121912-8c99"
    reason = public_reason(RefusedError(f"round 3 of run {run} is past"), known=(run,))
    told = replace(UPDATE, type="refusal", fields=fields_of({"reason": reason}))
    check_outgoing(replace(told, run=run))
    with pytest.raises(EgressRefused, match="reason"):
        check_outgoing(replace(told, run="another"))


def test_a_refusal_tells_its_reason_and_an_error_about_data_does_not() -> None:
    reason = f"plan {'0a1b2c3d4e5f'} of run marrow-20260101-120000 is not approved at this lab"
    assert public_reason(RefusedError(reason), known=("marrow-20260101-120000",)) == reason
    assert "412" not in public_reason(InputError('label "Smith" on 412 images is unmapped'))
    assert "Smith" not in public_reason(ValueError("Smith"))


# --- the chain


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "egress.jsonl"
    EgressLog.create(path, LEEDS)
    write(path, *numbered(3))
    raw = bytearray(path.read_bytes())
    last_line = raw.rindex(b"\n", 0, len(raw) - 1) + 1
    at = data.draw(st.integers(0, len(raw) - 2))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    expected = raw[:at].count(b"\n") + 1
    with pytest.raises(EgressAltered) as caught:
        verify(path, LEEDS.public)
    # A byte that became a line's end tears its record in two: then the first half is named.
    assert caught.value.record == expected or raw[at] == ord("\n")
    assert caught.value.exit_code == 5
    assert at < last_line or caught.value.record >= raw[:last_line].count(b"\n")


def test_removed_reordered_and_foreign_records_are_found(path: Path) -> None:
    write(path, *numbered(4))
    lines = path.read_bytes().splitlines(keepends=True)
    for altered, record in (
        ([*lines[:3], *lines[4:]], 4),
        ([lines[1], lines[0], *lines[2:]], 1),
        ([*lines, lines[-1]], len(lines) + 1),
    ):
        path.write_bytes(b"".join(altered))
        with pytest.raises(EgressAltered) as caught:
            verify(path, LEEDS.public)
        assert caught.value.record == record


def test_a_log_rewritten_with_another_key_is_found(tmp_path: Path) -> None:
    """Hashes can be computed by anyone; only the lab can sign."""
    forged = tmp_path / "forged.jsonl"
    impostor = Identity.generate("leeds")
    EgressLog.create(forged, impostor)
    with EgressLog(forged, impostor) as log:
        log.record(UPDATE)
    with pytest.raises(EgressAltered, match="record 1") as caught:
        verify(forged, LEEDS.public)
    assert caught.value.record == 1
    with pytest.raises(EgressAltered):
        EgressLog(forged, LEEDS)


def test_a_missing_log_is_never_begun_anew(path: Path) -> None:
    path.unlink()
    with pytest.raises(EgressMissing):
        EgressLog(path, LEEDS)
    with pytest.raises(EgressMissing):
        verify(path, LEEDS.public)
    assert not path.exists()


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_log_cut_short_or_put_back_from_a_backup_is_noticed(path: Path, lines: int) -> None:
    write(path, *numbered(3))
    kept = path.read_bytes().splitlines(keepends=True)[:-lines]
    path.write_bytes(b"".join(kept))
    with pytest.raises(EgressMissing, match="cut short"):
        verify(path, LEEDS.public)
    with pytest.raises(EgressMissing, match="cut short"):
        EgressLog(path, LEEDS)
    assert path.read_bytes() == b"".join(kept)
    accept_cut(path)  # as after all approvals were charged in full
    assert len(write(path, *numbered(1)).messages) >= 1


@pytest.mark.parametrize("keep", [1, 40, -20, -1])
def test_a_torn_last_line_is_mended_and_no_signed_record_is_dropped(path: Path, keep: int) -> None:
    write(path, *numbered(2))
    raw = path.read_bytes()
    start = raw.rindex(b"\n", 0, len(raw) - 1) + 1
    torn = raw[: start + keep] if keep > 0 else raw[:keep]
    path.write_bytes(torn)
    path.with_suffix(".head").unlink()  # noted after the line is whole: here it never was
    whole_records = torn.count(b"\n")
    assert verify(path, LEEDS.public).torn_bytes > 0  # reading alone changes nothing
    assert path.read_bytes() == torn
    report = write(path, *numbered(1))
    assert report.torn_bytes == 0
    kept = whole_records + (1 if keep == -1 else 0)
    assert path.read_bytes().splitlines()[:kept] == raw.splitlines()[:kept]
    assert ("repair" in {r.kind for r in report.records}) == (keep != -1)


def test_kill_9_at_any_moment_leaves_every_sent_message_in_the_log(path: Path) -> None:
    """A child prints each hash after ``record`` returned, as if it then sent; it is killed."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from cytofed.client.egress import EgressLog, Outgoing\n"
        "from cytofed.privacy.identity import Identity\n"
        "identity = Identity.from_bytes(bytes.fromhex(sys.argv[2]))\n"
        "log = EgressLog(Path(sys.argv[1]), identity)\n"
        "message = Outgoing('leave', 'x', (), 1, '')\n"
        "for n in range(10**6):\n"
        "    print(log.record(replace(message, sha256=f'{n:064x}')).hash, flush=True)\n"
    )
    args = [sys.executable, "-c", code, str(path), LEEDS.to_bytes().hex()]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        sent = [child.stdout.readline().strip() for _ in range(50)]
        child.send_signal(signal.SIGKILL)
        sent += child.stdout.read().split()[:-1]  # the last line may be torn
    report = write(path)
    assert set(sent) <= {record.hash for record in report.messages}


class InterruptedAt:
    """Ctrl-C or SIGTERM before the ``last``-th line of the package that runs within the block."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __enter__(self) -> None:
        sys.settrace(self.enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def enter(self, frame: FrameType, _event: str, _argument: object) -> TraceFunction | None:
        return self.line if "cytofed" in frame.f_code.co_filename else None

    def line(self, _frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        self.left -= event == "line"
        if not self.left:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.line


def test_an_interruption_at_any_line_leaves_a_log_that_opens(tmp_path: Path) -> None:
    for last in itertools.count(1):
        path = tmp_path / f"{last}.jsonl"
        EgressLog.create(path, LEEDS)
        interrupted = False
        with EgressLog(path, LEEDS) as log:
            log.record(UPDATE)
            log.routine("poll", 90)
            try:
                with InterruptedAt(last):
                    log.record(replace(UPDATE, sha256="22" * 32))
            except KeyboardInterrupt:
                interrupted = True
            with contextlib.suppress(CytofedError):  # as a lab that ends says good-bye
                log.routine("deactivate", 90)
        shas = [r.body["sha256"] for r in write(path, replace(UPDATE, sha256="33" * 32)).messages]
        assert shas in (["11" * 32, "33" * 32], ["11" * 32, "22" * 32, "33" * 32])
        if not interrupted:
            assert last > 50
            return


def test_a_full_disk_stops_the_message_and_leaves_the_log_whole(path: Path) -> None:
    with EgressLog(path, LEEDS) as log:
        log.record(UPDATE)
        size = path.stat().st_size
        # The kernel's own limit on a file's size stands in for a full disk.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
            with pytest.raises(CytofedError, match="cannot be written"):
                log.record(replace(UPDATE, sha256="22" * 32))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.stat().st_size == size
        log.record(replace(UPDATE, sha256="33" * 32))
    shas = [r.body["sha256"] for r in verify(path, LEEDS.public).messages]
    assert shas == ["11" * 32, "33" * 32]


def test_one_process_holds_the_log(path: Path) -> None:
    with EgressLog(path, LEEDS), pytest.raises(CytofedError, match="another process"):
        EgressLog(path, LEEDS)
    EgressLog(path, LEEDS).close()


def test_threads_do_not_break_the_chain(path: Path) -> None:
    with EgressLog(path, LEEDS) as log:

        def send(start: int) -> None:
            for n in range(20):
                log.record(replace(UPDATE, run=f"r{start}", sha256=f"{start + n:064x}"))
                log.routine("poll", 90)

        threads = [threading.Thread(target=send, args=(100 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = verify(path, LEEDS.public)
    assert len(report.messages) == 80
    assert report.routine == {"poll": {90: 80}}


# --- routine messages


def test_routine_messages_are_counted_by_kind_and_size(path: Path) -> None:
    with EgressLog(path, LEEDS) as log:
        for _ in range(7):
            log.routine("poll", 120)
        log.routine("poll", 128)
        log.record(UPDATE)
        log.routine("heartbeat", 60)
    report = verify(path, LEEDS.public)
    assert report.routine == {"poll": {120: 7, 128: 1}, "heartbeat": {60: 1}}
    assert report.routine_at_most == 0
    assert len(report.records) < 9


def test_a_crash_never_hides_a_routine_message(path: Path) -> None:
    log = EgressLog(path, LEEDS)
    for _ in range(3):
        log.routine("poll", 120)
    os.close(log._file)  # as a kill does: nothing is written at the end
    log._file = -1
    report = verify(path, LEEDS.public)
    assert sum(report.routine.get("poll", {}).values()) + report.routine_at_most >= 3
    later = write(path)
    assert later.routine_at_most == ROUTINE_ALLOWED


@pytest.mark.parametrize(
    ("kind", "size"), [("upload", 10), *((k, n + 1) for k, n in ROUTINE.items())]
)
def test_a_routine_message_is_small_and_of_a_known_kind(path: Path, kind: str, size: int) -> None:
    with EgressLog(path, LEEDS) as log, pytest.raises(EgressRefused):
        log.routine(kind, size)


# --- bytes of a round


def test_bytes_of_a_round_are_limited_over_restarts_and_repeats_are_free(path: Path) -> None:
    with EgressLog(path, LEEDS, max_bytes_per_round=2000) as log:
        log.record(UPDATE)
    with EgressLog(path, LEEDS, max_bytes_per_round=2000) as log:
        assert log.record(UPDATE).body["again"] is True
        with pytest.raises(EgressRefused, match="max_bytes_per_round"):
            log.record(replace(UPDATE, sha256="22" * 32))
        log.record(replace(UPDATE, round=2, sha256="22" * 32))


# --- the ledger's second witness


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    Ledger.create(tmp_path / "ledger.sqlite")
    return Ledger.open(tmp_path / "ledger.sqlite")


def answered(book: Ledger, round_: int) -> str:
    """One round reserved, released and settled; the head that leaves with it."""
    cost = PlanCost(1e-3, 100, 10, SubsampledGaussian("patient", 0.1, 2.0, 5))
    book.hold(federation="f", plan_sha256="aa" * 32, cost=cost)
    order = Order("f", "r1", round_, 0, "aa" * 32, "bb" * 32, f"{round_:064x}")
    book.reserve(order)
    book.release(order, "cc" * 32)
    book.settle(order)
    return book.head


def test_a_ledger_older_than_what_left_is_found(path: Path, tmp_path: Path, book: Ledger) -> None:
    backup = (tmp_path / "ledger.sqlite").read_bytes()
    head = answered(book, 1)
    report = write(path, replace(UPDATE, ledger_head=head))
    check_against_ledger(report, book, federation="f")
    book.close()
    (tmp_path / "ledger.sqlite").write_bytes(backup)
    with Ledger.open(tmp_path / "ledger.sqlite") as old:
        with pytest.raises(LedgerRolledBack):
            check_against_ledger(report, old, federation="f")
        with EgressLog(path, LEEDS) as log:
            assert log.ledger_heads == (head,)
            with pytest.raises(LedgerRolledBack):
                log.check_ledger(old)
            old.restore_charge([], seen_heads=log.ledger_heads)
            log.check_ledger(old)


def test_a_log_older_than_what_the_ledger_settled_is_found(path: Path, book: Ledger) -> None:
    backup = path.read_bytes()
    head = answered(book, 1)
    check_against_ledger(write(path, replace(UPDATE, ledger_head=head)), book, federation="f")
    path.write_bytes(backup)
    path.with_suffix(".head").unlink()
    with pytest.raises(EgressMissing, match="round 1"):
        check_against_ledger(verify(path, LEEDS.public), book, federation="f")


def test_the_report_is_plain_json(path: Path) -> None:
    report = write(path, *numbered(2)).to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["types"] == {"update": {"messages": 2, "bytes": 2468}}
    assert report["verified"] is True
