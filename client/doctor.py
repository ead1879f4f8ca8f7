"""``cytofed client check``: is this lab ready, and if not, what is to be done?

Each check gives findings, one line each: ok, warn or fail, what was found, and the way out. A check
never raises for what it finds, and one that fails hides no other. The network checks open
connections to the coordinator (or the lab's proxy) and to nothing else.
"""

from __future__ import annotations

import base64
import email.utils
import os
import platform
import shutil
import socket
import ssl
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from cytofed.client.egress import check_against_ledger, verify
from cytofed.client.policy import ledger_federation, open_ledger
from cytofed.client.settings import Settings
from cytofed.errors import CytofedError, InputError
from cytofed.labels import load_map, load_scheme
from cytofed.privacy.accounting import shown
from cytofed.privacy.identity import PublicIdentity

State = Literal["ok", "warn", "fail"]

MIN_FREE_BYTES = 1 << 30
LOW_FREE_BYTES = 5 << 30
CLOCK_WARN_S = 30.0
CLOCK_FAIL_S = 240.0
"""requests are signed with the time and refused beyond 300 s"""
CERTIFICATE_WARN_DAYS = 30


@dataclass(frozen=True)
class Finding:
    """One line of the check. ``way_out``: what to do; empty where nothing is to be done."""

    name: str
    state: State
    detail: str
    way_out: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Coordinator:
    """Where the lab connects to, and with what. Paths are of PEM files."""

    host: str
    port: int
    ca: Path
    certificate: Path
    key: Path
    timeout_s: float = 10.0
    proxy: str | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Handshake:
    """A completed TLS handshake and the answer to one question. ``server_time`` None: not told."""

    tls: str
    cipher: str
    expires: datetime
    status: int
    server_time: float | None


@dataclass(frozen=True)
class Files:
    """The files of a lab's directory that are checked. ``secrets`` must be readable by no other."""

    directory: Path
    secrets: Sequence[Path]
    egress: Path


