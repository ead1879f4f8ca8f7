"""A lab's half of secure aggregation: a frozen state and the steps that answer the coordinator.

Each step takes the state and a request and returns the new state and the reply. **Save the new
state (encrypted: it holds secrets) before the reply leaves**; a slot then never serves twice,
whatever crashes. The same request again gets the same reply. A lie raises an error of the tree in
:mod:`~cytofed.privacy.secagg`; save ``error.state`` then: the lab is out of the run for good.

Secrets are erased as early as they can be: a slot's own key and seed when its vector is masked, the
peers' shares when they are revealed or the slot is passed over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cytofed.errors import InputError
from cytofed.privacy import shares, wire
from cytofed.privacy.identity import Entropy, Identity, sign, verify
from cytofed.privacy.masks import Words, add_masks, check_words
from cytofed.privacy.sealing import Sealed, SealError, check_seal, check_sha256, seal, unseal
from cytofed.privacy.secagg import (
    HASH_BYTES,
    KEY_BYTES,
    LABEL_AGREED,
    LABEL_ANNOUNCE,
    LABEL_BEGIN,
    LABEL_COMPLAINT,
    LABEL_CONVICT,
    LABEL_CONVICTED,
    LABEL_DEALT,
    LABEL_DELIVER,
    LABEL_KEYS,
    LABEL_OPEN,
    LABEL_OPENED,
    LABEL_READY,
    LABEL_REVEAL,
    LABEL_REVEALED,
    LABEL_SHARES,
    LABEL_SURVIVORS,
    MAX_SLOTS,
    ROW_BYTES,
    SHARE_BYTES,
    AlreadyAnswered,
    Cohort,
    Equivocation,
    Fraud,
    OutOfTurn,
    Place,
    Refused,
    Replayed,
    RoundClosed,
    SecaggError,
    Statement,
    Stopped,
    Unreadable,
    WrongKeys,
    WrongRun,
    WrongShares,
    check_agreements,
    check_complaint,
    check_distinct,
    check_fraud,
    check_key_list,
    cut,
    exchange,
    opening_digest,
    public_key,
    read_share_manifest,
    seed_commitment,
    share_hashes,
    statement_digest,
    transcript_digest,
    view_digest,
)

_VERSION = 3
_SET_BYTES = 8  # a survivor set: one bit for each lab of the cohort, at most 40


class Phase(StrEnum):
    """What a lab has answered last in the current set-up."""

    NONE = "none"
    ADVERTISED = "advertised"
    SHARED = "shared"
    READY = "ready"


@dataclass(frozen=True, repr=False)
class LabState:
    """All that a lab remembers of one run's secure aggregation. Start with ``LabState(cohort,
    name)``.

    Holds secrets: keep ``to_bytes`` encrypted.
    """

    cohort: Cohort
    lab: str
    phase: Phase = Phase.NONE
    stopped: str = ""  # what this lab was told that cannot be true; empty while all is well
    # The set-up
    setup: int = 0  # number of the last set-up; they only rise
    next_slot: int = 0  # no slot below was left unused
    first_slot: int = 0
    slots: int = 0
    opening: bytes = b""
    transcript: bytes = b""
    view: bytes = b""
    own_list: bytes = b""  # the signed key list
    keys: bytes = field(default=b"", repr=False)  # own X25519 private keys, one row a slot
    seeds: bytes = field(default=b"", repr=False)  # own self-mask seeds, one row a slot
    order: tuple[str, ...] = ()  # labs by share index, from 1
    dealt: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # until a slot is used
    publics: Mapping[str, bytes] = field(default_factory=dict)  # slot public keys of each lab
    members: tuple[str, ...] = ()
    shares: Mapping[str, bytes] = field(
        default_factory=dict
    )  # by dealer: key and seed share a slot
    # The current round
    round: int = 0
    order_sha256: str = ""
    work_sha256: str = ""  # the same in every attempt at the round
    slot: int | None = None  # of the vector that was masked last
    agreed: bytes = b""  # the statement that was signed for this slot
    revealed: bool = False  # whether shares of this slot were released
    opened: bytes = b""  # rows: a work and the survivors whose sum was opened for it, as bits
    liars: tuple[str, ...] = ()  # who was proven to have dealt shares of another secret
    # Repeats
    answered: tuple[bytes, ...] = ()  # SHA-256 of every request answered in this set-up
    reply: bytes = b""  # the answer to the last of them

    def __post_init__(self) -> None:
        if self.lab not in {public.name for public in self.cohort.labs}:
            raise InputError(f"lab {self.lab!r} is not in its own cohort")

    def __repr__(self) -> str:
        return (
            f"LabState({self.lab!r}, run={self.cohort.run!r}, {self.phase.value}, "
            f"setup={self.setup}, next_slot={self.next_slot}, round={self.round}, "
            f"stopped={self.stopped!r})"
        )

    def to_bytes(self) -> bytes:
        """Everything, secrets too: to be stored encrypted."""
        return wire.encode(
            {
                "agreed": self.agreed,
                "answered": list(self.answered),
                "cohort": self.cohort.to_bytes(),
                "dealt": self.dealt,
                "first_slot": self.first_slot,
                "keys": self.keys,
                "lab": self.lab,
                "liars": list(self.liars),
                "members": list(self.members),
                "next_slot": self.next_slot,
                "opening": self.opening,
                "opened": self.opened,
                "order": list(self.order),
                "order_sha256": self.order_sha256,
                "own_list": self.own_list,
                "phase": self.phase.value,
                "publics": self.publics,
                "reply": self.reply,
                "revealed": int(self.revealed),
                "round": self.round,
                "seeds": self.seeds,
                "setup": self.setup,
                "shares": self.shares,
                "slot": [] if self.slot is None else [self.slot],
                "slots": self.slots,
                "stopped": self.stopped[: wire.MAX_NAME_CHARS],
                "transcript": self.transcript,
                "version": _VERSION,
                "view": self.view,
                "work_sha256": self.work_sha256,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> LabState:
        fields = wire.Fields.of(data, "lab state")
        if (version := fields.uint("version")) != _VERSION:
            raise InputError(f"lab state of version {version}, expected {_VERSION}")
        slot = fields.items("slot")
        state = cls(
            cohort=Cohort.from_bytes(fields.raw("cohort")),
            lab=fields.text("lab"),
            phase=Phase(fields.text("phase")),
            stopped=fields.text("stopped"),
            setup=fields.uint("setup"),
            next_slot=fields.uint("next_slot"),
            first_slot=fields.uint("first_slot"),
            slots=fields.uint("slots"),
            opening=fields.raw("opening"),
            transcript=fields.raw("transcript"),
            view=fields.raw("view"),
            own_list=fields.raw("own_list"),
            keys=fields.raw("keys"),
            seeds=fields.raw("seeds"),
            order=fields.names("order"),
            dealt=fields.blobs("dealt"),
            publics=fields.blobs("publics"),
            members=fields.names("members"),
            shares=fields.blobs("shares"),
            round=fields.uint("round"),
            order_sha256=fields.text("order_sha256"),
            work_sha256=fields.text("work_sha256"),
            slot=slot[0] if slot else None,
            agreed=fields.raw("agreed"),
            revealed=bool(fields.uint("revealed")),
            opened=fields.raw("opened"),
            liars=fields.names("liars"),
            answered=tuple(fields.items("answered")),
            reply=fields.raw("reply"),
        )
        fields.end()
        return state


def advertise(
    state: LabState, identity: Identity, request: bytes, *, entropy: Entropy = os.urandom
) -> tuple[LabState, bytes]:
    """Answer ``begin``: fresh keys and seeds for every slot; the public half, signed in one list.

    Raises WrongRun, Replayed.
    """
    return _answer(
        state,
        request,
        LABEL_BEGIN,
        lambda body: _advertise(state, identity, request, body, entropy),
    )


def share(
    state: LabState, identity: Identity, request: bytes, *, entropy: Entropy = os.urandom
) -> tuple[LabState, bytes]:
    """Answer ``announce``: check everyone's signed keys, then share own secrets among all.

    Raises WrongKeys, Replayed, CohortTooSmall, NotEnoughShares.
    """
    return _answer(
        state, request, LABEL_ANNOUNCE, lambda body: _share(state, identity, body, entropy)
    )


def accept(state: LabState, identity: Identity, request: bytes) -> tuple[LabState, bytes]:
    """Answer ``deliver``: check and keep the shares of the peers; from here on slots can be used.

    Where dealers have signed shares that are not those that they sealed, the answer is a complaint
    of them, and the lab waits for another delivery. Raises WrongShares, Equivocation,
    CohortTooSmall, NotEnoughShares.
    """
    return _answer(state, request, LABEL_DELIVER, lambda body: _accept(state, identity, body))


def open_dealt(state: LabState, identity: Identity, request: bytes) -> tuple[LabState, bytes]:
    """Answer ``call_open``: show the shares that were dealt to each lab that complains of them.

    That lab has them, or says so: nobody learns what it could not tell by itself. Raises
    Equivocation, Unreadable; OutOfTurn once a slot was used.
    """
    return _answer(state, request, LABEL_OPEN, lambda body: _open_dealt(state, identity, body))


def agree(state: LabState, identity: Identity, request: bytes) -> tuple[LabState, bytes]:
    """Answer ``call_survivors``: sign the survivor set, one a slot.

    Raises Equivocation, CohortTooSmall, NotEnoughShares; RoundClosed for another set than that
    whose sum this lab has helped to open for the same work, in this round or an earlier one, less
    the labs that were proven to lie.
    """
    return _answer(state, request, LABEL_SURVIVORS, lambda body: _agree(state, identity, body))


def reveal(state: LabState, identity: Identity, request: bytes) -> tuple[LabState, bytes]:
    """Answer ``call_reveal``: with enough signatures over the set that this lab signed too, release
    the seed share of each survivor and the key share of each dropped member, and erase both.

    Raises Equivocation, BadAgreement, NotEnoughShares.
    """
    return _answer(state, request, LABEL_REVEAL, lambda body: _reveal(state, identity, body))


def convict(state: LabState, identity: Identity, request: bytes) -> tuple[LabState, bytes]:
    """Answer ``call_convict``: see for itself that these labs dealt shares of other secrets than
    they committed to, and help from now on with the sums of those who are left.

    Raises WrongKeys, WrongShares, Equivocation, NotEnoughShares, Unreadable for what is no proof.
    """
    return _answer(state, request, LABEL_CONVICT, lambda body: _convict(state, identity, body))


def mask(
    state: LabState,
    words_W: Words,
    *,
    round: int,
    slot: int,
    order_sha256: str,
    work_sha256: str,
) -> LabState:
    """Mask a vector of ring words in place, using up ``slot``; returns the state to save first.

    ``order_sha256`` is the hash of the whole order, the same at all labs. ``work_sha256`` is that
    of what was computed, the same whenever it is asked for: two vectors with one have the same
    update in them, or nearly. On any error the vector is unchanged.

    Guarantees: no slot is ever used twice; within a round only a later slot with the same work.
    Raises Replayed, Equivocation; AlreadyAnswered, RoundClosed, OutOfTurn, Stopped.
    """
    if state.stopped:  # guard: stopped-mask
        raise Stopped(f"this lab stopped: {state.stopped}")
    check_words(words_W)
    check_sha256("order_sha256", order_sha256)
    check_sha256("work_sha256", work_sha256)
    if round < 1 or slot < 0:
        raise InputError(f"round {round}, slot {slot}: expected a round from 1, a slot from 0")
    try:
        _check_attempt(state, round, slot, work_sha256)
    except Refused:
        raise
    except SecaggError as lie:
        lie.state = replace(state, stopped=lie.message)
        raise
    row = slot - state.first_slot
    own = state.order.index(state.lab) + 1
    place = Place(state.view, round, slot, order_sha256, len(words_W), 8 * words_W.dtype.itemsize)
    key, seed = cut(state.keys, KEY_BYTES, row), cut(state.seeds, KEY_BYTES, row)
    masks = [place.self_mask(seed, own)]
    for peer in state.members:
        if peer != state.lab:
            public = cut(state.publics[peer], KEY_BYTES, row)
            masks.append(place.pair_mask(key, public, own, state.order.index(peer) + 1))
    add_masks(words_W, masks)
    return replace(
        state,
        next_slot=slot + 1,
        keys=_erase(state.keys, (row + 1) * KEY_BYTES),
        seeds=_erase(state.seeds, (row + 1) * KEY_BYTES),
        shares={dealer: _erase(held, row * ROW_BYTES) for dealer, held in state.shares.items()},
        round=round,
        order_sha256=order_sha256,
        work_sha256=work_sha256,
        slot=slot,
        dealt={},
        agreed=b"",
        revealed=False,
    )


def _check_attempt(state: LabState, round: int, slot: int, work_sha256: str) -> None:
    if round < state.round:  # guard: older-round
        raise RoundClosed(f"round {round} was asked again after round {state.round}")
    if round == state.round:
        if work_sha256 != state.work_sha256:  # guard: one-model-a-round
            raise Equivocation(
                f"round {round} came with other global weights than before: "
                f"{work_sha256[:16]}… after {state.work_sha256[:16]}…"
            )
        if slot == state.slot:  # guard: same-vector-again
            raise AlreadyAnswered(
                f"round {round}, slot {slot} was answered", hint="send the same bytes again"
            )
    if slot < state.next_slot:  # guard: slot-reuse
        raise Replayed(f"slot {slot} was used or passed over, the next is {state.next_slot}")
    if state.phase is not Phase.READY:  # guard: mask-before-ready
        raise OutOfTurn("a vector was asked for before the set-up was complete")
    if slot >= state.first_slot + state.slots:  # guard: slot-range
        raise OutOfTurn(
            f"slot {slot} is beyond the set-up, which ends at {state.first_slot + state.slots - 1}",
            hint="make a new set-up",
        )


_Step = Callable[[bytes], tuple[LabState, bytes]]


def _answer(state: LabState, request: bytes, label: str, step: _Step) -> tuple[LabState, bytes]:
    """Run one step on an authentic request; repeats get the same reply, lies stop the lab."""
    if state.stopped:  # guard: stopped
        raise Stopped(f"this lab stopped: {state.stopped}")
    key = hashlib.sha256(request).digest()
    if state.answered and state.answered[-1] == key:
        return state, state.reply
    if key in state.answered:  # guard: answered-before
        raise AlreadyAnswered("this request was answered, and others after it")
    # Not stopped by a bad signature here: anyone on the way could otherwise end the run.
    body = verify(request, label=label, signer=state.cohort.coordinator)
    try:
        new, reply = step(body)
    except Refused:
        raise
    except SecaggError as lie:
        lie.state = replace(state, stopped=lie.message)
        raise
    except wire.MalformedMessage as error:
        unread = Unreadable(error.message)
        unread.state = replace(state, stopped=unread.message)
        raise unread from error
    answered = () if label == LABEL_BEGIN else state.answered
    return replace(new, answered=(*answered, key), reply=reply), reply


def _advertise(
    state: LabState, identity: Identity, request: bytes, body: bytes, entropy: Entropy
) -> tuple[LabState, bytes]:
    fields = wire.Fields.of(body, "begin")
    cohort = state.cohort
    for name in ("federation", "run", "plan_sha256", "roster_sha256"):
        found, approved = fields.text(name), getattr(cohort, name)
        if found != approved:  # guard: approved-run
            raise WrongRun(f"set-up for {name} {found!r}, this lab approved {approved!r}")
    if fields.raw("cohort", HASH_BYTES) != cohort.digest:  # guard: approved-cohort
        raise WrongRun("set-up for another cohort or other rules than this lab approved")
    setup, first, slots = fields.uint("setup"), fields.uint("first_slot"), fields.uint("slots")
    fields.end()
    if setup <= state.setup:  # guard: setup-replay
        raise Replayed(f"set-up {setup} after set-up {state.setup}")
    if first < state.next_slot:  # guard: setup-slots
        raise Replayed(f"set-up from slot {first}, slots below {state.next_slot} were used")
    if not 1 <= slots <= MAX_SLOTS:  # guard: slot-count
        raise Unreadable(f"set-up of {slots} slots, expected 1 to {MAX_SLOTS}")
    opening = opening_digest(request)
    keys, seeds = entropy(slots * KEY_BYTES), entropy(slots * KEY_BYTES)
    rows = range(slots)
    public = b"".join(public_key(cut(keys, KEY_BYTES, row)) for row in rows)
    commitments = b"".join(
        seed_commitment(opening, state.lab, first + row, cut(seeds, KEY_BYTES, row)) for row in rows
    )
    listed = wire.encode({"commitments": commitments, "opening": opening, "public": public})
    own_list = sign(identity, LABEL_KEYS, listed)
    new = LabState(
        cohort,
        state.lab,
        phase=Phase.ADVERTISED,
        setup=setup,
        next_slot=first,
        first_slot=first,
        slots=slots,
        opening=opening,
        own_list=own_list,
        keys=keys,
        seeds=seeds,
        round=state.round,
        order_sha256=state.order_sha256,
        work_sha256=state.work_sha256,
        opened=state.opened,
        liars=state.liars,
    )
    return new, own_list


def _share(
    state: LabState, identity: Identity, body: bytes, entropy: Entropy
) -> tuple[LabState, bytes]:
    if state.phase is not Phase.ADVERTISED:  # guard: share-turn
        raise OutOfTurn("key lists came before this lab advertised its own, or twice")
    fields = wire.Fields.of(body, "announce")
    opening, lists = fields.raw("opening", HASH_BYTES), fields.blobs("lists")
    fields.end()
    if opening != state.opening:  # guard: opening
        raise Replayed("key lists of another set-up than the one this lab advertised for")
    cohort = state.cohort
    order = tuple(sorted(lists))
    cohort.check_size(order, "key lists")  # guard: small-announcement
    if lists.get(state.lab) != state.own_list:  # guard: own-list
        raise WrongKeys("this lab's own key list is missing or was replaced", lab=state.lab)
    publics = {}
    for name in order:
        publics[name] = check_key_list(cohort, opening, state.slots, name, lists[name])[0]
    check_distinct(publics)  # guard: distinct-keys-lab
    for name in order:
        if name != state.lab:
            _check_exchange(state, name, publics[name])
    transcript = transcript_digest(opening, lists)
    rows, reply = _deal(state, identity, order, transcript, entropy)
    held = rows.pop(state.lab)
    new = replace(
        state,
        phase=Phase.SHARED,
        transcript=transcript,
        order=order,
        publics=publics,
        dealt=rows,
        shares={state.lab: held},
    )
    return new, reply


def _check_exchange(state: LabState, name: str, public: bytes) -> None:
    for row in range(state.slots):
        try:
            exchange(cut(state.keys, KEY_BYTES, row), cut(public, KEY_BYTES, row))
        except ValueError as error:
            raise WrongKeys(  # guard: low-order-key
                f"{name} has an unusable key for slot {state.first_slot + row}", lab=name
            ) from error


def _deal(
    state: LabState,
    identity: Identity,
    order: tuple[str, ...],
    transcript: bytes,
    entropy: Entropy,
) -> tuple[dict[str, bytes], bytes]:
    """Shares of all own secrets: the rows by holder, and the signed reply for the peers."""
    secrets = []
    for row in range(state.slots):
        secrets += [cut(state.keys, KEY_BYTES, row), cut(state.seeds, KEY_BYTES, row)]
    holders = shares.split(
        secrets, threshold=state.cohort.threshold, count=len(order), entropy=entropy
    )
    rows = {name: b"".join(held) for name, held in zip(order, holders, strict=True)}
    bundles = {}
    for name in order:
        if name != state.lab:
            bundles[name] = seal_shares(state, identity, name, transcript, rows[name])
    hashes: dict[str, wire.Value] = {
        name: share_hashes(transcript, state.lab, name, state.first_slot, held)
        for name, held in rows.items()
    }
    listed = sign(identity, LABEL_DEALT, wire.encode({"hashes": hashes, "transcript": transcript}))
    return rows, sign(identity, LABEL_SHARES, wire.encode({"bundles": bundles, "dealt": listed}))


def seal_shares(
    state: LabState, identity: Identity, peer: str, transcript: bytes, rows: bytes
) -> bytes:
    """One peer's shares, sealed, with their hashes signed in the open for the coordinator."""
    hashes = share_hashes(transcript, state.lab, peer, state.first_slot, rows)
    sealed = seal(
        rows,
        state.cohort.share_context(state.lab, peer, state.first_slot),
        sender=identity,
        receiver=state.cohort.lab(peer),
        manifest=wire.encode({"hashes": hashes, "transcript": transcript}),
    )
    return sealed.to_bytes()


