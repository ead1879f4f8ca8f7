"""Who gets on the roster, how a certificate is renewed, and how a lab leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from cytofed.documents import LABEL_LEAVE, LABEL_RENEW, LABEL_RENEWED
from cytofed.errors import CytofedError, InputError, RefusedError, VerificationError
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, sign, verify
from cytofed.server.directory import ServerDirectory
from cytofed.server.enrolment import enrol, leave, read_request, renew

from .joined import coordinator, join, request_of


@pytest.fixture
def server(tmp_path: Path) -> ServerDirectory:
    return coordinator(tmp_path)


def signed(identity: Identity, label: str, federation: str = "fed", **fields: wire.Value) -> bytes:
    body = wire.encode({"federation": federation, **fields})
    return wire.encode([identity.name, sign(identity, label, body)])


def request_pem(curve: ec.EllipticCurve) -> bytes:
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "any")]))
        .sign(ec.generate_private_key(curve), hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def test_enrolled_lab_is_on_the_roster_with_what_it_declared(
    server: ServerDirectory, tmp_path: Path
) -> None:
    lab = join(server, "leeds", tmp_path / "leeds")
    member = server.roster().member("leeds")
    assert member.identity == lab.identity().public
    assert member.declared_patients == 20
    assert lab.coordinator() == server.identity().public


def test_request_whose_answer_was_lost_gets_the_same_certificate(
    server: ServerDirectory, tmp_path: Path
) -> None:
    request = request_of(server.invite("leeds"), tmp_path / "leeds")
    enrol(server, request)
    first = server.certificate("leeds")
    enrol(server, request)
    assert server.certificate("leeds") == first
    assert server.roster().epoch == 1


def test_invite_is_good_for_one_lab_and_one_time(server: ServerDirectory, tmp_path: Path) -> None:
    invite = server.invite("leeds")
    enrol(server, request_of(invite, tmp_path / "leeds"))
    with pytest.raises(RefusedError):
        enrol(server, request_of(invite, tmp_path / "thief"))


def test_later_invite_voids_the_earlier(server: ServerDirectory, tmp_path: Path) -> None:
    old = server.invite("leeds")
    server.invite("leeds")
    with pytest.raises(RefusedError, match="not valid"):
        enrol(server, request_of(old, tmp_path / "leeds"))


@pytest.mark.parametrize("gone", ["revoke", "leave"])
def test_keys_of_a_lab_that_is_gone_do_not_come_back(
    server: ServerDirectory, tmp_path: Path, gone: str
) -> None:
    request = request_of(server.invite("leeds"), tmp_path / "leeds")
    enrol(server, request)
    getattr(server, gone)("leeds")
    assert server.roster().members == ()
    with pytest.raises(RefusedError):
        enrol(server, request)
    again = request_of(server.invite("leeds"), tmp_path / "new")
    enrol(server, again)  # with new keys it may
    assert [lab.lab for lab in server.gone()] == ["leeds"]


@given(data=st.binary(max_size=300))
def test_no_document_of_a_stranger_is_read(data: bytes) -> None:
    with pytest.raises((VerificationError, InputError)):
        read_request(data, check=lambda _lab, _token: None)


def test_token_is_checked_before_all_that_costs(
    server: ServerDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a stranger has this done")

    request = request_of(server.invite("leeds"), tmp_path / "leeds")
    server.invite("leeds")  # voids it
    monkeypatch.setattr("cytofed.server.enrolment.verify", never)
    monkeypatch.setattr("cytofed.server.enrolment.PublicIdentity", never)
    monkeypatch.setattr("cytofed.server.pki.sign_request", never)
    with pytest.raises(RefusedError, match="not valid"):
        enrol(server, request)


@pytest.mark.parametrize("lab", ["../ca", "a/b", "a\0b", "x" * 250, "", ".", "é"])
def test_no_name_of_a_stranger_is_a_path(server: ServerDirectory, lab: str) -> None:
    public = wire.encode({"name": lab, "sealing": b"", "signing": b""})
    body = wire.encode({"token": "guess"})
    signed = wire.encode({"body": body, "label": "", "signature": b"", "signer": lab})
    with pytest.raises((RefusedError, VerificationError)):
        enrol(server, wire.encode([public, signed]))


def test_renewed_certificate_is_of_the_same_key_and_leaves_the_roster_alone(
    server: ServerDirectory, tmp_path: Path
) -> None:
    lab = join(server, "leeds", tmp_path / "leeds")
    before = server.roster().sha256
    request = (lab.root / "request.pem").read_bytes()
    answer = renew(server, signed(lab.identity(), LABEL_RENEW, request=request))
    fields = wire.Fields.of(
        verify(answer, label=LABEL_RENEWED, signer=server.identity().public), "answer"
    )
    certificate = x509.load_pem_x509_certificate(fields.raw("certificate"))
    assert certificate.public_key() == lab.node_key().public_key()
    assert server.certificate("leeds") == certificate.public_bytes(serialization.Encoding.PEM)
    assert server.roster().sha256 == before


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256R1()])
def test_certificate_of_another_key_is_not_given(
    server: ServerDirectory, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    lab = join(server, "leeds", tmp_path / "leeds")
    with pytest.raises((VerificationError, InputError)):
        renew(server, signed(lab.identity(), LABEL_RENEW, request=request_pem(curve)))


def test_lab_that_leaves_is_off_the_roster_and_named(
    server: ServerDirectory, tmp_path: Path
) -> None:
    lab = join(server, "leeds", tmp_path / "leeds")
    join(server, "bonn", tmp_path / "bonn")
    leave(server, signed(lab.identity(), LABEL_LEAVE))
    assert [member.name for member in server.roster().members] == ["bonn"]
    assert [(lab.lab, lab.why) for lab in server.gone()] == [("leeds", "left")]


@pytest.mark.parametrize("change", [leave, renew])
def test_nobody_speaks_for_another_lab(
    server: ServerDirectory,
    tmp_path: Path,
    change: object,
) -> None:
    leeds = join(server, "leeds", tmp_path / "leeds").identity()
    bonn = join(server, "bonn", tmp_path / "bonn").identity()
    request = (tmp_path / "leeds" / "request.pem").read_bytes()
    label, fields = (LABEL_LEAVE, {}) if change is leave else (LABEL_RENEW, {"request": request})
    body = wire.encode({"federation": "fed", **fields})
    forged = [
        wire.encode(["leeds", sign(bonn, label, body)]),  # another lab's signature
        wire.encode(["oslo", sign(leeds, label, body)]),  # a stranger
        wire.encode(["leeds", sign(leeds, "cytofed/1/decision", body)]),  # another document
        signed(leeds, label, "other", **fields),  # another federation
        wire.encode(["leeds"]),
        b"",
    ]
    for document in forged:
        with pytest.raises(CytofedError):
            change(server, document)  # type: ignore[operator]
    assert [member.name for member in server.roster().members] == ["bonn", "leeds"]
