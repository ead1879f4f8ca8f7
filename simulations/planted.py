"""Faults between an approved plan and the bytes that leave, planted in a lab's code one by one.

The faults of ``privacy.faults`` go in through a seam of a check that looks at the optimizer. These
replace one function of a lab's own, wherever it lies, and only what a lab answers can show them.
Nothing that trains imports this module.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cytofed.client.outbox import Fresh
from cytofed.client.rehearsal import refuse_known_noise, rehearse
from cytofed.errors import VerificationError
from cytofed.metrics import Tally
from cytofed.privacy import faults
from cytofed.privacy.noise import RepeatedRandomness, SimulatedRandomness
from cytofed.privacy.sampling import Draw, Units

CHECK = "rehearsal"
"""the check that looks at what a lab answers"""

Make = Callable[[Any], Any]
"""what is there -> what is put in its place"""


@dataclass(frozen=True)
class Planted:
    """A fault: ``place`` is ``module:name``, dotted for methods; ``make`` turns it into the fault.

    ``more``: further places of the same fault.
    """

    name: str
    place: str
    make: Make
    more: Mapping[str, Make] | None = None


@contextmanager
def planted(fault: Planted) -> Iterator[None]:
    """The fault is there in the block, and gone after it."""
    with ExitStack() as stack:
        for place, make in ((fault.place, fault.make), *(fault.more or {}).items()):
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            owner: Any = importlib.import_module(f"cytofed.{module}")
            for part in owners:
                owner = getattr(owner, part)
            before = owner.__dict__[name]
            stack.callback(setattr, owner, name, before)
            setattr(owner, name, make(before))
        yield


def rehearsed(fault: Planted | None, *, quick: bool = False) -> str:
    """What a rehearsal says of the code with this fault; empty where it finds nothing.

    It is done twice, as two processes would: the fault is planted anew. ``quick``: as at the start
    of a lab; else in full too.
    """
    with TemporaryDirectory() as folder:
        seen = Path(folder) / "noise.seen"
        try:
            for shortened in (True, quick):
                with ExitStack() as stack:
                    if fault is not None:
                        stack.enter_context(planted(fault))
                    found = rehearse(quick=shortened)
                    refuse_known_noise(seen, found.noises)
        except VerificationError as error:
            return error.message
    return ""


# --- what is put in


def _changed(**values: Callable[[Any], Any]) -> Make:
    """The same function, with some of its named arguments changed."""

    def make(real: Any) -> Any:
        def called(*args: Any, **named: Any) -> Any:
            return real(*args, **{**named, **{k: f(named[k]) for k, f in values.items()}})

        return called

    return make


def _sigma_halved(real: Any) -> Any:
    return lambda sigma, *others: real(sigma / 2, *others)


def _max_norm_doubled(real: Any) -> Any:
    def step(optimizer: Any, *others: Any, **named: Any) -> Any:
        before = optimizer.mechanism
        optimizer.mechanism = replace(before, max_norm=2 * before.max_norm)
        done = real(optimizer, *others, **named)
        optimizer.mechanism = before
        return done

    return step


def _denominator_doubled(real: Any) -> Any:
    return lambda sigma, norm, rate, patients: real(sigma, norm, rate, max(1, patients // 2))


def _first_step_only(real: Any) -> Any:
    def add_noise(self: Any) -> None:
        if not getattr(self, "noised", False):
            real(self)
        self.noised = True

    return add_noise


def _never_empty(real: Any) -> Any:
    def draw(*args: Any, **named: Any) -> Any:
        drawn = real(*args, **named)
        while not len(drawn):
            drawn = real(*args, **named)
        return drawn

    return draw


def _drawn_once(real: Any) -> Any:
    kept: dict[int, Any] = {}

    def draw(units: Any, *, randomness: Any, **named: Any) -> Any:
        if id(randomness) not in kept:
            kept.clear()
            kept[id(randomness)] = real(units, randomness=randomness, **named)
        return kept[id(randomness)]

    return draw


def _public_draws(real: Any) -> Any:
    steps = itertools.count()

    def draw(units: Any, **named: Any) -> Any:
        return real(units, **{**named, "randomness": SimulatedRandomness(0, next(steps) % 16)})

    return draw


def _fixed_size(_: Any) -> Any:
    def draw(units: Any, *, sampling_rate: float, randomness: Any, **_: Any) -> Draw:
        size = max(1, round(sampling_rate * len(units)))
        chosen = randomness.choose(len(units), size).tolist()
        return Draw(tuple(chosen), tuple(units.rows[u] for u in chosen))

    return draw


def _without_noise(_: Any) -> Any:
    def tally(confusion_CC: Any, *_: Any) -> Tally:
        counts_CC = np.rint(confusion_CC).astype(np.int64)
        return Tally(counts_CC, Tally.empty(len(counts_CC)).bins_B3)

    return tally


def _noise_of(*context: str) -> Make:
    """A lab's randomness follows from these fields of the order."""

    def randomness(order: Any) -> RepeatedRandomness:
        return RepeatedRandomness(*(getattr(order, name) for name in context))

    def make(real: Any) -> Any:
        return lambda order, lab, *rest: real(order, replace(lab, randomness=randomness), *rest)

    return make


