"""Using a model file on images: named predictions, honest scores, no image that stops the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytofed.client.predict import evaluate_model, predict_images
from cytofed.errors import InputError
from cytofed.model_file import read_model, write_model
from cytofed.plan import load_plan
from cytofed.start import START_FILE, write_start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights: enough to see where its answers go."""
    folder = tmp_path_factory.mktemp("model")
    write_start(load_plan("demo", ["model.width=8", "labels.scale.size_px=32"]), folder)
    tensors, info = read_model(folder / START_FILE)
    rng = np.random.default_rng(0)
    for values in tensors.values():  # the head of a start model is zero: all classes the same
        values += rng.normal(0, 0.3, values.shape).astype(np.float32)
    write_model(folder / "model.safetensors", tensors, info)
    return folder / "model.safetensors"


@pytest.fixture
def images(sample: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for code in ("EOS", "LYT"):
        (folder / code).mkdir(parents=True)
        for image in sorted((sample / "marrow" / code).iterdir())[:4]:
            shutil.copy(image, folder / code)
    return folder


def test_every_image_of_a_folder_has_its_most_likely_classes_in_order(
    model: Path, images: Path
) -> None:
    found = list(predict_images(model, [images], top=4))
    assert [row.path for row in found] == sorted(images.rglob("*.jpg"))
    for row in found:
        assert row.problem == ""
        probabilities = [p for _, p in row.classes]
        assert len({code for code, _ in row.classes}) == 4
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1


def test_files_and_folders_are_taken_in_the_order_given(model: Path, images: Path) -> None:
    one = next((images / "LYT").iterdir())
    found = [row.path for row in predict_images(model, [one, images / "EOS"])]
    assert found == [one, *sorted((images / "EOS").iterdir())]


def test_a_prediction_does_not_depend_on_the_other_images(model: Path, images: Path) -> None:
    together = {row.path: row.classes for row in predict_images(model, [images])}
    for path, classes in together.items():
        (alone,) = predict_images(model, [path])
        assert [code for code, _ in alone.classes] == [code for code, _ in classes]
        for (_, one), (_, other) in zip(alone.classes, classes, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_unreadable_images_are_named_and_the_others_predicted(model: Path, images: Path) -> None:
    whole = (images / "EOS").iterdir()
    data = next(whole).read_bytes()
    (images / "EOS" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (images / "EOS" / "empty.jpg").write_bytes(b"")
    (images / "EOS" / "text.jpg").write_bytes(b"not an image")
    (images / "EOS" / ".hidden.jpg").write_bytes(b"")
    found = {row.path.name: row for row in predict_images(model, [images])}
    assert len(found) == 11
    for name in ("cut.jpg", "empty.jpg", "text.jpg"):
        assert found[name].problem
        assert found[name].classes == ()
    assert sum(bool(row.classes) for row in found.values()) == 8


def test_more_classes_than_there_are_gives_all(model: Path, images: Path) -> None:
    row = next(iter(predict_images(model, [images], top=99)))
    assert len(row.classes) == 21
    assert sum(p for _, p in row.classes) == pytest.approx(1, abs=1e-4)


def test_field_of_view_changes_what_the_model_sees(model: Path, images: Path) -> None:
    frame = list(predict_images(model, [images]))
    wide = list(predict_images(model, [images], field_um=43.2))
    same = list(predict_images(model, [images], field_um=21.6))
    assert frame == same
    assert frame != wide


def test_missing_paths_and_folders_without_images_are_refused(
    model: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no image below"):
        list(predict_images(model, [tmp_path / "none"]))
    with pytest.raises(InputError, match="nowhere"):
        list(predict_images(model, [tmp_path / "nowhere.jpg"]))
    with pytest.raises(InputError, match="no model file"):
        list(predict_images(tmp_path / "model.safetensors", [images]))


def test_scores_count_every_exactly_labelled_image(
    model: Path, images: Path, tmp_path: Path
) -> None:
    scores = evaluate_model(model, [images], cache_dir=tmp_path / "cache")
    assert {c: v["support"] for c, v in scores["per_class"].items() if v["support"]} == {
        "EOS": 4,
        "LYT": 4,
    }
    assert 0 <= scores["accuracy"] <= 1


def test_only_leaves_the_other_classes_out(model: Path, images: Path, tmp_path: Path) -> None:
    scores = evaluate_model(model, [images], only=["EOS"], cache_dir=tmp_path / "cache")
    assert {c: v["support"] for c, v in scores["per_class"].items() if v["support"]} == {"EOS": 4}
    with pytest.raises(InputError, match="XYZ"):
        evaluate_model(model, [images], only=["XYZ"], cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="none of the"):
        evaluate_model(model, [images], only=["BLA"], cache_dir=tmp_path / "cache")


def test_folder_with_labels_of_another_scheme_is_refused_by_name(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "spam").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "spam" / "a.png")
    with pytest.raises(InputError, match="spam"):
        evaluate_model(model, [tmp_path / "data"], cache_dir=tmp_path / "cache")
