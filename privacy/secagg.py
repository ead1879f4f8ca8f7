"""Secure aggregation: the coordinator learns the sum of the labs' vectors, and no single one.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
arXiv:1611.04482, in its variant against a malicious coordinator (section 4, "consistency check"),
with

* **slots**: one set-up makes keys for many vectors. A slot serves one vector; revealing its secrets
  says nothing about another slot;
* **the order in the masks**: masks and agreements cover the SHA-256 of the whole order, its global
  weights and its bound of the labs' weights among the rest. Labs that were told different things
  have masks that don't cancel and agreements that don't add up (Pasquini, Francati, Ateniese,
  "Eluding Secure Aggregation", CCS 2022);
* **hashes of all shares**, signed by the dealer: whoever passes on a wrong share is named. A lab
  that got other shares than were signed complains; the dealer then shows those shares, which only
  the two of them had, or is left out. Who complains wrongly gains nothing, and nobody honest is
  out;
* **one survivor set for a model**, whatever the slots and rounds: a lab that helped to open a sum
  helps with no other sum of the same work over other labs. The difference of two would be the
  update of the few labs in which they differ;
* **proof of fraud**: a lab that dealt shares of another secret than it committed to spoils a sum of
  which shares were released. Its signed keys, the signed hashes of its shares and shares that fit
  them prove it to anyone. From then on labs help with the sum of the same work over the same labs
  without it: should it be in league with the coordinator, the difference of the two is its own
  update, and nobody else's.

This module has what both halves share: the cohort, the errors, labels, statements, key derivation.
The halves are :mod:`~cytofed.privacy.secagg_lab` and :mod:`~cytofed.privacy.secagg_coordinator`;
both are pure: values in, values out. The coordinator asks, labs answer::

    coordinator                          lab
    begin            -> all              advertise   own public keys and commitments, signed
    announce         -> all              share       shares of its secrets, sealed for each peer
    deliver          -> each             accept      checks all, agrees to the view; or complains
    call_open        -> accused dealers  open_dealt  shows the shares of those who complain
      -- per round --
    (train order)    -> all              mask        the masked vector
    call_survivors   -> survivors        agree       signs the survivor set, once a slot
    call_reveal      -> survivors        reveal      one kind of secret of each peer, once
    unmask
    call_convict     -> all others       convict     on proof that a dealer has lied

A *view* is what all members must have in common: every key list, and who is a member.

**What this does not hide**: the sums themselves, round by round, and what several of them say
together (a secure sum is not differential privacy: sums of two nearly equal models over sets that
differ by one lab say nearly what that lab's update is); that a lab took part. The survivor set is
unique as long as fewer than ``2 threshold - labs`` labs help the coordinator to lie (a third of the
labs at the default threshold). A hostile lab can stop a run and spoil a sum; the former names it,
the latter does not. Pairwise masks use X25519: they don't withstand a future quantum computer,
although the shares' sealing does.

::

    VerificationError
    `- SecaggError               .lab: who is at fault, if known
       |- Refused                nothing happened; the lab's state is as it was
       |  |- AlreadyAnswered     a repeat: send what was sent before
       |  |- OutOfTurn           a request that does not fit what came before
       |  |- RoundClosed         an older round, or another survivor set for the same work
       |  `- Stopped             this lab was lied to before, and stays out of the run
       |- WrongRun               federation, run, plan, roster or cohort is not the approved one
       |- Replayed               a set-up or slot that was used before
       |- WrongKeys              a key list that is forged, swapped, incomplete or has unusable keys
       |- WrongShares            shares, commitments or reconstructed secrets do not match
       |- Equivocation           the coordinator says different things
       |- BadAgreement           a survivor set without enough valid signatures
       |- CohortTooSmall         .have < .need: fewer labs than min_cohort
       |- NotEnoughShares        .have < .need: fewer labs than the threshold
       `- Unreadable             signed by the right party, but no message of this protocol

Whatever a lab raises beyond ``Refused`` is a lie that it was told: ``error.state`` is then the
stopped state, to be kept instead of the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cytofed.canonical import digest
from cytofed.errors import InputError, VerificationError
from cytofed.privacy import shares, wire
from cytofed.privacy.encoding import MAX_COHORT
from cytofed.privacy.identity import PublicIdentity, SignatureError, verify
from cytofed.privacy.masks import Mask
from cytofed.privacy.sealing import Context, Direction, check_sha256

if TYPE_CHECKING:
    from cytofed.privacy.secagg_lab import LabState

MIN_COHORT = 3  # with two labs each learns the other's update
MAX_SLOTS = 1024
HASH_BYTES = 32
KEY_BYTES = 32
SHARE_BYTES = 32
ROW_BYTES = 2 * SHARE_BYTES  # one slot's shares: of the key, then of the seed
CONTENT_SHARES = "secagg-shares"

LABEL_BEGIN = "cytofed/1/secagg/begin"
LABEL_KEYS = "cytofed/1/secagg/keys"
LABEL_ANNOUNCE = "cytofed/1/secagg/announce"
LABEL_SHARES = "cytofed/1/secagg/shares"
LABEL_DEALT = "cytofed/1/secagg/dealt"
LABEL_DELIVER = "cytofed/1/secagg/deliver"
LABEL_READY = "cytofed/1/secagg/ready"
LABEL_COMPLAINT = "cytofed/1/secagg/complaint"
LABEL_OPEN = "cytofed/1/secagg/open"
LABEL_OPENED = "cytofed/1/secagg/opened"
LABEL_SURVIVORS = "cytofed/1/secagg/survivors"
LABEL_AGREED = "cytofed/1/secagg/agreed"
LABEL_REVEAL = "cytofed/1/secagg/reveal"
LABEL_REVEALED = "cytofed/1/secagg/revealed"
LABEL_CONVICT = "cytofed/1/secagg/convict"
LABEL_CONVICTED = "cytofed/1/secagg/convicted"

_PAIR_MASK = "cytofed/1/secagg/pair-mask"
_SELF_MASK = "cytofed/1/secagg/self-mask"

Kind = Literal["key", "seed"]  # the two secrets of a slot; a lab reveals one of them


class SecaggError(VerificationError):
    """Base of everything that secure aggregation refuses."""

    def __init__(self, message: str, *, lab: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.lab = lab
        self.state: LabState | None = None  # set by the lab half: keep this state from now on


class Refused(SecaggError):
    """Nothing happened; the state is as it was."""


class AlreadyAnswered(Refused):
    """A repeat of something answered before: send the same bytes again."""


class OutOfTurn(Refused):
    """A request that does not fit what came before it."""


class RoundClosed(Refused):
    """An older round, or another survivor set for work of which a sum was opened."""


class Stopped(Refused):
    """This lab detected a lie before and takes no further part in the run."""


class WrongRun(SecaggError):
    """A message of another federation, run, plan, roster or cohort than the approved one."""


class Replayed(SecaggError):
    """A set-up or slot that was used before."""


class WrongKeys(SecaggError):
    """A key list that is forged, swapped, incomplete or holds unusable keys."""


class WrongShares(SecaggError):
    """Shares, commitments or reconstructed secrets that do not match each other."""


class Equivocation(SecaggError):
    """The coordinator says one thing here and another there."""


class BadAgreement(SecaggError):
    """A survivor set that the labs did not sign."""


class Unreadable(SecaggError):
    """Signed by the right party, but not a message of this protocol."""


class CohortTooSmall(SecaggError):
    """Fewer labs than ``min_cohort``: the sum would say too much about each."""

    def __init__(self, what: str, *, have: int, need: int) -> None:
        super().__init__(f"{what}: {have} labs, need {need}", hint="wait for more labs")
        self.have = have
        self.need = need


class NotEnoughShares(SecaggError):
    """Fewer labs than the threshold: nothing is revealed and nothing can be reconstructed."""

    def __init__(self, what: str, *, have: int, need: int) -> None:
        super().__init__(f"{what}: {have} labs, need {need}", hint="wait for more labs")
        self.have = have
        self.need = need


def default_threshold(labs: int) -> int:
    """floor(2 labs / 3) + 1: two survivor sets can't both be signed by this many labs unless a
    third of all labs lies."""
    return 2 * labs // 3 + 1


def check_rules(labs: int, *, threshold: int | None, min_cohort: int) -> int:
    """The threshold for a cohort of ``labs``; raises InputError for rules that are not safe."""
    if threshold is None:
        threshold = default_threshold(labs)
    if min_cohort < MIN_COHORT:
        raise InputError(
            f"secure_aggregation.min_cohort={min_cohort}, expected at least {MIN_COHORT}: with two "
            "labs each learns the other's update",
            hint=f"set secure_aggregation.min_cohort to {MIN_COHORT}",
        )
    if labs < min_cohort:
        raise InputError(
            f"secure aggregation among {labs} labs, expected at least min_cohort={min_cohort}",
            hint="enrol another lab",
        )
    if labs > MAX_COHORT:
        raise InputError(
            f"secure aggregation among {labs} labs, expected at most {MAX_COHORT}",
            hint="split the federation, or turn secure aggregation off",
        )
    if not labs < 2 * threshold <= 2 * labs:
        raise InputError(
            f"secure_aggregation.threshold={threshold} of {labs} labs, expected {labs // 2 + 1} to "
            f"{labs}: at half of the labs or less a coordinator can have both secrets of a lab",
            hint=f"set secure_aggregation.threshold to {default_threshold(labs)}",
        )
    return threshold


@dataclass(frozen=True)
class Cohort:
    """The labs of one run and its rules, as each lab pinned them when it approved the plan.

    Raises InputError where :func:`check_rules` does, and for two labs with one key.
    """

    federation: str
    run: str
    plan_sha256: str
    roster_sha256: str
    coordinator: PublicIdentity
    labs: tuple[PublicIdentity, ...]  # ascending by name
    threshold: int
    min_cohort: int
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_sha256("plan_sha256", self.plan_sha256)
        check_sha256("roster_sha256", self.roster_sha256)
        check_rules(len(self.labs), threshold=self.threshold, min_cohort=self.min_cohort)
        names = [lab.name for lab in self.labs]
        if names != sorted(set(names)):
            raise InputError(f"labs {names}, expected ascending names without repeats")
        everyone = (*self.labs, self.coordinator)
        for keys in ({p.signing for p in everyone}, {p.sealing for p in everyone}):
            if len(keys) != len(everyone):
                raise InputError("two members of the cohort have the same key")
        object.__setattr__(self, "digest", hashlib.sha256(self._rules()).digest())

    def _rules(self) -> bytes:
        return wire.encode(
            {
                "coordinator": self.coordinator.fingerprint,
                "federation": self.federation,
                "labs": {lab.name: lab.fingerprint for lab in self.labs},
                "min_cohort": self.min_cohort,
                "plan_sha256": self.plan_sha256,
                "roster_sha256": self.roster_sha256,
                "run": self.run,
                "threshold": self.threshold,
            }
        )

    @property
    def need(self) -> int:
        """Fewest labs that any list of this protocol may name."""
        return max(self.threshold, self.min_cohort)

    def lab(self, name: str) -> PublicIdentity:
        """The pinned keys of a lab; raises WrongKeys for a stranger."""
        for public in self.labs:
            if public.name == name:
                return public
        raise WrongKeys(f"{name!r} is not in the approved cohort", lab=name)  # guard: stranger

    def check_size(self, labs: Sequence[str], what: str) -> None:
        """Raise unless a list of labs is large enough for ``min_cohort`` and the threshold."""
        if len(labs) < self.min_cohort:  # guard: min-cohort
            raise CohortTooSmall(what, have=len(labs), need=self.min_cohort)
        if len(labs) < self.threshold:  # guard: threshold
            raise NotEnoughShares(what, have=len(labs), need=self.threshold)

    def share_context(self, dealer: str, peer: str, first_slot: int) -> Context:
        """The place in which one dealer's sealed shares for one peer are valid."""
        return Context(
            federation=self.federation,
            run=self.run,
            plan_sha256=self.plan_sha256,
            roster_sha256=self.roster_sha256,
            round=0,  # a set-up belongs to no round
            slot=first_slot,
            sender=dealer,
            receiver=peer,
            direction=Direction.LAB_TO_LAB,
            content=CONTENT_SHARES,
        )

    def to_bytes(self) -> bytes:
        return wire.encode(
            {
                "coordinator": self.coordinator.to_bytes(),
                "federation": self.federation,
                "labs": [lab.to_bytes() for lab in self.labs],
                "min_cohort": self.min_cohort,
                "plan_sha256": self.plan_sha256,
                "roster_sha256": self.roster_sha256,
                "run": self.run,
                "threshold": self.threshold,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Cohort:
        fields = wire.Fields.of(data, "cohort")
        cohort = cls(
            federation=fields.text("federation"),
            run=fields.text("run"),
            plan_sha256=fields.text("plan_sha256"),
            roster_sha256=fields.text("roster_sha256"),
            coordinator=PublicIdentity.from_bytes(fields.raw("coordinator")),
            labs=tuple(PublicIdentity.from_bytes(lab) for lab in fields.items("labs")),
            threshold=fields.uint("threshold"),
            min_cohort=fields.uint("min_cohort"),
        )
        fields.end()
        return cohort


@dataclass(frozen=True)
class Statement:
    """Who survived one attempt at one round: what labs sign before any share is released."""

    view: bytes
    round: int
    slot: int
    order_sha256: str
    survivors: tuple[str, ...]

    def to_bytes(self) -> bytes:
        return wire.encode(
            {
                "order_sha256": self.order_sha256,
                "round": self.round,
                "slot": self.slot,
                "survivors": list(self.survivors),
                "view": self.view,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        fields = wire.Fields.of(data, "survivor set")
        statement = cls(
            view=fields.raw("view", HASH_BYTES),
            round=fields.uint("round"),
            slot=fields.uint("slot"),
            order_sha256=fields.text("order_sha256"),
            survivors=fields.names("survivors"),
        )
        fields.end()
        return statement


@dataclass(frozen=True)
class Place:
    """Where a mask is used; each mask key is bound to all of it."""

    view: bytes
    round: int
    slot: int
    order_sha256: str
    words: int
    word_bits: int

    def _info(self, label: str, *indices: int) -> bytes:
        order = bytes.fromhex(self.order_sha256)
        place: list[wire.Value] = [order, self.round, self.slot, self.words, self.word_bits]
        return wire.encode([label, *place, *indices])

    def pair_mask(self, private: bytes, public: bytes, own: int, peer: int) -> Mask:
        """The mask between labs ``own`` and ``peer`` (indices), as ``own`` adds it.

        The lower index adds, the higher subtracts. Raises ValueError for a public key of low order.
        """
        shared = exchange(private, public)
        low, high = min(own, peer), max(own, peer)
        return Mask(self._derive(shared, _PAIR_MASK, low, high), 1 if own == low else -1)

    def self_mask(self, seed: bytes, own: int) -> Mask:
        """A lab's own mask, as it adds it."""
        return Mask(self._derive(seed, _SELF_MASK, own), 1)

    def _derive(self, secret: bytes, label: str, *indices: int) -> bytes:
        info = self._info(label, *indices)
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=self.view, info=info).derive(secret)


def exchange(private: bytes, public: bytes) -> bytes:
    """The X25519 shared secret; raises ValueError for a public key of low order."""
    key = X25519PrivateKey.from_private_bytes(private)
    return key.exchange(X25519PublicKey.from_public_bytes(public))


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one: also its commitment."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def opening_digest(request: bytes) -> bytes:
    """The hash of a signed ``begin``: names this set-up in all that follows."""
    return digest("cytofed/1/secagg/opening", request)


def transcript_digest(opening: bytes, lists: dict[str, bytes]) -> bytes:
    """The hash of all signed key lists: equal at two labs only if they saw the same keys."""
    return digest("cytofed/1/secagg/transcript", opening, lists)


def view_digest(transcript: bytes, members: Sequence[str]) -> bytes:
    """The hash of all key lists and the members."""
    return digest("cytofed/1/secagg/view", transcript, list(members))


def statement_digest(statement: bytes) -> bytes:
    """What a lab signs along with the shares that it reveals."""
    return digest("cytofed/1/secagg/statement", statement)


def seed_commitment(opening: bytes, lab: str, slot: int, seed: bytes) -> bytes:
    """Hiding because the seed has 256 bits of entropy; binding because SHA-256 is."""
    return digest("cytofed/1/secagg/seed", opening, lab, slot, seed)


def share_digest(
    transcript: bytes, dealer: str, peer: str, slot: int, kind: Kind, share: bytes
) -> bytes:
    """What a dealer signs of each share: the peer that passes on another one is named."""
    return digest("cytofed/1/secagg/share", transcript, dealer, peer, slot, kind, share)


def cut(data: bytes, size: int, index: int) -> bytes:
    """Row ``index`` of rows of ``size`` bytes."""
    return data[index * size : (index + 1) * size]


def check_key_list(
    cohort: Cohort, opening: bytes, slots: int, lab: str, document: bytes
) -> tuple[bytes, bytes]:
    """Public keys and seed commitments of a signed key list, one row a slot; raises WrongKeys."""
    try:
        body = verify(document, label=LABEL_KEYS, signer=cohort.lab(lab))
    except SignatureError as error:
        raise WrongKeys(  # guard: key-list-signature
            f"key list of {lab} does not bear its pinned signature: {error.message}", lab=lab
        ) from error
    fields = wire.Fields.of(body, f"key list of {lab}")
    if fields.raw("opening", HASH_BYTES) != opening:  # guard: key-list-opening
        raise WrongKeys(f"key list of {lab} was made for another set-up", lab=lab)
    public = fields.raw("public", slots * KEY_BYTES)
    commitments = fields.raw("commitments", slots * HASH_BYTES)
    fields.end()
    return public, commitments


def check_distinct(publics: Mapping[str, bytes]) -> None:
    """Raise WrongKeys if a slot key appears twice, at one lab or at two."""
    owner: dict[bytes, str] = {}
    for name, public in publics.items():
        for row in range(len(public) // KEY_BYTES):
            key = cut(public, KEY_BYTES, row)
            if key in owner:  # guard: distinct-keys
                raise WrongKeys(f"{name} has a slot key of {owner[key]}", lab=name)
            owner[key] = name


def share_hashes(transcript: bytes, dealer: str, peer: str, first_slot: int, rows: bytes) -> bytes:
    """The hash of each share in ``rows``, in the same order."""
    hashes = []
    for row in range(len(rows) // ROW_BYTES):
        part = cut(rows, ROW_BYTES, row)
        kinds: tuple[Kind, Kind] = ("key", "seed")
        for index, kind in enumerate(kinds):
            held = cut(part, SHARE_BYTES, index)
            hashes.append(share_digest(transcript, dealer, peer, first_slot + row, kind, held))
    return b"".join(hashes)


def read_share_manifest(manifest: bytes, slots: int, dealer: str) -> tuple[bytes, bytes]:
    """Transcript and share hashes that a dealer signed with its sealed shares."""
    fields = wire.Fields.of(manifest, f"share manifest of {dealer}")
    transcript = fields.raw("transcript", HASH_BYTES)
    hashes = fields.raw("hashes", slots * 2 * HASH_BYTES)
    fields.end()
    return transcript, hashes


def read_dealt(
    cohort: Cohort, transcript: bytes, dealer: str, document: bytes
) -> Mapping[str, bytes]:
    """The hashes of all shares of a dealer, its own too, by holder.

    Raises WrongShares, Equivocation.
    """
    try:
        body = verify(document, label=LABEL_DEALT, signer=cohort.lab(dealer))
    except SignatureError as error:
        raise WrongShares(  # guard: dealt-signature
            f"hashes of the shares of {dealer} are not signed by it: {error.message}", lab=dealer
        ) from error
    fields = wire.Fields.of(body, f"share hashes of {dealer}")
    dealt_for, hashes = fields.raw("transcript", HASH_BYTES), fields.blobs("hashes")
    fields.end()
    if dealt_for != transcript:  # guard: dealt-transcript
        raise Equivocation(f"{dealer} dealt its shares for other key lists", lab=dealer)
    return hashes


@dataclass(frozen=True)
class Fraud:
    """What proves that a dealer signed shares of another seed than the one it committed to."""

    opening: bytes
    lists: Mapping[str, bytes]
    """every signed key list of the set-up: who holds which share, and the commitment"""
    first_slot: int
    slots: int
    dealt: bytes
    """the hashes of its shares, signed by the dealer"""
    slot: int
    shares: Mapping[str, bytes]
    """of the seed, by holder: a threshold of them"""

    def to_bytes(self) -> bytes:
        return wire.encode(self.__dict__)

    @classmethod
    def from_bytes(cls, data: bytes) -> Fraud:
        fields = wire.Fields.of(data, "proof of fraud")
        fraud = cls(
            opening=fields.raw("opening", HASH_BYTES),
            lists=fields.blobs("lists"),
            first_slot=fields.uint("first_slot"),
            slots=fields.uint("slots"),
            dealt=fields.raw("dealt"),
            slot=fields.uint("slot"),
            shares=fields.blobs("shares"),
        )
        fields.end()
        return fraud


def check_fraud(cohort: Cohort, dealer: str, fraud: Fraud) -> None:
    """Raise unless the dealer has lied, whoever says so. No honest dealer can be convicted.

    It signed the hashes of the shares for exactly these key lists, which say who holds which, and
    its own has the commitment; whoever deals honestly signs shares of what it committed to, and any
    threshold of those give it. Errors: WrongKeys, WrongShares, Equivocation, NotEnoughShares.
    """
    order, row = sorted(fraud.lists), fraud.slot - fraud.first_slot
    if dealer not in order or not 0 <= row < fraud.slots <= MAX_SLOTS:
        raise WrongShares(f"proof against {dealer} is of no slot that it dealt for")
    _, commitments = check_key_list(cohort, fraud.opening, fraud.slots, dealer, fraud.lists[dealer])
    transcript = transcript_digest(fraud.opening, dict(fraud.lists))
    hashes = read_dealt(cohort, transcript, dealer, fraud.dealt)
    for holder, share in fraud.shares.items():
        signed = cut(hashes.get(holder, b""), HASH_BYTES, 2 * row + 1)
        found = share_digest(transcript, dealer, holder, fraud.slot, "seed", share)
        if (
            holder not in order or found != signed or len(share) != SHARE_BYTES
        ):  # guard: fraud-share
            raise WrongShares(f"proof against {dealer} has a share that {dealer} did not deal")
    if len(fraud.shares) < cohort.threshold:
        raise NotEnoughShares("proof of fraud", have=len(fraud.shares), need=cohort.threshold)
    held = {order.index(holder) + 1: [share] for holder, share in fraud.shares.items()}
    [seed] = shares.combine(held, threshold=cohort.threshold)
    committed = cut(commitments, HASH_BYTES, row)
    if seed_commitment(fraud.opening, dealer, fraud.slot, seed) == committed:  # guard: fraud-seed
        raise WrongShares(f"the shares of {dealer} are those of the seed that it committed to")


def check_complaint(cohort: Cohort, transcript: bytes, lab: str, document: bytes) -> frozenset[str]:
    """The dealers that a lab complains of, signed. Errors: Unreadable, Equivocation."""
    try:
        body = verify(document, label=LABEL_COMPLAINT, signer=cohort.lab(lab))
    except SignatureError as error:
        raise Unreadable(  # guard: complaint-signature
            f"complaint of {lab} is not signed by it: {error.message}", lab=lab
        ) from error
    fields = wire.Fields.of(body, f"complaint of {lab}")
    made_for, dealers = fields.raw("transcript", HASH_BYTES), fields.names("dealers")
    fields.end()
    if made_for != transcript:  # guard: complaint-transcript
        raise Equivocation(f"complaint of {lab} is about another set-up", lab=lab)
    return frozenset(dealers)


def check_agreements(
    cohort: Cohort, statement: bytes, survivors: tuple[str, ...], agreements: Mapping[str, bytes]
) -> None:
    """Raise unless at least the threshold of survivors signed exactly this statement."""
    for name, document in agreements.items():
        if name not in survivors:  # guard: agreement-survivor
            raise BadAgreement(f"{name} signed, but is not among the survivors", lab=name)
        try:
            signed = verify(document, label=LABEL_AGREED, signer=cohort.lab(name))
        except SignatureError as error:
            raise BadAgreement(  # guard: agreement-signature
                f"agreement of {name} is not signed by it: {error.message}", lab=name
            ) from error
        if signed != statement:  # guard: agreement-statement
            raise BadAgreement(f"{name} signed another survivor set", lab=name)
    if len(agreements) < cohort.threshold:  # guard: agreement-count
        raise NotEnoughShares("agreements", have=len(agreements), need=cohort.threshold)
