"""Patient-level DP-SGD: one clipped gradient a patient, one noise draw a step.

Charles et al. 2024, arXiv:2407.07737 (user-level sampling), on Abadi et al. 2016,
arXiv:1607.00133, through Opacus' ``DPOptimizer``. The mean-loss gradient over a patient's cells
(all augmented copies included: De et al. 2022, arXiv:2204.13650) is that patient's gradient. It is
clipped, summed, noised once, and divided by a *declared* number, never by a private count.

What leaves these functions towards the net is the clipped and noised gradient only; a strategy's
terms are added after the noise, where they are post-processing.

Shapes: U patients of a draw, K cells of a patient, M = U x K, F features, C classes, P trainable
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from cytofed.errors import InputError, VerificationError
from cytofed.privacy.noise import Randomness
from cytofed.privacy.sampling import Draw, Rows

PatientLoss = Callable[[Rows], Tensor]
"""mean loss over the cells (and their augmented copies) of one patient"""

Correction = Callable[[Tensor], Tensor]
"""noised gradient_P -> what a strategy adds to it_P; both in the order of the net's parameters"""


@dataclass(frozen=True)
class Mechanism:
    """The subsampled Gaussian mechanism of a plan, as its accountant priced it."""

    sigma: float
    max_norm: float
    sampling_rate: float
    declared_patients: int

    def __post_init__(self) -> None:
        # No value switches privacy off: a plan without it does not come here.
        if not 0 < self.sigma < math.inf:
            raise InputError(f"Expected 0 < sigma={self.sigma:g} < infinity")
        if not 0 < self.max_norm < math.inf:
            raise InputError(f"Expected 0 < max_norm={self.max_norm:g} < infinity")
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"Expected 0 < sampling_rate={self.sampling_rate:g} <= 1")
        if self.declared_patients < 1:
            raise InputError(f"Expected declared_patients={self.declared_patients} >= 1")

    @property
    def denominator(self) -> float:
        """Expected patients a step, by the declared count: public."""
        return self.sampling_rate * self.declared_patients


@dataclass(frozen=True)
class Step:
    """What happened in a step. Private: for the lab's own log, never for a message."""

    patients: int
    non_finite: int


class PatientOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """Opacus' DPOptimizer with patients for samples and noise from a keyed stream.

    Guarantees: every trainable tensor of the net is in the one clipped and noised vector; each
    patient counts once a step; an empty step adds noise like any other; a patient whose gradient
    is not finite contributes zero.
    Sensitivity: ``max_norm`` (add or remove one patient) of ``summed_P``, whatever the loss, as
    long as a patient's loss depends on no other patient.
    Errors: InputError for a net with batch statistics, and for a trainable tensor that the inner
    optimizer leaves out.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        net: nn.Module,
        *,
        mechanism: Mechanism,
        randomness: Randomness,
    ) -> None:
        refuse_batch_statistics(net)
        _refuse_other_tensors(net, optimizer)
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.sigma,
            max_grad_norm=mechanism.max_norm,
            expected_batch_size=mechanism.denominator,
        )
        self.mechanism = mechanism
        self.non_finite = 0
        """patients of this step whose gradient was zeroed; the lab's own knowledge"""
        self._randomness = randomness
        self._tensors = [tensor for tensor in net.parameters() if tensor.requires_grad]
        self._seen: set[int] = set()
        size = sum(tensor.numel() for tensor in self._tensors)
        first = self._tensors[0]
        self.summed_P = torch.zeros(size, dtype=torch.float32, device=first.device)
        """sum of the step's clipped gradients, each tensor as it lies in memory; noise is added to
        it in place"""
        self._views = _views(self.summed_P, self._tensors)
        self.zero_grad()

    def add_patient(self, patient: int, loss: Tensor) -> None:
        """One backward pass: the patient's mean loss to a clipped gradient in ``summed_P``.

        Errors: VerificationError for a patient that is in this step already: two gradients of one
        patient have twice the sensitivity.
        """
        self._count((patient,))
        gradients = torch.autograd.grad(loss, self._tensors, allow_unused=True)
        for tensor, gradient in zip(self._tensors, gradients, strict=True):
            sample = torch.zeros_like(tensor) if gradient is None else gradient
            tensor.grad_sample = sample.unsqueeze(0)  # type: ignore[attr-defined]
        self.clip_and_accumulate()
        for tensor in self._tensors:
            tensor.grad_sample = None  # type: ignore[attr-defined]

    def clip_and_accumulate(self) -> None:
        """Scale one patient's gradient to at most ``max_norm`` and add it.

        Guarantees: finite in, finite out; a zero gradient adds zero; a gradient with NaN or an
        infinite norm adds zero and is counted in ``non_finite``.
        """
        # Opacus' einsum works for many samples; for one, whole lists at once are faster.
        gradients = [self._get_flat_grad_sample(tensor).squeeze(0) for tensor in self._tensors]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        scale = float(self.max_grad_norm / (norm + 1e-6))
        if not math.isfinite(float(norm)):
            self.non_finite += 1
            return
        torch._foreach_add_(self._views, gradients, alpha=min(1.0, scale))

    def add_patients(self, patients: Sequence[int], clipped: ClippedSum) -> None:
        """Many patients whose clipped sum was computed in closed form (``clipped_head_sum``)."""
        shapes = [tensor.shape for tensor in clipped.tensors]
        if shapes != [tensor.shape for tensor in self._tensors]:
            raise InputError("the closed form is for a net whose trainable part is the linear head")
        self._count(patients)
        self.non_finite += clipped.non_finite
        torch._foreach_add_(self._views, list(clipped.tensors))

    def add_noise(self) -> None:
        """N(0, (sigma max_norm)^2) on every coordinate, one draw."""
        noise_P = torch.from_numpy(self._randomness.normals(len(self.summed_P)))
        noise_P = noise_P.to(self.summed_P.device, non_blocking=True)
        self.summed_P.add_(noise_P, alpha=self.noise_multiplier * self.max_grad_norm)

    def scale_grad(self) -> None:
        """Divide by the declared denominator and hand the result to the inner optimizer."""
        self.summed_P.div_(self.expected_batch_size)
        for tensor, view in zip(self._tensors, self._views, strict=True):
            tensor.grad = view  # of the same memory: a correction shows here too

    def finish(self, correction: Correction | None = None) -> Step:
        """End the step, empty or not: noise, scale, ``correction``, inner optimizer."""
        self.add_noise()
        self.scale_grad()
        if correction is not None:
            gradient_P = torch.cat([view.reshape(-1) for view in self._views])
            parts = torch.split(correction(gradient_P), [view.numel() for view in self._views])
            for view, part in zip(self._views, parts, strict=True):
                view.add_(part.view(view.shape))
        if self.step_hook:
            self.step_hook(self)
        self.original_optimizer.step()
        done = Step(len(self._seen), self.non_finite)
        self.zero_grad()
        return done

    def step(self, closure: object = None) -> NoReturn:
        """Not offered: ``private_step`` is the one way, so that no step lacks its noise."""
        raise InputError("a private optimizer takes no plain step; use private_step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for tensor in self._tensors:  # all that the inner optimizer holds
            tensor.grad = None
        self.summed_P.zero_()
        self._seen.clear()
        self.non_finite = 0

    def _count(self, patients: Iterable[int]) -> None:
        for patient in patients:
            if patient in self._seen:
                raise VerificationError(
                    f"patient {patient} has two gradients in one step: its sensitivity would be "
                    f"{2 * self.max_grad_norm:g}, not {self.max_grad_norm:g}"
                )
            self._seen.add(patient)


def private_step(
    optimizer: PatientOptimizer,
    draw: Draw,
    patient_loss: PatientLoss,
    *,
    correction: Correction | None = None,
) -> Step:
    """One step of patient-level DP-SGD on a draw of ``sampling.draw``.

    Guarantees: as ``PatientOptimizer``; it is (with the draw) one step of the subsampled Gaussian
    mechanism, for an empty draw too.
    Sensitivity: the optimizer's ``max_norm`` before noise, if ``patient_loss`` depends on the
    given rows only: no class weights, priors, masks or statistics of other patients.
    """
    accumulate(optimizer, draw, patient_loss)
    return optimizer.finish(correction)


def accumulate(optimizer: PatientOptimizer, draw: Draw, patient_loss: PatientLoss) -> None:
    """The first half of ``private_step``: clipped gradients in ``optimizer.summed_P``."""
    for patient, rows_K in zip(draw.units, draw.rows, strict=True):
        optimizer.add_patient(patient, patient_loss(rows_K))


@dataclass(frozen=True)
class ClippedSum:
    """Sum of clipped gradients of a head: weight_CF and, where it has one, bias_C."""

    tensors: tuple[Tensor, ...]
    non_finite: int


def private_head_step(
    optimizer: PatientOptimizer,
    draw: Draw,
    head: nn.Linear,
    features_NF: Tensor,
    targets_NC: Tensor,
    *,
    present_C: Tensor | None = None,
    prior_C: Tensor | None = None,
    correction: Correction | None = None,
) -> Step:
    """``private_step`` for a linear head on frozen features, all patients at once, closed form.

    ``prior_C``: a public log prior, added to the logits.
    Guarantees and sensitivity: as ``private_step``; the same sum to rounding.
    """
    if len(draw):
        clipped = clipped_head_sum(
            head,
            draw,
            features_NF,
            targets_NC,
            present_C=present_C,
            prior_C=prior_C,
            max_norm=optimizer.mechanism.max_norm,
        )
        optimizer.add_patients(draw.units, clipped)
    return optimizer.finish(correction)


def clipped_head_sum(
    head: nn.Linear,
    draw: Draw,
    features_NF: Tensor,
    targets_NC: Tensor,
    *,
    present_C: Tensor | None,
    prior_C: Tensor | None = None,
    max_norm: float,
) -> ClippedSum:
    """Sum over patients of the clipped gradient of their mean loss, -log sum of softmax on a set.

    ``targets_NC`` are boolean sets of allowed classes; logits of classes not in ``present_C`` take
    no part; the public ``prior_C`` is added to the others. With residuals r = softmax - softmax on
    the set, a patient's gradient is the mean of r x^T over his cells: one batched matrix product
    gives it for all patients. (The norms alone would follow from Gram matrices, but lose digits
    where the cells' gradients cancel.)

    Guarantees: finite; a patient with a non-finite cell adds zero and is counted.
    Sensitivity: max_norm (add or remove one patient).
    """
    rows_UK, weight_UK = _padded(draw)
    units, most = rows_UK.shape
    cells_M = torch.from_numpy(rows_UK).flatten().to(features_NF.device)
    with torch.no_grad():
        features_MF = features_NF.index_select(0, cells_M).float()
        # Classes first: the product takes half the time of ``head(features)``, and softmax too.
        logits_CM = head.weight @ features_MF.T
        if head.bias is not None:
            logits_CM += head.bias[:, None]
        if prior_C is not None:
            logits_CM += prior_C[:, None]
        if present_C is not None:
            logits_CM.masked_fill_(~present_C[:, None], -math.inf)
        residual_CM = torch.softmax(logits_CM, dim=0)
        outside_CM = ~targets_NC.index_select(0, cells_M).T
        residual_CM -= torch.softmax(logits_CM.masked_fill_(outside_CM, -math.inf), dim=0)
        residual_CUK = residual_CM.view(-1, units, most)
        residual_CUK *= torch.from_numpy(weight_UK).to(features_MF.device)
        gradients = [residual_CUK.transpose(0, 1) @ features_MF.view(units, most, -1)]
        norm_U = torch.linalg.vector_norm(gradients[0].flatten(1), dim=1)
        if head.bias is not None:
            gradients.append(residual_CUK.sum(2).T)
            norm_U = torch.hypot(norm_U, torch.linalg.vector_norm(gradients[1], dim=1))
        # A number a patient: numpy's calls cost a third of torch's.
        norms_U = norm_U.cpu().numpy()
        finite_U = np.isfinite(norms_U)
        with np.errstate(invalid="ignore"):
            scales_U = np.minimum(max_norm / (norms_U + np.float32(1e-6)), np.float32(1))
        non_finite = len(draw) - int(finite_U.sum())
        if non_finite:  # 0 x NaN is NaN: zeroed, not scaled
            scales_U[~finite_U] = 0
            for part in gradients:
                part[torch.from_numpy(~finite_U)] = 0
        scale_U = torch.from_numpy(scales_U).to(features_MF.device)
        tensors = [(scale_U @ part.flatten(1)).view(part.shape[1:]) for part in gradients]
    return ClippedSum(tuple(tensors), non_finite)


def _padded(draw: Draw) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Rows (U, K) of a draw and their weights in the mean of their patient.

    Padded with the patient's own cells at weight 0: 0 x NaN of another's would be NaN here.
    """
    counts_U = np.array([len(rows) for rows in draw.rows])
    rows = np.concatenate(draw.rows)
    most = int(counts_U.max())
    if most * len(draw) == len(rows):
        return rows.reshape(-1, most), np.full((len(draw), most), 1 / most, np.float32)
    padded_UK = np.repeat([own[0] for own in draw.rows], most).reshape(len(draw), most)
    valid_UK = np.arange(most) < counts_U[:, None]
    padded_UK[valid_UK] = rows
    return padded_UK, (valid_UK / counts_U[:, None]).astype(np.float32)


def refuse_batch_statistics(net: nn.Module) -> None:
    """Errors: InputError naming the first layer whose output or state mixes patients.

    Batch normalisation does so even when frozen or without affine weights: its running statistics
    take in private data, outside clip and noise.
    """
    for name, layer in net.named_modules():
        batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        instance_norm = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if batch_norm or (instance_norm and layer.track_running_stats):
            raise InputError(
                f"layer {name or 'net'!r} ({type(layer).__name__}) keeps statistics over images, "
                "which differential privacy does not cover",
                hint="use a net with GroupNorm, such as model.arch=cytonet",
            )


def _refuse_other_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The net's trainable tensors and the optimizer's must be the same, all float32."""
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    trainable = {name: t for name, t in net.named_parameters() if t.requires_grad}
    if not trainable:
        raise InputError("the net has no trainable tensor")
    for name, tensor in trainable.items():
        if not any(tensor is other for other in held):
            raise InputError(
                f"trainable tensor {name!r} is not in the private optimizer: it would be trained "
                "outside clip and noise, or not at all",
                hint="set requires_grad to False on what is frozen",
            )
        if tensor.dtype != torch.float32:
            raise InputError(
                f"trainable tensor {name!r} is {tensor.dtype}: clip and noise are float32's"
            )
    for other in held:
        if not any(other is tensor for tensor in trainable.values()):
            raise InputError("the optimizer holds a tensor that is no trainable one of the net")


def _views(flat_P: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parts of ``flat_P`` with the shapes and strides of ``tensors``.

    The strides matter: torch's fused optimizers on a CPU go through weights and gradients as they
    lie in memory, and would mix up the gradients of a net whose kernels are channels last.
    """
    views, start = [], 0
    for tensor in tensors:
        stride = torch.empty_like(tensor, device="meta").stride()  # dense, also where tensor is not
        views.append(flat_P.as_strided(tensor.shape, stride, start))
        start += tensor.numel()
    return views
