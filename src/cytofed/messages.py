"""Orders and replies as Flower records. The one place that knows how a message is laid out.

P parameters, C classes, B bins. A message has a ``header`` (scalars) and ``parts`` (flat arrays,
little-endian, without any container format: shape and dtype are in Flower's Array). Reading
checks every field, for the other side may be faulty or hostile; what does not fit raises
``BadMessage``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    Metadata,
    RecordDict,
)

from cytofed.arrays import Float32, Parts, in_shares, is_shape, part_rows, rows_sha256
from cytofed.canonical import Value, digest
from cytofed.errors import CytofedError
from cytofed.metrics import Tally

logging.getLogger("flwr").setLevel(logging.WARNING)  # its INFO lines would break --json

Kind = Literal["train", "evaluate", "query"]

WEIGHTS = "weights"
"""the part that every order to train or evaluate carries: the model"""

RAW = "cytofed.raw"
"""Flower's ``stype`` of our arrays: the bytes of a C-contiguous little-endian array."""

MAX_WEIGHT = 2.0**24
"""Largest weight of a whole cohort (number of training images); one lab's share is limited to
``MAX_WEIGHT`` over the number of labs, so none can use it up."""

MAX_UPDATE = 256.0
"""Largest absolute value of an update's coordinate that is taken for sane."""

MAX_COUNT = 2**40
"""Largest absolute count of a tally that is taken for sane."""

ERROR_CODE = 100
"""Flower error code of a lab that says why it did not answer; the reason is the text."""


class BadMessage(CytofedError):
    """A reply or order that does not keep to the protocol. It is its sender's failure."""


@dataclass(frozen=True)
class Order:
    """What the coordinator asks of one lab in one round. ``run`` names the run (or baseline)."""

    kind: Kind
    run: str
    round: int
    plan_sha256: str
    parts: Parts = field(default_factory=dict, repr=False)
    slot: int = 0
    """the attempt at the round; each slot of secure aggregation serves one"""
    labs: int = 0
    """size of the cohort"""
    max_weight: float = 0.0
    """public bound of the labs' weights, for secure aggregation"""

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the whole order: every field, and each part's name, shape, type and hash.

        Two labs that find the same one were told the same, to the last bit.
        """
        told: dict[str, Value] = {
            "kind": self.kind,
            "labs": self.labs,
            "max_weight": float(self.max_weight).hex(),
            "parts": self._rows,
            "plan_sha256": self.plan_sha256,
            "round": self.round,
            "run": self.run,
            "slot": self.slot,
        }
        return digest("cytofed/1/order", told).hex()

    @cached_property
    def work_sha256(self) -> str:
        """Hex SHA-256 of what is computed, in whatever round and attempt: kind and weights.

        Two sums of one work over nearly the same labs differ by few labs' updates.
        """
        weights = [row for row, name in zip(self._rows, self.parts, strict=True) if name == WEIGHTS]
        return digest("cytofed/1/order/work", self.kind, weights).hex()

    @cached_property
    def weights_sha256(self) -> str:
        """Hex SHA-256 of all parts."""
        return rows_sha256(self._rows)

    @cached_property
    def _rows(self) -> list[Value]:
        """Asked for at each step of a round, found once."""
        return part_rows(self.parts)


@dataclass(frozen=True)
class Masked:
    """A lab's answer to an order under secure aggregation: ring words that say nothing."""

    lab: str
    run: str
    round: int
    slot: int
    words_W: npt.NDArray[np.uint32] | npt.NDArray[np.uint16] = field(repr=False)
    train_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """One message of secure aggregation's protocol: a request, or the reply to it."""

    run: str
    step: str
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Update:
    """A lab's answer to a train order. ``loss``, ``train_s`` are NaN where they stay at the lab."""

    lab: str
    run: str
    round: int
    weight: float
    parts: Parts = field(repr=False)
    loss: float = math.nan
    train_s: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """A lab's answer to an evaluate order."""

    lab: str
    run: str
    round: int
    tally: Tally = field(repr=False)


@dataclass(frozen=True)
class Hello:
    """A lab's answer to a query: who it is and how many training images it counts."""

    lab: str
    images: int


def pack_order(order: Order) -> RecordDict:
    """The content of a message with this order."""
    header: dict[str, str | int | float] = {
        "run": order.run,
        "round": order.round,
        "plan_sha256": order.plan_sha256,
        "slot": order.slot,
        "labs": order.labs,
        "max_weight": order.max_weight,
    }
    return _pack(header, order.parts)


