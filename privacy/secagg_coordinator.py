"""The coordinator's half of secure aggregation: requests, checks of every reply, and the unmasking.

Each ``check_...`` takes one lab's reply and raises an error that names the lab: leave it out and go
on with the rest, down to the threshold. Nothing is kept that a restart would miss: after a crash
make a new set-up. **Save the set-up's number and its last slot before ``begin`` is sent**: both
only rise, and a lab takes a repeat for a lie. Call no survivors whose sum is of no use: labs open
no other sum of the same work.

The masked vectors travel sealed, one of each lab, with round and slot in their context, and are
summed as they come (:func:`~cytofed.privacy.masks.add_words`): memory does not grow with the labs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cytofed.errors import InputError
from cytofed.privacy import shares, wire
from cytofed.privacy.identity import Identity, SignatureError, sign, verify
from cytofed.privacy.masks import Mask, Words, add_masks, check_words
from cytofed.privacy.sealing import Sealed, SealError, check_seal
from cytofed.privacy.secagg import (
    HASH_BYTES,
    KEY_BYTES,
    LABEL_AGREED,
    LABEL_ANNOUNCE,
    LABEL_BEGIN,
    LABEL_COMPLAINT,
    LABEL_CONVICT,
    LABEL_CONVICTED,
    LABEL_DELIVER,
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
    BadAgreement,
    Cohort,
    Equivocation,
    Fraud,
    Kind,
    NotEnoughShares,
    Place,
    Statement,
    Unreadable,
    WrongShares,
    check_agreements,
    check_complaint,
    check_distinct,
    check_fraud,
    check_key_list,
    cut,
    opening_digest,
    public_key,
    read_dealt,
    read_share_manifest,
    seed_commitment,
    share_digest,
    share_hashes,
    statement_digest,
    transcript_digest,
    view_digest,
)


@dataclass(frozen=True)
class Opening:
    """A set-up that has begun. Send ``request`` to every lab of the cohort."""

    cohort: Cohort
    setup: int
    first_slot: int
    slots: int
    request: bytes = field(repr=False)
    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class Announcement:
    """All signed key lists. Send ``request`` to every lab in ``order``."""

    opening: Opening
    order: tuple[str, ...]  # labs by share index, from 1
    publics: Mapping[str, bytes] = field(repr=False)
    commitments: Mapping[str, bytes] = field(repr=False)
    lists: Mapping[str, bytes] = field(repr=False)
    transcript: bytes = field(repr=False)
    request: bytes = field(repr=False)


@dataclass(frozen=True)
class Dealt:
    """One lab's checked reply to the announcement: sealed shares and their hashes, by peer."""

    bundles: Mapping[str, bytes] = field(repr=False)
    hashes: Mapping[str, bytes] = field(repr=False)
    """of the shares that it keeps itself too"""
    signed: bytes = field(repr=False)
    """the same, signed by the dealer"""


Opened = Mapping[str, bytes]
"""the shares that a dealer shows, by the lab that complained of them"""


@dataclass(frozen=True)
class Setup:
    """A complete set-up: send each member its own of ``requests``; slots can then be used."""

    announcement: Announcement
    members: tuple[str, ...]
    view: bytes = field(repr=False)
    dealt: Mapping[str, Dealt] = field(repr=False)
    requests: Mapping[str, bytes] = field(repr=False)

    @property
    def cohort(self) -> Cohort:
        return self.announcement.opening.cohort

    @property
    def slots(self) -> range:
        opening = self.announcement.opening
        return range(opening.first_slot, opening.first_slot + opening.slots)


@dataclass(frozen=True)
class Poll:
    """A survivor set to be agreed on. Send ``request`` to every survivor."""

    setup: Setup
    statement: Statement
    request: bytes = field(repr=False)


