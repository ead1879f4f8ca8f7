"""Whoever reaches the port, with a certificate or without, gets no further than they may."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import secrets
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cytofed.client.directory import ClientDirectory, pinned_context
from cytofed.documents import LABEL_ENROL
from cytofed.messages import RAW, array_of
from cytofed.objects import deflate
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, sign
from cytofed.server.gate import FLEET_BODIES, LEAVE, RENEW

from .conftest import PLAN, Federation, deal, free_port


@dataclass
class Caller:
    """Someone at the port: with a lab's certificate and key, or with neither."""

    http: httpx.Client
    directory: ClientDirectory | None = None

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def headers(self, age_s: float = 0.0, stamp: str = "") -> dict[str, str]:
        """Flower's signed headers, made ``age_s`` ago, or with the time as ``stamp`` says it."""
        found = {"content-type": PROTOBUF_MEDIA_TYPE}
        if self.directory is None:
            return found
        key = self.directory.node_key()
        stamp = stamp or (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
        public = public_key_to_bytes(key.public_key())
        signature = sign_message(key, stamp.encode())
        return found | {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        }

    def post(self, call: str, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.http.post(f"/v1/fleet/{call}", content=body, headers=headers or self.headers())

    def activate(self) -> int:
        """Go online; the node id."""
        assert self.directory is not None
        key = public_key_to_bytes(self.directory.node_key().public_key())
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=30)
        response = self.post("activate-node", request.SerializeToString())
        assert response.status_code == 200
        answer = ActivateNodeResponse()
        answer.ParseFromString(response.content)
        return int(answer.node_id)


@dataclass
class Port:
    """A coordinator with two labs, whose daemons do not run: their keys are ours to misuse."""

    federation: Federation
    url: str

    def caller(
        self, lab: str = "", *, certificate_of: str = "", address: str = "127.0.0.1"
    ) -> Caller:
        root = self.federation.root
        context = pinned_context(root / "lab-1" / "ca.pem")
        directory = ClientDirectory.open(root / lab) if lab else None
        owner = certificate_of or lab
        if owner:
            context.load_cert_chain(root / owner / "certificate.pem", root / owner / "node.key")
        transport = httpx.HTTPTransport(verify=context, local_address=address)
        return Caller(httpx.Client(transport=transport, base_url=self.url, timeout=30), directory)

    def announced(self, path: str, length: int) -> int:
        """The status of a request that announces a body and sends none of it."""
        context = pinned_context(self.federation.root / "lab-1" / "ca.pem")
        plain = socket.create_connection(("127.0.0.1", self.federation.port), timeout=30)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
            connection.sendall(head.encode())
            return int(connection.recv(4096).split()[1])

    def healthy(self) -> bool:
        return self.caller().http.get("/health").json()["ok"] is True


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Port]:
    root = tmp_path_factory.mktemp("hostile")
    labs = ("lab-1", "lab-2")
    deal(sample, root, labs, each=1)
    federation = Federation(root, labs, free_port())
    try:
        federation.found()
        yield Port(federation, f"https://127.0.0.1:{federation.port}")
    finally:
        federation.kill_all()


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/runtime/acquire-task",
     "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab",
     "/v1/fleet/get-run", "/v1/fleet/", "/v1/fleet/../control/start-run", "//v1/enrol"],
)  # fmt: skip
def test_only_known_paths_answer(port: Port, path: str) -> None:
    assert port.caller("lab-1").http.post(path, content=b"").status_code == 404
    assert port.caller().http.get(path).status_code == 404


def test_fleet_needs_a_certificate_of_the_roster_for_the_key_that_signs(port: Port) -> None:
    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    assert port.caller().post("pull-messages", body).status_code == 403
    without = port.caller("lab-1", certificate_of="lab-2")
    assert without.post("pull-messages", body).status_code == 403
    unsigned = {"content-type": PROTOBUF_MEDIA_TYPE}
    assert port.caller("lab-1").post("pull-messages", body, unsigned).status_code == 403


def test_certificate_of_another_authority_is_refused_in_the_handshake(
    port: Port, tmp_path: Path
) -> None:
    from cytofed.server import pki

    authority = pki.new_authority("fed")
    foreign = pki.new_server_certificate(authority, ("localhost",))
    (tmp_path / "c.pem").write_bytes(foreign.certificate)
    (tmp_path / "k.pem").write_bytes(foreign.key)
    context = pinned_context(port.federation.root / "lab-1" / "ca.pem")
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{port.url}/health", verify=context)


