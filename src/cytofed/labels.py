"""Label schemes and the maps between them, both data files.

A scheme is the list of classes a model predicts. A map says what the labels of one source mean in
a scheme, by four relations: exact, coarse set, excluded, absent. The format is explained on top of
``maps/marrow.yaml``.

Shapes: C classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cytofed.errors import InputError
from cytofed.strict import read_yaml

_HERE = Path(__file__).parent
EXCLUDED = "excluded"


@dataclass(frozen=True)
class Scheme:
    """The classes of a model, in the order of its outputs."""

    name: str
    codes: tuple[str, ...]
    names: Mapping[str, str]
    tolerated: frozenset[tuple[str, str]]  # each pair once, in alphabetical order

    def index(self, code: str) -> int:
        """Position of ``code``; InputError when the scheme has no such code."""
        try:
            return self.codes.index(code)
        except ValueError:
            raise InputError(
                f'"{code}" is not a code of label scheme {self.name}',
                hint=_nearest(code, self.codes) or f"its codes: {' '.join(self.codes)}",
            ) from None

    def tolerates(self, truth: str, predicted: str) -> bool:
        """Whether the tolerant metrics count ``predicted`` as right; symmetric, equal is right."""
        return truth == predicted or _pair(truth, predicted) in self.tolerated

    @property
    def tolerance_CC(self) -> np.ndarray:
        """Bool matrix of :meth:`tolerates`: symmetric, diagonal True."""
        count = len(self.codes)
        matrix_CC = np.eye(count, dtype=bool)
        for one, other in self.tolerated:
            i, j = self.codes.index(one), self.codes.index(other)
            matrix_CC[i, j] = matrix_CC[j, i] = True
        return matrix_CC

    def mask_C(self, codes: Iterable[str]) -> np.ndarray:
        """Bool vector, True at ``codes``."""
        mask_C = np.zeros(len(self.codes), dtype=bool)
        mask_C[[self.index(code) for code in codes]] = True
        return mask_C


@dataclass(frozen=True)
class LabelMap:
    """What the labels of one source mean in a scheme.

    ``rules``: label -> codes; one code is exact, several are a coarse set, none is excluded.
    ``absent``: codes that this source never labels. ``field_um``: width of a frame, None = unknown.
    """

    name: str
    scheme: str
    rules: Mapping[str, tuple[str, ...]]
    absent: frozenset[str] = frozenset()
    field_um: float | None = None
    path: Path | None = field(default=None, compare=False)

    @cached_property
    def folded(self) -> Mapping[str, str]:
        """Label in lower case -> label as the map spells it."""
        return {label.casefold(): label for label in self.rules}

    def find(self, label: str) -> str | None:
        """The map's spelling of ``label``, upper and lower case being the same; None = unknown."""
        return self.folded.get(label.strip().casefold())


def identity_map(scheme: Scheme) -> LabelMap:
    """Labels are the scheme's own codes; nothing is known about the field."""
    return LabelMap(scheme.name, scheme.name, {code: (code,) for code in scheme.codes})


def built_in_schemes() -> tuple[str, ...]:
    """Names that :func:`load_scheme` knows without a path."""
    return tuple(sorted(path.stem for path in (_HERE / "schemes").glob("*.yaml")))


def built_in_maps(scheme: str) -> tuple[LabelMap, ...]:
    """The maps of known layouts into ``scheme``, in alphabetical order."""
    return tuple(label_map for label_map in _all_built_in_maps() if label_map.scheme == scheme)


@cache  # they are part of the package and do not change
def _all_built_in_maps() -> tuple[LabelMap, ...]:
    return tuple(load_map(path.stem) for path in sorted((_HERE / "maps").glob("*.yaml")))


def load_scheme(name: str) -> Scheme:
    """A built-in scheme by name, or one from a YAML file by path.

    Raises InputError for an unknown name, an unknown key, or a tolerated pair of unknown codes.
    """
    return _scheme(_find(name, "schemes", "label scheme"))


def _scheme(path: Path) -> Scheme:
    tree = _read(path, allowed=("name", "codes", "tolerated"))
    names = _mapping(tree, "codes", path)
    if not names:
        raise InputError(f"{path.name}: codes is empty", hint="list code: name, one a line")
    pairs = tree.get("tolerated") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise InputError(f"{path.name}: tolerated is not a list of pairs", hint="- [NGB, NGS]")
    for code in [code for pair in pairs for code in pair]:
        _known(code, tuple(names), f"{path.name}: tolerated")
    return Scheme(
        name=str(tree.get("name", path.stem)),
        codes=tuple(names),
        names={code: str(text) for code, text in names.items()},
        tolerated=frozenset(_pair(one, other) for one, other in pairs),
    )