def begin(
    cohort: Cohort, identity: Identity, *, setup: int, first_slot: int, slots: int
) -> Opening:
    """Open set-up number ``setup`` (from 1) for ``slots`` vectors from ``first_slot`` on."""
    if setup < 1 or first_slot < 0 or not 1 <= slots <= MAX_SLOTS:
        raise InputError(
            f"set-up {setup} of {slots} slots from {first_slot}: expected a number from 1 and "
            f"1 to {MAX_SLOTS} slots"
        )
    body = wire.encode(
        {
            "cohort": cohort.digest,
            "federation": cohort.federation,
            "first_slot": first_slot,
            "plan_sha256": cohort.plan_sha256,
            "roster_sha256": cohort.roster_sha256,
            "run": cohort.run,
            "setup": setup,
            "slots": slots,
        }
    )
    request = sign(identity, LABEL_BEGIN, body)
    return Opening(cohort, setup, first_slot, slots, request, opening_digest(request))


def check_keys(opening: Opening, lab: str, reply: bytes) -> tuple[bytes, bytes]:
    """One lab's public keys and commitments; raises WrongKeys or Unreadable with its name."""
    with _blaming(lab):
        return check_key_list(opening.cohort, opening.digest, opening.slots, lab, reply)


def announce(opening: Opening, identity: Identity, lists: Mapping[str, bytes]) -> Announcement:
    """Put all checked key lists before everyone.

    Raises CohortTooSmall, NotEnoughShares, and WrongKeys with the name of a lab to leave out.
    """
    order = tuple(sorted(lists))
    opening.cohort.check_size(order, "key lists")  # guard: too-few-lists
    publics, commitments = {}, {}
    for lab in order:
        publics[lab], commitments[lab] = check_keys(opening, lab, lists[lab])
    check_distinct(publics)  # guard: distinct-keys-coordinator
    body = wire.encode({"lists": lists, "opening": opening.digest})
    return Announcement(
        opening,
        order,
        publics,
        commitments,
        dict(lists),
        transcript_digest(opening.digest, dict(lists)),
        sign(identity, LABEL_ANNOUNCE, body),
    )


def check_shares(announcement: Announcement, lab: str, reply: bytes) -> Dealt:
    """One lab's sealed shares, checked as far as the coordinator can see.

    Raises WrongShares, Equivocation or Unreadable with the lab's name.
    """
    opening = announcement.opening
    cohort = opening.cohort
    with _blaming(lab):
        fields = _reply(cohort, lab, LABEL_SHARES, reply)
        bundles, signed = fields.blobs("bundles"), fields.raw("dealt")
        fields.end()
        hashes = read_dealt(cohort, announcement.transcript, lab, signed)
    everyone = set(announcement.order)
    if set(bundles) != everyone - {lab} or set(hashes) != everyone:  # guard: dealt-complete
        raise WrongShares(f"{lab} did not deal shares to every peer", lab=lab)
    for peer, bundle in bundles.items():
        try:
            manifest = check_seal(
                Sealed.from_bytes(bundle),
                cohort.share_context(lab, peer, opening.first_slot),
                sender=cohort.lab(lab),
                receiver=cohort.lab(peer),
            )
            transcript, told = read_share_manifest(manifest, opening.slots, lab)
        except (SealError, wire.MalformedMessage) as error:
            raise WrongShares(  # guard: dealt-seal
                f"shares of {lab} for {peer}: {error.message}", lab=lab
            ) from error
        if transcript != announcement.transcript:  # guard: dealt-manifest
            raise Equivocation(f"{lab} dealt {peer} shares for other key lists", lab=lab)
        if told != hashes[peer]:  # guard: dealt-hashes
            raise Equivocation(f"{lab} signed two hashes of one share for {peer}", lab=lab)
    return Dealt(bundles, hashes, signed)


def deliver(announcement: Announcement, identity: Identity, dealt: Mapping[str, Dealt]) -> Setup:
    """Pass the sealed shares on; the labs that dealt are the members.

    Raises CohortTooSmall, NotEnoughShares.
    """
    members = tuple(sorted(dealt))
    announcement.opening.cohort.check_size(members, "members")  # guard: too-few-dealers
    requests = _Deliveries(announcement, identity, dict(dealt), members)
    view = view_digest(announcement.transcript, members)
    return Setup(announcement, members, view, dict(dealt), requests)


