"""Whose privacy a guarantee is about, in the one word that people and programs are shown.

The unit of a plan is a patient or an image. Of data that names no patients a simulation makes some
up: what holds for them holds for no real person, so no statement calls them patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def whose(unit: str, *, pseudo: bool) -> str:
    """``patient``, ``pseudo-patient``, ``image`` or ``none``."""
    return "pseudo-patient" if pseudo and unit == "patient" else unit


def whose_of(summary: Mapping[str, Any]) -> str:
    """The same of a run, from its ``summary.json``."""
    unit = str((summary.get("privacy") or {}).get("unit", "none"))
    return whose(unit, pseudo=made_up(summary))


def made_up(summary: Mapping[str, Any]) -> bool:
    """Whether a run's patients are pseudo-patients."""
    return bool((summary.get("partition") or {}).get("pseudo_patients"))
