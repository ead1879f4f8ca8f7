"""Messages as Flower's objects, and back, with few copies. For the adapters of both sides.

Flower makes an object of a message, of each of its records and of every 5 MB of an array; an object
is named by its SHA-256 and travels in a request of its own. Its own functions copy and hash every
piece several times over, once more for each receiver. Here a piece is hashed once where it lies,
copied once when it is sent, and joined to an array of known largest size when it has come.

Whoever announces objects says how they hang together, and may say anything: ``read_tree`` takes
what a message can be and nothing else, and ``inflate`` reads what is announced and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
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
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from cytofed.arrays import in_shares, is_shape
from cytofed.messages import RAW, BadMessage, array_of

PIECE_BYTES: int = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""at which arrays are cut"""

_ENCLOSED = 1000
"""number of the field for enclosed objects"""

_ENCLOSED_BYTES = 1 << 17
"""most bytes of one"""

_ANNOUNCED_BYTES = 1 << 16
"""most bytes of all that are enclosed in an announcement: it is a body, read whole"""

_HEAD_BYTES = 64
"""more than the head of a piece has"""

LONG = 2
"""protobuf's kind of a field of so many bytes; a number is of kind 0"""

T = TypeVar("T")

_CHUNK, _ARRAY, _RECORD = (kind.__qualname__ for kind in (ArrayChunk, Array, ArrayRecord))

_LEVELS = (
    {Message.__qualname__},
    {RecordDict.__qualname__},
    {_RECORD, ConfigRecord.__qualname__, MetricRecord.__qualname__},
    {_ARRAY},
    {_CHUNK},
)
"""what may lie in what, from the message down"""

MOST_OBJECTS = 4096
"""of one message, each counted where it is named"""

_MOST_BYTES = 1 << 20
"""of an object that is no piece of an array"""

_MOST_SMALL_BYTES = 1 << 22
"""of all those of one message"""

_NAME = re.compile(r"[0-9a-f]{64}")

_DTYPES = frozenset(
    {"float16", "float32", "float64", "int8", "int16", "int32", "int64",
     "uint8", "uint16", "uint32", "uint64"}
)  # fmt: skip


