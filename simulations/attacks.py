"""``cytofed audit --attacks``: images rebuilt from what a lab sends, with pictures.

Gradient inversion of a layer that sees pixels, in closed form (Phong et al., IEEE TIFS 2018;
Geiping et al., NeurIPS 2020, arXiv:2003.14053, proposition 3.1): the gradient of a neuron's weights
over that of its bias is the image, to rounding; of a sum over images, it is a mixture of those that
the neuron reacts to, and of one image alone where it reacts to no other (Fowl et al., "Robbing the
Fed", ICLR 2022, arXiv:2110.13057). A small net of one hidden layer stands in for the run's: against
a net that keeps more of an image hidden, only the attack would be weaker.

Three parts: one step on one image, with norm and noise of the run, which shows what each protection
is for; sums of such steps over ever more images; and round 1 of the run itself
(``cytofed.simulations.replay``). The first two take images that ship in the package.

Shapes: N images, H W pixels, D = 3 H W, U hidden neurons.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cytofed.errors import CytofedError
from cytofed.privacy.terms import Terms

SIZE_PX = 48
SHOWN = 4
NEURONS = 64
IMAGES = 64
"""that are attacked; as many others are the control"""
SUMS = (1, 3, 8, 24, 64)
"""how many images are behind a sum"""
GROUPS = 8
"""sums of each size that figures are means over"""
LABS_IN_SUM = 3
"""whose noise is in a noised sum"""
RECOGNISABLE = 0.8
"""likeness from which on a cell is recognised"""

Floats = npt.NDArray[np.float32]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Sent:
    """What leaves of a step on one image: gradients of the pixel layer, (U, D) and (U,)."""

    weight_UD: Floats
    bias_U: Floats


def pictures(weight_UD: Floats, bias_U: Floats) -> Floats:
    """What a layer's part of an update shows, (U + 1, D): a picture of each neuron, and one of all.

    A row over its bias is a mean of the images that the neuron reacted to. The last picture weighs
    all neurons by their bias: of one image alone it is that image.
    """
    bias_U = np.where(np.abs(bias_U) < 1e-12, np.float32(1e-12), bias_U)
    mixture_D = bias_U @ weight_UD / max(float(bias_U @ bias_U), 1e-20)
    return np.vstack([weight_UD / bias_U[:, None], mixture_D]).astype(np.float32)


def likenesses(pictures_MD: Floats, images_ND: Floats, mean_D: Floats) -> Floats:
    """Correlations (N, M) of what the mean of all images does not explain; 1 is the image itself.

    Whatever a picture's scale, and whatever multiple of the mean is in it: what all cells have in
    common is not counted. 0 for a picture that shows nothing.
    """
    common_2D = np.stack([np.ones_like(mean_D), mean_D])
    basis_D2, _ = np.linalg.qr(common_2D.T)

    def rest(values_ND: Floats) -> Floats:
        values_ND = values_ND - (values_ND @ basis_D2) @ basis_D2.T
        norm_N1 = np.linalg.norm(values_ND, axis=1, keepdims=True)
        return np.where(norm_N1 > 1e-9, values_ND / np.maximum(norm_N1, 1e-9), 0)

    found_NM: Floats = (rest(images_ND) @ rest(pictures_MD).T).astype(np.float32)
    return found_NM


def best_of(sent: Sent, truth_D: Floats, mean_D: Floats) -> tuple[Floats, float]:
    """The picture nearest to the truth among what an attacker gets, and its likeness.

    Chosen by who knows the truth: an upper bound of what a patient attacker finds.
    """
    found_MD = pictures(sent.weight_UD, sent.bias_U)
    likeness_M = likenesses(found_MD, truth_D[None], mean_D)[0]
    best = int(np.argmax(likeness_M))
    return found_MD[best], float(likeness_M[best])


def attack(
    run_dir: Path, terms: Terms, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The attacks on what is sent.

    ``inversion``: one image, and sums of more, at the norm and noise of ``terms``; ``round``: round
    1 of the run; ``seat``, ``collusion``: see ``cytofed.simulations.seat``.
    """
    from cytofed.simulations.replay import attack_round
    from cytofed.simulations.seat import sit
    from cytofed.simulations.simulate import sample_folder

    images_ND, classes_N = sample_images(sample_folder() / "marrow")
    gradients = gradients_of(images_ND, classes_N)
    tell("attacks: images from updates")
    inversion = invert_images(terms, images_ND, gradients)
    tell("attacks: round 1 of the run")
    round_ = attack_round(run_dir, terms)
    tell("attacks: the coordinator's seat")
    seat = sit(images_ND[:IMAGES], gradients[:IMAGES])
    return {"inversion": inversion, "round": round_, **seat}