def test_nothing_older_than_tls_1_3_is_spoken(port: Port) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(port.federation.root / "lab-1" / "ca.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{port.url}/health", verify=context)


@pytest.mark.parametrize("age_s", [400.0, -60.0])
def test_stale_and_future_signatures_are_refused(port: Port, age_s: float) -> None:
    lab = port.caller("lab-1")
    body = PullMessagesRequest(node=Node(node_id=lab.activate())).SerializeToString()
    assert lab.post("pull-messages", body, lab.headers(age_s)).status_code == 401


def test_lab_cannot_act_as_another_node(port: Port) -> None:
    one, two = port.caller("lab-1"), port.caller("lab-2")
    victim = one.activate()
    two.activate()
    asked: dict[str, Any] = {
        "pull-messages": PullMessagesRequest(node=Node(node_id=victim)),
        "deactivate-node": DeactivateNodeRequest(node_id=victim),
        "send-node-heartbeat": SendNodeHeartbeatRequest(
            node=Node(node_id=victim), heartbeat_interval=30
        ),
        "pull-object": PullObjectRequest(node=Node(node_id=victim), object_id="a" * 64),
        "confirm-message-received": ConfirmMessageReceivedRequest(
            node=Node(node_id=victim), message_object_id="a" * 64
        ),
        "push-messages": PushMessagesRequest(node=Node(node_id=victim)),
        "push-object": PushObjectRequest(node=Node(node_id=victim), object_id="a" * 64),
    }
    for call, request in asked.items():
        assert two.post(call, request.SerializeToString()).status_code == 401, call


def test_session_of_another_lab_is_not_taken_over(port: Port) -> None:
    one, two = port.caller("lab-1"), port.caller("lab-2")
    victim = one.activate()
    assert one.activate() == victim  # the lab itself may: it was restarted
    assert one.directory is not None
    key = public_key_to_bytes(one.directory.node_key().public_key())
    request = ActivateNodeRequest(public_key=key, heartbeat_interval=30).SerializeToString()
    assert two.post("activate-node", request).status_code == 401


def test_recorded_headers_are_of_no_use_on_another_connection(port: Port) -> None:
    one, two = port.caller("lab-1"), port.caller("lab-2")
    body = PullObjectRequest(node=Node(node_id=one.activate()), object_id="a" * 64)
    recorded = one.headers()
    assert one.post("pull-object", body.SerializeToString(), recorded).status_code == 403  # unknown
    for thief in (two, port.caller()):
        answer = thief.post("pull-object", body.SerializeToString(), recorded)
        assert answer.status_code == 403
        assert answer.content == b""


def test_time_without_a_zone_and_other_content_types_are_refused(port: Port) -> None:
    lab = port.caller("lab-1")
    body = PullMessagesRequest(node=Node(node_id=lab.activate())).SerializeToString()
    naive = lab.headers(stamp=datetime.now().isoformat())
    assert lab.post("pull-messages", body, naive).status_code == 401
    other = lab.headers() | {"content-type": "application/json"}
    assert lab.post("pull-messages", b"{}", other).status_code == 415
    chunked = lab.http.post("/v1/fleet/pull-messages", content=iter([body]), headers=lab.headers())
    assert chunked.status_code == 411


def test_requests_for_what_is_not_there_are_refused(port: Port) -> None:
    lab = port.caller("lab-1")
    node = Node(node_id=lab.activate())
    asked: dict[str, tuple[Any, int]] = {
        "push-messages": (PushMessagesRequest(node=node), 400),
        "pull-object": (PullObjectRequest(node=node, run_id=77, object_id="a" * 64), 403),
        "push-object": (PushObjectRequest(node=node, run_id=77, object_id="a" * 64), 403),
    }
    for call, (request, status) in asked.items():
        assert lab.post(call, request.SerializeToString()).status_code == status, call


def test_bodies_are_limited_before_anyone_is_authenticated(port: Port) -> None:
    stranger = port.caller()
    for path, limit in FLEET_BODIES.items():
        assert port.announced(path, limit + 1) == 413, path
    assert stranger.http.post("/v1/enrol", content=b"x" * (1 << 17)).status_code == 413
    chunked = stranger.http.post("/v1/enrol", content=iter([b"x" * 1000] * 3))
    assert chunked.status_code == 411