def _seeded(_: Any) -> Any:
    number = itertools.count()
    return lambda _self: hashlib.sha256(b"seed %d" % next(number)).digest()


def _mean_count_in_closed_form(real: Any) -> Any:
    def padded(drawn: Any) -> Any:
        rows_UK, weight_UK = real(drawn)
        count_U = np.array([len(rows) for rows in drawn.rows], np.float32)
        return rows_UK, weight_UK * (count_U / count_U.mean())[:, None]

    return padded


def _mean_count(real: Any) -> Any:
    def step(optimizer: Any, drawn: Any, loss_of: Any, **named: Any) -> Any:
        mean = sum(map(len, drawn.rows)) / max(len(drawn), 1)
        return real(optimizer, drawn, lambda rows: loss_of(rows) * len(rows) / mean, **named)

    return step


def _non_finite_kept(_: Any) -> Any:
    def clip_and_accumulate(self: Any) -> None:
        gradients = [self._get_flat_grad_sample(t).squeeze(0) for t in self._tensors]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_add_(self._views, [g * scale for g in gradients])

    return clip_and_accumulate


def _of_images(_: Any) -> Any:
    return lambda _unit, images, _patients: Units("patient", tuple(np.arange(images)[:, None]))


def _summed_cells(real: Any) -> Any:
    """Each cell is clipped on its own, and all are summed."""

    def step(optimizer: Any, drawn: Any, loss_of: Any, **named: Any) -> Any:
        rows = [row for rows in drawn.rows for row in rows[:, None]]
        return real(optimizer, Draw(tuple(range(len(rows))), tuple(rows)), loss_of, **named)

    return step


def _without_the_first(real: Any) -> Any:
    def step(optimizer: Any, drawn: Any, loss_of: Any, **named: Any) -> Any:
        return real(optimizer, Draw(drawn.units[1:], drawn.rows[1:]), loss_of, **named)

    return step


def _counted(real: Any) -> Any:
    def train(net: Any, cells: Any, *others: Any, **named: Any) -> Any:
        count = len(np.unique(cells.patients_N))
        return real(net, cells, *others, **{**named, "declared_patients": count})

    return train


def _clean_momentum(real: Any) -> Any:
    """The optimizer's momentum is that of the sum before its noise."""

    def finish(self: Any, *args: Any) -> Any:
        clean = [view.detach().clone() / self.expected_batch_size for view in self._views]
        done = real(self, *args)
        for tensor, gradient in zip(self._tensors, clean, strict=True):
            state = self.original_optimizer.state.get(tensor) or {}
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].copy_(gradient)
        return done

    return finish


def _clean_control(real: Any) -> Any:
    """What SCAFFOLD sends has the last clipped sum in it."""

    def finish(order: Any, memory: Any, local: Any) -> Any:
        parts, remembered = real(order, memory, local)
        clean_P = _SUMS[-1] if _SUMS else np.zeros_like(parts["control"])
        return {**parts, "control": parts["control"] + clean_P}, remembered

    return finish


_SUMS: list[Any] = []


def _sum_is_kept(real: Any) -> Any:
    def add_noise(self: Any) -> None:
        _SUMS[:] = [torch.cat([view.reshape(-1) for view in self._views]).clone().numpy()]
        real(self)

    return add_noise


def _own_layer(real: Any) -> Any:
    """The last layer goes along the raw gradient as each patient comes by."""

    def add_patient(self: Any, patient: int, loss: Any) -> None:
        last = self._tensors[-1]
        (raw,) = torch.autograd.grad(loss, [last], retain_graph=True)
        real(self, patient, loss)
        with torch.no_grad():
            last.sub_(0.05 * raw)

    return add_patient


def _few_digits(real: Any) -> Any:
    return lambda self, count: real(self, count).astype(np.float16).astype(np.float32)


def _noise_over_steps(real: Any) -> Any:
    def add_noise(self: Any) -> None:
        self.noise_multiplier = self.mechanism.sigma / 3**0.5
        real(self)

    return add_noise


def _uniform(_: Any) -> Any:
    """As much noise, of another shape."""
    return lambda self, count: ((self.uniforms(count) - 0.5) * 12**0.5).astype(np.float32)


def _frozen(real: Any) -> Any:
    kept: dict[int, Any] = {}

    def add_noise(self: Any) -> None:
        before = self.summed_P.clone()
        if id(self) not in kept:
            kept.clear()
            real(self)
            kept[id(self)] = self.summed_P - before
        else:
            self.summed_P.add_(kept[id(self)])

    return add_noise


def _unclipped_scores(_: Any) -> Any:
    def confusion(probs_NC: Any, targets_NC: Any, *_: Any) -> Any:
        counted_N = targets_NC.sum(1) == 1
        found_CC = np.zeros((targets_NC.shape[1],) * 2)
        pair = targets_NC[counted_N].argmax(1), probs_NC[counted_N].argmax(1)
        np.add.at(found_CC, pair, 1.0)
        return found_CC

    return confusion


