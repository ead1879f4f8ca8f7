"""Cut one pool of images into virtual labs: ``--partition LAW[+stain:STRENGTH][+missing:K]``.

======================  ==========================================================================
iid                     classes alike everywhere, sizes equal
dirichlet:ALPHA         label skew: each lab's class mix is drawn around the pool's; sizes equal.
                        Hsu et al. 2019, arXiv:1909.06335
quantity:SIGMA          size skew: log-normal sizes, classes alike. One of the skews of Li et al.
                        2022, arXiv:2102.02079, with another law of sizes
classes:K               each lab holds K classes only. McMahan et al. 2017, arXiv:1602.05629 (there:
                        K shards of images sorted by label)
acquisition             real scanner and stain shift: k-means of the background colour
sources                 one lab per data folder
column:NAME             one lab per value of a CSV column
+stain:STRENGTH         each lab also sees its images under its own stain. After Tellez et al. 2019,
                        arXiv:1902.06543; optical density: Ruifrok & Johnston 2001, Anal Quant Cytol
                        Histol 23:291
+missing:K              each lab also loses the training images of K classes
======================  ==========================================================================

Every law is a function of arrays and a seed. Test images follow the law of the training images, so
that a lab is tested on what it sees, but which images are test images is not decided here.

Shapes: N images, U units, C classes, K labs, S strata (class by side); B H W 3 images.
"""

from __future__ import annotations

import difflib
import heapq
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import logsumexp

from cytofed.errors import InputError
from cytofed.simulations.split import Bools, Floats, Ints, Texts, generator

_EXAMPLES: Mapping[str, str] = {
    "iid": "iid",
    "dirichlet": "dirichlet:0.3",
    "quantity": "quantity:1.0",
    "classes": "classes:2",
    "acquisition": "acquisition",
    "sources": "sources",
    "column": "column:site",
    "stain": "+stain:0.2",
    "missing": "+missing:1",
}
_LAWS = tuple(law for law, example in _EXAMPLES.items() if not example.startswith("+"))
_FIT_UNITS = 20_000  # k-means is fitted on at most so many units and then applied to all


@dataclass(frozen=True)
class PartitionSpec:
    """A parsed ``--partition``; ``str`` writes it back in its one canonical form."""

    law: str
    amount: float = 0.0  # ALPHA, SIGMA or K of the law
    column: str = ""
    stain: float = 0.0
    missing: int = 0

    def __str__(self) -> str:
        text = self.law
        if self.law in ("dirichlet", "quantity", "classes"):
            text += f":{self.amount:g}"
        elif self.law == "column":
            text += f":{self.column}"
        return (
            text
            + (f"+stain:{self.stain:g}" if self.stain else "")
            + (f"+missing:{self.missing}" if self.missing else "")
        )


