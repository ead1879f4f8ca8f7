"""The coordinator's directory: keys, settings, the roster, invites and runs. One folder, one owner.

::

    server.yaml                    settings, commented
    ca.pem ca.key                  the federation's own authority
    server.pem server.key          TLS
    identity.key                   signatures and sealing
    labs/NAME.cbor NAME.pem        what a lab enrolled with; NAME.head: its ledger's, last seen
    revoked/ left/                 keys of labs that were revoked, or left: none comes back
    epoch                          number of the last change of the roster
    invites/NAME.json              hash of a token and when it ends
    runs/RUN/                      see cytofed.server.runs
    spool/                         sealed messages on their way; emptied at the start
    control.sock                   where `run`, `status`, `revoke` and `stop-run` reach `start`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cytofed.documents import COORDINATOR, Invite, Member, Roster
from cytofed.errors import CytofedError, InputError, RefusedError
from cytofed.files import write_atomically
from cytofed.privacy.identity import Identity
from cytofed.privacy.wire import decode, encode
from cytofed.sections import read_tree, unknown_key
from cytofed.server import pki
from cytofed.server.pki import Issued
from cytofed.words import reason_of

_LAB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STAMP = "%Y%m%dT%H%M%S%f"


@dataclass(frozen=True)
class ServerSettings:
    """server.yaml. Times in seconds where the name says so."""

    name: str
    address: str
    listen: str = "0.0.0.0"
    invite_days: float = 14.0
    offer_every_s: float = 5.0
    """how soon labs that have not decided about a plan are asked again; later less often"""
    poll_s: float = 20.0
    """how long a lab's request for messages is kept open while there is none"""
    body_timeout_s: float = 60.0
    enrolments_per_minute: int = 30
    """that may fail, of each address"""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


_SERVER_YAML = """\
# Settings of this coordinator. After a change: restart `cytofed server start`.

name: {name}                  # of the federation, as labs see it
address: {address}            # HOST:PORT under which labs reach this machine
listen: {listen}              # address of this machine to listen on; 0.0.0.0: all of them

invite_days: 14               # how long an invite is good
offer_every_s: 5              # when undecided labs are asked again; later up to 12 times as late
poll_s: 20                    # how long a lab waits for work in one request
body_timeout_s: 60            # how long a request may take to arrive
enrolments_per_minute: 30     # that may fail, of each address
"""


@dataclass(frozen=True)
class Gone:
    """A lab that is not in the roster any more. ``why``: ``left`` or ``revoked``."""

    lab: str
    why: str
    at: datetime


