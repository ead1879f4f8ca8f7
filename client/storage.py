"""Files that only this lab can read: encrypted under its storage key, and bound to their place.

Without the key nothing of an update, control variates, a lab's own layers or the secrets of secure
aggregation can be read from a disk. A file that was moved to another place, or from another lab,
does not open. As it is made, the key lies on the same disk, in a file of mode 0600: that stops
other users and backups that leave key files out, and no thief of the whole disk. For that,
``storage_key`` of client.yaml says where the key is instead::

    credential:NAME               32 bytes that systemd hands to the service (LoadCredential=)
    passphrase:credential:NAME    storage.key holds the key encrypted under a passphrase (scrypt),
    passphrase:file:PATH          which is a credential, in a file that only this user can read, or
    passphrase:env:NAME           in the environment. Nobody is ever asked for it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cytofed.errors import InputError, VerificationError
from cytofed.files import write_atomically

KEY_FILE = "storage.key"
KEY_BYTES = 32

_NONCE_BYTES, _SALT_BYTES = 12, 16
_WRAPPED = b"CYTOKEY1"
"""and after it: salt, nonce, the key encrypted"""
_SPECS = re.compile(
    r"(?P<what>credential):(?P<name>[\w.@-]{1,200})"
    r"|passphrase:(?:(?P<where>credential|env):(?P<place>[\w.@-]{1,200})|file:(?P<path>/.+))"
)
_LEAST_CHARS = 12

_log = logging.getLogger("cytofed.lab")


def check_spec(spec: str) -> None:
    """Errors: InputError for a ``storage_key`` that says nothing (see the module)."""
    if not _SPECS.fullmatch(spec):
        raise InputError(
            f"storage_key is {spec!r:.80}, expected credential:NAME or passphrase: followed by "
            "credential:NAME, file:/PATH or env:NAME",
            hint="leave it out: the key is then the file storage.key",
        )


def open_storage_key(root: Path, spec: str | None) -> bytes:
    """The storage key of the lab's directory ``root``; ``spec``: where it is, see the module.

    A plain ``storage.key`` is encrypted in place the first time that a passphrase is named.
    Errors: InputError for a file that others can read, a key or passphrase that is missing or does
    not fit.
    """
    file = root / KEY_FILE
    found = None if spec is None else _SPECS.fullmatch(spec)
    if spec is None:
        data = _private(file)
        if data.startswith(_WRAPPED):
            raise InputError(
                f"{file} is encrypted under a passphrase, and client.yaml does not say where it is",
                hint="set storage_key, for example storage_key: passphrase:file:/etc/cytofed.pass",
            )
        return _key(data, file)
    if found is None:
        check_spec(spec)
        raise AssertionError(spec)
    if found["what"]:
        key = _key(_credential(found["name"]), found["name"])
        if file.is_file():
            _log.warning("%s is still on the disk beside the credential: remove it", file)
        return key
    passphrase = _passphrase(found)
    data = _private(file)
    if data.startswith(_WRAPPED):
        return _unwrapped(data, passphrase, file)
    key = _key(data, file)
    write_atomically(file, _wrapped(key, passphrase), mode=0o600)
    _log.info("%s is encrypted under the passphrase from now on", file)
    return key


def _passphrase(found: re.Match[str]) -> bytes:
    if found["path"]:
        text, where = _private(Path(found["path"])), found["path"]
    elif found["where"] == "credential":
        text, where = _credential(found["place"]), found["place"]
    else:
        where = f"${found['place']}"
        if found["place"] not in os.environ:
            raise InputError(
                f"{where} is not set, and storage_key names it for the passphrase of {KEY_FILE}",
                hint="set it for the service, or name a file: storage_key: passphrase:file:/PATH",
            )
        text = os.environ[found["place"]].encode()
    text = text.rstrip(b"\r\n")
    if len(text) < _LEAST_CHARS:
        raise InputError(
            f"the passphrase of {KEY_FILE} in {where} has {len(text)} characters, expected "
            f"{_LEAST_CHARS} or more"
        )
    return text


def _credential(name: str) -> bytes:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise InputError(
            f"storage_key names the credential {name}, and $CREDENTIALS_DIRECTORY is not set",
            hint="start it as a service with LoadCredential= or LoadCredentialEncrypted=",
        )
    return _private(Path(folder) / name, others=True)


def _private(path: Path, *, others: bool = False) -> bytes:
    """A file that nobody else may read. ``others``: whose mode is systemd's business."""
    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if mode & 0o077 and not others:
        raise InputError(
            f"{path} can be read by others (mode {mode & 0o777:03o})", hint=f"chmod 600 {path}"
        )
    return data


def _key(data: bytes, where: Path | str) -> bytes:
    if len(data) != KEY_BYTES:
        raise InputError(f"{where} has {len(data)} bytes, a storage key has {KEY_BYTES}")
    return data


def _wrapped(key: bytes, passphrase: bytes) -> bytes:
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    return _WRAPPED + salt + nonce + _cipher(passphrase, salt).encrypt(nonce, key, _WRAPPED)


def _unwrapped(data: bytes, passphrase: bytes, file: Path) -> bytes:
    at = len(_WRAPPED)
    salt, nonce = data[at : at + _SALT_BYTES], data[at + _SALT_BYTES :][:_NONCE_BYTES]
    sealed = data[at + _SALT_BYTES + _NONCE_BYTES :]
    try:
        return _key(_cipher(passphrase, salt).decrypt(nonce, sealed, _WRAPPED), file)
    except (InvalidTag, ValueError):
        raise InputError(
            f"the passphrase does not open {file}",
            hint="without it what is kept between attempts is lost, and nothing else: put a new "
            "key of 32 random bytes in its place",
        ) from None


def _cipher(passphrase: bytes, salt: bytes) -> AESGCM:
    # RFC 7914; 64 MiB and a fifth of a second for each guess.
    return AESGCM(Scrypt(salt=salt, length=KEY_BYTES, n=1 << 16, r=8, p=1).derive(passphrase))


def write_sealed(path: Path, data: bytes, *, key: bytes, place: bytes) -> None:
    """On the disk, readable by this user and with the key only, when it returns.

    ``place``: what the file is and where it belongs; it opens there alone.
    """
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, data, place)
    write_atomically(path, nonce + sealed, mode=0o600)


def read_sealed(path: Path, *, key: bytes, place: bytes, way_out: str) -> bytes:
    """Errors: VerificationError, with ``way_out``, for a file that was altered or is of another
    place or key."""
    data = path.read_bytes()
    nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, sealed, place)
    except (InvalidTag, ValueError):
        raise VerificationError(
            f"{path} was altered, or belongs to another run or lab", hint=way_out
        ) from None
