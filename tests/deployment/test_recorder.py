"""What a recorder at the labs' HTTP transport sees is what their egress logs say, and no more.

The coordinator is a process; the three labs are daemons in threads of this one, so that the
recorder can sit below everything of theirs, between HTTP and TLS.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest

import cytofed.client.directory
import cytofed.client.fleet
from cytofed.cli import cli
from cytofed.client.daemon import Daemon
from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import EgressReport, verify
from cytofed.client.fleet import _ROUTINE
from cytofed.client.policy import Entry, open_ledger
from cytofed.documents import Invite
from cytofed.objects import enclosed, enclosed_in
from cytofed.plan import from_dict, to_dict
from cytofed.privacy.terms import terms_of
from cytofed.server.control import send_command

from .conftest import PATIENCE_S, Federation, deal, free_port, result_of

pytestmark = pytest.mark.timeout(1800)  # processes on a busy machine
LABS = ("lab-1", "lab-2", "lab-3")
PLAN: dict[str, Any] = {
    "labels": {"scale": {"size_px": 32}},
    "model": {"width": 8},
    "train": {"rounds": 2, "steps_per_round": 1, "batch": 8},
    "cohort": {"min_labs": 2, "wait_s": 300},
}
PRIVATE: dict[str, Any] = {
    **PLAN,
    "name": "private",
    "privacy": {"unit": "patient", "epsilon": 8, "declared_patients": 20},
    "secure_aggregation": {"enabled": True},
    "evaluation": {"sigma": 4.0},
}


@dataclass
class Recorder(httpx.BaseTransport):
    """Passes requests on and keeps what they say."""

    inner: httpx.BaseTransport
    sent: list[tuple[str, bytes]]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append((request.url.path, request.read()))
        return self.inner.handle_request(request)

    def close(self) -> None:
        self.inner.close()


@dataclass
class Recorded:
    """A finished federation: what each lab sent, and what its log says."""

    federation: Federation
    sent: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)

    def report(self, lab: str) -> EgressReport:
        directory = ClientDirectory.open(self.federation.root / lab)
        return verify(directory.egress, directory.identity().public)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Recorded]:
    """A private masked run, a plain one in which lab-3 refuses, and all labs leave."""
    root = tmp_path_factory.mktemp("recorded")
    deal(sample, root, LABS)
    federation = Federation(root, (), free_port())
    found = Recorded(federation, {lab: [] for lab in LABS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        original = cytofed.client.directory.http_client

        def recording(*args: Any, **kwargs: Any) -> httpx.Client:
            client = original(*args, **kwargs)
            # Connections are made in a lab's own thread.
            sent = found.sent[threading.current_thread().name]
            client._transport = Recorder(client._transport, sent)
            return client

        patch.setattr(cytofed.client.directory, "http_client", recording)
        patch.setattr(cytofed.client.fleet, "http_client", recording)
        try:
            federation.found()
            carry_out(federation)
            yield found
        finally:
            federation.kill_all()


def carry_out(federation: Federation) -> None:
    for lab in LABS:
        as_lab(lab, partial(join, federation, lab)).join(PATIENCE_S)
    directories = {lab: ClientDirectory.open(federation.root / lab) for lab in LABS}
    threads = [
        as_lab(lab, Daemon(directory, note=lambda _text: None).run)
        for lab, directory in directories.items()
    ]
    finish(federation, directories, PRIVATE)
    directories["lab-3"].pause()
    finish(federation, directories, {**PLAN, "name": "plain"})
    for directory in directories.values():
        directory.leave()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def as_lab(lab: str, work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, name=lab, daemon=True)
    thread.start()
    return thread


def join(federation: Federation, lab: str) -> None:
    root = federation.root
    invite = root / f"{lab}.invite"
    federation.run("c", "server", "invite", federation.coordinator, lab, "--out", invite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(root / "state" / lab))
        cytofed.client.directory.join(
            Invite.load(invite), root / lab, data=federation.data(lab),
            patients="name:_0*([0-9])", patients_declared=20,
        )  # fmt: skip


def offered(directory: ClientDirectory, run: str) -> list[Entry]:
    return [entry for entry in directory.plans().entries() if entry.run == run]


def finish(
    federation: Federation, directories: dict[str, ClientDirectory], plan: dict[str, Any]
) -> None:
    tree = to_dict(from_dict(plan))
    run = str(send_command(federation.coordinator / "control.sock", "run", plan=tree)["run"])
    for lab, directory in directories.items():
        [entry] = federation.until(partial(offered, directory, run), f"{lab} has the plan")
        settings = directory.settings()
        with open_ledger(settings) as book:
            directory.plans().approve(entry.sha256, settings, book)
    federation.summary(run)
    for lab, directory in directories.items():
        model = partial(result_of, directory, run)
        federation.until(model, f"{lab} has the model")


def objects_with(announcement: bytes) -> dict[str, bytes]:
    """The small objects of a reply, which leave with its announcement."""
    return enclosed_in(PushMessagesRequest.FromString(announcement))


@pytest.mark.parametrize("lab", LABS)
def test_every_object_that_left_is_one_of_a_logged_message(recorded: Recorded, lab: str) -> None:
    sent = set()
    for path, body in recorded.sent[lab]:
        if path.endswith("/push-object"):
            asked = PushObjectRequest.FromString(body)
            assert hashlib.sha256(asked.object_content).hexdigest() == asked.object_id
            sent.add((asked.object_id, len(asked.object_content)))
        if path.endswith("/push-messages"):
            sent |= {(number, len(content)) for number, content in objects_with(body).items()}
    logged = {
        (number, size)
        for record in recorded.report(lab).messages
        for number, size in record.body["objects"].items()
    }
    assert sent == logged


@pytest.mark.parametrize("lab", LABS)
def test_documents_outside_of_runs_are_logged_to_the_byte(recorded: Recorded, lab: str) -> None:
    sent = [
        (len(body), hashlib.sha256(body).hexdigest())
        for path, body in recorded.sent[lab]
        if not path.startswith("/v1/fleet/")
    ]
    logged = [
        (record.body["nbytes"], record.body["sha256"])
        for record in recorded.report(lab).messages
        if record.body["type"] in ("enrolment", "renewal", "leave")
    ]
    assert sent == logged
    assert len(sent) == 2  # joined, left


@pytest.mark.parametrize("lab", LABS)
def test_routine_requests_are_counted_by_kind_and_size(recorded: Recorded, lab: str) -> None:
    sent: Counter[tuple[str, int]] = Counter()
    for path, body in recorded.sent[lab]:
        call = path.rpartition("/")[2]
        if path.startswith("/v1/fleet/") and call != "push-object":
            objects = objects_with(body) if call == "push-messages" else {}
            sent[_ROUTINE[call], len(body) - len(enclosed(objects.values()))] += 1
    report = recorded.report(lab)
    logged = {
        (kind, size): count
        for kind, sizes in report.routine.items()
        for size, count in sizes.items()
    }
    assert logged == dict(sent)
    assert report.routine_at_most == 0


@pytest.mark.parametrize("lab", LABS)
def test_no_request_has_the_name_of_an_image_or_a_patient_count(
    recorded: Recorded, lab: str
) -> None:
    names = [path.stem.encode() for path in recorded.federation.data(lab).rglob("*.jpg")]
    assert names
    for _, body in recorded.sent[lab]:
        assert not any(name in body for name in names)
    for record in recorded.report(lab).messages:
        if record.body["protection"]["unit"] == "patient":
            told = {f["name"]: f["value"] for f in record.body["fields"]}
            assert not {"images", "loss", "confusion"} & told.keys()
            assert told.get("train_s", 0) == 0


@pytest.mark.parametrize("lab", LABS)
def test_a_run_without_privacy_leaves_the_patients_unbounded_where_it_was_trained(
    recorded: Recorded, lab: str
) -> None:
    """The private run before it is the last that had a bound; lab-3 refused the other."""
    directory = ClientDirectory.open(recorded.federation.root / lab)
    with open_ledger(directory.settings()) as book:
        found = book.summary()
    runs = [event["run"] for event in found["events"] if event["mechanism"] == "non_private"]
    if lab == "lab-3":
        assert (found["unbounded"], runs) == (None, [])
        assert found["spent"]["epsilon"] > 0
        return
    plain = directory.plans().entries()[-1].run
    assert found["spent"]["epsilon"] is None
    assert found["unbounded"]["run"] == plain
    rounds = [event for event in found["events"] if event.get("run") == plain]
    assert {event["task"] for event in rounds} == {"train", "evaluate"}
    assert {event["state"] for event in rounds} == {"settled"}
    told = CliRunner().invoke(cli, ["client", "budget", str(directory.root)]).output
    assert f"spent  unbounded since {rounds[0]['at'][:10]}, run {plain}" in told


def test_private_answers_say_what_covers_them(recorded: Recorded) -> None:
    terms = terms_of(from_dict(PRIVATE))
    assert terms is not None
    assert terms.tally is not None
    for lab in LABS:
        covered = [
            record.body["protection"]
            for record in recorded.report(lab).messages
            if record.body["type"] == "masked"
        ]
        assert [(c["clip"], c["sigma"]) for c in covered] == [
            (terms.max_norm, terms.training.sigma),
            (terms.tally.max_norm, terms.tally.sigma),
        ] * 2
        epsilons = [c["epsilon"] for c in covered]
        assert epsilons == sorted(epsilons)
        assert epsilons[0] > 0


def test_refusals_are_in_the_log_with_their_reason(recorded: Recorded) -> None:
    refused = [r.body for r in recorded.report("lab-3").messages if r.body["type"] == "refusal"]
    assert refused
    assert all("paused by this lab" in json.dumps(body["fields"]) for body in refused)
