"""The coordinator's directory: who gets in, who does not come back, what its settings say."""

from __future__ import annotations

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from cytofed.documents import COORDINATOR, Member
from cytofed.errors import CytofedError, InputError, RefusedError
from cytofed.privacy.identity import Identity
from cytofed.server.directory import ServerDirectory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ServerDirectory:
    root = tmp_path_factory.mktemp("made") / "coordinator"
    return ServerDirectory.create(root, name="fed", address="localhost:9000")


@pytest.fixture
def directory(made: ServerDirectory) -> ServerDirectory:
    """With no lab on the roster."""
    for member in made.roster().members:
        made.revoke(member.name)
    return made


def member(name: str) -> Member:
    identity = Identity.generate(name)
    return Member(identity.public, identity.public.fingerprint, 20)


def test_keys_are_for_their_owner_alone(made: ServerDirectory) -> None:
    assert stat.S_IMODE(made.root.stat().st_mode) == 0o700
    for key in ("ca.key", "server.key", "identity.key"):
        assert stat.S_IMODE((made.root / key).stat().st_mode) == 0o600, key
    assert made.identity().name == COORDINATOR
    assert (made.settings().host, made.settings().port) == ("localhost", 9000)
    assert made.settings().listen == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "address"),
    [("", "h:1"), ("a/b", "h:1"), ("..", "h:1"), ("x" * 65, "h:1"), ("fed", "h"), ("fed", ":1"),
     ("fed", "h:0"), ("fed", "h:65536"), ("fed", "h:x")],
)  # fmt: skip
def test_bad_names_and_addresses_make_no_directory(tmp_path: Path, name: str, address: str) -> None:
    with pytest.raises(InputError):
        ServerDirectory.create(tmp_path / "new", name=name, address=address)
    assert not (tmp_path / "new").exists()


def test_nothing_is_made_over_what_is_there(made: ServerDirectory, tmp_path: Path) -> None:
    key = (made.root / "identity.key").read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        ServerDirectory.create(made.root, name="fed", address="h:1")
    assert (made.root / "identity.key").read_bytes() == key
    with pytest.raises(InputError, match="not a coordinator's directory"):
        ServerDirectory.open(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [("pol_s: 3", "poll_s"), ("poll_s: -1", "above 0"), ("poll_s: yes", "above 0"),
     ("name: [a]", "expected text"), ("just text", "keys and values"), ("a: b: c", "valid YAML"),
     ("poll_s: 3\nname: x", "address is missing"), ("poll_s: 3\npoll_s: 4", "given twice")],
)  # fmt: skip
def test_settings_that_are_wrong_are_named(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "server.yaml").write_text(f"{line}\n")
    with pytest.raises(InputError) as caught:
        ServerDirectory(tmp_path).settings()
    assert told in caught.value.message + caught.value.hint


def test_epoch_rises_with_every_change_and_never_falls(directory: ServerDirectory) -> None:
    first = directory.roster().epoch
    directory.enrol(member("bonn"), b"certificate")
    directory.enrol(member("leeds"), b"certificate")
    assert [found.name for found in directory.roster().members] == ["bonn", "leeds"]
    directory.leave("bonn")
    assert directory.roster().epoch == first + 3
    assert [(gone.lab, gone.why) for gone in directory.gone()][-1] == ("bonn", "left")


def test_no_key_comes_back_under_any_name(directory: ServerDirectory) -> None:
    lab, other = member("leeds"), member("leeds")
    directory.enrol(lab, b"certificate")
    directory.note_head("leeds", b"signed")
    with pytest.raises(RefusedError, match="already enrolled"):
        directory.enrol(other, b"certificate")
    directory.revoke("leeds")
    assert directory.seen_head("leeds") == b""  # that of a lab's own ledger, which is another now
    new = member("oslo")
    for same in (
        replace(new, node_key_sha256=lab.node_key_sha256),
        replace(new, identity=replace(new.identity, signing=lab.identity.signing)),
        replace(new, identity=replace(new.identity, sealing=lab.identity.sealing)),
    ):
        with pytest.raises(RefusedError, match="in use, or was revoked"):
            directory.enrol(same, b"certificate")
    directory.enrol(other, b"certificate")
    with pytest.raises(InputError, match="no lab 'rome'"):
        directory.revoke("rome")


def test_invite_is_for_one_lab_and_one_time(directory: ServerDirectory) -> None:
    invite = directory.invite("leeds")
    kept = (directory.root / "invites" / "leeds.json").read_text()
    assert invite.token not in kept
    for lab, token in (("leeds", "guess"), ("bonn", invite.token), ("../leeds", invite.token)):
        with pytest.raises(RefusedError, match="not valid"):
            directory.redeem(lab, token)
    directory.redeem("leeds", invite.token)
    with pytest.raises(RefusedError, match="not valid"):
        directory.redeem("leeds", invite.token)


def test_later_invite_voids_the_earlier_and_an_expired_one_is_void(
    directory: ServerDirectory,
) -> None:
    earlier, later = directory.invite("leeds"), directory.invite("leeds")
    with pytest.raises(RefusedError):
        directory.redeem("leeds", earlier.token)
    file = directory.root / "invites" / "leeds.json"
    file.write_text(
        file.read_text().replace(later.expires.isoformat(), "2020-01-01T00:00:00+00:00")
    )
    with pytest.raises(RefusedError):
        directory.redeem("leeds", later.token)


@pytest.mark.parametrize("lab", ["", "a b", "../x", COORDINATOR, "x" * 65, "-x"])
def test_names_that_no_lab_may_have_are_not_invited(made: ServerDirectory, lab: str) -> None:
    with pytest.raises(InputError, match="not a name for a lab"):
        made.invite(lab)


def test_enrolled_lab_is_not_invited_again(directory: ServerDirectory) -> None:
    directory.enrol(member("leeds"), b"certificate")
    with pytest.raises(InputError, match="already enrolled"):
        directory.invite("leeds")


def test_file_of_a_lab_that_is_damaged_is_named_and_no_lab_is_forgotten(
    directory: ServerDirectory, tmp_path: Path
) -> None:
    copy = ServerDirectory(shutil.copytree(directory.root, tmp_path / "copy"))
    copy.enrol(member("bonn"), b"certificate")
    file = copy.root / "labs" / "bonn.cbor"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CytofedError, match=r"bonn\.cbor cannot be read"):
        copy.roster()


def test_copy_of_a_file_of_a_lab_that_left_hides_no_other(
    directory: ServerDirectory, tmp_path: Path
) -> None:
    copy = ServerDirectory(shutil.copytree(directory.root, tmp_path / "copy"))
    before = len(copy.gone())
    copy.enrol(member("bonn"), b"certificate")
    copy.leave("bonn")
    left = max((copy.root / "left").glob("bonn.*.cbor"))
    shutil.copy(left, left.with_name(f"{left.stem} (copy).cbor"))
    (left.parent / "notes.cbor").write_bytes(b"")
    assert len(copy.gone()) == before + 1