def _accept(state: LabState, identity: Identity, body: bytes) -> tuple[LabState, bytes]:
    if state.phase is not Phase.SHARED:  # guard: accept-turn
        raise OutOfTurn("shares were delivered before this lab dealt its own, or twice")
    fields = wire.Fields.of(body, "deliver")
    transcript, members = fields.raw("transcript", HASH_BYTES), fields.names("members")
    bundles, opened = fields.blobs("bundles"), fields.blobs("opened")
    fields.end()
    if transcript != state.transcript:  # guard: transcript
        raise Equivocation("shares were delivered for other key lists than this lab was shown")
    state.cohort.check_size(members, "members")  # guard: small-membership
    strangers = sorted(set(members) - set(state.order))
    if strangers or state.lab not in members:  # guard: members
        raise Equivocation(f"members {list(members)} are not those of the key lists")
    if set(bundles) != set(members) - {state.lab}:  # guard: bundles-complete
        raise WrongShares(
            f"shares of {sorted(bundles)}, expected those of every other member {list(members)}"
        )
    held, wrong = dict(state.shares), []
    for dealer, bundle in sorted(bundles.items()):
        rows = _open_shares(state, identity, dealer, bundle, opened.get(dealer, b""))
        if rows:
            held[dealer] = rows
        else:
            wrong.append(dealer)
    if wrong:
        complaint: dict[str, wire.Value] = {"dealers": wrong, "transcript": transcript}
        return state, sign(identity, LABEL_COMPLAINT, wire.encode(complaint))
    view = view_digest(transcript, members)
    new = replace(
        state,
        phase=Phase.READY,
        view=view,
        members=members,
        publics={name: state.publics[name] for name in members},
        shares=held,
    )
    return new, sign(identity, LABEL_READY, wire.encode({"view": view}))


