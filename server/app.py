"""The coordinator: one process with the labs' port, and one thread that carries out runs.

A run goes from *approval* (labs are asked until all have decided, or the plan's days are over) to
*rounds* and ends as completed, incomplete or failed. Every step is on the disk before the next:
after a crash ``start`` goes on with the interrupted run at its next round.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import uvicorn
from flwr.app import ConfigRecord, Message, RecordDict

from cytofed.documents import Offer, Start, secure_cohort
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.labels import load_scheme
from cytofed.messages import BadMessage
from cytofed.plan import Plan
from cytofed.plan_check import check_plan
from cytofed.privacy.secagg import check_rules
from cytofed.privacy.terms import patients_of, with_delta
from cytofed.sealed_message import new_content
from cytofed.secure_round import public_bound
from cytofed.server import pki
from cytofed.server.asking import Pauses, ask, ask_each, content_of
from cytofed.server.checkpoints import Progress, Record, load_progress, save_progress
from cytofed.server.control import Command, serve_commands
from cytofed.server.directory import ServerDirectory
from cytofed.server.door import Door, raise_file_limit, serve_at
from cytofed.server.enrolment import enrol, health, leave, renew, route_of
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
from cytofed.server.rounds import Run, Scores, run_rounds, status
from cytofed.server.runs import ENDED, Phase, RunFolder
from cytofed.server.sealed_grid import SealedGrid, SealedRun
from cytofed.server.secure import SecureRun
from cytofed.start import GIVEN_FILE, read_start
from cytofed.start import Start as StartModel
from cytofed.strategies import make_strategy

_OFFER_ANSWER_S = 120.0
"""a lab that has approved reads its images before it answers"""
_RESULT_ANSWER_S = 120.0
_MOST_RESULT_PAUSE_S = 3600.0
"""between two tries to give a result to a lab that does not take it"""
_SLOWER, _SLOWEST = 1.3, 12.0
"""Each question for a decision comes later than the one before, up to 12 times ``offer_every_s``:
people take hours, and each answer is a record in the lab's log."""
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
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._watch = _Log()
        self._pauses = Pauses(self._settings.offer_every_s, _MOST_RESULT_PAUSE_S)
        """of results that a lab does not take; each refusal is a record in its log, for ever"""
        self._refresh()

    def serve(self) -> None:
        """Open the port and the control socket, go on with interrupted runs; blocks."""
        self._directory.renew_own_certificate()
        gc.freeze()  # what is imported stays: collections look at the rest alone
        sockets = self._door.listen(self._settings.listen, self._settings.port)
        runs = threading.Thread(target=self._carry_out_all, daemon=True, name="runs")
        with serve_commands(self._directory.socket, self._answer):
            server = self._server()
            runs.start()
            try:
                asyncio.run(server.serve(sockets))
            finally:
                self._end()
                runs.join(timeout=30)

    def _end(self) -> None:
        """Have every wait end, the labs' and the run's; what is under way can be gone on with."""
        self._ending.set()
        self._wake.set()
        self._fleet.close()

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
                HEALTH: health,
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
            folder = self._queue(command.plan())
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
            self._wake.set()
            return {}
        raise InputError(f"unknown command {command.name!r}")

    def _queue(self, plan: Plan) -> RunFolder:
        check_plan(plan)
        if plan.privacy.unit != "none" and plan.privacy.declared_patients is None:
            raise InputError(
                "privacy.declared_patients is not set: a deployment does not count patients",
                hint="set it to one number, or to a map of lab: number",
            )
        roster = self._directory.roster()
        if len(roster.members) < plan.cohort.min_labs:
            raise InputError(
                f"the plan asks for {plan.cohort.min_labs} labs, {len(roster.members)} are enrolled"
            )
        if patients := patients_of(plan, len(roster.members)):
            plan = with_delta(plan, patients)
        folder = RunFolder.create(self._directory.runs, plan, roster, self._identity)
        self._wake.set()
        return folder

    def _status(self) -> Mapping[str, Any]:
        roster = self._directory.roster()
        labs = []
        current = next((f for f in RunFolder.all(self._directory.runs) if _open(f)), None)
        decided: dict[str, str] = {}
        if current is not None:
            offer = current.offer(self._identity)
            decided = {lab: d.verdict for lab, (d, _) in current.decisions(offer).items()}
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
            "labs": labs,
            "gone": [
                {"lab": gone.lab, "why": gone.why, "at": gone.at.isoformat(timespec="seconds")}
                for gone in self._directory.gone()
            ],
            "runs": [describe_run(folder) for folder in RunFolder.all(self._directory.runs)],
        }

    # --- runs

    def _carry_out_all(self) -> None:
        while not self._ending.is_set():
            folders = RunFolder.all(self._directory.runs)
            waiting = [folder for folder in folders if _open(folder)]
            if waiting:
                self._carry_out(waiting[0])
                gc.collect()
            self._deliver_all()
            if not waiting:
                self._wake.wait(self._settings.offer_every_s)
            self._wake.clear()

    def _carry_out(self, folder: RunFolder) -> None:
        try:
            self._to_the_end(folder)
        except Stopped as stopped:
            if not self._ending.is_set():
                self._fail(folder, stopped.message)
        except CytofedError as error:
            _log.warning("run %s: %s", folder.name, error.message)
            self._fail(folder, error.message)
        except Exception as error:
            _log.exception("run %s", folder.name)
            self._fail(folder, f"internal error: {type(error).__name__}: {error}")

    def _fail(self, folder: RunFolder, reason: str) -> None:
        """End a run that left no model; what labs said no, or nothing, is named."""
        offer = folder.offer(self._identity)
        decisions = {lab: decision for lab, (decision, _) in folder.decisions(offer).items()}
        absent = {}
        for member in offer.roster.members:
            decision = decisions.get(member.name)
            if decision is None:
                absent[member.name] = "did not decide"
            elif decision.verdict == "rejected":
                absent[member.name] = f"rejected the plan {decision.reason}".strip()
        summary = failed_summary(offer, reason, absent)
        folder.write_summary(summary)
        folder.end("failed", reason=reason, absent=absent)

    def _to_the_end(self, folder: RunFolder) -> None:
        offer = folder.offer(self._identity)
        start = self._start(folder, offer)
        plan = offer.plan
        model = _start_model(folder, trained=False).bare
        strategy = make_strategy(plan.strategy)
        size = model.manifest.size
        reply_bytes = 8 * size * len(strategy.lab.up) + _SPARE_BYTES
        sealed = self._sealed(offer, start)
        run = self._run(folder, offer, start, sealed, model)
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

        reason = ""
        classes = len(run.scheme.codes)
        try:
            run_rounds(
                grid,
                run,
                latest,  # and no other name: a state is as large as the model
                checkpoint=checkpoint,
                watch=self._watch,
                on_scores=lambda number, scores: keep_scores(folder, number, scores),
                known_scores=read_scores(folder, latest.round, classes),
            )
        except Stopped as stopped:
            if self._ending.is_set():
                raise
            reason = stopped.message
        scores = read_scores(folder, latest.round, classes) or Scores()
        summary = write_results(
            folder, run, offer, latest, scores, _start_model(folder, trained=False)
        )
        write_report(folder)
        ended = cast(Phase, status(run, latest))
        folder.end(ended, reason=reason, absent=_absent(latest.records))
        _log.info("run %s: %s, weights %s", folder.name, ended, summary["weights_sha256"])

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

    def _start(self, folder: RunFolder, offer: Offer) -> Start:
        """The cohort: as it was fixed, else from the labs' decisions, which are waited for."""
        file = folder.private / "start"
        if file.is_file():
            return Start.verified(file.read_bytes(), self._identity.public, offer)
        self._await_decisions(folder, offer)
        gc.collect()
        approved = {
            lab: document
            for lab, (decision, document) in folder.decisions(offer).items()
            if decision.verdict == "approved" and lab in self._fleet.nodes
        }
        plan = offer.plan
        need = max(plan.cohort.min_labs, make_strategy(plan.strategy).min_updates)
        if len(approved) < need:
            raise InputError(f"{len(approved)} labs approved the plan, {need} are needed")
        settings = plan.secure_aggregation
        if settings.enabled:
            check_rules(len(approved), threshold=settings.threshold, min_cohort=settings.min_cohort)
        start = Start(folder.name, plan.sha256, offer.roster.sha256, approved)
        _make_start_model(folder)
        folder.fix_cohort(start.signed(self._identity), start.labs)
        return start

    def _await_decisions(self, folder: RunFolder, offer: Offer) -> None:
        """Ask every lab of the roster until all have decided, or the plan's days are over.

        Errors: Stopped.
        """
        queued = datetime.fromisoformat(folder.state().queued_at)
        until = queued + timedelta(days=offer.plan.cohort.approval_days)
        record = ConfigRecord({"document": (folder.private / "offer").read_bytes()})
        content = RecordDict({"offer": record})
        grid = self._fleet.grid(wait_s=1.0, reply_bytes=_SPARE_BYTES, stopped=folder.stop_reason)
        pause_s = self._settings.offer_every_s
        while True:
            nodes = self._fleet.nodes
            decided = folder.decisions(offer)
            names = [member.name for member in offer.roster.members]
            undecided = [lab for lab in names if lab in nodes and lab not in decided]
            if not undecided or datetime.now(UTC) > until:
                return
            online = [
                (lab, nodes[lab], content) for lab in undecided if self._fleet.presence(lab).online
            ]
            for lab, reply in ask_each(grid, online, "query.offer", 0, timeout_s=_OFFER_ANSWER_S):
                self._note_decision(folder, offer, lab, reply)
            if why := folder.stop_reason():
                raise Stopped(why)
            if self._ending.is_set():
                raise Stopped("the coordinator stops")
            if any(lab not in folder.decisions(offer) for lab in undecided):
                self._deliver_all()  # people may take days to decide
                self._ending.wait(pause_s)
                pause_s = min(pause_s * _SLOWER, self._settings.offer_every_s * _SLOWEST)

    def _note_decision(
        self, folder: RunFolder, offer: Offer, lab: str, reply: Message | None
    ) -> None:
        try:
            answer = content_of(reply).content.get("answer")
            document = answer.get("decision") if isinstance(answer, ConfigRecord) else None
            if isinstance(document, bytes) and document:
                decision = folder.decide(offer, lab, document)
                _log.info("run %s: %s %s the plan", folder.name, lab, decision.verdict)
        except (BadMessage, VerificationError) as error:
            _log.warning("run %s: answer of %s to the offer: %s", folder.name, lab, error.message)

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

    def _run(
        self, folder: RunFolder, offer: Offer, start: Start, sealed: SealedRun, model: StartModel
    ) -> Run:
        plan, size = offer.plan, model.manifest.size
        strategy = make_strategy(plan.strategy)
        secure = None
        if plan.secure_aggregation.enabled:
            decisions = folder.decisions(offer)
            bounds = [float(decisions[lab][0].max_weight) for lab in start.labs]
            secure = SecureRun(
                cohort=secure_cohort(start, offer, self._identity.public),
                identity=self._identity,
                plan=plan,
                strategy=strategy,
                size=size,
                max_weight=public_bound(bounds),
                nodes=sealed.nodes,
                counter_file=folder.private / "counter.json",
            )
        scheme = load_scheme(plan.labels.scheme)
        return Run(
            start.run,
            plan,
            strategy,
            scheme,
            sealed.nodes,
            size,
            secure,
            release=model.released,
        )

    def _deliver_all(self) -> None:
        """Send results that labs do not have yet; trouble with one is no trouble of other runs."""
        for folder in RunFolder.all(self._directory.runs):
            try:
                self._deliver(folder)
            except (CytofedError, OSError) as error:
                _log.warning("run %s: its result cannot be sent: %s", folder.name, error)

    def _deliver(self, folder: RunFolder) -> None:
        """Send the result to the labs of the cohort that are there and do not have it yet."""
        state = folder.state()
        missing = [
            lab
            for lab in state.cohort
            if not folder.delivered(lab)
            and self._fleet.presence(lab).online
            and self._pauses.over((folder.name, lab))
        ]
        if state.phase not in ENDED or not missing:
            return
        offer = folder.offer(self._identity)
        file = folder.private / "start"
        start = Start.verified(file.read_bytes(), self._identity.public, offer)
        sealed = self._sealed(offer, start)
        sealed = replace(sealed, nodes={lab: sealed.nodes[lab] for lab in missing})
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
        except Stopped:
            return
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


def wait_for(folder: RunFolder, *, poll_s: float = 0.3) -> dict[str, Any]:
    """The summary of a run, once it has ended."""
    while folder.state().phase not in ENDED:
        time.sleep(poll_s)
    return folder.summary() or {}


def _open(folder: RunFolder) -> bool:
    return folder.state().phase not in ENDED


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
