"""``cytofed audit --attacks``: images rebuilt from what a lab sends, with pictures.

Gradient inversion of a layer that sees pixels, in closed form (Phong et al., IEEE TIFS 2018;
Geiping et al., NeurIPS 2020, arXiv:2003.14053, proposition 3.1): the gradient of a neuron's weights
over that of its bias is the image, to rounding; of a sum over images, it is a mixture of those that
the neuron reacts to, and of one image alone where it reacts to no other (Fowl et al., "Robbing the
Fed", ICLR 2022, arXiv:2110.13057). A small net of one hidden layer stands in for the run's: against
a net that keeps more of an image hidden, only the attack would be weaker. Images are those that
ship in the package, norm and noise those of the run. It shows what each protection is for; it is no
evidence about a run.

Shapes: N images, H W pixels, D = 3 H W, U hidden neurons.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
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
LABS_IN_SUM = 3
IMAGES = 64
RECOGNISABLE = 0.8
"""likeness from which on a cell is recognised"""

Floats = npt.NDArray[np.float32]
Json = Mapping[str, Any]


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


def best_of(sent: Sent, truth_D: Floats, mean_D: Floats) -> tuple[Floats, float]:
    """The picture nearest to the truth among what an attacker gets, and its likeness.

    One picture of each neuron, and that of ``invert``. Chosen by who knows the truth: an upper
    bound of what a patient attacker finds.
    """
    bias_U = np.where(np.abs(sent.bias_U) < 1e-12, np.float32(1e-12), sent.bias_U)
    pictures = [*(sent.weight_UD / bias_U[:, None]), invert(sent)]
    pictures = [picture for picture in pictures if np.ptp(picture) > 0]
    scores = [likeness(picture, truth_D, mean_D) for picture in pictures]
    best = int(np.argmax(scores))
    return pictures[best], scores[best]


def attack(plan: Plan, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The attacks on what is sent, on images that ship in the package.

    ``inversion``: at the plan's norm and noise; ``seat``, ``collusion``: see
    ``cytofed.simulations.seat``.
    """
    from cytofed.simulations.seat import sit
    from cytofed.simulations.simulate import sample_folder

    images_ND, classes_N = sample_images(sample_folder() / "marrow")
    gradients = gradients_of(images_ND, classes_N)
    tell("attacks: images from updates")
    inversion = invert_images(plan, images_ND, gradients)
    tell("attacks: the coordinator's seat")
    return {"inversion": inversion, **sit(images_ND, gradients)}


def invert_images(plan: Plan, images_ND: Floats, gradients: Sequence[Sent]) -> dict[str, Any]:
    """Rebuild the first ``SHOWN`` images from what is sent; pictures as data URIs.

    ``likeness``: of the best picture (``best_of``); ``mixture``: of the one that needs no choice;
    ``recognised``: share of images whose best picture is at least ``RECOGNISABLE``.
    ``of_plan`` marks what a lab of this plan sends, or its coordinator gets.
    """
    own = _way_of(plan)
    if plan.privacy.unit == "none":  # the protections that a plan would have by default
        plan = load_plan("demo", ["privacy.unit=patient"])
    terms = terms_of(plan)
    assert terms is not None
    max_norm, deviation = terms.max_norm, terms.training.sigma * terms.max_norm
    noise = np.random.default_rng()
    clipped = [clip(gradient, max_norm) for gradient in gradients]
    all_noise = deviation * LABS_IN_SUM**0.5  # each lab adds its own

    def summed(sent: Sequence[Sent], n: int) -> Sent:
        return add([sent[(n + k) % len(sent)] for k in range(IN_SUM)])

    ways: dict[str, Callable[[int], Sent]] = {
        "plain update": lambda n: gradients[n],
        "clipped": lambda n: clipped[n],
        "clipped and noised": lambda n: _noised(clipped[n], deviation, noise),
        "secure sum": lambda n: summed(gradients, n),
        "secure sum, clipped and noised": lambda n: _noised(summed(clipped, n), all_noise, noise),
    }
    mean_D: Floats = images_ND.mean(0)
    rows = []
    for way, sent_of in ways.items():
        sent = [sent_of(n) for n in range(SHOWN)]
        best = [best_of(s, images_ND[n], mean_D) for n, s in enumerate(sent)]
        mixed = [likeness(invert(s), images_ND[n], mean_D) for n, s in enumerate(sent)]
        rows.append(
            {
                "way": way,
                "of_plan": way == own,
                "pictures": [picture_of(found_D) for found_D, _ in best],
                "likeness": float(np.mean([score for _, score in best])),
                "recognised": float(np.mean([score >= RECOGNISABLE for _, score in best])),
                "mixture": float(np.mean(mixed)),
            }
        )
    return {
        "images": [picture_of(images_ND[n]) for n in range(SHOWN)],
        "in_sum": IN_SUM,
        "sigma": terms.training.sigma,
        "max_norm": max_norm,
        "recognisable": RECOGNISABLE,
        "ways": rows,
    }


