"""The round loop: the same code over every Grid, in deployment and in simulation.

P parameters. ``run_rounds`` sends orders, adds the updates up as they arrive, moves the model and
checkpoints. A lab that fails is absent by name and reason; nothing is ever a silent average over
whoever happened to answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flwr.serverapp import Grid

from cytofed.arrays import Float32, Parts
from cytofed.errors import InputError
from cytofed.labels import Scheme
from cytofed.messages import (
    MAX_WEIGHT,
    BadMessage,
    Masked,
    Order,
    content_bytes,
    pack_order,
    unpack_evaluation,
    unpack_update,
)
from cytofed.metrics import Tally, summarise
from cytofed.plan import Plan
from cytofed.privacy.encoding import SumError
from cytofed.privacy.evaluation import denoised
from cytofed.privacy.secagg import SecaggError
from cytofed.server.aggregate import Sum
from cytofed.server.asking import Cohort, ask, content_of, read
from cytofed.server.checkpoints import Progress, Record
from cytofed.server.secure import Absent, SecureRun
from cytofed.strategies.strategy import Mean, Strategy
from cytofed.words import one_line


class Watch(Protocol):
    """Who wants to know how a run goes; all calls come from the loop's thread."""

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None: ...
    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None: ...
    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None: ...
    def round(self, run: str, record: Record) -> None: ...


@dataclass(frozen=True)
class Run:
    """What stays the same over all rounds of a run."""

    name: str
    plan: Plan
    strategy: Strategy
    scheme: Scheme
    cohort: Cohort
    size: int
    """P"""
    secure: SecureRun | None = None
    """with secure aggregation: the coordinator sees sums only"""
    tell_exact: bool = False
    """labs are virtual, and tell their exact scores besides what the plan lets leave"""
    signed_weights: Mapping[str, float] = field(default_factory=dict)
    """what each lab signed that it weighs at most, as it approved; of virtual labs nothing"""
    release: Callable[[Float32, float | None], Float32] = lambda weights_P, _temperature: weights_P
    """the trained weights as a model that is evaluated (without a temperature) and given away
    (with it); see ``Start.released``"""

    @property
    def rounds(self) -> int:
        return self.plan.train.rounds


@dataclass
class Collected:
    """What came back in one round. ``mean`` is None where too few labs were left."""

    mean: Parts | None = None
    received: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    up_bytes: int = 0
    train_s: float = 0.0
    failed: str = ""
    """why the model did not move, where it did not"""


@dataclass(frozen=True)
class Scores:
    """What labs told about one model on their held-out images, as tallies.

    ``exact``: of all labs that answered; None where nobody may know. ``released``: the same with
    each lab's noise, under differential privacy; ``answered`` is the number of labs in it.
    ``labs``: exact, by lab; empty where the coordinator sees sums only.
    """

    exact: Tally | None = None
    labs: Mapping[str, Tally] = field(default_factory=dict)
    released: Tally | None = None
    answered: int = 0
    failed: str = ""
    """why there are no scores, where the plan has some"""

    @property
    def best(self) -> Tally | None:
        """What there is to compute scores from: exact counts, else noised ones made sensible.

        None where no held-out image was counted, or noise hides all.
        """
        if self.exact is not None:
            return self.exact if (self.exact.confusion_CC > 0).any() else None
        return self.noised

    @property
    def temperature(self) -> float | None:
        """What fits the calibration parts of all labs; None where there are none."""
        return None if self.exact is None else self.exact.temperature

    @property
    def noised(self) -> Tally | None:
        return None if self.released is None else denoised(self.released)


