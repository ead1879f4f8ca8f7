"""Contents as payloads and parcels: they come back as they were, or not at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from cytofed.errors import CytofedError
from cytofed.messages import (
    RAW,
    BadMessage,
    Masked,
    Order,
    array_of,
    new_message,
    pack_masked,
    pack_order,
    unpack_masked,
    unpack_order,
)
from cytofed.privacy import wire
from cytofed.privacy.sealing import Sealed
from cytofed.sealed_message import (
    Parcel,
    attach_head,
    attached_head,
    file_of,
    new_content,
    pack_body,
    pack_content,
    pack_parcel,
    text_of,
    travels_inside,
    unpack_content,
    unpack_parcel,
)


def carried(content: RecordDict) -> RecordDict:
    """As it is after it was sealed and opened."""
    manifest, pieces = pack_content(content)
    return unpack_content(manifest, memoryview(b"".join(pieces)))


def message(content: RecordDict, kind: str = "train") -> Message:
    return new_message(content, kind=kind, node=1, group="1", ttl_s=1.0)


def test_order_and_masked_vector_come_back() -> None:
    weights_P = np.arange(7, dtype=np.float32)
    order = Order("train", "r", 3, "a" * 64, {"weights": weights_P}, slot=2, max_weight=0.5)
    found = unpack_order(message(carried(pack_order(order))))
    assert (found.round, found.slot, found.max_weight) == (3, 2, 0.5)
    np.testing.assert_array_equal(found.parts["weights"], weights_P)
    words_W = np.arange(5, dtype=np.uint16)
    back = carried(pack_masked(Masked("leeds", "r", 3, 2, words_W)))
    masked = unpack_masked(message(back), words=5, dtype=np.dtype(np.uint16))
    np.testing.assert_array_equal(masked.words_W, words_W)


@given(
    header=st.dictionaries(
        st.text(max_size=20),
        st.text(max_size=50) | st.integers(0, 2**64 - 1) | st.floats() | st.binary(max_size=50),
        max_size=6,
    ),
    file=st.none() | st.binary(max_size=200),
)
def test_headers_and_files_come_back(
    header: dict[str, str | int | float | bytes], file: bytes | None
) -> None:
    back = carried(new_content(header, file=file))
    found = back["header"]
    assert isinstance(found, ConfigRecord)
    assert file_of(back) == (file or b"")
    for key, value in header.items():
        same = found[key] == value
        assert same or (isinstance(value, float) and math.isnan(value))
        assert text_of(back, key) == (value if isinstance(value, str) else "")


def test_content_is_not_copied_to_be_sealed() -> None:
    weights_P = np.zeros(1000, np.float32)
    _, pieces = pack_content(pack_order(Order("train", "r", 1, "a" * 64, {"weights": weights_P})))
    weights_P[5] = 1.0
    assert np.frombuffer(pieces[0], np.float32)[5] == 1.0


@given(manifest=st.binary(max_size=200), payload=st.binary(max_size=200))
def test_garbage_is_malformed_and_nothing_else(manifest: bytes, payload: bytes) -> None:
    try:
        unpack_content(manifest, memoryview(payload))
    except CytofedError:
        return


def test_payload_without_header_or_of_another_size_is_refused() -> None:
    arrays = {"weights": np.zeros(3, np.float32)}
    manifest, flat = wire.pack(arrays)
    with pytest.raises(wire.MalformedMessage, match="no header"):
        unpack_content(manifest.to_bytes(), flat.data)
    whole, pieces = pack_content(new_content({"a": 1}))
    with pytest.raises(wire.MalformedMessage):
        unpack_content(whole, memoryview(b"".join(pieces) + b"x"))


def test_header_holds_no_other_types() -> None:
    with pytest.raises(TypeError, match="which no header may hold"):
        pack_content(new_content({"a": [1, 2]}))  # type: ignore[dict-item]


# --- parcels


def parcel_of(body: bytes) -> Parcel:
    return Parcel("r", 3, 2, "train", Sealed(b"prefix", memoryview(body)), b"papers")


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1])
def test_parcel_comes_back_whatever_its_size(size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    packed = pack_parcel(parcel_of(body))
    assert ("body" in packed) != travels_inside(memoryview(body))
    found = unpack_parcel(message(packed))
    assert bytes(found.sealed.body) == body
    assert (found.sealed.prefix, found.papers) == (b"prefix", b"papers")
    assert (found.run, found.round, found.slot, found.content) == ("r", 3, 2, "train")


def test_one_body_serves_many_parcels() -> None:
    record = pack_body(memoryview(bytes(100)))
    packed = [pack_parcel(parcel_of(b""), record) for _ in range(2)]
    assert all(parcel["body"] is record for parcel in packed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("run", 3), ("run", "x" * 257), ("round", -1), ("round", "1"), ("slot", True),
     ("content", b"train"), ("prefix", "prefix"), ("papers", 0), ("body", "text")],
)  # fmt: skip
def test_claims_of_another_type_are_refused(key: str, value: object) -> None:
    packed = pack_parcel(parcel_of(b"body"))
    seal = packed["seal"]
    assert isinstance(seal, ConfigRecord)
    seal.__dict__["_data"][key] = value
    with pytest.raises(BadMessage):
        unpack_parcel(message(packed))


def test_what_is_no_parcel_is_refused() -> None:
    empty = RecordDict({"seal": ConfigRecord({})})
    record = ArrayRecord()
    record["other"] = array_of("uint8", (1,), RAW, memoryview(b"x"))
    other = RecordDict({"seal": ConfigRecord({"run": "r"}), "body": record})
    for content in (RecordDict({}), RecordDict({"seal": record}), empty, other):
        with pytest.raises(BadMessage):
            unpack_parcel(message(content))


def test_ledger_head_travels_beside() -> None:
    packed = pack_parcel(parcel_of(b"body"))
    assert attached_head(message(packed)) == b""
    attach_head(packed, b"document")
    assert attached_head(message(packed)) == b"document"
    assert unpack_parcel(message(packed)).run == "r"