@dataclass(frozen=True)
class _Deliveries(Mapping[str, bytes]):
    """Each member's request, made when it is asked for: all are as large as all shares again."""

    announcement: Announcement
    identity: Identity
    dealt: Mapping[str, Dealt] = field(repr=False)
    members: tuple[str, ...]
    opened: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict, repr=False)
    """shares that were shown, by dealer and by the lab that complained"""

    def __getitem__(self, peer: str) -> bytes:
        others = (lab for lab in self.members if lab != peer)
        body = wire.encode(
            {
                "bundles": {lab: self.dealt[lab].bundles[peer] for lab in others},
                "members": list(self.members),
                "opened": {lab: rows[peer] for lab, rows in self.opened.items() if peer in rows},
                "transcript": self.announcement.transcript,
            }
        )
        return sign(self.identity, LABEL_DELIVER, body)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


def delivered(setup: Setup) -> Setup:
    """The set-up without the shares that its members have got: they grow with its square."""
    kept = {lab: replace(dealt, bundles={}) for lab, dealt in setup.dealt.items()}
    return replace(setup, dealt=kept, requests={})


def check_ready(setup: Setup, lab: str, reply: bytes) -> frozenset[str]:
    """The members of whose shares this lab complains; none: it has its shares and the same view.

    Raises Equivocation or Unreadable with the lab's name.
    """
    with _blaming(lab):
        if wire.Fields.of(reply, "reply").text("label") == LABEL_COMPLAINT:
            against = check_complaint(setup.cohort, setup.announcement.transcript, lab, reply)
            if not against <= set(setup.members) - {lab}:  # guard: complaint-members
                raise Equivocation(f"{lab} complains of {sorted(against)}", lab=lab)
            return against
        fields = _reply(setup.cohort, lab, LABEL_READY, reply)
        view = fields.raw("view", HASH_BYTES)
        fields.end()
    if view != setup.view:  # guard: ready-view
        raise Equivocation(f"{lab} has another view of keys and members", lab=lab)
    return frozenset()


def call_open(
    setup: Setup, identity: Identity, complaints: Mapping[str, bytes]
) -> Mapping[str, bytes]:
    """The request to each accused dealer to show what it dealt, with the signed complaints."""
    transcript = setup.announcement.transcript
    by_dealer: dict[str, dict[str, bytes]] = {}
    for lab, document in complaints.items():
        for dealer in check_complaint(setup.cohort, transcript, lab, document):
            by_dealer.setdefault(dealer, {})[lab] = document
    return {
        dealer: sign(
            identity, LABEL_OPEN, wire.encode({"complaints": found, "transcript": transcript})
        )
        for dealer, found in by_dealer.items()
    }


def check_opened(setup: Setup, dealer: str, accusers: Iterable[str], reply: bytes) -> Opened:
    """The shares that a dealer shows, each the one that it signed, by the lab that complained.

    Raises WrongShares with the dealer's name: it signed shares that it does not have.
    """
    with _blaming(dealer):
        fields = _reply(setup.cohort, dealer, LABEL_OPENED, reply)
        transcript, rows = fields.raw("transcript", HASH_BYTES), fields.blobs("rows")
        fields.end()
    wanted, first = setup.announcement.transcript, setup.slots.start
    if transcript != wanted or set(rows) != set(accusers):  # guard: opened-complete
        raise WrongShares(f"{dealer} did not show the shares that it dealt", lab=dealer)
    for lab, found in rows.items():
        signed = setup.dealt[dealer].hashes[lab]
        whole = len(found) == len(setup.slots) * ROW_BYTES
        made = share_hashes(wanted, dealer, lab, first, found)
        if not whole or made != signed:  # guard: opened-hashes
            raise WrongShares(
                f"{dealer} dealt {lab} other shares than those that it signed", lab=dealer
            )
    return rows


def deliver_opened(
    setup: Setup, identity: Identity, opened: Mapping[str, Opened]
) -> Mapping[str, bytes]:
    """The requests anew for the labs that complained, with the shares that were shown since."""
    dealt = dict(setup.dealt)
    requests = _Deliveries(setup.announcement, identity, dealt, setup.members, opened)
    return {lab: requests[lab] for lab in {lab for rows in opened.values() for lab in rows}}


