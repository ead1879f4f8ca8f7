"""``cytofed pretrain``: an encoder from public images, for plans to start from.

Three objectives over strongly changed views of each image:

- ``supervised``: cross-entropy; a coarse label counts as the sum over its set.
- ``contrastive``: SimCLR (Chen et al. 2020, arXiv:2002.05709): two views of one image are alike,
  those of other images are not. Needs no labels.
- ``both``: their sum. Labels alone let go of what tells cells of one class apart, and that is what
  other classes are told by elsewhere (Islam et al. 2021, arXiv:2103.13517).

The rate is constant and falls over the last part; the result is a moving average of the weights.
At the end the features are whitened over the pretraining images: public statistics, so a private
head may use them. All randomness follows from the seed and the number of the step, so a run that
was interrupted ends with the same weights.

Shapes: N images, B images of a batch, V views, C classes, S statistics, F features, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from cytofed import models
from cytofed.arrays import Float32
from cytofed.client import training
from cytofed.client.cache import default_cache_dir
from cytofed.client.cells import Cells, open_cells
from cytofed.client.views import Changes, views
from cytofed.encoder import EncoderCard, sha256_of
from cytofed.errors import CytofedError, InputError
from cytofed.files import write_atomically
from cytofed.labels import LabelMap, load_map, load_scheme
from cytofed.model_file import ModelInfo
from cytofed.plan import Model

Objective = Literal["supervised", "contrastive", "both"]

_FRAME = 5 / 3
"""field of a frame over field of a view: room to turn, shift and zoom out"""
_CLIP = 5.0
_DEVIATION = 0.25
"""of a feature: some hundred of them have a norm of 4 to 7 then, which suits both a learning rate
of .01 to .1 for net and head together and a private head's max_norm of 1"""
_EMBEDDING = 128


@dataclass(frozen=True)
class Recipe:
    """All that training depends on, but for the images."""

    objective: Objective = "both"
    width: int = 32
    size_px: int = 64
    field_um: float = 21.6
    epochs: float = 10.0
    batch: int = 48
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    falling: float = 0.3
    """share of all steps, the last ones, over which the rate falls to 0"""
    label_smoothing: float = 0.1
    contrast: float = 0.5
    """weight of the contrastive loss beside the supervised one"""
    temperature: float = 0.2
    ema: float = 0.998
    ridge: float = 0.03
    """added to the variance of each whitened direction, as a share of their mean"""
    changes: Changes = field(default_factory=Changes)
    seed: int = 0

    def steps(self, images: int) -> int:
        """Steps of the whole run."""
        return max(1, round(self.epochs * images / min(self.batch, images)))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        return self.lr * rise * min(1.0, (steps - step) / max(1.0, self.falling * steps))


@dataclass(frozen=True)
class Request:
    """What a pretraining is asked to do. The texts go to the card."""

    data: tuple[Path, ...]
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    scheme: str = "bone-marrow-21"
    labels: tuple[str, ...] = ()
    licence: str = "not stated"
    attribution: str = "not stated"
    note: str = ""
    resume: bool = False
    cache_dir: Path | None = None
    checkpoint_s: float = 60.0


def pretrain(request: Request, tell: Callable[[str], None] = print) -> EncoderCard:
    """Train an encoder, write it and its card, and return the card.

    ``tell`` gets a line at each checkpoint. KeyboardInterrupt passes through; a later call with
    ``resume`` goes on from the last checkpoint.
    Errors: InputError for data or files that cannot be used.
    """
    checkpoint = request.out.with_suffix(".unfinished")
    if request.out.suffix != ".safetensors":
        raise InputError(f"--out is {request.out}, expected a name that ends in .safetensors")
    if request.out.exists():
        raise InputError(f"{request.out} is there already", hint="choose another --out")
    if checkpoint.exists() and not request.resume:
        raise InputError(
            f"{checkpoint} holds an unfinished run",
            hint="add --resume to go on, or delete the file",
        )
    recipe = request.recipe
    frames = _open(request, 2 * recipe.size_px, _FRAME * recipe.field_um)
    with training.steady(1):
        state = _State(recipe, frames)
        if checkpoint.exists():
            state.load(checkpoint)
        elif request.resume:
            raise InputError(f"{checkpoint} is not there: nothing to resume", hint="omit --resume")
        _train(state, frames, request, checkpoint, tell)
        whiten(state.averaged().encoder, _open(request, recipe.size_px, recipe.field_um), recipe)
        card = _finish(state, frames, request)
    checkpoint.unlink(missing_ok=True)
    return card


def _open(request: Request, size_px: int, field_um: float) -> Cells:
    maps: list[LabelMap | None] = [load_map(name) for name in request.labels]
    return open_cells(
        request.data,
        load_scheme(request.scheme),
        maps=maps or None,
        size_px=size_px,
        field_um=field_um,
        cache_dir=request.cache_dir or default_cache_dir(),
    )


