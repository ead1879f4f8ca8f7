"""The coordinator: one process with the labs' port, and three threads that carry out runs.

*approvals* asks labs about the offers of all runs that wait, side by side; *rounds* carries out
one started run after the other, in the order in which they were queued; *results* gives out what
labs do not have yet. A run goes from approval to rounds and ends as completed, incomplete or
failed. Every step is on the disk before the next: after a crash ``start`` goes on with the
interrupted run at its next round.

What one run's folder or one lab's answer raises is that run's or that lab's failure, by name. What
is wrong beyond that is told at ``/health``; where it does not pass, the process ends with 1, for
whoever watches over it to start another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from flwr.app import ConfigRecord, RecordDict

from cytofed.documents import Ended, Offer, Roster, Start, secure_cohort
from cytofed.errors import CytofedError, InputError
from cytofed.labels import load_scheme
from cytofed.messages import BadMessage
from cytofed.plan import Plan
from cytofed.plan_check import check_plan
from cytofed.privacy.terms import patients_of, with_delta
from cytofed.sealed_message import new_content
from cytofed.secure_round import public_bound, weight_bounds
from cytofed.server import pki
from cytofed.server.approvals import Approvals, approved_by, check_enough, left_out
from cytofed.server.asking import Pauses, ask, content_of
from cytofed.server.checkpoints import (
    Progress,
    Record,
    load_last_whole,
    load_progress,
    save_progress,
)
from cytofed.server.control import Command, serve_commands
from cytofed.server.directory import ServerDirectory
from cytofed.server.door import Door, raise_file_limit, serve_at
from cytofed.server.enrolment import enrol, health_of, leave, renew, route_of
from cytofed.server.fleet import Fleet, Stopped
from cytofed.server.gate import ENROL, HEALTH, LEAVE, RENEW
from cytofed.server.results import (
    failed_summary,
    keep_scores,
    read_scores,
    write_metrics,
    write_report,
    write_results,
)
from cytofed.server.rounds import Run, Scores, run_rounds
from cytofed.server.runs import ENDED, DamagedRun, Phase, RunFolder, RunState
from cytofed.server.sealed_grid import SealedGrid, SealedRun
from cytofed.server.secure import SecureRun
from cytofed.server.worker import Worker
from cytofed.start import GIVEN_FILE, read_start
from cytofed.start import Start as StartModel
from cytofed.strategies import make_strategy
from cytofed.words import one_line, reason_of

_RESULT_ANSWER_S = 120.0
_MOST_RESULT_PAUSE_S = 3600.0
"""between two tries to give a result to a lab that does not take it"""
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
_MOST_ASIDE_S = 600.0
"""between two tries to go on with a run that the machine stopped"""
_SPARE_BYTES = 1 << 22
"""room of a reply beyond its arrays: headers, tallies, shares of secure aggregation"""

_log = logging.getLogger("cytofed.coordinator")


class Coordinator:
    """Runs and labs of one directory. ``serve`` returns when the process is told to end."""

    def __init__(self, directory: ServerDirectory) -> None:
        self._directory = directory
        self._settings = directory.settings()
        self._identity = directory.identity()
        self._fleet = Fleet(poll_s=self._settings.poll_s, spool=directory.root / "spool")
        self._door = Door(known=self._fleet.knows, files=raise_file_limit())
        self._ending = threading.Event()
        self._watch = _Log()
        every_s = self._settings.offer_every_s
        self._approvals = Approvals(self._fleet, self._identity, every_s=every_s)
        self._pauses = Pauses(every_s, _MOST_RESULT_PAUSE_S)
        """of results that a lab does not take; each refusal is a record in its log, for ever"""
        self._over: set[str] = set()
        """runs that have ended"""
        self._owed: dict[str, frozenset[str]] = {}
        """of those, the labs that have to hear of it still"""
        self._giving = threading.Lock()
        self._aside: dict[str, str] = {}
        """runs that cannot go on now, and why"""
        self._aside_until = Pauses(every_s, _MOST_ASIDE_S)
        self._at_work = ""
        """the run whose rounds are carried out now"""
        self._workers = tuple(
            Worker(name, turn, ending=self._ending, give_up=self._give_up)
            for name, turn in (
                ("approvals", self._approve_some),
                ("rounds", self._carry_out_next),
                ("results", self._give_results),
            )
        )
        self._gave_up = ""
        self._port: uvicorn.Server | None = None
        self._refresh()

    def serve(self) -> None:
        """Open the port and the control socket, go on with interrupted runs; blocks.

        Errors: CytofedError where a thread could not go on: another process may.
        """
        self._directory.renew_own_certificate()
        gc.freeze()  # what is imported stays: collections look at the rest alone
        sockets = self._door.listen(self._settings.listen, self._settings.port)
        with serve_commands(self._directory.socket, self._answer):
            self._port = server = self._server()
            for worker in self._workers:
                worker.start()
            try:
                asyncio.run(server.serve(sockets))
            finally:
                self._end()
                for worker in self._workers:
                    worker.join(timeout_s=30)
        if self._gave_up:
            raise CytofedError(
                f"the coordinator ends, for its thread {self._gave_up}",
                hint="its log says more; a start goes on where it was",
            )

    def _end(self) -> None:
        """Have every wait end, the labs' and the runs'; what is under way can be gone on with."""
        self._ending.set()
        self._wake()
        self._fleet.close()

    def _wake(self) -> None:
        """There is something to do."""
        for worker in self._workers:
            worker.wake()

    def _give_up(self, reason: str) -> None:
        """A thread cannot go on: end the process, for a new one to be started."""
        self._gave_up = reason
        _log.error("ends: %s", reason)
        self._end()
        if self._port is not None:
            self._port.should_exit = True

    def _trouble(self, *, in_public: bool = False) -> str:
        """What is wrong with this process, or nothing."""
        found = [worker.trouble(in_public=in_public) for worker in self._workers]
        return "; ".join(trouble for trouble in found if trouble)

    # --- the port

    def _server(self) -> uvicorn.Server:
        settings = self._settings
        changes = {ENROL: enrol, RENEW: renew, LEAVE: leave}
        app = self._fleet.app(
            enrolments_per_minute=settings.enrolments_per_minute,
            body_timeout_s=settings.body_timeout_s,
            others={
                **{
                    path: route_of(change, self._directory, self._refresh)
                    for path, change in changes.items()
                },
                HEALTH: health_of(partial(self._trouble, in_public=True)),
            },
        )
        return serve_at(self._door, app, folder=self._directory.root, ending=self._end)

    def _refresh(self) -> None:
        """Let in exactly the labs of the roster."""
        roster = self._directory.roster()
        keys = {
            member.name: pki.public_key_pem(self._directory.certificate(member.name))
            for member in roster.members
        }
        self._fleet.enrol(keys)
        _log.info("roster of %d labs", len(keys))

    # --- commands of the control socket

    def _answer(self, command: Command) -> Mapping[str, Any]:
        if command.name == "run":
            folder = self._queue(command.plan(), command.names("labs"))
            plan_sha256 = folder.offer(self._identity).plan.sha256
            return {"run": folder.name, "plan_sha256": plan_sha256}
        if command.name == "status":
            return self._status()
        if command.name == "revoke":
            self._directory.revoke(command.text("lab"))
            self._refresh()
            return {}
        if command.name == "stop-run":
            folder = RunFolder.open(self._directory.runs, command.text("run"))
            folder.ask_to_stop("stopped by the coordinator")
            self._wake()
            return {}
        if command.name == "start-run":
            folder = RunFolder.open(self._directory.runs, command.text("run"))
            return {"labs": self._start_now(folder)}
        raise InputError(f"unknown command {command.name!r}")

    def _queue(self, plan: Plan, labs: Sequence[str] = ()) -> RunFolder:
        """Offer a plan to the labs of the roster, or to these of them."""
        check_plan(plan)
        if plan.privacy.unit != "none" and plan.privacy.declared_patients is None:
            raise InputError(
                "privacy.declared_patients is not set: a deployment does not count patients",
                hint="set it to one number, or to a map of lab: number",
            )
        roster = chosen(self._directory.roster(), labs)
        if len(roster.members) < plan.cohort.min_labs:
            found = "are chosen" if labs else "are enrolled"
            raise InputError(
                f"the plan asks for {plan.cohort.min_labs} labs, {len(roster.members)} {found}",
                hint="name more with --labs"
                if labs
                else "cytofed server invite DIR LAB --out FILE",
            )
        if patients := patients_of(plan, len(roster.members)):
            plan = with_delta(plan, patients)
        folder = RunFolder.create(self._directory.runs, plan, roster, self._identity)
        self._wake()
        return folder

    def _start_now(self, folder: RunFolder) -> list[str]:
        """Have a run start with the labs that have approved it by now; which those are."""
        phase = folder.state().phase
        if phase != "approval":
            raise InputError(f"run {folder.name} does not wait for approval: {phase}")
        offer = folder.offer(self._identity)
        approved = approved_by(offer, folder.decisions(offer), self._fleet.nodes)
        try:
            check_enough(offer.plan, len(approved))
        except InputError as error:
            named = ", ".join(sorted(approved)) or "none"
            raise InputError(f"{error.message} (approved by: {named})", hint=error.hint) from None
        folder.ask_to_start()
        self._wake()
        return sorted(approved)

    def _status(self) -> Mapping[str, Any]:
        roster = self._directory.roster()
        runs = [self._described(folder) for folder in RunFolder.all(self._directory.runs)]
        waiting = next((run for run in runs if run["status"] in ("approval", "rounds")), None)
        decided = {} if waiting is None else waiting["decisions"]
        labs = []
        for member in roster.members:
            presence = self._fleet.presence(member.name)
            seen = presence.last_seen
            labs.append(
                {
                    "lab": member.name,
                    "online": presence.online,
                    "last_seen": None if seen is None else seen.isoformat(timespec="seconds"),
                    "version": presence.version or None,
                    "round": self._watch.rounds.get(member.name),
                    "clock_s": round(presence.clock_s, 1),
                    "declared_patients": member.declared_patients or None,
                    "decision": decided.get(member.name),
                    "certificate_days": int(
                        pki.days_left(self._directory.certificate(member.name))
                    ),
                    "fingerprint": member.identity.fingerprint,
                }
            )
        return {
            "federation": roster.federation,
            "fingerprint": self._identity.public.fingerprint,
            "certificate_days": int(
                pki.days_left((self._directory.root / "server.pem").read_bytes())
            ),
            "trouble": self._trouble() or None,
            "labs": labs,
            "gone": [
                {"lab": gone.lab, "why": gone.why, "at": gone.at.isoformat(timespec="seconds")}
                for gone in self._directory.gone()
            ],
            "runs": runs,
        }

    def _described(self, folder: RunFolder) -> dict[str, Any]:
        """One run for `status`; one that cannot be read says why."""
        try:
            described = describe_run(folder)
            if described["status"] not in ENDED:
                offer = folder.offer(self._identity)
                decided = folder.decisions(offer)
                described["decisions"] = {
                    member.name: decided[member.name][0].verdict if member.name in decided else None
                    for member in offer.roster.members
                }
                described["at_work"] = folder.name == self._at_work
                described["reason"] = self._aside.get(folder.name)
        except Exception as error:
            return damaged_run(folder, self._aside.get(folder.name) or reason_of(error))
        return described

    # --- runs

    def _runs(self, *phases: Phase) -> list[RunFolder]:
        """Runs in these phases that are not set aside, in the order in which they were queued."""
        found = []
        for folder in RunFolder.all(self._directory.runs, but=self._over):
            with contextlib.suppress(DamagedRun):  # see _give_results
                phase = folder.state().phase
                if phase in ENDED:
                    self._over.add(folder.name)
                elif phase in phases and self._aside_until.over(folder.name):
                    found.append(folder)
        return found

    def _approve_some(self) -> float:
        """Ask for decisions, and start what is due."""
        waiting = self._runs("approval")
        for folder in waiting:
            self._of_this_run(folder, partial(self._approvals.ask, folder))
        self._approvals.collect(waiting)
        for folder in waiting:
            self._of_this_run(folder, partial(self._start_if_due, folder))
        for folder in self._runs("rounds"):
            if folder.name != self._at_work and (why := folder.stop_reason()):
                self._close(folder, why)  # it does not wait for its turn to be stopped
        return 0.0 if self._approvals.waiting else self._settings.offer_every_s

    def _start_if_due(self, folder: RunFolder, offer: Offer) -> None:
        if folder.state().phase == "approval" and self._approvals.start_if_due(folder, offer):
            self._wake()

    def _carry_out_next(self) -> float:
        """Carry out the rounds of one run."""
        started = self._runs("rounds")
        if not started:
            return self._settings.offer_every_s
        folder = started[0]
        self._at_work = folder.name
        self._of_this_run(folder, partial(self._to_the_end, folder))
        self._at_work = ""
        gc.collect()
        self._give(folder)  # before the labs are busy with the next run
        self._wake()
        return 0.0

    def _of_this_run(self, folder: RunFolder, work: Callable[[Offer], None]) -> None:
        """Do a run's work. What that raises ends the run, by name, with the model that it has.

        What the machine is to blame for leaves the run as it is, to be gone on with later.
        """
        try:
            work(folder.offer(self._identity))
            self._aside.pop(folder.name, None)
            return
        except Stopped as stopped:
            if self._ending.is_set():
                return
            reason, machine = stopped.message, False
        except Exception as error:
            reason = reason_of(error)
            machine = _is_of_the_machine(error)
            if isinstance(error, CytofedError):
                _log.warning("run %s: %s", folder.name, reason)
            else:
                _log.exception("run %s", folder.name)
                reason = f"internal error: {reason}"
        # Not above: there the error holds what the round had in memory.
        if machine:
            self._set_aside(folder, reason)
        else:
            self._close(folder, reason)

    def _set_aside(self, folder: RunFolder, reason: str) -> None:
        """Go on with other runs, and with this one later."""
        pause_s = self._aside_until.refused(folder.name)
        self._aside[folder.name] = reason
        _log.error("run %s is set aside for %.0f s: %s", folder.name, pause_s, reason)

    def _close(self, folder: RunFolder, reason: str) -> None:
        """End a run before its end, with the model of its last checkpoint where it has one."""
        try:
            if not self._end_with_model(folder, reason):
                self._fail(folder, reason)
        except Exception as error:
            if _is_of_the_machine(error):  # what there is is kept when there is room
                self._set_aside(folder, f"{reason}; {reason_of(error)}")
                return
            _log.warning("run %s: nothing of it can be kept: %s", folder.name, reason_of(error))
            try:
                folder.write_summary({"status": "failed", "reason": reason})
                folder.end("failed", reason=reason)
            except Exception as again:
                self._set_aside(folder, f"{reason}; {reason_of(again)}")
        self._wake()

    def _end_with_model(self, folder: RunFolder, reason: str) -> bool:
        """Write what a run's last checkpoint gives; False where there is none."""
        file = folder.private / "start"
        offer = folder.offer(self._identity)
        progress = load_last_whole(folder.checkpoints, plan_sha256=offer.plan.sha256)
        if progress is None or not file.is_file():
            return False
        start = Start.verified(file.read_bytes(), self._identity.public, offer)
        model = _start_model(folder, trained=False)
        run = self._run(offer, start, self._sealed(offer, start), model)
        self._finish(folder, run, offer, progress, model, reason=reason)
        return True

    def _finish(
        self,
        folder: RunFolder,
        run: Run,
        offer: Offer,
        progress: Progress,
        model: StartModel,
        *,
        reason: str = "",
    ) -> None:
        """Write a run's results and end it."""
        scores = read_scores(folder, progress.round, len(run.scheme.codes)) or Scores()
        summary = write_results(folder, run, offer, progress, scores, model, reason=reason)
        write_metrics(folder, progress)
        write_report(folder)
        ended = cast(Phase, summary["status"])
        absent = {**left_out(offer, folder.decisions(offer)), **_absent(progress.records)}
        cohort = tuple(sorted(run.cohort))
        folder.end(ended, reason=reason, absent=absent, cohort=cohort)
        _log.info("run %s: %s, weights %s", folder.name, ended, summary["weights_sha256"])

    def _fail(self, folder: RunFolder, reason: str) -> None:
        """End a run that left no model; what labs said no, or nothing, is named."""
        offer = folder.offer(self._identity)
        decisions = {lab: decision for lab, (decision, _) in folder.decisions(offer).items()}
        absent = left_out(offer, folder.decisions(offer))
        for member in offer.roster.members:
            decision = decisions.get(member.name)
            if decision is None:
                absent[member.name] = "did not decide"
            elif decision.verdict == "rejected":
                absent[member.name] = f"rejected the plan {one_line(decision.reason)}".strip()
        summary = failed_summary(offer, reason, absent)
        folder.write_summary(summary)
        folder.end("failed", reason=reason, absent=absent)

    def _to_the_end(self, folder: RunFolder, offer: Offer) -> None:
        if folder.state().phase != "rounds":  # stopped while it waited
            return
        file = folder.private / "start"
        start = Start.verified(file.read_bytes(), self._identity.public, offer)
        plan = offer.plan
        model = _start_model(folder, trained=False).bare
        strategy = make_strategy(plan.strategy)
        size = model.manifest.size
        reply_bytes = 8 * size * len(strategy.lab.up) + _SPARE_BYTES
        sealed = self._sealed(offer, start)
        secure = self._secure(folder, offer, start, sealed, size)
        run = self._run(offer, start, sealed, model, secure)
        grid = SealedGrid(
            self._fleet.grid(
                wait_s=plan.cohort.wait_s, reply_bytes=reply_bytes, stopped=folder.stop_reason
            ),
            sealed,
            reply_bytes=reply_bytes,
            spool=self._fleet.spool,
            heads=self._directory,
        )
        self._give_start(folder, grid, sealed, plan)
        latest = self._progress(folder, plan)

        def checkpoint(after: Progress) -> None:
            nonlocal latest
            save_progress(folder.checkpoints, after, plan_sha256=plan.sha256)
            write_metrics(folder, after)
            latest = after
            gc.collect()  # Flower's records are in cycles that hold arrays
            online = [lab for lab in sealed.nodes if self._fleet.presence(lab).online]
            self._give_start(folder, grid, sealed, plan, only=online)

        run_rounds(
            grid,
            run,
            latest,  # and no other name: a state is as large as the model
            checkpoint=checkpoint,
            watch=self._watch,
            on_scores=lambda number, scores: keep_scores(folder, number, scores),
            known_scores=read_scores(folder, latest.round, len(run.scheme.codes)),
        )
        self._finish(folder, run, offer, latest, _start_model(folder, trained=False))

    def _give_start(
        self,
        folder: RunFolder,
        grid: SealedGrid,
        sealed: SealedRun,
        plan: Plan,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """Where the plan names a start model by its content: send it to who has it not yet.

        ``only``: not to others. A lab that does not take it is absent from the rounds by name.
        """
        file = folder.private / GIVEN_FILE
        labs = sealed.nodes if only is None else only
        missing = {lab: sealed.nodes[lab] for lab in labs if not folder.has_start(lab)}
        if not file.is_file() or not missing:
            return
        card = file.with_suffix(".json")
        content = new_content(
            {}, file=file.read_bytes(), card=card.read_bytes() if card.is_file() else None
        )
        timeout_s = plan.cohort.round_timeout_s
        for lab, reply in ask(grid, missing, "query.start", 0, content, timeout_s=timeout_s):
            try:
                content_of(reply)
            except BadMessage as error:
                _log.warning(
                    "run %s: %s has no start model: %s", folder.name, lab, error.message[:200]
                )
            else:
                folder.note_start(lab)

    def _progress(self, folder: RunFolder, plan: Plan) -> Progress:
        """How far the run was when it was interrupted; else its beginning."""
        found = load_progress(folder.checkpoints, plan_sha256=plan.sha256)
        if found is not None:
            _log.info("run %s goes on after round %d", folder.name, found.round)
            return found
        strategy = make_strategy(plan.strategy)
        return Progress(0, strategy.init(_start_model(folder).weights_P))

    def _sealed(self, offer: Offer, start: Start) -> SealedRun:
        nodes = self._fleet.nodes
        return SealedRun(
            identity=self._identity,
            roster=offer.roster,
            run=start.run,
            plan_sha256=start.plan_sha256,
            start=start.signed(self._identity),
            # A lab that was revoked since keeps its place, and is absent by name.
            nodes={lab: nodes.get(lab, -k) for k, lab in enumerate(start.labs, 1)},
        )

    def _secure(
        self, folder: RunFolder, offer: Offer, start: Start, sealed: SealedRun, size: int
    ) -> SecureRun | None:
        plan = offer.plan
        if not plan.secure_aggregation.enabled:
            return None
        bounds = weight_bounds(start.decided(offer), plan)
        return SecureRun(
            cohort=secure_cohort(start, offer, self._identity.public),
            identity=self._identity,
            plan=plan,
            strategy=make_strategy(plan.strategy),
            size=size,
            max_weight=public_bound(bounds.values()),
            nodes=sealed.nodes,
            counter_file=folder.private / "counter.json",
        )

    def _run(
        self,
        offer: Offer,
        start: Start,
        sealed: SealedRun,
        model: StartModel,
        secure: SecureRun | None = None,
    ) -> Run:
        plan = offer.plan
        return Run(
            start.run,
            plan,
            make_strategy(plan.strategy),
            load_scheme(plan.labels.scheme),
            sealed.nodes,
            model.manifest.size,
            secure,
            signed_weights={
                lab: float(decision.max_weight) for lab, decision in start.decided(offer).items()
            },
            release=model.released,
        )

    # --- results

    def _give_results(self) -> float:
        """Send what labs do not have yet; trouble with one run is no trouble of others."""
        there = {lab for lab in self._fleet.nodes if self._fleet.presence(lab).online}
        done = {run for run, labs in self._owed.items() if not labs & there}
        for folder in RunFolder.all(self._directory.runs, but=done):
            try:
                folder.state()
            except DamagedRun as damage:
                if self._aside_until.over(folder.name):
                    self._mend(folder, damage.message)
            else:
                self._give(folder)
        return self._settings.offer_every_s

    def _mend(self, folder: RunFolder, reason: str) -> None:
        """A run whose state cannot be read ends here, unless its summary says that it had ended."""
        _log.error("%s", reason)
        with contextlib.suppress(DamagedRun, OSError):
            ended = (folder.summary() or {}).get("status")
            if ended in ENDED:
                folder.end(ended, reason=reason, cohort=self._cohort(folder))
                return
        self._close(folder, reason)

    def _cohort(self, folder: RunFolder) -> tuple[str, ...]:
        """The labs of a run's start, where that can be read."""
        file = folder.private / "start"
        with contextlib.suppress(CytofedError, OSError):
            offer = folder.offer(self._identity)
            return Start.verified(file.read_bytes(), self._identity.public, offer).labs
        return ()

    def _give(self, folder: RunFolder) -> None:
        """Send labs the result, or the word that the run is over for them."""
        if not self._pauses.over((folder.name, "")):
            return
        try:
            with self._giving:
                state = folder.state()
                if state.phase == "approval":
                    return
                offer = folder.offer(self._identity)
                names = [member.name for member in offer.roster.members]
                others = [lab for lab in names if lab not in state.cohort]
                self._tell(folder, offer, self._missing(folder, others, folder.told), state)
                if state.phase in ENDED:
                    cohort = self._missing(folder, state.cohort, folder.delivered)
                    self._deliver(folder, offer, cohort, state)
                    self._owed[folder.name] = frozenset(
                        lab
                        for lab in names
                        if lab in self._fleet.nodes
                        and not (folder.delivered(lab) or folder.told(lab))
                    )
        except Stopped:
            return
        except Exception as error:
            pause_s = self._pauses.refused((folder.name, ""))
            _log.warning(
                "run %s: its result cannot be sent, again in %.0f s: %s",
                folder.name, pause_s, reason_of(error),
            )  # fmt: skip

    def _missing(
        self, folder: RunFolder, labs: Iterable[str], has: Callable[[str], bool]
    ) -> dict[str, int]:
        """Those of these labs that have it not yet and can be reached now, with their nodes."""
        nodes = self._fleet.nodes
        return {
            lab: nodes[lab]
            for lab in labs
            if lab in nodes
            and not has(lab)
            and self._fleet.presence(lab).online
            and self._pauses.over((folder.name, lab))
        }

    def _tell(
        self, folder: RunFolder, offer: Offer, labs: Mapping[str, int], state: RunState
    ) -> None:
        """Tell labs that are not in the cohort that the offer is over for them."""
        if not labs:
            return
        why = "started without this lab" if state.cohort else f"{state.phase}: {state.reason}"
        ended = Ended(offer.federation, folder.name, offer.sha256, why).signed(self._identity)
        content = RecordDict({"end": ConfigRecord({"document": ended})})
        grid = self._fleet.grid(wait_s=1.0, reply_bytes=_SPARE_BYTES)
        for lab, reply in ask(grid, labs, "query.end", 0, content, timeout_s=_RESULT_ANSWER_S):
            if reply is not None and reply.has_content():
                folder.tell(lab)
            else:
                self._pauses.refused((folder.name, lab))

    def _deliver(
        self, folder: RunFolder, offer: Offer, labs: Mapping[str, int], state: RunState
    ) -> None:
        """Send the result to labs of the cohort."""
        if not labs:
            return
        file = folder.private / "start"
        start = Start.verified(file.read_bytes(), self._identity.public, offer)
        sealed = self._sealed(offer, start)
        sealed = replace(sealed, nodes=labs)
        model = folder.root / "model.safetensors"
        summary = folder.summary() or {}
        content = new_content(
            {
                "status": state.phase,
                "reason": state.reason,
                "weights_sha256": summary.get("weights_sha256") or "",
                "card": _text(folder.root / "model_card.md"),
            },
            file=model.read_bytes() if model.is_file() else None,
        )
        grid = SealedGrid(
            self._fleet.grid(wait_s=1.0, reply_bytes=_SPARE_BYTES),
            sealed,
            reply_bytes=_SPARE_BYTES,
            spool=self._fleet.spool,
            heads=self._directory,
        )
        number = offer.plan.train.rounds
        try:
            for lab, reply in ask(
                grid, sealed.nodes, "query.result", number, content, timeout_s=_RESULT_ANSWER_S
            ):
                if reply is not None and reply.has_content():
                    folder.deliver(lab)
                else:
                    _log.warning(
                        "run %s: %s has not taken the result; again in %.0f s",
                        folder.name,
                        lab,
                        self._pauses.refused((folder.name, lab)),
                    )
        finally:
            gc.collect()


class _Log:
    """A run's progress as lines of the log. ``rounds``: the last that each lab has answered."""

    def __init__(self) -> None:
        self.rounds: dict[str, int] = {}

    def order(self, run: str, kind: str, round_: int, rounds: int, labs: int) -> None:
        _log.info("%s: %s, round %d of %d, %d labs", run, kind, round_, rounds, labs)

    def reply(self, run: str, kind: str, round_: int, lab: str, loss: float) -> None:
        self.rounds[lab] = round_
        told = f", loss {loss:.3f}" if math.isfinite(loss) else ""
        _log.info("%s: %s of round %d from %s%s", run, kind, round_, lab, told)

    def absent(self, run: str, kind: str, round_: int, lab: str, reason: str) -> None:
        _log.warning("%s: %s of round %d without %s: %s", run, kind, round_, lab, reason)

    def round(self, run: str, record: Record) -> None:
        names = ", ".join(record["received"])
        _log.info("%s: round %d with %s", run, record["round"], names or "no lab")


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """One run for `status`."""
    state = folder.state()
    metrics = folder.root / "metrics.jsonl"
    rounds = metrics.read_text().count("\n") if metrics.is_file() else 0
    return {
        "run": folder.name,
        "status": state.phase,
        "rounds": rounds,
        "cohort": list(state.cohort),
        "reason": state.reason or None,
        "absent": dict(state.absent),
        "queued_at": state.queued_at,
        "ended_at": state.ended_at or None,
    }


def damaged_run(folder: RunFolder, reason: str) -> dict[str, Any]:
    """A run that cannot be read, for `status`."""
    return {
        "run": folder.name,
        "status": "damaged",
        "rounds": 0,
        "cohort": [],
        "reason": reason,
        "absent": {},
        "queued_at": None,
        "ended_at": None,
    }


def chosen(roster: Roster, labs: Sequence[str]) -> Roster:
    """The roster with these labs only, or as it is where none are named.

    Errors: InputError for a lab that is not enrolled, or is named twice.
    """
    for lab in labs:
        if roster.find(lab) is None:
            known = ", ".join(member.name for member in roster.members) or "none"
            raise InputError(f"lab {one_line(lab)!r} is not enrolled", hint=f"enrolled: {known}")
    if len(set(labs)) < len(labs):
        raise InputError(f"a lab is named twice in {', '.join(labs)}")
    if not labs:
        return roster
    return replace(roster, members=tuple(m for m in roster.members if m.name in labs))


def wait_for(folder: RunFolder, *, poll_s: float = 0.3) -> dict[str, Any]:
    """The summary of a run, once it has ended."""
    while folder.state().phase not in ENDED:
        time.sleep(poll_s)
    return {"status": folder.state().phase, **(folder.summary() or {})}


def _is_of_the_machine(error: Exception) -> bool:
    """Whether no run can help it, and it passes: a full disk, no files left."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def _absent(records: tuple[Record, ...]) -> dict[str, str]:
    """Labs that were missing in a round, and why the last time."""
    found: dict[str, str] = {}
    for record in records:
        found.update({lab: f"round {record['round']}: {why}"
                      for lab, why in record["absent"].items()})  # fmt: skip
    return found


def _start_model(folder: RunFolder, *, trained: bool = True) -> StartModel:
    found = read_start(folder.private, trained=trained)
    if found is None:
        _make_start_model(folder)
        found = read_start(folder.private, trained=trained)
        assert found is not None
    return found


def _make_start_model(folder: RunFolder) -> None:
    """The start model, by a process of its own: this one never imports torch."""
    done = subprocess.run(
        [sys.executable, "-m", "cytofed.start", folder.root / "plan.yaml", folder.private],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CytofedError(f"the start model could not be built: {done.stderr.strip()[-300:]}")


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
