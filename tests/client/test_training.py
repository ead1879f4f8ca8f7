"""Local training: seeded to the bit, honest about sets and absent classes, and it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cytofed import models
from cytofed.arrays import Float32
from cytofed.client import training
from cytofed.client.cells import Cells, Source, open_cells
from cytofed.client.reader import Listing
from cytofed.client.training import Progress, Trained, loss_on_sets
from cytofed.errors import CytofedError, InputError
from cytofed.labels import load_scheme
from cytofed.plan import Augment, Model, Plan, Train
from cytofed.strategies.strategy import Correction

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 40]])
SETTINGS = Train(batch=8, lr=3e-3, local_epochs=2, augment=Augment(stain=0.02), seed=1)
PLAN = Plan(model=Model(width=8), train=SETTINGS)


def blobs(counts: tuple[int, ...] = (16, 16, 16), classes: int = 4, side: int = 16) -> Cells:
    """Discs whose colour is their class, on a grey field."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(len(counts)), counts)
    pixels = rng.integers(120, 140, (len(class_N), side, side, 3)).astype(np.uint8)
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    pixels[:, x**2 + y**2 < side**2 / 9] = COLOURS[class_N][:, None] + rng.integers(
        -9, 9, (len(class_N), 1, 3)
    )
    return cells_of(pixels, np.eye(classes, dtype=bool)[class_N])


def cells_of(pixels: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Cells:
    count = len(pixels)
    listing = Listing(
        root=Path("blobs"),
        paths=tuple(f"{i:03}.png" for i in range(count)),
        targets_NC=targets,
        patients=None,
        columns={},
        field_um=None,
        absent=frozenset(),
        excluded={},
        problems=(),
        map_name="none",
    )
    mapped: Any = pixels  # what training asks of a memory map, an array in memory answers
    source = Source(
        listing, mapped, np.zeros(count, np.uint64), np.zeros((count, 3), np.float32), Path("none")
    )
    return Cells(
        (source,),
        np.zeros(count, np.int16),
        np.arange(count, dtype=np.int32),
        targets,
        None,
        pixels.shape[1],
    )


def run(
    cells: Cells,
    plan: Plan = PLAN,
    seed: int = 3,
    net_seed: int = 0,
    net: models.Classifier | None = None,
    **options: Any,
) -> tuple[Float32, Trained]:
    """Weights after one round's training of a net (a new one unless given), and what it reports."""
    net = net or models.build(plan.model, cells.targets_NC.shape[1], seed=net_seed)
    options = {"progress_start": 0.0, "progress_end": 1.0, "device": "cpu", **options}
    trained = training.train(net, cells, plan, seed=seed, **options)
    return models.flatten(net, models.manifest(net, "all")), trained


def changed(**values: Any) -> Plan:
    return replace(PLAN, train=replace(SETTINGS, **values))


# --- reproducibility


def test_same_seed_gives_the_same_weights_to_the_bit() -> None:
    cells = blobs()
    np.testing.assert_array_equal(run(cells)[0], run(cells)[0])
    assert not np.array_equal(run(cells)[0], run(cells, seed=4)[0])


def test_training_ignores_and_keeps_the_global_generators() -> None:
    cells = blobs()
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    one = run(cells)[0]
    after = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    torch.manual_seed(2)
    np.testing.assert_array_equal(one, run(cells)[0])


def test_seeds_that_differ_above_32_bits_differ() -> None:
    cells = blobs()
    assert not np.array_equal(run(cells, seed=7)[0], run(cells, seed=7 + 2**40)[0])


def test_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    run(blobs((8, 8)), changed(threads=before + 1))
    assert torch.get_num_threads() == before


# --- it learns


@pytest.mark.parametrize("balance", ["none", "sampler", "weights", "logits"])
def test_colours_of_blobs_are_learned(balance: str) -> None:
    cells = blobs()
    plan = changed(balance=balance, steps_per_round=60)
    net = models.build(plan.model, 4, seed=0)
    training.train(net, cells, plan, progress_start=0, progress_end=1, seed=1, device="cpu")
    probs = training.predict(net, cells, batch=10, device="cpu")
    assert probs.shape == (48, 4)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert (probs.argmax(axis=1) == cells.class_N).mean() > 0.9


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "lr": 0.05}, {"ema": 0.5}])
def test_loss_falls_with_sgd_and_with_averaged_weights(settings: dict[str, Any]) -> None:
    losses: list[float] = []
    plan = changed(steps_per_round=40, **settings)
    run(blobs(), plan, on_step=lambda p: losses.append(p.loss))
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])


