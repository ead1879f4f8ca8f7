"""Encoders that ship, their cards, and the guard of private runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytofed import encoder, models
from cytofed.encoder import EncoderCard
from cytofed.errors import InputError
from cytofed.plan import Model, load_plan
from cytofed.plan_check import check_plan


def card_for(model: Path, images: tuple[str, ...]) -> EncoderCard:
    return EncoderCard(
        model.stem, "Its images.", encoder.sha256_of(model), {}, {}, {}, {}, [], images
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"weights")
    return path


def test_card_comes_back_as_it_was_written(model: Path) -> None:
    card = card_for(model, ("aa", "bb"))
    card.write(model.with_suffix(".json"))
    assert encoder.card_of(model) == card


def test_card_of_another_model_is_refused(model: Path) -> None:
    card_for(model, ()).write(model.with_suffix(".json"))
    model.write_bytes(b"other weights")
    with pytest.raises(InputError, match="card of another model"):
        encoder.card_of(model)


def test_damaged_card_is_an_input_error(model: Path) -> None:
    model.with_suffix(".json").write_text('{"format": "cytofed-encoder-card-1", "name":')
    with pytest.raises(InputError, match="damaged"):
        encoder.card_of(model)


def test_one_seen_image_is_enough_to_refuse(model: Path) -> None:
    card_for(model, ("aa", "bb")).write(model.with_suffix(".json"))
    encoder.refuse_seen(str(model), ["cc", "dd"])
    with pytest.raises(InputError, match="1 of 2 images") as refused:
        encoder.refuse_seen(str(model), ["bb", "cc"])
    assert refused.value.exit_code == 2


def test_random_start_has_seen_nothing() -> None:
    encoder.refuse_seen("random", ["aa"])


@pytest.mark.parametrize("name", encoder.shipped())
def test_shipped_encoder_fits_its_card_and_has_seen_no_marrow(name: str, sample: Path) -> None:
    file = encoder.start_file(name)
    card = encoder.card_of(file)
    assert card is not None
    net = models.build(Model(arch="encoder+head", start=name), 21, seed=0)
    assert net.head.in_features == card.architecture["features"]
    encoder.refuse_seen(name, [encoder.sha256_of(p) for p in (sample / "marrow").rglob("*.jpg")])
    with pytest.raises(InputError, match="were used to train"):
        encoder.refuse_seen(name, [encoder.sha256_of(p) for p in (sample / "blood").rglob("*.jpg")])
    assert {"CC BY 4.0"} == {card.data["licence"]}
    assert "Acevedo" in card.data["attribution"]
    assert "no marrow image" in card.statement


@pytest.mark.parametrize(
    ("start", "arch", "width", "message"),
    [
        ("blood", "cytonet", 32, "blood is stagenet"),
        ("blood", "stagenet", 8, "of width 8"),
        ("random", "encoder+head", 8, "no encoder"),
        ("nowhere.safetensors", "encoder+head", 8, "no model file"),
    ],
)
def test_a_plan_whose_start_does_not_fit_is_refused_before_anything_runs(
    start: str, arch: str, width: int, message: str
) -> None:
    overrides = [f"model.start={start}", f"model.arch={arch}", f"model.width={width}"]
    with pytest.raises(InputError, match=message):
        check_plan(load_plan("demo", overrides))