def _way_of(plan: Plan) -> str:
    private, secure = plan.privacy.unit != "none", plan.secure_aggregation.enabled
    if secure:
        return "secure sum, clipped and noised" if private else "secure sum"
    return "clipped and noised" if private else "plain update"


def gradients_of(images_ND: Floats, classes_N: npt.NDArray[np.int64]) -> list[Sent]:
    """What a plain step on each image alone sends."""
    from cytofed.client.training import steady

    with steady(1):  # too small to share
        return [
            _gradient(images_ND[n : n + 1], classes_N[n : n + 1]) for n in range(len(images_ND))
        ]


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


def clip(sent: Sent, max_norm: float) -> Sent:
    """The same direction, at most ``max_norm`` long."""
    norm = float(np.hypot(np.linalg.norm(sent.weight_UD), np.linalg.norm(sent.bias_U)))
    factor = np.float32(min(1.0, max_norm / (norm + 1e-6)))
    return Sent(factor * sent.weight_UD, factor * sent.bias_U)


def _noised(sent: Sent, deviation: float, noise: np.random.Generator) -> Sent:
    parts = [
        (part + deviation * noise.standard_normal(part.shape)).astype(np.float32)
        for part in (sent.weight_UD, sent.bias_U)
    ]
    return Sent(*parts)


def add(sent: Sequence[Sent]) -> Sent:
    """The sum over images, or labs."""
    weight_UD: Floats = np.sum([one.weight_UD for one in sent], axis=0)
    bias_U: Floats = np.sum([one.bias_U for one in sent], axis=0)
    return Sent(weight_UD, bias_U)


def picture_of(image_D: Floats) -> str:
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
    for path, _ in paths[:IMAGES]:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE_PX, SIZE_PX))
        images.append(np.asarray(small, np.float32).ravel() / 255)
    return np.stack(images), np.array([c for _, c in paths[: len(images)]], np.int64)


# --- in words


def lines(found: Json) -> list[str]:
    """One line for each way of sending, seat and number of colluding labs."""
    told = []
    for way in found["inversion"]["ways"]:
        mark = " (this plan)" if way["of_plan"] else ""
        told.append(
            f"image rebuilt from {way['way']}{mark} | likeness {way['likeness']:.2f} of 1 | "
            + recognised(way)
        )
    seat = found["seat"]
    for row in seat["rows"]:
        told.append(
            f"coordinator's seat, {row['way']}: {row['holds']} | likeness {row['likeness']:.2f}, "
            f"{matches(row)} | {recognised(row)}"
        )
    collusion = found["collusion"]
    one, several = collusion["curves"]
    for row, other in zip(one["rows"], several["rows"], strict=True):
        left = "a lab's own update" if row["opened"] else f"the sum of {row['left']} labs"
        told.append(
            f"{row['colluding']} of {collusion['labs']} labs collude: {left} | likeness "
            f"{row['likeness']:.2f} ({other['likeness']:.2f} for {several['cells']} images a "
            f"lab), {matches(row)} | {recognised(row)}"
        )
    told.append(
        f"shares of {collusion['threshold']} of {collusion['labs']} labs open a lab's upload; a "
        f"coordinator that lies about who is alive needs {collusion['lying_from']}"
    )
    return told


def recognised(row: Json) -> str:
    """How many of the images are recognised in the best picture of each."""
    return f"{row['recognised']:.0%} of cells recognisable"


def matches(row: Json) -> str:
    """The matching test of one row."""
    return f"matched to its lab {row['matched']:.0%}, to any in it {row['took_part']:.0%}"
