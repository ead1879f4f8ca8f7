"""The storage key: a file for its owner, a credential, or a file that a passphrase opens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cytofed.client.settings import fresh_yaml, read_settings
from cytofed.client.storage import KEY_FILE, open_storage_key
from cytofed.errors import InputError

KEY = bytes(range(32))
PASSPHRASE = "correct horse battery"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A directory as it was before: with a plain storage.key."""
    folder = tmp_path / "lab"
    folder.mkdir()
    write(folder / KEY_FILE, KEY)
    return folder


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_directory_of_before_opens_and_is_for_its_owner_only(lab: Path) -> None:
    assert open_storage_key(lab, None) == KEY
    (lab / KEY_FILE).chmod(0o640)
    with pytest.raises(InputError, match="640") as caught:
        open_storage_key(lab, None)
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("where", ["file", "env", "credential"])
def test_a_passphrase_takes_the_plain_key_off_the_disk(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kept = write(tmp_path / "pass", f"{PASSPHRASE}\n".encode())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("THE_PASS", PASSPHRASE)
    place = {"file": str(kept), "env": "THE_PASS", "credential": "pass"}[where]
    spec = f"passphrase:{where}:{place}"
    assert open_storage_key(lab, spec) == KEY
    assert all(KEY not in path.read_bytes() for path in lab.iterdir())
    assert (lab / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert open_storage_key(lab, spec) == KEY, "at the next start too"
    with pytest.raises(InputError, match="does not say where"):
        open_storage_key(lab, None)


def test_another_or_no_passphrase_opens_nothing(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = write(tmp_path / "pass", PASSPHRASE.encode())
    spec = f"passphrase:file:{kept}"
    open_storage_key(lab, spec)
    write(kept, b"another one of length")
    with pytest.raises(InputError, match="does not open"):
        open_storage_key(lab, spec)
    write(kept, b"short")
    with pytest.raises(InputError, match="5 characters"):
        open_storage_key(lab, spec)
    write(kept, PASSPHRASE.encode(), mode=0o644)
    with pytest.raises(InputError, match="644"):
        open_storage_key(lab, spec)
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(InputError, match="NO_SUCH is not set"):
        open_storage_key(lab, "passphrase:env:NO_SUCH")


def test_a_credential_is_the_key_and_a_file_left_behind_is_told(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="CREDENTIALS_DIRECTORY"):
        open_storage_key(lab, "credential:storage")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(InputError, match="cannot read"):
        open_storage_key(lab, "credential:storage")
    write(tmp_path / "storage", KEY, mode=0o440)  # as systemd makes it
    assert open_storage_key(lab, "credential:storage") == KEY
    assert "remove it" in caplog.text
    (lab / KEY_FILE).unlink()
    assert open_storage_key(lab, "credential:storage") == KEY
    write(tmp_path / "storage", os.urandom(31))
    with pytest.raises(InputError, match="31 bytes"):
        open_storage_key(lab, "credential:storage")


@pytest.mark.parametrize(
    "spec", ["", "file", "credential:", "credential:../x", "passphrase:secret", "passphrase:file:x"]
)
def test_client_yaml_says_where_the_key_is_or_is_refused(tmp_path: Path, spec: str) -> None:
    text = fresh_yaml(data=tmp_path, ledger=tmp_path / "ledger")
    good = f"{text}storage_key: credential:cytofed-storage\n"
    assert read_settings(good, folder=tmp_path).storage_key == "credential:cytofed-storage"
    with pytest.raises(InputError, match="storage_key"):
        read_settings(f"{text}storage_key: {spec and json.dumps(spec)}\n", folder=tmp_path)
