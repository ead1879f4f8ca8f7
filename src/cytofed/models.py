"""The nets, their weights as one vector, and their files.

Every net is ``head(encoder(images))``: an encoder that turns images into features, and a last
linear layer named ``head``. All normalisation is GroupNorm (Wu & He 2018, arXiv:1803.08494): no
batch statistics and no buffers, so nothing but parameters is trained or exchanged, and an image's
output never depends on the other images of a batch. No operation works in place.

Shapes: B images of a batch, H W pixels, C classes, F features, P parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision.models.resnet as torchvision_resnet
from torch import Tensor, nn
from torch.nn import functional

from cytofed import arrays, model_file
from cytofed.arrays import Float32, Manifest, Role
from cytofed.encoder import Given, check_fits, check_start, start_file
from cytofed.errors import InputError
from cytofed.model_file import ModelInfo
from cytofed.plan import MOST_WIDTH, Model

Trainable = Literal["all", "head", "norms"]

# See _StageEncoder.
_NEVER_TRAINED = "encoder.project."

MOST_PARAMETERS = 1 << 28
"""of a net that a lab takes a plan for: 1 GiB of weights"""

VIEWS = 8
"""forms of a square image: turned by quarters, mirrored"""

# Constants, not statistics of anyone's images: cells on a bright field lie around these.
_MEAN, _DEVIATION = 0.6, 0.25


class Classifier(nn.Module):
    """``head(encoder(images))``: float (B, 3, H, W) in [0, 1] to logits (B, C).

    In training the head sees an image as it is, in predictions the mean of ``views`` of its forms;
    of a frozen encoder it always sees the mean of all 8.
    """

    views: int = 1

    def __init__(self, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, classes)
        # From zero: the logit of a class that every lab masks stays 0, while those of trained
        # classes keep a mean of about 0, so the largest is above it. Random rows could win.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.frozen_encoder = False

    def freeze_encoder(self) -> None:
        """From now on the head alone is trained and exchanged."""
        self.encoder.requires_grad_(False)
        self.frozen_encoder = True
        self.views = VIEWS

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.encoder(normalise(images_B3HW)))
        return logits_BC


def build(model: Model, classes: int, *, seed: int) -> Classifier:
    """The net of a plan with its start weights.

    Guarantees: the same arguments give the same weights; torch's global generator is untouched.
    With ``encoder+head`` the encoder's parameters do not require gradients.

    Errors: InputError when the start file does not fit ``model``; a head for another number of
    classes is replaced by a fresh one, with a warning.
    """
    if model.arch == "encoder+head":
        return _build_on_encoder(model, classes, seed)
    net = _random_net(model.arch, model.width, classes, seed)
    net.views = model.views
    if model.start != "random":
        start, info = model_file.read_model(start_file(model.start))
        check_fits(model.start, info, arch=model.arch, width=model.width)
        _load_start(net, start, source=model.start)
    return net


def shapes(model: Model, classes: int) -> Manifest:
    """What is trained of a plan's net, as ``manifest`` says it, without the net.

    Takes neither memory nor time for weights, whatever the plan asks for, and reads no file but
    the header of an encoder that ships. Errors: as ``build``, as far as names tell; InputError for
    more than ``MOST_PARAMETERS`` weights, frozen ones included.
    """
    net = _without_weights(model, classes)
    if model.arch == "encoder+head":
        net.freeze_encoder()
    return manifest(net, model.trainable)


def numbers(model: Model, classes: int) -> int:
    """How many numbers a model file of a plan's net has, trained or not. As ``shapes``, and its
    errors."""
    net = _without_weights(model, classes)
    return sum(values.numel() for values in net.state_dict().values())


def _without_weights(model: Model, classes: int) -> Classifier:
    """A plan's net, with shapes only. Errors: those of ``shapes``."""
    check_start(model.start, arch=model.arch, width=model.width)
    arch, width = str(model.arch), model.width
    if arch == "encoder+head":
        given = Given.named(model.start)
        if given is None:
            info = model_file.read_info(start_file(model.start))
            given = Given(info.encoder or info.arch, info.width, "")
        arch, width = given.arch, given.width
        if arch not in _ENCODERS or not 1 <= width <= MOST_WIDTH:
            raise InputError(
                f"{model.start}: no encoder {arch} of width {width}",
                hint=f"known: {_known()}, up to width {MOST_WIDTH}",
            )
    with torch.device("meta"):
        net = _random_net(arch, width, classes, seed=0)
    total = sum(parameter.numel() for parameter in net.parameters())
    if total > MOST_PARAMETERS:
        raise InputError(
            f"the plan's net, {arch} of width {width}, has {total} weights, more than "
            f"{MOST_PARAMETERS}",
            hint="ask for a plan with a smaller model.width",
        )
    return net


