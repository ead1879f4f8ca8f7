"""A lab's images for a plan: under privacy, what becomes of a patient depends on that patient."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cytofed import models
from cytofed.client import private
from cytofed.client.egress import public_reason
from cytofed.client.opening import Images, LimitedBudget, absent_classes, open_images
from cytofed.client.settings import Settings
from cytofed.client.split import hold_out_alone
from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.plan import Augment, Plan, from_dict
from cytofed.privacy.accounting import Guarantee, PlanCost, SubsampledGaussian
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.noise import SimulatedRandomness
from cytofed.privacy.terms import Terms

SIZE_PX = 16
CODES = ("BLA", "LYT", "EOS", "MON")
Fates = dict[str, list[tuple[str, str, str, str]]]
Remove = Callable[[str], None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan_of(
    seed: int = 0, *, unit: str = "patient", sigma: float | None = 4.0, fold: int = 0
) -> Plan:
    return from_dict(
        {
            "labels": {"scale": {"size_px": SIZE_PX, "field_um": 21.6}},
            "model": {"width": 8},
            "train": {"seed": seed},
            "privacy": {"unit": unit},
            "evaluation": {"fraction": 0.3, "sigma": sigma, "fold": fold},
        }
    )


def settings_of(data: Path, patients: str | None, labels: str | None = "marrow") -> Settings:
    return Settings(data=data, ledger=data / "ledger", labels=labels, patients=patients)


def fates(images: Images, whose: str) -> Fates:
    """What becomes of each patient's images (or of each image): side, path, label, pixels."""
    found: Fates = defaultdict(list)
    for side in ("train", "test", "calibration"):
        cells = getattr(images, side)
        pixels_NHWC = cells.images(np.arange(len(cells)))
        owners = cells.paths() if whose == "image" else cells.patients_N.tolist()
        for row, (owner, path) in enumerate(zip(owners, cells.paths(), strict=True)):
            pixels = hashlib.sha256(pixels_NHWC[row].tobytes()).hexdigest()
            found[owner].append((side, path, str(cells.targets_NC[row].nonzero()), pixels))
    return {owner: sorted(told) for owner, told in found.items()}


class RandomLab:
    """Few patients with all that once tied one to another: near-duplicates, quotas, doubtful rows.

    ``layout``: ``folder`` (patients' folders) or ``csv`` (a column).
    """

    def __init__(self, root: Path, rng: np.random.Generator, layout: str) -> None:
        self.data, self.layout, self.rng = root / "data", layout, rng
        self.patients = [f"p{n}" for n in range(int(rng.integers(3, 9)))]
        self.rows: list[list[bytes]] = []
        seen: list[np.ndarray] = []
        for patient in self.patients:
            for number in range(int(rng.integers(1, 5))):
                if seen and rng.random() < 0.4:  # looks like another patient's, or is the same
                    pixels = seen[int(rng.integers(len(seen)))].copy()
                    pixels[0, 0] ^= np.uint8(rng.integers(2))
                else:
                    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(5, 0).repeat(5, 1)
                seen.append(pixels)
                self.add(patient, number, pixels)
        if layout == "csv":
            self.confuse()
            self.write()

    def add(self, patient: str, number: int, pixels: np.ndarray) -> None:
        code = str(self.rng.choice(CODES, p=[0.6, 0.2, 0.15, 0.05]))
        if self.rng.random() < 0.03:
            code = "unheard-of"
        folder = self.data / patient / (code if self.layout == "folder" else "")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number}.bmp"
        Image.fromarray(pixels).save(file)
        if self.rng.random() < 0.05:
            file.write_bytes(file.read_bytes()[:100])
        self.rows.append([f"{patient}/{number}.bmp".encode(), code.encode(), patient.encode()])

    def confuse(self) -> None:
        """Rows that say something of other rows' images, or of how others are read."""
        first, *_, last = self.patients
        path = self.rows[-1][0]
        for row in (
            [path, b"EOS", first.encode()],  # the same image, another patient and label
            [path, b"LYT", last.encode()],  # and its own patient says two things
            [b"0.bmp", b"BLA", first.encode()],  # found by name, while no other has it
            [b"gone.bmp", b"BLA", b"M\xfcller"],  # not UTF-8
            [b'"open', b"BLA", first.encode()],  # a quote that never ends
        ):
            if self.rng.random() < 0.5:
                self.rows.insert(int(self.rng.integers(len(self.rows))), row)

    def write(self) -> None:
        lines = [b"path,label,patient", *map(b",".join, self.rows)]
        (self.data / "cells.csv").write_bytes(b"\n".join(lines))

    def remove(self, patient: str) -> None:
        self.rows = [row for row in self.rows if row[2] != patient.encode()]
        used = {row[0] for row in self.rows}
        for file in sorted((self.data / patient).rglob("*.bmp")):
            if f"{patient}/{file.name}".encode() not in used:
                file.unlink()
        if self.layout == "folder":
            shutil.rmtree(self.data / patient)
        else:
            self.write()

    def open(self, plan: Plan) -> Images:
        patients = "folder:1" if self.layout == "folder" else "column:patient"
        return open_images(plan, settings_of(self.data, patients), self.data)