@dataclass(frozen=True)
class InFile:
    """Bytes in an open file: they take memory only as slices of them are read."""

    file: BinaryIO = field(repr=False)
    at: int
    size: int

    @staticmethod
    def of(path: Path) -> InFile:
        """All of a file."""
        return InFile(path.open("rb"), 0, path.stat().st_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return os.pread(self.file.fileno(), stop - start, self.at + start)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill ``out`` from ``start`` on. Errors: BadMessage where the file ends before."""
        while out:
            count = os.preadv(self.file.fileno(), [out], self.at + start)
            if count == 0:
                raise BadMessage("the file is shorter than it was")
            out, start = out[count:], start + count


Content = bytes | memoryview | InFile
"""an object's bytes, or a part of them"""


def enclosed(contents: Iterable[bytes]) -> bytes:
    """Objects as they lie behind an answer to a question for work, or behind the announcement of a
    reply: a request for each of them would cost more than they do. A field of protobuf that Flower
    does not know, and passes over."""
    found = bytearray()
    for content in contents:
        found += long_field(_ENCLOSED, len(content)) + content
    return bytes(found)


def with_enclosed(message: T, contents: Iterable[bytes]) -> T:
    """A message of protobuf with objects behind it."""
    whole = cast(Any, message).SerializeToString() + enclosed(contents)
    return cast(T, type(message).FromString(whole))  # type: ignore[attr-defined]


def enclosed_in(message: Any) -> dict[str, bytes]:
    """The objects that came with a message, by name, which is the hash of each.

    Of more than ``MOST_OBJECTS`` the first.
    """
    found = islice(
        (f for f in UnknownFieldSet(message) if (f.field_number, f.wire_type) == (_ENCLOSED, LONG)),
        MOST_OBJECTS,
    )
    return {hashlib.sha256(field.data).hexdigest(): field.data for field in found}


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends; -1 where that is beyond the data.

    Errors: BadMessage for a number without an end.
    """
    number = 0
    for place, byte in enumerate(data[at : at + 10] if at >= 0 else ()):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    if 0 <= at <= len(data) - 10:
        raise BadMessage("a number without an end")
    return 0, -1


def long_field(number: int, size: int) -> bytes:
    """What protobuf writes before the ``size`` bytes of a field, which may come last."""
    return varint(number << 3 | LONG) + varint(size)


def split_long_field(body: bytes, number: int) -> tuple[bytes, memoryview]:
    """A message of protobuf without its long field, and the bytes of that where they lie.

    Protobuf's own reading copies them twice. Errors: BadMessage for what is no such message.
    """
    data, others, content, at = memoryview(body), bytearray(), memoryview(b""), 0
    while at < len(data) and len(others) <= _HEAD_BYTES:
        start = at
        tag, at = read_varint(data, at)
        size, end = read_varint(data, at)
        if tag & 7 == LONG and end >= 0:
            at = end = end + size
        elif tag & 7:
            raise BadMessage("a kind of field that no such message has")
        if not start < end <= len(data):
            raise BadMessage("the message ends within a field")
        if tag == number << 3 | LONG:
            content = data[end - size : end]
        else:
            others += data[start:end]
        at = end
    if at < len(data):
        raise BadMessage(f"fields of more than {_HEAD_BYTES} bytes beside the content")
    return bytes(others), content


class _Piece(ArrayChunk):
    """Flower's chunk of an array; its name is found without a copy, and once."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        head = HEAD_VALUE_DIVIDER.join((_CHUNK, "", str(len(data)))).encode()
        self._head = head + HEAD_BODY_DIVIDER
        digest = hashlib.sha256(self._head)
        digest.update(data)
        self.__dict__["_object_id"] = digest.hexdigest()
        self._size = len(data)
        self._file: BinaryIO | None = None
        self._at = 0

    @property
    def is_dirty(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return len(self._head) + self._size

    def lie_in(self, file: BinaryIO, at: int) -> None:
        """Take the bytes from this place of a file from now on, and no memory."""
        self._file, self._at, self.data = file, at, memoryview(b"")

    def parts(self) -> tuple[bytes, memoryview | InFile]:
        """Head and body."""
        if self._file is None:
            return self._head, self.data
        return self._head, InFile(self._file, self._at, self._size)

    def deflate(self) -> bytes:
        head, body = self.parts()
        return b"".join((head, body[:]))


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
        return b"".join(part[:] for part in self.parts(number))

    def parts(self, number: str) -> tuple[Content, ...]:
        """The same in parts, which need not be joined to be sent."""
        item = self._nested[number]
        return item.parts() if isinstance(item, _Piece) else (item.deflate(),)

    def small(self) -> list[bytes]:
        """All objects that are short enough to be enclosed."""
        contents = (
            item.deflate()
            for item in self._nested.values()
            if not isinstance(item, _Piece) or item.nbytes <= _ENCLOSED_BYTES
        )
        return [content for content in contents if len(content) <= _ENCLOSED_BYTES]

    def announced(self) -> list[bytes]:
        """As many of ``small`` as go with an announcement."""
        small = sorted(self.small(), key=len)
        ends = accumulate(map(len, small))
        return [item for item, end in zip(small, ends, strict=True) if end <= _ANNOUNCED_BYTES]

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


def cut_to_file(array: Array, file: BinaryIO) -> None:
    """Cut an array into pieces and move its bytes to an empty file, from where they are sent."""
    data = memoryview(array.data)

    def write(share: slice) -> _Piece:
        piece, at = _Piece(data[share]), share.start
        while at < share.stop:
            at += os.pwrite(file.fileno(), data[at : share.stop], at)
        piece.lie_in(file, share.start)
        return piece

    pieces = in_shares(write, len(data), share=PIECE_BYTES)
    cast(Any, array).data = memoryview(b"")  # first: it clears the pieces
    array.__dict__["_chunks"] = [(piece.object_id, piece) for piece in pieces]


def _cut(data: memoryview) -> list[_Piece]:
    return in_shares(lambda share: _Piece(data[share]), len(data), share=PIECE_BYTES)


@dataclass(frozen=True)
class Tree:
    """How the objects of one message hang together, as whoever sends it announced them.

    Guarantees: at most ``MOST_OBJECTS``, no deeper than a message is, and no object in itself.
    """

    root: str
    children: Mapping[str, tuple[str, ...]] = field(repr=False)


def read_tree(announced: ObjectTree) -> Tree:
    """Errors: BadMessage for what is no tree of a message's objects.

    An object may be named in several places, with the same children in each. So none lies in
    itself: it would have no end.
    """
    children: dict[str, tuple[str, ...]] = {}
    waiting, count = [(announced, 1)], 1
    while waiting:
        node, depth = waiting.pop()
        count += len(node.children)
        if count > MOST_OBJECTS or depth > len(_LEVELS):  # guard: objects-bounded
            raise BadMessage(f"more than {MOST_OBJECTS} objects, or deeper than a message is")
        name, own = node.object_id, tuple(child.object_id for child in node.children)
        if not _NAME.fullmatch(name):  # guard: objects-named
            raise BadMessage(f"{name!r:.80} is no name of an object")
        if children.setdefault(name, own) != own:  # guard: objects-acyclic
            raise BadMessage(f"object {name:.16} has other children in another place")
        waiting += ((child, depth + 1) for child in node.children)
    return Tree(announced.object_id, children)


def inflate(tree: Tree, read: Callable[[str], Content], *, max_bytes: int) -> Message:
    """The message of that tree; ``read`` gives each object's bytes.

    Each object is read once, and only those of the tree. Errors: BadMessage for what is no message,
    has other children than announced, arrays of more than ``max_bytes`` altogether, or more than
    ``_MOST_SMALL_BYTES`` beside them; and what ``read`` raises.
    """
    known: dict[str, Any] = {}
    room, small = max_bytes, _MOST_SMALL_BYTES

    def build(name: str, level: int) -> Any:
        nonlocal room, small
        if name in known:
            return known[name]
        found = read(name)
        if len(found) > _MOST_BYTES:
            raise BadMessage(
                f"object {name:.16} has {len(found)} bytes and is no piece of an array"
            )
        small -= len(found)
        if small < 0:
            raise BadMessage(f"more than {_MOST_SMALL_BYTES} bytes beside the arrays")
        content, children = bytes(found[:]), tree.children[name]
        with _reading(name):
            kind, said, _ = get_object_head_values_from_object_content(content)
        if kind not in _LEVELS[level] or tuple(said) != children:
            raise BadMessage(f"object {name:.16} is not what was announced")
        if kind == _ARRAY:
            made, used = _join(name, content, children, read, room)
            room -= used
        else:
            built = {child: build(child, level + 1) for child in children}
            with _reading(name):
                if kind == _RECORD:
                    made = _record(content, built)
                else:
                    made = inflatable_class_registry[kind].inflate(content, built)
        known[name] = made
        return made

    try:
        message: Message = build(tree.root, 0)
    finally:
        known.clear()  # ``build`` knows itself: that cycle must not keep the arrays
    message.metadata.__dict__["_message_id"] = tree.root
    return message


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever Flower, protobuf and json raise over bytes of the other side is BadMessage."""
    try:
        yield
    except Exception as error:
        raise BadMessage(f"object {name:.16} cannot be read: {type(error).__name__}") from error


def _record(content: bytes, arrays: Mapping[str, Any]) -> ArrayRecord:
    """Flower's own reading makes each array anew, and insists on ``bytes`` for it."""
    record = ArrayRecord()
    for name, number in json.loads(bytes(_body(content))).items():
        record[name] = arrays[number]
    return record


def _join(
    name: str,
    content: bytes,
    children: tuple[str, ...],
    read: Callable[[str], Content],
    room: int,
) -> tuple[Any, int]:
    """An array from its pieces, one of them in memory at a time, and its bytes."""
    with _reading(name):
        told = json.loads(bytes(_body(content)))
        dtype, shape, places = told["dtype"], tuple(told["shape"]), told["arraychunk_ids"]
        names = [children[place] for place in places if type(place) is int and place >= 0]
        if told["stype"] != RAW or dtype not in _DTYPES or not is_shape(shape, np.dtype(dtype)):
            raise ValueError("an array that is not raw bytes of its shape")
        if len(names) != len(places):
            raise ValueError("a piece that is none of its own")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > room or len(names) > 1 + room // PIECE_BYTES:  # guard: objects-room
        raise BadMessage(f"arrays of more than {room} bytes, or in too many pieces")
    try:
        joined, at = np.empty(size, np.uint8).data, 0
    except MemoryError:
        raise BadMessage(f"no memory for an array of {size} bytes") from None
    for number in names:
        piece = read(number)
        start = body_of_piece(bytes(piece[:_HEAD_BYTES]), len(piece))
        length = len(piece) - start
        if at + length > size:
            raise BadMessage(f"an array of more than the {size} bytes that its shape takes")
        place = joined[at : at + length]
        if isinstance(piece, InFile):
            piece.read_into(place, start)
        else:
            place[:] = memoryview(piece)[start:]
        at += length
    if at != size:  # guard: objects-whole
        raise BadMessage(f"an array of {at} bytes whose shape takes {size}")
    return array_of(dtype, shape, RAW, joined), size


def body_of_piece(start: bytes, size: int) -> int:
    """Where the body of a piece of an array begins, of ``size`` bytes that begin with ``start``.

    Errors: BadMessage for what is no piece, or of another length than its head says.
    """
    head, found, _ = start.partition(HEAD_BODY_DIVIDER)
    at = len(head) + len(HEAD_BODY_DIVIDER)
    if not found or head != HEAD_VALUE_DIVIDER.join((_CHUNK, "", str(size - at))).encode():
        raise BadMessage("not a piece of an array, or too large for its kind")
    return at


def _body(content: bytes) -> memoryview:
    at = content.find(HEAD_BODY_DIVIDER)
    if at < 0:
        raise ValueError("an object without a body")
    return memoryview(content)[at + len(HEAD_BODY_DIVIDER) :]
