"""``cytofed audit --attacks``: an image rebuilt from what a lab sends, with pictures.

Gradient inversion of a layer that sees pixels, in closed form (Phong et al., IEEE TIFS 2018;
Geiping et al., NeurIPS 2020, arXiv:2003.14053, proposition 3.1): the gradient of a neuron's weights
over that of its bias is the image, to rounding. A small net of one hidden layer stands in for the
run's: against a net that keeps more of an image hidden, only the attack would be weaker. Images are
those that ship in the package, norm and noise those of the run. It shows what each protection is
for; it is no evidence about a run.

Shapes: N images, H W pixels, D = 3 H W, U hidden neurons.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cytofed.plan import Plan, load_plan
from cytofed.privacy.terms import terms_of

SIZE_PX = 48
SHOWN = 4
NEURONS = 64
IN_SUM = 24
"""images behind a secure sum: three labs of eight patients with one cell each"""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sent:
    """What leaves of a step on one image: gradients of the pixel layer, (U, D) and (U,)."""

    weight_UD: Floats
    bias_U: Floats


def invert(sent: Sent) -> Floats:
    """The image (D,) that explains the gradient best: rows over biases, weighted by certainty.

    Of a plain gradient it is the image itself; of a sum, a mixture of the images.
    """
    image_D: Floats = sent.bias_U @ sent.weight_UD / max(float(sent.bias_U @ sent.bias_U), 1e-20)
    return image_D


def likeness(found_D: Floats, truth_D: Floats, mean_D: Floats) -> float:
    """Correlation of what sets an image apart from the mean of all; 1 is the image itself."""
    a, b = found_D - mean_D, truth_D - mean_D
    return float(np.corrcoef(a, b)[0, 1])


def attack(plan: Plan) -> dict[str, Any]:
    """The attacks at the plan's norm and noise, on images that ship in the package."""
    from cytofed.simulations.simulate import sample_folder

    return {"inversion": invert_images(plan, *sample_images(sample_folder() / "marrow"))}


def invert_images(
    plan: Plan, images_ND: Floats, classes_N: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Rebuild the first ``SHOWN`` images from what is sent; pictures as data URIs."""
    if plan.privacy.unit == "none":  # the protections that a plan would have by default
        plan = load_plan("demo", ["privacy.unit=patient"])
    terms = terms_of(plan)
    assert terms is not None
    max_norm, sigma = terms.max_norm, terms.training.sigma
    gradients = [
        _gradient(images_ND[n : n + 1], classes_N[n : n + 1]) for n in range(len(images_ND))
    ]
    mean_D: Floats = images_ND.mean(0)
    noise = np.random.default_rng()
    ways: dict[str, list[Floats]] = {
        "plain update": [],
        "clipped": [],
        "clipped and noised": [],
        "secure sum": [],
    }
    for n in range(SHOWN):
        clipped = _scaled(gradients[n], _factor(gradients[n], max_norm))
        others = [gradients[(n + k) % len(gradients)] for k in range(IN_SUM)]
        ways["plain update"].append(invert(gradients[n]))
        ways["clipped"].append(invert(clipped))
        ways["clipped and noised"].append(invert(_noised(clipped, sigma * max_norm, noise)))
        ways["secure sum"].append(invert(_sum([_scaled(g, _factor(g, max_norm)) for g in others])))
    return {
        "images": [_picture(images_ND[n]) for n in range(SHOWN)],
        "in_sum": IN_SUM,
        "sigma": sigma,
        "max_norm": max_norm,
        "ways": [
            {
                "way": way,
                "pictures": [_picture(found_D) for found_D in found],
                "likeness": float(
                    np.mean([likeness(f, images_ND[n], mean_D) for n, f in enumerate(found)])
                ),
            }
            for way, found in ways.items()
        ],
    }


def _gradient(image_ND: Floats, class_N: npt.NDArray[np.int64]) -> Sent:
    """Of a net with one hidden layer and random weights, as a plain step on one image sends it."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    size = image_ND.shape[1]
    weight_UD = torch.randn(NEURONS, size, generator=generator) / size**0.5
    weight_UD.requires_grad_()
    bias_U = torch.zeros(NEURONS, requires_grad=True)
    head_CU = torch.randn(8, NEURONS, generator=generator) / NEURONS**0.5
    hidden_NU = torch.relu(torch.from_numpy(image_ND) @ weight_UD.T + bias_U)
    loss = nn.functional.cross_entropy(hidden_NU @ head_CU.T, torch.from_numpy(class_N))
    weight, bias = torch.autograd.grad(loss, [weight_UD, bias_U])
    return Sent(weight.numpy(), bias.numpy())


def _factor(sent: Sent, max_norm: float) -> float:
    norm = float(np.hypot(np.linalg.norm(sent.weight_UD), np.linalg.norm(sent.bias_U)))
    return min(1.0, max_norm / (norm + 1e-6))


def _scaled(sent: Sent, factor: float) -> Sent:
    return Sent(np.float32(factor) * sent.weight_UD, np.float32(factor) * sent.bias_U)


def _noised(sent: Sent, deviation: float, noise: np.random.Generator) -> Sent:
    parts = [
        (part + deviation * noise.standard_normal(part.shape)).astype(np.float32)
        for part in (sent.weight_UD, sent.bias_U)
    ]
    return Sent(*parts)


def _sum(sent: list[Sent]) -> Sent:
    weight_UD: Floats = np.sum([one.weight_UD for one in sent], axis=0)
    bias_U: Floats = np.sum([one.bias_U for one in sent], axis=0)
    return Sent(weight_UD, bias_U)


def _picture(image_D: Floats) -> str:
    """A PNG as data URI, stretched to its own range where it leaves [0, 1]."""
    low, high = float(image_D.min()), float(image_D.max())
    if low < -0.05 or high > 1.05:
        image_D = (image_D - low) / max(high - low, 1e-9)
    pixels = np.rint(255 * np.clip(image_D, 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(SIZE_PX, SIZE_PX, 3)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_images(folder: Path) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Images of ``folder/CLASS/*.jpg`` as (N, D) in [0, 1] and their classes, taken in turn."""
    by_class = [sorted(sub.iterdir()) for sub in sorted(folder.iterdir()) if sub.is_dir()][:8]
    paths = [(path, c) for rank in zip(*by_class, strict=False) for c, path in enumerate(rank)]
    images = []
    for path, _ in paths[: max(2 * IN_SUM, SHOWN)]:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE_PX, SIZE_PX))
        images.append(np.asarray(small, np.float32).ravel() / 255)
    return np.stack(images), np.array([c for _, c in paths[: len(images)]], np.int64)
