"""Lies during the set-up of secure aggregation: to labs by the coordinator or by peers, and to the
coordinator by labs. One claim each; see mutate.py for the proof that each guard is needed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, SignatureError, sign
from cytofed.privacy.sealing import seal
from cytofed.privacy.secagg import (
    LABEL_ANNOUNCE,
    LABEL_BEGIN,
    LABEL_COMPLAINT,
    LABEL_DEALT,
    LABEL_DELIVER,
    LABEL_KEYS,
    LABEL_OPEN,
    LABEL_OPENED,
    LABEL_READY,
    LABEL_SHARES,
    AlreadyAnswered,
    CohortTooSmall,
    Equivocation,
    NotEnoughShares,
    OutOfTurn,
    Replayed,
    Unreadable,
    WrongKeys,
    WrongRun,
    WrongShares,
    seed_commitment,
    share_hashes,
)
from tests.attacks.stage import (
    CHIEF,
    OTHER,
    Stage,
    accepted,
    advertised,
    agreed,
    announced,
    answers,
    body_of,
    cohort_of,
    dealt,
    forged,
    fresh,
    guarded_by,
    identity,
    masked,
    names,
    polled,
    refuses,
    revealed,
    stops,
    true_sum,
    unmasked,
)

A, B, C, D = names(4)


def begin(stage: Stage, **changes: object) -> bytes:
    """A signed ``begin`` with other fields than this cohort's."""
    opening = coordinator.begin(stage.cohort, CHIEF, setup=1, first_slot=0, slots=2)
    return forged(opening.request, LABEL_BEGIN, CHIEF, **changes)


def announcement(stage: Stage, **lists: bytes) -> bytes:
    """All key lists, some replaced (an empty one is left out)."""
    assert stage.opening is not None
    replaced = {**stage.replies, **{name.replace("_", "-"): doc for name, doc in lists.items()}}
    given = {name: document for name, document in replaced.items() if document}
    body = wire.encode({"lists": given, "opening": stage.opening.digest})
    return sign(CHIEF, LABEL_ANNOUNCE, body)


def delivery(stage: Stage, name: str, **changes: object) -> bytes:
    """What the coordinator delivers to ``name``, with other fields."""
    assert stage.setup is not None
    return forged(stage.setup.requests[name], LABEL_DELIVER, CHIEF, **changes)


def bundles_for(stage: Stage, name: str) -> dict[str, bytes]:
    assert stage.setup is not None
    bundles = body_of(stage.setup.requests[name], LABEL_DELIVER, CHIEF)["bundles"]
    assert isinstance(bundles, dict)
    return bundles


# ---- begin


@guarded_by("approved-run")
def test_set_up_of_another_run_is_refused() -> None:
    stage = fresh()
    stops(stage, A, lab.advertise, begin(stage, run="run-2"), WrongRun, "run 'run-2'")


@guarded_by("approved-run")
def test_set_up_of_another_federation_is_refused() -> None:
    stage = fresh()
    stops(stage, A, lab.advertise, begin(stage, federation="x"), WrongRun, "federation 'x'")


@guarded_by("approved-run")
def test_set_up_for_another_plan_is_refused() -> None:
    stage = fresh()
    stops(stage, A, lab.advertise, begin(stage, plan_sha256=OTHER), WrongRun, "plan_sha256")


@guarded_by("approved-run")
def test_stale_roster_is_refused() -> None:
    stage = fresh()
    stops(stage, A, lab.advertise, begin(stage, roster_sha256=OTHER), WrongRun, "roster_sha256")


@guarded_by("approved-cohort")
def test_lowered_threshold_is_refused() -> None:
    stage = fresh(6)
    other = cohort_of(6, threshold=4)
    request = begin(stage, cohort=other.digest)
    stops(stage, A, lab.advertise, request, WrongRun, "another cohort or other rules")


@guarded_by("approved-cohort")
def test_cohort_with_a_swapped_identity_is_refused() -> None:
    stage = fresh()
    mallory = Identity.generate(B).public
    labs = tuple(mallory if public.name == B else public for public in stage.cohort.labs)
    request = begin(stage, cohort=cohort_of(4, labs=labs).digest)
    stops(stage, A, lab.advertise, request, WrongRun, "another cohort or other rules")


