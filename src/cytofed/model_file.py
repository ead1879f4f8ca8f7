"""Model files: safetensors with the few facts that predictions need. No torch, no pickle.

The metadata names architecture, width, label scheme with its codes, scale and plan, so a file
alone is enough for ``cytofed evaluate`` and ``cytofed predict``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cytofed.arrays import Float32
from cytofed.errors import InputError
from cytofed.tensor_file import write_tensors

FORMAT = "cytofed-model-1"


@dataclass(frozen=True)
class ModelInfo:
    """What a model is: enough to rebuild the net and to feed it.

    ``codes``: the classes in the order of the outputs. ``encoder``: architecture of the encoder
    where ``arch`` is ``encoder+head``, else empty. ``views``: forms of an image that predictions
    are means over. ``lineage``: what it was trained from (``cytofed.lineage``), empty in files that
    do not say.
    """

    arch: str
    width: int
    scheme: str
    codes: tuple[str, ...]
    size_px: int
    field_um: float
    plan_sha256: str = ""
    encoder: str = ""
    views: int = 1
    lineage: str = ""

    def to_metadata(self) -> dict[str, str]:
        """As text values, which is all that safetensors keeps."""
        return {
            "format": FORMAT,
            "architecture": self.arch,
            "width": str(self.width),
            "encoder": self.encoder,
            "label_scheme": self.scheme,
            "codes": " ".join(self.codes),
            "size_px": str(self.size_px),
            "field_um": repr(self.field_um),
            "plan_sha256": self.plan_sha256,
            "views": str(self.views),
            **({"lineage": self.lineage} if self.lineage else {}),
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], *, source: str) -> ModelInfo:
        """Inverse of ``to_metadata``. Errors: InputError when it is not of a cytofed model."""
        found = metadata.get("format", "none")
        if found != FORMAT:
            raise InputError(
                f"{source}: expected model format {FORMAT}, found {found}",
                hint="take a model.safetensors that cytofed wrote",
            )
        try:
            views = int(metadata.get("views", "1"))
            if views not in (1, 4, 8):
                raise ValueError(f"views is {views}, expected 1, 4 or 8")
            return ModelInfo(
                arch=metadata["architecture"],
                width=int(metadata["width"]),
                scheme=metadata["label_scheme"],
                codes=tuple(metadata["codes"].split()),
                size_px=int(metadata["size_px"]),
                field_um=float(metadata["field_um"]),
                plan_sha256=metadata["plan_sha256"],
                encoder=metadata["encoder"],
                views=views,
                lineage=metadata.get("lineage", ""),
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{source}: its metadata is damaged: {error!r}") from None


def write_model(path: Path, arrays: Mapping[str, Float32], info: ModelInfo) -> None:
    """Write ``path`` atomically: it is the old file or the new one, never a part.

    Errors: InputError when a tensor has NaN or infinite values.
    """
    for name, array in arrays.items():
        check_finite(name, array, source=str(path))
    float32 = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    write_tensors(path, float32, info.to_metadata())


def read_model(path: Path, *, skip: Container[str] = ()) -> tuple[dict[str, Float32], ModelInfo]:
    """The float32 tensors (but for those to ``skip``) and the facts of a model file.

    Errors: InputError when it is missing, damaged, not a cytofed model, or not finite.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        names = [name for name in file.keys() if name not in skip]  # noqa: SIM118
        arrays = {name: file.get_tensor(name) for name in names}
    info = ModelInfo.from_metadata(metadata, source=str(path))
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InputError(f"{path}: tensor {name} is {array.dtype}, expected float32")
        check_finite(name, array, source=str(path))
    return arrays, info


def read_info(path: Path) -> ModelInfo:
    """The facts of a model file alone. Errors: InputError as ``read_model`` has them."""
    with _opened(path) as file:
        return ModelInfo.from_metadata(file.metadata() or {}, source=str(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"no model file {path}") from None
    except (OSError, safetensors.SafetensorError, TypeError) as error:
        raise InputError(f"cannot read model file {path}: {error}") from None


def check_finite(name: str, array: Float32, *, source: str) -> None:
    """Raises InputError, with the count, where ``array`` has NaN or infinite values."""
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise InputError(f"{source}: tensor {name} has {bad} values that are NaN or infinite")