def test_another_labs_objects_and_replies_are_out_of_reach(port: Port) -> None:
    one, two = port.caller("lab-1"), port.caller("lab-2")
    mine, other = one.activate(), two.activate()
    federation = port.federation
    run, _ = federation.queue(PLAN.replace("min_labs: 3", "min_labs: 2"))
    try:
        request = PullMessagesRequest(node=Node(node_id=mine)).SerializeToString()
        found = PullMessagesResponse()

        def offered() -> bool:
            found.ParseFromString(one.post("pull-messages", request).content)
            return bool(found.messages_list)

        federation.until(offered, "lab-1 has an offer")
        tree, head = found.message_object_trees[0], found.messages_list[0]
        run_id = head.metadata.run_id
        thefts: dict[str, Any] = {
            "pull-object": PullObjectRequest(
                node=Node(node_id=other), run_id=run_id, object_id=tree.object_id
            ),
            "confirm-message-received": ConfirmMessageReceivedRequest(
                node=Node(node_id=other), run_id=run_id, message_object_id=tree.object_id
            ),
            "push-object": PushObjectRequest(
                node=Node(node_id=other), run_id=run_id, object_id=tree.object_id,
                object_content=b"x", session_id="guess",
            ),
        }  # fmt: skip
        reply = Message(Error(100, "forged"), reply_to=message_from_proto(head))
        objects = deflate(reply)
        thefts["push-messages"] = PushMessagesRequest(
            node=Node(node_id=other), messages_list=[message_to_proto(objects.head)],
            message_object_trees=[objects.tree],
        )  # fmt: skip
        for call, theft in thefts.items():
            assert two.post(call, theft.SerializeToString()).status_code == 403, call
        own = PullObjectRequest(node=Node(node_id=mine), run_id=run_id, object_id=tree.object_id)
        assert one.post("pull-object", own.SerializeToString()).status_code == 200
    finally:
        federation.run("coordinator", "server", "stop-run", federation.coordinator, run)
        assert federation.summary(run)["status"] == "failed"

    def withdrawn() -> bool:
        return one.post("pull-object", own.SerializeToString()).status_code == 403

    federation.until(withdrawn, "the offer is withdrawn")


def chain(depth: int, *, closed: bool = False) -> ObjectTree:
    """Each object in the next, and once more beside it, where it has no children: read as one, it
    has 2^depth. ``closed``: the innermost is the outermost."""
    tree = ObjectTree(object_id=f"{depth if closed else 0:064x}")
    for number in range(1, depth + 1):
        children = [tree, ObjectTree(object_id=tree.object_id)]
        tree = ObjectTree(object_id=f"{number:064x}", children=children)
    return tree


HOSTILE_TREES = {
    "doubling": chain(60),
    "cycle": chain(3, closed=True),
    "itself": ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="a" * 64)]),
    "deep": chain(90),
    "wide": ObjectTree(
        object_id="a" * 64, children=[ObjectTree(object_id=f"{n:064x}") for n in range(9000)]
    ),
    "path": ObjectTree(object_id="../../server.key"),
}


@pytest.fixture
def offered(port: Port) -> Iterator[tuple[Caller, int, Any]]:
    """A lab with an offer in hand: who calls, its node, and the offer as it came."""
    one, federation = port.caller("lab-1"), port.federation
    node = one.activate()
    run, _ = federation.queue(PLAN.replace("min_labs: 3", "min_labs: 2"))
    request = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    found = PullMessagesResponse()

    def asked() -> bool:
        found.ParseFromString(one.post("pull-messages", request).content)
        return bool(found.messages_list)

    try:
        federation.until(asked, "lab-1 has an offer")
        yield one, node, found
    finally:
        federation.run("coordinator", "server", "stop-run", federation.coordinator, run)
        assert federation.summary(run)["status"] == "failed"
    spool = federation.coordinator / "spool"
    federation.until(lambda: not any(spool.iterdir()), "nothing of the reply is left")