def run_rounds(
    grid: Grid,
    run: Run,
    progress: Progress,
    *,
    checkpoint: Callable[[Progress], None],
    watch: Watch,
    evaluate_rounds: bool = True,
    on_scores: Callable[[int, Scores], None] = lambda _round, _scores: None,
    known_scores: Scores | None = None,
) -> Progress:
    """Run all rounds that ``progress`` has not seen; ``checkpoint`` is called after each.

    ``evaluate_rounds`` off: nothing is evaluated on the way. ``on_scores`` gets the round and what
    was told of its model. ``known_scores``: what was told of the model that ``progress`` ends
    with, where a crash came before that was noted; else it is asked for again.
    Errors: InputError for a cohort too small for what the strategy promises.
    """

    def is_due(number: int) -> bool:
        return evaluate_rounds and (number % run.plan.evaluated_every == 0 or number == run.rounds)

    def scored(progress: Progress, known: Scores | None = None) -> Progress:
        number = progress.round
        parts = {"weights": evaluated_weights(run, progress)}
        scores = known or evaluate(grid, run, number, parts, watch)
        if known is None:
            on_scores(number, scores)
        return _noted(progress, {**_told(run, scores), "evaluated": True})

    need = run.strategy.min_updates
    if len(run.cohort) < need:
        raise InputError(
            f"strategy {run.strategy.name} as planned needs {need} labs, found {len(run.cohort)}",
            hint="enrol more labs, or choose another strategy or its options",
        )
    if (
        progress.round
        and is_due(progress.round)
        and not progress.records[-1].get("evaluated", True)
    ):
        progress = scored(progress, known_scores)
        checkpoint(progress)
    total = Sum(run.strategy.lab.up, run.size)
    while progress.round < run.rounds:
        started = time.monotonic()
        progress = _one_round(grid, run, progress, total, watch)
        if is_due(progress.round):
            if run.secure is not None:
                # Labs close a round when they evaluate its model: a coordinator that forgot it
                # could not ask for it again.
                checkpoint(_timed(progress, started))
            progress = scored(progress)
        progress = _timed(progress, started)
        checkpoint(progress)
        watch.round(run.name, progress.records[-1])
    return progress


def _noted(progress: Progress, entries: Record) -> Progress:
    """With these entries in the record of the last round."""
    record = {**progress.records[-1], **entries}
    return replace(progress, records=(*progress.records[:-1], record))


def _timed(progress: Progress, started: float) -> Progress:
    """With the time that the last round has taken since ``started``."""
    wall_s = time.monotonic() - started
    noted = _noted(progress, {"wall_s": round(wall_s, 3)})
    return replace(noted, wall_s=progress.wall_s + wall_s)


def _one_round(grid: Grid, run: Run, progress: Progress, total: Sum, watch: Watch) -> Progress:
    number = progress.round + 1
    down = {name: progress.state[name] for name in run.strategy.down}
    watch.order(run.name, "train", number, run.rounds, len(run.cohort))
    if run.secure is None:
        got = _collect_updates(grid, run, number, down, total, watch)
    else:
        got = _collect_sum(grid, run, number, down, watch)

    state = progress.state
    if got.mean is not None:
        mean = Mean(got.mean, received=len(got.received), cohort=len(run.cohort))
        state = run.strategy.step(state, mean)
    record = _record(run, number, got, sum(part.nbytes for part in down.values()))
    return Progress(number, state, (*progress.records, record), progress.wall_s)


def _collect_updates(
    grid: Grid, run: Run, number: int, down: Parts, total: Sum, watch: Watch
) -> Collected:
    """Every lab's update, checked and added up as it arrives."""
    total.clear()
    parts = run.strategy.lab.up
    order = pack_order(Order("train", run.name, number, run.plan.sha256, down))
    got, kept = Collected(), dict[str, Float32]()
    timeout_s = run.plan.cohort.round_timeout_s
    for lab, message in ask(grid, run.cohort, "train", number, order, timeout_s=timeout_s):
        try:
            update = read(message, lambda got: unpack_update(got, parts=parts, size=run.size))
            _check_sender(lab, run, number, update.lab, update.run, update.round)
            _check_share(lab, update.weight, run)
        except BadMessage as error:
            reason = one_line(error.message)
            got.absent[lab] = reason
            watch.absent(run.name, "train", number, lab, reason)
            continue
        if run.strategy.combine is None:
            total.add(update.parts, update.weight)
        else:
            kept[lab] = update.parts["weights"]
        got.received.append(lab)
        got.loss[lab] = update.loss
        got.train_s += _seconds(update.train_s)
        got.up_bytes += content_bytes(content_of(message).content)
        watch.reply(run.name, "train", number, lab, update.loss)
        del update, message  # before the next is opened: there is memory for one
    need = max(run.plan.cohort.min_labs, run.strategy.min_updates)
    if len(got.received) < need:
        got.failed = f"{len(got.received)} labs answered, {need} are needed"
    elif run.strategy.combine is None:
        got.mean = total.mean()
    else:
        got.mean = {"weights": run.strategy.combine([kept[lab] for lab in sorted(kept)])}
    return got