def test_real_cells_of_the_sample_are_learned_above_chance(sample: Path, tmp_path: Path) -> None:
    scheme = load_scheme("bone-marrow-21")
    cells = open_cells([sample / "marrow"], scheme, size_px=32, field_um=21.6, cache_dir=tmp_path)
    plan = changed(steps_per_round=120, batch=16)
    net = models.build(plan.model, len(scheme.codes), seed=0)
    training.train(net, cells, plan, progress_start=0, progress_end=1, seed=1, device="cpu")
    probs = training.predict(net, cells, device="cpu")
    right = (probs.argmax(axis=1) == cells.class_N).mean()
    assert right > 2 / len(np.unique(cells.class_N))


def test_prediction_does_not_depend_on_the_batch() -> None:
    cells = blobs()
    net = models.build(PLAN.model, 4, seed=0)
    one = training.predict(net, cells, batch=48, device="cpu")
    np.testing.assert_allclose(one, training.predict(net, cells, batch=7, device="cpu"), atol=1e-5)


def test_prediction_of_no_cells_is_empty() -> None:
    cells = blobs().take(np.zeros(0, np.int64))
    probs = training.predict(models.build(PLAN.model, 4, seed=0), cells, device="cpu")
    assert probs.shape == (0, 4)


def test_head_trained_on_known_features_learns_and_leaves_the_encoder_alone() -> None:
    cells = blobs()
    plan = replace(changed(steps_per_round=60), model=replace(PLAN.model, trainable="head"))
    net = models.build(plan.model, 4, seed=0)
    before = {n: p.detach().clone() for n, p in net.encoder.named_parameters()}
    features_NF = models.features(
        net, models.images_of(torch.from_numpy(cells.images(np.arange(len(cells)))))
    ).numpy()
    training.train(
        net,
        cells,
        plan,
        progress_start=0,
        progress_end=1,
        features_NF=features_NF,
        seed=1,
        device="cpu",
    )
    assert all(torch.equal(p, before[n]) for n, p in net.encoder.named_parameters())
    probs = training.predict(net, cells, features_NF=features_NF, device="cpu")
    assert (probs.argmax(axis=1) == cells.class_N).mean() > 0.9
    again = training.predict(net, cells, device="cpu", precision="float32")  # as the features are
    np.testing.assert_allclose(probs, again, atol=1e-5)