def unpack_order(message: Message) -> Order:
    """The order that a message carries, each time the same: its hash is found once.

    Errors: BadMessage.
    """
    known = message.__dict__.get("_order")
    if isinstance(known, Order):
        return known
    header, parts = read_parts(message, np.float32)
    kind = message.metadata.message_type.split(".")[0]
    if kind not in ("train", "evaluate", "query"):
        raise BadMessage(f"unknown order {kind!r}")
    order = Order(
        kind=cast(Kind, kind),
        run=_text(header, "run"),
        round=_whole(header, "round"),
        plan_sha256=_text(header, "plan_sha256"),
        parts=parts,
        slot=_whole(header, "slot"),
        labs=_whole(header, "labs"),
        max_weight=_number(header, "max_weight"),
    )
    message.__dict__["_order"] = order
    return order


def pack_update(update: Update) -> RecordDict:
    header: dict[str, str | int | float] = {
        "lab": update.lab,
        "run": update.run,
        "round": update.round,
        "weight": update.weight,
        "loss": update.loss,
        "train_s": update.train_s,
    }
    return _pack(header, update.parts)


def unpack_update(message: Message, *, parts: tuple[str, ...], size: int) -> Update:
    """The update that a message carries, with finite values of sane size only.

    Errors: BadMessage naming what is wrong: parts, shape, NaN, size, weight.
    """
    header, found = read_parts(message, np.float32)
    if tuple(found) != parts:  # guard: update-parts
        raise BadMessage(f"expected parts {', '.join(parts)}, found {', '.join(found) or 'none'}")
    for name, values_P in found.items():
        if values_P.shape != (size,):  # guard: update-shape
            raise BadMessage(f"{name} has shape {values_P.shape}, expected ({size},)")
        _check_sane(name, values_P)
    weight = _number(header, "weight")
    if not 1 <= weight <= MAX_WEIGHT:  # guard: update-weight
        raise BadMessage(f"weight is {weight:g}, expected 1 <= weight <= {MAX_WEIGHT:g}")
    return Update(
        lab=_text(header, "lab"),
        run=_text(header, "run"),
        round=_whole(header, "round"),
        weight=weight,
        parts=found,
        loss=_number(header, "loss"),
        train_s=_number(header, "train_s"),
    )


def pack_masked(masked: Masked) -> RecordDict:
    header: dict[str, str | int | float] = {
        "lab": masked.lab,
        "run": masked.run,
        "round": masked.round,
        "slot": masked.slot,
        "train_s": masked.train_s,
    }
    return _pack(header, {"words": masked.words_W})


def unpack_masked(message: Message, *, words: int, dtype: np.dtype[Any]) -> Masked:
    """The masked vector that a message carries. Errors: BadMessage for its shape or type."""
    header, found = read_parts(message, dtype.type)
    if {name: values.shape for name, values in found.items()} != {
        "words": (words,)
    }:  # guard: masked-words
        raise BadMessage(f"expected {words} words, found {sorted(found)}")
    return Masked(
        lab=_text(header, "lab"),
        run=_text(header, "run"),
        round=_whole(header, "round"),
        slot=_whole(header, "slot"),
        words_W=found["words"],
        train_s=_number(header, "train_s"),
    )


def pack_step(step: Step) -> RecordDict:
    return _pack({"run": step.run, "step": step.step, "body": step.body}, {})


def unpack_step(message: Message) -> Step:
    """A request or reply of secure aggregation; its body is checked by the protocol itself.

    Errors: BadMessage.
    """
    header, _ = read_parts(message, np.float32)
    body = header.get("body")
    if not isinstance(body, bytes):
        raise BadMessage("body is not bytes")
    return Step(run=_text(header, "run"), step=_text(header, "step"), body=body)


def pack_evaluation(evaluation: Evaluation) -> RecordDict:
    header: dict[str, str | int | float] = {
        "lab": evaluation.lab,
        "run": evaluation.run,
        "round": evaluation.round,
    }
    tally = evaluation.tally
    counts = {"confusion": tally.confusion_CC, "bins": tally.bins_B3, "tempered": tally.tempered_TD}
    return _pack(header, counts)


def unpack_evaluation(message: Message, *, classes: int, noised: bool = False) -> Evaluation:
    """The evaluation that a message carries; only noised counts may be negative.

    Errors: BadMessage for shapes or counts that no tally has.
    """
    header, found = read_parts(message, np.int64)
    empty = Tally.empty(classes)
    expected = {
        "confusion": empty.confusion_CC.shape,
        "bins": empty.bins_B3.shape,
        "tempered": empty.tempered_TD.shape,
    }
    if {name: values.shape for name, values in found.items()} != expected:
        raise BadMessage(f"expected arrays {expected}, found {sorted(found)}")
    lowest = min(int(values.min(initial=0)) for values in found.values())
    if lowest < 0 and not noised:  # guard: tally-negative
        raise BadMessage("negative counts in the evaluation")
    if max(-lowest, *(int(values.max(initial=0)) for values in found.values())) > MAX_COUNT:
        raise BadMessage("absurd counts in the evaluation")
    return Evaluation(
        lab=_text(header, "lab"),
        run=_text(header, "run"),
        round=_whole(header, "round"),
        tally=Tally(found["confusion"], found["bins"], found["tempered"]),
    )


