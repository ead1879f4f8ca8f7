"""A lab's reply on its way: its objects are one delivery's, and go with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest

from cytofed.messages import RAW, BadMessage, array_of
from cytofed.objects import Objects, deflate
from cytofed.server import fleet as fleet_module
from cytofed.server.fleet import Fleet, FleetGrid
from cytofed.server.uploads import Arriving

ROOM = 1 << 23


class Lab:
    """A lab of a fleet in this process, below the network: what it sends is the test's."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.link, self.node = fleet, fleet._link, fleet.nodes[name]
        self.link.activate_node(self.node, 30.0)

    def asked(self, grid: FleetGrid) -> tuple[str, Message]:
        """A message to this lab, as the round loop knows it and as the lab gets it."""
        content = RecordDict({"header": ConfigRecord({"n": os.urandom(8)})})
        [number] = grid.push_messages([grid.create_message(content, "train", self.node, "1", 60.0)])
        [message] = self.link.get_message_ins(self.node, 1)
        return number, message

    def announce(self, objects: Objects, tree: ObjectTree | None = None) -> tuple[str, list[str]]:
        session = self.link.start_session(objects.head.metadata.run_id)
        _, missing = self.link.store_message_and_object_tree(
            objects.head, objects.tree if tree is None else tree, session
        )
        return session, missing

    def push(self, session: str, number: str, content: bytes) -> None:
        """One object, as a request's body brings it."""
        field = PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER
        body = PushObjectRequest(object_content=content).SerializeToString()
        with Arriving(field, self.link.spool, file_from=1 << 16) as arriving:
            arriving.feed(body)
            self.link.take_object(session, number, arriving.end()[1])

    def answer(self, objects: Objects) -> None:
        session, missing = self.announce(objects)
        for number in missing:
            self.push(session, number, objects.content(number))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    made = Fleet(poll_s=0.1, spool=tmp_path / "spool")
    made.enrol({"leeds": b"key of leeds", "oslo": b"key of oslo"})
    return made


def grid_of(fleet: Fleet) -> FleetGrid:
    return fleet.grid(wait_s=600.0, reply_bytes=ROOM)


def reply_of(message: Message, *arrays: bytes) -> Objects:
    record = ArrayRecord()
    for number, data in enumerate(arrays):
        record[str(number)] = array_of("uint8", (len(data),), RAW, memoryview(data))
    return deflate(Message(RecordDict({"parts": record}), reply_to=message))


def left_in(fleet: Fleet) -> tuple[Any, ...]:
    link = fleet._link
    kept: list[dict[str, Any]] = [
        link.deliveries, link.uploads, link.message_ins_store, link.message_res_store
    ]  # fmt: skip
    assert len(link.object_store) == 0
    assert not link._object_push_sessions
    return (*map(len, kept), *link.spool.iterdir())


NOTHING = (0, 0, 0, 0)
LARGE = os.urandom(1 << 20)


def test_reply_comes_whole_and_nothing_of_it_is_left(fleet: Fleet) -> None:
    lab, grid = Lab(fleet, "leeds"), grid_of(fleet)
    number, message = lab.asked(grid)
    lab.answer(reply_of(message, LARGE, b"small", LARGE[: 1 << 17]))
    [reply] = grid.pull_messages([number])
    record = reply.content["parts"]
    assert isinstance(record, ArrayRecord)
    assert [bytes(array.data) for array in record.values()] == [LARGE, b"small", LARGE[: 1 << 17]]
    assert left_in(fleet) == NOTHING


def test_no_other_lab_has_a_say_in_how_a_reply_hangs_together(fleet: Fleet) -> None:
    leeds, oslo, grid = Lab(fleet, "leeds"), Lab(fleet, "oslo"), grid_of(fleet)
    number, message = leeds.asked(grid)
    _, other = oslo.asked(grid)
    honest, foreign = reply_of(message, LARGE), reply_of(other)
    lie = ObjectTree(
        object_id=foreign.number,
        children=[ObjectTree(object_id=name) for name in sorted(honest.numbers)],
    )
    session, missing = oslo.announce(foreign, lie)
    assert set(missing) > honest.numbers
    for name in honest.numbers:
        oslo.push(session, name, honest.content(name))
    _, needed = leeds.announce(honest)
    assert set(needed) == honest.numbers  # what another lab sent is none of its own
    leeds.answer(honest)
    [reply] = grid.pull_messages([number])
    assert reply.has_content()


