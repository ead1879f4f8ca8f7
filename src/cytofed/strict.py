"""YAML and JSON that people write: every key stands once, and stands where it is read.

YAML takes the last of two equal keys in silence: a second, empty ``limits:`` would take a lab's
limits away, a second ``privacy:`` would switch privacy off. So would a merge key (``<<``), whose
values stand elsewhere. Each is an error here, and no other loader of YAML is used in cytofed.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Container
from typing import Any

import yaml

from cytofed.errors import InputError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # noqa: TID251 - the same, and faster
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class NotYaml(InputError):
    """Text that YAML cannot be read from; not one that says something twice."""


def read_yaml(text: str, source: str, *, never_empty: Container[str] = ()) -> Any:
    """The value of a YAML text; ``source`` is named in errors.

    ``never_empty``: keys of the top level which, as everything below them, need a value.
    Guarantees: no key was given twice, at any depth, however it is quoted or spelt; nothing was
    merged or repeated from elsewhere.
    Errors: NotYaml; InputError, with the line, for a text that breaks a guarantee.
    """
    try:
        loader = _Loader(text.removeprefix("\ufeff"))  # what editors under Windows put in front
        node = loader.get_single_node()
        if node is None:
            return None
        _Walk(loader, source, never_empty).check(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: day 99 of a date
        hint = "indent with blanks, not with tabs" if "\t" in text else ""
        raise NotYaml(f"{source} is not valid YAML: {error}", hint=hint) from None


def read_json(text: str | bytes) -> Any:
    """As ``json.loads``. Errors: ValueError, also for a key that is given twice, or a text that is
    nested deeper than anybody writes."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.80} is given twice")
    return tree


class _Walk:
    """One look at every node, before anything is made of it."""

    def __init__(self, loader: Any, source: str, never_empty: Container[str]) -> None:
        self._loader, self._source, self._never_empty = loader, source, never_empty
        self._seen: set[int] = set()

    def check(self, node: yaml.Node, path: tuple[str, ...] = ()) -> None:
        if id(node) in self._seen:
            raise self._error(node, path, "repeats by an alias (*) what stands elsewhere")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._check_mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.check(item, path)
        elif node.tag == _NULL and node.value == "" and path and path[0] in self._never_empty:
            raise self._error(
                node, path, "has no value", "write one, or take the line out, and its default holds"
            )

    def _check_mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, path, "has a list or a mapping for a key")
            if key.tag == _MERGE:
                raise self._error(key, path, "is merged (<<) with what stands elsewhere")
            where = (*path, key.value)
            self.check(key, where)
            # As written and as read: 1 and "1", yes and true are one key to whoever looks at it.
            names = {key.value, str(self._loader.construct_object(key))}
            names = {unicodedata.normalize("NFC", name) for name in names}
            for name in names & lines.keys():
                raise self._error(
                    key,
                    where,
                    f"is given twice, first in line {lines[name]}",
                    "the second would take the first one's place: leave one of them out",
                )
            lines |= dict.fromkeys(names, key.start_mark.line + 1)
            self.check(value, where)

    def _error(
        self, node: yaml.Node, path: tuple[str, ...], what: str, hint: str = ""
    ) -> InputError:
        place = f'"{".".join(path):.80}"' if path else "the file"
        return InputError(
            f"{self._source}, line {node.start_mark.line + 1}: {place} {what}",
            hint=hint or "write it out where it is meant",
        )
