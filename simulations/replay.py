"""Round 1 of a run once more, over the run's own labs: do its updates show what they are made of?

The plan's own batches, steps, optimizer, augmentation, strategy, draws of patients, clipping, noise
and fixed-point sum, on the labs' own images. In place of the run's net stands one that hides
little: one hidden layer whose neurons see all pixels, so that each neuron's part of an update is a
picture (``cytofed.simulations.attacks``). Convolutions keep more to themselves.

Each picture is held against each image in every form in which training showed it and, as a control,
against held-out images of the same labs, changed in the same way and as often. Likeness to held-out
images is that of any cell to any other. A cell is recognised in a picture that is like it and not
nearly as like any held-out image; how often a held-out one is, by the same rule, is chance.

Shapes: N images, V views (images as steps saw them), U patients, M pictures, S of them shown,
D = 3 H W pixels, K labs, C classes, P weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.stats import fisher_exact

from cytofed.arrays import Float32, Manifest, Parts
from cytofed.client.app import Lab
from cytofed.client.cells import Cells
from cytofed.errors import InputError
from cytofed.messages import Order
from cytofed.plan import Augment, Plan
from cytofed.privacy.encoding import MAX_COHORT, decode, encode
from cytofed.privacy.secagg import MIN_COHORT
from cytofed.privacy.terms import Terms
from cytofed.secure_round import encoding_of, public_bound
from cytofed.seeds import derive
from cytofed.simulations.attacks import (
    NEURONS,
    RECOGNISABLE,
    SHOWN,
    likenesses,
    picture_of,
    pictures,
    why_missing,
)
from cytofed.simulations.membership import CONFIDENCE, Area, area_of
from cytofed.simulations.split import generator
from cytofed.simulations.virtual import FEDERATION, VirtualLabs
from cytofed.strategies import make_strategy
from cytofed.strategies.strategy import Correction, LocalRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cytofed.client.private import PrivatelyTrained
    from cytofed.client.training import Trained
    from cytofed.models import Classifier

PASSES = 24_000
"""of images of ``_USUAL_PX``; with more, further labs are left out, which helps the attacker"""
VIEW_BYTES = 150_000_000
"""of views that pictures are held against; of more images a random choice"""
APART = 0.5
"""What a picture leaves unexplained of a cell that is recognised in it (1 - likeness squared), at
most, as a share of what it leaves of any held-out image. Some pictures are of a plain cell, or of
a stain alone, and like many images."""
_USUAL_PX = 48
_PIXEL_RATE = 0.03
"""at most, where the plan's learning rate is for features or follows from the noise"""
_NOISELESS = 1e-16
_STILL = Augment(flip=False, rotate=False, shift=0.0, scale=0.0, stain=0.0)
_CHUNK = 512
_ROUND = 1

Uint8s = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Views:
    """Images as steps saw them. ``image_V``: whose view; ``patient_V``: that image's patient."""

    pixels_VD: Uint8s = field(repr=False)
    image_V: Ints
    patient_V: Ints


@dataclass(frozen=True, eq=False)
class Sent:
    """An update (P,) as whoever gets it reads it, what it was trained on, and what it was not.

    ``of_plan``: so a lab of this plan sends, or its coordinator gets, an update; ``noised``: with
    the plan's noise in it.
    """

    way: str
    update_P: Float32 = field(repr=False)
    of_plan: bool
    noised: bool
    trained: Views
    held_out: Views


@dataclass(frozen=True, eq=False)
class Replay:
    """What left the labs in round 1."""

    labs: int
    images: int
    steps: float
    """of a lab, on average"""
    changed: tuple[str, ...]
    """what is not as in the run, besides the net"""
    sent: tuple[Sent, ...]
    manifest: Manifest = field(repr=False)

    def pictures_of(self, sent: Sent) -> Float32:
        """The pictures (M, D) in an update, as pixels from 0 to 1."""
        import torch

        from cytofed.models import normalise

        tensors = self.manifest.split(sent.update_P)
        found_MD = pictures(tensors["encoder.1.weight"], tensors["encoder.1.bias"])
        black, white = normalise(torch.tensor([0.0, 1.0])).tolist()  # what the net is fed of them
        return (found_MD - np.float32(black)) / np.float32(white - black)