def pack_hello(hello: Hello) -> RecordDict:
    return _pack({"lab": hello.lab, "images": hello.images}, {})


def unpack_hello(message: Message) -> Hello:
    """Who answers a query. Errors: BadMessage."""
    header, _ = read_parts(message, np.float32)
    return Hello(lab=_text(header, "lab"), images=_whole(header, "images"))


def content_bytes(content: RecordDict) -> int:
    """Bytes of a message's content: array data and header values, without Flower's framing.

    A number is eight bytes: how many digits a training time has is no property of a run.
    """
    # Not over content.array_records: each use of it makes a cycle of references, and so keeps the
    # arrays until the garbage collector comes by.
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        else:
            total += sum(len(str(key)) + _value_bytes(value) for key, value in record.items())
    return total


def _value_bytes(value: object) -> int:
    return 8 if isinstance(value, float) else len(str(value))


def new_message(
    content: RecordDict, *, kind: str, node: int, group: str, ttl_s: float, message_id: str = ""
) -> Message:
    """A message outside a Flower process, where there is no task identity to take it from."""
    metadata = Metadata(
        run_id=0,
        message_id=message_id,
        src_node_id=0,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=group,
        created_at=0.0,
        ttl=ttl_s,
        message_type=kind,
    )
    make = cast(Any, Message)  # this form of the constructor is not in its overloads
    return cast(Message, make(content=content, metadata=metadata))


def _pack(
    header: Mapping[str, str | int | float | bytes], parts: Mapping[str, npt.NDArray[Any]]
) -> RecordDict:
    record = ArrayRecord()
    for name, values in parts.items():
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        record[name] = array_of(
            values.dtype.name, values.shape, RAW, little.reshape(-1).view(np.uint8).data
        )
    return RecordDict({"header": ConfigRecord(dict(header)), "parts": record})


def array_of(dtype: str, shape: tuple[int, ...], stype: str, data: memoryview) -> Array:
    """Flower's Array over ``data`` itself; its constructor insists on ``bytes``, a copy."""
    array = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
    cast(Any, array).data = data
    return array


def read_parts(
    message: Message, dtype: type[np.generic]
) -> tuple[ConfigRecord, dict[str, npt.NDArray[Any]]]:
    """Header and arrays of a message, layout checked, values not. Errors: BadMessage."""
    if not message.has_content():
        raise BadMessage("the message has no content")
    content = message.content
    if set(content) != {"header", "parts"}:  # guard: content-layout
        raise BadMessage(f"expected header and parts, found {', '.join(map(str, content))}")
    header, record = content["header"], content["parts"]
    if not isinstance(header, ConfigRecord) or not isinstance(record, ArrayRecord):
        raise BadMessage("header or parts has the wrong type")
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, array in record.items():
        _check_array(str(name), array, np.dtype(dtype))
        flat = np.frombuffer(array.data, dtype=np.dtype(dtype).newbyteorder("<"))
        parts[name] = flat.reshape(array.shape)
    return header, parts


def _check_array(name: str, array: Array, dtype: np.dtype[Any]) -> None:
    """All that numpy would stumble over. Errors: BadMessage."""
    shape = tuple(array.shape)
    if array.stype != RAW or array.dtype != dtype.name:  # guard: array-kind
        raise BadMessage(f"{name!r:.80} is {array.stype!r:.40} {array.dtype!r:.40}")
    if not is_shape(shape, dtype):
        raise BadMessage(f"{name!r:.80} has an absurd shape of {len(shape)} axes")
    if len(array.data) != math.prod(shape) * dtype.itemsize:
        raise BadMessage(f"{name!r:.80} has {len(array.data)} bytes for shape {shape!s:.80}")


def _check_sane(name: str, values_P: Float32) -> None:
    def bounds(share: slice) -> tuple[float, float]:
        return float(values_P[share].min()), float(values_P[share].max())

    for low, high in in_shares(bounds, len(values_P)):
        if math.isnan(low) or math.isnan(high):  # guard: update-nan
            raise BadMessage(f"{name} contains NaN")
        if max(-low, high) > MAX_UPDATE:  # guard: update-sane
            raise BadMessage(f"{name} reaches {max(-low, high):g}, above {MAX_UPDATE:g}")


def _text(header: ConfigRecord, key: str) -> str:
    value = header.get(key)
    if not isinstance(value, str) or len(value) > 256:
        raise BadMessage(f"{key} is {value!r:.60}, expected a short text")
    return value


def _whole(header: ConfigRecord, key: str) -> int:
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadMessage(f"{key} is {value!r:.60}, expected a whole number >= 0")
    return value


def _number(header: ConfigRecord, key: str) -> float:
    value = header.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadMessage(f"{key} is {value!r:.60}, expected a number")
    return float(value)
