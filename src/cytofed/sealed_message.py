"""Contents of messages as sealed ones: what travels between coordinator and labs.

A content (``header`` and ``parts``, see ``cytofed.messages``) becomes one payload and a manifest of
names, shapes and dtypes; the sealed payload travels as a Flower record again. Beside it, in the
clear, lie *claims*: where the message says that it belongs. The receiver builds the context that
it expects from them and from what it has pinned; only if the seal holds are they true.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from cytofed.messages import RAW, BadMessage, array_of
from cytofed.privacy import wire
from cytofed.privacy.sealing import Sealed

REFUSAL = "refusal"
"""content of a reply in which a lab says why it does not do what it was asked"""

_INLINE_BYTES = 1 << 16
"""A body up to this size travels inside the record: every array costs a request of its own."""

_LEDGER = "ledger"

_DTYPES = {"|u1": "uint8", "<f4": "float32", "<i8": "int64", "<u4": "uint32", "<u2": "uint16"}
_HEADER = "header"


@dataclass(frozen=True)
class Parcel:
    """A sealed message and its claims. ``content`` says what the payload is.

    ``papers``: signed documents that the receiver needs to judge it, such as the start of a run.
    """

    run: str
    round: int
    slot: int
    content: str
    sealed: Sealed = field(repr=False)
    papers: bytes = field(default=b"", repr=False)


def pack_content(content: RecordDict) -> tuple[bytes, list[memoryview]]:
    """Manifest and payload (in pieces) of a content of ``cytofed.messages`` or ``new_content``."""
    header, record = content["header"], content["parts"]
    assert isinstance(header, ConfigRecord)
    assert isinstance(record, ArrayRecord)
    arrays = {}
    for name, array in record.items():
        flat = np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<"))
        arrays[str(name)] = flat.reshape(array.shape)
    if _HEADER in arrays:
        raise ValueError("a part may not be named header")
    arrays[_HEADER] = np.frombuffer(_header_bytes(header), np.uint8)  # last: arrays stay aligned
    return wire.manifest_of(arrays).to_bytes(), wire.pieces(arrays)


def new_content(
    header: Mapping[str, str | int | float | bytes], **files: bytes | None
) -> RecordDict:
    """A content that is no order or update: a refusal, a result with a ``file``."""
    record = ArrayRecord()
    for name, file in files.items():
        if file is not None:
            record[name] = array_of("uint8", (len(file),), RAW, memoryview(file))
    return RecordDict({"header": ConfigRecord(dict(header)), "parts": record})


def file_of(content: RecordDict, name: str = "file") -> bytes:
    """A file of ``new_content``, or nothing."""
    record = content["parts"]
    assert isinstance(record, ArrayRecord)
    return bytes(record[name].data) if name in record else b""


def text_of(content: RecordDict, key: str) -> str:
    """A text of a content's header; empty where there is none."""
    header = content["header"]
    value = header.get(key) if isinstance(header, ConfigRecord) else None
    return value if isinstance(value, str) else ""


def unpack_content(manifest: bytes, payload: memoryview) -> RecordDict:
    """Inverse of ``pack_content``; arrays are views into ``payload``.

    Errors: MalformedMessage for what ``pack_content`` would not have written.
    """
    found = wire.unpack(wire.Manifest.from_bytes(manifest), payload)
    if _HEADER not in found:
        raise wire.MalformedMessage("the message has no header")
    header = _read_header(found.pop(_HEADER).tobytes())
    record = ArrayRecord()
    for name, values in found.items():
        dtype = _DTYPES.get(values.dtype.newbyteorder("<").str)
        if dtype is None:
            raise wire.MalformedMessage(f"{name!r:.80} has dtype {values.dtype}")
        data = values.reshape(-1).view(np.uint8).data
        record[name] = array_of(dtype, values.shape, RAW, data)
    return RecordDict({"header": ConfigRecord(dict(header)), "parts": record})


