"""A selection of cells behaves like an array of images, over any number of folders."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from cytofed.client.cache import Framing, decode_cell
from cytofed.client.cells import Cells, load_cells, open_cells
from cytofed.errors import InputError
from cytofed.labels import load_map, load_scheme

MARROW = load_scheme("bone-marrow-21")


@pytest.fixture(scope="module")
def both(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    roots = [sample / "marrow", sample / "blood"]
    cache_dir = tmp_path_factory.mktemp("cache")
    return open_cells(roots, MARROW, size_px=32, field_um=21.6, cache_dir=cache_dir)


def test_images_are_those_of_the_paths(both: Cells, sample: Path) -> None:
    index = np.array([600, 3, 250, 3, 671])
    pixels_BHWC = both.images(index)
    assert pixels_BHWC.flags.c_contiguous
    assert pixels_BHWC.flags.writeable
    frames = [Framing(32, 1.0), Framing(32, 0.6)]
    folders = [sample / "marrow", sample / "blood"]
    for at, position in enumerate(index):
        source = both.source_N[position]
        data = (folders[source] / both.paths()[position]).read_bytes()
        assert np.array_equal(pixels_BHWC[at], decode_cell(data, frames[source]))


def test_taking_is_selecting(both: Cells) -> None:
    index = np.array([5, 640, 9])
    taken = both.take(index)
    assert len(taken) == 3
    assert taken.paths() == [both.paths()[i] for i in index]
    assert np.array_equal(taken.images(np.arange(3)), both.images(index))
    assert np.array_equal(taken.targets_NC, both.targets_NC[index])
    assert np.array_equal(taken.dhash_N, both.dhash_N[index])
    assert np.array_equal(taken.background_N3, both.background_N3[index])
    coarse = both.take(~both.exact_N)
    assert (coarse.targets_NC.sum(axis=1) > 1).all()
    assert (coarse.class_N == -1).all()


def test_class_is_the_folder_of_exact_images(both: Cells) -> None:
    marrow = both.take(both.source_N == 0)
    folders = [path.split("/")[0] for path in marrow.paths()]
    assert [MARROW.codes[c] for c in marrow.class_N] == folders


def test_saved_selection_opens_without_the_images(
    sample: Path, tmp_path: Path, both: Cells
) -> None:
    shutil.copytree(sample / "marrow" / "BLA", tmp_path / "data" / "BLA")
    cells = open_cells(
        [tmp_path / "data"],
        MARROW,
        patients=r"name:_(\d\d\d)",
        size_px=32,
        field_um=None,
        cache_dir=tmp_path / "c",
    ).take(np.array([7, 2, 30]))
    cells.save(tmp_path / "run.npz")
    assert stat.S_IMODE((tmp_path / "run.npz").stat().st_mode) == 0o600
    shutil.rmtree(tmp_path / "data")
    again = load_cells(tmp_path / "run.npz")
    assert again.paths() == cells.paths()
    assert np.array_equal(again.images(np.arange(3)), cells.images(np.arange(3)))
    assert np.array_equal(again.targets_NC, cells.targets_NC)
    assert again.patients_N is not None
    assert again.patients_N.tolist() == list(np.array(cells.patients_N))
    assert again.sources[0].listing.field_um == 21.6

    both.save(tmp_path / "both.npz")
    loaded = load_cells(tmp_path / "both.npz")
    assert np.array_equal(loaded.background_N3, both.background_N3)
    assert loaded.sources[1].listing.absent == both.sources[1].listing.absent
    for path in (tmp_path / "c").glob("*.cells"):
        path.unlink()
    with pytest.raises(InputError, match="cache file"):
        load_cells(tmp_path / "run.npz")


def test_columns_of_one_csv_among_two_folders(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample / "marrow" / "BLA", tmp_path / "a" / "x")
    shutil.copytree(sample / "marrow" / "EOS", tmp_path / "b" / "EOS")
    names = sorted(path.name for path in (tmp_path / "a" / "x").iterdir())[:4]
    lines = [f"x/{name},BLA,s{row % 2},p{row}" for row, name in enumerate(names)]
    (tmp_path / "a" / "l.csv").write_text("\n".join(["path,label,slide,who", *lines]))
    roots = [tmp_path / "a", tmp_path / "b"]
    cells = open_cells(roots, MARROW, size_px=16, field_um=None, cache_dir=tmp_path / "c")
    assert len(cells) == 84
    assert cells.column("slide")[:5].tolist() == ["s0", "s1", "s0", "s1", ""]
    assert cells.patients_N is None
    with pytest.raises(InputError, match='no column "scanner"') as caught:
        cells.column("scanner")
    assert "slide" in caught.value.hint
    with pytest.raises(InputError, match="no column"):
        open_cells(
            roots,
            MARROW,
            patients="column:who",
            size_px=16,
            field_um=None,
            cache_dir=tmp_path / "c",
        )


def test_equal_patient_names_of_two_folders_are_two_patients(sample: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(sample / "marrow" / "BLA", tmp_path / name / "p1" / "BLA")
    cells = open_cells(
        [tmp_path / "a", tmp_path / "b"],
        MARROW,
        patients="folder:1",
        size_px=16,
        field_um=None,
        cache_dir=tmp_path / "c",
    )
    assert cells.patients_N is not None
    assert sorted(set(cells.patients_N.tolist())) == ["1:p1", "2:p1"]


def test_one_map_serves_all_folders_and_a_wrong_number_is_refused(
    sample: Path, tmp_path: Path
) -> None:
    pbc = load_map("pbc")
    roots = [sample / "blood", sample / "blood", sample / "blood"]
    cells = open_cells(
        roots, MARROW, maps=[pbc], size_px=16, field_um=None, cache_dir=tmp_path / "c"
    )
    assert len(cells) == 3 * 112
    with pytest.raises(InputError, match="2 label maps for 3"):
        open_cells(
            roots, MARROW, maps=[pbc, None], size_px=16, field_um=None, cache_dir=tmp_path / "c"
        )


def test_a_folder_of_excluded_classes_only_is_refused(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample / "blood" / "platelet", tmp_path / "x" / "platelet")
    with pytest.raises(InputError, match="16 excluded by label map pbc"):
        open_cells([tmp_path / "x"], MARROW, size_px=16, field_um=None, cache_dir=tmp_path / "c")


def test_damaged_files_are_left_out_by_name(real_data: Path, tmp_path: Path) -> None:
    cells = open_cells(
        [real_data / "corrupt"], MARROW, size_px=32, field_um=21.6, cache_dir=tmp_path / "c"
    )
    assert len(cells) == 8
    assert {problem.kind for problem in cells.sources[0].listing.problems} == {
        "truncated",
        "empty",
        "text",
    }
