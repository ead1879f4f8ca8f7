"""Label schemes and maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cytofed.errors import InputError
from cytofed.labels import built_in_maps, built_in_schemes, load_map, load_scheme

PAIRS = "NGB-NGS NGB-MMZ MMZ-MYB MYB-PMO PMO-BLA PEB-EBO LYT-HAC LYT-LYI"


def test_bone_marrow_scheme_has_21_classes_and_the_8_pairs_of_the_paper() -> None:
    scheme = load_scheme("bone-marrow-21")
    assert len(scheme.codes) == 21
    assert scheme.names["BLA"] == "blast"
    assert len(scheme.tolerated) == 8
    for pair in PAIRS.split():
        one, other = pair.split("-")
        assert scheme.tolerates(one, other)
        assert scheme.tolerates(other, one)


def test_tolerance_matrix_is_symmetric_with_a_true_diagonal() -> None:
    scheme = load_scheme("bone-marrow-21")
    tolerance_CC = scheme.tolerance_CC
    assert np.array_equal(tolerance_CC, tolerance_CC.T)
    assert tolerance_CC.diagonal().all()
    assert tolerance_CC.sum() == 21 + 2 * 8


def test_every_built_in_map_speaks_codes_of_its_scheme() -> None:
    for name in built_in_schemes():
        codes = set(load_scheme(name).codes)
        assert built_in_maps(name)
        for label_map in built_in_maps(name):
            used = {code for codes in label_map.rules.values() for code in codes}
            assert used <= codes
            assert not used & label_map.absent
            assert used | label_map.absent == codes  # every class is either labelled or absent


def test_pbc_map_has_all_four_relations() -> None:
    pbc = load_map("pbc")
    assert pbc.rules["SNE"] == ("NGS",)
    assert set(pbc.rules["ig"]) == {"PMO", "MYB", "MMZ"}
    assert pbc.rules["platelet"] == ()
    assert {"BLA", "NIF", "ART"} <= pbc.absent
    assert pbc.field_um == 36.0


def test_labels_match_in_any_case() -> None:
    assert load_map("pbc").find("Neutrophil ") == "neutrophil"
    assert load_map("marrow").find("bla") == "BLA"
    assert load_map("marrow").find("blast") is None


def test_own_map_extends_a_built_in_one(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("extends: marrow\nlabels: {Blasten: BLA, bla: excluded}\nabsent: [HAC]\n")
    with pytest.raises(InputError, match="HAC is absent and also"):
        load_map(str(path))
    path.write_text("extends: marrow\nlabels: {Blasten: BLA, bla: excluded}\n")
    ours = load_map(str(path))
    assert ours.name == "ours"
    assert ours.rules["Blasten"] == ("BLA",)
    assert ours.rules["bla"] == ()
    assert "BLA" not in ours.rules  # the own spelling replaces the inherited one
    assert ours.field_um == 21.6


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("scheme: bone-marrow-21\nlabel: {}\n", 'unknown key "label"', 'did you mean "labels"'),
        ("scheme: bone-marrow-21\nlabels: {x: BLAX}\n", "unknown code 'BLAX'", "BLA"),
        ("scheme: bone-marrow-21\nlabels: {x: BLA, x: LYT}\n", "given twice", ""),
        ("scheme: bone-marrow-21\nlabels: {x: BLA, X: LYT}\n", "given twice", ""),
        ("scheme: bone-marrow-21\nlabels: {no: BLA}\n", "False is not text", "quotes"),
        ("scheme: bone-marrow-21\nlabels: {x: []}\n", "empty list", "excluded"),
        ("scheme: bone-marrow-12\nlabels: {}\n", "no label scheme", "bone-marrow-21"),
        ("scheme: bone-marrow-21\nfield_um: -3\n", "field_um -3", "micrometres per pixel"),
        ("labels: {x: BLA}\n", "no scheme", "bone-marrow-21"),
        ("- a\n", "not a YAML mapping", "labels"),
        ("a: [\n", "not valid YAML", ""),
    ],
)
def test_a_wrong_map_is_refused_with_the_way_out(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_map(str(path))
    assert hint in caught.value.hint


def test_an_own_scheme_lies_beside_its_map(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ncodes: {A: one, B: other}\ntolerated: [[B, A]]")
    (tmp_path / "map.yaml").write_text("scheme: two.yaml\nlabels: {cat: A, dog: B}\n")
    assert load_scheme(str(tmp_path / "two.yaml")).tolerates("A", "B")
    assert load_map(str(tmp_path / "map.yaml")).scheme == "two"


def test_unknown_code_names_the_nearest() -> None:
    with pytest.raises(InputError, match='"BLS" is not a code') as caught:
        load_scheme("bone-marrow-21").index("BLS")
    assert "BLA" in caught.value.hint