def test_object_of_another_name_or_of_no_announcement_is_not_taken(fleet: Fleet) -> None:
    lab, grid = Lab(fleet, "leeds"), grid_of(fleet)
    _, message = lab.asked(grid)
    objects = reply_of(message, b"x")
    session, missing = lab.announce(objects)
    with pytest.raises(BadMessage, match="not the object of that name"):
        lab.push(session, missing[0], b"other")
    lab.push(session, "f" * 64, b"never announced")
    with pytest.raises(BadMessage, match="nobody waits"):
        lab.push("guess", missing[0], objects.content(missing[0]))
    assert lab.announce(objects)[1] == missing


def test_room_is_of_the_delivery_and_what_is_sent_twice_takes_none(fleet: Fleet) -> None:
    lab, grid = Lab(fleet, "leeds"), grid_of(fleet)
    _, message = lab.asked(grid)
    objects = reply_of(message, *(os.urandom(ROOM // 4) for _ in range(6)))
    large = sorted(objects.numbers, key=lambda name: -objects.sizes()[name])[:6]
    taken = 0
    for name in large:
        session, _ = lab.announce(objects)
        for _ in range(2):
            try:
                lab.push(session, name, objects.content(name))
            except BadMessage:
                continue
        taken = sum(file.stat().st_size for file in fleet.spool.iterdir())
        assert taken <= ROOM
    assert taken > ROOM // 2


def test_small_objects_do_not_add_up_in_memory(fleet: Fleet) -> None:
    lab = Lab(fleet, "leeds")
    _, message = lab.asked(fleet.grid(wait_s=600.0, reply_bytes=1 << 30))
    objects = reply_of(message, *(os.urandom(60_000) for _ in range(100)))
    with pytest.raises(BadMessage, match="larger than any"):
        lab.answer(objects)


def test_another_reply_to_the_same_message_is_refused(fleet: Fleet) -> None:
    lab, grid = Lab(fleet, "leeds"), grid_of(fleet)
    number, message = lab.asked(grid)
    first = reply_of(message, b"first")
    lab.answer(first)
    with pytest.raises(BadMessage, match="another one came first"):
        lab.announce(reply_of(message, b"second"))
    assert lab.announce(first)[1] == []  # whose answer got lost
    assert [reply.has_content() for reply in grid.pull_messages([number])] == [True]


@pytest.mark.parametrize("of", ["message", "record", "array"])
def test_reply_that_is_not_what_was_announced_is_its_labs_failure(fleet: Fleet, of: str) -> None:
    lab, grid = Lab(fleet, "leeds"), grid_of(fleet)
    number, message = lab.asked(grid)
    objects = reply_of(message, b"x")
    tree = ObjectTree.FromString(objects.tree.SerializeToString())
    at = tree
    for _ in range(["message", "record", "array"].index(of)):
        at = at.children[0]
    del at.children[:]
    session, missing = lab.announce(objects, tree)
    for name in missing:
        lab.push(session, name, objects.content(name))
    [reply] = grid.pull_messages([number])
    assert reply.has_error()
    assert "not what was announced" in str(reply.error.reason)
    assert left_in(fleet) == NOTHING


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), KeyError("x"), TypeError()])
def test_reply_that_cannot_be_read_is_its_labs_failure_whatever_that_raises(
    fleet: Fleet, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inflate(*_told: Any, **_limits: Any) -> Message:
        raise error

    grid, lab = grid_of(fleet), Lab(fleet, "leeds")
    _, message = lab.asked(grid)
    lab.answer(reply_of(message, b"abc"))
    monkeypatch.setattr("cytofed.server.fleet.inflate", inflate)
    [reply] = grid.pull_messages(list(grid._waiting))
    assert "its reply cannot be read" in str(reply.error.reason)


def test_what_nobody_waits_for_any_more_is_swept(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, forgotten = Lab(fleet, "leeds"), grid_of(fleet)
    monkeypatch.setattr(fleet_module, "_LATE_S", -1e6)
    _, message = lab.asked(forgotten)
    objects = reply_of(message, LARGE, b"and one that never comes")
    session, missing = lab.announce(objects)
    large = max(missing, key=objects.sizes().__getitem__)
    lab.push(session, large, objects.content(large))
    (fleet.spool / "left over").write_bytes(b"x")
    del forgotten
    grid_of(fleet).push_messages([])
    assert left_in(fleet) == NOTHING