def _open_shares(
    state: LabState, identity: Identity, dealer: str, bundle: bytes, opened: bytes
) -> bytes:
    """A dealer's shares, sealed or shown since; nothing where neither are those that it signed.

    Raises WrongShares, Equivocation for what the dealer did not sign: it was not its lie.
    """
    place = state.cohort.share_context(dealer, state.lab, state.first_slot)
    sender = state.cohort.lab(dealer)
    try:
        sealed = Sealed.from_bytes(bundle)
        manifest = check_seal(sealed, place, sender=sender, receiver=identity.public)
    except SealError as error:
        raise WrongShares(  # guard: bundle-seal
            f"shares of {dealer} do not open: {error.message}", lab=dealer
        ) from error
    transcript, hashes = read_share_manifest(manifest, state.slots, dealer)
    if transcript != state.transcript:  # guard: bundle-transcript
        raise Equivocation(
            f"{dealer} dealt its shares for other key lists than this lab was shown", lab=dealer
        )
    size = state.slots * ROW_BYTES
    try:
        rows = bytes(
            unseal(sealed, place, sender=sender, receiver=identity, max_bytes=size).payload
        )
    except SealError:  # which the dealer signed
        rows = b""
    for found in (rows, opened):
        if len(found) == size:
            made = share_hashes(transcript, dealer, state.lab, state.first_slot, found)
            if made == hashes:  # guard: bundle-hashes
                return found
    return b""


