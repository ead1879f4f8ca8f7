"""The outbox: what a lab answered, kept so that no order is ever answered twice in two ways.

A sealed answer is on the disk before its first byte leaves. Asked again with the very same order,
the lab sends the very same bytes. Asked for the same round in a later slot (secure aggregation
needs fresh masks), it masks the very same noised update anew, which is kept for that, encrypted
under a key of the lab's, until the next round; the update of the round after that is written over
it. So no retry trains again, and none spends anything.

::

    <folder>/<run>/<task>-<round>-<slot>-<order>.sealed    egress record, then the bytes that leave
    <folder>/<run>/<task>-<round>.update                   the noised update, encrypted
    <folder>/<run>/<task>-<round>.draft                    one that nothing was spent for, likewise
    <folder>/<run>/<task>.<kind>.spare                     of a former round, to be written over

    take         what an order asks for: the same bytes, the same update, or work to be done
    keep_update  after training, before the ledger's release: a crash from here on trains no more
    put          sealed answer; it may leave when the egress log has it

Nothing here is readable without a key: sealed answers open at the coordinator only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cytofed.canonical import digest
from cytofed.client.egress import EgressLog, Outgoing
from cytofed.client.storage import KEY_BYTES
from cytofed.errors import CytofedError, InputError, VerificationError
from cytofed.files import write_atomically
from cytofed.privacy import wire
from cytofed.privacy.ledger import AlreadyAnswered, Order
from cytofed.privacy.sealing import TAG_BYTES as _TAG_BYTES
from cytofed.privacy.sealing import Sealed

_NONCE_BYTES = 12
_MAGIC = b"CYTOOUT1"
_LABEL = "cytofed/1/outbox"
_SEALED = re.compile(r"(train|evaluate)-(\d{6,})-(\d{6,})-([0-9a-f]{64})\.sealed")
_DURABLE, _DRAFT = ".update", ".draft"
_UPDATE = re.compile(r"(train|evaluate)-(\d{6,})\.(?:update|draft)")

Header = Mapping[str, int | float | str]
Arrays = Mapping[str, npt.NDArray[Any]]
"""the parts of an update, or of noised scores"""


@dataclass(frozen=True)
class SameBytes:
    """The order was answered: send exactly this again."""

    sealed: bytes = field(repr=False)
    outgoing: Outgoing


@dataclass(frozen=True)
class SameUpdate:
    """The round was trained: seal or mask this update, train nothing."""

    header: Header
    parts: Arrays = field(repr=False)


@dataclass(frozen=True)
class Fresh:
    """Nothing of the order's round is here."""


Answer = SameBytes | SameUpdate | Fresh


@dataclass(frozen=True)
class _UpdateHead:
    """The head of a kept update's file, opened and checked. ``end``: where its body starts."""

    path: Path
    header: Header
    manifest: bytes = field(repr=False)
    digest: bytes
    end: int