@guarded_by("setup-replay")
def test_replayed_set_up_is_refused() -> None:
    first = advertised(fresh(), setup=1)
    assert first.opening is not None
    later = advertised(first, setup=2, first_slot=2)
    stops(later, A, lab.advertise, first.opening.request, Replayed, "set-up 1 after set-up 2")


@guarded_by("setup-slots")
def test_set_up_over_used_slots_is_refused() -> None:
    stage = advertised(fresh(), first_slot=5)
    request = begin(stage, setup=2, first_slot=4)
    stops(stage, A, lab.advertise, request, Replayed, "slots below 5 were used")


@guarded_by("slot-count")
def test_set_up_of_a_million_slots_is_refused() -> None:
    stage = fresh()
    request = begin(stage, slots=1_000_000)
    stops(stage, A, lab.advertise, request, Unreadable, "1000000 slots")


@guarded_by("signature")
def test_request_in_the_coordinators_name_is_refused_without_harm() -> None:
    stage = fresh()
    mallory = Identity.generate(CHIEF.name)
    request = coordinator.begin(stage.cohort, mallory, setup=1, first_slot=0, slots=2).request
    refuses(stage, A, lab.advertise, request, SignatureError, "not signed by coordinator")


@guarded_by("label")
def test_request_of_one_kind_is_not_taken_for_another() -> None:
    stage = advertised(fresh())
    body = wire.encode({"lists": {}, "opening": bytes(32)})
    request = sign(CHIEF, LABEL_BEGIN, body)
    refuses(stage, A, lab.share, request, SignatureError, "expected a '.*announce'")


@guarded_by("signer")
def test_document_that_names_another_signer_is_refused() -> None:
    stage = fresh()
    nameless = Identity(
        replace(CHIEF.public, name="mallory"), CHIEF._signing, CHIEF._mlkem, CHIEF._x25519
    )
    request = coordinator.begin(stage.cohort, nameless, setup=1, first_slot=0, slots=2).request
    refuses(stage, A, lab.advertise, request, SignatureError, "by 'mallory'")


@guarded_by("answered-before")
def test_repeat_of_an_earlier_request_is_refused_without_harm() -> None:
    stage = advertised(fresh())
    assert stage.opening is not None
    later = dealt(announced(stage))
    refuses(later, A, lab.advertise, stage.opening.request, AlreadyAnswered, "was answered")


@guarded_by("unknown-fields")
def test_request_with_a_field_too_many_is_refused() -> None:
    stage = fresh()
    stops(stage, A, lab.advertise, begin(stage, extra=1), Unreadable, "unknown fields")


# ---- announce


@guarded_by("signature", "key-list-signature")
def test_swapped_key_list_is_refused() -> None:
    """The coordinator replaces a peer's keys by its own: man in the middle of the masks."""
    stage = advertised(fresh())
    mallory = Identity.generate(B)
    swapped = forged(stage.replies[B], LABEL_KEYS, identity(B), public=bytes(range(64)))
    swapped = sign(mallory, LABEL_KEYS, wire.encode(body_of(swapped, LABEL_KEYS, identity(B))))
    request = announcement(stage, lab_02=swapped)
    stops(stage, A, lab.share, request, WrongKeys, "lab-02 does not bear its pinned signature")


@guarded_by("signature", "key-list-signature")
def test_altered_commitment_is_refused() -> None:
    stage = advertised(fresh())
    document = stage.replies[B]
    body = body_of(document, LABEL_KEYS, identity(B))
    altered = document.replace(body["commitments"], bytes(64))
    request = announcement(stage, lab_02=altered)
    stops(stage, A, lab.share, request, WrongKeys, "lab-02 does not bear its pinned signature")


@guarded_by("own-list")
def test_own_key_list_replaced_by_an_older_one_is_refused() -> None:
    first = advertised(fresh(), setup=1)
    later = advertised(first, setup=2, first_slot=2)
    request = announcement(later, lab_01=first.replies[A])
    stops(later, A, lab.share, request, WrongKeys, "own key list is missing or was replaced")


@guarded_by("own-list")
def test_lab_left_out_of_the_key_lists_stops() -> None:
    stage = advertised(fresh())
    request = announcement(stage, lab_01=b"")
    stops(stage, A, lab.share, request, WrongKeys, "own key list is missing or was replaced")


