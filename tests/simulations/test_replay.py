"""Round 1 of a run, replayed: what its updates and their secure sum show of the labs' images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from cytofed import models
from cytofed.plan import load_plan
from cytofed.privacy.terms import terms_of
from cytofed.simulations import replay as replaying
from cytofed.simulations.attacks import RECOGNISABLE, SHOWN
from cytofed.simulations.membership import Area
from cytofed.simulations.replay import Replay, Sent, Shown, Views, attack_round, replay, shown_by
from cytofed.simulations.simulate import Request
from cytofed.simulations.virtual import VirtualLabs
from cytofed.strategies import make_strategy

from .test_virtual import cut

Small = Callable[..., Request]


class Simulate(Protocol):
    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


def marrow_labs(folder: Path, out: Path, cache_dir: Path, *overrides: str) -> VirtualLabs:
    return cut(Request(load_plan("demo", overrides), out, data=(folder,), cache_dir=cache_dir))


def replayed(labs: VirtualLabs) -> dict[str, tuple[Sent, Shown]]:
    """What each way of sending shows, by its name."""
    done = replay(labs, terms_of(labs.plan))
    return {sent.way: (sent, shown_by(done.pictures_of(sent), sent)) for sent in done.sent}


def check_that_the_sum_hides(
    found: dict[str, tuple[Sent, Shown]], labs: int, above: float = 0.0
) -> Shown:
    """One lab's update gives cells away; the sum is no more like its images than like others.

    ``above``: how far above chance its area may be.
    """
    sent, alone = found["one lab's update"]
    assert not sent.of_plan
    assert alone.gives_away
    assert not alone.chance_N.any()
    sent, summed = found[f"secure sum of {labs} labs"]
    assert sent.of_plan
    assert summed.area.low <= 0.5 + above
    assert summed.area.high < 0.6 + above
    assert share_recognised(summed) < share_recognised(alone) / 5
    return summed


def share_recognised(shown: Shown) -> float:
    return float(shown.recognised_N.mean())


def test_the_secure_sum_of_the_demo_s_round_1_is_no_more_like_its_images_than_like_held_out_ones(
    sample: Path, cache_dir: Path, tmp_path: Path
) -> None:
    plan = "secure_aggregation.enabled=true", "train.seed=1"
    labs = marrow_labs(sample / "marrow", tmp_path / "run", cache_dir, *plan)
    assert len(check_that_the_sum_hides(replayed(labs), labs=3).trained_N) == 401


@pytest.mark.faults  # 10 s each; CI runs it
@pytest.mark.parametrize(
    ("longer", "images", "above"),
    [((), 100, 0.2), (("train.rounds=400", "train.local_epochs=0.05"), 200, 0.1)],
)
def test_in_the_marrow_plan_s_round_1_cells_are_recognised_in_one_update_and_hardly_in_the_sum(
    longer: tuple[str, ...],
    images: int,
    above: float,
    real_data: Path,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    plan = load_plan("marrow", ["secure_aggregation.enabled=true", "train.seed=3", *longer])
    data = (real_data / "bone_marrow_128",)
    labs = cut(Request(plan, tmp_path / "run", data=data, cache_dir=cache_dir))
    # A fortieth of the images is in the sum: a little of all shows, which only noise hides. Of
    # rounds twice as long, whose sums are of twice as many, less does.
    summed = check_that_the_sum_hides(replayed(labs), labs=4, above=above)
    assert len(summed.trained_N) > images
    assert share_recognised(summed) < 0.01


def test_a_sum_over_few_images_gives_some_away_and_says_so(
    few: Path, cache_dir: Path, tmp_path: Path
) -> None:
    plan = "train.local_epochs=1", "secure_aggregation.enabled=true", "simulation.partition=iid"
    sent, shown = replayed(marrow_labs(few, tmp_path / "run", cache_dir, *plan))[
        "secure sum of 3 labs"
    ]
    assert sent.of_plan
    assert shown.gives_away
    assert shown.area.low > 0.5


@pytest.mark.parametrize("net", ["model.arch=cytonet", "labels.scale.size_px=48"])  # whole; head
def test_clipped_and_noised_updates_and_sums_show_nothing(
    net: str, few: Path, cache_dir: Path, tmp_path: Path
) -> None:
    plan = "privacy.unit=patient", "privacy.sigma=2", "simulation.pseudo_patient_cells=4", net
    found = replayed(marrow_labs(few, tmp_path / "run", cache_dir, *plan))
    assert found["one lab's update, not protected"][1].gives_away
    for way in ("one lab's update", "secure sum of 3 labs"):
        sent, shown = found[f"{way}, clipped and noised"]
        assert sent.of_plan == (way == "one lab's update")
        assert not shown.gives_away
        assert shown.trained_N.max() < 0.2
        assert shown.area.low <= 0.5


def test_with_the_run_s_own_net_the_replay_ends_at_the_run_s_weights(
    small: Small, directly: Simulate
) -> None:
    request = small("train.rounds=1", "simulation.labs=3", "simulation.partition=iid")
    directly(request)
    labs = VirtualLabs.load(request.out / "checkpoints")
    plan, strategy = labs.plan, make_strategy(labs.plan.strategy)
    net, _ = models.load_model(labs.folder / "start.safetensors")
    manifest = models.manifest(net, plan.model.trainable)
    start_P = models.flatten(net, manifest)
    round_ = replaying._Round(plan, strategy, net, manifest, start_P)
    done = [round_.train(replaying._Place.of(labs, lab, 1.0), None) for lab in range(3)]
    end_P = start_P + replaying.secure_sum(plan, strategy, done)
    released, _ = models.load_model(request.out / "model.safetensors")
    body_P = ~manifest.mask("head")  # classes without an image are closed in the head
    np.testing.assert_allclose(end_P[body_P], models.flatten(released, manifest)[body_P], atol=1e-6)


def test_views_are_what_training_saw(few: Path, cache_dir: Path, tmp_path: Path) -> None:
    still = [f"train.augment.{key}=false" for key in ("flip", "rotate")]
    still += [f"train.augment.{key}=0" for key in ("shift", "scale", "stain")]
    labs = marrow_labs(few, tmp_path / "run", cache_dir, "train.local_epochs=1", *still)
    (sent, *_), lab = replay(labs, None).sent, labs.lab(0)
    image_V = sent.trained.image_V
    pixels_VHW3 = lab.train.images(image_V)
    np.testing.assert_array_equal(
        sent.trained.pixels_VD, pixels_VHW3.transpose(0, 3, 1, 2).reshape(len(image_V), -1)
    )
    assert set(image_V.tolist()) <= set(range(len(lab.train)))


def test_fewer_labs_where_time_is_short_and_never_too_few_for_a_sum(
    few: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "PASSES", 1)
    labs = marrow_labs(
        few, tmp_path / "run", cache_dir, "simulation.labs=5", "train.local_epochs=1"
    )
    done: Replay = replay(labs, None)
    assert done.labs == 3
    assert done.changed == ("3 of 5 labs, which is easier for the attacker",)


def test_a_control_that_is_recognised_as_often_clears_the_sum() -> None:
    def shown(trained: int, held_out: int) -> Shown:
        likeness_N, number_N = np.full(100, 0.5, np.float32), np.arange(100)
        found = number_N < trained, number_N < held_out
        none_SD = np.zeros((0, 3), np.float32)
        return Shown(likeness_N, likeness_N, *found, Area(0.5, 0.4, 0.6), none_SD, none_SD)

    assert not shown(0, 0).gives_away
    assert shown(1, 0).gives_away
    assert not shown(8, 6).gives_away
    assert shown(20, 5).gives_away


def views_of(pixels_ND: npt.NDArray[np.float32], first: int = 0) -> Views:
    number_N = first + np.arange(len(pixels_ND))
    return Views(np.rint(255 * np.clip(pixels_ND, 0, 1)).astype(np.uint8), number_N, number_N)


def test_a_cell_is_recognised_in_its_picture_and_none_in_a_stain_that_many_share() -> None:
    rng = np.random.default_rng(0)
    cells_ND = (0.5 + 0.1 * rng.normal(size=(60, 300))).astype(np.float32)
    stain_D = 0.3 * np.sin(np.arange(300)).astype(np.float32)
    cells_ND[10::10] += stain_D  # of images on either side
    update_P = np.zeros(0, np.float32)
    sent = Sent("sum", update_P, True, False, views_of(cells_ND[:40]), views_of(cells_ND[40:], 40))
    shown = shown_by(np.stack([cells_ND[3], 0.5 + stain_D]), sent)
    assert np.flatnonzero(shown.recognised_N).tolist() == [3]
    assert not shown.chance_N.any()
    assert (shown.trained_N >= RECOGNISABLE).sum() > 1
    assert (shown.held_out_N >= RECOGNISABLE).sum() > 1
    np.testing.assert_allclose(shown.nearest_SD[0], cells_ND[3], atol=0.01)
    held_out = shown_by(cells_ND[[45]], sent)  # a picture of what nobody trained on
    assert not held_out.recognised_N.any()
    assert np.flatnonzero(held_out.chance_N).tolist() == [5]


def test_a_folder_without_its_images_is_told_so(tmp_path: Path) -> None:
    terms = terms_of(load_plan("demo", ["privacy.unit=patient", "privacy.sigma=4"]))
    assert terms is not None
    assert "checkpoints" in attack_round(tmp_path, terms)["missing"]


def test_pictures_are_told_with_their_nearest_images(
    few: Path, cache_dir: Path, tmp_path: Path
) -> None:
    labs = marrow_labs(few, tmp_path / "run", cache_dir, "train.local_epochs=1")
    terms = terms_of(load_plan("demo", ["privacy.unit=patient", "privacy.sigma=4"]))
    assert terms is not None
    found = attack_round(tmp_path / "run", terms)
    assert found["labs"] == len(labs.names)
    for row in found["rows"]:
        assert len(row["pictures"]) == len(row["nearest"]) == SHOWN
        assert row["pictures"][0].startswith("data:image/png;base64,")
        assert row["recognised"] <= row["images"]