def call_survivors(
    setup: Setup,
    identity: Identity,
    *,
    round: int,
    slot: int,
    order_sha256: str,
    survivors: Sequence[str],
) -> Poll:
    """Ask the labs whose vectors were summed to agree on exactly these survivors.

    Raises CohortTooSmall, NotEnoughShares.
    """
    names = tuple(sorted(survivors))
    if slot not in setup.slots or not set(names) <= set(setup.members):
        raise InputError(f"slot {slot} or survivors {list(names)} are not of this set-up")
    setup.cohort.check_size(names, "survivors")  # guard: too-few-survivors
    statement = Statement(setup.view, round, slot, order_sha256, names)
    return Poll(setup, statement, sign(identity, LABEL_SURVIVORS, statement.to_bytes()))


def check_agreed(poll: Poll, lab: str, reply: bytes) -> None:
    """Raise BadAgreement unless this lab signed the poll's survivor set."""
    try:
        signed = verify(reply, label=LABEL_AGREED, signer=poll.setup.cohort.lab(lab))
    except (SignatureError, wire.MalformedMessage) as error:
        raise BadAgreement(  # guard: agreed-signature
            f"agreement of {lab}: {error.message}", lab=lab
        ) from error
    if signed != poll.statement.to_bytes():  # guard: agreed-statement
        raise BadAgreement(f"{lab} signed another survivor set", lab=lab)


def call_reveal(poll: Poll, identity: Identity, agreements: Mapping[str, bytes]) -> bytes:
    """The request for shares, with the agreements that entitle to them; send it to all survivors.

    Raises NotEnoughShares for fewer agreements than the threshold.
    """
    statement = poll.statement.to_bytes()
    survivors = poll.statement.survivors
    check_agreements(poll.setup.cohort, statement, survivors, agreements)  # guard: too-few-agreed
    body = wire.encode({"agreements": agreements, "statement": statement})
    return sign(identity, LABEL_REVEAL, body)


def check_revealed(poll: Poll, lab: str, reply: bytes) -> Mapping[str, bytes]:
    """One lab's shares by member, each the one that its dealer signed.

    Raises WrongShares, Equivocation or Unreadable with the lab's name.
    """
    setup, statement = poll.setup, poll.statement
    if lab not in statement.survivors:  # guard: revealed-survivor
        raise WrongShares(f"{lab} is not among the survivors", lab=lab)
    with _blaming(lab):
        fields = _reply(setup.cohort, lab, LABEL_REVEALED, reply)
        revealed_for = fields.raw("statement", HASH_BYTES)
        released = fields.blobs("shares")
        fields.end()
    if revealed_for != statement_digest(statement.to_bytes()):  # guard: revealed-statement
        raise Equivocation(f"{lab} revealed shares for another survivor set", lab=lab)
    if set(released) != set(setup.members):  # guard: revealed-complete
        raise WrongShares(f"{lab} did not reveal a share of every member", lab=lab)
    row = statement.slot - setup.slots.start
    for dealer, held in released.items():
        if len(held) != SHARE_BYTES:  # guard: share-size
            raise WrongShares(f"{lab} revealed a share of {len(held)} bytes", lab=lab)
        kind: Kind = "seed" if dealer in statement.survivors else "key"
        signed = cut(setup.dealt[dealer].hashes[lab], HASH_BYTES, 2 * row + (kind == "seed"))
        found = share_digest(setup.announcement.transcript, dealer, lab, statement.slot, kind, held)
        if found != signed:  # guard: share-hash
            raise WrongShares(
                f"{lab} revealed a share of {dealer} that {dealer} did not deal", lab=lab
            )
    return released