def without(all_of: Fates, one: str) -> Fates:
    return {owner: told for owner, told in all_of.items() if owner != one}


@pytest.mark.parametrize(
    "labs", [range(20), pytest.param(range(20, 100), marks=pytest.mark.faults)], ids=["few", "many"]
)
@pytest.mark.parametrize("layout", ["folder", "csv"])
def test_without_any_one_patient_all_others_have_the_same_sides_and_images(
    layout: str, labs: range, tmp_path: Path
) -> None:
    both_sides = 0
    for number in labs:
        rng = np.random.default_rng(number)
        lab = RandomLab(tmp_path / str(number), rng, layout)
        plan = plan_of(number, sigma=None if number % 5 == 0 else 4.0, fold=number % 3)
        before = fates(lab.open(plan), "patient")
        both_sides += {told[0] for owned in before.values() for told in owned} > {"train"}
        gone = str(rng.choice(lab.patients))
        lab.remove(gone)
        after = fates(lab.open(plan), "patient")
        assert without(after, gone) == without(before, gone), f"lab {number} without {gone}"
        shutil.rmtree(lab.data)
    assert both_sides > len(labs) / 2


def test_without_any_one_image_all_others_have_the_same_sides_where_an_image_is_the_unit(
    tmp_path: Path,
) -> None:
    for number in range(10):
        rng = np.random.default_rng(number)
        lab = RandomLab(tmp_path / str(number), rng, "folder")
        plan = plan_of(number, unit="image")
        settings = settings_of(lab.data, None)
        before = fates(open_images(plan, settings, lab.data), "image")
        gone = str(rng.choice(sorted(before)))
        (lab.data / gone).unlink()
        after = fates(open_images(plan, settings, lab.data), "image")
        assert after == without(before, gone)


def real_lab(real_data: Path, root: Path, patients: Sequence[str]) -> tuple[Path, Path]:
    """Some patients of the malaria images, with their CSV and a map for its labels."""
    source = real_data / "malaria_cells"
    header, *rows = (source / "cells.csv").read_text().splitlines()
    root.mkdir()
    kept = [row for row in rows if row.split(",")[2] in patients]
    for patient in patients:
        shutil.copytree(source / "images" / patient, root / "images" / patient)
    (root / "cells.csv").write_text("\n".join([header, *kept]))
    label_map = root / "map.yaml"
    label_map.write_text(
        "scheme: bone-marrow-21\nlabels: {parasitized: ART, uninfected: EBO}\nfield_um: 10\n"
    )
    return root, label_map


def patients_of(real_data: Path) -> list[str]:
    return sorted(path.name for path in (real_data / "malaria_cells" / "images").iterdir())