@guarded_by("key-list-opening")
def test_peers_key_list_of_an_older_set_up_is_refused() -> None:
    first = advertised(fresh(), setup=1)
    later = advertised(first, setup=2, first_slot=2)
    request = announcement(later, lab_02=first.replies[B])
    stops(later, A, lab.share, request, WrongKeys, "lab-02 was made for another set-up")


@guarded_by("opening")
def test_key_lists_of_a_set_up_that_this_lab_did_not_join_are_refused() -> None:
    stage = advertised(fresh())
    request = forged(announcement(stage), LABEL_ANNOUNCE, CHIEF, opening=bytes(32))
    stops(stage, A, lab.share, request, Replayed, "key lists of another set-up")


@guarded_by("stranger")
def test_key_list_of_a_stranger_is_refused() -> None:
    stage = advertised(fresh())
    request = announcement(stage, mallory=stage.replies[B])
    stops(stage, A, lab.share, request, WrongKeys, "'mallory' is not in the approved cohort")


@guarded_by("min-cohort", "small-announcement")
def test_cohort_shrunk_below_the_minimum_is_refused() -> None:
    stage = advertised(fresh(5, threshold=3, min_cohort=4))
    request = announcement(stage, lab_04=b"", lab_05=b"")
    stops(stage, A, lab.share, request, CohortTooSmall, "key lists: 3 labs, need 4")


@guarded_by("threshold", "small-announcement")
def test_cohort_shrunk_below_the_threshold_is_refused() -> None:
    stage = advertised(fresh(6))
    request = announcement(stage, lab_05=b"", lab_06=b"")
    stops(stage, A, lab.share, request, NotEnoughShares, "key lists: 4 labs, need 5")


@guarded_by("distinct-keys", "distinct-keys-lab")
def test_peer_that_copies_slot_keys_is_refused() -> None:
    stage = advertised(fresh())
    public = body_of(stage.replies[C], LABEL_KEYS, identity(C))["public"]
    copied = forged(stage.replies[B], LABEL_KEYS, identity(B), public=public)
    request = announcement(stage, lab_02=copied)
    stops(stage, A, lab.share, request, WrongKeys, "lab-03 has a slot key of lab-02")


@guarded_by("low-order-key")
def test_slot_key_of_low_order_is_refused() -> None:
    """With such a key the pairwise mask would be known to everyone."""
    stage = advertised(fresh())
    public = body_of(stage.replies[B], LABEL_KEYS, identity(B))["public"]
    weak = forged(stage.replies[B], LABEL_KEYS, identity(B), public=public[:32] + bytes(32))
    request = announcement(stage, lab_02=weak)
    stops(stage, A, lab.share, request, WrongKeys, "lab-02 has an unusable key for slot 1")


@guarded_by("field-size")
def test_key_list_that_is_too_short_is_refused() -> None:
    stage = advertised(fresh())
    short = forged(stage.replies[B], LABEL_KEYS, identity(B), commitments=bytes(32))
    request = announcement(stage, lab_02=short)
    stops(stage, A, lab.share, request, Unreadable, "has 32 bytes, expected 64")


@guarded_by("share-turn")
def test_second_list_of_keys_for_one_set_up_is_refused() -> None:
    stage = advertised(fresh(5, threshold=3))
    shared = dealt(announced(stage))
    request = announcement(stage, lab_05=b"")
    refuses(shared, A, lab.share, request, OutOfTurn, "or twice")


# ---- deliver


@guarded_by("transcript")
def test_shares_for_other_key_lists_are_refused() -> None:
    stage = dealt(announced(advertised(fresh())))
    request = delivery(stage, A, transcript=bytes(32))
    stops(stage, A, lab.accept, request, Equivocation, "other key lists than this lab was shown")


@guarded_by("min-cohort", "small-membership")
def test_membership_shrunk_below_the_minimum_is_refused() -> None:
    stage = dealt(announced(advertised(fresh(5, threshold=3, min_cohort=4))))
    bundles = {name: bundle for name, bundle in bundles_for(stage, A).items() if name in (B, C)}
    request = delivery(stage, A, members=[A, B, C], bundles=bundles)
    stops(stage, A, lab.accept, request, CohortTooSmall, "members: 3 labs, need 4")


