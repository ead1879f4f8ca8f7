"""YAML as frozen dataclasses: each value is checked by its type, an unknown key names the nearest.

What plan.yaml and client.yaml have in common. A misspelt key is an error, never a default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cytofed.errors import InputError
from cytofed.strict import read_yaml

T = TypeVar("T")


def read_tree(
    text: str, source: str, *, hint: str = "", never_empty: Container[str] = ()
) -> dict[str, Any]:
    """The keys of a YAML text, read as ``read_yaml`` does; none of an empty one.

    Errors: InputError.
    """
    tree = read_yaml(text, source, never_empty=never_empty)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: expected keys and values, found {type(tree).__name__}", hint=hint
        )
    return tree


def build(
    kind: type[T],
    tree: Mapping[str, Any],
    source: str,
    *,
    folder: Path = Path(),
    special: Mapping[type, Callable[[Mapping[str, Any], str], Any]] | None = None,
) -> T:
    """An instance of the dataclass ``kind``; ``source`` is named in errors.

    ``folder``: relative paths are relative to it. ``special``: sections that are built otherwise.
    Errors: InputError for an unknown key or a value of a wrong type.
    """
    return cast(T, _Reader(source, folder, special or {}).section(kind, tree, ""))


def unknown_key(where: str, key: str, known: Sequence[str], source: str) -> InputError:
    """The error for a key that is not known, with the nearest one as a hint."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return InputError(f"{source}: unknown key {where!r}", hint=hint)


def convert(hint: Any, value: Any, where: str, source: str) -> Any:
    """One value as the type ``hint``. Errors: InputError."""
    return _Reader(source, Path(), {}).value(hint, value, where)


_MOST_CHARS = 1000


def check_words(tree: Any, source: str, path: str = "") -> None:
    """Whether every text of a tree can be shown: printable, and no longer than people read.

    Errors: InputError naming where.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            check_words(str(key), source, f"a key below {path}" if path else "a key")
            check_words(value, source, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            check_words(value, source, path)
    elif isinstance(tree, str) and not (tree.isprintable() and len(tree) <= _MOST_CHARS):
        raise InputError(
            f"{source}: {path} is {shown(tree)}, expected up to {_MOST_CHARS} characters that "
            "can be printed"
        )


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """A value for an error message: short, however large or deeply nested it is."""
    try:
        return _short.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__} out of all bounds"


_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    tuple: "a list of names",
}


@dataclass(frozen=True)
class _Reader:
    source: str
    folder: Path
    special: Mapping[type, Callable[[Mapping[str, Any], str], Any]] = field(repr=False)

    def section(self, kind: type[Any], tree: Any, path: str) -> Any:
        if tree is None:
            tree = {}
        if not isinstance(tree, Mapping):
            raise InputError(
                f"{self.source}: {path or 'the file'} expects keys, found {shown(tree)}"
            )
        if kind in self.special:
            return self.special[kind](tree, self.source)
        hints = get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        values = {}
        for key, value in tree.items():
            where = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise unknown_key(where, str(key), known, self.source)
            values[key] = self.value(hints[key], value, where)
        return kind(**values)

    def value(self, hint: Any, value: Any, where: str) -> Any:
        origin = get_origin(hint)
        if dataclasses.is_dataclass(hint):
            return self.section(cast(type[Any], hint), value, where)
        if origin in (Union, types.UnionType):
            return self._union(get_args(hint), value, where)
        if origin is Literal:
            return self._literal(get_args(hint), value, where)
        if origin is tuple:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif origin is not None and issubclass(origin, Mapping):
            if isinstance(value, Mapping):
                item = get_args(hint)[1]
                return {str(k): self.value(item, v, f"{where}.{k}") for k, v in value.items()}
        else:
            found = self._scalar(hint, value)
            if found is not None:
                return found
        expected = _EXPECTED.get(origin or hint, "keys")
        raise InputError(f"{self.source}: {where} is {shown(value)}, expected {expected}")

    def _scalar(self, hint: Any, value: Any) -> Any:
        """The value as a scalar type; None where it is no such value."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if hint is bool:
            return value if isinstance(value, bool) else None
        if hint is int:
            whole = number and abs(value) < 2**63 and float(value).is_integer()
            return int(value) if whole else None
        if hint is float:
            return _number(value)
        if hint is str:
            if isinstance(value, str):
                return value
            return str(value) if number and abs(value) < 2**63 else None
        if hint is Path and isinstance(value, str) and value:
            return self.folder / Path(value).expanduser()
        return None

    def _literal(self, allowed: tuple[Any, ...], value: Any, where: str) -> Any:
        for option in allowed:
            if value == option and not isinstance(value, bool):
                return option  # 32 for 32.0: a plan's hash is of the canonical value
        options = [str(option) for option in allowed]
        near = difflib.get_close_matches(shown(value).strip("'"), options, n=1)
        raise InputError(
            f"{self.source}: {where} is {shown(value)}, expected one of {', '.join(options)}",
            hint=f"did you mean {near[0]!r}?" if near else "",
        )

    def _union(self, options: tuple[Any, ...], value: Any, where: str) -> Any:
        if value is None and type(None) in options:
            return None
        problem: InputError | None = None
        for option in options:
            if option is type(None):
                continue
            try:
                return self.value(option, value, where)
            except InputError as error:
                problem = problem or error
        assert problem is not None
        raise problem


def _number(value: Any) -> float | None:
    """A finite float, also from text such as 1e-3, which YAML 1.1 does not read as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
