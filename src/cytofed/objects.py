"""Messages as Flower's objects, and back, with few copies. For the adapters of both sides.

Flower makes an object of a message, of each of its records and of every 5 MB of an array; an object
is named by its SHA-256 and travels in a request of its own. Its own functions copy and hash every
piece several times over, once more for each receiver. Here a piece is hashed once where it lies,
copied once when it is sent, and joined to an array of known largest size when it has come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from cytofed.messages import array_of

PIECE_BYTES: int = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""at which arrays are cut"""

_CHUNK, _ARRAY, _RECORD = (kind.__qualname__ for kind in (ArrayChunk, Array, ArrayRecord))


class _Piece(ArrayChunk):
    """Flower's chunk of an array; its name is found without a copy, and once."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        head = HEAD_VALUE_DIVIDER.join((_CHUNK, "", str(len(data)))).encode()
        self._head = head + HEAD_BODY_DIVIDER
        digest = hashlib.sha256(self._head)
        digest.update(data)
        self.__dict__["_object_id"] = digest.hexdigest()

    @property
    def is_dirty(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return len(self._head) + len(self.data)

    def deflate(self) -> bytes:
        return b"".join((self._head, self.data))


@dataclass(frozen=True)
class Objects:
    """A message's objects: its own name, how they hang together, and each one's bytes on demand."""

    number: str
    tree: ObjectTree
    head: Message
    """the message without its content"""
    _nested: dict[str, Any] = field(repr=False)

    def sizes(self) -> dict[str, int]:
        """Bytes of each object by name."""
        return {
            number: item.nbytes if isinstance(item, _Piece) else len(item.deflate())
            for number, item in self._nested.items()
        }

    def content(self, number: str) -> bytes:
        """An object's bytes, made anew at each call."""
        found: bytes = self._nested[number].deflate()
        return found

    def __contains__(self, number: str) -> bool:
        return number in self._nested

    @property
    def numbers(self) -> frozenset[str]:
        return frozenset(self._nested)


def deflate(message: Message) -> Objects:
    """The objects of a message, which gets its name as its id.

    An array that lies in several messages is cut and hashed once.
    """
    if message.has_content():
        for record in message.content.values():
            for array in record.values() if isinstance(record, ArrayRecord) else ():
                if "_chunks" not in array.__dict__:
                    pieces = _cut(memoryview(array.data))
                    array.__dict__["_chunks"] = [(piece.object_id, piece) for piece in pieces]
    with no_object_id_recompute():
        number = message.object_id
        message.metadata.__dict__["_message_id"] = number
        nested, tree = get_all_nested_objects(message), get_object_tree(message)
        head = remove_content_from_message(message) if message.has_content() else message
    return Objects(number, tree, head, nested)


def _cut(data: memoryview) -> list[_Piece]:
    return [_Piece(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]


def inflate(number: str, read: Callable[[str], bytes], *, max_bytes: int) -> Message:
    """The message of that name; ``read`` gives each object's bytes.

    Errors: ValueError (and what Flower's own reading raises) for what is no message, or for arrays
    of more than ``max_bytes`` altogether.
    """
    known: dict[str, Any] = {}
    room = max_bytes

    def build(name: str) -> Any:
        nonlocal room
        if name in known:
            return known[name]
        content = read(name)
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == _ARRAY:
            found, used = _join(content, children, read, room)
            room -= used
        else:
            built = {child: build(child) for child in children}
            if kind == _RECORD:
                found = _record(content, built)
            else:
                found = inflatable_class_registry[kind].inflate(content, built)
        known[name] = found
        return found

    try:
        message = build(number)
    finally:
        known.clear()  # ``build`` knows itself: that cycle must not keep the arrays
    if not isinstance(message, Message):
        raise ValueError("not a message")
    message.metadata.__dict__["_message_id"] = number
    return message


def _record(content: bytes, arrays: Mapping[str, Any]) -> ArrayRecord:
    """Flower's own reading makes each array anew, and insists on ``bytes`` for it."""
    record = ArrayRecord()
    for name, number in json.loads(bytes(_body(content))).items():
        record[name] = arrays[number]
    return record


def _join(
    content: bytes, children: list[str], read: Callable[[str], bytes], room: int
) -> tuple[Any, int]:
    """An array from its pieces, one of them in memory at a time, and its bytes."""
    told = json.loads(bytes(_body(content)))
    joined = bytearray()
    if len(told["arraychunk_ids"]) > 1 + room // PIECE_BYTES:
        raise ValueError(f"arrays of more than {room} bytes, or in too many pieces")
    for index in told["arraychunk_ids"]:
        piece = read(children[index])
        if not piece.startswith(_CHUNK.encode() + HEAD_VALUE_DIVIDER.encode()):
            raise ValueError("a piece of an array is something else")
        joined += _body(piece)
        if len(joined) > room:
            raise ValueError(f"arrays of more than {room} bytes")
    shape = tuple(told["shape"])
    return array_of(told["dtype"], shape, told["stype"], memoryview(joined)), len(joined)


def _body(content: bytes) -> memoryview:
    at = content.find(HEAD_BODY_DIVIDER)
    if at < 0:
        raise ValueError("an object without a body")
    return memoryview(content)[at + len(HEAD_BODY_DIVIDER) :]
