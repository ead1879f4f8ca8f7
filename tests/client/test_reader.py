"""Every layout on people's disks becomes the same listing; what cannot be used is named."""

from __future__ import annotations

import csv
import io
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytofed.client.reader import UnreadableImage, list_cells, load_rgb, patient_columns
from cytofed.errors import InputError
from cytofed.labels import load_map, load_scheme

MARROW = load_scheme("bone-marrow-21")
PBC8 = load_scheme("pbc-8")


def put(folder: Path, *paths: str) -> None:
    """Empty files: a listing never opens an image."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def codes(folder: Path, **options: str) -> dict[str, tuple[str, ...]]:
    listing = list_cells(folder, MARROW, **options)  # type: ignore[arg-type]
    return {
        path: tuple(np.array(MARROW.codes)[mask_C])
        for path, mask_C in zip(listing.paths, listing.targets_NC, strict=True)
    }


LAYOUTS = {
    "tree with range folders": (
        "BM_cytomorphology_data/BLA/0001-1000/BLA_00001.jpg",
        "BM_cytomorphology_data/LYT/1001-2000/LYT_01001.jpg",
        "BM_cytomorphology_data/ABE/ABE_00001.jpg",
    ),
    "root of the tree": ("BLA/0001-1000/BLA_00001.jpg", "LYT/LYT_1.jpg", "ABE/ABE_00001.jpg"),
    "flat class folders": ("BLA/x1.png", "LYT/x2.tif", "ABE/x3.bmp"),
    "patients below classes": ("BLA/p1/1.jpg", "LYT/p1/2.jpg", "ABE/p2/3.jpg"),
    "classes below patients": ("p1/BLA/1.jpg", "p1/LYT/2.jpg", "p2/ABE/3.jpg"),
    "prefixes in one folder": ("BLA_1.jpeg", "LYT-2.JPG", "abe 3.TIFF"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_classes(tmp_path: Path, layout: str) -> None:
    put(tmp_path, *LAYOUTS[layout])
    assert sorted(codes(tmp_path).values()) == [("ABE",), ("BLA",), ("LYT",)]
    listing = list_cells(tmp_path, MARROW)
    assert listing.map_name == "marrow"
    assert listing.field_um == 21.6
    assert list(listing.paths) == sorted(listing.paths)
    assert not listing.problems


def test_kaggle_abbreviations_are_not_taken_for_a_table_of_images(tmp_path: Path) -> None:
    put(tmp_path, *LAYOUTS["tree with range folders"])
    (tmp_path / "abbreviations.csv").write_text("Abbreviation;Meaning\nBLA;Blast\n")
    assert len(codes(tmp_path)) == 3


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize("give_csv_itself", [True, False])
def test_csv_of_path_and_label(tmp_path: Path, separator: str, give_csv_itself: bool) -> None:
    put(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    rows = ["Path,Label,patient,slide", "a/1.jpg,BLA,7,s1", "a\\2.jpg,lyt,7,s2", "3.jpg,MON,8,s2"]
    table = tmp_path / "labels.csv"
    table.write_text("\ufeff" + "\n".join(rows).replace(",", separator))
    root = table if give_csv_itself else tmp_path
    assert codes(root) == {"a/1.jpg": ("BLA",), "a/2.jpg": ("LYT",), "b/3.jpg": ("MON",)}
    listing = list_cells(root, MARROW, patients="column:patient")
    assert listing.patients == ("7", "7", "8")
    assert listing.columns["slide"] == ("s1", "s2", "s2")
    assert listing.root == tmp_path


def test_every_row_and_file_of_a_csv_is_accounted_for(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", ".hidden.jpg")
    lines = ["1.jpg,BLA", "2.jpg,BLA", "2.jpg,LYT", "3.jpg,", "gone.jpg,BLA", "1.jpg,BLA"]
    (tmp_path / "x.csv").write_text("\n".join(["path,label", *lines, ".hidden.jpg,BLA"]))
    listing = list_cells(tmp_path, MARROW)
    assert listing.paths == ("1.jpg",)
    assert {(problem.path, problem.kind) for problem in listing.problems} == {
        ("2.jpg", "conflict"),
        ("3.jpg", "no label"),
        ("4.jpg", "not listed"),
        ("5.jpg", "not listed"),
        ("gone.jpg", "missing"),
    }
    assert listing.hidden == 1


def test_two_tables_of_images_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("path,label\n1.jpg,BLA\n")
    with pytest.raises(InputError, match=r"a\.csv and b\.csv"):
        list_cells(tmp_path, MARROW)


def test_finer_prefix_wins_over_a_coarse_folder(sample: Path) -> None:
    by_path = codes(sample / "blood")
    expected = {
        "ig/PMY": ("PMO",),
        "ig/MY": ("MYB",),
        "ig/MMY": ("MMZ",),
        "ig/IG": ("MMZ", "MYB", "PMO"),
        "neutrophil/BNE": ("NGB",),
        "neutrophil/SNE": ("NGS",),
        "neutrophil/NEUTROPHIL": ("NGB", "NGS"),
        "basophil/BA": ("BAS",),
        "erythroblast/ERB": ("EBO",),
    }
    for path, found in by_path.items():
        prefix = path.split("_")[0]
        assert found == expected.get(prefix, found)
    assert {path.split("_")[0] for path in by_path} >= expected.keys()


def test_classes_not_of_the_scheme_are_excluded_and_counted(sample: Path) -> None:
    listing = list_cells(sample / "blood", MARROW)
    assert listing.excluded == {"platelet": 16}
    assert len(listing) == 7 * 16
    assert "BLA" in listing.absent


def test_pbc_folders_are_exact_in_their_own_scheme(sample: Path) -> None:
    listing = list_cells(sample / "blood", PBC8)
    assert (listing.targets_NC.sum(axis=1) == 1).all()
    assert (listing.targets_NC.sum(axis=0) == 16).all()


def test_folder_and_name_in_conflict_is_a_problem_by_name(tmp_path: Path) -> None:
    put(tmp_path, "BLA/LYT_1.jpg", "BLA/BLA_2.jpg", "BLA/lytic_3.jpg", "BLA/text_4.jpg")
    listing = list_cells(tmp_path, MARROW)
    assert listing.paths == ("BLA/BLA_2.jpg", "BLA/lytic_3.jpg", "BLA/text_4.jpg")
    (problem,) = listing.problems
    assert (problem.path, problem.kind) == ("BLA/LYT_1.jpg", "conflict")
    assert "BLA" in problem.detail
    assert "LYT" in problem.detail


def test_hidden_files_and_folders_are_skipped_in_silence(tmp_path: Path) -> None:
    put(tmp_path, "BLA/BLA_1.jpg", "BLA/.DS_1.jpg", "BLA/.trash/BLA_2.jpg", ".x/LYT_3.jpg")
    listing = list_cells(tmp_path, MARROW)
    assert listing.paths == ("BLA/BLA_1.jpg",)
    assert not listing.problems


def test_a_link_to_a_folder_that_is_there_anyway_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "p1/BLA/1.jpg", "p2/LYT/2.jpg")
    before = codes(tmp_path)
    (tmp_path / "p0").mkdir()
    (tmp_path / "p0" / "all").symlink_to(tmp_path / "p2")
    assert codes(tmp_path) == before


@pytest.mark.parametrize(
    ("column", "asked"),
    [("patient", True), ("Patient_ID", True), ("Case", True), ("patienten-nr", True),
     ("subject id", True), ("MRN", True), ("donor", True), ("patient_age", False),
     ("slide", False), ("casein", False)],
)  # fmt: skip
def test_columns_that_tell_patients_apart_are_known_by_their_names(
    tmp_path: Path, column: str, asked: bool
) -> None:
    (tmp_path / "x.csv").write_text(f"path,label,{column}\n")
    assert patient_columns(tmp_path) == ((column,) if asked else ())


def test_a_link_to_a_folder_above_does_not_loop(tmp_path: Path) -> None:
    put(tmp_path, "BLA/BLA_1.jpg")
    (tmp_path / "BLA" / "up").symlink_to(tmp_path)
    assert len(list_cells(tmp_path, MARROW)) == 1


def test_unmapped_label_stops_with_label_count_and_line(tmp_path: Path) -> None:
    put(tmp_path, "BLA/1.jpg", "plasma_cells/0001-1000/2.jpg", "plasma_cells/3.jpg")
    with pytest.raises(InputError, match=r'"plasma_cells" \(2 images\)') as caught:
        list_cells(tmp_path, MARROW)
    assert '"plasma_cells": PLM' in caught.value.hint

    lines = caught.value.hint.splitlines()[1:]  # the hint is a working map
    (tmp_path / "ours.yaml").write_text("\n".join(lines))
    ours = load_map(str(tmp_path / "ours.yaml"))
    assert len(list_cells(tmp_path, MARROW, label_map=ours)) == 3


def test_two_sources_in_one_folder_are_told_apart(sample: Path) -> None:
    with pytest.raises(InputError) as caught:
        list_cells(sample, MARROW)
    assert "its own --data" in caught.value.hint


def test_a_folder_without_labels_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images below"):
        list_cells(tmp_path, MARROW)
    with pytest.raises(InputError, match="no data folder"):
        list_cells(tmp_path / "nowhere", MARROW)
    put(tmp_path, "001.jpg", "002.jpg")
    with pytest.raises(InputError, match="none of 2 images has a label"):
        list_cells(tmp_path, MARROW)


def test_map_for_another_scheme_is_refused(sample: Path) -> None:
    with pytest.raises(InputError, match="scheme pbc-8"):
        list_cells(sample / "blood", MARROW, label_map=load_map("pbc-to-pbc8"))


def test_patients_by_folder_and_by_name(tmp_path: Path) -> None:
    put(tmp_path, "p1/BLA/17_1.jpg", "p1/LYT/17_2.jpg", "p2/BLA/18_1.jpg", "BLA/oops.jpg")
    by_folder = list_cells(tmp_path, MARROW, patients="folder:1")
    assert by_folder.patients == ("BLA", "p1", "p1", "p2")
    by_name = list_cells(tmp_path, MARROW, patients=r"name:^(\d+)_")
    assert by_name.patients == ("17", "17", "18")
    assert [(p.path, p.kind) for p in by_name.problems] == [("BLA/oops.jpg", "no patient")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:1", "classes, not patients"),
        ("folder:9", "finds no patient"),
        ("folder:x", "not a number"),
        ("name:BLA", "no group"),
        ("name:(", "name:"),
        ("name:(nobody)", "finds no patient"),
        ("column:patient", "no column"),
        ("who", "not understood"),
    ],
)
def test_wrong_patient_specs_are_refused(sample: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_cells(sample / "marrow", MARROW, patients=spec)


# --- decoding ----------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(size: int = 24) -> np.ndarray:
    values_HW = np.linspace(10, 245, size * size).reshape(size, size)
    return np.stack([values_HW, values_HW[::-1], values_HW.T], axis=2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_give_the_same_pixels(kind: str) -> None:
    image = Image.fromarray(gradient())
    assert np.array_equal(np.asarray(load_rgb(encoded(image, kind))), gradient())


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("PNG", "P"), ("TIFF", "CMYK")])
def test_other_modes_become_rgb(kind: str, mode: str) -> None:
    image = Image.fromarray(gradient()).convert(mode)
    found = np.asarray(load_rgb(encoded(image, kind)))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_transparent_pixels_become_white_glass() -> None:
    rgba = np.dstack([gradient(), np.zeros((24, 24), np.uint8)])
    assert (np.asarray(load_rgb(encoded(Image.fromarray(rgba), "PNG"))) == 255).all()


@pytest.mark.parametrize(("bits", "kind"), [(12, "TIFF"), (16, "TIFF"), (16, "PNG")])
def test_deep_grey_keeps_its_brightness(bits: int, kind: str) -> None:
    grey_HW = gradient()[:, :, 0]
    deep_HW = (grey_HW.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    found = np.asarray(load_rgb(encoded(Image.fromarray(deep_HW), kind)))
    assert np.abs(found[:, :, 0].astype(int) - grey_HW).max() <= 1


@pytest.mark.parametrize("at_least_px", [None, (128, 128), (64, 64), (50, 1), (16, 16), (1, 1)])
def test_shortcut_for_plain_jpegs_gives_the_same_pixels(
    sample: Path, at_least_px: tuple[int, int] | None
) -> None:
    files = [path.read_bytes() for path in sorted(sample.rglob("*.jpg"))[::40]]
    odd = Image.fromarray(gradient(101)[:77])
    files += [encoded(odd, "JPEG"), encoded(odd, "JPEG", progressive=True, subsampling=0)]
    files += [encoded(odd.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            if at_least_px:
                image.draft("RGB", at_least_px)
            expected = image.convert("RGB")
        assert load_rgb(data, at_least_px=at_least_px).tobytes() == expected.tobytes()


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(gradient()[:16])
    assert load_rgb(encoded(image, "JPEG", exif=exif.tobytes())).size == (24, 16)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"not an image\n", "text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text"),
        (b"\xff\xd8\xff\xe0rubbish", "truncated"),
        (bytes(range(256)), "unreadable"),
        (encoded(Image.fromarray(gradient(200)), "JPEG")[:2000], "truncated"),
        (encoded(Image.fromarray(gradient(200)), "PNG")[:900], "truncated"),
        (encoded(Image.fromarray(gradient()), "GIF"), "unreadable"),  # decoders kept few
    ],
)
def test_what_is_no_image_is_named_by_kind(data: bytes, kind: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        load_rgb(data)
    assert caught.value.kind == kind


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd TIFF tags
def test_no_damage_to_a_file_raises_anything_else(sample: Path) -> None:
    rng = np.random.default_rng(0)
    jpeg = next((sample / "marrow" / "BLA").iterdir()).read_bytes()
    image = load_rgb(jpeg)
    for data in (jpeg, encoded(image, "TIFF"), encoded(image, "PNG"), encoded(image, "BMP")):
        for _ in range(60):
            damaged = np.frombuffer(data, np.uint8).copy()
            at = rng.integers(0, min(len(damaged), 700), 4)
            damaged[at] = rng.integers(0, 256, 4)
            with suppress(UnreadableImage):
                assert load_rgb(damaged.tobytes()).mode == "RGB"


# --- real data ---------------------------------------------------------------------------------


def test_manifest_and_reader_agree_on_every_real_image(real_data: Path) -> None:
    with (real_data / "manifest.csv").open(encoding="utf-8") as file:
        truth = {row["path"]: row for row in csv.DictReader(file)}
    for folder in ("bone_marrow", "bone_marrow_128", "pbc_original", "pbc_128"):
        listing = list_cells(real_data / folder, MARROW)
        expected = {
            path.removeprefix(f"{folder}/"): row["code"] or row["coarse_codes"]
            for path, row in truth.items()
            if path.startswith(f"{folder}/") and (row["code"] or row["coarse_codes"])
        }
        found = {
            path: set(np.array(MARROW.codes)[mask_C])
            for path, mask_C in zip(listing.paths, listing.targets_NC, strict=True)
        }
        assert found == {path: set(codes.split(";")) for path, codes in expected.items()}
        assert not listing.problems


def test_damaged_files_keep_their_class_and_hidden_ones_are_skipped(real_data: Path) -> None:
    listing = list_cells(real_data / "corrupt", MARROW)
    assert len(listing) == 11
    assert listing.hidden == 1


def bomb(kind: str) -> bytes:
    """Few bytes that claim, or unpack to, gigabytes."""
    if kind == "pixels":  # 60,000 x 60,000 of one colour
        head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x")
    squeezed = zlib.compress(bytes(60_000_000))
    extra = {"text": b"zTXt", "profile": b"iCCP"}[kind], b"x\0\0" + squeezed
    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(*extra)
        + chunk(b"IDAT", zlib.compress(bytes(4)))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    length, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(name + data))
    return length + name + data + check


@pytest.mark.parametrize("kind", ["pixels", "text", "profile"])
def test_a_decompression_bomb_is_that_images_failure(kind: str) -> None:
    data = bomb(kind)
    tracemalloc.start()
    with suppress(UnreadableImage):  # a profile that is never unpacked harms nobody
        assert load_rgb(data).size == (1, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 40e6


def test_deep_grey_is_the_same_whatever_its_height() -> None:
    values_HW = np.arange(700 * 3, dtype=np.uint16).reshape(700, 3) * 9
    file = io.BytesIO()
    Image.fromarray(values_HW).save(file, "PNG")
    grey_HW = np.asarray(load_rgb(file.getvalue()))[..., 0]
    expected_HW = np.clip(values_HW / 65535.0 * 255.0, 0, 255).round()
    assert np.array_equal(grey_HW, expected_HW)