def images_of(pixels_BHW3: Tensor) -> Tensor:
    """Net input float32 (B, 3, H, W) in [0, 1] of uint8 pixels, channels last in memory."""
    return pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32) / 255.0


def normalise(images_B3HW: Tensor) -> Tensor:
    """What an encoder is fed, of images in [0, 1]."""
    return (images_B3HW - _MEAN) / _DEVIATION


def features(net: nn.Module, images_B3HW: Tensor, *, views: int | None = None) -> Tensor:
    """What the head sees, (B, F), without gradients: the mean over ``views``, else over the net's.

    Layers tell left from right, which says nothing about a cell: it lies on a slide any way round.
    A net that is trained on turned cells learns most of that (on marrow 4 views make macro F1 .819
    .834, as 8 do), a frozen one does not: linear probe on marrow, encoder trained on blood, .755
    against .628 with one view. The mean over the symmetries of the square does not change with them
    (Cohen & Welling 2016, arXiv:1602.07576).
    """
    classifier = _classifier(net)
    seen = islice(views_of(normalise(images_B3HW)), classifier.views if views is None else views)
    with torch.no_grad():
        return torch.stack([classifier.encoder(view) for view in seen]).mean(dim=0)


def views_of(images_B3HW: Tensor) -> Iterator[Tensor]:
    """Square images as they are, turned by quarters, then the same mirrored: all 8 forms."""
    for view in range(VIEWS):
        turned = torch.rot90(images_B3HW, view % 4, (2, 3))
        turned = turned.flip(3) if view >= 4 else turned
        yield turned.contiguous(memory_format=torch.channels_last)


def logits(net: nn.Module, images_B3HW: Tensor, *, views: int | None = None) -> Tensor:
    """Logits (B, C) that predictions are made of, without gradients: of ``features``.

    The head is linear: over views, this is the mean of their logits too.
    """
    with torch.no_grad():
        logits_BC: Tensor = _classifier(net).head(features(net, images_B3HW, views=views))
    return logits_BC


def manifest(net: nn.Module, trainable: Trainable) -> Manifest:
    """The tensors that are trained and exchanged, in the order in which the net defines them.

    ``head``: the last layer. ``norms``: scales and shifts of all GroupNorms, and the head.
    ``all``: everything but a frozen encoder and the ``project`` of a ``stagenet``.
    Errors: InputError when ``norms`` is asked of a net whose encoder is frozen.
    """
    roles: dict[Trainable, frozenset[Role]] = {
        "all": frozenset({"body", "norm", "head"}),
        "head": frozenset({"head"}),
        "norms": frozenset({"norm", "head"}),
    }
    frozen = _classifier(net).frozen_encoder
    if trainable == "norms" and frozen:
        raise InputError(
            "model.trainable is norms, but the encoder of encoder+head is frozen",
            hint="set model.trainable to head, or model.arch to the encoder's own",
        )
    chosen = roles["head" if frozen else trainable]
    return Manifest(
        tuple(
            tensor
            for tensor in _tensors(net)
            if tensor.role in chosen and not tensor.name.startswith(_NEVER_TRAINED)
        )
    )


def flatten(net: nn.Module, tensors: Manifest) -> Float32:
    """The weights of the manifest's tensors as one float32 vector (P,), a copy."""
    parameters = dict(net.named_parameters())
    if not tensors.tensors:
        return np.zeros(0, np.float32)
    parts = [parameters[name].detach().reshape(-1) for name in tensors.names]
    weights_P: Float32 = torch.cat(parts).to("cpu", torch.float32).numpy()
    return weights_P


def load_flat(net: nn.Module, tensors: Manifest, weights_P: Float32) -> None:
    """Copy ``weights_P`` into the net. Errors: InputError when P does not fit or not finite."""
    parameters = dict(net.named_parameters())
    model_file.check_finite("weights", weights_P, source="model weights")
    with torch.no_grad():
        for name, array in tensors.split(weights_P).items():
            parameters[name].copy_(torch.from_numpy(np.array(array, np.float32)))


def tensors_of(net: nn.Module) -> dict[str, Float32]:
    """All weights by name, frozen ones included, as a model file holds them."""
    return {
        name: parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        for name, parameter in net.named_parameters()
    }


