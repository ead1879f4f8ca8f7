"""The lab's half of secure aggregation around the protocol: state on disk, words out.

The protocol itself is ``privacy.secagg_lab``, pure. Here its state is loaded, moved by one step and
saved *before* the reply leaves, so that no slot ever serves twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cytofed.arrays import Parts
from cytofed.errors import InputError, RefusedError, VerificationError
from cytofed.messages import BadMessage, Order, Step
from cytofed.metrics import Tally
from cytofed.plan import Plan
from cytofed.privacy import secagg_lab
from cytofed.privacy.encoding import Encoded, encode
from cytofed.privacy.identity import Identity
from cytofed.privacy.masks import Words
from cytofed.privacy.secagg import Cohort, SecaggError
from cytofed.privacy.secagg_lab import LabState
from cytofed.secure_round import (
    encoding_of,
    protocol_round,
    public_bound,
    tally_encoding,
    tally_limbs,
)
from cytofed.strategies.strategy import Strategy


class StateFile(Protocol):
    """Where a lab keeps the protocol's state; it holds secrets."""

    def load(self, run: str) -> bytes | None: ...
    def save(self, run: str, state: bytes) -> None:
        """On the disk when this returns."""


@dataclass(frozen=True)
class SecureLab:
    """A lab's keys, the cohort that it pinned when it approved the plan, and its state."""

    identity: Identity
    cohort: Cohort
    bounds: Mapping[str, float]
    """what each lab of the cohort may weigh, from what all of them have signed"""
    states: StateFile = field(repr=False)
    rounding: Callable[[Order], np.random.Generator] = field(
        default=lambda _order: np.random.Generator(np.random.SFC64()), repr=False
    )
    """of stochastic rounding; not secret, so of the fastest kind"""

    def answer(self, request: Step) -> Step:
        """One step of the protocol. Errors: SecaggError when the lab was lied to; it stops."""
        steps = {
            "advertise": secagg_lab.advertise,
            "share": secagg_lab.share,
            "accept": secagg_lab.accept,
            "open": secagg_lab.open_dealt,
            "agree": secagg_lab.agree,
            "reveal": secagg_lab.reveal,
            "convict": secagg_lab.convict,
        }
        if request.step not in steps:
            raise BadMessage(f"unknown step {request.step!r} of secure aggregation")
        self._check_run(request.run)
        state, reply = self._moved(
            lambda before: steps[request.step](before, self.identity, request.body)
        )
        self.states.save(request.run, state.to_bytes())
        return Step(request.run, request.step, reply)

    def mask(
        self, order: Order, plan: Plan, strategy: Strategy, parts: Parts, weight: float
    ) -> Encoded:
        """The update as masked words; the lab weighs no more than its bound.

        Errors: as ``secagg_lab.mask``; RefusedError for a cohort or weight bound that is not the
        approved one.
        """
        self._check_order(order)
        weight = min(weight, self.bounds[self.identity.name])
        size = parts["weights"].size
        encoding = encoding_of(
            plan, strategy, size=size, labs=order.labs, max_weight=order.max_weight
        )
        up = [parts[name] for name in strategy.lab.up]
        flat = up[0] if len(up) == 1 else np.concatenate(up)
        encoded = encode(flat, encoding, rng=self.rounding(order), weight=weight)
        self._hide(order, encoded.words_W)
        return encoded

    def mask_tally(self, order: Order, tally: Tally) -> Words:
        """The tally as masked words that sum exactly. Errors: as ``mask``; InputError for counts
        beyond what a word carries."""
        self._check_order(order)
        encoding = tally_encoding(len(tally.confusion_CC), labs=order.labs)
        encoded = encode(tally_limbs(tally), encoding, rng=self.rounding(order))
        if encoded.clamped:
            raise InputError("the tally has counts beyond 2^45, which the secure sum cannot carry")
        self._hide(order, encoded.words_W)
        return encoded.words_W

    def _hide(self, order: Order, words_W: Words) -> None:
        """Mask the words in place; the state that says so is on the disk before this returns."""

        def step(before: LabState) -> tuple[LabState, bytes]:
            after = secagg_lab.mask(
                before,
                words_W,
                round=protocol_round(order.kind, order.round),
                slot=order.slot,
                order_sha256=order.sha256,
                work_sha256=order.work_sha256,
            )
            return after, b""

        state, _ = self._moved(step)
        self.states.save(order.run, state.to_bytes())

    def _moved(self, step: Callable[[LabState], tuple[LabState, bytes]]) -> tuple[LabState, bytes]:
        kept = self.states.load(self.cohort.run)
        name = self.identity.name
        before = LabState(self.cohort, name) if kept is None else LabState.from_bytes(kept)
        if before.cohort != self.cohort:  # guard: kept-cohort
            raise VerificationError("the kept state is of another cohort than this run's")
        try:
            return step(before)
        except SecaggError as lie:
            if lie.state is not None:
                self.states.save(self.cohort.run, lie.state.to_bytes())
            raise

    def _check_order(self, order: Order) -> None:
        self._check_run(order.run)
        if order.labs != len(self.cohort.labs):  # guard: cohort-size
            raise RefusedError(
                f"order for a cohort of {order.labs} labs, {len(self.cohort.labs)} were approved"
            )
        if order.max_weight != public_bound(self.bounds.values()):  # guard: weight-bound
            raise RefusedError(
                f"order with a weight bound of {order.max_weight:g}, the labs' signed decisions "
                f"give {public_bound(self.bounds.values()):g}"
            )

    def _check_run(self, run: str) -> None:
        if run != self.cohort.run:  # guard: run-approved
            raise RefusedError(f"run {run!r} is not the approved one, {self.cohort.run!r}")