def _collect_sum(grid: Grid, run: Run, number: int, down: Parts, watch: Watch) -> Collected:
    """The mean over the labs that survive the round, and nothing of a single one."""
    assert run.secure is not None
    got = Collected()

    def received(masked: Masked, size_bytes: int) -> None:
        got.up_bytes += size_bytes
        if masked.lab in got.received:
            return
        got.received.append(masked.lab)
        got.train_s += _seconds(masked.train_s)
        watch.reply(run.name, "train", number, masked.lab, math.nan)

    absent = _absent(got.absent, run, "train", number, watch)
    try:
        total = run.secure.collect(grid, number, down, absent, received=received)
    except (SecaggError, SumError) as error:
        got.failed = one_line(error.message)
        return got
    got.received = list(total.survivors)
    got.mean = total.mean
    return got


def _absent(reasons: dict[str, str], run: Run, kind: str, number: int, watch: Watch) -> Absent:
    return Absent(
        reasons, lambda lab, reason: watch.absent(run.name, kind, number, lab, reason), one_line
    )


def evaluate(grid: Grid, run: Run, number: int, parts: Parts, watch: Watch) -> Scores:
    """What the plan lets labs tell of the model ``parts`` on their held-out images.

    Under differential privacy that is noised, or nothing; with secure aggregation the coordinator
    sees the sum only. A lab that does not answer is missing in the result (and named to
    ``watch``); where too few are left for a sum there are no scores, and ``failed`` says why.
    """
    scores = Scores()
    private = run.plan.privacy.unit != "none"
    if run.plan.releases_scores:
        if run.secure is None:
            tallies = _tallies(grid, run, "evaluate", number, parts, watch, noised=private)
            pooled, answered, failed = _pooled(tallies, run), len(tallies), ""
        else:
            tallies = {}
            pooled, answered, failed = _secure_tally(grid, run, number, parts, watch)
        if private:
            scores = Scores(released=pooled, answered=answered, failed=failed)
        else:
            scores = Scores(exact=pooled, labs=tallies, answered=answered, failed=failed)
    if run.tell_exact:
        tallies = evaluate_exactly(grid, run, number, parts, watch)
        scores = replace(scores, exact=_pooled(tallies, run), labs=tallies)
    return scores


def evaluate_exactly(
    grid: Grid, run: Run, number: int, parts: Parts, watch: Watch
) -> dict[str, Tally]:
    """Every virtual lab's tally without noise or masks, by lab. Deployed labs do not answer."""
    return _tallies(grid, run, "evaluate.exact", number, parts, watch)


def _tallies(
    grid: Grid,
    run: Run,
    kind: str,
    number: int,
    parts: Parts,
    watch: Watch,
    *,
    noised: bool = False,
) -> dict[str, Tally]:
    order = pack_order(Order("evaluate", run.name, number, run.plan.sha256, parts))
    watch.order(run.name, "evaluate", number, run.rounds, len(run.cohort))
    tallies: dict[str, Tally] = {}
    timeout_s = run.plan.cohort.round_timeout_s
    for lab, message in ask(grid, run.cohort, kind, number, order, timeout_s=timeout_s):
        try:
            evaluation = read(
                message,
                lambda got: unpack_evaluation(got, classes=len(run.scheme.codes), noised=noised),
            )
            _check_sender(lab, run, number, evaluation.lab, evaluation.run, evaluation.round)
        except BadMessage as error:
            watch.absent(run.name, "evaluate", number, lab, one_line(error.message))
            continue
        tallies[lab] = evaluation.tally
        watch.reply(run.name, "evaluate", number, lab, math.nan)
    return tallies