def invert_images(terms: Terms, images_ND: Floats, gradients: Sequence[Sent]) -> dict[str, Any]:
    """Rebuild images from a step on each alone, and from sums; pictures as data URIs.

    ``likeness``: of the best picture (``best_of``), the mean over images; ``held_out``: the same of
    images that are in no update; ``recognised``: share of images whose best picture is at least
    ``RECOGNISABLE``. The first ``IMAGES`` are attacked, the others are held out.
    """
    max_norm, deviation = terms.max_norm, terms.training.sigma * terms.max_norm
    noise = np.random.default_rng()
    gradients = gradients[:IMAGES]
    clipped = [clip(gradient, max_norm) for gradient in gradients]
    ways = {
        "plain": gradients[:SHOWN],
        "clipped": clipped[:SHOWN],
        "clipped and noised": [_noised(sent, deviation, noise) for sent in clipped[:SHOWN]],
    }
    mean_D: Floats = images_ND.mean(0)
    rows = []
    for way, sent in ways.items():
        best = [best_of(s, images_ND[n], mean_D) for n, s in enumerate(sent)]
        scores = np.array([score for _, score in best])
        rows.append(
            {
                "way": way,
                "pictures": [picture_of(square(found_D)) for found_D, _ in best],
                "likeness": float(scores.mean()),
                "recognised": float((scores >= RECOGNISABLE).mean()),
            }
        )

    def summed(count: int) -> dict[str, Any]:
        plain, noised = [], []
        for first in range(0, IMAGES - count + 1, count)[:GROUPS]:
            group = slice(first, first + count)
            plain.append(_likest(add(gradients[group]), images_ND, group, mean_D))
            hidden = _noised(add(clipped[group]), deviation * LABS_IN_SUM**0.5, noise)
            noised.append(_likest(hidden, images_ND, group, mean_D))
        inside = np.concatenate([of_sum for of_sum, _ in plain])
        return {
            "images": count,
            "likeness": float(inside.mean()),
            "held_out": float(np.mean([others for _, others in plain])),
            "recognised": float((inside >= RECOGNISABLE).mean()),
            "noised": float(np.concatenate([of_sum for of_sum, _ in noised]).mean()),
        }

    return {
        "images": [picture_of(square(images_ND[n])) for n in range(SHOWN)],
        "sigma": terms.training.sigma,
        "max_norm": max_norm,
        "recognisable": RECOGNISABLE,
        "ways": rows,
        "sums": [summed(count) for count in SUMS],
    }


def _likest(sent: Sent, images_ND: Floats, inside: slice, mean_D: Floats) -> tuple[Floats, Floats]:
    """Best likeness of each image in a sum, and of each held-out image."""
    found_MD = pictures(sent.weight_UD, sent.bias_U)
    inside_N = likenesses(found_MD, images_ND[inside], mean_D).max(axis=1)
    return inside_N, likenesses(found_MD, images_ND[IMAGES:], mean_D).max(axis=1)


def square(image_D: Floats) -> Floats:
    """A picture (H, W, 3) of numbers that lie in its order."""
    return image_D.reshape(SIZE_PX, SIZE_PX, 3)


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


def picture_of(image_HW3: Floats) -> str:
    """A PNG as data URI, stretched to its own range where it leaves [0, 1]."""
    low, high = float(image_HW3.min()), float(image_HW3.max())
    if low < -0.05 or high > 1.05:
        image_HW3 = (image_HW3 - low) / max(high - low, 1e-9)
    pixels = np.rint(255 * np.clip(image_HW3, 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_images(folder: Path) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Images of ``folder/CLASS/*.jpg`` as (N, D) in [0, 1] and their classes, taken in turn."""
    by_class = [sorted(sub.iterdir()) for sub in sorted(folder.iterdir()) if sub.is_dir()][:8]
    paths = [(path, c) for rank in zip(*by_class, strict=False) for c, path in enumerate(rank)]
    images = []
    for path, _ in paths[: 2 * IMAGES]:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE_PX, SIZE_PX))
        images.append(np.asarray(small, np.float32).ravel() / 255)
    return np.stack(images), np.array([c for _, c in paths[: len(images)]], np.int64)


# --- in words


def lines(found: Json) -> list[str]:
    """One line for each way of sending, sum, seat and number of colluding labs."""
    told = []
    inversion = found["inversion"]
    for way in inversion["ways"]:
        told.append(
            f"one image from a {way['way']} update | likeness {way['likeness']:.2f} of 1 | "
            + recognised(way)
        )
    for row in inversion["sums"][1:]:
        told.append(
            f"images from a plain sum of {row['images']} | likeness {row['likeness']:.2f}, "
            f"of others {row['held_out']:.2f}, with noise {row['noised']:.2f} | {recognised(row)}"
        )
    told += round_lines(found["round"])
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


def round_lines(found: Json) -> list[str]:
    """What round 1 shows of the run's images, a line for each way of sending."""
    if "missing" in found:
        return [f"round 1 replayed: {found['missing']}"]
    told = []
    for row in found["rows"]:
        mark = " (this plan)" if row["of_plan"] else ""
        low, high = row["interval"]
        told.append(
            f"round 1, {row['way']}{mark} | best likeness {row['likeness']:.2f}, of held-out "
            f"images {row['held_out']:.2f}; AUC {row['auc']:.3f} ({low:.2f} to {high:.2f}) | "
            + verdict(row)
        )
    return told


def verdict(row: Json) -> str:
    """What a row of the replayed round means."""
    if row["gives_away"]:
        told = f"{row['recognised']:,} of {row['images']:,} cells recognisable"
        return told if row["noised"] else f"{told}: only noise prevents that"
    if row["interval"][0] > 0.5:
        return "no cell recognisable; pictures are likest to images trained on"
    return "nothing: no more like images trained on than like held-out ones"


def recognised(row: Json) -> str:
    """How many of the images are recognised in the best picture of each."""
    return f"{row['recognised']:.0%} of cells recognisable"


def matches(row: Json) -> str:
    """The matching test of one row."""
    return f"matched to its lab {row['matched']:.0%}, to any in it {row['took_part']:.0%}"


def why_missing(error: CytofedError) -> str:
    """Why an attack was not made, for a report that others read: without names of files."""
    if re.search(r"[/\\]|\.(png|jpe?g|tiff?|bmp|csv)\b", error.message, re.IGNORECASE):
        return "the run's images are not there as they were, or can't be read"
    return error.message