def announced(node: int, reply: Message, tree: ObjectTree | None = None) -> PushMessagesRequest:
    """The announcement of a reply; ``tree``: a lie about what it consists of."""
    objects = deflate(reply)
    head = message_to_proto(objects.head)
    if tree is not None:
        head.metadata.message_id = tree.object_id
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[head],
        message_object_trees=[objects.tree if tree is None else tree],
        clientapp_runtime_list=[0.0],
    )


def test_no_tree_of_objects_keeps_the_coordinator_busy_or_stays_with_it(
    port: Port, offered: tuple[Caller, int, Any]
) -> None:
    lab, node, found = offered
    coordinator = port.federation.running["coordinator"]
    before = memory_of(coordinator.pid)
    reply = Message(RecordDict(), reply_to=message_from_proto(found.messages_list[0]))
    for name, tree in HOSTILE_TREES.items():
        body = announced(node, reply, tree).SerializeToString()
        assert lab.post("push-messages", body).status_code == 400, name
    full = announced(node, reply)
    full.messages_list[0].content.items.add().key = "inline"
    assert lab.post("push-messages", full.SerializeToString()).status_code == 413
    assert memory_of(coordinator.pid) - before < 30 << 20
    assert lab.post("push-messages", announced(node, reply).SerializeToString()).status_code == 200


def test_a_reply_has_its_room_once_however_often_it_is_announced(
    offered: tuple[Caller, int, Any],
) -> None:
    lab, node, found = offered
    record = ArrayRecord()
    for name in ("a", "b", "c"):
        data = os.urandom(2 << 20)
        record[name] = array_of("uint8", (len(data),), RAW, memoryview(data))
    head = message_from_proto(found.messages_list[0])
    reply = Message(RecordDict({"parts": record}), reply_to=head)
    objects, request = deflate(reply), announced(node, reply)

    def push(number: str, session: str) -> int:
        asked = PushObjectRequest(
            node=Node(node_id=node), run_id=head.metadata.run_id, object_id=number,
            object_content=objects.content(number), session_id=session,
        )  # fmt: skip
        return lab.post("push-object", asked.SerializeToString()).status_code

    large = [number for number, size in objects.sizes().items() if size > 1 << 20]
    statuses = []
    for number in large:  # each in a session of its own
        answer = PushMessagesResponse()
        answer.ParseFromString(lab.post("push-messages", request.SerializeToString()).content)
        assert number in answer.objects_to_push
        statuses.append(push(number, answer.session_id))
    assert statuses == [200, 400, 400]  # an offer's answer may have 4 MiB


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    call=st.sampled_from([path.rpartition("/")[2] for path in FLEET_BODIES]),
    body=st.binary(max_size=2000),
)
def test_no_body_of_an_enrolled_lab_crashes_the_coordinator(
    port: Port, call: str, body: bytes
) -> None:
    lab = port.caller("lab-2")
    assert lab.post(call, body).status_code in (400, 401, 403, 413, 415, 422)
    assert port.healthy()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from([RENEW, LEAVE]), body=st.binary(max_size=500))
def test_no_body_renews_a_certificate_or_takes_a_lab_off_the_roster(
    port: Port, path: str, body: bytes
) -> None:
    assert port.caller("lab-2").http.post(path, content=body).status_code in (400, 429)
    assert port.caller().http.post(path, content=body).status_code == 403
    assert port.healthy()


@pytest.mark.parametrize("body", [b"", b"{}", os.urandom(500), b"\x82\x40\x40", b"\x80" * 4000])
def test_garbage_does_not_enrol(port: Port, body: bytes) -> None:
    assert port.caller().http.post("/v1/enrol", content=body).status_code == 400


def test_failed_enrolments_of_one_address_do_not_stop_those_of_another(
    port: Port, tmp_path: Path
) -> None:
    with port.caller(address="127.0.0.9") as stranger:
        answers = [stranger.http.post("/v1/enrol", content=b"guess") for _ in range(40)]
    assert [answer.status_code for answer in answers] == [400] * 30 + [429] * 10
    federation = port.federation
    invite = tmp_path / "lab-8.invite"
    federation.run("c", "server", "invite", federation.coordinator, "lab-8", "--out", invite)
    federation.run(
        "lab-8", "client", "join", invite, "--dir", tmp_path / "lab-8",
        "--data", federation.data("lab-1"),
    )  # fmt: skip


