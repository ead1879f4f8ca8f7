"""The test split: which of a lab's images are held out.

The same in a deployment and in a simulation: it sees data, seed and fraction, and nothing of labs.
Without privacy:

1. ``units``: images of one patient and near-duplicates of each other belong together.
2. ``test_split``: whole units go to the test side.
3. ``hold_out``: both, folder by folder, so that a lab that has one of the folders finds the same.

With privacy ``hold_out_alone``: each patient by its own identifier. A quota over all patients, or a
near-duplicate of another's image, would let one patient move others between the sides, and their
gradients with them: a sum that one patient moves by far more than its clipping norm.

Shapes: N images, U units, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cytofed.errors import InputError
from cytofed.seeds import derive

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Texts = NDArray[np.str_]


def hold_out(
    class_N: Ints,
    unit_N: Ints,
    paths: Sequence[str],
    dhash_N: NDArray[np.uint64],
    source_N: Ints,
    *,
    fraction: float,
    fold: int = 0,
    seed: int,
) -> NDArray[np.bool_]:
    """Choose the test images of one or several folders: True where an image is held out.

    Each folder is split as if it were alone, as a lab that has this folder will split it. Folders
    that share a unit (a patient, a near-duplicate) are split as one: no unit is on both sides.
    The folds of a seed have no image in common; with a fraction of 1/k, k folds hold all images.
    Errors: as ``test_split``.
    """
    test_N = np.zeros(len(class_N), dtype=np.bool_)
    together_N = _connected(source_N, unit_N)
    for number in np.unique(together_N):
        rows = np.flatnonzero(together_N == number)
        keys = image_keys([paths[row] for row in rows.tolist()], dhash_N[rows])
        left = np.arange(len(rows))  # those that no earlier fold held out
        for earlier in range(fold + 1):
            share = fraction / (1 - earlier * fraction)
            held_N = np.ones(len(left), dtype=np.bool_)
            if share < 1 - 1e-9:  # else the last fold, which takes the rest
                class_L, unit_L, keys_L = class_N[rows[left]], unit_N[rows[left]], keys[left]
                held_N = test_split(class_L, unit_L, keys_L, fraction=share, seed=seed)
            if earlier < fold:
                left = left[~held_N]
        test_N[rows[left[held_N]]] = True
    return test_N


def hold_out_alone(
    owner_N: Sequence[str], *, fraction: float, fold: int = 0, seed: int
) -> NDArray[np.bool_]:
    """Choose the test images by whose they are alone: True where an image is held out.

    Guarantees: an owner's side is a function of its own name, seed, fraction and fold; taking an
    owner out, or adding one, moves no other. The folds of a seed have no owner in common; with a
    fraction of 1/k, k folds hold all. The share held out is ``fraction`` on average only, and may
    be nobody: a rule of "at least one" would let one owner decide about another.
    """
    first = fold * fraction
    # The last fold takes the rest, whatever rounding leaves of 1.
    end = 2.0 if (fold + 1) * fraction > 1 - 1e-9 else (fold + 1) * fraction
    key = derive(seed, "hold out alone").to_bytes(8, "big")
    sides: dict[str, bool] = {}
    for owner in owner_N:
        if owner not in sides:
            name = owner.encode("utf-8", errors="surrogatepass")
            drawn = hashlib.blake2b(name, key=key, digest_size=8).digest()
            sides[owner] = first <= int.from_bytes(drawn, "big") / 2**64 < end
    return np.array([sides[owner] for owner in owner_N], dtype=np.bool_)


def _connected(source_N: Ints, unit_N: Ints) -> NDArray[np.int64]:
    """Number of each image's group of folders: those that share units are one."""
    _, source = np.unique(source_N, return_inverse=True)
    _, unit = np.unique(unit_N, return_inverse=True)
    sources, nodes = source.max(initial=-1) + 1, unit.max(initial=-1) + 1
    edges = (np.ones(len(source), dtype=np.int8), (source, sources + unit))
    graph = coo_array(edges, shape=(sources + nodes, sources + nodes))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component[source], dtype=np.int64)