def _open_dealt(state: LabState, identity: Identity, body: bytes) -> tuple[LabState, bytes]:
    if state.phase not in (Phase.SHARED, Phase.READY) or not state.dealt:  # guard: open-turn
        raise OutOfTurn("dealt shares were to be shown before they were dealt, or after their use")
    fields = wire.Fields.of(body, "open")
    transcript, complaints = fields.raw("transcript", HASH_BYTES), fields.blobs("complaints")
    fields.end()
    if transcript != state.transcript:  # guard: open-transcript
        raise Equivocation("dealt shares were to be shown for other key lists")
    shown = {}
    for name, document in complaints.items():
        dealers = check_complaint(state.cohort, transcript, name, document)
        if state.lab not in dealers or name not in state.dealt:  # guard: open-accused
            raise Equivocation(f"{name} does not complain of this lab's shares", lab=name)
        shown[name] = state.dealt[name]
    reply: dict[str, wire.Value] = {"rows": shown, "transcript": transcript}
    return state, sign(identity, LABEL_OPENED, wire.encode(reply))


def _agree(state: LabState, identity: Identity, body: bytes) -> tuple[LabState, bytes]:
    statement = Statement.from_bytes(body)
    if state.phase is not Phase.READY or state.slot is None:  # guard: agree-turn
        raise OutOfTurn("a survivor set came before this lab masked a vector")
    if statement.view != state.view:  # guard: view
        raise Equivocation("survivor set for other keys or members than this lab was shown")
    if (statement.round, statement.slot) != (state.round, state.slot):  # guard: current-attempt
        raise OutOfTurn(
            f"survivor set for round {statement.round}, slot {statement.slot}; this lab's last "
            f"vector was for round {state.round}, slot {state.slot}"
        )
    if statement.order_sha256 != state.order_sha256:  # guard: agreed-order
        raise Equivocation(
            f"survivor set for the order {statement.order_sha256[:16]}…, this lab was given "
            f"{state.order_sha256[:16]}…: labs were told different things"
        )
    strangers = sorted(set(statement.survivors) - set(state.members))
    if strangers:  # guard: survivors-known
        raise Equivocation(f"survivors {strangers} are not members")
    if state.lab not in statement.survivors:  # guard: called-dropped
        raise Equivocation("this lab answered, but is missing in the survivor set")
    state.cohort.check_size(statement.survivors, "survivor set")  # guard: small-survivor-set
    if state.agreed and body != state.agreed:  # guard: one-set-a-slot
        signed = Statement.from_bytes(state.agreed).survivors
        raise Equivocation(
            f"two survivor sets for round {state.round}, slot {state.slot}: {list(signed)}, then "
            f"{list(statement.survivors)}"
        )
    before = _opened_for(state)
    if before and set(statement.survivors) != before - set(state.liars):  # guard: one-set-a-model
        raise RoundClosed(
            f"a sum of this model over other labs than {list(statement.survivors)} was opened: "
            "a second one would show the difference, which is the update of few labs",
            hint="go on with another model, or with the same labs",
        )
    new = replace(state, agreed=body)
    return new, sign(identity, LABEL_AGREED, body)