def test_without_any_one_real_patient_all_others_have_the_same_sides_and_images(
    real_data: Path, tmp_path: Path
) -> None:
    patients = patients_of(real_data)[:30:2]
    root, label_map = real_lab(real_data, tmp_path / "lab", patients)
    plan, settings = plan_of(3), settings_of(root, "column:patient", str(label_map))
    before = fates(open_images(plan, settings, root), "patient")
    assert sorted(before) == patients
    assert {told[0][0] for told in before.values()} == {"train", "test"}
    rows = (root / "cells.csv").read_text()
    for gone in patients[::5]:
        kept = [line for line in rows.splitlines() if f",{gone}," not in line]
        (root / "cells.csv").write_text("\n".join(kept))
        after = fates(open_images(plan, settings, root), "patient")
        assert after == without(before, gone), gone


def released_sum(images: Images, start: models.Classifier, plan: Plan) -> np.ndarray:
    """The sum of a step's clipped gradients before its noise, by the lab's own training."""
    net = models.build(plan.model, len(load_scheme("bone-marrow-21").codes), seed=0)
    net.load_state_dict(start.state_dict())
    terms = Terms(
        training=SubsampledGaussian("patient", sampling_rate=1.0, sigma=1e-16, steps=1),
        rounds=1,
        delta=1e-3,
        max_norm=1.0,
        cells_per_unit=100,
        guarantee=Guarantee(math.inf, 1e-3, "patient", "RDP"),
    )
    private.train_privately(
        net,
        images.train,
        plan,
        terms,
        declared_patients=10,
        randomness=SimulatedRandomness(0, "sum"),
        progress_start=0.0,
        progress_end=1.0,
        absent_C=np.zeros(images.train.targets_NC.shape[1], bool),
        device="cpu",
    )
    pairs = zip(net.parameters(), start.parameters(), strict=True)
    moved = torch.cat([(now - then).detach().reshape(-1) for now, then in pairs])
    return 10 * moved.numpy()


def test_one_patient_moves_the_released_sum_by_at_most_the_clipping_norm(tmp_path: Path) -> None:
    plan = plan_of()
    steady: dict[str, Any] = {
        "optimizer": "sgd",
        "lr": 1.0,
        "momentum": 0.0,
        "schedule": "constant",
    }
    steady |= {"warmup": 0.0, "weight_decay": 0.0, "precision": "float32", "ema": 0.0}
    # One patient more shifts the stream that augmentation is drawn from; its law stays the same.
    steady |= {"augment": Augment(flip=False, rotate=False, shift=0, scale=0, stain=0)}
    plan = replace(plan, train=replace(plan.train, **steady))
    start = models.build(plan.model, len(load_scheme("bone-marrow-21").codes), seed=0)
    for number in range(8):
        rng = np.random.default_rng(number)
        lab = RandomLab(tmp_path / str(number), rng, "csv")
        of_lab = replace(plan, train=replace(plan.train, seed=number))
        before = released_sum(lab.open(of_lab), start, of_lab)
        lab.remove(str(rng.choice(lab.patients)))
        after = released_sum(lab.open(of_lab), start, of_lab)
        assert np.linalg.norm(after - before) <= 1.0 + 1e-4


def test_nobody_is_held_out_where_no_scores_are_released(tmp_path: Path) -> None:
    lab = RandomLab(tmp_path, np.random.default_rng(1), "folder")
    assert len(lab.open(plan_of(sigma=4.0)).test) > 0
    assert len(lab.open(plan_of(sigma=None)).test) == 0


def test_folds_part_the_patients_and_take_their_share_of_many() -> None:
    names = [f"patient {n}" for n in range(3000)]
    for folds in (3, 5, 7):
        sides = [
            hold_out_alone(names, fraction=1 / folds, fold=fold, seed=2) for fold in range(folds)
        ]
        assert (np.sum(sides, axis=0) == 1).all()
        assert all(abs(side.mean() - 1 / folds) < 0.03 for side in sides)
    first, other = (hold_out_alone(names, fraction=0.2, seed=seed) for seed in (1, 2))
    assert not np.array_equal(first, other)


