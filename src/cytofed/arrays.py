"""Weights as one flat vector with a manifest, and their hash.

P parameters. All that is trained and exchanged is one ``float32`` vector ``weights_P``; the
manifest says which tensor lies where. Coordinator and labs derive it from the same plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from cytofed.canonical import Value, digest
from cytofed.errors import InputError

Float32: TypeAlias = npt.NDArray[np.float32]
Parts: TypeAlias = Mapping[str, Float32]
"""Named flat float32 vectors of equal length P, ``weights`` first: what travels in a message."""

Role = Literal["body", "norm", "head"]


@dataclass(frozen=True)
class Tensor:
    """One trained tensor: its name in the net, its shape and what it is for."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The trained tensors in the order in which they lie in ``weights_P``."""

    tensors: tuple[Tensor, ...]

    @cached_property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    def split(self, weights_P: Float32) -> dict[str, Float32]:
        """Views of ``weights_P`` by tensor name. Errors: InputError when P does not fit."""
        if weights_P.shape != (self.size,):
            raise InputError(f"Expected weights of shape ({self.size},), found {weights_P.shape}")
        views, start = {}, 0
        for tensor in self.tensors:
            views[tensor.name] = weights_P[start : start + tensor.size].reshape(tensor.shape)
            start += tensor.size
        return views

    def mask(self, role: Role) -> npt.NDArray[np.bool_]:
        """True for the parameters of tensors with this role, shape (P,)."""
        parts = [np.full(tensor.size, tensor.role == role) for tensor in self.tensors]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def to_json(self) -> str:
        """Canonical text; equal manifests give equal text."""
        rows = [[tensor.name, list(tensor.shape), tensor.role] for tensor in self.tensors]
        return json.dumps(rows, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The manifest of ``to_json``."""
        return Manifest(
            tuple(Tensor(name, tuple(shape), role) for name, shape, role in json.loads(text))
        )


def weights_sha256(manifest: Manifest, weights_P: Float32) -> str:
    """Hex SHA-256 of the manifest and the weights' little-endian bytes."""
    found = hashlib.sha256(manifest.to_json().encode())
    found.update(np.ascontiguousarray(weights_P, dtype="<f4").data)
    return found.hexdigest()


def part_rows(parts: Parts) -> list[Value]:
    """What tells named vectors apart: name, shape, type and SHA-256 of each, in their order."""
    rows: list[Value] = []
    for name, values in parts.items():
        data = np.ascontiguousarray(values, dtype="<f4").data
        rows.append([name, list(values.shape), "<f4", hashlib.sha256(data).digest()])
    return rows


def parts_sha256(parts: Parts) -> str:
    """Hex SHA-256 of named vectors, over ``part_rows`` in canonical form."""
    return rows_sha256(part_rows(parts))


def rows_sha256(rows: Sequence[Value]) -> str:
    """The same from the rows, where they are known."""
    return digest("cytofed/1/parts", rows).hex()


SHARE = 1 << 19
THREADS = min(4, os.cpu_count() or 1)
_POOL = ThreadPoolExecutor(THREADS, "arrays")
_T = TypeVar("_T")


def in_shares(work: Callable[[slice], _T], size: int, *, share: int = SHARE) -> list[_T]:
    """``work`` on every ``share`` of ``size`` values, side by side on a few threads; in order.

    However many labs there are, one coordinator checks and adds up; numpy works without the
    interpreter's lock. ``work`` must not call this again.
    """
    shares = [slice(start, min(start + share, size)) for start in range(0, size, share)]
    return list(map(work, shares) if len(shares) < 2 else _POOL.map(work, shares))


MAX_DIMENSIONS = 8
MAX_ARRAY_BYTES = 1 << 40


def is_shape(shape: Sequence[object], dtype: np.dtype[Any]) -> bool:
    """Whether numpy can make an array of this shape, which somebody else wrote.

    An array without an element may be too large as well: no product of its other dimensions may
    overflow.
    """
    sizes = [n for n in shape if type(n) is int and n >= 0]
    if len(sizes) != len(shape) or len(shape) > MAX_DIMENSIONS:
        return False
    return math.prod(max(n, 1) for n in sizes) * dtype.itemsize <= MAX_ARRAY_BYTES


def is_finite(values_P: Float32) -> bool:
    """Whether no value is NaN or infinite, without a boolean array of the vector's size."""

    def finite(share: slice) -> bool:
        part = values_P[share]
        return math.isfinite(part.min()) and math.isfinite(part.max())

    return all(in_shares(finite, len(values_P)))
