"""An enrolled lab that calls for, or in place of, another: below the network, in the coordinator's
own process. One claim each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from flwr.proto.message_pb2 import ObjectTree

from cytofed.messages import BadMessage
from cytofed.objects import Objects
from cytofed.server.fleet import Fleet, _Calls
from tests.attacks.stage import guarded_by
from tests.server.test_fleet import Lab, reply_of

ROOM = 1 << 16


@dataclass
class Asked:
    """Leeds was asked something and has its answer; Oslo is enrolled too."""

    leeds: Lab
    oslo: Lab
    number: str
    objects: Objects
    calls: _Calls

    def call(self, name: str, by: Lab, **fields: Any) -> None:
        """What is checked of a call before anything is done."""
        self.calls._check(name, by.node, SimpleNamespace(**fields))

    def announcement(self, by: Lab, content: tuple[str, ...] = ()) -> dict[str, Any]:
        metadata = SimpleNamespace(
            reply_to_message_id=self.number, src_node_id=by.node, message_id=self.objects.number
        )
        head = SimpleNamespace(metadata=metadata, content=SimpleNamespace(items=content))
        return {"messages_list": [head], "message_object_trees": [self.objects.tree]}


@contextmanager
def asked(size: int = 100) -> Iterator[Asked]:
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(poll_s=0.1, spool=Path(folder) / "spool")
        fleet.enrol({"leeds": b"key of leeds", "oslo": b"key of oslo"})
        grid = fleet.grid(wait_s=600.0, reply_bytes=ROOM)
        leeds, oslo = Lab(fleet, "leeds"), Lab(fleet, "oslo")
        _, message = leeds.asked(grid)
        calls = _Calls(fleet._link, poll_s=0.1)
        number = message.metadata.message_id
        yield Asked(leeds, oslo, number, reply_of(message, bytes(size)), calls)


def forbidden(status: int) -> Any:
    return pytest.raises(HTTPException, match=str(status))


def test_honest_calls_are_let_in() -> None:
    with asked() as on:
        on.call("push-messages", on.leeds, **on.announcement(on.leeds))
        session, _ = on.leeds.announce(on.objects)
        on.call("push-object", on.leeds, session_id=session)
        on.call("confirm-message-received", on.leeds, message_object_id=on.number)


@guarded_by("node-reply")
def test_lab_answers_for_no_other() -> None:
    with asked() as on, forbidden(403):
        on.call("push-messages", on.oslo, **on.announcement(on.leeds))


@guarded_by("reply-uploads")
def test_announcement_with_a_content_is_refused() -> None:
    """It is read whole, and counted nowhere."""
    with asked() as on, forbidden(413):
        on.call("push-messages", on.leeds, **on.announcement(on.leeds, ("a record",)))


@guarded_by("reply-uploads")
def test_lab_starts_no_upload_without_end() -> None:
    with asked() as on:
        for _ in range(20):
            on.call("push-messages", on.leeds, **on.announcement(on.leeds))
        with forbidden(413):
            on.call("push-messages", on.leeds, **on.announcement(on.leeds))


@guarded_by("node-upload")
def test_lab_puts_nothing_into_the_upload_of_another() -> None:
    with asked() as on:
        session, _ = on.leeds.announce(on.objects)
        with forbidden(403):
            on.call("push-object", on.oslo, session_id=session)


@guarded_by("node-object")
def test_lab_reads_no_object_of_a_message_to_another() -> None:
    with asked() as on:
        sent = on.leeds.link.deliveries[on.number].sent
        assert sent is not None
        with forbidden(403):
            on.call("pull-object", on.oslo, object_id=sent.number)
        on.call("pull-object", on.leeds, object_id=sent.number)


@guarded_by("node-confirm")
def test_lab_confirms_no_message_of_another() -> None:
    """The coordinator would drop what Leeds still has to fetch."""
    with asked() as on, forbidden(403):
        on.call("confirm-message-received", on.oslo, message_object_id=on.number)


@guarded_by("reply-tree")
def test_reply_that_hangs_together_in_another_way_than_before_is_refused() -> None:
    with asked() as on:
        on.leeds.announce(on.objects)
        other = ObjectTree()
        other.CopyFrom(on.objects.tree)
        del other.children[:]
        with pytest.raises(BadMessage, match="in another way than before"):
            on.leeds.announce(on.objects, other)


@guarded_by("reply-object")
def test_bytes_that_are_not_those_of_their_name_are_refused() -> None:
    with asked() as on:
        session, missing = on.leeds.announce(on.objects)
        with pytest.raises(BadMessage, match="not the object of that name"):
            on.leeds.push(session, missing[0], b"other bytes")


@guarded_by("reply-room")
def test_reply_of_more_bytes_than_were_asked_for_is_refused() -> None:
    too_large = pytest.raises(BadMessage, match="larger than any that was asked for")
    with asked(2 * ROOM) as on, too_large:
        on.leeds.answer(on.objects)