@guarded_by("members")
def test_member_without_a_key_list_is_refused() -> None:
    stage = advertised(fresh(5, threshold=3))
    stage = dealt(announced(replace(stage, replies={n: stage.replies[n] for n in (A, B, C, D)})))
    bundles = bundles_for(stage, A)
    bundles["lab-05"] = bundles[B]
    request = delivery(stage, A, members=[A, B, C, D, "lab-05"], bundles=bundles)
    stops(stage, A, lab.accept, request, Equivocation, "are not those of the key lists")


@guarded_by("members")
def test_lab_that_is_no_member_gets_no_shares() -> None:
    stage = dealt(announced(advertised(fresh())))
    request = delivery(stage, A, members=[B, C, D])
    stops(stage, A, lab.accept, request, Equivocation, "are not those of the key lists")


@guarded_by("name-order")
def test_member_named_twice_is_refused() -> None:
    """Repeats would make a cohort look larger than it is."""
    stage = dealt(announced(advertised(fresh())))
    request = delivery(stage, A, members=[A, B, B, C, D])
    stops(stage, A, lab.accept, request, Unreadable, "repeated or out of order")


@guarded_by("bundles-complete")
def test_withheld_shares_of_a_member_are_noticed() -> None:
    stage = dealt(announced(advertised(fresh())))
    bundles = bundles_for(stage, A)
    del bundles[B]
    request = delivery(stage, A, bundles=bundles)
    stops(stage, A, lab.accept, request, WrongShares, "expected those of every other member")


@guarded_by("bundle-seal")
def test_shares_meant_for_another_peer_are_refused() -> None:
    stage = dealt(announced(advertised(fresh())))
    bundles = {**bundles_for(stage, A), B: bundles_for(stage, C)[B]}
    request = delivery(stage, A, bundles=bundles)
    stops(stage, A, lab.accept, request, WrongShares, "shares of lab-02 do not open.*receiver")


@guarded_by("context")
def test_reflected_shares_are_refused() -> None:
    """A lab's own sealed shares come back as if they were a peer's."""
    stage = dealt(announced(advertised(fresh())))
    bundles = {**bundles_for(stage, A), B: bundles_for(stage, B)[A]}
    request = delivery(stage, A, bundles=bundles)
    stops(stage, A, lab.accept, request, WrongShares, "with sender 'lab-01', expected 'lab-02'")


@guarded_by("context")
def test_shares_of_an_older_set_up_are_refused() -> None:
    first = dealt(announced(advertised(fresh(), setup=1)))
    later = dealt(announced(advertised(first, setup=2, first_slot=2)))
    bundles = {**bundles_for(later, A), B: bundles_for(first, A)[B]}
    request = delivery(later, A, bundles=bundles)
    stops(later, A, lab.accept, request, WrongShares, "with slot '0', expected '2'")


@guarded_by("bundle-transcript")
def test_peer_that_dealt_for_other_keys_is_noticed() -> None:
    stage = dealt(announced(advertised(fresh())))
    bundle = lab.seal_shares(stage.states[B], identity(B), A, bytes(32), bytes(128))
    request = delivery(stage, A, bundles={**bundles_for(stage, A), B: bundle})
    stops(stage, A, lab.accept, request, Equivocation, "lab-02 dealt its shares for other key")


# ---- a dealer whose sealed shares are not those that it signed


def garbled(stage: Stage, dealer: str, peer: str) -> Stage:
    """A hostile dealer's shares for one peer: well sealed, its hashes well signed, and zeros."""
    hashes = share_hashes(
        stage.states[dealer].transcript, dealer, peer, 0, stage.states[dealer].dealt[peer]
    )
    bundle = seal(
        bytes(128),
        stage.cohort.share_context(dealer, peer, 0),
        sender=identity(dealer),
        receiver=identity(peer).public,
        manifest=wire.encode({"hashes": hashes, "transcript": stage.states[dealer].transcript}),
    ).to_bytes()
    assert stage.setup is not None
    own = stage.setup.dealt[dealer]
    lied = replace(own, bundles={**own.bundles, peer: bundle})
    checked = {**stage.setup.dealt, dealer: lied}
    return replace(stage, setup=coordinator.deliver(stage.setup.announcement, CHIEF, checked))