def test_a_stain_is_put_on_before_training_and_prediction() -> None:
    class Inverted:
        def apply(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.asarray(255 - pixels)

    cells = blobs()
    inverted = cells_of(255 - cells.images(np.arange(len(cells))), cells.targets_NC)
    np.testing.assert_array_equal(run(cells, stain=Inverted())[0], run(inverted)[0])
    net = models.build(PLAN.model, 4, seed=0)
    np.testing.assert_array_equal(
        training.predict(net, cells, device="cpu", stain=Inverted()),
        training.predict(net, inverted, device="cpu"),
    )


# --- steps and rates


def test_fractional_epochs_and_steps_per_round_count_steps() -> None:
    settings = Train(batch=10, local_epochs=1.5)
    assert training.count_steps(settings, 100) == 15
    assert training.count_steps(replace(settings, local_epochs=0.01), 100) == 1
    assert training.count_steps(settings, 4) == 2
    assert training.count_steps(replace(settings, steps_per_round=7), 100) == 7


def test_with_steps_per_epoch_labs_of_any_size_make_as_many_steps_over_the_same_share() -> None:
    settings = Train(batch=1000, local_epochs=0.125, steps_per_epoch=64)
    for images in (5, 640, 6400):
        assert training.count_steps(settings, images) == 8
        targets = np.ones((images, 2), bool)
        sizes = [len(b) for b in training.draw_batches(settings, targets, 8, seed=0)]
        assert sizes == [max(1, images // 64)] * 8
    assert training.count_steps(replace(settings, steps_per_round=3), 640) == 3


def test_one_epoch_shows_every_image_once_and_batches_are_full() -> None:
    targets = np.ones((23, 2), bool)
    batches = list(training.draw_batches(Train(batch=5), targets, 23, seed=0))
    assert {len(b) for b in batches} == {5}
    counts = np.bincount(np.concatenate(batches), minlength=23)
    assert counts.tolist() == [5] * 23
    assert sorted(np.concatenate(batches)[:23]) == list(range(23))


@pytest.mark.parametrize(("images", "share"), [(23, 8), (640, 80), (645, 80), (5, 8)])
def test_rounds_shorter_than_an_epoch_show_every_image_once_before_any_twice(
    images: int, share: int
) -> None:
    settings = Train(batch=3, local_epochs=0.25, steps_per_epoch=share)
    targets = np.ones((images, 2), bool)
    steps = training.count_steps(settings, images)
    assert steps == share // 4
    rounds = [
        np.concatenate(training.draw_batches(settings, targets, steps, seed=0, in_round=number))
        for number in range(1, 9)
    ]
    seen = np.bincount(np.concatenate(rounds), minlength=images)
    if images >= share:
        assert seen.tolist() == [2] * images, "eight quarters are two epochs to the image"
    assert seen.max() - seen.min() <= 1
    again = training.draw_batches(settings, targets, steps, seed=0, in_round=5)
    np.testing.assert_array_equal(np.concatenate(again), rounds[4])
    if images > 8:
        assert not np.array_equal(rounds[4], rounds[0]), "another epoch, another order"


def test_sampler_draws_classes_alike() -> None:
    targets = np.eye(3, dtype=bool)[np.repeat([0, 1], [90, 10])]
    plan = Train(batch=50, balance="sampler")
    drawn = np.concatenate(list(training.draw_batches(plan, targets, 40, seed=0)))
    assert targets[drawn].mean(axis=0) == pytest.approx([0.5, 0.5, 0.0], abs=0.05)


def test_rate_follows_the_whole_federation_and_rounds_join_up() -> None:
    settings = Train(lr=1.0, warmup=0.1, schedule="cosine")
    rates = [training.learning_rate(settings, p) for p in (0.05, 0.1, 0.5, 0.999)]
    assert rates[0] < rates[1]
    assert rates[1] > rates[2] > rates[3] > 0
    assert rates[2] == pytest.approx(0.5)
    seen: list[float] = []
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        run(
            blobs(),
            changed(steps_per_round=5),
            progress_start=start,
            progress_end=end,
            on_step=lambda p: seen.append(p.lr),
        )
    whole: list[float] = []
    run(blobs(), changed(steps_per_round=10), on_step=lambda p: whole.append(p.lr))
    assert seen == pytest.approx(whole)


def test_report_counts_steps_and_images() -> None:
    seen: list[Progress] = []
    _, trained = run(blobs(), on_step=seen.append)
    assert (trained.steps, trained.images) == (12, 96)
    assert [p.step for p in seen] == list(range(1, 13))
    assert {p.steps for p in seen} == {12}
    assert trained.loss == pytest.approx(np.mean([p.loss for p in seen]))


def test_fewer_images_than_a_batch_train_all_the_same() -> None:
    _, trained = run(blobs((2, 1)), changed(local_epochs=3))
    assert (trained.steps, trained.images) == (3, 9)


# --- strategies


def test_a_correction_of_nothing_changes_nothing() -> None:
    cells = blobs()
    zero = Correction(pull=0.0, offset_P=np.zeros_like(run(cells)[0]))
    np.testing.assert_array_equal(run(cells)[0], run(cells, correction=zero)[0])


def test_pull_keeps_weights_near_their_start() -> None:
    cells, plan = blobs(), changed(optimizer="sgd", lr=0.02, steps_per_round=30, weight_decay=0)
    start, _ = run(cells, changed(optimizer="sgd", lr=1e-12, steps_per_round=1))
    moved = [
        float(np.linalg.norm(run(cells, plan, correction=Correction(pull=pull))[0] - start))
        for pull in (0.0, 1.0, 10.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_one_sgd_step_is_minus_rate_times_gradient_plus_offset() -> None:
    cells = blobs()
    plan = changed(optimizer="sgd", momentum=0.0, weight_decay=0.0, steps_per_round=1, warmup=0.0)
    plain, trained = run(cells, plan)
    offset = np.linspace(-1, 1, len(plain), dtype=np.float32)
    corrected, _ = run(cells, plan, correction=Correction(offset_P=offset))
    np.testing.assert_allclose(corrected, plain - trained.reach * offset, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_reach_is_how_far_a_gradient_of_one_carries_a_weight(momentum: float, ema: float) -> None:
    plan = changed(optimizer="sgd", momentum=momentum, ema=ema, weight_decay=0, steps_per_round=25)
    rates: list[float] = []
    run(blobs(), plan, on_step=lambda p: rates.append(p.lr))
    weight, reach = nn.Parameter(torch.zeros(1)), training.Reach(plan.train)
    optimizer = training.make_optimizer([weight], plan.train)
    average = training.Average([weight], plan.train.ema)
    for rate in rates:
        weight.grad = torch.ones(1)
        training.take_step(optimizer, rate)
        average.update()
        reach.step(rate)
    average.finish()
    assert reach.total == pytest.approx(-float(weight.detach()), rel=1e-5)
    assert run(blobs(), plan)[1].reach == pytest.approx(reach.total)
    if not momentum and not ema:
        assert reach.total == pytest.approx(sum(rates))


def test_shared_momentum_is_where_the_optimizer_starts_and_where_it_ends() -> None:
    cells = blobs()
    plan = changed(optimizer="sgd", momentum=0.9, weight_decay=0.0, steps_per_round=1, warmup=0.0)
    start, _ = run(cells, replace(plan, train=replace(plan.train, lr=1e-12)))
    rate = plan.train.lr
    plain, without = run(cells, plan)
    gradient = (start - plain) / (1.9 * rate)  # Nesterov's first step from rest
    given = np.linspace(-0.1, 0.1, len(plain), dtype=np.float32)
    moved, trained = run(cells, plan, correction=Correction(momentum_P=given))
    assert without.momentum_P is None
    assert trained.momentum_P is not None
    np.testing.assert_allclose(trained.momentum_P, 0.9 * given + gradient, atol=1e-3)
    np.testing.assert_allclose(
        moved, start - rate * (gradient + 0.9 * trained.momentum_P), atol=1e-5
    )


def test_two_rounds_that_share_momentum_are_one_round_of_twice_the_steps() -> None:
    cells = blobs((2, 2, 2, 2))  # one batch of all: which images a step has is no matter
    still = Augment(flip=False, rotate=False, shift=0, scale=0, stain=0)
    once = changed(
        optimizer="sgd", lr=0.01, steps_per_round=6, schedule="constant", warmup=0, augment=still
    )
    half = replace(once, train=replace(once.train, steps_per_round=3))
    zeros = np.zeros_like(run(cells, once)[0])
    net = models.build(once.model, 4, seed=0)
    _, first = run(cells, half, net=net, correction=Correction(momentum_P=zeros))
    twice, _ = run(cells, half, net=net, correction=Correction(momentum_P=first.momentum_P))
    whole, _ = run(cells, once)
    np.testing.assert_allclose(twice, whole, atol=1e-4)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"momentum": 0.0}])
def test_an_optimizer_without_momentum_has_none_to_share(settings: dict[str, Any]) -> None:
    plan = changed(**{"optimizer": "sgd", **settings})
    zeros = np.zeros_like(run(blobs(), plan)[0])
    with pytest.raises(InputError, match="none to share"):
        run(blobs(), plan, correction=Correction(momentum_P=zeros))


def test_a_correction_of_wrong_size_is_refused() -> None:
    with pytest.raises(InputError, match="correction of shape"):
        run(blobs(), correction=Correction(offset_P=np.zeros(3, np.float32)))
    sgd = changed(optimizer="sgd", momentum=0.9)
    with pytest.raises(InputError, match="momentum of shape"):
        run(blobs(), sgd, correction=Correction(momentum_P=np.zeros(3, np.float32)))


@pytest.mark.parametrize("trainable", ["head", "norms"])
def test_only_the_trainable_tensors_move(trainable: Any) -> None:
    plan = replace(PLAN, model=replace(PLAN.model, trainable=trainable))
    net = models.build(plan.model, 4, seed=0)
    before = models.tensors_of(net)
    before = {name: array.copy() for name, array in before.items()}
    training.train(net, blobs(), plan, progress_start=0, progress_end=1, seed=1, device="cpu")
    moved = {n for n, a in models.tensors_of(net).items() if not np.array_equal(a, before[n])}
    assert moved == set(models.manifest(net, trainable).names)


def test_gradient_of_a_unit_is_its_own() -> None:
    """What private training clips: no trace of the unit before, none of other images."""
    cells = blobs()
    net = models.build(PLAN.model, 4, seed=0)
    parameters = training.select(net, models.manifest(net, "all"))
    objective = training.Objective(torch.ones(4, dtype=torch.bool))

    def gradient(index: list[int]) -> torch.Tensor:
        at = np.array(index)
        images = models.images_of(training.load_pixels(cells, at, None))
        targets = torch.from_numpy(cells.targets_NC[at])
        training.unit_gradient(net, parameters, images, targets, objective)
        grads = [p.grad for p in parameters]
        return torch.cat([g.flatten() for g in grads if g is not None])

    first = gradient([0, 20])
    gradient([3, 30, 40])
    assert torch.equal(first, gradient([0, 20]))
    torch.testing.assert_close(first, (gradient([0]) + gradient([20])) / 2, rtol=1e-3, atol=1e-5)


# --- the loss


def logits(rows: int = 6, classes: int = 5) -> torch.Tensor:
    return torch.randn((rows, classes), generator=torch.Generator().manual_seed(0)) * 3


def one_hot(classes: list[int], count: int = 5) -> torch.Tensor:
    return functional.one_hot(torch.tensor(classes), count).bool()


EVERY = torch.ones(5, dtype=torch.bool)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_exact_labels_is_cross_entropy(smoothing: float) -> None:
    truth = [0, 1, 2, 3, 4, 2]
    expected = functional.cross_entropy(logits(), torch.tensor(truth), label_smoothing=smoothing)
    loss = loss_on_sets(logits(), one_hot(truth), EVERY, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_loss_of_a_coarse_label_is_minus_log_of_the_sets_probability() -> None:
    target = torch.tensor([[True, False, True, True, False]])
    probability = torch.softmax(logits(1), dim=1)[target].sum()
    torch.testing.assert_close(loss_on_sets(logits(1), target, EVERY), -probability.log())


def test_a_set_of_all_classes_teaches_nothing() -> None:
    raw = logits().requires_grad_()
    loss = loss_on_sets(raw, torch.ones((6, 5), dtype=torch.bool), EVERY)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert raw.grad is not None
    assert float(raw.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_get_no_gradient_and_no_probability(smoothing: float) -> None:
    present = torch.tensor([True, True, False, True, False])
    raw = logits().requires_grad_()
    targets = one_hot([0, 1, 3, 0, 1, 3])
    loss = loss_on_sets(raw, targets, present, label_smoothing=smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert torch.equal(raw.grad[:, ~present], torch.zeros(6, 2))
    alone = loss_on_sets(
        logits()[:, present], targets[:, present], EVERY[:3], label_smoothing=smoothing
    )
    torch.testing.assert_close(loss.detach(), alone)


def test_huge_logits_stay_finite() -> None:
    raw = torch.tensor([[1e4, -1e4, 0.0, 0.0, 3e4]]).requires_grad_()
    loss = loss_on_sets(raw, one_hot([1]), torch.tensor([True, True, True, True, False]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
    assert float(loss.detach()) == pytest.approx(2e4)


def test_class_weights_give_every_class_the_same_sum() -> None:
    cells = blobs((30, 10, 20))
    objective = training.make_objective(
        replace(SETTINGS, balance="weights"), cells, None, torch.device("cpu")
    )
    assert objective.weight_C is not None
    sums = objective.weight_C.numpy() * training.class_counts(cells.targets_NC)
    assert sums[:3] == pytest.approx([20, 20, 20])
    assert float(objective.weight_C[3]) == 0


def test_logit_adjustment_is_the_prior_of_the_labs_own_counts() -> None:
    cells = blobs((30, 10, 20))
    objective = training.make_objective(
        replace(SETTINGS, balance="logits"), cells, None, torch.device("cpu")
    )
    assert objective.prior_C is not None
    assert objective.prior_C[:3].exp().tolist() == pytest.approx([0.5, 1 / 6, 1 / 3])
    assert torch.isfinite(objective.prior_C).all()


def test_a_public_prior_of_the_plan_replaces_a_labs_own_counts() -> None:
    cells = blobs((30, 10, 20), classes=21)
    codes = load_scheme("bone-marrow-21").codes
    plan = changed(balance="logits", class_prior={codes[0]: 30, codes[1]: 10, codes[5]: 2})
    prior_C = training.public_prior(plan)
    assert prior_C is not None
    share_C = prior_C.exp()
    assert share_C.sum() == pytest.approx(1)
    assert share_C[0] / share_C[1] == pytest.approx(3)
    assert share_C[2] == share_C[5], "a class that is not named counts as the rarest"
    cpu = torch.device("cpu")
    objective = training.make_objective(plan.train, cells, None, cpu, prior_C)
    assert torch.equal(objective.prior_C, prior_C)  # type: ignore[arg-type]
    assert training.public_prior(changed(balance="none")) is None


def test_adjusted_logits_give_the_balanced_posterior_of_a_known_problem() -> None:
    """Two classes, 9 to 1, in one dimension: Bayes' rule for equal priors cuts half way.

    Logistic regression on N(-1, 1) and N(1, 1) puts the boundary at log(9)/2 without adjustment,
    and at 0 with the prior of the sample or of the plan (Menon et al. 2021, theorem 1).
    """
    rng = np.random.default_rng(0)
    truth_N = np.array([0] * 90_000 + [1] * 10_000)
    x_N = torch.from_numpy((rng.normal(2.0 * truth_N - 1)).astype(np.float32))
    targets_N2 = torch.from_numpy(np.eye(2, dtype=bool)[truth_N])
    boundary = {}
    for name, prior in (("none", None), ("prior", torch.tensor([0.9, 0.1]).log())):
        objective = training.Objective(torch.ones(2, dtype=torch.bool), 0.0, prior)
        head = nn.Linear(1, 2)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        solver = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def loss(
            solver: torch.optim.Optimizer = solver,
            head: nn.Linear = head,
            objective: training.Objective = objective,
        ) -> float:
            solver.zero_grad()
            value = objective(head(x_N[:, None]), targets_N2)
            value.backward()  # type: ignore[no-untyped-call]
            return float(value)

        solver.step(loss)  # type: ignore[no-untyped-call]
        slope, shift = (head.weight[1] - head.weight[0]), (head.bias[1] - head.bias[0])
        boundary[name] = float((-shift / slope).detach())
    assert boundary["none"] == pytest.approx(math.log(9) / 2, abs=0.03)
    assert boundary["prior"] == pytest.approx(0, abs=0.03)


def test_coarse_images_count_in_equal_parts() -> None:
    targets = np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert training.class_counts(targets).tolist() == [1.0, 0.5, 0.5]


def test_masking_saves_the_recall_of_a_class_absent_at_a_lab() -> None:
    """A model that knows four colours is trained on by a lab that has only three of them."""
    know = blobs((16, 16, 16, 16))
    net = models.build(PLAN.model, 4, seed=0)
    plan = changed(steps_per_round=80)
    training.train(net, know, plan, progress_start=0, progress_end=1, seed=1, device="cpu")
    start = models.flatten(net, models.manifest(net, "all"))
    absent = np.array([False, False, False, True])
    recall = {}
    for masked in ("missing", "none"):
        models.load_flat(net, models.manifest(net, "all"), start)
        plan = changed(steps_per_round=150, lr=6e-3, mask_absent=masked, schedule="constant")
        training.train(
            net,
            know.take(know.class_N < 3),
            plan,
            progress_start=0,
            progress_end=1,
            absent_C=absent,
            seed=2,
            device="cpu",
        )
        probs = training.predict(net, know, device="cpu")
        recall[masked] = (probs.argmax(axis=1) == 3)[know.class_N == 3].mean()
    assert recall["missing"] > recall["none"] + 0.3


def test_classes_that_nobody_trained_are_not_predicted() -> None:
    """They are masked, so no gradient moves them, and yet they must not win."""
    cells = blobs((16, 16, 16), classes=21)
    plan = changed(steps_per_round=60, balance="none")
    net = models.build(plan.model, 21, seed=0)
    absent = np.asarray(~cells.targets_NC.any(axis=0))
    options: dict[str, Any] = {"progress_start": 0, "progress_end": 1, "device": "cpu"}
    training.train(net, cells, plan, absent_C=absent, seed=1, **options)
    assert not absent[training.predict(net, cells, device="cpu").argmax(axis=1)].any()


def test_levelling_the_head_leaves_a_labs_own_probabilities_alone() -> None:
    net = models.build(PLAN.model, 4, seed=0)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, False, True, True])
    level = training.HeadLevel(net, present)
    with torch.no_grad():
        net.head.weight[present] -= 1.0
        images = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        before = net(images)
        level.restore()
        after = net(images)
    torch.testing.assert_close(before[:, present].softmax(1), after[:, present].softmax(1))
    assert torch.equal(before[:, 1], after[:, 1])
    assert (after[:, present] > before[:, present]).all()


def test_an_image_of_an_absent_class_is_named() -> None:
    with pytest.raises(InputError, match=r"16 images .* the first is 016\.png"):
        run(blobs(), absent_C=np.array([False, True, False, False]))


# --- refusals


def test_no_cells_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no cells"):
        run(blobs().take(np.zeros(0, np.int64)))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_with_step_and_rate() -> None:
    plan = changed(optimizer="sgd", lr=1e30, steps_per_round=20, warmup=0.0)
    with pytest.raises(CytofedError, match=r"loss is (nan|inf) at step \d+ of 20, learning rate"):
        run(blobs(), plan)


def test_a_device_that_is_missing_is_refused() -> None:
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(InputError, match="cuda:7"):
        training.choose_device("cuda:7")
    assert training.choose_device("cpu").type == "cpu"
    assert training.choose_device("auto").type in ("cpu", "cuda", "mps")


def test_precision_auto_works_on_any_machine() -> None:
    cpu = torch.device("cpu")
    assert training.choose_precision("float32", cpu) == torch.float32
    if training.has_bfloat16(cpu):
        assert training.choose_precision("auto", cpu) == torch.bfloat16
    else:
        assert training.choose_precision("auto", cpu) == torch.float32
        with pytest.raises(InputError, match=r"precision is bfloat16"):
            training.choose_precision("bfloat16", cpu)


def test_weights_stay_float32_under_bfloat16() -> None:
    cells = blobs((4, 4))
    net = models.build(PLAN.model, 4, seed=0)
    parameters = training.select(net, models.manifest(net, "all"))
    images = models.images_of(training.load_pixels(cells, np.arange(8), None))
    objective = training.Objective(torch.ones(4, dtype=torch.bool))
    targets = torch.from_numpy(cells.targets_NC)
    losses = [
        training.unit_gradient(net, parameters, images, targets, objective, precision=precision)
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
