"""Secure aggregation once more: slow, in plain integers, from the papers and RFCs, sharing no code.

What a lab sends, what is dealt as shares and what the coordinator computes, written anew from
Bonawitz et al. 2017, RFC 7748 (X25519), RFC 5869 (HKDF), FIPS 197 (AES), NIST SP 800-38A (CTR) and
Shamir 1979. Only SHA-256 comes from the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

# ---- X25519, RFC 7748

_P = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder, as the text gives it."""
    k = int.from_bytes(scalar, "little")
    k &= (1 << 254) - 8
    k |= 1 << 254
    u = int.from_bytes(point, "little") % (1 << 255)
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % _P, b * b % _P, d * a % _P, c * b % _P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % _P, x1 * (da - cb) ** 2 % _P
        x2, z2 = aa * bb % _P, e * (aa + 121665 * e) % _P
    if swap:
        x2, x3, z2, z3 = x3, x2, z3, z2
    return (x2 * pow(z2, _P - 2, _P) % _P).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    return x25519(scalar, (9).to_bytes(32, "little"))


# ---- HKDF-SHA256, RFC 5869, one block


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


# ---- AES-256, FIPS 197


def _times_x(byte: int) -> int:
    return (byte << 1 ^ (0x11B if byte & 0x80 else 0)) & 0xFF