def unmask(
    poll: Poll,
    total_W: Words,
    revealed: Mapping[str, Mapping[str, bytes]],
) -> None:
    """Take all masks off the ring sum of the survivors' vectors, in place.

    ``revealed`` has the checked shares by lab. Guarantees: after it ``total_W`` is exactly the ring
    sum of the survivors' words; on any error it is unchanged. Raises NotEnoughShares, and
    WrongShares with the name of a dealer whose secret is not the one it committed to.
    """
    check_words(total_W)
    setup, statement = poll.setup, poll.statement
    cohort, survivors = setup.cohort, statement.survivors
    if len(revealed) < cohort.threshold:  # guard: reveal-count
        raise NotEnoughShares("revealed shares", have=len(revealed), need=cohort.threshold)
    place = Place(
        setup.view,
        statement.round,
        statement.slot,
        statement.order_sha256,
        len(total_W),
        8 * total_W.dtype.itemsize,
    )
    announcement = setup.announcement
    index = {lab: position for position, lab in enumerate(announcement.order, start=1)}
    row = statement.slot - setup.slots.start
    held = {
        index[lab]: [released[dealer] for dealer in setup.members]
        for lab, released in revealed.items()
    }
    secrets = shares.combine(held, threshold=cohort.threshold)
    masks = []
    for dealer, secret in zip(setup.members, secrets, strict=True):
        if dealer in survivors:
            committed = cut(announcement.commitments[dealer], HASH_BYTES, row)
            opening = announcement.opening.digest
            found = seed_commitment(opening, dealer, statement.slot, secret)
            if found != committed:  # guard: seed-commitment
                raise WrongShares(
                    f"the seed of {dealer} is not the one it committed to", lab=dealer
                )
            masks.append(_taken_off(place.self_mask(secret, index[dealer])))
        else:
            announced = cut(announcement.publics[dealer], KEY_BYTES, row)
            if public_key(secret) != announced:  # guard: key-commitment
                raise WrongShares(f"the key of {dealer} is not the one it announced", lab=dealer)
            # The dropped lab's own masks would have cancelled those that the survivors added.
            for peer in survivors:
                public = cut(announcement.publics[peer], KEY_BYTES, row)
                masks.append(place.pair_mask(secret, public, index[dealer], index[peer]))
    add_masks(total_W, masks)


def prove(poll: Poll, revealed: Mapping[str, Mapping[str, bytes]], dealer: str) -> bytes:
    """What shows every lab that a dealer lied, where ``unmask`` named it; empty for a dropped lab:
    the survivors are the same without it, and labs need no proof for that."""
    setup, statement = poll.setup, poll.statement
    if dealer not in statement.survivors:
        return b""
    announcement, slots = setup.announcement, setup.slots
    index = {lab: position for position, lab in enumerate(announcement.order)}
    holders = sorted(revealed, key=index.__getitem__)[: setup.cohort.threshold]
    fraud = Fraud(
        opening=announcement.opening.digest,
        lists=announcement.lists,
        first_slot=slots.start,
        slots=len(slots),
        dealt=setup.dealt[dealer].signed,
        slot=statement.slot,
        shares={lab: revealed[lab][dealer] for lab in holders},
    )
    check_fraud(setup.cohort, dealer, fraud)
    return fraud.to_bytes()


def call_convict(identity: Identity, frauds: Mapping[str, bytes]) -> bytes:
    """The request to take these labs for liars, each on its proof; send it to all others."""
    return sign(identity, LABEL_CONVICT, wire.encode({"frauds": frauds}))


def check_convicted(cohort: Cohort, frauds: Iterable[str], lab: str, reply: bytes) -> None:
    """Raise Unreadable unless this lab takes them for liars."""
    with _blaming(lab):
        fields = _reply(cohort, lab, LABEL_CONVICTED, reply)
        liars = fields.names("liars")
        fields.end()
    if not set(frauds) <= set(liars):
        raise Unreadable(f"{lab} takes {list(liars)} for liars, not {sorted(frauds)}", lab=lab)


def _taken_off(mask: Mask) -> Mask:
    return Mask(mask.key, -mask.sign)


def _reply(cohort: Cohort, lab: str, label: str, reply: bytes) -> wire.Fields:
    """The fields of one lab's signed reply."""
    body = verify(reply, label=label, signer=cohort.lab(lab))
    return wire.Fields.of(body, f"reply of {lab}")


@contextmanager
def _blaming(lab: str) -> Iterator[None]:
    """Turn what cannot be read, or is not signed by ``lab``, into Unreadable with its name."""
    try:
        yield
    except (SignatureError, wire.MalformedMessage) as error:
        raise Unreadable(f"reply of {lab}: {error.message}", lab=lab) from error
