"""Who takes part in a step: secret Poisson sampling of patients (Charles et al. 2024).

"Fine-tuning large language models with user-level differential privacy", arXiv:2407.07737: each
patient is drawn with the declared rate, independently of all others; of each drawn patient at
most ``cells_per_patient`` random cells are taken. Amplification by sampling holds for this draw
and no other (shuffled or cyclic batches cost four times as much), and only while it is secret.

Shapes: N images, U units (patients, or images where the plan says so), K cells of one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cytofed.errors import InputError
from cytofed.privacy.accounting import Unit
from cytofed.privacy.noise import Randomness

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """The lab's images by unit of privacy. Made once; ``rows[u]`` are the images of unit u."""

    unit: Unit
    rows: tuple[Rows, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Draw:
    """The units of one step and the images taken of each. Private, as all that is sampled.

    A unit occurs once, with all its images: split over two gradients it would count twice.
    """

    units: tuple[int, ...] = field(repr=False)
    rows: tuple[Rows, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if len(set(self.units)) != len(self.units) or len(self.units) != len(self.rows):
            raise InputError("a draw has each unit once, with one set of images")

    def __len__(self) -> int:
        return len(self.units)


def units_of(unit: Unit, images: int, patients_N: Sequence[str] | npt.NDArray[Any] | None) -> Units:
    """The units of a lab with ``images`` images.

    Errors: InputError where ``unit`` is "patient" and no patients are known, or the unit "none".
    """
    if unit == "image":
        return Units("image", tuple(np.arange(images)[:, None]))
    if unit != "patient":
        raise InputError(f"nothing is sampled for privacy with privacy.unit={unit!r}")
    if patients_N is None:
        raise InputError(
            "privacy.unit is 'patient', but these images have no patient identifiers",
            hint="name them with --patients, for example --patients folder:1",
        )
    if len(patients_N) != images:
        raise InputError(f"{images} images, but {len(patients_N)} patient identifiers")
    _, patient_N = np.unique(np.asarray(patients_N), return_inverse=True)
    order_N = np.argsort(patient_N, kind="stable")
    starts = np.flatnonzero(np.diff(patient_N[order_N])) + 1
    return Units("patient", tuple(np.split(order_N, starts)) if images else ())


def draw(
    units: Units, *, sampling_rate: float, cells_per_unit: int, randomness: Randomness
) -> Draw:
    """One step's units: each with probability ``sampling_rate``, independently.

    Guarantees: whether a unit is drawn and which of its images are, depends on no other unit. A
    draw may be empty; the step then adds noise and counts as any other.
    """
    if not 0 < sampling_rate <= 1:
        raise InputError(f"Expected 0 < sampling_rate={sampling_rate:g} <= 1")
    if cells_per_unit < 1:
        raise InputError(f"Expected cells_per_patient={cells_per_unit} >= 1")
    drawn = np.flatnonzero(randomness.uniforms(len(units)) < sampling_rate)
    taken = tuple(
        units.rows[u][randomness.choose(len(units.rows[u]), cells_per_unit)] for u in drawn
    )
    return Draw(tuple(int(u) for u in drawn), taken)
