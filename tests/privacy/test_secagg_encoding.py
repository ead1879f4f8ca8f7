"""Words: encoding and decoding of updates, masks, Shamir shares.

P parameters, W words, K labs.
"""

from __future__ import annotations

import os
import tracemalloc
from typing import Any

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.privacy import masks, shares
from cytofed.privacy.encoding import Encoding, Part, decode, encode, one_range
from cytofed.privacy.masks import Mask, Words, add_masks, add_words

BITS = st.sampled_from([32, 16])
COHORTS = st.integers(1, 40)


def test_width_of_a_value_leaves_room_for_the_cohort() -> None:
    for bits in (32, 16):
        for cohort in range(1, 41):
            encoding = one_range(1, 1.0, bits=bits, cohort=cohort)
            assert cohort * encoding.top <= 2 ** (bits - 1) - 1
    assert one_range(1, 1.0, bits=32, cohort=8).digits == 29
    assert one_range(1, 1.0, bits=16, cohort=8).digits == 13


@settings(max_examples=60, deadline=None)
@given(bits=BITS, cohort=COHORTS, seed=st.integers(0, 2**32), sign=st.sampled_from([-1, 0, 1]))
def test_mean_is_within_a_step_of_the_truth(bits: int, cohort: int, seed: int, sign: int) -> None:
    """Also at the edge of the range, where a sum comes closest to the ring's."""
    rng = np.random.default_rng(seed)
    encoding = Encoding((Part("body", 20, 0.25), Part("head", 5, 4.0)), bits, cohort)
    range_P = np.repeat([0.25, 4.0], [20, 5])
    drawn_KP = rng.uniform(-1, 1, (cohort, 25)) if sign == 0 else np.full((cohort, 25), sign)
    updates_KP = (drawn_KP * range_P).astype(np.float32)
    total_W = np.zeros(encoding.words, encoding.dtype)
    for update_P in updates_KP:
        add_words(total_W, encode(update_P, encoding, rng=rng).words_W)
    mean_P = decode(total_W, encoding, count=cohort).mean_P
    step_P = np.repeat([encoding.step(part) for part in encoding.parts], [20, 5])
    assert np.all(np.abs(mean_P - updates_KP.astype(np.float64).mean(0)) < step_P * (1 + 1e-6))


def test_rounding_is_right_on_average() -> None:
    encoding = one_range(20_000, 1.0, bits=16, cohort=40)
    value = 3.3 * encoding.step(encoding.parts[0])
    values_P = np.full(20_000, value, np.float32)
    words_W = encode(values_P, encoding, rng=np.random.default_rng(0)).words_W
    signed_P = words_W.view(np.int16)[: encoding.parameters]
    assert set(signed_P) == {3, 4}
    assert abs(float(signed_P.mean()) - 3.3) < 4 * np.sqrt(0.21 / 20_000)


def test_zero_stays_exactly_zero() -> None:
    encoding = one_range(100, 1.0, bits=16, cohort=3)
    words_W = encode(np.zeros(100, np.float32), encoding, rng=np.random.default_rng(0)).words_W
    assert not words_W[:100].any()


def test_clamped_fraction_is_counted() -> None:
    encoding = one_range(4, 1.0, bits=32, cohort=3)
    values_P = np.array([-2.0, -1.0, 1.0, 5.0], np.float32)
    encoded = encode(values_P, encoding, rng=np.random.default_rng(0))
    assert encoded.clamped == 0.5
    assert list(encoded.words_W.view(np.int32)[:4]) == [
        sign * encoding.top for sign in (-1, -1, 1, 1)
    ]