def _reveal(state: LabState, identity: Identity, body: bytes) -> tuple[LabState, bytes]:
    fields = wire.Fields.of(body, "reveal")
    statement, agreements = fields.raw("statement"), fields.blobs("agreements")
    fields.end()
    if state.slot is None or not state.agreed:  # guard: reveal-turn
        raise OutOfTurn("shares were asked for before this lab signed a survivor set")
    if statement != state.agreed:  # guard: reveal-statement
        raise Equivocation("shares were asked for another survivor set than this lab signed")
    if state.revealed:  # guard: reveal-once
        raise AlreadyAnswered(f"shares of slot {state.slot} were released")
    survivors = Statement.from_bytes(statement).survivors
    check_agreements(state.cohort, statement, survivors, agreements)  # guard: agreements
    row = state.slot - state.first_slot
    released = {}
    for name in state.members:
        # One kind of secret of each member: the seed of a survivor, the key of a dropped lab.
        kind = 1 if name in survivors else 0
        released[name] = cut(cut(state.shares[name], ROW_BYTES, row), SHARE_BYTES, kind)
    new = replace(
        state,
        shares={name: _erase(held, (row + 1) * ROW_BYTES) for name, held in state.shares.items()},
        revealed=True,
        opened=state.opened if _opened_for(state) else state.opened + _row(state, survivors),
    )
    reply = wire.encode({"shares": released, "statement": statement_digest(statement)})
    return new, sign(identity, LABEL_REVEALED, reply)


