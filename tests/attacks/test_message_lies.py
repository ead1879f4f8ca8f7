"""Lies in single messages: sealed ones that were replayed, cut, altered or misdirected, and bytes
that are not the canonical encoding of anything. One claim each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cytofed.privacy import sealing, wire
from cytofed.privacy.sealing import (
    Context,
    Direction,
    NotSealed,
    Sealed,
    SealError,
    Tampered,
    TooLarge,
    Unsealed,
    WrongContext,
    WrongVersion,
    check_seal,
    seal,
    seal_for_all,
    unseal,
)
from cytofed.privacy.wire import MalformedMessage
from tests.attacks.stage import OTHER, PLAN, ROSTER, guarded_by, identity

LEEDS, BONN, CHIEF = identity("leeds"), identity("bonn"), identity("coordinator")
PAYLOAD = bytes(range(256)) * 5000  # two chunks
PLACE = Context(
    federation="marrow",
    run="run-1",
    plan_sha256=PLAN,
    roster_sha256=ROSTER,
    round=3,
    slot=2,
    sender="leeds",
    receiver="coordinator",
    direction=Direction.TO_COORDINATOR,
    content="update",
)


def sealed(payload: bytes = PAYLOAD, **changes: Any) -> Sealed:
    """An honest lab's update, in another place if asked."""
    return seal(payload, replace(PLACE, **changes), sender=LEEDS, receiver=CHIEF.public)


def opened(message: Sealed, **changes: Any) -> Unsealed:
    """What the coordinator makes of it, where it expects round 3, slot 2."""
    return unseal(message, PLACE, sender=LEEDS.public, receiver=CHIEF, **changes)


def refused(message: Sealed, error: type[SealError], match: str, **changes: Any) -> None:
    with pytest.raises(error, match=match):
        opened(message, **changes)


def flipped(data: bytes | memoryview, at: int) -> bytes:
    altered = bytearray(data)
    altered[at] ^= 1
    return bytes(altered)


# ---- context


@guarded_by("context")
def test_message_of_an_earlier_round_is_refused() -> None:
    refused(sealed(round=2), WrongContext, "round '2', expected '3'")


@guarded_by("context")
def test_message_of_another_slot_is_refused() -> None:
    refused(sealed(slot=1), WrongContext, "slot '1', expected '2'")


@guarded_by("context")
def test_message_of_another_run_is_refused() -> None:
    refused(sealed(run="run-0"), WrongContext, "run 'run-0'")


@guarded_by("context")
def test_message_of_another_federation_is_refused() -> None:
    refused(sealed(federation="x"), WrongContext, "federation 'x'")


@guarded_by("context")
def test_message_for_another_plan_is_refused() -> None:
    refused(sealed(plan_sha256=OTHER), WrongContext, "plan_sha256")


@guarded_by("context")
def test_message_under_a_stale_roster_is_refused() -> None:
    refused(sealed(roster_sha256=OTHER), WrongContext, "roster_sha256")


@guarded_by("context")
def test_message_of_another_kind_is_refused() -> None:
    refused(sealed(content="evaluation"), WrongContext, "content 'evaluation'")


@guarded_by("context")
def test_reflected_message_is_refused() -> None:
    refused(sealed(direction=Direction.TO_LAB), WrongContext, "direction 'to-lab'")


@guarded_by("context")
def test_message_of_another_sender_is_refused() -> None:
    message = seal(PAYLOAD, replace(PLACE, sender="bonn"), sender=BONN, receiver=CHIEF.public)
    refused(message, WrongContext, "sender 'bonn', expected 'leeds'")


@guarded_by("context")
def test_message_for_another_receiver_is_refused() -> None:
    message = seal(PAYLOAD, replace(PLACE, receiver="bonn"), sender=LEEDS, receiver=BONN.public)
    refused(message, WrongContext, "receiver 'bonn', expected 'coordinator'")


# ---- form


@guarded_by("version")
def test_downgraded_version_is_refused() -> None:
    message = sealed()
    old = message.prefix[:8] + b"\0\0" + message.prefix[10:]
    refused(replace(message, prefix=old), WrongVersion, "version 0, expected 1")


@guarded_by("header-size")
def test_oversize_header_is_refused_before_it_is_read() -> None:
    message = sealed()
    huge = message.prefix[:10] + b"\xff\xff\xff\xff" + message.prefix[14:]
    refused(replace(message, prefix=huge), TooLarge, "header of 4294967295 bytes")


@guarded_by("prefix-length")
def test_grown_prefix_is_refused() -> None:
    message = sealed()
    refused(replace(message, prefix=message.prefix + b"x"), NotSealed, "asks for another length")


