"""Randomness and Gaussian noise from a keyed stream cipher.

AES-256 in counter mode gives the bits for who is sampled, which cells, and the noise. In a
deployment the key is 32 bytes of the operating system's generator: cryptographic, secret, and no
seed from a plan or a coordinator reaches it. In a simulation the key comes from a seed; all else
is the same code, so what simulations test is what labs run. (torch's CPU generator takes 32 bits
of seed and shares them with everything else: it is not used.)
"""

from __future__ import annotations

import hashlib
import os
from typing import ClassVar, Final, Literal, NoReturn, final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

_PAIRS_PER_CHUNK = 1 << 13
"""pairs of normals drawn at once; all arrays of a chunk stay in the cache"""
_ZEROS: Final = bytes(12 * _PAIRS_PER_CHUNK)


class _Stream:
    """Uniform and normal numbers of one AES-CTR key stream. Not thread-safe, never copied."""

    simulated: ClassVar[bool]

    def __init__(self) -> None:
        self._cipher = self._start()

    def _start(self) -> CipherContext:
        return Cipher(algorithms.AES(self._key()), modes.CTR(bytes(16))).encryptor()

    def _key(self) -> bytes:
        raise NotImplementedError

    def _fill(self, buffer: bytearray, count: int) -> None:
        """``count`` bytes of key stream into ``buffer``, which is 15 bytes longer or more."""
        self._cipher.update_into(memoryview(_ZEROS)[:count], buffer)

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """``count`` numbers of [0, 1), 53 bits each."""
        uniform = np.empty(count)
        buffer = bytearray(len(_ZEROS) + 15)
        step = len(_ZEROS) // 8
        for start in range(0, count, step):
            part = min(step, count - start)
            self._fill(buffer, 8 * part)
            words = np.frombuffer(buffer, np.uint64, part) >> np.uint64(11)
            uniform[start : start + part] = words * 2.0**-53
        return uniform

    def normals(self, count: int) -> npt.NDArray[np.float32]:
        """``count`` standard normal numbers, by Box and Muller (1958).

        Guarantees: all finite; the radius has 53 bits, so tails reach 8.6 sigma (with the 32
        bits of a float32 uniform they would end at 6.7).
        """
        normal = np.empty(count + count % 2, np.float32)
        buffer = bytearray(12 * min(len(normal) // 2, _PAIRS_PER_CHUNK) + 15)
        for start in range(0, len(normal), 2 * _PAIRS_PER_CHUNK):
            pairs = min(_PAIRS_PER_CHUNK, (len(normal) - start) // 2)
            self._fill(buffer, 12 * pairs)
            uniform = (np.frombuffer(buffer, np.uint64, pairs) >> np.uint64(11)).astype(np.float64)
            uniform += 0.5  # never 0
            uniform *= 2.0**-53
            np.log(uniform, out=uniform)
            uniform *= -2
            radius = np.sqrt(uniform.astype(np.float32))
            angle = np.frombuffer(buffer, np.uint32, pairs, offset=8 * pairs).astype(np.float32)
            angle *= np.float32(2 * np.pi * 2.0**-32)
            middle = start + pairs
            np.multiply(radius, np.cos(angle), out=normal[start:middle])
            np.multiply(radius, np.sin(angle), out=normal[middle : middle + pairs])
        return normal[:count]

    def choose(self, among: int, at_most: int) -> npt.NDArray[np.int64]:
        """``min(among, at_most)`` different numbers of range(among), sorted, all sets alike."""
        if among <= at_most:
            return np.arange(among)
        return np.sort(np.argsort(self.uniforms(among), kind="stable")[:at_most])

    def __reduce__(self) -> NoReturn:
        # A copy would repeat the noise: two sums with the same noise subtract to data.
        raise TypeError(f"{type(self).__name__} is not copied or pickled; make a new one")


@final
class SystemRandomness(_Stream):
    """Keyed by the operating system. The only kind that a deployment's functions accept.

    Each instance has its own key, and a forked process makes a new one: no two share noise.
    """

    simulated: ClassVar[Literal[False]] = False

    def __init__(self) -> None:
        self._pid = os.getpid()
        super().__init__()

    def _key(self) -> bytes:
        return os.urandom(32)

    def _fill(self, buffer: bytearray, count: int) -> None:
        if os.getpid() != self._pid:
            self._pid = os.getpid()
            self._cipher = self._start()
        super()._fill(buffer, count)

    def __repr__(self) -> str:
        return "SystemRandomness()"


@final
class SimulatedRandomness(_Stream):
    """Keyed by a seed and a context such as (lab, round): for simulations, and no protection.

    Whoever knows the seed can subtract the noise. Reports say that ``simulated`` was true.
    """

    simulated: ClassVar[Literal[True]] = True

    def __init__(self, seed: int, *context: str | int) -> None:
        self.seed = seed
        self.context = context
        super().__init__()

    def _key(self) -> bytes:
        label = repr(("cytofed simulated randomness 1", self.seed, *self.context))
        return hashlib.sha256(label.encode()).digest()

    def __repr__(self) -> str:
        return f"SimulatedRandomness({', '.join(map(repr, (self.seed, *self.context)))})"


@final
class RepeatedRandomness(_Stream):
    """The same numbers for the same question, however many were asked for before: for a lab of
    made-up patients with and without one of them, and no protection.

    In a step (up to its noise) the first units' draws, the choice among so many images and the
    noise are the same whoever else is there.
    """

    simulated: ClassVar[Literal[False]] = False
    """its lab is at work, and tells what such a lab tells"""

    def __init__(self, *context: str | int) -> None:
        self.context = context
        self._place: tuple[str | int, ...] = ("start",)
        self._step = 0
        super().__init__()

    def _key(self) -> bytes:
        label = repr(("cytofed repeated randomness 1", *self.context, *self._place))
        return hashlib.sha256(label.encode()).digest()

    def _again(self, *place: str | int) -> None:
        self._place = (self._step, *place)
        self._cipher = self._start()

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        self._again("uniforms")
        return super().uniforms(count)

    def normals(self, count: int) -> npt.NDArray[np.float32]:
        self._again("normals")
        self._step += 1
        return super().normals(count)

    def choose(self, among: int, at_most: int) -> npt.NDArray[np.int64]:
        self._again("choose", among)
        if among <= at_most:
            return np.arange(among)
        return np.sort(np.argsort(super().uniforms(among), kind="stable")[:at_most])

    def __repr__(self) -> str:
        return f"RepeatedRandomness({', '.join(map(repr, self.context))})"


Randomness = SystemRandomness | SimulatedRandomness | RepeatedRandomness