def complained(stage: Stage, name: str) -> tuple[Stage, bytes]:
    """The lab's complaint of what was delivered."""
    assert stage.setup is not None
    stage, replies = answers(stage, lab.accept, {name: stage.setup.requests[name]})
    return stage, replies[name]


@guarded_by("bundle-hashes")
def test_shares_that_differ_from_their_signed_hashes_are_complained_of() -> None:
    """Otherwise a hostile dealer could make an honest peer look like the liar later."""
    stage, complaint = complained(garbled(dealt(announced(advertised(fresh()))), B, A), A)
    assert stage.setup is not None
    assert coordinator.check_ready(stage.setup, A, complaint) == {B}
    assert stage.states[A].stopped == "", "the lab that was cheated is not out"


def shown(stage: Stage, complaint: bytes, **changes: object) -> tuple[Stage, bytes]:
    """What the accused dealer shows of lab A's shares, or what it would if it lied."""
    assert stage.setup is not None
    [(dealer, request)] = coordinator.call_open(stage.setup, CHIEF, {A: complaint}).items()
    stage, replies = answers(stage, lab.open_dealt, {dealer: request})
    reply = replies[dealer]
    return stage, forged(reply, LABEL_OPENED, identity(dealer), **changes) if changes else reply


def test_dealer_that_shows_what_it_signed_goes_on_with_the_lab_that_complained() -> None:
    stage, complaint = complained(garbled(dealt(announced(advertised(fresh()))), B, A), A)
    stage, reply = shown(stage, complaint)
    assert stage.setup is not None
    opened = {B: coordinator.check_opened(stage.setup, B, [A], reply)}
    requests = coordinator.deliver_opened(stage.setup, CHIEF, opened)
    stage, replies = answers(stage, lab.accept, requests)
    assert coordinator.check_ready(stage.setup, A, replies[A]) == frozenset()  # type: ignore[arg-type]
    stage = accepted(stage, without=[A])
    stage = revealed(agreed(polled(masked(stage))))
    assert np.array_equal(unmasked(stage), true_sum(stage))


@guarded_by("opened-hashes")
def test_dealer_that_shows_other_shares_than_it_signed_is_named() -> None:
    stage, complaint = complained(garbled(dealt(announced(advertised(fresh()))), B, A), A)
    stage, reply = shown(stage, complaint, rows={A: bytes(128)})
    assert stage.setup is not None
    with pytest.raises(WrongShares, match="lab-02 dealt lab-01 other shares than") as caught:
        coordinator.check_opened(stage.setup, B, [A], reply)
    assert caught.value.lab == B


@guarded_by("opened-complete")
def test_dealer_that_shows_nothing_is_named() -> None:
    stage, complaint = complained(garbled(dealt(announced(advertised(fresh()))), B, A), A)
    stage, reply = shown(stage, complaint, rows={})
    assert stage.setup is not None
    with pytest.raises(WrongShares, match="lab-02 did not show the shares") as caught:
        coordinator.check_opened(stage.setup, B, [A], reply)
    assert caught.value.lab == B


def open_call(stage: Stage, **changes: object) -> bytes:
    """A request to lab B to show lab A's shares, with other fields."""
    assert stage.setup is not None
    transcript = stage.setup.announcement.transcript
    complaint = sign(
        identity(A),
        LABEL_COMPLAINT,
        wire.encode({"dealers": [B], "transcript": transcript}),
    )
    body = {"complaints": {A: complaint}, "transcript": transcript, **changes}
    return sign(CHIEF, LABEL_OPEN, wire.encode(body))  # type: ignore[arg-type]


@guarded_by("signature", "complaint-signature")
def test_coordinator_cannot_complain_in_a_labs_name() -> None:
    """With a forged complaint of every lab it would have all shares of a secret."""
    stage = dealt(announced(advertised(fresh())))
    assert stage.setup is not None
    body = wire.encode({"dealers": [B], "transcript": stage.setup.announcement.transcript})
    fake = sign(Identity.generate(A), LABEL_COMPLAINT, body)
    request = open_call(stage, complaints={A: fake})
    stops(stage, B, lab.open_dealt, request, Unreadable, "complaint of lab-01 is not signed by it")


