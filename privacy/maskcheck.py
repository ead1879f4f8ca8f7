"""Self-check of secure aggregation's masks: their keys have all the entropy of their secrets.

A mask whose key comes from 32 bits falls to a search of hours, and with it one lab's update: the
reference implementation of one peer seeds a generator of numbers so. Three looks at what the
production code derives: each bit of a secret matters, no two of many keys are equal (of 32 bits,
eight pairs would be), and each slot's secrets are 64 bytes of the entropy source.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cytofed.errors import VerificationError
from cytofed.privacy.identity import Identity
from cytofed.privacy.secagg import KEY_BYTES, Cohort, Place, cut, public_key
from cytofed.privacy.secagg_coordinator import begin
from cytofed.privacy.secagg_lab import LabState, advertise

KeyOf = Callable[[bytes], bytes]
"""a 32-byte secret -> the key of the mask that is derived from it"""

_KEYS = 1 << 18
"""keys of 32 bits: eight equal pairs expected, none in 1 of 3,000 checks; of 256 bits: none"""
_SLOTS = 4
_CLAMPED = frozenset((0, 1, 2, 254, 255))
"""bits of an X25519 private key that RFC 7748 fixes"""

_PLACE = Place(bytes(32), round=1, slot=0, order_sha256="0" * 64, words=8, word_bits=32)


def self_mask_key(seed: bytes) -> bytes:
    """The key of a lab's own mask, as ``secagg_lab.mask`` derives it."""
    return _PLACE.self_mask(seed, 1).key


def pair_mask_key(private: bytes) -> bytes:
    """The key of the mask between two labs, from one's private key."""
    return _PLACE.pair_mask(private, _PEER, 1, 2).key


_PEER = public_key(bytes(range(32)))


def check_mask_keys(self_key: KeyOf = self_mask_key, pair_key: KeyOf = pair_mask_key) -> None:
    """The looks at derivation. The arguments are test seams. Takes two seconds.

    Errors: VerificationError.
    """
    for what, key_of, ignored in (
        ("self-mask", self_key, frozenset[int]()),
        ("pair-mask", pair_key, _CLAMPED),
    ):
        secret = os.urandom(KEY_BYTES)
        known = {key_of(secret)}
        for bit in sorted(set(range(8 * KEY_BYTES)) - ignored):
            key = key_of(_flipped(secret, bit))
            if key in known:
                raise VerificationError(
                    f"mask keys: bit {bit} of a {what}'s secret does not change its key"
                )
            known.add(key)
    secrets = os.urandom(KEY_BYTES * _KEYS)
    known = {self_key(cut(secrets, KEY_BYTES, row)) for row in range(_KEYS)}
    if len(known) < _KEYS:
        raise VerificationError(
            f"mask keys: {_KEYS - len(known)} of {_KEYS:,} keys are repeats; of 256 bits none is"
        )


def check_mask_secrets() -> None:
    """A lab's set-up takes 64 bytes from the entropy source for each slot, and uses them.

    Errors: VerificationError.
    """
    taken: list[bytes] = []

    def entropy(count: int) -> bytes:
        taken.append(os.urandom(count))
        return taken[-1]

    coordinator, *labs = (Identity.generate(name) for name in ("coordinator", "a", "b", "c"))
    cohort = Cohort(
        federation="self-check",
        run="self-check",
        plan_sha256="0" * 64,
        roster_sha256="0" * 64,
        coordinator=coordinator.public,
        labs=tuple(lab.public for lab in labs),
        threshold=2,
        min_cohort=3,
    )
    opening = begin(cohort, coordinator, setup=1, first_slot=0, slots=_SLOTS)
    state, _ = advertise(LabState(cohort, "a"), labs[0], opening.request, entropy=entropy)
    if sorted(taken) != sorted((state.keys, state.seeds)) or len(state.keys) != _SLOTS * KEY_BYTES:
        raise VerificationError("mask keys: a slot's secrets are not 64 bytes of fresh entropy")


def _flipped(secret: bytes, bit: int) -> bytes:
    return bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(secret))
