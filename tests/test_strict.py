"""What people write says one thing: no key stands twice, nothing is merged in from elsewhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.strict import NotYaml, read_json, read_yaml

PRINTABLE = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"])
KEYS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=8)
TREES = st.recursive(
    st.integers() | st.text(PRINTABLE, max_size=5) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(tree=st.dictionaries(KEYS, TREES, min_size=1))
def test_what_has_every_key_once_is_read_as_it_is(tree: dict[str, object]) -> None:
    text = json.dumps(tree, ensure_ascii=False)
    assert read_yaml(text, "x") == read_json(text) == tree


@settings(deadline=None, max_examples=100)
@given(tree=st.dictionaries(KEYS, TREES, min_size=1), data=st.data())
def test_a_key_that_stands_twice_is_found_at_any_depth(
    tree: dict[str, object], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(tree)))
    body = json.dumps(tree, ensure_ascii=False)
    twice = f"{body[:-1]}, {json.dumps(key)}: {json.dumps(tree[key], ensure_ascii=False)}}}"
    for text in (twice, f'{{"a": [1, {{"b": {twice}}}]}}'):
        with pytest.raises(InputError, match="is given twice"):
            read_yaml(text, "x")
        with pytest.raises(ValueError, match="is given twice"):
            read_json(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2\n", 2),
        ("a: 1\nb: 2\n'a': 3\n", 3),
        ('a: 1\n"a": 1\n', 2),
        ('"\\x61": 1\na: 2\n', 2),
        ("1: a\n'1': b\n", 2),
        ("1: a\n0x1: b\n", 2),
        ("yes: a\ntrue: b\n", 2),
        ("? a\n: 1\n? a\n: 2\n", 3),
        ("!!str a: 1\na: 2\n", 2),
        ("\u00e9: 1\ne\u0301: 2\n", 2),
        ("\ufeffa: 1\nb: 1\na: 2\n", 3),
        ("b:\n  - c: 1\n    c: 2\n", 3),
        ("b: {c: {d: 1, d: 2}}\n", 1),
    ],
)
def test_keys_that_differ_in_their_spelling_only_are_one_key(text: str, line: int) -> None:
    with pytest.raises(InputError, match=rf"^plan.yaml, line {line}: .* is given twice"):
        read_yaml(text, "plan.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "base: &b {x: 1}\na:\n  <<: *b\n  x: 2\n",
        "a:\n  <<: {x: 1}\n",
        "a: &b {x: 1}\nc: *b\n",
        "a: &a [*a]\n",
        "&a a: {*a : 1}\n",
        "? [1, 2]\n: 3\n",
        "a: &x [1]\n" + "".join(f"b{i}: *x\n" for i in range(9)),
    ],
)
def test_nothing_comes_from_elsewhere_in_the_text(text: str) -> None:
    with pytest.raises(InputError, match=r"merged|alias|a list or a mapping"):
        read_yaml(text, "x")


@pytest.mark.parametrize(
    "text",
    ["limits:\n\tmax_epsilon: 3\n", "a: 1\n---\na: 2\n", "a: 1\n...\nb: 2\n", "a: 2026-99-99",
     "a: !!python/name:os.system x", "[" * 100_000, "{a: " * 500 + "}" * 500, "a: \0"],
)  # fmt: skip
def test_what_is_no_single_document_is_one_error(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(text, "x")
    assert "x is not valid YAML" in caught.value.message or "500" in text
    assert ("tabs" in caught.value.hint) == ("\t" in text)


def test_a_mark_of_byte_order_is_no_part_of_the_first_key() -> None:
    assert read_yaml("\ufefflimits: {x: 1}\n", "x") == {"limits": {"x": 1}}


@pytest.mark.parametrize("text", ["a:\n", "a:   # 3\n", "a: {b: }\n", "a:\n  b:\n    c:\n"])
def test_what_must_not_be_empty_has_a_value(text: str) -> None:
    with pytest.raises(InputError, match=r"^x, line \d+: ") as caught:
        read_yaml(text, "x", never_empty=("a",))
    assert "has no value" in caught.value.message
    assert read_yaml(text, "x", never_empty=("b",)) is not None
    assert read_yaml("a: null\n", "x", never_empty=("a",)) == {"a": None}


def test_an_error_within_yaml_is_told_from_one_of_its_meaning() -> None:
    with pytest.raises(NotYaml):
        read_yaml("{", "x")
    with pytest.raises(InputError) as caught:
        read_yaml("{a: 1, a: 2}", "x")
    assert not isinstance(caught.value, NotYaml)


def test_json_without_end_of_keys_or_depth_is_an_error_at_once() -> None:
    """A coordinator writes the plan of an offer: looking for its fault is no work for hours."""
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    with pytest.raises(ValueError, match="'last' is given twice"):
        read_json(f'{{{keys},"last":0,"last":0}}')
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json("[" * 100_000)