@guarded_by("complaint-transcript")
def test_complaint_of_an_older_set_up_opens_nothing() -> None:
    stage = dealt(announced(advertised(fresh())))
    old = sign(identity(A), LABEL_COMPLAINT, wire.encode({"dealers": [B], "transcript": bytes(32)}))
    request = open_call(stage, complaints={A: old})
    stops(stage, B, lab.open_dealt, request, Equivocation, "complaint of lab-01 is about another")


@guarded_by("open-accused")
def test_complaint_of_another_dealer_opens_nothing() -> None:
    stage = dealt(announced(advertised(fresh())))
    assert stage.setup is not None
    body = wire.encode({"dealers": [C], "transcript": stage.setup.announcement.transcript})
    request = open_call(stage, complaints={A: sign(identity(A), LABEL_COMPLAINT, body)})
    stops(stage, B, lab.open_dealt, request, Equivocation, "lab-01 does not complain of this lab")


@guarded_by("open-transcript")
def test_dealt_shares_are_not_shown_for_another_set_up() -> None:
    stage = dealt(announced(advertised(fresh())))
    request = open_call(stage, transcript=bytes(32))
    stops(stage, B, lab.open_dealt, request, Equivocation, "shown for other key lists")


@guarded_by("open-turn")
def test_dealt_shares_are_not_shown_once_a_slot_was_used() -> None:
    stage = masked(accepted(dealt(announced(advertised(fresh())))))
    refuses(stage, B, lab.open_dealt, open_call(stage), OutOfTurn, "or after their use")


@guarded_by("complaint-members")
def test_lab_that_complains_of_itself_is_named() -> None:
    stage = dealt(announced(advertised(fresh())))
    assert stage.setup is not None
    body = wire.encode({"dealers": [A], "transcript": stage.setup.announcement.transcript})
    with pytest.raises(Equivocation, match="lab-01 complains of"):
        coordinator.check_ready(stage.setup, A, sign(identity(A), LABEL_COMPLAINT, body))


@guarded_by("accept-turn")
def test_second_membership_for_one_set_up_is_refused() -> None:
    stage = accepted(dealt(announced(advertised(fresh(5, threshold=3)))))
    bundles = {name: bundles_for(stage, A)[name] for name in (B, C)}
    request = delivery(stage, A, members=[A, B, C], bundles=bundles)
    refuses(stage, A, lab.accept, request, OutOfTurn, "or twice")


# ---- labs that lie to the coordinator


@guarded_by("distinct-keys", "distinct-keys-coordinator")
def test_lab_that_copies_keys_is_named_to_the_coordinator() -> None:
    stage = advertised(fresh())
    assert stage.opening is not None
    public = body_of(stage.replies[C], LABEL_KEYS, identity(C))["public"]
    copied = forged(stage.replies[D], LABEL_KEYS, identity(D), public=public)
    with pytest.raises(WrongKeys, match="lab-04 has a slot key of lab-03") as caught:
        coordinator.announce(stage.opening, CHIEF, {**stage.replies, D: copied})
    assert caught.value.lab == D


@guarded_by("min-cohort", "too-few-lists")
def test_coordinator_announces_no_cohort_below_the_minimum() -> None:
    stage = advertised(fresh(5, threshold=3, min_cohort=4))
    assert stage.opening is not None
    with pytest.raises(CohortTooSmall, match="key lists: 3 labs, need 4"):
        coordinator.announce(stage.opening, CHIEF, {n: stage.replies[n] for n in (A, B, C)})


@guarded_by("min-cohort", "too-few-dealers")
def test_coordinator_delivers_to_no_cohort_below_the_minimum() -> None:
    with pytest.raises(CohortTooSmall, match="members: 3 labs, need 4"):
        dealt(announced(advertised(fresh(5, threshold=3, min_cohort=4))), without=[D, "lab-05"])


def shares_of(stage: Stage, name: str) -> tuple[Stage, bytes]:
    assert stage.announcement is not None
    stage, replies = answers(stage, lab.share, {name: stage.announcement.request})
    return stage, replies[name]