@settings(max_examples=40, deadline=None)
@given(
    bits=BITS,
    weights=st.lists(st.floats(0.5, 1000), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_weighted_mean_is_within_its_bound(bits: int, weights: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    encoding = Encoding((Part("update", 10, 2.0),), bits, len(weights), max_weight=1000.0)
    updates_KP = rng.uniform(-2, 2, (len(weights), 10)).astype(np.float32)
    total_W = np.zeros(encoding.words, encoding.dtype)
    for update_P, weight in zip(updates_KP, weights, strict=True):
        add_words(total_W, encode(update_P, encoding, rng=rng, weight=weight).words_W)
    decoded = decode(total_W, encoding, count=len(weights))
    truth_P = np.average(updates_KP.astype(np.float64), axis=0, weights=weights)
    rounding = encoding.step(encoding.parts[0]) * 1000.0 * len(weights) / sum(weights)
    # A weight is off by at most half of 2^-20 of the greatest; so is each lab's part of the mean.
    resolution = 4 * 2.0 * len(weights) * 1000.0 * 2**-20 / sum(weights)
    assert np.all(np.abs(decoded.mean_P - truth_P) < rounding + resolution)
    assert decoded.weight == pytest.approx(sum(weights), abs=len(weights) * 1000.0 * 2**-20)


def test_encoding_needs_little_memory_beyond_its_words() -> None:
    values_P = np.zeros(4_000_000, np.float32)
    encoding = one_range(len(values_P), 1.0, bits=32, cohort=8)
    tracemalloc.start()
    encode(values_P, encoding, rng=np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * values_P.nbytes


@pytest.mark.parametrize(
    ("parts", "bits", "cohort"),
    [((1, 1.0), 24, 8), ((1, 1.0), 32, 41), ((1, 0.0), 32, 8), ((1, float("nan")), 32, 8)],
)
def test_unsafe_encodings_are_refused(parts: tuple[int, float], bits: int, cohort: int) -> None:
    with pytest.raises(InputError):
        Encoding((Part("update", *parts),), bits, cohort)


@pytest.mark.parametrize("weight", [None, -1.0, 11.0, float("nan")])
def test_weight_outside_its_public_bound_is_refused(weight: float | None) -> None:
    encoding = Encoding((Part("update", 1, 1.0),), 32, 3, max_weight=10.0)
    with pytest.raises(InputError, match="weight"):
        encode(np.zeros(1, np.float32), encoding, rng=np.random.default_rng(0), weight=weight)


# ---- masks


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16])
@pytest.mark.parametrize("count", [0, 1, 65_537, 300_001])
def test_a_mask_and_its_opposite_cancel(dtype: type, count: int) -> None:
    words_W: Words = np.arange(count).astype(dtype)
    keys = [bytes([number]) * 32 for number in range(3)]
    add_masks(words_W, [Mask(key, 1) for key in keys])
    if count > 10:
        assert not np.array_equal(words_W, np.arange(count).astype(dtype))
    add_masks(words_W, [Mask(key, -1) for key in reversed(keys)])
    assert np.array_equal(words_W, np.arange(count).astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16])
def test_shares_side_by_side_are_the_masks_in_one_go(dtype: type) -> None:
    count = 3 * (1 << 19) + 1  # four shares, the last of one word alone
    whole_W: Words = np.zeros(count, dtype)
    shared_W: Words = np.zeros(count, dtype)
    many = [Mask(os.urandom(32), 1), Mask(os.urandom(32), -1)]
    masks.add_to_share(whole_W, many, slice(0, count))
    add_masks(shared_W, many)
    assert np.array_equal(whole_W, shared_W)


def test_masking_needs_no_memory_of_the_vectors_size() -> None:
    words_W = np.zeros(8_000_000, np.uint32)
    tracemalloc.start()
    add_masks(words_W, [Mask(bytes([number]) * 32, 1) for number in range(8)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.25 * words_W.nbytes
    assert peak < 4 * 3 * masks.CHUNK_BYTES + 100_000  # four threads at most


def test_vectors_that_cannot_be_masked_in_place_are_refused() -> None:
    vectors: list[Any] = [np.zeros(4, "i8"), np.zeros((2, 2), "u4"), np.zeros(8, "u4")[::2]]
    for words_W in vectors:
        with pytest.raises(InputError):
            add_masks(words_W, [])
    with pytest.raises(InputError, match="expected"):
        add_words(np.zeros(4, np.uint32), np.zeros(1, np.uint32))


# ---- shares


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(2, 40))
def test_any_threshold_of_shares_gives_the_secrets(data: st.DataObject, count: int) -> None:
    threshold = data.draw(st.integers(2, count))
    secrets = [os.urandom(32) for _ in range(3)]
    holders = shares.split(secrets, threshold=threshold, count=count)
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    held = {index: holders[index - 1] for index in chosen}
    assert shares.combine(held, threshold=threshold) == secrets


@settings(max_examples=10, deadline=None)
@given(count=st.integers(2, 12), data=st.data())
def test_shares_are_those_of_pycryptodome(count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, count))
    secret = os.urandom(32)
    holders = shares.split([secret], threshold=threshold, count=count)
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    theirs = b"".join(
        Shamir.combine([(i, holders[i - 1][0][at : at + 16]) for i in chosen], False)
        for at in (0, 16)
    )
    assert theirs == secret
    dealt = [dict(Shamir.split(threshold, count, secret[at : at + 16], False)) for at in (0, 16)]
    held = {i: [dealt[0][i] + dealt[1][i]] for i in chosen}
    assert shares.combine(held, threshold=threshold) == [secret]


def test_fewer_shares_fit_every_secret() -> None:
    """Whatever the secret, a third share exists that goes with the first two: none is ruled out."""
    secret, other = bytes(32), os.urandom(32)
    holders = shares.split([secret], threshold=3, count=3)
    two = {1: holders[0], 2: holders[1]}
    weights = [shares._lagrange(index, (1, 2, 3)) for index in (1, 2, 3)]
    inverse = shares._inverse(weights[2])
    halves = []
    for at in (0, 16):
        known = int.from_bytes(other[at : at + 16], "big")
        for index, weight in ((1, weights[0]), (2, weights[1])):
            part = int.from_bytes(two[index][0][at : at + 16], "big")
            known ^= shares._times(part, weight, 1)
        halves.append(shares._times(known, inverse, 1).to_bytes(16, "big"))
    assert shares.combine({**two, 3: [b"".join(halves)]}, threshold=3) == [other]


def test_sharing_outside_its_limits_is_refused() -> None:
    for secret, threshold, count in ((bytes(16), 2, 3), (bytes(32), 1, 3), (bytes(32), 4, 3)):
        with pytest.raises(InputError):
            shares.split([secret], threshold=threshold, count=count)
    with pytest.raises(InputError, match="expected at least 3"):
        shares.combine({1: [bytes(32)], 2: [bytes(32)]}, threshold=3)
    with pytest.raises(InputError):
        shares.combine({0: [bytes(32)], 2: [bytes(32)]}, threshold=2)