def attack_round(run_dir: Path, terms: Terms) -> dict[str, Any]:
    """The object ``round`` of audit.json. A folder that lacks the images has ``missing``.

    ``terms``: of the run's plan; not looked at where it has no privacy.
    """
    private = run_dir / "checkpoints"
    if not (private / "labs.json").is_file():
        return {"missing": "needs a simulation's folder with its checkpoints and images"}
    try:
        done = replay(VirtualLabs.load(private), terms)
        rows = [_row(sent, shown_by(done.pictures_of(sent), sent)) for sent in done.sent]
    except InputError as error:
        return {"missing": why_missing(error)}
    return {
        "labs": done.labs,
        "images": done.images,
        "steps": done.steps,
        "changed": list(done.changed),
        "confidence": CONFIDENCE,
        "recognisable": RECOGNISABLE,
        "apart": APART,
        "rows": rows,
    }


def _row(sent: Sent, shown: Shown) -> dict[str, Any]:
    def picture(image_D: Float32) -> str:
        size_px = math.isqrt(len(image_D) // 3)
        return picture_of(image_D.reshape(3, size_px, size_px).transpose(1, 2, 0))

    return {
        "way": sent.way,
        "of_plan": sent.of_plan,
        "noised": sent.noised,
        "likeness": float(shown.trained_N.max()),
        "held_out": float(shown.held_out_N.max()),
        "recognised": int(shown.recognised_N.sum()),
        "recognised_held_out": int(shown.chance_N.sum()),
        "images": len(shown.trained_N),
        "images_held_out": len(shown.held_out_N),
        "gives_away": shown.gives_away,
        "auc": shown.area.auc,
        "interval": [shown.area.low, shown.area.high],
        "nearest": [picture(image_D) for image_D in shown.nearest_SD],
        "pictures": [picture(image_D) for image_D in shown.pictures_SD],
    }


def replay(labs: VirtualLabs, terms: Terms | None) -> Replay:
    """Train round 1 at the labs and send it in each way. Imports torch.

    ``terms``: of the labs' plan.
    """
    from cytofed import models

    plan, changed = _for_pixels(labs.plan)
    terms = None if plan.privacy.unit == "none" else terms
    strategy = make_strategy(plan.strategy)
    count = _labs_in_time(labs, plan, terms)
    if count < len(labs.names):
        changed.append(f"{count} of {len(labs.names)} labs, which is easier for the attacker")
    net = stand_in(plan.labels.scale.size_px, labs.cells.targets_NC.shape[1])
    manifest = models.manifest(net, "all")
    round_ = _Round(plan, strategy, net, manifest, models.flatten(net, manifest))
    share = _kept_share(labs, plan, count)
    at = [_Place.of(labs, number, share) for number in range(count)]
    ways: dict[str, Terms | None] = {"": None}
    if terms is not None:
        bare = replace(terms, training=replace(terms.training, sigma=_NOISELESS))
        ways = {", not protected": None, ", clipped": bare, ", clipped and noised": terms}
    one, summed, steps = [], [], 0.0
    for way, its_terms in ways.items():
        done = [round_.train(place, its_terms) for place in at]
        steps = float(np.mean([update.steps for update in done]))
        own, secure = its_terms is terms, plan.secure_aggregation.enabled
        noised = own and terms is not None
        weights_P = done[0].parts["weights"]
        seen, held = done[0].trained, done[0].held_out
        one.append(
            Sent(f"one lab's update{way}", weights_P, own and not secure, noised, seen, held)
        )
        if MIN_COHORT <= count <= MAX_COHORT:
            sum_P = secure_sum(plan, strategy, done)
            seen = _joined([update.trained for update in done])
            held = _joined([update.held_out for update in done])
            way = f"secure sum of {count} labs{way}"
            summed.append(Sent(way, sum_P, own and secure, noised, seen, held))
    images = sum(len(place.lab.train) for place in at)
    return Replay(count, images, steps, tuple(changed), (*one, *summed), manifest)


def _for_pixels(plan: Plan) -> tuple[Plan, list[str]]:
    """The plan for a net that is trained whole, and what that changes in words."""
    train, privacy, told = plan.train, plan.privacy, []
    head_only = plan.model.arch == "encoder+head" or plan.model.trainable == "head"
    if head_only:
        train = replace(train, augment=_STILL)  # a head is trained on features, without it
    if head_only or privacy.noise_drift is not None:
        train = replace(train, lr=min(train.lr, _PIXEL_RATE))
        privacy = replace(privacy, noise_drift=None)
        told.append(f"a learning rate of {train.lr:g}, since the plan's is for fewer weights")
    model = replace(plan.model, trainable="all")
    return replace(plan, model=model, train=train, privacy=privacy), told


def stand_in(size_px: int, classes: int) -> Classifier:
    """A net that hides little: all pixels, ``NEURONS`` neurons, the classes."""
    import torch
    from torch import nn

    from cytofed import models

    size = 3 * size_px**2
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # what layers draw by themselves is written over
        pixels = nn.Linear(size, NEURONS)
        net = models.Classifier(nn.Sequential(nn.Flatten(), pixels, nn.ReLU()), NEURONS, classes)
    with torch.no_grad():
        pixels.weight.copy_(torch.randn(NEURONS, size, generator=rng) / size**0.5)
        pixels.bias.zero_()
        # Not zero as in other nets: then the first step's gradient would not reach the pixels.
        net.head.weight.copy_(torch.randn(classes, NEURONS, generator=rng) / NEURONS**0.5)
    return net


def _labs_in_time(labs: VirtualLabs, plan: Plan, terms: Terms | None) -> int:
    """How many labs are replayed: a secure sum's least number, and more while there is time."""
    from cytofed.client.training import batch_size, count_steps

    area, passes = (plan.labels.scale.size_px / _USUAL_PX) ** 2, 0.0
    for number in range(len(labs.names)):
        images = len(labs.rows(number, 1))
        passes += area * count_steps(plan.train, images) * batch_size(plan.train, images)
        if terms is not None:  # twice: clipped, and clipped and noised
            drawn = terms.training.sampling_rate * (labs.declared(number) or 0)
            cells = min(images, drawn * terms.cells_per_unit)
            passes += 2 * area * terms.training.steps * cells
        if passes > PASSES and number >= MIN_COHORT:
            return number
    return len(labs.names)


def _kept_share(labs: VirtualLabs, plan: Plan, count: int) -> float:
    """Share of images whose views are kept, so that all fit into ``VIEW_BYTES``."""
    from cytofed.client.training import batch_size, count_steps

    held = [len(labs.rows(number, 1)) for number in range(count)]
    seen = [count_steps(plan.train, n) * batch_size(plan.train, n) for n in held]
    return min(1.0, VIEW_BYTES / (3 * plan.labels.scale.size_px**2 * max(1, sum(seen))))


# --- one lab


@dataclass(frozen=True, eq=False)
class _Watched(Cells):
    """Cells that note what they are asked for."""

    cells: Cells
    asked: list[Ints] = field(default_factory=list)

    def images(self, index: Ints) -> Uint8s:
        self.asked.append(index)
        return np.asarray(self.cells.images(index))

    @staticmethod
    def of(cells: Cells) -> _Watched:
        known = cells.sources, cells.source_N, cells.row_N, cells.targets_NC, cells.patients_N
        return _Watched(*known, cells.size_px, cells)


@dataclass(frozen=True, eq=False)
class _Place:
    """A lab of the run, and which of its images are held against pictures."""

    lab: Lab
    number: int
    train_N: npt.NDArray[np.bool_]
    test: Ints

    @staticmethod
    def of(labs: VirtualLabs, number: int, share: float) -> _Place:
        lab = labs.lab(number)
        rng = generator(labs.plan.train.seed, "replay", number)
        train_N = rng.random(len(lab.train)) <= share
        return _Place(lab, number, train_N, np.flatnonzero(rng.random(len(lab.test)) <= share))

    def views(self, cells: Cells, index: Ints, pixels_VD: Uint8s) -> Views:
        """Views of this lab's ``cells``, numbered so that no lab shares a number with another."""
        patients = cells.patients_N
        of_image = np.arange(len(cells))
        if patients is not None:
            _, of_image = np.unique(patients, return_inverse=True)
        base = self.number << 40
        return Views(pixels_VD, base + index, base + of_image[index])


@dataclass(frozen=True, eq=False)
class _Update:
    """What a lab sends of its round, by its strategy's parts, and what that is made of."""

    lab: str
    parts: Parts = field(repr=False)
    weight: float
    steps: int
    trained: Views
    held_out: Views


@dataclass(frozen=True, eq=False)
class _Round:
    """What is the same for all labs."""

    plan: Plan
    strategy: Strategy
    net: Classifier
    manifest: Manifest
    start_P: Float32

    def train(self, place: _Place, terms: Terms | None) -> _Update:
        """As ``cytofed.client.app`` does, with its seeds. ``terms`` None: without privacy."""
        from cytofed import models

        lab, half = place.lab, self.strategy.lab
        state = self.strategy.init(self.start_P)
        down = {name: state[name] for name in self.strategy.down}
        models.load_flat(self.net, self.manifest, self.start_P)
        cells = _Watched.of(lab.train)
        index, pixels = [np.zeros(0, np.int64)], [np.zeros((0, self.net_inputs), np.uint8)]

        def see(_net: nn.Module, inputs: tuple[Tensor]) -> None:
            index_B = cells.asked.pop()
            kept_B = place.train_N[index_B]
            index.append(index_B[kept_B])
            pixels.append(_bytes_of(inputs[0])[kept_B])

        hook = self.net.register_forward_pre_hook(see)
        weight, trained = self._trained(lab, cells, half.prepare(down, {}), terms)
        hook.remove()
        end_P = models.flatten(self.net, self.manifest)
        local = LocalRound(self.start_P, end_P, trained.reach, trained.momentum_P)
        parts, _ = half.finish(down, {}, local)
        seen = place.views(lab.train, np.concatenate(index), np.concatenate(pixels))
        return _Update(
            lab.name,
            {name: parts[name] for name in half.up},
            weight,
            trained.steps,
            seen,
            self._held_out(place, len(seen.image_V) / max(1, len(np.unique(seen.image_V)))),
        )

    @property
    def net_inputs(self) -> int:
        """D, the numbers in an image."""
        return 3 * self.plan.labels.scale.size_px**2

    def _trained(
        self, lab: Lab, cells: Cells, correction: Correction | None, terms: Terms | None
    ) -> tuple[float, Trained | PrivatelyTrained]:
        """Train in place; the update's weight and what was done."""
        from cytofed.client import private, training

        plan = self.plan
        start, end = (_ROUND - 1) / plan.train.rounds, _ROUND / plan.train.rounds
        if terms is None:
            plainly = training.train(
                self.net,
                cells,
                plan,
                progress_start=start,
                progress_end=end,
                absent_C=lab.absent_C,
                correction=correction,
                seed=derive(plan.train.seed, "train", lab.stream, lab.name),
                in_round=_ROUND,
                device="cpu",
            )
            return float(len(cells)), plainly
        assert lab.declared_patients is not None
        privately = private.train_privately(
            self.net,
            cells,
            plan,
            terms,
            declared_patients=lab.declared_patients,
            randomness=lab.randomness(Order("train", FEDERATION, _ROUND, plan.sha256)),
            progress_start=start,
            progress_end=end,
            absent_C=lab.absent_C,
            correction=correction,
            device="cpu",
        )
        return float(lab.declared_patients), privately

    def _held_out(self, place: _Place, views_each: float) -> Views:
        """Held-out images, changed as often as those trained on were."""
        import torch

        from cytofed.client.augment import augment

        cells, settings = place.lab.test, self.plan.train.augment
        seed = derive(self.plan.train.seed, "held-out views", place.number) & 0xFFFFFFFF
        rng = torch.Generator().manual_seed(seed)
        index = np.repeat(place.test, max(1, round(views_each)))
        parts = [np.zeros((0, self.net_inputs), np.uint8)]
        for start in range(0, len(index), _CHUNK):
            pixels = torch.from_numpy(cells.images(index[start : start + _CHUNK]))
            parts.append(_bytes_of(augment(pixels, settings, rng)))
        return place.views(cells, index, np.concatenate(parts))


def _bytes_of(images_B3HW: Tensor) -> Uint8s:
    return (255 * images_B3HW.float()).round().byte().flatten(1).numpy()


def _joined(views: Sequence[Views]) -> Views:
    return Views(
        np.concatenate([v.pixels_VD for v in views]),
        np.concatenate([v.image_V for v in views]),
        np.concatenate([v.patient_V for v in views]),
    )


def secure_sum(plan: Plan, strategy: Strategy, updates: Sequence[_Update]) -> Float32:
    """The mean update (P,) that a secure sum gives: ring words added up, masks left out.

    Masks cancel exactly, so they change nothing of the sum.
    """
    size = updates[0].parts["weights"].size
    bound = public_bound([update.weight for update in updates])
    encoding = encoding_of(plan, strategy, size=size, labs=len(updates), max_weight=bound)
    sum_W = np.zeros(encoding.words, encoding.dtype)
    for update in updates:
        flat_P = np.concatenate([update.parts[name] for name in strategy.lab.up])
        rng = np.random.default_rng(derive(plan.train.seed, "round", update.lab, _ROUND))
        sum_W += encode(flat_P, encoding, rng=rng, weight=update.weight).words_W
    mean_P = decode(sum_W, encoding, count=len(updates)).mean_P[:size]
    return mean_P.astype(np.float32)


# --- what it shows


@dataclass(frozen=True, eq=False)
class Shown:
    """How like images the pictures in an update are.

    ``trained_N``, ``held_out_N``: of each image the likeness of the picture that is likest to one
    of its views. ``recognised_N``, ``chance_N``: which of them are recognised, by one rule.
    ``area``: how well likeness tells images trained on from the others; clusters are patients.
    """

    trained_N: Float32 = field(repr=False)
    held_out_N: Float32 = field(repr=False)
    recognised_N: Bools = field(repr=False)
    chance_N: Bools = field(repr=False)
    area: Area
    pictures_SD: Float32 = field(repr=False)
    """pictures in which a cell is recognised, the likest first, then the likest others"""
    nearest_SD: Float32 = field(repr=False)
    """the views that they are likest to, of images trained on"""

    @property
    def gives_away(self) -> bool:
        """Whether cells are recognised that were trained on, beyond what chance does.

        One is enough where no held-out one is; else Fisher's exact test at 5%.
        """
        ours, theirs = int(self.recognised_N.sum()), int(self.chance_N.sum())
        if not theirs:
            return ours > 0
        table = [[ours, len(self.trained_N) - ours], [theirs, len(self.held_out_N) - theirs]]
        return float(fisher_exact(table, alternative="greater").pvalue) < 1 - CONFIDENCE


def shown_by(pictures_MD: Float32, sent: Sent) -> Shown:
    """Hold pictures against what was trained on and what was not. Errors: InputError."""
    if not len(sent.held_out.image_V):
        raise InputError(
            "pictures are held against held-out images of the lab, and it has none",
            hint="run again with a larger evaluation.fraction",
        )
    step = 1 + len(sent.trained.image_V) // 2000
    mean_D = _unit_range(sent.trained.pixels_VD[::step]).mean(axis=0)
    trained = _Likeness.of(pictures_MD, sent.trained, mean_D)
    held_out = _Likeness.of(pictures_MD, sent.held_out, mean_D)
    found_NM = _recognised(trained.likeness_NM, held_out.likeness_NM.max(axis=0))
    chance_NM = _recognised(held_out.likeness_NM, held_out.likest_of_others())
    likest_N, held_out_N = trained.likeness_NM.max(axis=1), held_out.likeness_NM.max(axis=1)
    area = area_of(
        np.concatenate([likest_N, held_out_N]),
        np.arange(len(likest_N) + len(held_out_N)) < len(likest_N),
        np.concatenate([trained.patient_N, held_out.patient_N]),
    )
    rank_NM = trained.likeness_NM + found_NM  # recognised ones first
    image_M = rank_NM.argmax(axis=0)
    best_S = np.argsort(-rank_NM.max(axis=0))[:SHOWN]
    view_S = [trained.view_of(int(image_M[m]), int(m)) for m in best_S]
    return Shown(
        likest_N,
        held_out_N,
        np.asarray(found_NM.any(axis=1)),
        np.asarray(chance_NM.any(axis=1)),
        area,
        pictures_MD[best_S],
        _unit_range(sent.trained.pixels_VD[view_S]),
    )


def _recognised(likeness_NM: Float32, rival_NM: Float32) -> Bools:
    """``rival_NM``: of the likest other image, held out, to each picture."""
    left_NM = (1 - likeness_NM**2) / (1 - np.clip(rival_NM, 0, 0.9999) ** 2)
    return np.asarray((likeness_NM >= RECOGNISABLE) & (left_NM <= APART))


@dataclass(frozen=True, eq=False)
class _Likeness:
    """Of each image's likest view, by picture."""

    likeness_NM: Float32
    patient_N: Ints
    found_VM: Float32
    """by view, those of an image one after the other"""
    order_V: Ints
    first_N: Ints

    @staticmethod
    def of(pictures_MD: Float32, views: Views, mean_D: Float32) -> _Likeness:
        order_V = np.argsort(views.image_V, kind="stable")
        _, first_N = np.unique(views.image_V[order_V], return_index=True)
        found = [
            likenesses(pictures_MD, _unit_range(views.pixels_VD[rows]), mean_D)
            for rows in np.split(order_V, range(_CHUNK, len(order_V), _CHUNK))
        ]
        found_VM = np.concatenate(found)
        likeness_NM = np.maximum.reduceat(found_VM, first_N, axis=0)
        return _Likeness(likeness_NM, views.patient_V[order_V[first_N]], found_VM, order_V, first_N)

    def likest_of_others(self) -> Float32:
        """For each image and picture (N, M): the likeness of other patients' likest image."""
        names_U, patient_N = np.unique(self.patient_N, return_inverse=True)
        likest_UM = np.full((len(names_U), self.likeness_NM.shape[1]), -1, np.float32)
        np.maximum.at(likest_UM, patient_N, self.likeness_NM)
        first_M, picture_M = likest_UM.argmax(axis=0), np.arange(likest_UM.shape[1])
        best_M = likest_UM.max(axis=0)
        likest_UM[first_M, picture_M] = -1
        second_M = likest_UM.max(axis=0)
        return np.asarray(np.where(patient_N[:, None] == first_M, second_M, best_M))

    def view_of(self, image: int, picture: int) -> int:
        """The image's view that is likest to a picture."""
        start = int(self.first_N[image])
        end = int(self.first_N[image + 1]) if image + 1 < len(self.first_N) else len(self.order_V)
        return int(self.order_V[start + int(self.found_VM[start:end, picture].argmax())])


def _unit_range(pixels_ND: Uint8s) -> Float32:
    return pixels_ND.astype(np.float32) / np.float32(255)