@dataclass(frozen=True)
class Stain:
    """A lab's own stain and light: per channel, OD' = gain x OD + bias.

    OD = -log10((value + 1) / 256) is the optical density, in which stain concentrations add up.
    """

    gain_3: tuple[float, float, float]
    bias_3: tuple[float, float, float]

    def apply(self, images_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The images under this stain: a new array; values are rounded and stay in 0..255."""
        density_V = -np.log10((np.arange(256) + 1.0) / 256.0)
        stained = np.empty_like(images_BHW3)
        for channel in range(3):
            shifted_V = self.gain_3[channel] * density_V + self.bias_3[channel]
            table_V = np.clip(np.rint(256.0 * 10.0**-shifted_V - 1.0), 0, 255).astype(np.uint8)
            stained[..., channel] = table_V[images_BHW3[..., channel]]
        return stained


@dataclass(frozen=True, eq=False)
class Partition:
    """Who holds what.

    Guarantees: every image is at exactly one lab; every lab has a training image; a unit is at one
    lab (``shared_units`` counts the exceptions: only ``sources`` has any, where two folders hold
    near-duplicates). ``keep_N`` is False for training images that
    ``+missing`` took away; test images are all kept, so that the global test set is the same for
    every partition and shows what the federation gives a lab for a class that it never trained.
    """

    spec: PartitionSpec
    labs: tuple[str, ...]
    about: tuple[str, ...]  # what sets a lab apart, for people: "site = leeds"
    lab_N: NDArray[np.int64]
    keep_N: NDArray[np.bool_]
    missing_KC: NDArray[np.bool_]  # classes that +missing took from a lab
    stains: tuple[Stain | None, ...]
    shared_units: int
    class_N: NDArray[np.int64]  # -1: coarse label

    def rows(self, lab: int) -> NDArray[np.int64]:
        """Rows of the images that a lab keeps."""
        return np.flatnonzero((self.lab_N == lab) & self.keep_N)

    def table(self, where_N: Bools | None = None) -> NDArray[np.int64]:
        """Kept images of each lab and class, of those in ``where_N``: (K, C + 1), coarse last."""
        columns = self.missing_KC.shape[1] + 1
        rows = self.keep_N if where_N is None else self.keep_N & where_N
        flat = self.lab_N[rows] * columns + self.class_N[rows] % columns  # -1 -> the last column
        counts = np.bincount(flat, minlength=len(self.labs) * columns)
        return counts.reshape(len(self.labs), columns).astype(np.int64)


def parse_partition(text: str) -> PartitionSpec:
    """Read ``LAW[:VALUE][+stain:STRENGTH][+missing:K]``.

    Errors: InputError that says what is valid, and the nearest word where there is one.
    """
    # Only a + before one of the two words separates: the name of a column may hold one.
    head, *extras = re.split(r"\+(?=\s*(?:stain|missing)\b)", text.strip())
    name, colon, value = head.partition(":")
    law = name.strip().lower()
    value = value.strip()
    stray = "" if law == "column" else head.partition("+")[2]
    if law not in _LAWS or stray:
        word = (stray or name).partition(":")[0]
        raise InputError(f"Unknown partition {text!r}.", hint=_valid(word))
    amount, column = 0.0, ""
    if law in ("iid", "acquisition", "sources"):
        if colon:
            raise InputError(f"Partition {law!r} takes no value, found {value!r}.", hint=_valid(""))
    elif law == "column":
        if not value:
            raise InputError("Partition 'column' needs a column's name.", hint="try column:site")
        column = value
    elif law == "classes":
        amount = _whole(law, value)
    else:
        amount = _positive(law, value)
    stain, missing = 0.0, 0
    seen = set()
    for extra in extras:
        word, _, value = (part.strip() for part in extra.partition(":"))
        if word in seen:
            raise InputError(f"Partition {text!r} has +{word} twice.", hint="keep one of them")
        seen.add(word)
        if word == "stain":
            stain = _positive(word, value)
            if stain > 1:
                raise InputError(
                    f"Expected 0 < stain strength {stain:g} <= 1.",
                    hint="0.2 is a clear difference between labs, 1 is beyond recognition",
                )
        else:
            missing = _whole(word, value)
    return PartitionSpec(law, amount, column, stain, missing)


def assign(
    spec: PartitionSpec,
    labs: int | None,
    *,
    targets_NC: Bools,
    unit_N: Ints,
    seed: int,
    train_N: Bools | None = None,
    background_N3: Floats | None = None,
    source_N: Ints | None = None,
    column_N: Texts | None = None,
) -> Partition:
    """Give every image to one of ``labs`` virtual labs.

    ``labs`` None: as many as there are folders (``sources``) or values (``column``).
    ``unit_N``: what must stay together (split.units); a unit of several classes counts as its most
    frequent one, so with mixed patients a label skew is milder than its parameter says.
    ``train_N``: training side of the test split (all images when None).
    ``background_N3`` (RGB, 0..255), ``source_N``, ``column_N``: read by the laws that need them.
    ``labs`` 1 puts everything at one lab under every law.

    Errors: InputError, with the way out, when the law cannot fill that many labs.
    """
    images, classes = targets_NC.shape
    class_N = np.where(targets_NC.sum(axis=1) == 1, targets_NC.argmax(axis=1), -1).astype(np.int64)
    train_N = np.ones(images, dtype=np.bool_) if train_N is None else train_N
    pool = _Pool.gather(class_N, unit_N, train_N, classes)
    value_N, names = _given_labs(spec, source_N, column_N)
    if labs is None:
        if value_N is None:
            raise InputError(
                f"Partition {spec} needs a number of labs.", hint="add --labs, for example --labs 4"
            )
        labs = len(names)
    _check_labs(labs, pool)

    about: tuple[str, ...] = ("",) * labs
    rng = generator(seed, "partition", spec.law)
    if labs == 1:
        lab_N = np.zeros(images, dtype=np.int64)
    elif value_N is not None:
        lab_N, about = _by_value(spec, labs, value_N, names, pool)
        _refuse_empty(spec, labs, lab_N, train_N, about)
    else:
        if spec.law == "iid":
            lab_U = _deal(pool, labs, rng)
        elif spec.law == "dirichlet":
            share_CK = _dirichlet(spec.amount, labs, pool.label_counts(), rng)
            lab_U = _share_out(pool, share_CK, rng)
        elif spec.law == "quantity":
            size_K = rng.lognormal(0.0, spec.amount, size=labs)
            lab_U = _share_out(pool, np.tile(size_K / size_K.sum(), (pool.labels, 1)), rng)
        elif spec.law == "classes":
            lab_U = _share_out(pool, _owners(int(spec.amount), labs, pool, rng), rng)
        else:
            if background_N3 is None:
                raise ValueError("partition 'acquisition' needs background_N3")
            lab_U, about = _by_background(pool, labs, background_N3, rng)
        lab_N = _fill_empty(lab_U, pool, labs, rng)[pool.unit_N]

    missing_KC, keep_N = _take_classes(
        spec.missing, lab_N, targets_NC, train_N, generator(seed, "missing"), labs=labs
    )
    for array in (lab_N, keep_N, missing_KC, class_N):
        array.setflags(write=False)
    labs_of_units = np.unique(pool.unit_N * labs + lab_N) // labs
    return Partition(
        spec=spec,
        labs=tuple(f"lab-{k + 1}" for k in range(labs)),
        about=about,
        lab_N=lab_N,
        keep_N=keep_N,
        missing_KC=missing_KC,
        stains=tuple(stain_of(spec.stain, k, seed) if spec.stain else None for k in range(labs)),
        shared_units=int((np.bincount(labs_of_units) > 1).sum()),
        class_N=class_N,
    )


def stain_of(strength: float, lab: int, seed: int) -> Stain:
    """The stain of a lab, whatever the number of labs.

    log(gain) and 4 x bias are uniform in [-strength, strength] per channel. Tellez et al. disturb
    haematoxylin, eosin and residual so; May-Gruenwald-Giemsa has no published unmixing, and in RGB
    densities the shift is a table lookup per channel.
    """
    draw_6 = generator(seed, "stain", lab).uniform(-strength, strength, size=6).tolist()
    gain = [math.exp(g) for g in draw_6[:3]]
    bias = [b / 4 for b in draw_6[3:]]
    return Stain((gain[0], gain[1], gain[2]), (bias[0], bias[1], bias[2]))


def perceptual(rgb_N3: Floats) -> NDArray[np.float64]:
    """sRGB (0..255) to CIE L*a*b* (D65), where distances are as large as they look."""
    unit = np.asarray(rgb_N3, dtype=np.float64) / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375],
                       [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness = 116 * f[:, 1] - 16
    return np.stack([lightness, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def k_means(
    points_U3: NDArray[np.float64], clusters: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007); the best of several.

    Clusters are numbered along the first coordinate. With fewer distinct points than clusters some
    stay empty.
    """
    fit = points_U3
    if len(fit) > max(_FIT_UNITS, 4 * clusters):
        rows = rng.choice(len(fit), max(_FIT_UNITS, 4 * clusters), replace=False)
        fit = fit[rows]
    best, best_cost = fit[:1], math.inf
    for _ in range(8 if clusters <= 32 else 1):  # many clusters: one start is as good as another
        centre_K3 = _spread_start(fit, clusters, rng)
        cost = math.inf
        for _ in range(100):
            distance_U, nearest_U = cKDTree(centre_K3).query(fit)
            previous, cost = cost, float(np.square(distance_U).sum())
            if cost > previous * (1 - 1e-6):
                break
            count_K = np.bincount(nearest_U, minlength=clusters)
            sum_K3 = np.stack(
                [np.bincount(nearest_U, fit[:, d], minlength=clusters) for d in range(3)], axis=1
            )
            held = count_K > 0
            centre_K3[held] = sum_K3[held] / count_K[held, None]
        if cost < best_cost:
            best, best_cost = centre_K3, cost
    best = best[np.lexsort(best.T[::-1])]
    _, nearest_U = cKDTree(best).query(points_U3)
    return np.asarray(nearest_U, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Pool:
    """The images, seen as indivisible units."""

    unit_N: NDArray[np.int64]  # 0..U-1
    size_U: NDArray[np.int64]
    label_U: NDArray[np.int64]  # most frequent label; the last label is "coarse"
    train_U: NDArray[np.bool_]
    labels: int

    @staticmethod
    def gather(class_N: Ints, unit_N: Ints, train_N: Bools, classes: int) -> _Pool:
        _, unit = np.unique(unit_N, return_inverse=True)
        size_U = np.bincount(unit)
        labels = classes + 1
        flat = np.bincount(unit * labels + class_N % labels, minlength=len(size_U) * labels)
        train_U = np.zeros(len(size_U), dtype=np.bool_)
        train_U[unit[train_N]] = True
        label_U = flat.reshape(-1, labels).argmax(axis=1)
        return _Pool(unit.astype(np.int64), size_U, label_U, train_U, labels)

    def label_counts(self) -> NDArray[np.float64]:
        return np.bincount(self.label_U, self.size_U, minlength=self.labels).astype(np.float64)


def _check_labs(labs: int, pool: _Pool) -> None:
    if labs < 1:
        raise InputError(f"Expected --labs {labs} >= 1.", hint="one lab is the smallest federation")
    units = int(pool.train_U.sum())
    if labs > units:
        raise InputError(
            f"Expected --labs {labs} <= {units}: there are only {units} patients or single images "
            "to train on, and each lab needs one.",
            hint=f"use --labs {units} or fewer" if units else "give a folder with images",
        )


def _given_labs(
    spec: PartitionSpec, source_N: Ints | None, column_N: Texts | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """What each image says of its lab, and what the values are called; None for drawn laws."""
    if spec.law == "sources":
        if source_N is None:
            raise ValueError("partition 'sources' needs source_N")
        values, value_N = np.unique(source_N, return_inverse=True)
        return value_N.astype(np.int64), tuple(f"folder {int(v) + 1}" for v in values)
    if spec.law == "column":
        if column_N is None:
            raise ValueError("partition 'column' needs column_N")
        blank = int((column_N == "").sum())
        if blank:
            raise InputError(
                f"Column {spec.column!r} is empty for {blank} of {len(column_N)} images.",
                hint="fill it in, or leave these images out",
            )
        texts, value_N = np.unique(column_N, return_inverse=True)
        return value_N.astype(np.int64), tuple(str(text) for text in texts)
    return None, ()


def _by_value(
    spec: PartitionSpec, labs: int, value_N: Ints, names: tuple[str, ...], pool: _Pool
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    values = len(names)
    if spec.law == "sources":
        if labs != values:
            raise InputError(
                f"Expected --labs {labs} to be {values}: partition sources makes one lab of each "
                "data folder.",
                hint=f"use --labs {values}, or leave --labs out",
            )
        # A folder is a lab's disk: its images stay there, even near-duplicates of another's.
        return np.asarray(value_N, dtype=np.int64), names
    if labs > values:
        raise InputError(
            f"Expected --labs {labs} <= {values}: column {spec.column!r} has {values} values.",
            hint=f"use --labs {values}, or leave --labs out",
        )
    # A patient with several values goes where most of its images are.
    flat = np.bincount(pool.unit_N * values + value_N, minlength=len(pool.size_U) * values)
    value_U = flat.reshape(-1, values).argmax(axis=1)
    size_V = np.bincount(value_U, pool.size_U, minlength=values)
    lab_V = np.arange(values)
    if labs < values:  # largest first to the smallest lab
        heap = [(0.0, k) for k in range(labs)]
        for value in np.argsort(-size_V, kind="stable").tolist():
            size, k = heapq.heappop(heap)
            lab_V[value] = k
            heapq.heappush(heap, (size + float(size_V[value]), k))
    about = tuple(
        f"{spec.column} = " + ", ".join(n for n, k in zip(names, lab_V, strict=True) if k == lab)
        for lab in range(labs)
    )
    return lab_V[value_U][pool.unit_N].astype(np.int64), about


def _refuse_empty(
    spec: PartitionSpec, labs: int, lab_N: Ints, train_N: Bools, about: tuple[str, ...]
) -> None:
    held_K = np.bincount(lab_N[train_N], minlength=labs)
    if (held_K == 0).any():
        lab = int(np.argmin(held_K))
        raise InputError(
            f"Partition {spec} leaves lab-{lab + 1} ({about[lab]}) without a training image.",
            hint="use fewer labs, lower evaluation.fraction, or leave those images out",
        )


def _deal(pool: _Pool, labs: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal units out like cards, class after class, training side first."""
    order = np.lexsort((rng.random(len(pool.size_U)), pool.label_U, ~pool.train_U))
    lab_U = np.empty(len(order), dtype=np.int64)
    lab_U[order] = np.arange(len(order)) % labs
    return lab_U


def _dirichlet(
    alpha: float, labs: int, count_C: Floats, rng: np.random.Generator
) -> NDArray[np.float64]:
    """How each class is shared out over labs: (C, K), rows sum to 1.

    Hsu et al. draw each lab's mix q_k ~ Dir(alpha p) and then fill labs of one size from q_k until
    classes run out, which depends on the order of filling. Here the same q_k are fitted to both
    margins at once (equal labs, all images used; Sinkhorn 1964). alpha is per class, as in the
    usual implementations: the concentration is alpha x (number of classes) x p.
    """
    held = count_C > 0
    log_p_C = np.log(count_C[held] / count_C.sum())
    shape_C = alpha * held.sum() * np.exp(log_p_C)
    # log Gamma(a) variates as log Gamma(a + 1) + log(U) / a: with rare classes and small alpha the
    # variates themselves are below the smallest float.
    size = (labs, len(shape_C))
    uniform_KC = 1.0 - rng.random(size)  # in (0, 1]
    log_q_KC = np.log(rng.gamma(shape_C + 1.0, size=size)) + np.log(uniform_KC) / shape_C
    for _ in range(200):
        log_q_KC -= logsumexp(log_q_KC, axis=1, keepdims=True) + math.log(labs)
        log_q_KC += log_p_C - logsumexp(log_q_KC, axis=0, keepdims=True)
    share_CK = np.full((len(count_C), labs), 1.0 / labs)
    share_CK[held] = np.exp(log_q_KC - log_p_C).T
    share_CK /= share_CK.sum(axis=1, keepdims=True)
    return share_CK


def _owners(
    classes_each: int, labs: int, pool: _Pool, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Which labs hold which class, in equal parts: (C, K), rows of held classes sum to 1."""
    units_C = np.bincount(pool.label_U[pool.train_U], minlength=pool.labels)
    present = np.flatnonzero(np.bincount(pool.label_U, minlength=pool.labels))
    places = labs * classes_each
    if classes_each > len(present):
        raise InputError(
            f"Expected classes:{classes_each} <= {len(present)}, the number of classes here.",
            hint=f"use classes:{len(present)}, or iid",
        )
    if places < len(present):
        raise InputError(
            f"{labs} labs of {classes_each} classes leave {len(present) - places} of "
            f"{len(present)} classes without a lab.",
            hint=f"use classes:{math.ceil(len(present) / labs)}, or "
            f"--labs {math.ceil(len(present) / classes_each)}",
        )
    # Each class gets places in proportion to its images: one, then by largest demand per place.
    limit_C = np.minimum(labs, np.maximum(units_C[present], 1))
    if limit_C.sum() < places:
        raise InputError(
            f"classes:{classes_each} at {labs} labs asks for {places} shares; the rarest classes "
            f"have too few images for more than {int(limit_C.sum())}.",
            hint=f"use classes:{max(1, int(limit_C.sum()) // labs)}, or fewer labs",
        )
    size_C = pool.label_counts()[present]
    given_C = np.ones(len(present), dtype=np.int64)
    heap = [(-size_C[c], c) for c in range(len(present)) if given_C[c] < limit_C[c]]
    heapq.heapify(heap)
    for _ in range(places - len(present)):
        _, c = heapq.heappop(heap)
        given_C[c] += 1
        if given_C[c] < limit_C[c]:
            heapq.heappush(heap, (-size_C[c] / given_C[c], c))
    # The most frequent class first, to the labs with most room: always works out (Gale-Ryser).
    room_K = np.full(labs, classes_each)
    share_CK = np.zeros((pool.labels, labs))
    for c in np.argsort(-given_C, kind="stable").tolist():
        chosen = np.lexsort((rng.random(labs), -room_K))[: given_C[c]]
        room_K[chosen] -= 1
        share_CK[present[c], chosen] = 1.0 / given_C[c]
    return share_CK


def _share_out(
    pool: _Pool, share_CK: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Cut each class, on either side of the test split, by its row of shares.

    Systematic sampling: a lab's number of images of a class is its share, rounded up or down. The
    start is random, or else the same labs would get the odd image of every class.
    """
    labels, labs = share_CK.shape
    stratum_U = 2 * pool.label_U + pool.train_U
    order = np.lexsort((rng.random(len(stratum_U)), stratum_U))
    stratum, size = stratum_U[order], pool.size_U[order]
    total_S = np.bincount(stratum, size, minlength=2 * labels)
    before = np.cumsum(size) - size - (np.cumsum(total_S) - total_S)[stratum]
    at = ((before + size / 2) / total_S[stratum] + rng.random(2 * labels)[stratum]) % 1.0
    cut_CK = np.cumsum(share_CK, axis=1)
    lab = np.zeros(len(at), dtype=np.int64)
    ends = np.flatnonzero(np.diff(stratum, append=-1)) + 1
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        # Half-open cuts: a lab without a share has an empty interval.
        lab[start:end] = np.searchsorted(cut_CK[stratum[start] // 2], at[start:end], side="right")
    last_C = labs - 1 - (share_CK[:, ::-1] > 0).argmax(axis=1)
    lab_U = np.empty(len(at), dtype=np.int64)
    lab_U[order] = np.minimum(lab, last_C[stratum // 2])  # rounding of the last cut below 1
    return lab_U


def _by_background(
    pool: _Pool, labs: int, background_N3: Floats, rng: np.random.Generator
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Clusters of units by their mean background, lab-1 the darkest."""
    colour_U3 = np.stack(
        [np.bincount(pool.unit_N, background_N3[:, d]) / pool.size_U for d in range(3)], axis=1
    )
    lab_U = k_means(perceptual(colour_U3), labs, rng)
    count_K = np.maximum(np.bincount(lab_U, minlength=labs), 1)
    mean_K3 = np.stack(
        [np.bincount(lab_U, colour_U3[:, d], minlength=labs) / count_K for d in range(3)], axis=1
    )
    return lab_U, tuple(f"background rgb({r:.0f}, {g:.0f}, {b:.0f})" for r, g, b in mean_K3)


def _spread_start(
    points_U3: NDArray[np.float64], clusters: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    centre_K3 = np.empty((clusters, 3))
    centre_K3[0] = points_U3[rng.integers(len(points_U3))]
    squared_U = np.square(points_U3 - centre_K3[0]).sum(axis=1)
    for k in range(1, clusters):
        # Far points are likelier; a repeated point has distance 0 and is taken only in need.
        cumulative_U = np.cumsum(squared_U)
        picked = np.searchsorted(cumulative_U, rng.random() * cumulative_U[-1], side="right")
        centre_K3[k] = points_U3[min(int(picked), len(points_U3) - 1)]
        np.minimum(squared_U, np.square(points_U3 - centre_K3[k]).sum(axis=1), out=squared_U)
    return centre_K3


def _fill_empty(
    lab_U: NDArray[np.int64], pool: _Pool, labs: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Give a lab that the draw left without a training unit one of the lab that has most."""
    lab_U = lab_U.copy()
    held_K = np.bincount(lab_U[pool.train_U], minlength=labs)
    empty = np.flatnonzero(held_K == 0)
    if not len(empty):
        return lab_U
    shuffled = rng.permutation(np.flatnonzero(pool.train_U))
    shuffled = shuffled[np.argsort(lab_U[shuffled], kind="stable")]
    stock = np.split(shuffled, np.cumsum(held_K)[:-1])
    taken_K = np.zeros(labs, dtype=np.int64)
    heap = [(-int(held_K[k]), k) for k in range(labs) if held_K[k] > 1]
    heapq.heapify(heap)
    for lab in empty.tolist():
        held, donor = heapq.heappop(heap)
        lab_U[stock[donor][taken_K[donor]]] = lab
        taken_K[donor] += 1
        if held + 1 < -1:
            heapq.heappush(heap, (held + 1, donor))
    return lab_U


def _take_classes(
    number: int,
    lab_N: Ints,
    targets_NC: Bools,
    train_N: Bools,
    rng: np.random.Generator,
    *,
    labs: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw the ``number`` of classes that each lab loses, and the images it keeps.

    A lab loses classes that it holds, keeps at least one, and no class is lost at its last holder.
    An image with a coarse label is lost when all classes of its set are.
    """
    classes = targets_NC.shape[1]
    missing_KC = np.zeros((labs, classes), dtype=np.bool_)
    if not number:
        return missing_KC, np.ones(len(lab_N), dtype=np.bool_)
    exact_N = train_N & (targets_NC.sum(axis=1) == 1)
    flat = lab_N[exact_N] * classes + targets_NC[exact_N].argmax(axis=1)
    held_KC = np.bincount(flat, minlength=labs * classes).reshape(labs, classes) > 0
    holders_C = held_KC.sum(axis=0)
    tie_K = rng.random(labs)
    for lab in np.lexsort((tie_K, held_KC.sum(axis=1))).tolist():  # those with least choice first
        held = np.flatnonzero(held_KC[lab])
        free = held[holders_C[held] > 1]
        if len(free) < number or len(held) <= number:
            raise InputError(
                f"missing:{number} cannot be met: lab-{lab + 1} holds {len(held)} classes, "
                f"of which {len(free)} are still held elsewhere.",
                hint="lower K of +missing:K, or choose a partition whose labs hold more classes",
            )
        # Most-held classes first: what is taken from a lab here must not starve the next.
        taken = free[np.lexsort((rng.random(len(free)), -holders_C[free]))][:number]
        missing_KC[lab, taken] = True
        holders_C[taken] -= 1
    left_NC = targets_NC & ~missing_KC[lab_N]
    return missing_KC, left_NC.any(axis=1) | ~train_N


def _positive(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise InputError(
            f"Partition {word!r} needs a number above 0, found {value!r}.",
            hint=f"try {_EXAMPLES[word]}",
        )
    return number


def _whole(word: str, value: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", value):
        raise InputError(
            f"Partition {word!r} needs a whole number above 0, found {value!r}.",
            hint=f"try {_EXAMPLES[word]}",
        )
    return int(value)


def _valid(word: str) -> str:
    near = difflib.get_close_matches(word.strip().lower(), _EXAMPLES, n=1)
    start = f"did you mean {_EXAMPLES[near[0]]}? " if near else ""
    return (
        start + "valid: iid, dirichlet:ALPHA, quantity:SIGMA, classes:K, acquisition, sources, "
        "column:NAME, each with +stain:STRENGTH or +missing:K after it"
    )
