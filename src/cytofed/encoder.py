"""Pretrained encoders to start from: where they are, and the card that says what they have seen.

An encoder is a model file without a head, ``NAME.safetensors``, and beside it ``NAME.json``: the
card. Those in the package go by name (``model.start: blood``), so a plan can name one at labs too,
where it may open no file. A file that a coordinator starts from goes by its content, as ``Given``,
and labs get it when they have approved that. The card lists the SHA-256 of every training image: a
private run over one of them would claim a protection that the encoder has already broken, so it
stops.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from cytofed.errors import InputError, VerificationError
from cytofed.files import write_atomically
from cytofed.model_file import ModelInfo, read_info
from cytofed.strict import read_json

FORMAT = "cytofed-encoder-card-1"


@dataclass(frozen=True)
class EncoderCard:
    """What an encoder is and was trained on.

    ``images_sha256``: of each training image's file, sorted. ``data``: counts, licence and
    attribution; ``recipe``: everything that training depends on, the seed included.
    """

    name: str
    statement: str
    model_sha256: str
    architecture: dict[str, Any]
    data: dict[str, Any]
    recipe: dict[str, Any]
    software: dict[str, str]
    measured: list[dict[str, Any]]
    images_sha256: tuple[str, ...] = field(repr=False)

    def write(self, path: Path) -> None:
        """Write the card as JSON, one image hash a line."""
        tree = {"format": FORMAT, **asdict(self)}
        write_atomically(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Given:
    """A start model that a coordinator gives to its labs, as ``ARCH:WIDTH:sha256:HEX``.

    Its content is named, so it is part of the plan and of the plan's hash, and so is what a lab
    must know to tell the price before it has the file.
    """

    arch: str
    width: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.arch}:{self.width}:sha256:{self.sha256}"

    @staticmethod
    def named(start: str) -> Given | None:
        """What ``model.start`` names so; None where it is anything else."""
        found = _GIVEN.fullmatch(start)
        return None if found is None else Given(found[1], int(found[2]), found[3])

    @staticmethod
    def of(file: Path) -> Given:
        """Errors: InputError for what is no model file."""
        info = read_info(file)
        return Given(info.encoder or info.arch, info.width, sha256_of(file))

    def check(self, file: Path) -> None:
        """Raises VerificationError, with both names, unless ``file`` is this very model."""
        found = Given.of(file)
        if found != self:
            raise VerificationError(
                f"the start model is {found}, the plan names {self}",
                hint="nothing is trained from it; ask the coordinator which of them it meant",
            )


_GIVEN = re.compile(r"([a-z0-9_+-]{1,32}):([1-9][0-9]{0,3}):sha256:([0-9a-f]{64})")


def shipped() -> list[str]:
    """Names of the encoders in the package."""
    return sorted(path.stem for path in _folder().glob("*.safetensors"))


def start_file(start: str) -> Path:
    """The model file of a plan's ``model.start``: a shipped name, else a path as it is."""
    return _folder() / f"{start}.safetensors" if is_shipped(start) else Path(start)


def is_shipped(start: str) -> bool:
    """Whether ``start`` is the name of an encoder in the package."""
    return start in shipped()


SIZED = ("cytonet", "stagenet")
"""architectures of which ``model.width`` makes larger and smaller ones"""


def check_start(start: str, *, arch: str, width: int) -> None:
    """Raises InputError where a plan's start model is missing, damaged or of another net."""
    given = Given.named(start)
    if given is not None:
        _check_net(start, given.arch, given.width, arch=arch, width=width)
    elif start != "random":
        check_fits(start, read_info(start_file(start)), arch=arch, width=width)
    elif arch == "encoder+head":
        raise InputError(
            "model.arch is encoder+head, but model.start is random: there is no encoder",
            hint="set model.start=blood, or to a model file; `cytofed pretrain` makes one",
        )


def check_fits(start: str, info: ModelInfo, *, arch: str, width: int) -> None:
    """Raises InputError, with what would fit, where a start model is of another net."""
    _check_net(start, info.encoder or info.arch, info.width, arch=arch, width=width)


def _check_net(start: str, found: str, found_width: int, *, arch: str, width: int) -> None:
    if arch == "encoder+head":
        return  # takes any encoder
    sized = arch in SIZED
    if (found, found_width if sized else None) != (arch, width if sized else None):
        raise InputError(
            f"{start} is {found} of width {found_width}, the plan's model is {arch} "
            f"of width {width}",
            hint=f"set model.arch={found} and model.width={found_width}, or model.start=random",
        )


def card_of(model: Path) -> EncoderCard | None:
    """The card beside a model file, None where there is none.

    Errors: InputError when it is damaged or of another model file.
    """
    path = model.with_suffix(".json")
    try:
        tree = read_json(path.read_text(encoding="utf-8"))
        if tree.pop("format", None) != FORMAT:
            return None  # another tool's JSON of the same name
        card = EncoderCard(**{**tree, "images_sha256": tuple(tree["images_sha256"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the encoder card {path} is damaged: {error}") from None
    if sha256_of(model) != card.model_sha256:
        raise InputError(
            f"{path} is the card of another model than {model.name} beside it",
            hint="take both files from the same `cytofed pretrain`",
        )
    return card


def seen(start: str, images_sha256: Iterable[str]) -> int:
    """How many of these files the start model was trained on, as far as its card tells."""
    if start == "random":
        return 0
    card = card_of(start_file(start))
    return 0 if card is None else len(set(images_sha256).intersection(card.images_sha256))


def refuse_seen(start: str, images_sha256: Iterable[str]) -> None:
    """Raises InputError, with the count, where the start model was trained on one of the images."""
    images = set(images_sha256)
    if count := seen(start, images):
        raise InputError(
            f"{count} of {len(images)} images were used to train the encoder {start}: "
            "privacy.unit protects nobody whose images are in the start model already",
            hint="set model.start=random, or leave these images out",
        )


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file. Errors: InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _folder() -> Path:
    return Path(str(resources.files("cytofed"))) / "encoders"
