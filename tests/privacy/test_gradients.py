"""One clipped gradient a patient, one noise draw a step, a declared denominator."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from cytofed.errors import InputError, VerificationError
from cytofed.privacy.gradients import (
    Mechanism,
    PatientLoss,
    PatientOptimizer,
    Step,
    accumulate,
    clipped_head_sum,
    private_head_step,
    private_step,
    refuse_batch_statistics,
)
from cytofed.privacy.noise import SimulatedRandomness, SystemRandomness
from cytofed.privacy.sampling import Draw, Rows

torch.set_num_threads(1)  # more would spin, and these nets are tiny

MECHANISM = Mechanism(sigma=1.5, max_norm=0.8, sampling_rate=0.25, declared_patients=40)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def loss_of(net: nn.Module, images: int = 40, scale: float = 3.0) -> PatientLoss:
    generator = torch.Generator().manual_seed(1)
    pixels = scale * torch.randn(images, 3, 8, 8, generator=generator)
    classes = torch.randint(0, 5, (images,), generator=generator)

    def loss(rows_K: Rows) -> Tensor:
        rows = torch.from_numpy(rows_K)
        return nn.functional.cross_entropy(net(pixels[rows]), classes[rows])

    return loss


def optimizer_of(net: nn.Module, mechanism: Mechanism = MECHANISM) -> PatientOptimizer:
    inner = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    return PatientOptimizer(inner, net, mechanism=mechanism, randomness=SimulatedRandomness(0))


def draw_of(sizes: Sequence[int]) -> Draw:
    ends = np.cumsum(sizes)
    rows = tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))
    return Draw(tuple(range(len(sizes))), rows)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])


def gradient_of(net: nn.Module, loss: Tensor) -> Tensor:
    tensors = [p for p in net.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


def change(net: nn.Module, optimizer: PatientOptimizer, draw: Draw, loss: PatientLoss) -> Tensor:
    before = flat(net)
    private_step(optimizer, draw, loss)
    return before - flat(net)


def test_step_is_the_mechanism_written_out() -> None:
    net = small_net()
    loss, draw = loss_of(net), draw_of([4, 1, 7, 3])
    expected = torch.zeros(len(flat(net)))
    for rows in draw.rows:
        gradient = gradient_of(net, loss(rows))
        expected += gradient * min(1.0, 0.8 / float(gradient.norm()))
    noise = torch.from_numpy(SimulatedRandomness(0).normals(len(expected)))
    expected = (expected + 1.5 * 0.8 * noise) / (0.25 * 40)
    assert torch.allclose(change(net, optimizer_of(net), draw, loss), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("correct", [False, True])
def test_each_weight_gets_its_own_gradient_however_the_net_lies_in_memory(
    kind: Callable[..., torch.optim.Optimizer], correct: bool
) -> None:
    """Fused optimizers do not look at strides: a gradient of other strides would be mixed up."""
    mechanism = Mechanism(sigma=1e-12, max_norm=1e6, sampling_rate=1, declared_patients=1)
    offset = torch.linspace(-1, 1, len(flat(small_net()))) if correct else None
    moved = []
    for layout, fused in ((torch.contiguous_format, False), (torch.channels_last, True)):
        net = small_net().to(memory_format=layout)
        inner = kind(net.parameters(), lr=0.01, fused=fused)
        optimizer = PatientOptimizer(
            inner, net, mechanism=mechanism, randomness=SimulatedRandomness(0)
        )
        before = flat(net)
        for _ in range(3):
            private_step(
                optimizer,
                draw_of([6]),
                loss_of(net),
                correction=None if offset is None else lambda _: offset,
            )
        moved.append(flat(net) - before)
    assert float((moved[0] - moved[1]).norm()) < 1e-2 * float(moved[0].norm())


def test_clipped_sum_is_the_one_of_opacus_own_optimizer() -> None:
    net = small_net()
    loss, draw = loss_of(net), draw_of([4, 1, 7, 3])
    optimizer = optimizer_of(net)
    accumulate(optimizer, draw, loss)
    ours = optimizer.summed_P.clone()
    opacus = DPOptimizer(
        torch.optim.SGD(net.parameters(), lr=1.0),
        noise_multiplier=1.5,
        max_grad_norm=0.8,
        expected_batch_size=10,
    )
    gradients = [torch.autograd.grad(loss(rows), list(net.parameters())) for rows in draw.rows]
    for tensor, samples in zip(net.parameters(), zip(*gradients, strict=True), strict=True):
        tensor.grad_sample = torch.stack(samples)  # type: ignore[attr-defined]
    opacus.clip_and_accumulate()
    theirs = torch.cat([p.summed_grad.flatten() for p in net.parameters()])  # type: ignore[attr-defined]
    assert torch.allclose(ours, theirs, atol=1e-6)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), scale=st.sampled_from([1e-3, 1, 1e4])
)
@settings(max_examples=15, deadline=None)
def test_removing_any_patient_changes_the_sum_by_at_most_max_norm(
    sizes: list[int], scale: float
) -> None:
    net = small_net()
    loss, draw = loss_of(net, scale=scale), draw_of(sizes)
    optimizer = optimizer_of(net)
    accumulate(optimizer, draw, loss)
    with_all = optimizer.summed_P.clone()
    for left_out in range(len(sizes)):
        keep = [u for u in range(len(sizes)) if u != left_out]
        optimizer.zero_grad()
        accumulate(optimizer, Draw(tuple(keep), tuple(draw.rows[u] for u in keep)), loss)
        assert float((with_all - optimizer.summed_P).norm()) <= 0.8 * (1 + 1e-5)


def test_an_empty_draw_adds_noise_and_takes_a_step() -> None:
    net = small_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = PatientOptimizer(inner, net, mechanism=MECHANISM, randomness=SystemRandomness())
    moved = change(net, optimizer, Draw((), ()), loss_of(net))
    assert 0.8 < float(moved.std()) / (0.1 * 1.5 * 0.8 / 10) < 1.2
    assert inner.state[next(net.parameters())]["momentum_buffer"] is not None


def test_the_denominator_does_not_move_with_the_number_of_patients() -> None:
    net = small_net()
    optimizer = optimizer_of(net)
    noises = []
    for draw in (Draw((), ()), draw_of([1] * 20)):
        accumulate(optimizer, draw, loss_of(net))
        signal = optimizer.summed_P.clone()
        before = flat(net)
        optimizer.finish()
        noises.append(float((before - flat(net) - signal / 10).std()))
    assert noises[0] == pytest.approx(noises[1], rel=0.15)
    assert noises[0] == pytest.approx(1.5 * 0.8 / 10, rel=0.15)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_a_patient_without_a_finite_gradient_adds_zero_and_is_counted(poison: float) -> None:
    net = small_net()
    loss = loss_of(net)

    def poisoned(rows_K: Rows) -> Tensor:
        return loss(rows_K) * (poison if rows_K[0] == 0 else 1.0)

    optimizer, draw = optimizer_of(net), draw_of([4, 1, 7])
    accumulate(optimizer, draw, poisoned)
    summed = optimizer.summed_P.clone()
    assert optimizer.finish() == Step(patients=3, non_finite=1)
    assert torch.isfinite(flat(net)).all()
    untouched = small_net()
    others = optimizer_of(untouched)
    accumulate(others, Draw((1, 2), draw.rows[1:]), loss_of(untouched))
    assert torch.allclose(summed, others.summed_P, atol=1e-6)


def test_noise_is_never_repeated_in_production() -> None:
    net = small_net()
    optimizers = [
        PatientOptimizer(
            torch.optim.SGD(net.parameters(), lr=1.0),
            net,
            mechanism=MECHANISM,
            randomness=SystemRandomness(),
        )
        for _ in range(2)
    ]
    moves = []
    for optimizer in (*optimizers, *optimizers):
        torch.manual_seed(0)
        moves.append(change(net, optimizer, Draw((), ()), loss_of(net)))
    largest = np.abs(np.triu(np.corrcoef(torch.stack(moves).numpy()), 1)).max()
    assert largest * math.sqrt(len(moves[0])) < 6.5


def test_a_patient_split_over_two_gradients_is_refused() -> None:
    net = small_net()
    optimizer, loss = optimizer_of(net), loss_of(net)
    optimizer.add_patient(3, loss(np.arange(4)))
    with pytest.raises(VerificationError, match="two gradients in one step"):
        optimizer.add_patient(3, loss(np.arange(4, 8)))
    optimizer.finish()
    optimizer.add_patient(3, loss(np.arange(4)))  # another step


def test_a_plain_step_is_refused() -> None:
    with pytest.raises(InputError, match="private_step"):
        optimizer_of(small_net()).step()


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, affine=False).eval().requires_grad_(False), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.InstanceNorm2d(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_batch_statistics_are_refused_by_layer_name(layer: nn.Module, refused: bool) -> None:
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(4, 4))
    net.add_module("bn1", layer)
    if not refused:
        refuse_batch_statistics(net)
        return
    with pytest.raises(InputError, match=r"'bn1' \(\w+\)"):
        optimizer_of(net)


def test_a_trainable_tensor_outside_clip_and_noise_is_refused_by_name() -> None:
    net = small_net()
    inner = torch.optim.SGD(net[0].parameters(), lr=1.0)
    with pytest.raises(InputError, match=r"'1\.weight' is not in the private optimizer"):
        PatientOptimizer(inner, net, mechanism=MECHANISM, randomness=SystemRandomness())
    stray = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([*net.parameters(), stray], lr=1.0)
    with pytest.raises(InputError, match="no trainable one of the net"):
        PatientOptimizer(inner, net, mechanism=MECHANISM, randomness=SystemRandomness())


def test_frozen_tensors_stay_and_all_trainable_ones_get_noise() -> None:
    net = small_net()
    net[0].requires_grad_(False)
    frozen = [p.clone() for p in net[0].parameters()]
    moved = change(net, optimizer_of(net), Draw((), ()), loss_of(net))
    assert bool((moved != 0).all())
    assert all(torch.equal(a, b) for a, b in zip(frozen, net[0].parameters(), strict=True))


def test_parameter_groups_in_any_order_keep_each_gradient_with_its_tensor() -> None:
    moves = []
    for reverse in (False, True):
        net = small_net()
        tensors = list(net.parameters())
        groups = [{"params": tensors[:2]}, {"params": tensors[2:]}]
        inner = torch.optim.SGD(groups[::-1] if reverse else groups, lr=1.0)
        optimizer = PatientOptimizer(
            inner, net, mechanism=MECHANISM, randomness=SimulatedRandomness(0)
        )
        moves.append(change(net, optimizer, draw_of([2, 3]), loss_of(net)))
    assert torch.equal(*moves)


def test_a_strategys_correction_sees_the_noised_gradient_and_is_not_clipped() -> None:
    net = small_net()
    reference = change(net, optimizer_of(net), draw_of([2, 3]), loss_of(net))
    net, seen = small_net(), []

    def control_variate(gradient_P: Tensor) -> Tensor:
        seen.append(gradient_P.clone())
        return torch.full_like(gradient_P, 100.0)

    before = flat(net)
    private_step(optimizer_of(net), draw_of([2, 3]), loss_of(net), correction=control_variate)
    assert torch.allclose(seen[0], reference, atol=1e-6)
    assert torch.allclose(before - flat(net), reference + 100.0, atol=1e-4)


@pytest.mark.parametrize(
    "values",
    [(0.0, 1.0, 0.5, 9), (-1.0, 1.0, 0.5, 9), (math.nan, 1.0, 0.5, 9), (1.0, math.inf, 0.5, 9),
     (1.0, 0.0, 0.5, 9), (1.0, 1.0, 0.0, 9), (1.0, 1.0, 1.5, 9), (1.0, 1.0, 0.5, 0)],
)  # fmt: skip
def test_no_setting_switches_privacy_off(values: tuple[float, float, float, int]) -> None:
    with pytest.raises(InputError, match="Expected"):
        Mechanism(*values)


class TestHeadInClosedForm:
    """`encoder+head`: all patients of a draw at once, by matrix products."""

    def setup_method(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.features = torch.randn(30, 16, generator=generator) * 2
        self.targets = nn.functional.one_hot(torch.arange(30) % 6, 6).bool()
        self.targets[::4, :3] = True  # coarse: a set of classes
        self.draw = draw_of([5, 1, 9, 3, 2])
        self.present = torch.tensor([True, True, True, True, True, False])
        self.targets[:, 5] = False
        self.targets[self.targets.sum(1) == 0, 0] = True

    def head(self, bias: bool = True) -> nn.Linear:
        torch.manual_seed(3)
        return nn.Linear(16, 6, bias=bias)

    def loss(self, head: nn.Linear) -> PatientLoss:
        def loss(rows_K: Rows) -> Tensor:
            rows = torch.from_numpy(rows_K)
            logits = head(self.features[rows]).masked_fill(~self.present, -math.inf)
            allowed = logits.masked_fill(~self.targets[rows], -math.inf)
            losses: Tensor = logits.logsumexp(1) - allowed.logsumexp(1)
            return losses.mean()

        return loss

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
    def test_equals_one_backward_pass_a_patient(self, bias: bool, max_norm: float) -> None:
        head = self.head(bias)
        optimizer = optimizer_of(head, Mechanism(1.0, max_norm, 0.5, 10))
        accumulate(optimizer, self.draw, self.loss(head))
        closed = clipped_head_sum(
            head,
            self.draw,
            self.features,
            self.targets,
            present_C=self.present,
            max_norm=max_norm,
        )
        together = torch.cat([tensor.flatten() for tensor in closed.tensors])
        assert torch.allclose(together, optimizer.summed_P, atol=1e-5)
        assert closed.non_finite == 0

    def test_a_public_prior_is_a_shift_of_the_bias(self) -> None:
        head, prior = self.head(), torch.linspace(-4, 1, 6)
        shifted = copy.deepcopy(head)
        with torch.no_grad():
            shifted.bias.add_(prior)
        summed = functools.partial(
            clipped_head_sum,
            draw=self.draw,
            features_NF=self.features,
            targets_NC=self.targets,
            present_C=self.present,
            max_norm=1.0,
        )
        with_prior, expected = summed(head, prior_C=prior), summed(shifted)
        for ours, theirs in zip(with_prior.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_step_equals_the_general_one(self) -> None:
        head = self.head()
        general = change(head, optimizer_of(head), self.draw, self.loss(head))
        head = self.head()
        before = flat(head)
        step = private_head_step(
            optimizer_of(head),
            self.draw,
            head,
            self.features,
            self.targets,
            present_C=self.present,
        )
        assert torch.allclose(before - flat(head), general, atol=1e-5)
        assert step == Step(patients=5, non_finite=0)

    def test_an_empty_draw_adds_noise(self) -> None:
        head = self.head()
        before = flat(head)
        private_head_step(optimizer_of(head), Draw((), ()), head, self.features, self.targets)
        assert bool((before != flat(head)).all())

    @pytest.mark.parametrize("row", [0, 4, 5, 29])
    def test_a_broken_cell_zeroes_its_own_patient_only(self, row: int) -> None:
        """Row 0 too: padding must not bring one patient's cell into another's gradient."""
        self.features[row] = math.nan
        head = self.head()
        draw = Draw((0, 1, 2), (np.arange(5), np.array([5]), np.arange(25, 30)))
        closed = clipped_head_sum(
            head, draw, self.features, self.targets, present_C=None, max_norm=1.0
        )
        others = [u for u in range(3) if row not in draw.rows[u]]
        rest = Draw(tuple(others), tuple(draw.rows[u] for u in others))
        expected = clipped_head_sum(
            head, rest, self.features, self.targets, present_C=None, max_norm=1.0
        )
        assert closed.non_finite == 1
        for ours, theirs in zip(closed.tensors, expected.tensors, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)

    def test_a_net_with_more_to_train_than_the_head_is_refused(self) -> None:
        net = nn.Sequential(nn.Linear(16, 16), self.head())
        head = net[1]
        assert isinstance(head, nn.Linear)
        with pytest.raises(InputError, match="closed form"):
            private_head_step(optimizer_of(net), self.draw, head, self.features, self.targets)
