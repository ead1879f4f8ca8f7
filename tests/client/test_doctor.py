"""The check names what is wrong and what to do, against real sockets and real TLS."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cytofed.client import doctor
from cytofed.client.doctor import (
    Coordinator,
    Files,
    Finding,
    check_budget,
    check_certificate,
    check_clock,
    check_computing,
    check_disk,
    check_dns,
    check_egress,
    check_images,
    check_network,
    check_secrets,
    examine,
    passed,
    to_json,
)
from cytofed.client.egress import EgressLog
from cytofed.client.policy import open_ledger
from cytofed.client.settings import Limits, Settings
from cytofed.privacy.accounting import NonPrivate, PlanCost, SubsampledGaussian
from cytofed.privacy.identity import Identity
from cytofed.privacy.ledger import Ledger, Order

LEEDS = Identity.generate("leeds")
Handler = Callable[[socket.socket], None]


def by_name(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


# --- certificates and servers on loopback


class Authority:
    """A CA that lives for one test."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self.key, name, ca=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(_pem(self.certificate))

    def leaf(self, name: str, *, days: float = 300) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key, name, days=days)
        paths = self.folder / f"{self.name}-{name}.pem", self.folder / f"{self.name}-{name}.key"
        paths[0].write_bytes(_pem(certificate))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths

    def _sign(
        self, key: ec.EllipticCurvePrivateKey, name: str, *, ca: bool = False, days: float = 300
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
        )
        return builder.sign(self.key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@contextmanager
def listening(handle: Handler) -> Iterator[int]:
    """A loopback server; each connection is handled in a thread of its own."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            link.settimeout(5)
            threading.Thread(target=_quietly, args=(handle, link), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def _quietly(handle: Handler, link: socket.socket) -> None:
    with link, suppress(OSError):
        handle(link)


def answering(
    certificate: tuple[Path, Path], client_ca: Path | None = None, *, off_s: float = 0
) -> Handler:
    """A coordinator that says it is well; with ``client_ca`` it asks for a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED

    def handle(link: socket.socket) -> None:
        with context.wrap_socket(link, server_side=True) as tls:
            if not tls.recv(4096).startswith(b"GET /health "):
                return  # somebody who only looks at the certificate
            date = formatdate(time.time() + off_s, usegmt=True)
            tls.sendall(f"HTTP/1.1 200 OK\r\nDate: {date}\r\n\r\n".encode())

    return handle


def relaying(status: str, seen: list[bytes]) -> Handler:
    """A proxy that takes CONNECT."""

    def handle(link: socket.socket) -> None:
        request = link.recv(4096)
        seen.append(request)
        link.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if " 200" not in f" {status}":
            return
        host, port = request.split()[1].decode().split(":")
        with socket.create_connection((host, int(port)), timeout=5) as onward:
            back = threading.Thread(target=_copy, args=(onward, link), daemon=True)
            back.start()
            _copy(link, onward)
            back.join(5)

    return handle


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "federation")


@pytest.fixture
def lab_certificate(authority: Authority) -> tuple[Path, Path]:
    return authority.leaf("leeds")


def coordinator(
    authority: Authority, lab: tuple[Path, Path], port: int, proxy: str | None = None
) -> Coordinator:
    return Coordinator("127.0.0.1", port, authority.path, *lab, timeout_s=5, proxy=proxy)


def test_a_healthy_way_to_the_coordinator_is_all_ok(
    authority: Authority, lab_certificate: tuple[Path, Path]
) -> None:
    with listening(answering(authority.leaf("server"), authority.path)) as port:
        found = by_name(check_network(coordinator(authority, lab_certificate, port)))
    assert {name: finding.state for name, finding in found.items()} == {
        "DNS": "ok",
        "TCP": "ok",
        "TLS": "ok",
        "clock": "ok",
    }
    assert "TLSv1.3" in found["TLS"].detail