def test_idle_connections_lock_no_lab_out(port: Port) -> None:
    [coordinator] = port.federation.running.values()
    before = resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE, (300, before[1]))
    links = [socket.create_connection(("127.0.0.1", port.federation.port)) for _ in range(600)]
    try:
        assert port.caller("lab-1").activate()
        assert port.healthy()
    finally:
        for link in links:
            link.close()
        resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE, before)


def test_heads_without_end_take_no_memory(port: Port) -> None:
    [coordinator] = port.federation.running.values()
    before = memory_of(coordinator.pid)
    context = pinned_context(port.federation.root / "lab-1" / "ca.pem")
    links = []
    try:
        for _ in range(4):
            plain = socket.create_connection(("127.0.0.1", port.federation.port), timeout=30)
            links.append(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            links[-1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
            with contextlib.suppress(OSError):  # it has had enough
                for number in range(1000):
                    links[-1].sendall(b"x-%d: " % number + b"x" * 10_000 + b"\r\n")
        assert memory_of(coordinator.pid) - before < 30 << 20
    finally:
        for link in links:
            link.close()
    assert port.healthy()


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kind", ["none", "rsa", "ed25519", "curve", "algorithm", "version"])
def test_invited_lab_gets_an_error_for_a_request_that_is_none(port: Port, kind: str) -> None:
    federation = port.federation
    file = federation.root / f"{kind}.invite"
    federation.run("c", "server", "invite", federation.coordinator, "lab-7", "--out", file)
    token = json.loads(file.read_text())["token"]
    identity = Identity.generate("lab-7")
    body = wire.encode(
        {
            "declared_patients": 0,
            "fingerprint": identity.public.fingerprint,
            "request": csr(kind),
            "token": token,
        }
    )
    document = wire.encode([identity.public.to_bytes(), sign(identity, LABEL_ENROL, body)])
    assert port.caller().http.post("/v1/enrol", content=document).status_code == 400


def csr(kind: str) -> bytes:
    """A certificate request that nobody should sign, or something that is none: one of another
    key, or of a curve, an algorithm or a version that there is not."""
    key: Any = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }.get(kind, lambda: ec.generate_private_key(ec.SECP384R1()))()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    made = builder.sign(key, None if kind == "ed25519" else hashes.SHA256())
    der = made.public_bytes(serialization.Encoding.DER)
    if kind == "curve":
        der = der.replace(bytes.fromhex("06052b81040022"), bytes.fromhex("06052b8104007f"))
    if kind == "algorithm":
        der = der.replace(bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f"))
    if kind == "version":
        der = der.replace(bytes.fromhex("020100"), bytes.fromhex("020101"), 1)
    text = base64.encodebytes(b"" if kind == "none" else der)
    kind_of = b"CERTIFICATE REQUEST-----\n"
    return b"-----BEGIN " + kind_of + text + b"-----END " + kind_of


def test_invite_is_good_once_and_a_guess_is_never(port: Port, tmp_path: Path) -> None:
    federation = port.federation
    invite = json.loads((federation.root / "lab-1.invite").read_text())
    for number, token in enumerate((invite["token"], secrets.token_urlsafe(32))):
        file = tmp_path / f"{number}.invite"
        file.write_text(json.dumps({**invite, "token": token}))
        federation.run(
            "thief", "client", "join", file, "--dir", tmp_path / f"thief-{number}",
            "--data", federation.data("lab-1"), code=3,
        )  # fmt: skip


def test_invite_with_another_fingerprint_is_not_joined(port: Port, tmp_path: Path) -> None:
    federation = port.federation
    invite = tmp_path / "lab-9.invite"
    federation.run("c", "server", "invite", federation.coordinator, "lab-9", "--out", invite)
    told = json.loads(invite.read_text())
    invite.write_text(json.dumps({**told, "fingerprint": "0" * 64}))
    federation.run(
        "lab-9", "client", "join", invite, "--dir", tmp_path / "lab-9",
        "--data", federation.data("lab-1"), code=5,
    )  # fmt: skip
    assert not (tmp_path / "lab-9" / "certificate.pem").exists()


def test_revoked_lab_is_out_at_once_and_its_keys_do_not_come_back(port: Port) -> None:
    federation = port.federation
    lab = port.caller("lab-2")
    node = lab.activate()
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    federation.run("coordinator", "server", "revoke", federation.coordinator, "lab-2")
    assert lab.post("pull-messages", body).status_code == 403
    assert port.healthy()
