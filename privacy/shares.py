"""Shamir shares of 32-byte secrets: any ``threshold`` of them give the secret, fewer give nothing.

Shamir, "How to share a secret", CACM 1979, over GF(2^128) with x^128 + x^7 + x^2 + x + 1: the
field, byte order and polynomial of pycryptodome's ``SecretSharing``, whose shares are
interchangeable with these. A secret is two halves of 16 bytes; a share is the two halves' shares at
the same index, from 1.

A set-up shares hundreds of secrets at once, and pycryptodome takes 10 to 60 ms for each at 40 labs.
Here all of them lie side by side in the lanes of one long integer, so that one XOR works on all;
which shifts and XORs are done depends on indices alone, never on a secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from cytofed.errors import InputError
from cytofed.privacy.identity import Entropy

SECRET_BYTES = 32
MAX_INDEX = 255

_ELEMENT_BYTES = 16
_LANE_BYTES = 24  # 64 spare bits above each element take what a shift pushes out
_LANE_BITS = 8 * _LANE_BYTES
_POLYNOMIAL = (1 << 128) | 0x87


def split(
    secrets: Sequence[bytes], *, threshold: int, count: int, entropy: Entropy = os.urandom
) -> list[list[bytes]]:
    """Shares of every secret, by holder: ``result[index - 1][i]`` is a share of ``secrets[i]``.

    Guarantees: any ``threshold`` - 1 holders together know nothing about the secrets. Raises
    InputError for a secret that is not 32 bytes and for a threshold outside 2 to ``count``.
    """
    if any(len(secret) != SECRET_BYTES for secret in secrets):
        raise InputError(f"secrets to share must have {SECRET_BYTES} bytes")
    if not 2 <= threshold <= count <= MAX_INDEX:
        raise InputError(
            f"threshold {threshold} of {count} shares, expected 2 <= threshold <= count"
        )
    coefficients = [_pack(entropy(len(secrets) * SECRET_BYTES)) for _ in range(threshold - 1)]
    constant = _pack(b"".join(secrets))
    lanes = 2 * len(secrets)
    holders = []
    for index in range(1, count + 1):
        value = 0
        for coefficient in (*coefficients, constant):  # Horner: constant term last
            value = _times_index(value, index, lanes) ^ coefficient
        raw = _unpack(value, lanes)
        holders.append(_rows(raw))
    return holders


def combine(shares: Mapping[int, Sequence[bytes]], *, threshold: int) -> list[bytes]:
    """The secrets from holders' shares by index; exactly ``threshold`` holders are used.

    Raises InputError for fewer holders. A wrong share gives a wrong secret: compare with a
    commitment.
    """
    if len(shares) < threshold or not all(1 <= index <= MAX_INDEX for index in shares):
        raise InputError(f"shares of {len(shares)} holders, expected at least {threshold}")
    indices = sorted(shares)[:threshold]
    lanes = 2 * len(shares[indices[0]])
    total = 0
    for index in indices:
        weight = _lagrange(index, indices)
        total ^= _times(_pack(b"".join(shares[index])), weight, lanes)
    return _rows(_unpack(total, lanes))


def _lagrange(index: int, indices: Sequence[int]) -> int:
    """The weight of the share at ``index`` in the polynomial's value at 0."""
    above, below = 1, 1
    for other in indices:
        if other != index:
            above = _times_index(above, other, 1)
            below = _times_index(below, other ^ index, 1)
    return _times(above, _inverse(below), 1)


def _pack(elements: bytes) -> int:
    spare = bytes(_LANE_BYTES - _ELEMENT_BYTES)
    cuts = range(0, len(elements), _ELEMENT_BYTES)
    return int.from_bytes(
        b"".join(spare + elements[at : at + _ELEMENT_BYTES] for at in cuts), "big"
    )


def _unpack(value: int, lanes: int) -> bytes:
    raw = value.to_bytes(lanes * _LANE_BYTES, "big")
    ends = range(_LANE_BYTES, len(raw) + 1, _LANE_BYTES)
    return b"".join(raw[end - _ELEMENT_BYTES : end] for end in ends)


def _rows(raw: bytes) -> list[bytes]:
    return [raw[at : at + SECRET_BYTES] for at in range(0, len(raw), SECRET_BYTES)]


def _lanes_of(element: int, lanes: int) -> int:
    """The same element in every lane."""
    return int.from_bytes(element.to_bytes(_LANE_BYTES, "big") * lanes, "big")


def _fold(value: int, low: int) -> int:
    """Every lane modulo the field's polynomial; at most 64 bits stand above each element."""
    high = (value & ~low) >> 128
    return (value & low) ^ high ^ high << 1 ^ high << 2 ^ high << 7


def _times_index(value: int, index: int, lanes: int) -> int:
    """Every lane times a small public index (8 bits: folding once is enough)."""
    product = 0
    for bit in range(index.bit_length()):
        if index >> bit & 1:
            product ^= value << bit
    return _fold(product, _lanes_of((1 << 128) - 1, lanes))


def _times(value: int, weight: int, lanes: int) -> int:
    """Every lane times a public element."""
    low = _lanes_of((1 << 128) - 1, lanes)
    product = 0
    for bit in range(128):
        if weight >> bit & 1:
            product ^= value
        value = _fold(value << 1, low)
    return product


def _inverse(element: int) -> int:
    """The inverse of a public element other than 0, by Euclid's algorithm on polynomials."""
    a, b, x, y = _POLYNOMIAL, element, 0, 1
    while b != 1:
        shift = a.bit_length() - b.bit_length()
        if shift < 0:
            a, b, x, y = b, a, y, x
            continue
        a ^= b << shift
        x ^= y << shift
    return y