def test_a_tls_inspecting_proxy_is_named_with_the_way_out(
    authority: Authority, lab_certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    inspector = Authority(tmp_path, "Hospital Inspection CA")
    with listening(answering(inspector.leaf("server"))) as port:
        found = by_name(check_network(coordinator(authority, lab_certificate, port)))["TLS"]
    assert found.state == "fail"
    assert "Hospital Inspection CA" in found.detail
    assert "exempt 127.0.0.1" in found.way_out


def test_a_refused_client_certificate_is_seen_although_tls_came_up(
    authority: Authority, tmp_path: Path
) -> None:
    """In TLS 1.3 it shows only when the answer is awaited."""
    stranger = Authority(tmp_path, "stranger").leaf("leeds")
    with listening(answering(authority.leaf("server"), authority.path)) as port:
        found = by_name(check_network(coordinator(authority, stranger, port)))["TLS"]
    assert found.state == "fail"
    assert "revoked" in found.way_out


def test_a_coordinator_whose_certificate_ended_is_told_apart(
    authority: Authority, lab_certificate: tuple[Path, Path]
) -> None:
    with listening(answering(authority.leaf("server", days=-1))) as port:
        found = by_name(check_network(coordinator(authority, lab_certificate, port)))["TLS"]
    assert "expired" in found.detail
    with listening(answering(authority.leaf("late", days=5))) as port:
        late = by_name(check_network(coordinator(authority, lab_certificate, port)))
    assert late["coordinator"].state == "warn"


def test_a_closed_port_and_an_unknown_name_say_what_to_ask_for(
    authority: Authority, lab_certificate: tuple[Path, Path]
) -> None:
    with listening(lambda _link: None) as port:
        pass
    found = list(check_network(coordinator(authority, lab_certificate, port)))
    assert [finding.name for finding in found] == ["DNS", "TCP"]
    assert (found[-1].state, f"port {port}" in found[-1].way_out) == ("fail", True)
    assert check_dns("no-such-host.invalid").state == "fail"


def test_the_proxy_is_used_and_its_password_is_not_shown(
    authority: Authority, lab_certificate: tuple[Path, Path]
) -> None:
    seen: list[bytes] = []
    with (
        listening(answering(authority.leaf("server"), authority.path)) as port,
        listening(relaying("200 OK", seen)) as proxy_port,
    ):
        proxy = f"http://user:s%40cret@127.0.0.1:{proxy_port}"
        found = by_name(check_network(coordinator(authority, lab_certificate, port, proxy)))
    assert {finding.state for finding in found.values()} == {"ok"}
    assert "DNS" not in found  # the proxy resolves the name
    assert b"Basic dXNlcjpzQGNyZXQ=" in seen[0]


@pytest.mark.parametrize(
    ("status", "way_out"),
    [("407 Proxy Authentication Required", "user:password@"), ("403 No", "CONNECT")],
)
def test_a_proxy_that_says_no_is_quoted(
    authority: Authority, lab_certificate: tuple[Path, Path], status: str, way_out: str
) -> None:
    with listening(relaying(status, [])) as proxy_port:
        proxy = f"http://user:secret@127.0.0.1:{proxy_port}"
        found = list(check_network(coordinator(authority, lab_certificate, 1, proxy)))[-1]
    assert found.state == "fail"
    assert status[:3] in found.detail
    assert way_out in found.way_out
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("off_s", "state"), [(0, "ok"), (-20, "ok"), (90, "warn"), (-600, "fail"), (600, "fail")]
)
def test_a_clock_that_is_off_is_told_in_seconds(off_s: float, state: str) -> None:
    found = check_clock(1_000_000.0, now=1_000_000.0 + off_s)
    assert found.state == state
    if state != "ok":
        assert f"{abs(off_s):.0f} s {'ahead' if off_s > 0 else 'behind'}" in found.detail
        assert "NTP" in found.way_out
    assert check_clock(None).state == "warn"


def test_the_clock_is_compared_with_the_coordinators(
    authority: Authority, lab_certificate: tuple[Path, Path]
) -> None:
    with listening(answering(authority.leaf("server"), off_s=600)) as port:
        found = by_name(check_network(coordinator(authority, lab_certificate, port)))["clock"]
    assert found.state == "fail"


# --- this machine


@pytest.fixture
def settings(sample: Path, tmp_path: Path) -> Settings:
    Ledger.create(tmp_path / "ledger.sqlite")
    return Settings(data=sample / "marrow" / "EOS", ledger=tmp_path / "ledger.sqlite")


