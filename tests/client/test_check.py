"""The data check names every file that is wrong and leaves the good ones alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from rich.console import Console

from cytofed.client.check import (
    DataReport,
    check_data,
    identifier_in_name,
    near_duplicate_groups,
    render,
    text_in_metadata,
    visible_damage,
)
from cytofed.labels import load_scheme

MARROW = load_scheme("bone-marrow-21")


def accounted(report: DataReport) -> int:
    return report.images + len(report.quarantined) + report.hidden + sum(report.excluded.values())


@pytest.fixture
def folder(sample: Path, tmp_path: Path) -> Path:
    """Ten good images and one of each kind of bad file."""
    for code in ("BLA", "EOS"):
        (tmp_path / "data" / code).mkdir(parents=True)
        for path in sorted((sample / "marrow" / code).iterdir())[:5]:
            shutil.copyfile(path, tmp_path / "data" / code / path.name)
    eos = tmp_path / "data" / "EOS"
    one = sorted(eos.iterdir())[0]
    (eos / "empty.jpg").touch()
    (eos / "text.jpg").write_text("not an image")
    (eos / "cut.jpg").write_bytes(one.read_bytes()[:1500])
    (eos / ".hidden.jpg").touch()
    (eos / "LYT_1.jpg").write_bytes(one.read_bytes())
    return tmp_path / "data"


def test_every_file_is_accounted_for_by_name(folder: Path) -> None:
    report = check_data(folder, MARROW)
    assert report.images == 10
    assert report.classes == {"BLA": 5, "EOS": 5}
    assert report.sizes == {"128x128": 10}
    assert {(p.path, p.kind) for p in report.quarantined} == {
        ("EOS/empty.jpg", "empty"),
        ("EOS/text.jpg", "text"),
        ("EOS/cut.jpg", "truncated"),
        ("EOS/LYT_1.jpg", "conflict"),
    }
    assert report.hidden == 1
    assert not report.suspects
    assert not report.identifiers
    assert report.patients is None
    assert accounted(report) == sum(path.is_file() for path in folder.rglob("*"))


def test_report_is_json_and_prints_every_finding(folder: Path) -> None:
    report = check_data(folder, MARROW, patients=r"name:_(\d{4})")
    again = json.loads(json.dumps(report.to_json()))
    assert again["images"] == 10
    assert again["patients"]["count"] >= 1
    console = Console(width=100, record=True, file=io.StringIO())
    render(report, console)
    text = console.export_text()
    for problem in report.quarantined:
        assert problem.path in text
    assert "patients" in text


def test_excluded_and_coarse_images_are_counted(sample: Path) -> None:
    report = check_data(sample / "blood", MARROW)
    assert report.excluded == {"platelet": 16}
    assert report.coarse == {"MMZ MYB PMO": 2, "NGB NGS": 2}
    assert sum(report.classes.values()) + sum(report.coarse.values()) == report.images
    assert not report.suspects
    assert not report.identifiers


# --- damage --------------------------------------------------------------------------------------


def blurred_cell(size: int = 128) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    edge = 1 / (1 + np.exp((np.hypot(x, y) - size / 4) / 2.5))
    noise = np.random.default_rng(0).normal(0, 4, (size, size, 3))
    colour = np.array([120, 80, 30])
    values = 235 - edge[:, :, None] * colour + noise
    return np.asarray(values.clip(0, 255), dtype=np.uint8)


@pytest.mark.parametrize("damage", ["shift", "colour", "grey below", "column"])
def test_torn_images_are_suspects(damage: str) -> None:
    pixels = blurred_cell()
    assert visible_damage(pixels) == ""
    if damage == "shift":
        pixels[70:] = np.roll(pixels[70:], 50, axis=1)
    elif damage == "colour":
        pixels[70:, :, 1] = np.clip(pixels[70:, :, 1].astype(int) + 50, 0, 255)
    elif damage == "grey below":
        pixels[90:] = 128
    else:
        pixels[:, 60:] //= 2
    assert "torn at" in visible_damage(pixels)


def test_an_image_of_one_colour_is_a_suspect() -> None:
    assert visible_damage(np.full((64, 64, 3), 200, np.uint8)) == "one colour all over"


def test_real_cells_are_no_suspects(sample: Path) -> None:
    paths = sorted((sample / "marrow").rglob("*.jpg"))[::5]
    found = [visible_damage(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    assert not any(found)


def test_a_flipped_bit_in_a_real_jpeg_is_mostly_seen(sample: Path) -> None:
    rng = np.random.default_rng(1)
    damaged = seen = 0
    for path in sorted((sample / "marrow").rglob("*.jpg"))[::6]:
        data = bytearray(path.read_bytes())
        with Image.open(path) as image:
            intact = np.asarray(image.convert("RGB")).astype(int)
        at = int(rng.integers(data.index(b"\xff\xda") + 14, len(data) - 200))
        data[at] ^= 1 << int(rng.integers(8))
        try:
            with Image.open(io.BytesIO(bytes(data))) as image:
                broken = np.asarray(image.convert("RGB"))
        except OSError:
            continue
        if (np.abs(broken - intact).max(axis=2) > 40).mean() > 0.05:
            damaged += 1
            seen += visible_damage(broken) != ""
    assert damaged > 10
    assert seen >= 0.7 * damaged


def test_corrupt_folder_is_accounted_for_file_by_file(real_data: Path) -> None:
    report = check_data(real_data / "corrupt", MARROW)
    assert accounted(report) == 12
    assert {(p.path, p.kind) for p in report.quarantined} == {
        ("BLA/BLA_00006_truncated.jpg", "truncated"),
        ("EOS/zero_bytes.jpg", "empty"),
        ("LYT/text_not_an_image.jpg", "text"),
    }
    assert report.hidden == 1
    assert len(report.suspects) == report.images == 8  # all of the damaged ones


def test_at_most_one_percent_of_good_images_is_suspected(real_data: Path) -> None:
    paths = sorted((real_data / "bone_marrow").rglob("*.jpg"))[::4]
    paths += sorted((real_data / "pbc_original").rglob("*.jpg"))[::8]
    found = [visible_damage(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    assert sum(map(bool, found)) <= 0.01 * len(found)


# --- duplicates ----------------------------------------------------------------------------------


def test_duplicates_exact_near_and_with_another_label(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample / "marrow" / "BLA", tmp_path / "BLA")
    one, two, three = sorted((tmp_path / "BLA").iterdir())[:3]
    shutil.copyfile(one, tmp_path / "BLA" / "copy.jpg")
    with Image.open(two) as image:
        image.convert("RGB").save(tmp_path / "BLA" / "again.png")
    (tmp_path / "LYT").mkdir()
    with Image.open(three) as image:
        image.convert("RGB").resize((250, 250)).save(tmp_path / "LYT" / "other.jpg", quality=80)
    report = check_data(tmp_path, MARROW)
    assert report.exact_duplicates == ((f"BLA/{one.name}", "BLA/copy.jpg"),)
    assert set(report.near_duplicates) == {
        (f"BLA/{two.name}", "BLA/again.png"),
        (f"BLA/{three.name}", "LYT/other.jpg"),
    }
    assert report.mislabelled_duplicates == ((f"BLA/{three.name}", "LYT/other.jpg"),)


@pytest.mark.parametrize("max_distance", [0, 3, 8, 12])
def test_close_hashes_are_grouped_exactly_as_by_comparing_all(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    dhash_N = rng.integers(0, 2**63, 60, dtype=np.uint64).repeat(5)
    for row in range(len(dhash_N)):  # up to 11 bits away from the first
        for bit in rng.choice(64, rng.integers(0, 12), replace=False):
            dhash_N[row] ^= np.uint64(1 << int(bit))
    rng.shuffle(dhash_N)
    near_NN = np.bitwise_count(dhash_N[:, None] ^ dhash_N[None]) <= max_distance
    expected = np.arange(len(dhash_N))
    for _ in range(len(dhash_N)):  # labels spread until nothing changes
        spread = np.where(near_NN, expected[None], len(dhash_N)).min(axis=1)
        if np.array_equal(spread, expected):
            break
        expected = spread
    assert np.array_equal(near_duplicate_groups(dhash_N, max_distance=max_distance), expected)


def test_pixels_decide_between_hashes_that_collide(sample: Path) -> None:
    paths = sorted((sample / "marrow" / "EOS").iterdir())[:3]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    images = np.concatenate([images, np.clip(images[:1].astype(int) + 6, 0, 255).astype(np.uint8)])
    same_hash = np.zeros(4, np.uint64)
    assert near_duplicate_groups(same_hash).tolist() == [0, 0, 0, 0]
    found = near_duplicate_groups(same_hash, images=lambda index: images[index])
    assert found.tolist() == [0, 1, 2, 0]


def test_no_images_have_no_groups() -> None:
    assert near_duplicate_groups(np.zeros(0, np.uint64)).tolist() == []


# --- identifiers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("15-48904.PB.PAP~B.1272-1272.TIF", "accession"),
        ("BLA/S21-12345_3.png", "accession"),
        ("2021-00123/BLA_1.jpg", "accession"),
        ("BLA/cell_2023-04-15.jpg", "date"),
        ("BLA/BLA_20230415.jpg", "date"),
        ("mueller_15.04.1962/1.jpg", "date"),
        ("BLA/1.2.840.113619.2.55.3.604.jpg", "DICOM"),
        ("0034512399/BLA_1.jpg", "long number"),
        ("BLA/BLA_00001.jpg", ""),
        ("BM_cytomorphology_data/BLA/2001-3000/BLA_02001.jpg", ""),
        ("eosinophil/EO_225902.jpg", ""),
        ("basophil/BA_24200302.jpg", ""),
        ("APL_AML/Patient_17/Blast/003.jpg", ""),
    ],
)
def test_identifiers_in_names_and_nothing_else(path: str, what: str) -> None:
    found = identifier_in_name(path)
    assert what in found
    assert bool(found) == bool(what)


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(blurred_cell(32)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(tag: int, value: str) -> bytes:
    block = Image.Exif()
    block[tag] = value
    return block.tobytes()


def png_text(key: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value)
    return info


def tiff_tag(tag: int, value: str) -> TiffImagePlugin.ImageFileDirectory_v2:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[tag] = value
    return tags


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (saved("JPEG"), []),
        (saved("JPEG", comment=b"Intel(R) JPEG Library, version [1.51.13.45]\0"), []),
        (saved("JPEG", comment=b"Patient 48904, Mueller"), ["JPEG comment"]),
        (saved("JPEG", comment=b"Photoshop, case 15-48904"), ["JPEG comment"]),
        (saved("JPEG", exif=exif(0x0131, "Pillow")), []),
        (saved("JPEG", exif=exif(0x010E, "Hans Mueller")), ["EXIF ImageDescription"]),
        (saved("JPEG", exif=exif(0x0132, "2023:04:15 10:00:00")), ["EXIF DateTime"]),
        (saved("JPEG", xmp=b"<x:xmpmeta/>"), ["XMP"]),
        (saved("PNG"), []),
        (saved("PNG", pnginfo=png_text("Software", "any")), []),
        (saved("PNG", pnginfo=png_text("Comment", "15-48904")), ["PNG text Comment"]),
        (saved("TIFF"), []),
        (saved("TIFF", tiffinfo=tiff_tag(270, "15-48904.PB")), ["TIFF ImageDescription"]),
        (saved("BMP"), []),
    ],
)
def test_text_in_metadata_is_found_and_encoder_names_are_not(
    data: bytes, places: list[str]
) -> None:
    assert list(text_in_metadata(data)) == places


def test_report_names_places_and_never_repeats_values(folder: Path) -> None:
    (folder / "BLA" / "x.jpg").write_bytes(saved("JPEG", comment=b"Mueller, Hans"))
    (folder / "labels.csv").write_text(
        "path,label,birthdate\nBLA/x.jpg,BLA,15.04.1962\n", encoding="utf-8"
    )
    report = check_data(folder, MARROW)
    assert {found.where for found in report.identifiers} == {
        "JPEG comment",
        'CSV column "birthdate"',
    }
    text = json.dumps(report.to_json())
    assert "Mueller" not in text
    assert "1962" not in text