def _convict(state: LabState, identity: Identity, body: bytes) -> tuple[LabState, bytes]:
    fields = wire.Fields.of(body, "convict")
    frauds = fields.blobs("frauds")
    fields.end()
    for dealer, proof in frauds.items():
        check_fraud(state.cohort, dealer, Fraud.from_bytes(proof))  # guard: fraud
    liars = sorted({*state.liars, *frauds})
    reply = sign(identity, LABEL_CONVICTED, wire.encode({"liars": liars}))
    return replace(state, liars=tuple(liars)), reply


def _opened_for(state: LabState) -> frozenset[str]:
    """The survivors whose sum of the current work was opened; none without one."""
    work, size = bytes.fromhex(state.work_sha256), HASH_BYTES + _SET_BYTES
    for row in range(len(state.opened) // size):
        found = cut(state.opened, size, row)
        if found.startswith(work):
            bits = int.from_bytes(found[HASH_BYTES:], "big")
            labs = enumerate(state.cohort.labs)
            return frozenset(lab.name for index, lab in labs if bits >> index & 1)
    return frozenset()


def _row(state: LabState, survivors: tuple[str, ...]) -> bytes:
    labs = enumerate(state.cohort.labs)
    bits = sum(1 << index for index, lab in labs if lab.name in survivors)
    return bytes.fromhex(state.work_sha256) + bits.to_bytes(_SET_BYTES, "big")


def _erase(rows: bytes, upto: int) -> bytes:
    return bytes(upto) + rows[upto:]