def load_map(name_or_path: str) -> LabelMap:
    """A built-in map by name, or one from a YAML file by path; a scheme's name: its own codes.

    Raises InputError for an unknown name, key or code, a label given twice, or a bad field.
    """
    if name_or_path in built_in_schemes() and not (_HERE / f"maps/{name_or_path}.yaml").is_file():
        return identity_map(load_scheme(name_or_path))
    path = _find(name_or_path, "maps", "label map")
    tree = _read(path, allowed=("name", "scheme", "extends", "field_um", "labels", "absent"))
    base = load_map(str(tree["extends"])) if tree.get("extends") else None
    scheme = load_scheme(_scheme_of(tree, base, path))
    if base and base.scheme != scheme.name:
        raise InputError(
            f"{path.name}: extends {base.name}, a map into {base.scheme}, not {scheme.name}"
        )

    rules = dict(base.rules) if base else {}
    spelled = {label.casefold(): label for label in rules}
    own: set[str] = set()
    for label, value in _mapping(tree, "labels", path).items():
        if label.casefold() in own:
            raise InputError(f'{path.name}: label "{label}" is given twice')
        own.add(label.casefold())
        rules.pop(spelled.get(label.casefold(), label), None)
        rules[label] = _codes(value, scheme, f'{path.name}: label "{label}"')

    absent = tree.get("absent", sorted(base.absent) if base else []) or []
    if not isinstance(absent, list):
        raise InputError(f"{path.name}: absent is not a list", hint="absent: [BLA, NIF]")
    for code in absent:
        _known(code, scheme.codes, f"{path.name}: absent")
    used = {code for codes in rules.values() for code in codes}
    both = sorted(used & set(absent))
    if both:
        raise InputError(
            f"{path.name}: {' '.join(both)} is absent and also the meaning of a label",
            hint="take it out of absent:, or out of labels:",
        )
    return LabelMap(
        name=str(tree.get("name", path.stem)),
        scheme=scheme.name,
        rules=rules,
        absent=frozenset(absent),
        field_um=_field_um(tree.get("field_um", base.field_um if base else None), path),
        path=path,
    )


def _codes(value: object, scheme: Scheme, where: str) -> tuple[str, ...]:
    if value == EXCLUDED:
        return ()
    codes = value if isinstance(value, list) else [value]
    if not codes:
        raise InputError(f"{where}: an empty list", hint=f'write "{EXCLUDED}" to leave images out')
    for code in codes:
        _known(code, scheme.codes, where)
    return tuple(dict.fromkeys(str(code) for code in codes))


def _scheme_of(tree: Mapping[str, Any], base: LabelMap | None, path: Path) -> str:
    name = tree.get("scheme") or (base.scheme if base else None)
    if name is None:
        raise InputError(
            f"{path.name}: no scheme", hint=f"add: scheme: {' | '.join(built_in_schemes())}"
        )
    beside = path.parent / str(name)
    return str(beside) if beside.is_file() else str(name)


def _field_um(value: object, path: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 10_000:
        raise InputError(
            f"{path.name}: field_um {value!r} is not a width of 1 to 10000 micrometres",
            hint="pixels of the frame's width times micrometres per pixel; or leave it out",
        )
    return float(value)


def _known(code: object, codes: tuple[str, ...], where: str) -> None:
    if code not in codes:
        near = _nearest(str(code), codes)
        raise InputError(
            f"{where}: unknown code {code!r}", hint=near or f"one of {' '.join(codes)}"
        )


def _find(name: str, kind: str, what: str) -> Path:
    built_in = _HERE / kind / f"{name}.yaml"
    if built_in.is_file() and "/" not in name:
        return built_in
    path = Path(name)
    if path.is_file():
        return path
    names = tuple(sorted(item.stem for item in (_HERE / kind).glob("*.yaml")))
    raise InputError(
        f'no {what} "{name}": neither built in nor a file',
        hint=_nearest(name, names) or f"built in: {', '.join(names)}",
    )


def _read(path: Path, *, allowed: tuple[str, ...]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    tree = read_yaml(text, path.name)
    if not isinstance(tree, dict):
        raise InputError(f"{path.name}: not a YAML mapping", hint=f"keys: {', '.join(allowed)}")
    for key in tree:
        if key not in allowed:
            near = _nearest(str(key), allowed)
            raise InputError(f'{path.name}: unknown key "{key}"', hint=near or ", ".join(allowed))
    return tree


def _mapping(tree: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = tree.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path.name}: {key} is not a mapping", hint=f"{key}: then LABEL: CODE")
    for label in value:
        if not isinstance(label, str):  # YAML reads no, on, 1 as something else than text
            raise InputError(
                f"{path.name}: {key}: {label!r} is not text", hint='put it in quotes: "no": ART'
            )
    return value


def _nearest(word: str, words: Iterable[str]) -> str:
    folded = {item.casefold(): item for item in words}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.5)
    return f'did you mean "{folded[close[0]]}"?' if close else ""


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)
