"""Who may be told apart from whom: indivisible units, the test split, pseudo-patients.

The order is fixed and keeps every promise at once:

1. ``units``: images of one patient and near-duplicates of each other belong together.
2. ``test_split``: whole units go to the test side. It sees data, seed and fraction, and neither
   partition nor labs, so results over other partitions are scored on the same test images.
3. ``partitions.assign``: whole units go to labs.
4. ``pseudo_patients``: on data without patients, made last, inside one lab and one side. So none
   is at two labs, none is both trained on and tested on, and their size cannot move the split.

The first two are a lab's own business too: they are in ``cytofed.client.split``.

Shapes: N images, U units, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cytofed.client.split import (
    Bools,
    Floats,
    Ints,
    Texts,
    hashed_order,
    image_keys,
    test_split,
    units,
)
from cytofed.errors import InputError
from cytofed.seeds import derive

__all__ = [
    "Bools",
    "Floats",
    "Ints",
    "Texts",
    "generator",
    "image_keys",
    "pseudo_patients",
    "test_split",
    "units",
]


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A random stream of its own for each seed and purpose: ``generator(1, "stain", lab)``."""
    return np.random.default_rng(derive(seed, *purpose))


def pseudo_patients(
    place_N: Ints, unit_N: Ints, key_N: Texts, *, cells: int, seed: int
) -> NDArray[np.str_]:
    """Group images into made-up patients of about ``cells`` cells: ``pseudo-0001``, ...

    ``place_N`` numbers what a patient must not straddle: lab and side of the test split, e.g.
    ``2 * lab_N + test_N``. Within a place, units are dealt in an order given by seed and keys, so a
    pseudo-patient's classes are a random draw of its place's. Real patients differ more from each
    other than that: figures over pseudo-patients are on the friendly side, and are labelled.

    Guarantees: units stay whole within a place; sizes within a place differ by at most one cell
    where units are single images; a place with fewer cells than ``cells`` is one patient.
    Errors: InputError when ``cells`` < 1.
    """
    if cells < 1:
        raise InputError(
            f"Expected simulation.pseudo_patient_cells={cells} >= 1.",
            hint="20 cells for each pseudo-patient are usual",
        )
    _, place = np.unique(place_N, return_inverse=True)
    # A near-duplicate in two folders may be at two labs; its patient may not.
    _, unit = np.unique(np.stack([place, unit_N]), axis=1, return_inverse=True)
    count_U = np.bincount(unit)
    place_U = np.zeros(len(count_U), dtype=np.int64)
    place_U[unit] = place
    order = hashed_order(unit, key_N, seed, "pseudo-patients")
    order = order[np.argsort(place_U[order], kind="stable")]
    before_U = np.cumsum(count_U[order]) - count_U[order]
    total_P = np.bincount(place)
    start_P = np.cumsum(total_P) - total_P
    patients_P = np.maximum(1, np.round(total_P / cells)).astype(np.int64)
    at = place_U[order]
    within_U = (before_U - start_P[at]) * patients_P[at] // total_P[at]
    number_U = np.zeros(len(count_U), dtype=np.int64)
    # Numbered again from 1: a unit larger than a patient leaves a gap.
    _, number_U[order] = np.unique((np.cumsum(patients_P) - patients_P)[at] + within_U,
                                   return_inverse=True)  # fmt: skip
    names = np.asarray([f"pseudo-{n + 1:04d}" for n in range(int(number_U.max(initial=-1)) + 1)])
    return names[number_U[unit]] if len(unit) else np.zeros(0, dtype="<U11")