def _secure_tally(
    grid: Grid, run: Run, number: int, parts: Parts, watch: Watch
) -> tuple[Tally | None, int, str]:
    """The sum of the labs' tallies, of how many, and why there is none."""
    assert run.secure is not None
    watch.order(run.name, "evaluate", number, run.rounds, len(run.cohort))
    try:
        pooled, survivors = run.secure.collect_tally(
            grid,
            number,
            parts,
            _absent({}, run, "evaluate", number, watch),
            classes=len(run.scheme.codes),
            received=lambda masked, _bytes: watch.reply(
                run.name, "evaluate", number, masked.lab, math.nan
            ),
        )
    except (SecaggError, SumError) as error:
        return None, 0, one_line(error.message)
    return pooled, len(survivors), ""


def _pooled(tallies: Mapping[str, Tally], run: Run) -> Tally | None:
    """The sum over labs; None where none answered."""
    if not tallies:
        return None
    return sum(tallies.values(), Tally.empty(len(run.scheme.codes)))


def _check_sender(lab: str, run: Run, number: int, *claimed: str | int) -> None:
    if claimed != (lab, run.name, number):
        raise BadMessage(f"answers as {claimed}, expected {(lab, run.name, number)}")


def _check_share(lab: str, weight: float, run: Run) -> None:
    """A lab weighs what it approved with at most, and may not use up the sum's room for all."""
    most = MAX_WEIGHT // len(run.cohort)  # whole: so many such weights are never above the sum's
    if weight > most:
        raise BadMessage(f"weight is {weight:g}, above {most:g} for one of {len(run.cohort)} labs")
    signed = run.signed_weights.get(lab, most)
    if weight > signed:
        raise BadMessage(f"weight is {weight:g}, the lab approved with one of {signed:g} at most")


def _seconds(train_s: float) -> float:
    """A lab's training time as it says, or 0 where that is no time at all."""
    return train_s if 0 <= train_s < 1e9 else 0.0


def _record(run: Run, number: int, got: Collected, down_bytes: int) -> Record:
    loss = {lab: round(got.loss[lab], 6) for lab in sorted(got.loss)}
    return {
        "round": number,
        "applied": got.mean is not None,
        "failed": got.failed or None,
        "expected": sorted(run.cohort),
        "received": sorted(got.received),
        "absent": dict(sorted(got.absent.items())),
        "loss": {lab: value for lab, value in loss.items() if math.isfinite(value)},
        **_told(run, Scores()),
        "evaluated": False,
        "up_bytes": got.up_bytes,
        "down_bytes": down_bytes * len(run.cohort),
        "train_s": round(got.train_s, 3),
    }


def _told(run: Run, scores: Scores) -> dict[str, Any]:
    """What of an evaluation goes into a round's record.

    ``global``: exact scores where there are some, else the noised ones; ``released``: the noised
    ones, under differential privacy.
    """
    labs = {
        lab: _headline(found, run.scheme)
        for lab, found in sorted(scores.labs.items())
        if found.confusion_CC.any()
    }
    return {
        "temperature": scores.temperature,
        "global": _headline(scores.best, run.scheme),
        "released": _headline(scores.noised, run.scheme),
        "labs": labs if labs and run.plan.reports_per_lab else None,
        "evaluation_failed": scores.failed or None,
    }


def _headline(tally: Tally | None, scheme: Scheme) -> dict[str, float] | None:
    if tally is None:
        return None
    whole = summarise(tally, scheme)
    return {key: whole[key] for key in ("macro_f1", "balanced_accuracy", "accuracy")}


def status(run: Run, progress: Progress) -> str:
    """How a run ended.

    ``completed``: every round moved the model, with at least ``min_labs`` (and as many as the
    strategy needs), and every lab of the cohort contributed at least once. ``failed``: no round
    did. ``incomplete``: all between.
    """
    applied = [record for record in progress.records if record["applied"]]
    if not applied:
        return "failed"
    contributed = {lab for record in applied for lab in record["received"]}
    whole = len(applied) == run.rounds and contributed == set(run.cohort)
    return "completed" if whole else "incomplete"


def evaluated_weights(run: Run, progress: Progress) -> Float32:
    """The model after the last round of ``progress``, as labs evaluate it."""
    return run.release(progress.state["weights"], None)


def final_weights(run: Run, progress: Progress) -> Float32:
    """The same as it is given away: at the temperature that its evaluation found."""
    temperature = progress.records[-1].get("temperature") if progress.records else None
    return run.release(progress.state["weights"], temperature)
