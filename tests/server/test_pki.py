"""The federation's certificates: one authority, its leaves, and nothing taken from requests."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cytofed.errors import InputError
from cytofed.server import pki

AUTHORITY = pki.new_authority("fed")


def request(
    key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType, name: str = "boss"
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def test_lab_gets_a_client_certificate_in_the_name_it_was_invited_by() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    wants_all = x509.BasicConstraints(ca=True, path_length=None)
    pem = pki.sign_request(AUTHORITY, request(key, wants_all), lab="leeds")
    certificate = x509.load_pem_x509_certificate(pem)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.certificate))
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["leeds"]
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.public_key() == key.public_key()


@pytest.mark.parametrize("damage", ["empty", "text", "signature", "curve"])
def test_request_that_is_not_a_valid_one_of_p384_is_refused(damage: str) -> None:
    good = request(ec.generate_private_key(ec.SECP384R1()))
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    bad = {
        "empty": b"",
        "text": b"certificate, please",
        "signature": x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM),
        "curve": request(ec.generate_private_key(ec.SECP256R1())),
    }[damage]
    with pytest.raises(InputError):
        pki.sign_request(AUTHORITY, bad, lab="leeds")


def test_request_with_any_byte_changed_is_signed_or_refused_and_nothing_else() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    der = x509.load_pem_x509_csr(request(key)).public_bytes(serialization.Encoding.DER)
    line = b"-----%s CERTIFICATE REQUEST-----\n"
    keys = []
    for at in range(len(der)):
        for value in {0, 1, 0xFF, der[at] ^ 1} - {der[at]}:
            changed = der[:at] + bytes([value]) + der[at + 1 :]
            pem = line % b"BEGIN" + base64.encodebytes(changed) + line % b"END"
            try:
                made = pki.sign_request(AUTHORITY, pem, lab="leeds")
            except InputError:
                continue
            keys.append(x509.load_pem_x509_certificate(made).public_key())
    assert all(found == key.public_key() for found in keys)


KEYS: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "dsa": lambda: dsa.generate_private_key(1024),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_other_kinds_are_refused(kind: str) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    made = builder.sign(KEYS[kind](), None if kind == "ed25519" else hashes.SHA256())
    with pytest.raises(InputError, match="P-384"):
        pki.sign_request(AUTHORITY, made.public_bytes(serialization.Encoding.PEM), lab="leeds")


def test_server_certificate_is_renewed_over_the_same_key_and_names() -> None:
    old = pki.new_server_certificate(AUTHORITY, ("fed.example.org", "192.0.2.7"))
    pem = pki.renewed_server_certificate(AUTHORITY, old.certificate)
    before, after = map(x509.load_pem_x509_certificate, (old.certificate, pem))
    names = x509.SubjectAlternativeName
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number
    assert (
        after.extensions.get_extension_for_class(names).value
        == before.extensions.get_extension_for_class(names).value
    )


def test_certificates_hold_for_a_year_and_begin_a_little_earlier() -> None:
    pem = pki.new_server_certificate(AUTHORITY, ("localhost",)).certificate
    assert pki.LEAF_DAYS - 1 < pki.days_left(pem) <= pki.LEAF_DAYS
    start = x509.load_pem_x509_certificate(pem).not_valid_before_utc
    assert start < datetime.now(UTC) - timedelta(minutes=30)


def test_keys_are_not_shown() -> None:
    assert "PRIVATE" not in repr(AUTHORITY)