def save_model(path: Path, net: nn.Module | Mapping[str, Float32], info: ModelInfo) -> None:
    """Write a net, or its arrays by name, with what is needed to use it."""
    model_file.write_model(path, tensors_of(net) if isinstance(net, nn.Module) else net, info)


def load_model(path: Path) -> tuple[Classifier, ModelInfo]:
    """The net of a model file, ready to predict, and what it is.

    Errors: InputError when the file is damaged, has no head, or names and shapes do not fit its
    architecture.
    """
    weights, info = model_file.read_model(path)
    if not info.codes:
        raise InputError(
            f"{path} is an encoder: it has no classes to predict",
            hint=f"train with model.start={path} first",
        )
    arch = info.encoder if info.arch == "encoder+head" else info.arch
    if arch not in _ENCODERS:
        raise InputError(f"{path}: unknown architecture {arch!r}", hint=f"known: {_known()}")
    net = _random_net(arch, info.width, len(info.codes), seed=0)
    _copy(net, weights, source=str(path))
    if info.arch == "encoder+head":
        net.freeze_encoder()
    else:
        net.views = info.views
    return net.eval(), info


def describe(model: Model) -> tuple[str, str, int]:
    """``arch``, ``encoder`` and ``width`` of the ModelInfo of nets built from ``model``."""
    if model.arch != "encoder+head":
        return model.arch, "", model.width
    _, info = model_file.read_model(start_file(model.start))
    return model.arch, info.encoder or info.arch, info.width


def _classifier(net: nn.Module) -> Classifier:
    if not isinstance(net, Classifier):
        raise TypeError(f"expected a net made by cytofed.models.build, found {type(net).__name__}")
    return net


def _tensors(net: nn.Module) -> list[arrays.Tensor]:
    norms = {
        f"{module_name}.{name}"
        for module_name, module in net.named_modules()
        if isinstance(module, nn.GroupNorm)
        for name, _ in module.named_parameters(recurse=False)
    }

    def role(name: str) -> Role:
        if name.startswith("head."):
            return "head"
        return "norm" if name in norms else "body"

    return [arrays.Tensor(n, tuple(p.shape), role(n)) for n, p in net.named_parameters()]


# --- start weights


def _build_on_encoder(model: Model, classes: int, seed: int) -> Classifier:
    check_start(model.start, arch=model.arch, width=model.width)
    start, info = model_file.read_model(start_file(model.start))
    arch = info.encoder or info.arch
    if arch not in _ENCODERS:
        raise InputError(f"{model.start}: unknown architecture {arch!r}", hint=f"known: {_known()}")
    net = _random_net(arch, info.width, classes, seed)
    _load_start(net, start, source=model.start)
    net.freeze_encoder()
    return net


def _load_start(net: Classifier, start: Mapping[str, Float32], *, source: str) -> None:
    classes = net.head.out_features
    head = start.get("head.weight")
    if head is None or head.shape != net.head.weight.shape:
        if head is not None:
            warnings.warn(
                f"{source} has a head for {len(head)} classes; it is replaced by a fresh one "
                f"for {classes}",
                stacklevel=3,
            )
        own = tensors_of(net)
        start = {**start, "head.weight": own["head.weight"], "head.bias": own["head.bias"]}
    _copy(net, start, source=source)