@dataclass(frozen=True)
class ServerDirectory:
    """A coordinator's directory that exists."""

    root: Path

    @staticmethod
    def create(root: Path, *, name: str, address: str) -> ServerDirectory:
        """Make keys, certificates and settings. Errors: InputError for a bad name or address, or
        a folder that is not empty."""
        if not _LAB.fullmatch(name):
            raise InputError(
                f"{name!r} is not a name for a federation",
                hint="use up to 64 letters, digits, dots, dashes and underscores",
            )
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(
                f"{address!r} is not an address", hint="HOST:PORT, such as fed.example.org:8443"
            )
        if root.exists() and any(root.iterdir()):
            raise InputError(f"{root} is not empty", hint="choose another directory")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)
        directory = ServerDirectory(root)
        authority = pki.new_authority(name)
        server = pki.new_server_certificate(authority, _hosts(host.strip("[]")))
        for file, data in {
            "ca.key": authority.key,
            "server.key": server.key,
            "identity.key": Identity.generate(COORDINATOR).to_bytes(),
        }.items():
            write_atomically(root / file, data, mode=0o600)
        write_atomically(root / "ca.pem", authority.certificate)
        write_atomically(root / "server.pem", server.certificate)
        for folder in ("labs", "revoked", "left", "invites", "runs"):
            (root / folder).mkdir(mode=0o700)
        listen = "127.0.0.1" if host in ("127.0.0.1", "localhost") else "0.0.0.0"
        text = _SERVER_YAML.format(name=name, address=address, listen=listen)
        write_atomically(root / "server.yaml", text)  # last: says that the directory is whole
        return directory

    @staticmethod
    def open(root: Path) -> ServerDirectory:
        """Errors: InputError where ``root`` is no coordinator's directory."""
        if not (root / "server.yaml").is_file():
            raise InputError(
                f"{root} is not a coordinator's directory",
                hint=f"make one: cytofed server init {root} --name NAME --address HOST:PORT",
            )
        return ServerDirectory(root)

    # --- keys and settings

    def settings(self) -> ServerSettings:
        """server.yaml. Errors: InputError for an unknown key or a wrong type."""
        path = self.root / "server.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        tree = read_tree(text, str(path))
        known = {item.name: item.type for item in fields(ServerSettings)}
        values: dict[str, Any] = {}
        for key, value in tree.items():
            if key not in known:
                raise unknown_key(str(key), str(key), list(known), str(path))
            kind = {"str": str, "int": int, "float": float}[str(known[key])]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if kind is str and isinstance(value, str):
                values[key] = value
            elif kind is not str and number and value > 0:
                values[key] = kind(value)
            else:
                raise InputError(f"{path}: {key} is {value!r:.60}, expected {_EXPECTED[kind]}")
        missing = [name for name in ("name", "address") if name not in values]
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing")
        return ServerSettings(**values)

    def identity(self) -> Identity:
        return Identity.from_bytes((self.root / "identity.key").read_bytes())

    def authority(self) -> Issued:
        return Issued((self.root / "ca.pem").read_bytes(), (self.root / "ca.key").read_bytes())

    def renew_own_certificate(self) -> None:
        """Renew the server's certificate where it ends soon."""
        file = self.root / "server.pem"
        if pki.days_left(file.read_bytes()) < pki.WARN_DAYS:
            renewed = pki.renewed_server_certificate(self.authority(), file.read_bytes())
            write_atomically(file, renewed)

    @property
    def socket(self) -> Path:
        return self.root / "control.sock"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    # --- roster

    def roster(self) -> Roster:
        """The labs that are enrolled now."""
        members = []
        for file in sorted((self.root / "labs").glob("*.cbor")):
            members.append(_member(file))
        members.sort(key=lambda member: member.name)
        return Roster(self.settings().name, self._epoch(), tuple(members))

    def certificate(self, lab: str) -> bytes:
        return (self.root / "labs" / f"{lab}.pem").read_bytes()

    def enrol(self, member: Member, certificate_pem: bytes) -> Roster:
        """Add a lab. Errors: RefusedError for a name that is taken or a key that was revoked."""
        labs = self.root / "labs"
        if (labs / f"{member.name}.cbor").exists():
            raise RefusedError(f"lab {member.name} is already enrolled")
        used = [_member(file) for file in self.root.glob("*/*.cbor")]
        if any(_shares_key(member, other) for other in used):
            raise RefusedError("this key is in use, or was revoked", hint="make new keys")
        write_atomically(labs / f"{member.name}.pem", certificate_pem)
        write_atomically(labs / f"{member.name}.cbor", encode(member.to_value()), mode=0o600)
        self._raise_epoch()
        return self.roster()

    def answered(self, lab: str) -> str:
        """The hash of the request with which a lab enrolled; empty where none did."""
        file = self.root / "labs" / f"{lab}.request"
        return file.read_text() if _LAB.fullmatch(lab) and file.is_file() else ""

    def note_answered(self, lab: str, digest: str) -> None:
        write_atomically(self.root / "labs" / f"{lab}.request", digest)

    def revoke(self, lab: str) -> Roster:
        """Take a lab off the roster for good; its keys can't come back."""
        return self._drop(lab, "revoked")

    def leave(self, lab: str) -> Roster:
        """As ``revoke``, at the lab's own wish."""
        return self._drop(lab, "left")

    def gone(self) -> tuple[Gone, ...]:
        """Labs that left or were revoked, the latest last."""
        found = []
        for why in ("left", "revoked"):
            for file in (self.root / why).glob("*.cbor"):
                lab, _, stamp = file.stem.rpartition(".")
                with contextlib.suppress(ValueError):  # a copy that somebody made by hand
                    at = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)
                    found.append(Gone(lab, why, at))
        return tuple(sorted(found, key=lambda gone: gone.at))

    def renew(self, lab: str, certificate_pem: bytes) -> None:
        """Keep a lab's new certificate; it is of the key that is in the roster."""
        write_atomically(self.root / "labs" / f"{lab}.pem", certificate_pem)

    def _drop(self, lab: str, why: str) -> Roster:
        file = self.root / "labs" / f"{lab}.cbor"
        if not file.is_file():
            raise InputError(f"no lab {lab!r} in the roster", hint="see `cytofed server status`")
        (self.root / why).mkdir(mode=0o700, exist_ok=True)
        file.rename(self.root / why / f"{lab}.{datetime.now(UTC).strftime(_STAMP)}.cbor")
        (self.root / "labs" / f"{lab}.pem").unlink(missing_ok=True)
        (self.root / "labs" / f"{lab}.request").unlink(missing_ok=True)
        (self.root / "labs" / f"{lab}.head").unlink(missing_ok=True)
        (self.root / "invites" / f"{lab}.json").unlink(missing_ok=True)
        self._raise_epoch()
        return self.roster()

    def _epoch(self) -> int:
        file = self.root / "epoch"
        return int(file.read_text()) if file.is_file() else 0

    def _raise_epoch(self) -> None:
        write_atomically(self.root / "epoch", str(self._epoch() + 1))

    def seen_head(self, lab: str) -> bytes:
        """The last head of a lab's privacy ledger that it told, as it signed it; empty where it
        told none."""
        file = self.root / "labs" / f"{lab}.head"
        return file.read_bytes() if file.is_file() else b""

    def note_head(self, lab: str, document: bytes) -> None:
        if document != self.seen_head(lab):
            write_atomically(self.root / "labs" / f"{lab}.head", document)

    # --- invites

    def invite(self, lab: str) -> Invite:
        """A one-time invite; an earlier one of the same lab is void from now on.

        Errors: InputError for a name that cannot be used or is taken.
        """
        if not _LAB.fullmatch(lab) or lab == COORDINATOR:
            raise InputError(
                f"{lab!r} is not a name for a lab",
                hint="use up to 64 letters, digits, dots, dashes and underscores",
            )
        if (self.root / "labs" / f"{lab}.cbor").exists():
            raise InputError(
                f"lab {lab} is already enrolled",
                hint=f"for new keys revoke it first: cytofed server revoke {self.root} {lab}",
            )
        settings = self.settings()
        token = secrets.token_urlsafe(32)
        expires = datetime.now(UTC) + timedelta(days=settings.invite_days)
        kept = {"token_sha256": _hash(token), "expires": expires.isoformat()}
        write_atomically(self.root / "invites" / f"{lab}.json", json.dumps(kept), mode=0o600)
        return Invite(
            federation=settings.name,
            address=settings.address,
            lab=lab,
            token=token,
            ca_pem=(self.root / "ca.pem").read_text(),
            fingerprint=self.identity().public.fingerprint,
            expires=expires,
        )

    def check_invite(self, lab: str, token: str) -> None:
        """Errors: RefusedError, with one text for all reasons, unless the invite is good."""
        file = self.root / "invites" / f"{lab}.json"
        refused = RefusedError(
            "this invite is not valid: used, expired, replaced or never made",
            hint="ask the coordinator for a new one",
        )
        if not _LAB.fullmatch(lab) or not file.is_file():
            raise refused
        kept = json.loads(file.read_text())
        if datetime.fromisoformat(kept["expires"]) < datetime.now(UTC):
            raise refused
        if not secrets.compare_digest(kept["token_sha256"], _hash(token)):
            raise refused

    def redeem(self, lab: str, token: str) -> None:
        """Use up an invite. Errors: as ``check_invite``."""
        self.check_invite(lab, token)
        (self.root / "invites" / f"{lab}.json").unlink()


_EXPECTED = {str: "text", int: "a whole number above 0", float: "a number above 0"}


def _hosts(host: str) -> tuple[str, ...]:
    """Loopback is known by both of its names."""
    if host in ("localhost", "127.0.0.1"):
        return ("localhost", "127.0.0.1")
    return (host,)


def _member(file: Path) -> Member:
    """Errors: CytofedError naming a file that is damaged: no lab is forgotten silently."""
    try:
        return Member.of(decode(file.read_bytes()))
    except (OSError, ValueError, CytofedError) as error:
        raise CytofedError(
            f"{file} cannot be read: {reason_of(error)}",
            hint="put it back from a backup; without one move it away and have the lab join anew",
        ) from None


def _shares_key(one: Member, other: Member) -> bool:
    keys = {other.node_key_sha256, other.identity.signing, other.identity.sealing}
    return bool(keys & {one.node_key_sha256, one.identity.signing, one.identity.sealing})


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
