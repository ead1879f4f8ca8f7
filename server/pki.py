"""The federation's own certificates: one authority, the server's certificate, one per lab.

EC P-384 and SHA-384 throughout. A lab's key never leaves the lab: it sends a signing request.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cytofed.errors import InputError

AUTHORITY_DAYS = 3650
LEAF_DAYS = 397
WARN_DAYS = 30

_BACKDATED = timedelta(hours=1)  # a lab whose clock is a little behind must not refuse it


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def new_authority(name: str) -> Issued:
    """A self-signed authority that may sign leaves only."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name} authority")
    certificate = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Issued(_pem(certificate), _key_pem(key))


def new_server_certificate(authority: Issued, hosts: tuple[str, ...]) -> Issued:
    """A certificate for the names and IP addresses under which labs reach the coordinator."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    certificate = _leaf(
        authority, hosts[0], key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, names
    )
    return Issued(certificate, _key_pem(key))


def renewed_server_certificate(authority: Issued, certificate_pem: bytes) -> bytes:
    """The server's certificate over the same key and names, from today on."""
    old = x509.load_pem_x509_certificate(certificate_pem)
    key = old.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    name = str(old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    return _leaf(authority, name, key, ExtendedKeyUsageOID.SERVER_AUTH, names)


def sign_request(authority: Issued, request_pem: bytes, *, lab: str) -> bytes:
    """A client certificate for ``lab`` over the key of its signing request.

    Nothing of the request but the key is taken over. Errors: InputError for what is no valid
    request of an EC P-384 key.
    """
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
    except Exception as error:  # ValueError, InvalidVersion, UnsupportedAlgorithm, and what comes
        raise InputError(f"certificate request cannot be read: {error!s:.100}") from None
    # Of this one curve alone: to check a signature of other keys may take minutes.
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise InputError("certificate request is not one of an EC P-384 key")
    try:
        valid = request.is_signature_valid
    except Exception:
        valid = False
    if not valid:
        raise InputError("certificate request is not signed by its own key")
    return _leaf(authority, lab, key, ExtendedKeyUsageOID.CLIENT_AUTH, None)


def days_left(certificate_pem: bytes) -> float:
    """Days until a certificate ends; below 0 it has."""
    end = x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
    return (end - datetime.now(UTC)) / timedelta(days=1)


def public_key_pem(certificate_pem: bytes) -> bytes:
    """The key that a certificate is for, as Flower's node authentication writes it."""
    return _public_pem(x509.load_pem_x509_certificate(certificate_pem))


@lru_cache(1024)
def public_key_pem_of_der(certificate_der: bytes) -> bytes:
    """As ``public_key_pem``, of a certificate as TLS gives it: with each request, so remembered."""
    return _public_pem(x509.load_der_x509_certificate(certificate_der))


def _public_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _leaf(
    authority: Issued,
    name: str,
    key: ec.EllipticCurvePublicKey,
    usage: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName | None,
) -> bytes:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    builder = (
        _builder(_name(name), issuer.subject, key, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return _pem(builder.sign(issuer_key, hashes.SHA384()))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