def test_keys_that_others_can_read_fail_with_the_command(tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    key.write_bytes(b"secret")
    key.chmod(0o600)
    assert [f.state for f in check_secrets(tmp_path, [key])] == ["ok"]
    key.chmod(0o644)
    found = list(check_secrets(tmp_path, [key]))
    assert [(f.state, f.way_out) for f in found] == [("fail", f"chmod 600 {key}")]
    key.unlink()
    assert next(iter(check_secrets(tmp_path, [key]))).state == "fail"
    tmp_path.chmod(0o777)
    assert next(iter(check_secrets(tmp_path, []))).way_out == f"chmod 700 {tmp_path}"


def test_a_full_disk_is_seen_before_a_round_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert next(iter(check_disk(tmp_path / "missing"))).state == "fail"
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    found = next(iter(check_disk(tmp_path)))
    assert found.state == "fail"
    assert "free" in found.way_out


def test_a_certificate_near_its_end_warns(authority: Authority) -> None:
    path, _ = authority.leaf("leeds", days=100)
    now = datetime.now(UTC)
    states = [
        next(iter(check_certificate(path, now=now + timedelta(days=days)))).state
        for days in (0, 80, 120)
    ]
    assert states == ["ok", "warn", "fail"]
    path.write_bytes(b"no certificate")
    assert next(iter(check_certificate(path))).state == "fail"


def test_images_are_looked_at_and_doubts_are_warnings(settings: Settings) -> None:
    found = by_name(check_images(settings))
    assert found["data"].state == "ok"
    assert found["patients"].state == "warn"
    assert passed(list(found.values()))


def test_data_that_cannot_be_used_fails_with_the_way_out(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    found = list(check_images(replace(settings, data=tmp_path / "empty")))
    assert [f.state for f in found] == ["fail"]
    assert found[0].way_out
    wrong = replace(settings, labels="no-such-map")
    assert next(iter(check_images(wrong))).state == "fail"


def test_a_declared_number_far_from_the_truth_warns(settings: Settings) -> None:
    by_file = replace(settings, patients=r"name:(\w+)\.", patients_declared=5000)
    found = by_name(check_images(by_file))["patients"]
    assert found.state == "warn"
    assert "5000 declared" in found.detail


def test_a_column_that_seems_to_name_patients_is_asked_about(
    settings: Settings, sample: Path, tmp_path: Path
) -> None:
    image = sorted((sample / "marrow" / "EOS").iterdir())[0]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(image.read_bytes())
    (tmp_path / "cells.csv").write_text("path,label,Patient-ID\n1.jpg,EOS,7\n")
    asked = by_name(check_images(replace(settings, data=tmp_path)))
    assert asked["patients"].state == "fail"
    assert "patients: column:Patient-ID" in asked["patients"].way_out
    assert "labels: marrow" in asked["label map"].way_out
    said = replace(settings, data=tmp_path, labels="marrow", patients="column:Patient-ID")
    found = by_name(check_images(said))
    assert found["patients"].state == "warn"
    assert "1 of 1 images are left out" in found["data, private plans"].detail, "found by its name"
    none = by_name(check_images(replace(said, patients="none")))
    assert none["patients"].detail.startswith("not known who is who")


def test_the_budget_is_told_with_unit_and_delta(settings: Settings) -> None:
    limited = replace(settings, limits=Limits(max_epsilon=5.0, delta=1e-4))
    found = next(iter(check_budget(limited)))
    assert found.state == "ok"
    assert "0.00 spent" in found.detail
    assert "at delta 0.0001, per patient" in found.detail
    with open_ledger(settings) as book:
        cost = PlanCost(1e-3, 100, 10, SubsampledGaussian("patient", 0.5, 0.6, 50))
        book.hold(federation="f", plan_sha256="aa" * 32, cost=cost)
    assert next(iter(check_budget(limited))).state == "warn"
    with open_ledger(settings) as book:
        cost = PlanCost(1e-3, 1, 1, NonPrivate())
        book.hold(federation="f", plan_sha256="bb" * 32, cost=cost)
        book.reserve(Order("f", "plain", 1, 0, "bb" * 32, "weights", "order"))
    for lab, state in ((settings, "ok"), (limited, "warn")):
        found = next(iter(check_budget(lab)))
        assert (found.state, "unbounded since" in found.detail) == (state, True)
        assert "run plain" in found.detail
    settings.ledger.write_bytes(b"")
    assert next(iter(check_budget(settings))).state == "fail"


def test_a_changed_egress_log_fails(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    EgressLog.create(path, LEEDS)
    found = next(iter(check_egress(settings, path, own=LEEDS.public, federation="f")))
    assert found.state == "ok"
    path.write_bytes(path.read_bytes().replace(b"leeds", b"york!"))
    found = next(iter(check_egress(settings, path, own=LEEDS.public, federation="f")))
    assert found.state == "fail"
    assert "record 1" in found.detail


def test_one_check_that_fails_hides_no_other(
    settings: Settings, authority: Authority, lab_certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    findings = examine(
        replace(settings, data=tmp_path / "nowhere"),
        Files(tmp_path, [tmp_path / "missing.key"], tmp_path / "missing.jsonl"),
        own=LEEDS.public,
        federation="f",
        coordinator=coordinator(authority, lab_certificate, 1),
    )
    found = by_name(findings)
    assert [n for n in found if found[n].state == "fail"] == ["data", "keys", "egress log", "TCP"]
    assert {"disk", "computing", "budget", "certificate", "DNS"} <= set(found)
    assert not passed(findings)
    assert all(f.way_out for f in findings if f.state == "fail")
    assert to_json(findings)["passed"] is False


def test_what_computes_is_named() -> None:
    assert "torch" in next(iter(check_computing())).detail