def test_a_label_map_that_is_found_by_itself_is_refused_under_privacy(tmp_path: Path) -> None:
    (tmp_path / "p1" / "BLA").mkdir(parents=True)
    Image.new("RGB", (20, 20), "pink").save(tmp_path / "p1" / "BLA" / "1.png")
    with pytest.raises(InputError, match="labels is empty") as refused:
        open_images(plan_of(), settings_of(tmp_path, "folder:1", None), tmp_path)
    assert refused.value.hint == "set labels: marrow"


@pytest.mark.parametrize("layout", ["folder", "csv"])
@pytest.mark.parametrize("fate", ["gone", "unreadable", "unheard-of"])
def test_whether_the_only_patient_is_there_does_not_decide_if_a_lab_takes_part(
    tmp_path: Path, layout: str, fate: str
) -> None:
    lab = RandomLab(tmp_path, np.random.default_rng(1), layout)
    if layout == "csv":
        lab.rows = [row for row in lab.rows if row[0] != b"gone.bmp"]
        lab.write()
    for patient in lab.patients:
        match fate:
            case "gone":
                lab.remove(patient)
            case "unreadable":
                for file in (lab.data / patient).rglob("*.bmp"):
                    file.write_bytes(b"BM")
            case _ if layout == "folder":
                for file in sorted((lab.data / patient).rglob("*.bmp")):
                    other = lab.data / patient / "unheard-of"
                    other.mkdir(exist_ok=True)
                    file.rename(other / file.name)
            case _:
                lab.rows = [[path, b"unheard-of", who] for path, _, who in lab.rows]
                lab.write()
    images = lab.open(plan_of())
    assert len(images.train) == len(images.test) == 0
    assert images.train.patients_N is not None
    scheme = load_scheme(plan_of().labels.scheme)
    assert not absent_classes(plan_of(), scheme, images.train).all()


def test_a_lab_that_holds_nobody_masks_what_its_map_declares(tmp_path: Path) -> None:
    lab = RandomLab(tmp_path, np.random.default_rng(1), "folder")
    plan, scheme = plan_of(), load_scheme("bone-marrow-21")
    label_map = tmp_path / "map.yaml"
    label_map.write_text("extends: marrow\nlabels: {KSC: excluded}\nabsent: [KSC]\n")
    settings = settings_of(lab.data, "folder:1", str(label_map))
    train = open_images(plan, settings, lab.data).train
    nobody = train.take(np.zeros(0, np.int64))
    masked = absent_classes(plan, scheme, train)
    assert masked.sum() == 1
    assert np.array_equal(absent_classes(plan, scheme, nobody), masked)


def test_no_patient_has_more_images_than_the_price_of_a_plan_for_images_counts_on(
    tmp_path: Path,
) -> None:
    lab = RandomLab(tmp_path, np.random.default_rng(1), "folder")
    settings = settings_of(lab.data, "folder:1")
    plan = plan_of(unit="image")
    images = open_images(plan, settings, tmp_path)
    folders = [len(list(folder.rglob("*.bmp"))) for folder in lab.data.iterdir()]
    most = images.largest_patient
    assert most is not None
    assert 1 < most <= max(folders)
    ledger = tmp_path / "ledger.sqlite"
    Ledger.create(ledger)
    budget = LimitedBudget(ledger, "default", "f/lab", "patient")
    cost = PlanCost(1e-5, 100, 2, SubsampledGaussian("image", 0.5, 2.0, 1))
    for counted in (None, most):
        with Ledger.open(ledger) as book:
            known = replace(cost, images_per_patient=counted)
            book.hold(federation="f/lab", plan_sha256=plan.sha256, cost=known)
        budget.check_images(plan.sha256, images)
    with Ledger.open(ledger) as book:
        fewer = replace(cost, images_per_patient=most - 1)
        book.hold(federation="f/lab", plan_sha256=plan.sha256, cost=fewer)
    with pytest.raises(InputError, match=f"a patient here has {most} images") as found:
        budget.check_images(plan.sha256, images)
    assert f" {most} " not in public_reason(found.value)  # what the coordinator is told
    nobody = open_images(plan, settings_of(lab.data, "none"), tmp_path)
    with pytest.raises(InputError, match="nobody knows"):
        budget.check_images(plan.sha256, nobody)