@guarded_by("payload-size")
def test_payload_over_the_limit_is_refused_before_memory_is_taken() -> None:
    refused(sealed(), TooLarge, "payload of 1280000 bytes, expected at most 1000", max_bytes=1000)


@guarded_by("body-length")
def test_truncated_stream_is_refused() -> None:
    message = sealed()
    refused(replace(message, body=message.body[:-1]), NotSealed, "cut or grown")


@guarded_by("body-length")
def test_stream_cut_at_a_chunk_is_refused() -> None:
    message = sealed()
    cut = message.body[: sealing.CHUNK_BYTES + sealing.TAG_BYTES]
    refused(replace(message, body=cut), NotSealed, "cut or grown")


@guarded_by("body-length")
def test_grown_stream_is_refused() -> None:
    message = sealed()
    grown = memoryview(bytes(message.body) + b"x")
    refused(replace(message, body=grown), NotSealed, "cut or grown")


# ---- content


@guarded_by("chunk")
def test_flipped_bit_in_the_payload_is_refused() -> None:
    message = sealed()
    altered = memoryview(flipped(message.body, 1_100_000))
    refused(replace(message, body=altered), Tampered, "chunk 1 was altered")


@guarded_by("chunk")
def test_swapped_chunks_are_refused() -> None:
    """Equal tags and lengths, other order: the counter in the nonce gives it away."""
    size = sealing.CHUNK_BYTES + sealing.TAG_BYTES
    message = sealed(bytes(2 * sealing.CHUNK_BYTES))
    first, second = bytes(message.body[:size]), bytes(message.body[size:])
    tags = first[-16:], second[-16:]
    swapped = memoryview(second[:-16] + tags[0] + first[:-16] + tags[1])
    refused(replace(message, body=swapped), Tampered, "chunk 0 was altered")


@guarded_by("signature", "seal-signature")
def test_flipped_bit_in_a_tag_is_refused() -> None:
    message = sealed()
    altered = memoryview(flipped(message.body, sealing.CHUNK_BYTES + 3))
    refused(replace(message, body=altered), Tampered, "is not signed by leeds")


@guarded_by("signature", "seal-signature")
def test_flipped_bit_in_the_key_wrap_is_refused() -> None:
    message = sealed()
    altered = flipped(message.prefix, len(message.prefix) - 100)
    refused(replace(message, prefix=altered), Tampered, "is not signed by leeds")


@guarded_by("signature", "seal-signature")
def test_altered_manifest_is_refused() -> None:
    honest = seal(PAYLOAD, PLACE, sender=LEEDS, receiver=CHIEF.public, manifest=b"head (512, 21)")
    altered = honest.prefix.replace(b"(512, 21)", b"(512, 22)")
    refused(replace(honest, prefix=altered), Tampered, "is not signed by leeds")


@guarded_by("signature", "seal-signature")
def test_message_sealed_by_a_stranger_is_refused() -> None:
    """Anyone can encrypt to a public key; the signature is what counts."""
    stranger = type(LEEDS).generate("leeds")
    message = seal(PAYLOAD, PLACE, sender=stranger, receiver=CHIEF.public)
    refused(message, Tampered, "is not signed by leeds")


@guarded_by("key-wrap")
def test_content_key_lifted_from_another_message_is_refused() -> None:
    """A hostile lab signs another lab's wrap and body as its own, to have it counted twice."""
    honest = seal(PAYLOAD, replace(PLACE, sender="bonn"), sender=BONN, receiver=CHIEF.public)
    own = sealed()
    wrap_end = len(honest.prefix) - 64
    header = own.prefix[: len(own.prefix) - 64 - 1168]
    start = header + honest.prefix[wrap_end - 1168 : wrap_end]
    signature = LEEDS.signature(sealing._signed(start, len(PAYLOAD), honest.body))
    refused(Sealed(start + signature, honest.body), Tampered, "content key does not open")