def _masked_by_data(_: Any) -> Any:
    return lambda _plan, _scheme, train: ~train.targets_NC.any(axis=0)


def _weight_of_data(real: Any) -> Any:
    def train(order: Any, lab: Any, *others: Any) -> Any:
        return replace(real(order, lab, *others), weight=float(len(lab.train)))

    return train


def _fresh(_: Any) -> Any:
    return lambda _self, _order: Fresh()


def _forgetful(_: Any) -> Any:
    return lambda *_args, **_named: None


# --- the list

OF_THE_REVIEW = (
    Planted("sigma halved on the way", "client.private:Mechanism", _sigma_halved),
    Planted(
        "rate doubled in training only",
        "client.private:draw",
        _changed(sampling_rate=lambda rate: min(1.0, 2 * rate)),
    ),
    Planted(
        "max_norm doubled in the closed form",
        "client.private:private_head_step",
        _max_norm_doubled,
    ),
    Planted(
        "noise in a round's first step only",
        "privacy.gradients:PatientOptimizer.add_noise",
        _first_step_only,
    ),
    Planted("empty draws drawn again", "client.private:draw", _never_empty),
    Planted("scores without noise", "client.app:noised_tally", _without_noise),
    Planted(
        "the same noise at all labs", "client.app:_train_privately", _noise_of("kind", "round")
    ),
    Planted(
        "cells weighted by everybody's mean count",
        "privacy.gradients:_padded",
        _mean_count_in_closed_form,
    ),
    Planted(
        "gradients that are not finite kept",
        "privacy.gradients:PatientOptimizer.clip_and_accumulate",
        _non_finite_kept,
    ),
    Planted("production noise seeded", "privacy.noise:SystemRandomness._key", _seeded),
)
FURTHER = (
    Planted("the same noise in every round", "client.app:_train_privately", _noise_of("kind")),
    Planted("noise over the root of the steps", "privacy.gradients:PatientOptimizer.add_noise",
            _noise_over_steps),
    Planted("one noise for all steps", "privacy.gradients:PatientOptimizer.add_noise", _frozen),
    Planted("noise that is not Gaussian", "privacy.noise:_Stream.normals", _uniform),
    Planted("noise of 16 bits", "privacy.noise:_Stream.normals", _few_digits),
    Planted("denominator halved", "client.private:Mechanism", _denominator_doubled),
    Planted("denominator by the lab's count", "client.private:train_privately", _counted),
    Planted("rate of learning doubled", "client.private:peak_rate",
            lambda real: lambda *args: 2 * real(*args)),
    Planted("images for patients", "client.private:units_of", _of_images),
    Planted("clipped by cell and summed", "client.private:private_step", _summed_cells),
    Planted("mean count, a pass a patient", "client.private:private_step", _mean_count),
    Planted("the first patient dropped", "client.private:private_step", _without_the_first),
    Planted("one draw for all steps", "client.private:draw", _drawn_once),
    Planted("draws of a public seed", "client.private:draw", _public_draws),
    Planted("draws of one size", "client.private:draw", _fixed_size),
    Planted("momentum before the noise", "privacy.gradients:PatientOptimizer.finish",
            _clean_momentum),
    Planted("control variate before the noise", "strategies.scaffold:_finish", _clean_control,
            {"privacy.gradients:PatientOptimizer.add_noise": _sum_is_kept}),
    Planted("a layer outside the noise", "privacy.gradients:PatientOptimizer.add_patient",
            _own_layer),
    Planted("classes masked by the data", "client.opening:absent_classes", _masked_by_data),
    Planted("weight by number of images", "client.app:_train_privately", _weight_of_data),
    Planted("scores not clipped", "client.app:clipped_confusion", _unclipped_scores),
    Planted("sides by quotas of all patients", "client.opening:_each_alone",
            lambda _: lambda _cells, _plan: False),
    Planted("other noise at a second attempt", "client.outbox:Outbox.take", _fresh,
            {"client.outbox:Outbox.put": _forgetful,
             "client.opening:OutboxUpdates.save": _forgetful,
             "client.opening:LimitedBudget.release": _forgetful,
             "client.opening:LimitedBudget.settle": _forgetful}),
)  # fmt: skip
FAULTS = (*OF_THE_REVIEW, *FURTHER)


def _optimizer(of: type) -> Planted:
    return Planted(of.__name__, "client.private:PatientOptimizer", lambda _: of)


OF_THE_OPTIMIZER = {
    "noise off": _optimizer(faults.NoiseOff),
    "noise halved": _optimizer(faults.NoiseHalved),
    "noise seeded": Planted(
        "noise seeded", "privacy.noise:SystemRandomness._key", lambda _: lambda _self: bytes(32)
    ),
    "no clipping": _optimizer(faults.NotClipped),
    "clipping after averaging": _optimizer(faults.ClippedAfterAveraging),
    "a patient split in two": _optimizer(faults.PatientSplit),
}
"""faults of ``privacy.faults``, as they are in a lab"""