class Outbox:
    """One lab's outbox. Each method is on the disk when it returns, unless it is told otherwise.

    ``key``: the lab's storage key. ``log``: the lab's egress log.
    """

    def __init__(self, folder: Path, key: bytes, log: EgressLog) -> None:
        if len(key) != KEY_BYTES:
            raise InputError(f"an outbox key has {KEY_BYTES} bytes, found {len(key)}")
        self.folder = folder
        self._cipher = AESGCM(key)
        self._log = log

    def __repr__(self) -> str:
        return f"Outbox({str(self.folder)!r})"

    def take(self, order: Order) -> Answer:
        """What there is for an order.

        Errors: AlreadyAnswered for an older round, for the same round with other weights or
        another plan, and for a slot that served another order; VerificationError for a file that
        was altered.
        """
        path = self._answered(order)
        return self._same_update(order) if path is None else self._same_bytes(path)

    def keep_update(
        self, order: Order, header: Header, parts: Arrays, *, durable: bool = True
    ) -> None:
        """Keep a round's noised update, encrypted, until one of a later round is written over it.

        ``durable`` off: a draft, for where making it anew spends nothing: a crash of the machine
        may lose it, or leave a part of it, which counts as none.
        Keeping it again changes nothing. Errors: AlreadyAnswered when it is another one.
        """
        kept = self._same_update(order)
        if isinstance(kept, SameUpdate):
            same = list(kept.parts) == list(parts) and all(
                np.array_equal(kept.parts[name], parts[name]) for name in parts
            )
            if not same:
                raise AlreadyAnswered(
                    f"round {order.round} of run {order.run} has another update already"
                )
            return
        pieces = wire.pieces(parts)
        flat = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        head: dict[str, wire.Value] = {
            "header": json.dumps(dict(header)).encode(),
            "manifest": wire.manifest_of(parts).to_bytes(),
            "plan_sha256": order.plan_sha256,
            "weights_sha256": order.weights_sha256,
        }
        nonce = os.urandom(_NONCE_BYTES)
        place = self._place(order)
        small = self._cipher.encrypt(nonce, wire.encode(head), place + b" head")
        # A nonce of its own: the same one under one key would give both plaintexts away.
        body_nonce = os.urandom(_NONCE_BYTES)
        body = np.empty(len(flat) + _TAG_BYTES, np.uint8).data
        self._cipher.encrypt_into(body_nonce, flat, place + hashlib.sha256(small).digest(), body)
        size = len(small).to_bytes(8, "big")
        data = (_MAGIC, size, nonce, small, body_nonce, body)
        path = self._update_path(order, _DURABLE if durable else _DRAFT)
        self._write(path, data, durable=durable, over=_spare(order, path))
        self._forget_before(order)

    def put(self, order: Order, sealed: Sealed, outgoing: Outgoing) -> None:
        """Keep a sealed answer with its egress record, which is written down when it is sent.

        Errors: EgressRefused for what may not leave (nothing is kept then); AlreadyAnswered where
        the order has an answer; CytofedError when the disk is full.
        """
        if (sealed.nbytes, sealed.sha256) != (outgoing.nbytes, outgoing.sha256):
            raise InputError("the egress record is not of these bytes")
        self._log.check(outgoing)
        self._update_head(order)  # refuses an update of other weights
        if self._answered(order) is not None:
            raise AlreadyAnswered(f"the order of round {order.round} has an answer: send that")
        path = self._sealed_path(order)
        tree = {"order": vars(order), "outgoing": outgoing.to_dict()}
        nonce = os.urandom(_NONCE_BYTES)
        head = nonce + self._cipher.encrypt(nonce, json.dumps(tree).encode(), path.name.encode())
        size = len(head).to_bytes(8, "big")
        data = (_MAGIC, size, head, sealed.prefix, sealed.body)
        self._write(path, data, over=_spare(order, path))
        self._forget_before(order)

    def end_run(self, run: str, federation: str) -> None:
        """Forget a finished run."""
        folder = self.folder / _run_name(federation, run)
        for path in sorted(folder.glob("*"), reverse=True):
            path.unlink()
        if folder.is_dir():
            folder.rmdir()

    def _answered(self, order: Order) -> Path | None:
        """Where an order's answer is kept; None where it has none. Errors: as ``take``."""
        folder = self._of_run(order)
        sealed = list(self._sealed(folder, order.task))
        last = max([r for r, *_ in sealed] + self._updated(folder, order.task), default=-1)
        if order.round < last:
            raise AlreadyAnswered(
                f"round {order.round} of run {order.run} was already answered: "
                f"round {last} came after it"
            )
        slots = {slot: (digest, path) for r, slot, digest, path in sealed if r == order.round}
        for _, path in slots.values():
            self._check_same_round(order, self._read_header(path)[0])
        if order.slot in slots:
            digest, path = slots[order.slot]
            if digest != order.order_sha256:
                raise AlreadyAnswered(
                    f"slot {order.slot} of round {order.round}, run {order.run}, served another "
                    "order"
                )
            return path
        if slots and order.slot < max(slots):
            raise AlreadyAnswered(
                f"slot {order.slot} of round {order.round}, run {order.run}, is past: "
                f"slot {max(slots)} was already answered"
            )
        return None

    def _read_header(self, path: Path) -> tuple[Order, Outgoing, int]:
        """Order and egress record of a kept answer, and where its bytes start."""
        start = len(_MAGIC) + 8
        with path.open("rb") as file:
            fixed = file.read(start)
            size = int.from_bytes(fixed[len(_MAGIC) :], "big")
            if fixed[: len(_MAGIC)] != _MAGIC or size > path.stat().st_size:
                raise _altered(path)
            head = file.read(size)
        nonce, small = head[:_NONCE_BYTES], head[_NONCE_BYTES:]
        try:
            tree = json.loads(self._cipher.decrypt(nonce, small, path.name.encode()))
        except (InvalidTag, ValueError):
            raise _altered(path) from None
        return Order(**tree["order"]), Outgoing.from_dict(tree["outgoing"]), start + size

    def _same_bytes(self, path: Path) -> SameBytes:
        _, outgoing, start = self._read_header(path)
        with path.open("rb") as file:
            file.seek(start)
            sealed = file.read()
        if hashlib.sha256(sealed).hexdigest() != outgoing.sha256:
            raise _altered(path)
        return SameBytes(sealed, outgoing)

    def _same_update(self, order: Order) -> SameUpdate | Fresh:
        head = self._update_head(order)
        if head is None:
            return Fresh()
        body = memoryview(head.path.read_bytes())[head.end :]
        nonce, body = bytes(body[:_NONCE_BYTES]), body[_NONCE_BYTES:]
        try:
            flat = self._cipher.decrypt(nonce, body, self._place(order) + head.digest)
        except (InvalidTag, ValueError):
            if head.path.suffix == _DRAFT:
                return Fresh()
            raise _altered(head.path) from None
        return SameUpdate(head.header, wire.unpack(wire.Manifest.from_bytes(head.manifest), flat))

    def _update_head(self, order: Order) -> _UpdateHead | None:
        """What a kept update is; None where there is none, or a draft of which a part is left.

        Errors: AlreadyAnswered where it was made from other weights or for another plan.
        """
        for suffix in (_DURABLE, _DRAFT):
            path = self._update_path(order, suffix)
            if path.exists():
                break
        else:
            return None
        try:
            fields, digest, end = self._read_update_head(path, self._place(order))
        except (InvalidTag, ValueError, wire.MalformedMessage):
            if suffix == _DRAFT:
                return None
            raise _altered(path) from None
        header, manifest = json.loads(fields.raw("header")), fields.raw("manifest")
        plan, weights = fields.text("plan_sha256"), fields.text("weights_sha256")
        if (plan, weights) != (order.plan_sha256, order.weights_sha256):
            raise _other_weights(order)
        return _UpdateHead(path, header, manifest, digest, end)

    def _read_update_head(self, path: Path, place: bytes) -> tuple[wire.Fields, bytes, int]:
        """Fields and digest of a kept update's head, and where it ends.

        Errors: InvalidTag, ValueError, MalformedMessage for what is no such file.
        """
        start = len(_MAGIC) + 8
        with path.open("rb") as file:
            fixed = file.read(start)
            size = int.from_bytes(fixed[len(_MAGIC) :], "big")
            if fixed[: len(_MAGIC)] != _MAGIC or size > path.stat().st_size:
                raise ValueError("not a kept update")
            nonce, small = file.read(_NONCE_BYTES), file.read(size)
            end = file.tell()
        head = self._cipher.decrypt(nonce, small, place + b" head")
        return wire.Fields.of(head, "kept update"), hashlib.sha256(small).digest(), end

    def _check_same_round(self, order: Order, first: Order) -> None:
        if (first.plan_sha256, first.weights_sha256) != (order.plan_sha256, order.weights_sha256):
            raise _other_weights(order)

    def _forget_before(self, order: Order) -> None:
        """Older rounds are answered and done with; called when the new one is on the disk."""
        for path in self._of_run(order).iterdir():
            found = _SEALED.fullmatch(path.name) or _UPDATE.fullmatch(path.name)
            if found and found[1] == order.task and int(found[2]) < order.round:
                spare = _spare(order, path)
                if spare.exists():
                    path.unlink()
                else:
                    path.rename(spare)

    def _sealed(self, folder: Path, task: str) -> Iterator[tuple[int, int, str, Path]]:
        """Round, slot, order hash and path of each kept answer."""
        for path in folder.iterdir() if folder.is_dir() else ():
            found = _SEALED.fullmatch(path.name)
            if found and found[1] == task:
                yield int(found[2]), int(found[3]), found[4], path

    def _updated(self, folder: Path, task: str) -> list[int]:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        found = [_UPDATE.fullmatch(name) for name in names]
        return [int(match[2]) for match in found if match and match[1] == task]

    def _write(
        self, path: Path, data: Sequence[bytes | memoryview], *, over: Path, durable: bool = True
    ) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, data, mode=0o600, durable=durable, over=over)
        except OSError as error:
            raise CytofedError(
                f"the outbox {self.folder} cannot be written: {error.strerror}",
                hint="nothing leaves until it can be: free some disk space",
            ) from error

    def _of_run(self, order: Order) -> Path:
        return self.folder / _run_name(order.federation, order.run)

    def _sealed_path(self, order: Order) -> Path:
        name = f"{order.task}-{order.round:06d}-{order.slot:06d}-{order.order_sha256}.sealed"
        if not _SEALED.fullmatch(name):
            raise InputError(f"order hash {order.order_sha256!r:.80} is not a SHA-256")
        return self._of_run(order) / name

    def _update_path(self, order: Order, suffix: str) -> Path:
        return self._of_run(order) / f"{order.task}-{order.round:06d}{suffix}"

    def _place(self, order: Order) -> bytes:
        """Bound into the encryption: a file moved to another round does not open there."""
        return wire.encode([_LABEL, order.federation, order.run, order.task, order.round])


def _run_name(federation: str, run: str) -> str:
    """A run's folder: its name comes from outside and must not be a path."""
    return digest("cytofed/1/outbox/run", federation, run).hex()[:32]


def _spare(order: Order, path: Path) -> Path:
    """Where what is over is kept, to be written over by the next of its kind."""
    return path.with_name(f"{order.task}{path.suffix}.spare")


def _altered(path: Path) -> VerificationError:
    return VerificationError(
        f"{path} in the outbox was altered or belongs to another lab's key",
        hint="remove it: the round it answers is then missing this lab",
    )


def _other_weights(order: Order) -> AlreadyAnswered:
    return AlreadyAnswered(
        f"round {order.round} of run {order.run} was answered with other weights or another plan"
    )
