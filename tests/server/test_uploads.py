"""Bodies that arrive in chunks: what they say does not depend on how they were cut."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import numpy as np
import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from cytofed.messages import BadMessage
from cytofed.server.uploads import Arriving, Spooled

NUMBER = PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER
FILE_FROM = 1000


def body_of(content: bytes) -> bytes:
    asked = PushObjectRequest(
        node=Node(node_id=7), run_id=1 << 40, object_id="a" * 64, object_content=content,
        session_id="b" * 64,
    )  # fmt: skip
    made: bytes = asked.SerializeToString()
    return made


def arrive(folder: Path, chunks: list[bytes]) -> tuple[bytes, bytes]:
    """The other fields, and the content."""
    with Arriving(NUMBER, folder, file_from=FILE_FROM) as arriving:
        for chunk in chunks:
            arriving.feed(chunk)
        others, content = arriving.end()
        if isinstance(content, Spooled):
            assert content.path.parent == folder
            found = content.path.read_bytes()
            assert (len(content), content.start) == (len(found), found[:64])
            assert content.sha256 == hashlib.sha256(found).hexdigest()
            return others, found
        return others, content


def in_chunks(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize("chunk", [1, 2, 63, 997, 5000])
@pytest.mark.parametrize("size", [0, 1, FILE_FROM - 1, FILE_FROM, 4096])
def test_body_reads_the_same_however_it_is_cut(tmp_path: Path, size: int, chunk: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    others, found = arrive(tmp_path, in_chunks(body_of(content), chunk))
    assert found == content
    told = PushObjectRequest.FromString(others)
    assert (told.node.node_id, told.run_id) == (7, 1 << 40)
    assert (told.object_id, told.session_id) == ("a" * 64, "b" * 64)
    assert not told.object_content
    assert not list(tmp_path.iterdir()), "nobody took the file: it is gone"


def test_large_content_lies_in_a_file_of_this_user_and_stays_where_it_is_put(
    tmp_path: Path,
) -> None:
    with Arriving(NUMBER, tmp_path, file_from=FILE_FROM) as arriving:
        arriving.feed(body_of(bytes(FILE_FROM)))
        content = arriving.end()[1]
        assert isinstance(content, Spooled)
        assert stat.S_IMODE(content.path.stat().st_mode) == 0o600
        content.path.rename(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("cut", [1, 20, 100, 1500])
def test_body_that_was_cut_is_no_request(tmp_path: Path, cut: int) -> None:
    with pytest.raises(BadMessage):
        arrive(tmp_path, [body_of(bytes(2000))[:-cut]])
    assert not list(tmp_path.iterdir())


def test_content_that_comes_twice_is_refused(tmp_path: Path) -> None:
    twice = PushObjectRequest(object_content=bytes(2000)).SerializeToString() * 2
    with pytest.raises(BadMessage, match="twice"):
        arrive(tmp_path, [twice])
    assert not list(tmp_path.iterdir())


def test_other_fields_take_no_more_memory_than_they_need(tmp_path: Path) -> None:
    long = PushObjectRequest(object_id="a" * 100_000).SerializeToString()
    with Arriving(NUMBER, tmp_path, file_from=FILE_FROM) as arriving:
        for chunk in in_chunks(long, 1000)[:4]:
            arriving.feed(chunk)
        with pytest.raises(BadMessage, match="beside the content"):
            arriving.feed(long[4000:5000])


@given(body=st.binary(max_size=300), chunk=st.integers(1, 300))
def test_garbage_is_refused_or_read_as_protobuf_reads_it(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, chunk: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "garbage"
    folder.mkdir(exist_ok=True)
    try:
        whole = arrive(folder, [body])
    except BadMessage:
        with pytest.raises(BadMessage):
            arrive(folder, in_chunks(body, chunk))
    else:
        assert arrive(folder, in_chunks(body, chunk)) == whole
    assert not list(folder.iterdir())