def _times(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = _times_x(a), b >> 1
    return product


def _sbox() -> list[int]:
    box = []
    for value in range(256):
        inverse = next((c for c in range(256) if _times(value, c) == 1), 0)
        out = 0x63
        for turn in range(5):
            out ^= (inverse << turn | inverse >> (8 - turn)) & 0xFF
        box.append(out)
    return box


SBOX = _sbox()


def _expand(key: bytes) -> list[list[int]]:
    words = [list(key[4 * i : 4 * i + 4]) for i in range(8)]
    rcon = 1
    for i in range(8, 60):
        word = list(words[i - 1])
        if i % 8 == 0:
            word = [SBOX[b] for b in word[1:] + word[:1]]
            word[0] ^= rcon
            rcon = _times_x(rcon)
        elif i % 8 == 4:
            word = [SBOX[b] for b in word]
        words.append([a ^ b for a, b in zip(words[i - 8], word, strict=True)])
    return [[b for word in words[4 * r : 4 * r + 4] for b in word] for r in range(15)]


def _encrypt_block(rounds: list[list[int]], block: bytes) -> bytes:
    state = [a ^ b for a, b in zip(block, rounds[0], strict=True)]
    for number in range(1, 15):
        state = [SBOX[b] for b in state]
        state = [state[(i + 4 * (i % 4)) % 16] for i in range(16)]
        if number < 14:
            mixed = []
            for column in range(4):
                a = state[4 * column : 4 * column + 4]
                for i in range(4):
                    mixed.append(
                        _times(2, a[i])
                        ^ _times(3, a[(i + 1) % 4])
                        ^ a[(i + 2) % 4]
                        ^ a[(i + 3) % 4]
                    )
            state = mixed
        state = [a ^ b for a, b in zip(state, rounds[number], strict=True)]
    return bytes(state)


def keystream(key: bytes, size: int) -> bytes:
    """AES-256-CTR from counter 0."""
    rounds = _expand(key)
    blocks = [_encrypt_block(rounds, n.to_bytes(16, "big")) for n in range(-(-size // 16))]
    return b"".join(blocks)[:size]


# ---- Shamir over GF(2^128)

_FIELD = (1 << 128) | 0x87


def field_times(a: int, b: int) -> int:
    product = 0
    for bit in range(128):
        if b >> bit & 1:
            product ^= a << bit
    for bit in reversed(range(128, 256)):
        if product >> bit & 1:
            product ^= _FIELD << (bit - 128)
    return product


def field_inverse(a: int) -> int:
    """Fermat: a^(2^128 - 2)."""
    result, power = 1, a
    for bit in range(128):
        if bit:
            result = field_times(result, power)
        power = field_times(power, power)
    return result


def interpolate(points: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial through the points."""
    total = 0
    for i, y in points.items():
        weight = 1
        for j in points:
            if j != i:
                weight = field_times(weight, field_times(j, field_inverse(i ^ j)))
        total ^= field_times(y, weight)
    return total


def combine(shares: Mapping[int, bytes]) -> bytes:
    """A 32-byte secret from shares by index."""
    halves = []
    for at in (0, 16):
        points = {i: int.from_bytes(share[at : at + 16], "big") for i, share in shares.items()}
        halves.append(interpolate(points).to_bytes(16, "big"))
    return b"".join(halves)


# ---- Masks


def _cbor(value: str | bytes | int) -> bytes:
    """RFC 8949: a head of major type and length (or number), then the bytes."""
    if isinstance(value, int):
        major, number, body = 0, value, b""
    else:
        body = value.encode() if isinstance(value, str) else value
        major, number = (3 if isinstance(value, str) else 2), len(body)
    if number < 24:
        return bytes([major * 32 + number]) + body
    size = next(size for size in (1, 2, 4, 8) if number < 256**size)
    return bytes([major * 32 + 24 + size.bit_length() - 1]) + number.to_bytes(size, "big") + body


def _info(
    label: str, order: str, round_: int, slot: int, words: int, bits: int, *indices: int
) -> bytes:
    """RFC 8949: an array of fewer than 24 items."""
    numbers = (round_, slot, words, bits, *indices)
    items = [_cbor(label), _cbor(bytes.fromhex(order)), *map(_cbor, numbers)]
    return bytes([4 * 32 + len(items)]) + b"".join(items)


def mask_words(
    secret: bytes,
    label: str,
    view: bytes,
    place: tuple[str, int, int, int, int],
    *indices: int,
) -> list[int]:
    """A mask as integers; ``place`` is order, round, slot, words, bits."""
    order, round_, slot, words, bits = place
    key = hkdf(secret, view, _info(label, order, round_, slot, words, bits, *indices))
    size = bits // 8
    stream = keystream(key, words * size)
    return [int.from_bytes(stream[i * size : (i + 1) * size], "little") for i in range(words)]


PAIR, SELF = "cytofed/1/secagg/pair-mask", "cytofed/1/secagg/self-mask"


def masked_vector(
    values: Sequence[int],
    own: int,
    private: bytes,
    seed: bytes,
    peers: Mapping[int, bytes],
    view: bytes,
    place: tuple[str, int, int, int, int],
) -> list[int]:
    """What lab number ``own`` sends: its values, its own mask and one mask with each peer."""
    ring = 1 << place[4]
    out = [v + m for v, m in zip(values, mask_words(seed, SELF, view, place, own), strict=True)]
    for index, public in peers.items():
        shared = x25519(private, public)
        pair = mask_words(shared, PAIR, view, place, min(own, index), max(own, index))
        sign = 1 if own < index else -1
        out = [v + sign * m for v, m in zip(out, pair, strict=True)]
    return [v % ring for v in out]


def unmasked_sum(
    vectors: Mapping[int, Sequence[int]],
    seeds: Mapping[int, bytes],
    dropped: Mapping[int, bytes],
    publics: Mapping[int, bytes],
    view: bytes,
    place: tuple[str, int, int, int, int],
) -> list[int]:
    """The sum of the survivors' values: vectors, their seeds, the dropped labs' private keys."""
    ring = 1 << place[4]
    total = [sum(column) for column in zip(*vectors.values(), strict=True)]
    for index, seed in seeds.items():
        own = mask_words(seed, SELF, view, place, index)
        total = [t - m for t, m in zip(total, own, strict=True)]
    for gone, private in dropped.items():
        for index in vectors:
            shared = x25519(private, publics[index])
            pair = mask_words(shared, PAIR, view, place, min(gone, index), max(gone, index))
            # The survivor added it if its number is the lower one, and else subtracted it.
            sign = -1 if index < gone else 1
            total = [t + sign * m for t, m in zip(total, pair, strict=True)]
    return [t % ring for t in total]
