"""A coordinator's directory and labs that have enrolled there, without processes between them."""

from __future__ import annotations

from pathlib import Path

from cytofed.client import directory as lab_side
from cytofed.client.directory import ClientDirectory
from cytofed.client.egress import EgressLog
from cytofed.client.settings import fresh_yaml, load_settings
from cytofed.documents import Invite
from cytofed.files import write_atomically
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger
from cytofed.server.directory import ServerDirectory
from cytofed.server.enrolment import enrol


def coordinator(root: Path) -> ServerDirectory:
    return ServerDirectory.create(root / "coordinator", name="fed", address="localhost:9000")


def request_of(invite: Invite, home: Path) -> bytes:
    """The signed request of a lab with keys of its own; the very same at the next call."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "client.yaml").is_file():
        text = fresh_yaml(data=home, patients_declared=20, ledger=home / "ledger.sqlite")
        write_atomically(home / "client.yaml", text)
    write_atomically(home / "ca.pem", invite.ca_pem)
    return lab_side._request(home, invite, load_settings(home / "client.yaml"))


def join(server: ServerDirectory, lab: str, home: Path) -> ClientDirectory:
    """Enrol a lab as over the network, but for the network."""
    invite = server.invite(lab)
    request = request_of(invite, home)
    lab_side._keep_answer(home, invite, request, enrol(server, request))
    EgressLog.create(home / "egress.log", Identity.from_bytes((home / "identity.key").read_bytes()))
    Ledger.create(load_settings(home / "client.yaml").ledger)
    return ClientDirectory.open(home)