def _copy(net: nn.Module, weights: Mapping[str, Float32], *, source: str) -> None:
    """Copy all tensors by name. Errors: InputError for a name or shape that does not fit."""
    expected = {tensor.name: tensor.shape for tensor in _tensors(net)}
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected)
    if missing or extra:
        first = f"no tensor {missing[0]}" if missing else f"unknown tensor {extra[0]}"
        raise InputError(
            f"{source}: {first} ({len(missing)} missing, {len(extra)} unknown)",
            hint="the file is of another net than its metadata says",
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise InputError(f"{source}: {name} has shape {weights[name].shape}, expected {shape}")
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name in expected:
            parameters[name].copy_(torch.from_numpy(np.array(weights[name])))


# --- architectures


def _random_net(arch: str, width: int, classes: int, seed: int) -> Classifier:
    # torchvision draws from the global generator: give it one of our own and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        encoder, features_F = _ENCODERS[arch](width)
        net = Classifier(encoder, features_F, classes)
    # Measured on AVX2 and AVX-512: convolutions are up to 6 times faster with channels last.
    return net.to(memory_format=torch.channels_last)


def _group_norm(channels: int) -> nn.GroupNorm:
    """Groups of about 8 channels; one group where that does not divide."""
    groups = channels // 8 if channels % 8 == 0 else 1
    return nn.GroupNorm(groups, channels)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """Two 3x3 convolutions with the norm before each (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm2 = _group_norm(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(functional.relu(self.norm1(images)))
        hidden = self.conv2(functional.relu(self.norm2(hidden)))
        if self.stride > 1:
            images = functional.avg_pool2d(images, self.stride)
        return hidden + self.shortcut(images)  # type: ignore[no-any-return]


class _CytoEncoder(nn.Module):
    """Stem, residual blocks that halve the side, and the maximum over the image as features.

    The maximum, not the mean: a cell is told by what shows up anywhere in it (granules, a fold of
    the nucleus), and the mean of normalised maps is nearly constant. At 30 CPU seconds of training
    on marrow cells it is macro F1 .60 against .47.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _conv(3, width, 3, stride=2)
        self.block1 = _Block(width, 2 * width, 2)
        self.block2 = _Block(2 * width, 4 * width, 2)
        self.norm = _group_norm(4 * width)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        hidden = self.block2(self.block1(self.stem(images_B3HW)))
        features_BF: Tensor = functional.relu(self.norm(hidden)).amax((2, 3))
        return features_BF


class _StageEncoder(nn.Module):
    """Residual stages, and as features a linear map of what each of them shows.

    Of every stage the mean over the image (how much of a texture there is) and the maximum
    (whether it is there at all). Early stages know colour and texture, which other stains and
    diseases share; late ones know the classes they were trained on.

    ``project`` turns these S statistics into F features. Of a pretrained encoder it is their
    whitening over the pretraining images: uncorrelated features of mean 0, a ridge for the rest.
    It is not trained further. Before a linear head it adds nothing that the head can't learn, but
    its inputs are many and large, so that it would bear only a fraction of the others' learning
    rate: with it, four labs are at macro F1 .675 after 8 rounds, without at .765.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (width, 2 * width, 4 * width, 8 * width)
        self.stem = _conv(3, width, 3, stride=2)
        self.blocks = nn.ModuleList(_Block(i, o, 2) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(_group_norm(count) for count in channels[1:])
        self.project = nn.Linear(2 * sum(channels[1:]), stage_features(width))

    def statistics(self, images_B3HW: Tensor) -> Tensor:
        """Mean and maximum of every channel of every stage, (B, S)."""
        hidden, found = self.stem(images_B3HW), []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = block(hidden)
            shown = functional.relu(norm(hidden))
            found += [shown.mean((2, 3)), shown.amax((2, 3))]
        return torch.cat(found, dim=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        features_BF: Tensor = self.project(self.statistics(images_B3HW))
        return features_BF


def stage_features(width: int) -> int:
    """Features of a ``stagenet``: fewer than its statistics, since private heads pay for each."""
    return 12 * width


class _BasicBlock(torchvision_resnet.BasicBlock):  # type: ignore[misc]
    """torchvision's block with the sum and ReLU not in place."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + shortcut)


class _Bottleneck(torchvision_resnet.Bottleneck):  # type: ignore[misc]
    """torchvision's block with the sum and ReLU not in place."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.bn3(self.conv3(hidden)) + shortcut)


def _resnet(block: type[Any], layers: list[int], **options: int) -> tuple[nn.Module, int]:
    net = torchvision_resnet.ResNet(
        block, layers, norm_layer=_group_norm, zero_init_residual=True, **options
    )
    net.relu = nn.ReLU(inplace=False)
    features_F = net.fc.in_features
    net.fc = nn.Identity()
    for module in net.modules():
        if isinstance(module, block):
            module.relu = nn.ReLU(inplace=False)
    return net, features_F


def _cytonet(width: int) -> tuple[nn.Module, int]:
    return _CytoEncoder(width), 4 * width


def _stagenet(width: int) -> tuple[nn.Module, int]:
    return _StageEncoder(width), stage_features(width)


_ENCODERS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "cytonet": _cytonet,
    "stagenet": _stagenet,
    "resnet18": lambda _: _resnet(_BasicBlock, [2, 2, 2, 2]),
    "resnet50": lambda _: _resnet(_Bottleneck, [3, 4, 6, 3]),
    "resnext50_32x4d": lambda _: _resnet(_Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4),
}


def _known() -> str:
    return ", ".join(_ENCODERS)