def pack_body(body: memoryview) -> ArrayRecord:
    """A sealed body as it travels; one record serves all who get the same body."""
    record = ArrayRecord()
    record["body"] = array_of("uint8", (len(body),), RAW, body)
    return record


def travels_inside(body: memoryview) -> bool:
    """Whether a body is small enough to be in the parcel's own record."""
    return len(body) <= _INLINE_BYTES


def pack_parcel(parcel: Parcel, record: ArrayRecord | None = None) -> RecordDict:
    """As it travels. ``record``: ``pack_body`` of its body, where that was made before; the
    parcel's own is not looked at then."""
    body = parcel.sealed.body
    seal: dict[str, str | int | bytes] = {
        "run": parcel.run,
        "round": parcel.round,
        "slot": parcel.slot,
        "content": parcel.content,
        "prefix": parcel.sealed.prefix,
        "papers": parcel.papers,
    }
    if record is None and travels_inside(body):
        return RecordDict({"seal": ConfigRecord({**seal, "body": bytes(body)})})
    return RecordDict({"seal": ConfigRecord(dict(seal)), "body": record or pack_body(body)})


def unpack_parcel(message: Message) -> Parcel:
    """What a message carries; nothing of it is verified yet. Errors: BadMessage."""
    if not message.has_content():
        raise BadMessage("the message has no content")
    content = message.content
    seal = content.get("seal")
    if not isinstance(seal, ConfigRecord):
        raise BadMessage("the message is not sealed")
    body = seal.get("body")
    record = content.get("body")
    if isinstance(record, ArrayRecord) and set(record) == {"body"}:
        body = record["body"].data
    if not isinstance(body, bytes | memoryview):
        raise BadMessage("the sealed message has no body")
    return Parcel(
        run=_text(seal, "run"),
        round=_whole(seal, "round"),
        slot=_whole(seal, "slot"),
        content=_text(seal, "content"),
        sealed=Sealed(_raw(seal, "prefix"), memoryview(body)),
        papers=_raw(seal, "papers"),
    )


def attach_head(content: RecordDict, document: bytes) -> None:
    """Send a signed ``LedgerHead`` along with a parcel."""
    content[_LEDGER] = ConfigRecord({"head": document})


def attached_head(message: Message) -> bytes:
    """The document of ``attach_head``, not verified yet; empty where there is none."""
    record = message.content.get(_LEDGER) if message.has_content() else None
    document = record.get("head") if isinstance(record, ConfigRecord) else None
    return document if isinstance(document, bytes) else b""


def _header_bytes(header: Mapping[str, object]) -> bytes:
    """Canonical bytes; a float is a list with its eight bytes."""
    fields: dict[str, wire.Value] = {}
    for key, value in header.items():
        if isinstance(value, float):
            fields[key] = [struct.pack(">d", value)]
        elif isinstance(value, str | int | bytes) and not isinstance(value, bool):
            fields[key] = value
        else:
            raise TypeError(f"{key} is {type(value).__name__}, which no header may hold")
    return wire.encode(fields)


def _read_header(data: bytes) -> Mapping[str, str | int | float | bytes]:
    fields = wire.decode(data)
    if not isinstance(fields, dict):
        raise wire.MalformedMessage("the header is not a map")
    header: dict[str, str | int | float | bytes] = {}
    for key, value in fields.items():
        match value:
            case [bytes(raw)] if len(raw) == 8:
                header[key] = struct.unpack(">d", raw)[0]
            case str() | int() | bytes():
                header[key] = value
            case _:
                raise wire.MalformedMessage(f"header field {key!r:.80} has an unknown type")
    return header


def _text(record: ConfigRecord, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or len(value) > 256:
        raise BadMessage(f"{key} of a sealed message is not a short text")
    return value


def _whole(record: ConfigRecord, key: str) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadMessage(f"{key} of a sealed message is not a whole number")
    return value


def _raw(record: ConfigRecord, key: str) -> bytes:
    value = record.get(key)
    if not isinstance(value, bytes):
        raise BadMessage(f"{key} of a sealed message is not bytes")
    return value