@guarded_by("dealt-transcript")
def test_lab_that_dealt_for_other_keys_is_named() -> None:
    stage, reply = shares_of(announced(advertised(fresh())), A)
    assert stage.announcement is not None
    signed = body_of(reply, LABEL_SHARES, identity(A))["dealt"]
    other = forged(signed, LABEL_DEALT, identity(A), transcript=bytes(32))
    reply = forged(reply, LABEL_SHARES, identity(A), dealt=other)
    with pytest.raises(Equivocation, match="lab-01 dealt its shares for other key lists"):
        coordinator.check_shares(stage.announcement, A, reply)


@guarded_by("dealt-hashes")
def test_lab_that_signs_two_hashes_of_one_share_is_named() -> None:
    """Its peer took the share for the one; by the other, that peer would seem the liar."""
    stage, reply = shares_of(announced(advertised(fresh())), A)
    assert stage.announcement is not None
    signed = body_of(reply, LABEL_SHARES, identity(A))["dealt"]
    hashes = body_of(signed, LABEL_DEALT, identity(A))["hashes"]
    other = forged(signed, LABEL_DEALT, identity(A), hashes={**hashes, B: bytes(128)})
    reply = forged(reply, LABEL_SHARES, identity(A), dealt=other)
    with pytest.raises(Equivocation, match="lab-01 signed two hashes of one share for lab-02"):
        coordinator.check_shares(stage.announcement, A, reply)


@guarded_by("dealt-manifest")
def test_lab_that_sealed_shares_for_other_keys_is_named() -> None:
    stage, reply = shares_of(announced(advertised(fresh())), A)
    assert stage.announcement is not None
    bundles = body_of(reply, LABEL_SHARES, identity(A))["bundles"]
    bundles[B] = lab.seal_shares(stage.states[A], identity(A), B, bytes(32), bytes(128))
    reply = forged(reply, LABEL_SHARES, identity(A), bundles=bundles)
    with pytest.raises(Equivocation, match="lab-01 dealt lab-02 shares for other key lists"):
        coordinator.check_shares(stage.announcement, A, reply)


@guarded_by("dealt-complete")
def test_lab_that_dealt_to_some_peers_only_is_named() -> None:
    stage, reply = shares_of(announced(advertised(fresh())), A)
    assert stage.announcement is not None
    bundles = body_of(reply, LABEL_SHARES, identity(A))["bundles"]
    del bundles[B]
    reply = forged(reply, LABEL_SHARES, identity(A), bundles=bundles)
    with pytest.raises(WrongShares, match="lab-01 did not deal shares to every peer"):
        coordinator.check_shares(stage.announcement, A, reply)


@guarded_by("dealt-seal")
def test_lab_that_deals_rubbish_is_named() -> None:
    stage, reply = shares_of(announced(advertised(fresh())), A)
    assert stage.announcement is not None
    bundles = {**body_of(reply, LABEL_SHARES, identity(A))["bundles"], B: b"rubbish"}
    reply = forged(reply, LABEL_SHARES, identity(A), bundles=bundles)
    with pytest.raises(WrongShares, match="shares of lab-01 for lab-02: not a sealed message"):
        coordinator.check_shares(stage.announcement, A, reply)


@guarded_by("ready-view")
def test_lab_with_another_view_is_named() -> None:
    stage = dealt(announced(advertised(fresh())))
    assert stage.setup is not None
    _, replies = answers(stage, lab.accept, {A: stage.setup.requests[A]})
    reply = forged(replies[A], LABEL_READY, identity(A), view=bytes(32))
    with pytest.raises(Equivocation, match="lab-01 has another view"):
        coordinator.check_ready(stage.setup, A, reply)


@guarded_by("signature")
def test_reply_in_another_labs_name_is_refused() -> None:
    stage = dealt(announced(advertised(fresh())))
    assert stage.setup is not None
    reply = sign(Identity.generate(A), LABEL_READY, wire.encode({"view": stage.setup.view}))
    with pytest.raises(Unreadable, match="not signed by lab-01"):
        coordinator.check_ready(stage.setup, A, reply)


def test_commitments_of_two_slots_or_labs_differ_for_the_same_seed() -> None:
    seed = bytes(32)
    made = {seed_commitment(bytes(32), name, slot, seed) for name in (A, B) for slot in (0, 1)}
    assert len(made) == 4
