"""Lies in how a message's objects hang together and in what they hold. One claim each."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from cytofed.messages import RAW, BadMessage, array_of, new_message
from cytofed.objects import MOST_OBJECTS, deflate, inflate, read_tree
from tests.attacks.stage import guarded_by


def name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tree(root: str, *children: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=root, children=children)


def message_of(data: bytes) -> Message:
    record = ArrayRecord()
    record["body"] = array_of("uint8", (len(data),), RAW, memoryview(data))
    content = RecordDict({"header": ConfigRecord({"run": "r"}), "parts": record})
    return new_message(content, kind="train", node=1, group="1", ttl_s=1.0)


def objects_of(data: bytes) -> tuple[Any, dict[str, bytes]]:
    found = deflate(message_of(data))
    return read_tree(found.tree), {number: found.content(number) for number in found.numbers}


@guarded_by("objects-bounded")
def test_tree_of_more_objects_than_a_message_has_is_refused() -> None:
    """A few bytes each: what is built of them is not."""
    wide = tree(name("root"), *(tree(name(str(n))) for n in range(MOST_OBJECTS)))
    deep = tree(name("leaf"))
    for level in range(40):
        deep = tree(name(str(level)), deep)
    for announced in (wide, deep):
        with pytest.raises(BadMessage, match="more than 4096 objects, or deeper"):
            read_tree(announced)


@guarded_by("objects-acyclic")
def test_object_that_lies_in_itself_is_refused() -> None:
    """It would have no end: whoever walks it walks for ever."""
    own = tree(name("a"), tree(name("b"), tree(name("a"))))
    with pytest.raises(BadMessage, match="has other children in another place"):
        read_tree(own)


@guarded_by("objects-named")
def test_object_with_a_name_that_is_no_hash_is_refused() -> None:
    for false in ("", "../../etc/passwd", "A" * 64):
        with pytest.raises(BadMessage, match="is no name of an object"):
            read_tree(tree(name("root"), tree(false)))


@guarded_by("objects-room")
def test_arrays_of_more_bytes_than_were_asked_for_are_refused() -> None:
    found, contents = objects_of(bytes(1000))
    with pytest.raises(BadMessage, match="arrays of more than 999 bytes"):
        inflate(found, contents.__getitem__, max_bytes=999)


@guarded_by("objects-whole")
def test_array_that_says_more_than_its_pieces_hold_is_refused() -> None:
    """The rest would be whatever was in this process's memory before."""
    found, contents = objects_of(bytes(10))
    grown = {number: content.replace(b"[10]", b"[99]") for number, content in contents.items()}
    assert grown != contents
    with pytest.raises(BadMessage, match="an array of 10 bytes whose shape takes 99"):
        inflate(found, grown.__getitem__, max_bytes=1 << 20)