def examine(
    settings: Settings,
    files: Files,
    *,
    own: PublicIdentity,
    federation: str,
    coordinator: Coordinator,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """All checks, in the order in which they should be mended."""
    return [
        *check_images(settings, progress=progress),
        *check_disk(files.directory),
        *check_secrets(files.directory, files.secrets),
        *check_computing(),
        *check_budget(settings),
        *check_egress(settings, files.egress, own=own, federation=federation),
        *check_certificate(coordinator.certificate),
        *check_network(coordinator),
    ]


def passed(findings: Sequence[Finding]) -> bool:
    """Nothing failed; warnings are allowed."""
    return all(finding.state != "fail" for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """``cytofed client check --json``."""
    return {"passed": passed(findings), "findings": [f.to_json() for f in findings]}


# --- this machine


def check_images(
    settings: Settings, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[Finding]:
    """Every image is read once (see ``cytofed data check`` for all of the report)."""
    from cytofed.client.check import check_data
    from cytofed.client.reader import DEFAULT_SCHEME, patient_columns

    more = f"cytofed data check {settings.data}"
    try:
        label_map = None if settings.labels is None else load_map(settings.labels)
        scheme = load_scheme(DEFAULT_SCHEME if label_map is None else label_map.scheme)
        found = check_data(settings.data, scheme, label_map, settings.patients, progress=progress)
    except CytofedError as error:
        yield Finding("data", "fail", error.message, error.hint or more)
        return
    counts = f"{found.images} usable images of {len(found.classes)} classes"
    if found.patients is not None:
        counts += f", {found.patients.count} patients"
    yield Finding("data", "ok" if found.images else "fail", counts, "" if found.images else more)
    if found.quarantined:
        kinds = Counter(problem.kind for problem in found.quarantined)
        detail = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        yield Finding("data, left out", "warn", detail, more)
    if found.mislabelled_duplicates:
        detail = f"{len(found.mislabelled_duplicates)} groups of duplicates with different labels"
        yield Finding("data, labels", "warn", detail, more)
    if found.identifiers:
        where = ", ".join(item.where for item in found.identifiers[:3])
        detail = f"something like an identifier in {where}; nothing of it leaves"
        yield Finding("data, identifiers", "warn", detail, f"better still, remove it: {more}")
    yield from _check_alone(settings, found.label_map, found.images)
    declared = settings.patients_declared
    columns = () if settings.patients else patient_columns(settings.data)
    if columns:
        detail = f'column "{columns[0]}" seems to name the patients, and patients is not set'
        way_out = f"set patients: column:{columns[0]} in client.yaml, or none where it does not"
        yield Finding("patients", "fail", detail, way_out)
    elif found.patients is None:
        detail = "not known who is who: plans with patient-level privacy are refused"
        yield Finding("patients", "warn", detail, "set patients in client.yaml")
    elif declared is None:
        detail = "no public number of patients is declared: private plans are refused"
        yield Finding("patients", "warn", detail, "set patients_declared in client.yaml, rounded")
    elif not 0.5 <= declared / max(found.patients.count, 1) <= 2:
        detail = f"{declared} declared, {found.patients.count} found"
        way_out = "correct patients_declared in client.yaml and tell the coordinator"
        yield Finding("patients", "warn", detail, way_out)
    else:
        yield Finding("patients", "ok", f"{declared} declared")


def _check_alone(settings: Settings, fits: str, images: int) -> Iterator[Finding]:
    """What plans with differential privacy ask of the labels: each patient's stand alone."""
    from cytofed.client.reader import list_cells

    if settings.labels is None:
        detail = "the label map is found by itself: private plans are refused"
        yield Finding("label map", "warn", detail, f"set labels: {fits} in client.yaml")
        return
    label_map = load_map(settings.labels)
    scheme, whose = load_scheme(label_map.scheme), settings.patients
    try:
        usual, alone = (
            list_cells(settings.data, scheme, label_map=label_map, patients=whose, alone=alone)
            for alone in (False, True)
        )
    except CytofedError as error:
        yield Finding("data, private plans", "fail", error.message, error.hint)
        return
    lost = set(usual.paths) - set(alone.paths)
    if lost:
        detail = f"{len(lost)} of {images} images are left out of private plans, as {min(lost)}"
        way_out = "write paths into the CSV as they are below its folder, one line a row"
        yield Finding("data, private plans", "warn", detail, way_out)


def check_disk(directory: Path) -> Iterator[Finding]:
    """Outbox and cache need room; a full disk stops a round, and nothing worse."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        yield Finding("disk", "fail", f"{directory}: {error.strerror}", "create it, or join again")
        return
    detail = f"{free / 1e9:.1f} GB free in {directory}"
    if not os.access(directory, os.W_OK):
        yield Finding("disk", "fail", f"{directory} cannot be written", "check its owner and mode")
    elif free < MIN_FREE_BYTES:
        yield Finding("disk", "fail", detail, "free some space: a round needs up to 1 GB")
    elif free < LOW_FREE_BYTES:
        yield Finding("disk", "warn", detail, "free some space before it runs out")
    else:
        yield Finding("disk", "ok", detail)


def check_secrets(directory: Path, secrets: Sequence[Path]) -> Iterator[Finding]:
    """Key files exist, are readable here and by nobody else."""
    wrong = False
    if directory.is_dir() and directory.stat().st_mode & 0o022:
        wrong = True
        shown_mode = f"{directory.stat().st_mode & 0o777:03o}"
        yield Finding(
            "keys",
            "fail",
            f"{directory} can be written by others ({shown_mode})",
            f"chmod 700 {directory}",
        )
    for path in secrets:
        try:
            mode = path.stat().st_mode & 0o777
            path.open("rb").close()
        except OSError as error:
            wrong = True
            yield Finding(
                "keys",
                "fail",
                f"{path.name}: {error.strerror}",
                "run as the user who joined; a lost key needs a new invite",
            )
            continue
        if mode & 0o077:
            wrong = True
            detail = f"{path.name} can be read by others ({mode:03o})"
            yield Finding("keys", "fail", detail, f"chmod 600 {path}")
    if not wrong:
        yield Finding("keys", "ok", f"{len(secrets)} key files, for their owner only")


def check_computing() -> Iterator[Finding]:
    """What trains here. Imports torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        way_out = "install PyTorch for this machine: https://pytorch.org/get-started/locally/"
        yield Finding("computing", "fail", f"torch does not load: {error}", way_out)
        return
    where = f"torch {torch.__version__} on {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        yield Finding("computing", "ok", f"{where}, {torch.cuda.get_device_name(0)}")
    elif torch.backends.mps.is_available():
        yield Finding("computing", "ok", f"{where}, Apple GPU")
    else:
        yield Finding("computing", "ok", f"{where}, no GPU: large models take long")


def check_budget(settings: Settings) -> Iterator[Finding]:
    """The privacy ledger opens, holds together, and has something left."""
    try:
        with open_ledger(settings) as book:
            balance, unit = book.balance(), book.unit
    except CytofedError as error:
        yield Finding("budget", "fail", error.message, error.hint)
        return
    spent, total = balance.spent, balance.total
    limit = settings.limits.max_epsilon
    if balance.unbounded is not None:
        detail = f"pool {settings.pool}: {balance.unbounded}, by a use without differential privacy"
        if limit is None:
            yield Finding("budget", "ok", f"{detail}; no limit")
        else:
            way_out = "name another pool for other patients, or remove limits.max_epsilon"
            yield Finding(
                "budget", "warn", f"{detail}: the limit of {limit:g} cannot hold", way_out
            )
        return
    used = (
        f"pool {settings.pool}: epsilon {shown(spent.epsilon)} spent, {shown(total.epsilon)} with "
        f"what is held, at delta {spent.delta:g}, per {unit}, by {total.accountant}"
    )
    if limit is None:
        yield Finding("budget", "ok", f"{used}; no limit")
    elif total.epsilon >= limit:
        way_out = "wait for plans to end, or raise limits.max_epsilon in client.yaml"
        yield Finding("budget", "warn", f"{used}; the limit of {limit:g} is reached", way_out)
    else:
        yield Finding("budget", "ok", f"{used}; limit {limit:g}")


def check_egress(
    settings: Settings, path: Path, *, own: PublicIdentity, federation: str
) -> Iterator[Finding]:
    """The egress log verifies, and agrees with the ledger."""
    try:
        report = verify(path, own)
        with open_ledger(settings) as book:
            name = ledger_federation(federation, own.name)
            check_against_ledger(report, book, federation=name)
    except CytofedError as error:
        yield Finding("egress log", "fail", error.message, error.hint)
        return
    detail = f"{len(report.records)} records verified, {len(report.messages)} messages left"
    yield Finding("egress log", "ok", detail)


def check_certificate(path: Path, *, now: datetime | None = None) -> Iterator[Finding]:
    """The lab's own certificate is valid for a while yet."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        way_out = "ask the coordinator for an invite and join again"
        yield Finding("certificate", "fail", f"{path.name} cannot be read: {error}", way_out)
        return
    days = (certificate.not_valid_after_utc - (now or datetime.now(UTC))).days
    detail = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}, {days} days"
    if days < 0:
        way_out = "ask the coordinator for an invite and join again"
        yield Finding("certificate", "fail", f"expired: {detail}", way_out)
    elif days < CERTIFICATE_WARN_DAYS:
        way_out = "leave `cytofed client start` running: it is renewed there"
        yield Finding("certificate", "warn", detail, way_out)
    else:
        yield Finding("certificate", "ok", detail)


# --- the way to the coordinator


def check_network(coordinator: Coordinator) -> Iterator[Finding]:
    """DNS, TCP, proxy, TLS with certificate, clock. Stops where the next step cannot be tried."""
    at = coordinator
    if at.proxy is None:
        named = check_dns(at.host)
        yield named
        if named.state == "fail":
            return
    reached = check_tcp(at)
    yield reached
    if reached.state == "fail":
        return
    try:
        hands = handshake(at)
    except (OSError, CytofedError) as error:
        yield _tls_failure(at, error)
        return
    yield Finding("TLS", "ok", f"{hands.tls} {hands.cipher}, with this lab's certificate")
    days = (hands.expires - datetime.now(UTC)).days
    if days < CERTIFICATE_WARN_DAYS:
        detail = f"the coordinator's certificate ends in {days} days"
        yield Finding("coordinator", "warn", detail, "tell the coordinator")
    if hands.status != 200:
        detail = f"answers with HTTP {hands.status}"
        yield Finding("coordinator", "warn", detail, "is `cytofed server start` running?")
    yield check_clock(hands.server_time)


def check_dns(host: str) -> Finding:
    """The coordinator's name has an address."""
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        return Finding(
            "DNS",
            "fail",
            f"{host}: {error.strerror or error}",
            "ask your network team to resolve it, or set proxy in client.yaml",
        )
    return Finding("DNS", "ok", f"{host} is {', '.join(found[:3])}")


def check_tcp(at: Coordinator) -> Finding:
    """A connection to the coordinator opens, through the proxy where there is one."""
    name, port = ("proxy", str(at.port)) if at.proxy else ("TCP", str(at.port))
    try:
        connect(at).close()
    except InputError as error:
        return Finding(name, "fail", error.message, error.hint)
    except OSError as error:
        if at.proxy:
            proxy = urllib.parse.urlsplit(at.proxy)
            detail = f"{proxy.hostname}:{proxy.port}: {error.strerror or error}"
            return Finding(name, "fail", detail, "correct proxy in client.yaml")
        return Finding(
            name,
            "fail",
            f"{at.address}: {error.strerror or error}",
            f"ask for outbound TCP to {at.host} port {port}; nothing inbound is needed",
        )
    return Finding(name, "ok", f"{at.address} can be reached")


def connect(at: Coordinator) -> socket.socket:
    """A TCP connection to the coordinator, by HTTPS CONNECT where a proxy is set.

    Errors: OSError; InputError when the proxy says no.
    """
    if at.proxy is None:
        return socket.create_connection((at.host, at.port), timeout=at.timeout_s)
    proxy = urllib.parse.urlsplit(at.proxy)
    if proxy.hostname is None or proxy.port is None:
        raise InputError("proxy is not http://host:port")
    link = socket.create_connection((proxy.hostname, proxy.port), timeout=at.timeout_s)
    try:
        lines = [f"CONNECT {at.address} HTTP/1.1", f"Host: {at.address}"]
        if proxy.username is not None:
            user, password = map(urllib.parse.unquote, (proxy.username, proxy.password or ""))
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {token}")
        link.sendall("\r\n".join([*lines, "", ""]).encode())
        status = _head(link).split(b"\r\n", 1)[0].decode("latin-1")
        if not status.startswith("HTTP/1.") or " 200" not in status:
            raise InputError(
                f"the proxy {proxy.hostname}:{proxy.port} answers {status[:80]!r}",
                hint=f"ask for CONNECT to {at.address} to be allowed"
                + ("" if " 407" not in status else ", or set user:password@ in proxy"),
            )
    except BaseException:
        link.close()
        raise
    return link


def handshake(at: Coordinator) -> Handshake:
    """TLS with the coordinator's own CA and this lab's certificate, and one GET of /health.

    The answer is waited for: in TLS 1.3 a refused client certificate shows only after the
    handshake. Errors: OSError (ssl.SSLError among them), InputError from the proxy.
    """
    context = ssl.create_default_context(cafile=str(at.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(at.certificate, at.key)
    with connect(at) as link, context.wrap_socket(link, server_hostname=at.host) as tls:
        request = f"GET /health HTTP/1.1\r\nHost: {at.address}\r\nConnection: close\r\n\r\n"
        tls.sendall(request.encode())
        head = _head(tls).decode("latin-1").split("\r\n")
        der = tls.getpeercert(binary_form=True)
        cipher = tls.cipher()
        version = tls.version()
    if der is None or not head[0].startswith("HTTP/"):
        raise ssl.SSLError("the connection was closed: is this lab's certificate known there?")
    expires = x509.load_der_x509_certificate(der).not_valid_after_utc
    dates = [line[5:].strip() for line in head if line.lower().startswith("date:")]
    return Handshake(
        tls=version or "",
        cipher=cipher[0] if cipher else "",
        expires=expires,
        status=int(head[0].split()[1]),
        server_time=_time(dates[0]) if dates else None,
    )


def check_clock(server_time: float | None, *, now: float | None = None) -> Finding:
    """Requests are signed with the time: a clock that is off is refused, and looks like silence.

    ``server_time``: seconds since 1970 by the coordinator's clock.
    """
    if server_time is None:
        return Finding("clock", "warn", "the coordinator tells no time", "check NTP by hand")
    off_s = (time.time() if now is None else now) - server_time
    if abs(off_s) < CLOCK_WARN_S:
        return Finding("clock", "ok", "agrees with the coordinator's")
    detail = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the coordinator's"
    state: State = "warn" if abs(off_s) < CLOCK_FAIL_S else "fail"
    return Finding("clock", state, detail, "set it by NTP: timedatectl set-ntp true")


def _tls_failure(at: Coordinator, error: Exception) -> Finding:
    """Says who answers instead of the coordinator, where somebody does."""
    if isinstance(error, InputError):
        return Finding("TLS", "fail", error.message, error.hint)
    if isinstance(error, ssl.SSLCertVerificationError):
        message = error.verify_message
        if "expired" in message or "not yet valid" in message:
            way_out = "compare the clocks; if this one is right, tell the coordinator"
            return Finding("TLS", "fail", f"{at.address}: {message}", way_out)
        if "mismatch" in message or "not valid for" in message:
            way_out = "the coordinator's --address must have the name that labs use"
            return Finding("TLS", "fail", f"{at.address}: {message}", way_out)
        return Finding(
            "TLS",
            "fail",
            f"{at.address} shows a certificate of {_who_answers(at)}, not of this federation",
            f"exempt {at.address} from TLS inspection: it must reach the coordinator unopened",
        )
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return Finding(
        "TLS",
        "fail",
        f"{at.address}: {reason}",
        "ask the coordinator whether this lab is revoked; if not, ask for a new invite",
    )


def _who_answers(at: Coordinator) -> str:
    """The issuer of the certificate that is shown; nothing is sent to whoever it is."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with connect(at) as link, context.wrap_socket(link, server_hostname=at.host) as tls:
            der = tls.getpeercert(binary_form=True)
        assert der is not None
        return repr(x509.load_der_x509_certificate(der).issuer.rfc4514_string()[:120])
    except (OSError, CytofedError, ValueError):
        return "another authority"


def _head(link: socket.socket, limit: int = 16_384) -> bytes:
    """The head of an HTTP answer, as much of it as comes."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) < limit:
        piece = link.recv(4096)
        if not piece:
            break
        data += piece
    return data.split(b"\r\n\r\n", 1)[0]


def _time(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return None
