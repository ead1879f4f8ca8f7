"""Weights as one vector: the manifest finds every tensor again, the hash sees every bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.arrays import Manifest, Role, Tensor, weights_sha256
from cytofed.errors import InputError

roles: st.SearchStrategy[Role] = st.sampled_from(["body", "norm", "head"])
tensors = st.builds(
    Tensor, st.text(max_size=8), st.lists(st.integers(0, 4), max_size=3).map(tuple), roles
)
manifests = st.lists(tensors, max_size=6, unique_by=lambda t: t.name).map(
    lambda rows: Manifest(tuple(rows))
)

MANIFEST = Manifest(
    (
        Tensor("a", (2, 3), "body"),
        Tensor("b", (), "norm"),
        Tensor("c", (2,), "norm"),
        Tensor("d", (4,), "head"),
    )
)


def counted(manifest: Manifest) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.arange(manifest.size, dtype=np.float32)


def test_split_covers_every_parameter_once_in_order() -> None:
    views = MANIFEST.split(counted(MANIFEST))
    assert [v.shape for v in views.values()] == [(2, 3), (), (2,), (4,)]
    assert np.concatenate([v.ravel() for v in views.values()]).tolist() == list(range(13))


def test_split_gives_views_not_copies() -> None:
    weights_P = counted(MANIFEST)
    MANIFEST.split(weights_P)["d"][:] = -1
    assert weights_P[-4:].tolist() == [-1] * 4


@pytest.mark.parametrize("shape", [(12,), (14,), (13, 1), ()])
def test_weights_of_another_size_are_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(13,\)"):
        MANIFEST.split(np.zeros(shape, np.float32))


def test_masks_of_the_roles_part_the_parameters() -> None:
    masks = [MANIFEST.mask(role) for role in ("body", "norm", "head")]
    assert np.sum(masks, axis=0).tolist() == [1] * 13
    assert np.flatnonzero(MANIFEST.mask("norm")).tolist() == [6, 7, 8]


@settings(max_examples=50, deadline=None)
@given(manifests)
def test_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.size == sum(v.size for v in manifest.split(counted(manifest)).values())


def test_hash_sees_one_bit_of_one_weight() -> None:
    weights_P = counted(MANIFEST)
    other = weights_P.copy()
    other[5] = np.nextafter(other[5], np.float32(9))
    assert weights_sha256(MANIFEST, weights_P) != weights_sha256(MANIFEST, other)


def test_hash_sees_names_shapes_and_roles() -> None:
    weights_P = np.zeros(4, np.float32)
    manifests = [
        Manifest((Tensor(*row),))
        for row in (
            ("a", (4,), "body"),
            ("b", (4,), "body"),
            ("a", (2, 2), "body"),
            ("a", (4,), "norm"),
        )
    ]
    assert len({weights_sha256(m, weights_P) for m in manifests}) == 4


def test_hash_does_not_depend_on_memory_layout_or_byte_order() -> None:
    weights_P = counted(MANIFEST)
    strided = np.repeat(weights_P, 2)[::2]
    big_endian = weights_P.astype(">f4")
    expected = weights_sha256(MANIFEST, weights_P)
    assert weights_sha256(MANIFEST, strided) == expected
    assert weights_sha256(MANIFEST, big_endian) == expected
