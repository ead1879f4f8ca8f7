"""Sealing, identities and canonical bytes: what must hold when nobody lies.

Lies are in tests/attacks/test_message_lies.py.
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError, VerificationError
from cytofed.privacy import sealing, wire
from cytofed.privacy.identity import Identity, PublicIdentity, SignatureError, sign, verify
from cytofed.privacy.sealing import (
    CHUNK_BYTES,
    Context,
    Direction,
    Sealed,
    SealError,
    seal,
    seal_for_all,
    unseal,
)
from tests.attacks.stage import PLAN, ROSTER, identity
from tests.vectors import make_vectors

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
LEEDS, BONN, CHIEF = identity("leeds"), identity("bonn"), identity("coordinator")
UP = Context(
    federation="marrow",
    run="run-1",
    plan_sha256=PLAN,
    roster_sha256=ROSTER,
    round=1,
    slot=0,
    sender="leeds",
    receiver="coordinator",
    direction=Direction.TO_COORDINATOR,
    content="update",
)
DOWN = replace(UP, sender="coordinator", receiver="", direction=Direction.TO_LAB, content="weights")


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]
)
def test_payload_of_any_size_comes_back(size: int) -> None:
    payload = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
    sealed = seal(payload[:size], UP, sender=LEEDS, receiver=CHIEF.public, manifest=b"m")
    again = Sealed.from_bytes(sealed.to_bytes())
    opened = unseal(again, UP, sender=LEEDS.public, receiver=CHIEF)
    assert opened.payload == payload[:size]
    assert opened.manifest == b"m"
    assert b"index" not in sealed.to_bytes()


def test_payload_for_all_is_encrypted_once_and_opens_for_each() -> None:
    receivers = [LEEDS.public, BONN.public]
    sealed = seal_for_all(b"weights", DOWN, sender=CHIEF, receivers=receivers)
    assert sealed["leeds"].body is sealed["bonn"].body
    for lab in (LEEDS, BONN):
        expected = replace(DOWN, receiver=lab.name)
        opened = unseal(sealed[lab.name], expected, sender=CHIEF.public, receiver=lab)
        assert bytes(opened.payload) == b"weights"
        assert len(opened.payload_sha256) == 64


def test_two_seals_of_one_payload_have_nothing_in_common() -> None:
    one, two = (seal(bytes(64), UP, sender=LEEDS, receiver=CHIEF.public) for _ in range(2))
    assert one.body != two.body


def test_sealing_adds_less_than_four_thousandths_to_a_model() -> None:
    payload = memoryview(bytes(4 * CHUNK_BYTES))
    sealed = seal(payload, UP, sender=LEEDS, receiver=CHIEF.public)
    assert sealed.nbytes < 1.004 * len(payload)


def test_memory_stays_near_the_payloads_size() -> None:
    payload = memoryview(bytes(16 * CHUNK_BYTES))
    tracemalloc.start()
    sealed = seal(payload, UP, sender=LEEDS, receiver=CHIEF.public)
    sealing_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    unseal(sealed, UP, sender=LEEDS.public, receiver=CHIEF)
    opening_peak = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    assert sealing_peak < 1.1 * len(payload)
    assert opening_peak < 1.1 * len(payload)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_altered_message_opens(data: st.DataObject) -> None:
    sealed = bytearray(
        seal(b"an update", UP, sender=LEEDS, receiver=CHIEF.public, manifest=b"m").to_bytes()
    )
    at = data.draw(st.integers(0, len(sealed) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    if kind == "flip":
        sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del sealed[at:]
    elif kind == "insert":
        sealed.insert(at, data.draw(st.integers(0, 255)))
        if bytes(sealed[:at]) + bytes(sealed[at + 1 :]) == bytes(sealed):
            return
    else:
        del sealed[at]
    with pytest.raises(SealError):
        unseal(Sealed.from_bytes(bytes(sealed)), UP, sender=LEEDS.public, receiver=CHIEF)


def test_sealing_with_keys_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="the keys are those of bonn -> coordinator"):
        seal(b"", UP, sender=BONN, receiver=CHIEF.public)


def test_stored_messages_still_open() -> None:
    stored = json.loads((VECTORS / "sealed.json").read_text())
    people = make_vectors.identities()
    payload = bytes.fromhex(stored["payload"])
    context = Context(**{**stored["context"], "direction": Direction.TO_COORDINATOR})
    opened = unseal(
        Sealed.from_bytes(bytes.fromhex(stored["sealed"])),
        context,
        sender=people["bonn"].public,
        receiver=people["coordinator"],
    )
    assert (bytes(opened.payload), opened.manifest.hex()) == (payload, stored["manifest"])
    down = Context(**{**stored["for_all_context"], "direction": Direction.TO_LAB})
    for name, message in stored["for_all"].items():
        opened = unseal(
            Sealed.from_bytes(bytes.fromhex(message)),
            replace(down, receiver=name),
            sender=people["coordinator"].public,
            receiver=people[name],
        )
        assert opened.payload == payload


# ---- identities


def test_identity_survives_its_file() -> None:
    again = Identity.from_bytes(LEEDS.to_bytes())
    assert again.public == LEEDS.public
    assert PublicIdentity.from_bytes(LEEDS.public.to_bytes()) == LEEDS.public


def test_secrets_stay_out_of_repr() -> None:
    secret = wire.decode(LEEDS.to_bytes())["secret"]
    for text in (repr(LEEDS), str(LEEDS), repr(LEEDS.public)):
        assert secret.hex() not in text
        assert repr(secret)[2:20] not in text
    assert repr(LEEDS).startswith("Identity('leeds'")


def test_fingerprint_names_the_lab_and_both_keys() -> None:
    public = LEEDS.public
    others = [
        replace(public, name="bonn"),
        replace(public, signing=BONN.public.signing),
        replace(public, sealing=BONN.public.sealing),
    ]
    assert len({public.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "-x", "ü"])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a name"):
        replace(LEEDS.public, name=name)


def test_unusable_keys_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        replace(LEEDS.public, sealing=b"short")


def test_signed_document_gives_its_body_back() -> None:
    document = sign(LEEDS, "cytofed/1/test", b"body")
    assert verify(document, label="cytofed/1/test", signer=LEEDS.public) == b"body"


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 106), bit=st.integers(0, 7))
def test_no_altered_document_verifies(at: int, bit: int) -> None:
    document = bytearray(sign(LEEDS, "cytofed/1/test", b"body"))
    document[at % len(document)] ^= 1 << bit
    with pytest.raises((SignatureError, wire.MalformedMessage)):
        verify(bytes(document), label="cytofed/1/test", signer=LEEDS.public)


# ---- canonical bytes

LEAVES = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=40), st.text(max_size=20))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((depth(item) for item in inner), default=0)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_every_value_comes_back(value: Any) -> None:
    if depth(value) <= wire.MAX_DEPTH:
        assert wire.decode(wire.encode(value)) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_decode_only_if_they_are_the_one_encoding(data: bytes) -> None:
    try:
        value = wire.decode(data)
    except wire.MalformedMessage:
        return
    assert wire.encode(value) == data


@pytest.mark.parametrize("value", [True, 1.5, None, -1, 2**64, {"a": None}, [object()]])
def test_values_without_canonical_form_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        wire.encode(value)


def test_canonical_bytes_match_the_vectors() -> None:
    stored = json.loads((VECTORS / "messages.json").read_text())
    assert stored == make_vectors.messages()


def test_arrays_come_back_without_a_copy() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "body": np.arange(12, dtype=np.float32).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float64),
        "scalar": np.array(7, np.int64),
        "turned": np.arange(6, dtype=">u2").reshape(2, 3).T,
    }
    manifest, flat = wire.pack(arrays)
    again = wire.unpack(wire.Manifest.from_bytes(manifest.to_bytes()), flat.data)
    for name, array in arrays.items():
        assert np.array_equal(again[name], array)
    assert np.shares_memory(again["body"], flat)


@pytest.mark.parametrize(
    "row",
    [
        [["a", [2], "|O"]],
        [["a", [2], "<f4"], ["a", [2], "<f4"]],
        [["a", [1] * 9, "<f4"]],
        [["a", "2", "<f4"]],
        [["a", [2]]],
        7,
    ],
)
def test_manifest_of_anything_but_plain_arrays_is_refused(row: Any) -> None:
    with pytest.raises(VerificationError):
        wire.Manifest.from_bytes(wire.encode(row))


def test_huge_manifest_allocates_nothing() -> None:
    manifest = wire.Manifest.from_bytes(wire.encode([["a", [2**30, 2**7], "<f8"]]))
    assert manifest.nbytes == 2**40
    with pytest.raises(wire.MalformedMessage, match="manifest says"):
        wire.unpack(manifest, bytes(8))


def test_layout_of_a_sealed_message_is_as_documented() -> None:
    sealed = seal(b"x", UP, sender=LEEDS, receiver=CHIEF.public)
    header = int.from_bytes(sealed.prefix[10:14], "big")
    assert sealed.prefix[:10] == b"CYTOSEAL\x00\x01"
    assert len(sealed.prefix) == 14 + header + 1168 + 64
    assert len(sealed.body) == 1 + sealing.TAG_BYTES