def image_keys(paths: Sequence[str], dhash_N: NDArray[np.uint64]) -> Texts:
    """A name per image that depends neither on its row nor on where its folder lies.

    The path below its folder; where two folders hold the same path, path and picture hash.
    """
    path_N = np.asarray(paths, dtype=np.str_)
    _, inverse_N, count = np.unique(path_N, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(count[inverse_N] > 1)
    if not len(repeated):
        return path_N
    named = path_N.tolist()
    for row in repeated:
        named[row] = f"{named[row]}#{int(dhash_N[row]):016x}"
    return np.asarray(named, dtype=np.str_)


def units(group_N: Ints, patients_N: Texts | None = None) -> NDArray[np.int64]:
    """Number the indivisible units: what shares a near-duplicate group or a patient is one.

    ``patients_N`` is empty where a patient is unknown: such an image is held by its group alone.
    Names are compared as they are: names of two folders must differ already (client.cells does so).
    """
    _, group = np.unique(group_N, return_inverse=True)
    if patients_N is None:
        return group.astype(np.int64)
    known_N = np.asarray(patients_N) != ""
    _, patient = np.unique(np.asarray(patients_N)[known_N], return_inverse=True)
    groups, nodes = group.max(initial=-1) + 1, patient.max(initial=-1) + 1
    # Groups and patients are nodes, every image with a patient is an edge between its two.
    edges = (np.ones(len(patient), dtype=np.int8), (group[known_N], groups + patient))
    graph = coo_array(edges, shape=(groups + nodes, groups + nodes))
    _, component = connected_components(graph, directed=False)
    _, unit_N = np.unique(component[group], return_inverse=True)
    return unit_N.astype(np.int64)


def test_split(
    class_N: Ints, unit_N: Ints, key_N: Texts, *, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose the test images: True where an image is held out.

    Guarantees: a unit is on one side; the same images in another order get the same sides; where
    the units of a class are single images its test share is ``fraction``, rounded, with one image
    at least on either side when there are two. Units of several images are visited in random
    order and change sides where that brings the classes nearer to their share.

    ``class_N`` may hold -1 (coarse labels): they are split as one more class. ``fraction`` 0 holds
    nothing out.
    Errors: InputError for a fraction outside [0, 1), or when all images are one unit.
    """
    if not 0 <= fraction < 1:
        raise InputError(
            f"Expected 0 <= evaluation.fraction={fraction} < 1.",
            hint="set evaluation.fraction to 0.2 to test on a fifth of the images",
        )
    if fraction == 0:
        return np.zeros(len(class_N), dtype=np.bool_)
    _, unit = np.unique(unit_N, return_inverse=True)
    _, label = np.unique(class_N, return_inverse=True)
    count_U = np.bincount(unit)
    if len(count_U) < 2:
        raise InputError(
            f"All {len(unit)} images are of one patient or near-duplicates: no test split exists.",
            hint="add images of other patients, or set evaluation.fraction to 0",
        )
    order = hashed_order(unit, key_N, seed, "test split")
    labels = label.max() + 1
    total_C = np.bincount(label, minlength=labels)
    test_U = np.zeros(len(count_U), dtype=np.bool_)

    # Larger units first among themselves, against their own share: were they to fill the quota of
    # all images, the test side would consist of them; were they last, none would fit.
    large_U = count_U > 1
    held_C = np.zeros(labels)
    large = order[large_U[order]]
    if len(large):
        counts_LC = _counts(unit, label, large, labels)
        want_C = fraction * counts_LC.sum(axis=0)
        weight_C = 1 / np.maximum(want_C, 1)
        for _ in range(2):  # the second time units may go back, too
            for row, count_C in zip(large, counts_LC, strict=True):
                move_C = -count_C if test_U[row] else count_C
                if (weight_C * move_C) @ (move_C + 2 * (held_C - want_C)) < 0:
                    test_U[row] = not test_U[row]
                    held_C += move_C

    # Single images then settle every class exactly.
    floor_C = np.minimum(total_C - 1, 1)
    want_C = np.clip(np.floor(fraction * total_C + 0.5), floor_C, np.maximum(total_C - 1, 0))
    label_U = np.zeros(len(count_U), dtype=np.int64)
    label_U[unit] = label
    single = order[~large_U[order]]
    for c in range(labels):
        missing = max(0, int(want_C[c] - held_C[c]))
        test_U[single[label_U[single] == c][:missing]] = True

    if not test_U.any():  # every unit is more than twice the share
        test_U[order[np.argmin(count_U[order])]] = True
    if test_U.all():
        test_U[order[np.argmin(count_U[order])]] = False
    return test_U[unit]


def hashed_order(unit_N: Ints, key_N: Texts, seed: int, purpose: str) -> NDArray[np.int64]:
    """Units in random order, the same for the same images in whatever rows they are."""
    by_key = np.argsort(key_N, kind="stable")
    _, first = np.unique(unit_N[by_key], return_index=True)
    prefix = f"{derive(seed, purpose)}/"
    drawn = [
        hashlib.blake2b(f"{prefix}{key}".encode(), digest_size=8).digest()
        for key in key_N[by_key[first]].tolist()
    ]
    return np.argsort(np.asarray(drawn, dtype="S8").view(">u8"), kind="stable")


def _counts(unit_N: Ints, label_N: Ints, rows: Ints, labels: int) -> NDArray[np.float64]:
    """Images of each class in the given units: (len(rows), labels)."""
    place_U = np.full(unit_N.max() + 1, -1)
    place_U[rows] = np.arange(len(rows))
    inside = place_U[unit_N] >= 0
    flat = place_U[unit_N[inside]] * labels + label_N[inside]
    counts = np.bincount(flat, minlength=len(rows) * labels)
    return counts.reshape(len(rows), labels).astype(np.float64)
