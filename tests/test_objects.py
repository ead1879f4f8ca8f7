"""Messages become Flower's objects and come back; what does not fit is refused, whatever it is."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from cytofed.messages import RAW, BadMessage, array_of, new_message
from cytofed.objects import (
    MOST_OBJECTS,
    PIECE_BYTES,
    InFile,
    Tree,
    body_of_piece,
    cut_to_file,
    deflate,
    enclosed_in,
    inflate,
    read_tree,
    split_long_field,
    with_enclosed,
)

ROOM = 1 << 25


def message_of(data: bytes, **header: Any) -> Message:
    record = ArrayRecord()
    record["body"] = array_of("uint8", (len(data),), RAW, memoryview(data))
    content = RecordDict({"header": ConfigRecord({"run": "r", **header}), "parts": record})
    return new_message(content, kind="train", node=1, group="1", ttl_s=1.0)


def objects_of(message: Message) -> tuple[Tree, dict[str, bytes]]:
    found = deflate(message)
    return read_tree(found.tree), {number: found.content(number) for number in found.numbers}


def data_of(message: Message) -> bytes:
    record = message.content["parts"]
    assert isinstance(record, ArrayRecord)
    return bytes(record["body"].data)


SIZES = [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 12345]


@pytest.mark.parametrize("size", SIZES)
def test_message_comes_back_as_it_was(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    tree, contents = objects_of(message_of(data, round=3))
    back = inflate(tree, contents.__getitem__, max_bytes=ROOM)
    assert data_of(back) == data
    assert back.content["header"] == {"run": "r", "round": 3}
    assert back.metadata.message_id == tree.root


@pytest.mark.parametrize("size", SIZES)
def test_objects_are_those_that_flower_makes_and_reads(size: int) -> None:
    data = bytes(size)  # all pieces alike: they share one object
    tree, contents = objects_of(message_of(data))
    plain = get_all_nested_objects(message_of(data))
    assert {name: item.deflate() for name, item in plain.items()} == contents
    back = inflate_object_from_contents(tree.root, contents)
    assert isinstance(back, Message)
    assert data_of(back) == data


def test_sizes_are_those_of_the_bytes_that_travel() -> None:
    found = deflate(message_of(bytes(PIECE_BYTES + 7)))
    assert found.sizes() == {number: len(found.content(number)) for number in found.numbers}


def test_an_array_in_two_messages_is_cut_once() -> None:
    record = ArrayRecord()
    record["body"] = array_of("uint8", (9,), RAW, memoryview(b"123456789"))
    one, two = (
        deflate(
            new_message(
                RecordDict({"header": ConfigRecord({"to": lab}), "parts": record}),
                kind="train", node=1, group="1", ttl_s=1.0,
            )
        )
        for lab in ("a", "b")
    )  # fmt: skip
    shared = one.numbers & two.numbers
    assert len(shared) == 3  # the piece, its array, its record


@pytest.mark.parametrize("size", SIZES[1:])
def test_an_array_that_lies_in_a_file_travels_as_if_it_did_not(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    plain, moved = message_of(data), message_of(data)
    record = moved.content["parts"]
    assert isinstance(record, ArrayRecord)
    with (tmp_path / "file").open("w+b") as file:
        cut_to_file(record["body"], file)
        found, expected = deflate(moved), deflate(plain)
        assert found.number == expected.number
        assert found.sizes() == expected.sizes()
        assert {name: found.content(name) for name in found.numbers} == {
            name: expected.content(name) for name in expected.numbers
        }
        assert deflate(moved).sizes() == found.sizes()  # sent again


def test_a_piece_is_told_by_its_head_and_length() -> None:
    content = b"ArrayChunk  2\0ab"
    assert content[body_of_piece(content, len(content)) :] == b"ab"


@pytest.mark.parametrize(
    "content",
    [b"", b"ArrayChunk", b"ArrayChunk  3\0ab", b"Array  2\0ab", b"ArrayChunk a 2\0ab",
     b"ArrayChunk  02\0ab"],
)  # fmt: skip
def test_what_is_no_piece_is_refused(content: bytes) -> None:
    with pytest.raises(BadMessage, match="not a piece"):
        body_of_piece(content, len(content))


@pytest.mark.parametrize("size", SIZES)
def test_a_message_is_read_from_files_as_from_memory(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    tree, contents = objects_of(message_of(data))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    back = inflate(tree, lambda name: InFile.of(tmp_path / name), max_bytes=ROOM)
    assert data_of(back) == data


def test_a_file_that_lost_its_end_is_no_array(tmp_path: Path) -> None:
    tree, contents = objects_of(message_of(bytes(PIECE_BYTES)))

    def read(name: str) -> InFile:
        (tmp_path / name).write_bytes(contents[name])
        found = InFile.of(tmp_path / name)
        if found.size > PIECE_BYTES:
            os.truncate(tmp_path / name, PIECE_BYTES)
        return found

    with pytest.raises(BadMessage, match="shorter"):
        inflate(tree, read, max_bytes=ROOM)


def test_a_message_that_was_read_is_freed_with_its_last_reference() -> None:
    tree, contents = objects_of(message_of(bytes(1000)))
    gc.collect()
    gc.disable()
    try:
        back = inflate(tree, contents.__getitem__, max_bytes=ROOM)
        record = back.content["parts"]
        assert isinstance(record, ArrayRecord)
        array = weakref.ref(record["body"])
        del back, record
        assert array() is None
    finally:
        gc.enable()


def test_array_larger_than_allowed_is_refused() -> None:
    tree, contents = objects_of(message_of(bytes(1001)))
    with pytest.raises(BadMessage, match="more than 1000 bytes"):
        inflate(tree, contents.__getitem__, max_bytes=1000)


def test_records_beside_the_arrays_do_not_add_up() -> None:
    message = message_of(b"x")
    for number in range(50):
        message.content[f"more-{number}"] = ConfigRecord({"data": bytes([number]) * 200_000})
    tree, contents = objects_of(message)
    read: list[int] = []

    def reading(name: str) -> bytes:
        read.append(len(contents[name]))
        return contents[name]

    with pytest.raises(BadMessage, match="beside the arrays"):
        inflate(tree, reading, max_bytes=ROOM)
    assert sum(read) < 5 << 20


def test_one_piece_named_many_times_takes_no_memory() -> None:
    tree, contents = objects_of(message_of(b"x" * 1000))
    for name, content in contents.items():
        if content.startswith(b"Array "):
            head, _, body = content.partition(b"\0")
            told = {**json.loads(body), "arraychunk_ids": [0] * 10**5}
            contents[name] = head + b"\0" + json.dumps(told).encode()
    with pytest.raises(BadMessage, match="too many pieces"):
        inflate(tree, contents.__getitem__, max_bytes=ROOM)


@given(data=st.data())
def test_damaged_objects_are_a_bad_message_or_another_one(data: st.DataObject) -> None:
    tree, contents = objects_of(message_of(b"x" * 100))
    name = data.draw(st.sampled_from(sorted(contents)))
    at = data.draw(st.integers(0, len(contents[name]) - 1))
    damaged = bytearray(contents[name])
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        back = inflate(tree, {**contents, name: bytes(damaged)}.__getitem__, max_bytes=ROOM)
    except BadMessage:
        return
    assert isinstance(back, Message)


def nodes(*levels: int) -> ObjectTree:
    """A tree with so many children at each node of a level; every name once."""
    numbers = itertools.count()

    def make(rest: tuple[int, ...]) -> ObjectTree:
        children = [make(rest[1:]) for _ in range(rest[0])] if rest else []
        return ObjectTree(object_id=f"{next(numbers):064x}", children=children)

    return make(levels)


def tree_of(name: str, *children: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=name * 64, children=children)


def test_tree_is_as_deep_and_as_wide_as_a_message_may_be() -> None:
    assert len(read_tree(nodes(1, 2, 2, 3)).children) == 1 + 1 + 2 + 4 + 12
    assert len(read_tree(nodes(1, MOST_OBJECTS - 2)).children) == MOST_OBJECTS
    for large in (nodes(1, MOST_OBJECTS - 1), nodes(1, 1, 1, 1, 1), nodes(*[1] * 90)):
        with pytest.raises(BadMessage, match="more than 4096 objects, or deeper"):
            read_tree(large)


@pytest.mark.parametrize(
    "name", ["", "a" * 63, "A" * 64, "0x" + "a" * 62, "../" * 21 + "a", "_" * 64]
)
def test_name_of_an_object_is_a_hash(name: str) -> None:
    with pytest.raises(BadMessage, match="no name"):
        read_tree(ObjectTree(object_id=name))


def test_object_in_two_places_is_one_object() -> None:
    piece = tree_of("e")
    shared = tree_of("a", tree_of("b", tree_of("c", tree_of("d", piece), tree_of("f", piece))))
    assert read_tree(shared).children["d" * 64] == ("e" * 64,)


@pytest.mark.parametrize(
    "tree",
    [
        tree_of("a", tree_of("a")),
        tree_of("a", tree_of("b", tree_of("a"))),
        tree_of("a", tree_of("b", tree_of("b"))),
        tree_of("a", tree_of("b", tree_of("c")), tree_of("b")),
    ],
    ids=["itself", "cycle", "inner cycle", "two shapes"],
)
def test_object_that_lies_in_itself_or_hangs_together_in_two_ways_is_refused(
    tree: ObjectTree,
) -> None:
    with pytest.raises(BadMessage, match="other children"):
        read_tree(tree)


def test_objects_hang_together_as_announced_or_are_not_read() -> None:
    tree, contents = objects_of(message_of(b"x" * 100))
    [record] = tree.children[tree.root]
    less = replace(tree, children={**tree.children, record: tree.children[record][:1]})
    for lie in (less, replace(tree, root=record)):
        with pytest.raises(BadMessage, match="not what was announced"):
            inflate(lie, contents.__getitem__, max_bytes=ROOM)


def test_array_that_no_memory_is_left_for_is_a_bad_message(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, contents = objects_of(message_of(b"x" * 100))

    def full(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cytofed.objects.np.empty", full)
    with pytest.raises(BadMessage, match="no memory for an array of 100 bytes"):
        inflate(tree, contents.__getitem__, max_bytes=ROOM)


def test_record_of_megabytes_is_not_read() -> None:
    tree, contents = objects_of(message_of(b"x", text="x" * (1 << 20)))
    with pytest.raises(BadMessage, match="is no piece"):
        inflate(tree, contents.__getitem__, max_bytes=ROOM)


@given(content=st.binary(max_size=300), found=st.booleans())
def test_a_long_field_is_found_where_it_lies(content: bytes, found: bool) -> None:
    asked = PullObjectResponse(object_found=found, object_available=found, object_content=content)
    body = asked.SerializeToString()
    others, view = split_long_field(body, PullObjectResponse.OBJECT_CONTENT_FIELD_NUMBER)
    assert view == content
    asked.ClearField("object_content")
    assert others == asked.SerializeToString()


@given(body=st.binary(max_size=300))
def test_garbage_is_no_message_or_what_protobuf_reads(body: bytes) -> None:
    number = PullObjectResponse.OBJECT_CONTENT_FIELD_NUMBER
    try:
        others, content = split_long_field(body, number)
        read = PullObjectResponse.FromString(others)
    except (BadMessage, DecodeError):
        return
    told = PullObjectResponse.FromString(body)
    assert content == told.object_content
    assert (read.object_found, read.object_available) == (told.object_found, told.object_available)


def test_objects_behind_a_message_come_with_it_and_change_nothing_else() -> None:
    asked = PushMessagesRequest(clientapp_runtime_list=[0.5])
    sent = with_enclosed(asked, [b"one", b"", b"two"])
    got = PushMessagesRequest.FromString(sent.SerializeToString(deterministic=True))
    assert list(got.clientapp_runtime_list) == [0.5]
    assert sorted(enclosed_in(got).values()) == [b"", b"one", b"two"]
    assert all(hashlib.sha256(data).hexdigest() == n for n, data in enclosed_in(got).items())