# --- training


class _Net(nn.Module):
    """An encoder with what only training needs: a classifier and an embedding."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        model = Model(arch="stagenet", width=recipe.width)
        self.encoder = models.build(model, classes, seed=recipe.seed).encoder
        features_F = models.stage_features(recipe.width)
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(recipe.seed)
            self.classify = nn.Linear(features_F, classes)
            self.embed = nn.Sequential(
                nn.Linear(features_F, features_F), nn.ReLU(), nn.Linear(features_F, _EMBEDDING)
            )

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BF = functional.relu(self.encoder(models.normalise(images_B3HW)))
        return self.classify(hidden_BF), self.embed(hidden_BF)


class _State:
    """Everything that a checkpoint holds: weights, their average, optimizer, number of steps."""

    def __init__(self, recipe: Recipe, cells: Cells) -> None:
        self.recipe, self.step = recipe, 0
        self.images = _digest(image_hashes(cells))
        self.net = _Net(recipe, cells.targets_NC.shape[1])
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        kernels = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            recipe.lr,
            fused=True,
        )
        # Made here, not at the first step: parameters that an objective leaves out have them too.
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def save(self, path: Path) -> None:
        """Write all of it, without pickle."""
        tensors = {}
        for k, parameter in enumerate(self.parameters):
            moments = self.optimizer.state[parameter]
            tensors[f"weights.{k}"] = parameter.detach()
            tensors[f"average.{k}"] = self.average[k]
            tensors |= {f"{name}.{k}": moment for name, moment in moments.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, safetensors.torch.save(tensors, metadata=self._facts()))

    def load(self, path: Path) -> None:
        """Go on where ``save`` was. Errors: InputError for another recipe or other images."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"cannot read {path}: {error}", hint="delete it") from None
        for key, now in self._facts().items():
            if key != "step" and facts.get(key) != now:
                raise InputError(
                    f"{path} is of another run: its {key} was {facts.get(key)}, is {now}",
                    hint="resume with the same data and options, or delete the file",
                )
        self.step = int(facts["step"])
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"weights.{k}"])
                self.average[k].copy_(tensors[f"average.{k}"])
                for name, moment in self.optimizer.state[parameter].items():
                    moment.copy_(tensors[f"{name}.{k}"])

    def _facts(self) -> dict[str, str]:
        recipe = json.dumps(asdict(self.recipe), sort_keys=True)
        return {"step": str(self.step), "images": self.images, "recipe": recipe}

    def averaged(self) -> _Net:
        """The net with the average of its weights."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=True):
                parameter.copy_(mean)
        return self.net


def _train(
    state: _State,
    cells: Cells,
    request: Request,
    checkpoint: Path,
    tell: Callable[[str], None],
) -> None:
    recipe, steps = state.recipe, state.recipe.steps(len(cells))
    place = torch.device("cpu")
    precision = training.choose_precision("auto", place)
    loss_of = _make_loss(recipe, cells)
    copies = 1 if recipe.objective == "supervised" else 2
    saved_s, losses = time.monotonic(), []
    state.net.train()
    while state.step < steps:
        index_B = _batch(recipe, len(cells), state.step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
        frames = torch.from_numpy(cells.images(index_B))
        images = torch.cat(
            [
                views(frames, recipe.size_px, 1 / _FRAME, recipe.changes, generator)
                for _ in range(copies)
            ]
        ).contiguous(memory_format=torch.channels_last)
        with training.autocast(place, precision):
            logits, embedded = state.net(images)
        targets = torch.from_numpy(np.tile(cells.targets_NC[index_B], (copies, 1)))
        loss = loss_of(logits.float(), embedded.float(), targets)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise CytofedError(f"the loss is {losses[-1]} at step {state.step + 1} of {steps}")
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(state.parameters, _CLIP)
        for group in state.optimizer.param_groups:
            group["lr"] = recipe.rate(state.step, steps)
        state.optimizer.step()
        state.step += 1
        _average(state)
        if time.monotonic() - saved_s > request.checkpoint_s or state.step == steps:
            state.save(checkpoint)
            tell(f"step {state.step} of {steps}, loss {np.mean(losses):.3f}")
            saved_s, losses = time.monotonic(), []


def _average(state: _State) -> None:
    # Young averages forget the random start sooner.
    decay = min(state.recipe.ema, (state.step + 1) / (state.step + 10))
    with torch.no_grad():
        for mean, parameter in zip(state.average, state.parameters, strict=True):
            mean.lerp_(parameter, 1 - decay)


def _batch(recipe: Recipe, images: int, step: int) -> npt.NDArray[np.int64]:
    """The images of a step: each epoch is a permutation, of which full batches are taken."""
    size = min(recipe.batch, images)
    epoch, place = divmod(step, images // size)
    order = np.random.default_rng((recipe.seed, epoch)).permutation(images)
    return np.sort(order[place * size : (place + 1) * size])


def _make_loss(recipe: Recipe, cells: Cells) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    present_C = torch.from_numpy(cells.targets_NC.any(axis=0))

    def supervised(logits: Tensor, targets: Tensor) -> Tensor:
        return training.loss_on_sets(
            logits, targets, present_C, label_smoothing=recipe.label_smoothing
        )

    def loss(logits: Tensor, embedded: Tensor, targets: Tensor) -> Tensor:
        if recipe.objective == "supervised":
            return supervised(logits, targets)
        contrast = contrastive_loss(embedded, temperature=recipe.temperature)
        if recipe.objective == "contrastive":
            return contrast
        return supervised(logits, targets) + recipe.contrast * contrast

    return loss


def contrastive_loss(embedded_VE: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of 2B views, the second of image i at B + i (Chen et al. 2020)."""
    unit_VE = functional.normalize(embedded_VE, dim=1)
    alike_VV = (unit_VE @ unit_VE.T / temperature).fill_diagonal_(float("-inf"))
    count = len(unit_VE)
    partner_V = (torch.arange(count) + count // 2) % count
    return functional.cross_entropy(alike_VV, partner_V)


# --- what leaves


def whiten(encoder: nn.Module, cells: Cells, recipe: Recipe, *, images: int = 4096) -> None:
    """Set ``encoder.project`` to the whitening of its statistics over ``cells``, in place.

    Statistics are means over the views that a frozen encoder sees. Features are their F strongest
    principal directions, each scaled to a deviation of about a quarter over these images; a ridge
    keeps directions in which they hardly differ from being blown up.
    """
    rng = np.random.default_rng((recipe.seed, 1))
    chosen = np.sort(rng.permutation(len(cells))[:images])
    parts = []
    with torch.no_grad():
        for start in range(0, len(chosen), 256):
            pixels = torch.from_numpy(cells.images(chosen[start : start + 256]))
            views = models.views_of(models.normalise(models.images_of(pixels)))
            found = torch.stack([encoder.statistics(view) for view in views])  # type: ignore[operator]
            parts.append(found.mean(dim=0).double())
    statistics_NS = torch.cat(parts)
    mean_S = statistics_NS.mean(dim=0)
    variance_S, directions_SS = torch.linalg.eigh(torch.cov(statistics_NS.T))
    project = encoder.get_submodule("project")
    assert isinstance(project, nn.Linear)
    strongest = torch.arange(len(mean_S) - 1, len(mean_S) - 1 - project.out_features, -1)
    variance_F = variance_S[strongest].clamp(min=0)
    scale_F = _DEVIATION * (variance_F + recipe.ridge * variance_F.mean() + 1e-12).rsqrt()
    weight_FS = scale_F[:, None] * directions_SS[:, strongest].T
    with torch.no_grad():
        project.weight.copy_(weight_FS)
        project.bias.copy_(-weight_FS @ mean_S)


def _finish(state: _State, cells: Cells, request: Request) -> EncoderCard:
    recipe = request.recipe
    arrays: dict[str, Float32] = {
        f"encoder.{name}": parameter.detach().contiguous().numpy()
        for name, parameter in state.net.encoder.named_parameters()
    }
    info = ModelInfo(
        arch="stagenet",
        width=recipe.width,
        scheme=request.scheme,
        codes=(),
        size_px=recipe.size_px,
        field_um=recipe.field_um,
    )
    models.save_model(request.out, arrays, info)
    hashes = image_hashes(cells)
    card = EncoderCard(
        name=request.out.stem,
        statement=(
            f"Its weights come from the {len(hashes)} images listed here and from no other image. "
            + request.note
        ).strip(),
        model_sha256=sha256_of(request.out),
        architecture={
            "arch": "stagenet",
            "width": recipe.width,
            "features": models.stage_features(recipe.width),
            "parameters": int(sum(array.size for array in arrays.values())),
            "size_px": recipe.size_px,
            "field_um": recipe.field_um,
        },
        data={
            "images": len(cells),
            "classes": _classes(cells, request.scheme),
            "licence": request.licence,
            "attribution": request.attribution,
        },
        recipe={**asdict(recipe), "steps": state.step},
        software={"python": platform.python_version(), "torch": torch.__version__},
        measured=[],
        images_sha256=tuple(hashes),
    )
    card.write(request.out.with_suffix(".json"))
    return card


def _classes(cells: Cells, scheme: str) -> dict[str, int]:
    codes = load_scheme(scheme).codes
    sets = (
        "|".join(code for code, on in zip(codes, row, strict=True) if on)
        for row in cells.targets_NC.tolist()
    )
    return dict(sorted(Counter(sets).items()))


def image_hashes(cells: Cells) -> list[str]:
    """Hex SHA-256 of every image's file, sorted."""
    return sorted(cells.file_sha256())


def _digest(hashes: list[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