@guarded_by("payload-hash")
def test_receiver_cannot_pass_on_another_payload_under_a_shared_key() -> None:
    """A lab that knows the content key of a broadcast alters two blocks so that GCM's tag stays.

    GHASH is linear: a change d of one block is undone by d H in the next.
    """
    weights = bytes(64)
    place = replace(
        PLACE, sender="coordinator", receiver="", direction=Direction.TO_LAB, content="weights"
    )
    sent = seal_for_all(weights, place, sender=CHIEF, receivers=[LEEDS.public, BONN.public])
    prefix = memoryview(sent["leeds"].prefix)
    header_end = 14 + int.from_bytes(prefix[10:14], "big")
    info = sealing._wrap_info(prefix[:header_end], CHIEF.public, LEEDS.public)
    wrap = bytes(prefix[header_end : header_end + 1168])
    key = sealing._SUITE.decrypt(wrap, LEEDS.hpke_key(), info=info)
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    hash_key = int.from_bytes(block.update(bytes(16)), "big")
    altered = bytearray(sent["bonn"].body)
    altered[0] ^= 0x80  # the element 1 of GCM's field
    undo = hash_key.to_bytes(16, "big")  # 1 times H
    altered[16:32] = bytes(a ^ b for a, b in zip(altered[16:32], undo, strict=True))
    forged = replace(sent["bonn"], body=memoryview(bytes(altered)))
    expected = replace(place, receiver="bonn")
    assert unseal(sent["bonn"], expected, sender=CHIEF.public, receiver=BONN).payload == weights
    with pytest.raises(Tampered, match="the sender signed"):
        unseal(forged, expected, sender=CHIEF.public, receiver=BONN)


@guarded_by("signature", "seal-signature")
def test_message_passed_on_unread_is_checked_all_the_same() -> None:
    message = sealed()
    altered = replace(message, prefix=flipped(message.prefix, len(message.prefix) - 100))
    assert check_seal(message, PLACE, sender=LEEDS.public, receiver=CHIEF.public) == b""
    with pytest.raises(Tampered, match="is not signed by leeds"):
        check_seal(altered, PLACE, sender=LEEDS.public, receiver=CHIEF.public)


# ---- canonical bytes


def malformed(data: bytes, match: str) -> None:
    with pytest.raises(MalformedMessage, match=match):
        wire.decode(data)


@guarded_by("trailing-bytes")
def test_bytes_after_the_end_are_refused() -> None:
    malformed(wire.encode([1, 2]) + b"\0", "1 bytes after the end")


@guarded_by("announced-length")
def test_announced_length_beyond_the_message_is_refused() -> None:
    malformed(b"\x5b\x00\x00\x00\xff\x00\x00\x00\x00abc", "1095216660480 bytes announced")


@guarded_by("item-count")
def test_announced_count_beyond_the_message_is_refused() -> None:
    malformed(b"\x9b\x00\x00\x00\xff\x00\x00\x00\x00abc", "1095216660480 items announced")


@guarded_by("item-budget")
def test_message_of_countless_empty_items_is_refused() -> None:
    malformed(b"\x9a\x00\x04\x00\x01" + b"\xa0" * (2**18 + 1), "more than 262144 items")


@guarded_by("name-length")
def test_endless_name_is_refused() -> None:
    """Names end up in errors and logs."""
    fields = wire.Fields.of(wire.encode({"lists": {"x" * 300: b""}}), "announce")
    with pytest.raises(MalformedMessage, match="endless name"):
        fields.blobs("lists")


@guarded_by("nesting")
def test_deep_nesting_is_refused() -> None:
    malformed(b"\x81" * 7 + b"\0", "nested deeper")


@guarded_by("shortest-number")
def test_number_in_a_longer_form_is_refused() -> None:
    malformed(b"\x18\x17", "not in its shortest form")


@guarded_by("key-order")
def test_field_given_twice_is_refused() -> None:
    malformed(b"\xa2\x61a\x01\x61a\x02", "repeated or out of order")


@guarded_by("key-order")
def test_fields_out_of_order_are_refused() -> None:
    malformed(b"\xa2\x61b\x01\x61a\x02", "repeated or out of order")


@guarded_by("message-size")
def test_message_over_the_limit_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="expected at most 10"):
        wire.decode(wire.encode(bytes(20)), limit=10)


@guarded_by("manifest-size")
def test_payload_that_is_longer_than_its_manifest_is_refused() -> None:
    manifest, flat = wire.pack({"head": np.zeros((3, 2), np.float32)})
    with pytest.raises(MalformedMessage, match="payload of 25 bytes, manifest says 24"):
        wire.unpack(manifest, bytes(flat) + b"x")


@guarded_by("array-shape")
def test_empty_array_of_a_shape_that_numpy_cannot_make_is_refused() -> None:
    for shape in ([0, 2**63], [2**62, 0, 2**62], [1 << 41, 0], [0] * 9):
        rows = wire.encode([["weights", shape, "<f4"]])
        with pytest.raises(MalformedMessage, match="absurd shape"):
            wire.unpack(wire.Manifest.from_bytes(rows), b"")
