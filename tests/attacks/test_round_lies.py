"""Lies during a round of secure aggregation, to labs and to the coordinator. One claim each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy import wire
from cytofed.privacy.encoding import Encoding, Part, SumError, decode, encode, one_range
from cytofed.privacy.identity import Identity, sign
from cytofed.privacy.masks import add_words
from cytofed.privacy.secagg import (
    LABEL_AGREED,
    LABEL_DEALT,
    LABEL_REVEAL,
    LABEL_REVEALED,
    LABEL_SURVIVORS,
    AlreadyAnswered,
    BadAgreement,
    CohortTooSmall,
    Equivocation,
    Fraud,
    NotEnoughShares,
    OutOfTurn,
    Replayed,
    RoundClosed,
    SecaggError,
    Statement,
    Stopped,
    Unreadable,
    WrongShares,
    share_hashes,
    transcript_digest,
)
from tests.attacks.stage import (
    CHIEF,
    MODEL,
    ORDER,
    OTHER,
    Stage,
    accepted,
    advertised,
    agreed,
    announced,
    answers,
    body_of,
    dealt,
    forged,
    fresh,
    guarded_by,
    identity,
    masked,
    names,
    polled,
    ready,
    refuses,
    revealed,
    stops,
    true_sum,
    unmasked,
    words_of,
)

A, B, C, D = names(4)


def mask(stage: Stage, name: str = A, **changes: Any) -> lab.LabState:
    """Ask a lab for a vector: round 1, slot 0, the model of the round, unless changed."""
    asked = {"round": 1, "slot": 0, "order_sha256": ORDER, "work_sha256": MODEL, **changes}
    return lab.mask(stage.states[name], words_of(name), **asked)


def stops_masking(stage: Stage, error: type[Exception], match: str, **changes: Any) -> None:
    """The lab leaves the vector as it is, says why, and answers nothing ever after."""
    words_W = words_of(A)
    asked = {"round": 1, "slot": 0, "order_sha256": ORDER, "work_sha256": MODEL, **changes}
    with pytest.raises(error, match=match) as caught:
        lab.mask(stage.states[A], words_W, **asked)
    assert np.array_equal(words_W, words_of(A))
    state = caught.value.state  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        mask(stage.with_state(A, state), round=9, slot=1)


def survivor_set(stage: Stage, **changes: Any) -> bytes:
    """The survivor set of a poll, with other fields."""
    assert stage.poll is not None
    return forged(stage.poll.request, LABEL_SURVIVORS, CHIEF, **changes)


def reveal_call(stage: Stage, **changes: Any) -> bytes:
    """The request to reveal, with other fields."""
    request = coordinator.call_reveal(stage.poll, CHIEF, stage.agreements)  # type: ignore[arg-type]
    return forged(request, LABEL_REVEAL, CHIEF, **changes)


def agreement(name: str, statement: bytes) -> bytes:
    """What ``name`` would sign if it helped the coordinator to lie."""
    return sign(identity(name), LABEL_AGREED, statement)


# ---- mask


@guarded_by("slot-reuse")
def test_slot_is_never_used_twice() -> None:
    stage = masked(ready())
    stops_masking(stage, Replayed, "slot 0 was used", round=2)


@guarded_by("slot-reuse")
def test_slot_is_never_used_twice_after_a_restart() -> None:
    stage = masked(ready())
    restarted = lab.LabState.from_bytes(stage.states[A].to_bytes())
    stops_masking(stage.with_state(A, restarted), Replayed, "slot 0 was used", round=2)


@guarded_by("slot-reuse")
def test_slot_that_was_passed_over_is_gone() -> None:
    stage = masked(ready(), slot=1)
    stops_masking(stage, Replayed, "slot 0 was used or passed over", round=2)


@guarded_by("one-model-a-round")
def test_round_with_other_weights_is_refused() -> None:
    stage = masked(ready())
    stops_masking(stage, Equivocation, "other global weights", slot=1, work_sha256=OTHER)


@guarded_by("older-round")
def test_replayed_round_is_refused() -> None:
    stage = masked(ready(), round=2)
    with pytest.raises(RoundClosed, match="round 1 was asked again after round 2"):
        mask(stage, round=1, slot=1)


@guarded_by("same-vector-again")
def test_vector_that_was_sent_is_not_masked_again() -> None:
    stage = masked(ready())
    with pytest.raises(AlreadyAnswered, match="round 1, slot 0 was answered"):
        mask(stage)


@guarded_by("slot-range")
def test_slot_beyond_the_set_up_is_refused() -> None:
    with pytest.raises(OutOfTurn, match="slot 2 is beyond the set-up"):
        mask(ready(), slot=2)


@guarded_by("mask-before-ready")
def test_no_vector_leaves_before_the_set_up_is_complete() -> None:
    with pytest.raises(OutOfTurn, match="before the set-up was complete"):
        mask(dealt(announced(advertised(fresh()))))


@guarded_by("stopped", "stopped-mask")
def test_stopped_lab_stays_stopped_after_a_restart() -> None:
    stage = masked(ready())
    with pytest.raises(Replayed) as caught:
        mask(stage, round=2)
    assert caught.value.state is not None
    state = lab.LabState.from_bytes(caught.value.state.to_bytes())
    with pytest.raises(Stopped, match="slot 0 was used"):
        mask(stage.with_state(A, state), slot=1, round=2)
    opening = coordinator.begin(stage.cohort, CHIEF, setup=2, first_slot=2, slots=1)
    with pytest.raises(Stopped, match="slot 0 was used"):
        lab.advertise(state, identity(A), opening.request)


# ---- survivor sets


@guarded_by("one-set-a-slot")
def test_two_survivor_sets_for_one_slot_are_refused() -> None:
    """With both, the coordinator would have both secrets of the lab that differs."""
    stage = masked(ready(5, 2, 3))
    first = agreed(polled(stage))
    second = polled(first, [A, B, C, D])
    assert second.poll is not None
    stops(second, A, lab.agree, second.poll.request, Equivocation, "two survivor sets")


@guarded_by("one-set-a-model")
def test_second_sum_over_other_survivors_is_refused_in_a_retry() -> None:
    """The difference of the two sums would be one lab's update."""
    stage = revealed(agreed(polled(masked(ready(5, 2, 3)))))
    retry = polled(masked(stage, [A, B, C, D], slot=1), slot=1)
    assert retry.poll is not None
    refuses(retry, A, lab.agree, retry.poll.request, RoundClosed, "would show the difference")


@guarded_by("one-set-a-model")
def test_second_sum_over_other_survivors_is_refused_after_a_new_set_up() -> None:
    stage = revealed(agreed(polled(masked(ready(5, 1, 3)))))
    again = accepted(dealt(announced(advertised(stage, setup=2, first_slot=1, slots=1))))
    retry = polled(masked(again, [A, B, C, D], slot=1), slot=1)
    assert retry.poll is not None
    refuses(retry, A, lab.agree, retry.poll.request, RoundClosed, "would show the difference")


@guarded_by("view")
def test_survivor_set_over_other_keys_is_refused() -> None:
    stage = polled(masked(ready()))
    request = survivor_set(stage, view=bytes(32))
    stops(stage, A, lab.agree, request, Equivocation, "other keys or members")


@guarded_by("agreed-order")
def test_labs_that_were_told_another_order_are_noticed() -> None:
    """Different weights for one lab would let its update show in the sum."""
    stage = polled(masked(ready()))
    request = survivor_set(stage, order_sha256=OTHER)
    stops(stage, A, lab.agree, request, Equivocation, "labs were told different things")


@guarded_by("current-attempt")
def test_survivor_set_of_another_round_is_refused() -> None:
    stage = polled(masked(ready()))
    request = survivor_set(stage, round=2)
    refuses(stage, A, lab.agree, request, OutOfTurn, "survivor set for round 2, slot 0")


@guarded_by("current-attempt")
def test_survivor_set_of_an_abandoned_slot_is_refused() -> None:
    first = polled(masked(ready()))
    later = masked(first, slot=1)
    assert first.poll is not None
    refuses(later, A, lab.agree, first.poll.request, OutOfTurn, "survivor set for round 1, slot 0")


@guarded_by("agree-turn")
def test_survivor_set_before_any_vector_is_refused() -> None:
    stage = ready()
    statement = Statement(stage.states[A].view, 1, 0, ORDER, (A, B, C, D))
    request = sign(CHIEF, LABEL_SURVIVORS, statement.to_bytes())
    refuses(stage, A, lab.agree, request, OutOfTurn, "before this lab masked a vector")


@guarded_by("survivors-known")
def test_survivor_that_is_no_member_is_refused() -> None:
    stage = polled(masked(ready()))
    request = survivor_set(stage, survivors=[A, B, C, "mallory"])
    stops(stage, A, lab.agree, request, Equivocation, "'mallory'.* are not members")


@guarded_by("called-dropped")
def test_lab_that_is_called_dropped_after_it_answered_stops() -> None:
    stage = polled(masked(ready()))
    request = survivor_set(stage, survivors=[B, C, D])
    stops(stage, A, lab.agree, request, Equivocation, "missing in the survivor set")


@guarded_by("min-cohort", "small-survivor-set")
def test_survivor_set_below_the_minimum_is_refused() -> None:
    stage = accepted(dealt(announced(advertised(fresh(5, threshold=3, min_cohort=4)))))
    stage = polled(masked(stage))
    request = survivor_set(stage, survivors=[A, B, C])
    stops(stage, A, lab.agree, request, CohortTooSmall, "survivor set: 3 labs, need 4")


@guarded_by("threshold", "small-survivor-set")
def test_survivor_set_below_the_threshold_is_refused() -> None:
    stage = polled(masked(ready(6)))
    request = survivor_set(stage, survivors=[A, B, C, D])
    stops(stage, A, lab.agree, request, NotEnoughShares, "survivor set: 4 labs, need 5")


@guarded_by("name-order")
def test_survivor_named_twice_is_refused() -> None:
    stage = polled(masked(ready()))
    request = survivor_set(stage, survivors=[A, A, B, C])
    stops(stage, A, lab.agree, request, Unreadable, "repeated or out of order")


# ---- reveal


@guarded_by("reveal-turn")
def test_no_share_leaves_before_this_lab_agreed() -> None:
    stage = agreed(polled(masked(ready())), by=[B, C, D])
    refuses(stage, A, lab.reveal, reveal_call(stage), OutOfTurn, "before this lab signed")


@guarded_by("reveal-statement")
def test_no_share_leaves_for_another_survivor_set() -> None:
    """Labs that help the coordinator signed it; this lab did not."""
    stage = agreed(polled(masked(ready(5, 2, 3))))
    other = polled(stage, [A, B, C, D])
    assert other.poll is not None
    statement = other.poll.statement.to_bytes()
    agreements = {name: agreement(name, statement) for name in (B, C, D)}
    request = reveal_call(stage, statement=statement, agreements=agreements)
    stops(stage, A, lab.reveal, request, Equivocation, "another survivor set than this lab signed")


@guarded_by("agreement-count", "agreements")
def test_no_share_leaves_below_the_threshold_of_agreements() -> None:
    stage = agreed(polled(masked(ready())))
    two = {name: stage.agreements[name] for name in (A, B)}
    request = reveal_call(stage, agreements=two)
    stops(stage, A, lab.reveal, request, NotEnoughShares, "agreements: 2 labs, need 3")


@guarded_by("signature", "agreement-signature", "agreements")
def test_forged_agreement_is_refused() -> None:
    stage = agreed(polled(masked(ready())))
    assert stage.poll is not None
    fake = sign(Identity.generate(D), LABEL_AGREED, stage.poll.statement.to_bytes())
    request = reveal_call(stage, agreements={**stage.agreements, D: fake})
    stops(stage, A, lab.reveal, request, BadAgreement, "agreement of lab-04 is not signed by it")


@guarded_by("agreement-statement", "agreements")
def test_agreement_on_another_set_does_not_count() -> None:
    stage = agreed(polled(masked(ready(5, 2, 3))))
    assert stage.poll is not None
    other = replace(stage.poll.statement, survivors=(A, B, C, D)).to_bytes()
    request = reveal_call(stage, agreements={**stage.agreements, D: agreement(D, other)})
    stops(stage, A, lab.reveal, request, BadAgreement, "lab-04 signed another survivor set")


@guarded_by("agreement-survivor", "agreements")
def test_agreement_of_a_dropped_lab_does_not_count() -> None:
    stage = agreed(polled(masked(ready(5, 2, 3), [A, B, C])))
    assert stage.poll is not None
    extra = agreement(D, stage.poll.statement.to_bytes())
    request = reveal_call(stage, agreements={**stage.agreements, D: extra})
    stops(stage, A, lab.reveal, request, BadAgreement, "lab-04 signed, but is not among")


@guarded_by("reveal-once")
def test_shares_of_a_slot_leave_once() -> None:
    stage = revealed(agreed(polled(masked(ready()))))
    three = {name: stage.agreements[name] for name in (A, B, C)}
    request = reveal_call(stage, agreements=three)
    refuses(stage, A, lab.reveal, request, AlreadyAnswered, "shares of slot 0 were released")


def test_lab_releases_exactly_one_secret_of_each_member() -> None:
    stage = revealed(agreed(polled(masked(ready(5, 2, 3), [A, B, C]))))
    before, after = ready(5, 2, 3).states[A], stage.states[A]
    released = body_of(stage.replies[A], LABEL_REVEALED, identity(A))["shares"]
    for name in names(5):
        key, seed = before.shares[name][:32], before.shares[name][32:64]
        assert released[name] == (seed if name in (A, B, C) else key)
        withheld = key if name in (A, B, C) else seed
        assert withheld not in after.to_bytes()
        assert after.shares[name][:64] == bytes(64)


# ---- labs that lie to the coordinator


@guarded_by("signature", "agreed-signature")
def test_agreement_in_another_labs_name_is_refused() -> None:
    stage = polled(masked(ready()))
    assert stage.poll is not None
    fake = sign(Identity.generate(D), LABEL_AGREED, stage.poll.statement.to_bytes())
    with pytest.raises(BadAgreement, match=r"agreement of lab-04: .*not signed by lab-04"):
        coordinator.check_agreed(stage.poll, D, fake)


@guarded_by("agreed-statement")
def test_lab_that_signs_another_set_is_named() -> None:
    stage = polled(masked(ready()))
    assert stage.poll is not None
    other = replace(stage.poll.statement, survivors=(B, C, D)).to_bytes()
    with pytest.raises(BadAgreement, match="lab-04 signed another survivor set"):
        coordinator.check_agreed(stage.poll, D, agreement(D, other))


@guarded_by("min-cohort", "too-few-survivors")
def test_coordinator_calls_no_survivor_set_below_the_minimum() -> None:
    stage = accepted(dealt(announced(advertised(fresh(5, threshold=3, min_cohort=4)))))
    with pytest.raises(CohortTooSmall, match="survivors: 3 labs, need 4"):
        polled(masked(stage, [A, B, C]))


@guarded_by("agreement-count", "too-few-agreed")
def test_coordinator_asks_for_no_share_below_the_threshold() -> None:
    stage = agreed(polled(masked(ready())), by=[A, B])
    assert stage.poll is not None
    with pytest.raises(NotEnoughShares, match="agreements: 2 labs, need 3"):
        coordinator.call_reveal(stage.poll, CHIEF, stage.agreements)


@guarded_by("reveal-count")
def test_nothing_is_unmasked_below_the_threshold() -> None:
    stage = revealed(agreed(polled(masked(ready()))), by=[A, B])
    before = stage.total_W.copy()
    with pytest.raises(NotEnoughShares, match="revealed shares: 2 labs, need 3"):
        unmasked(stage)
    assert np.array_equal(stage.total_W, before)


def lies(stage: Stage, name: str, **changes: Any) -> Stage:
    """A lab reveals something else than it should."""
    reply = forged(stage.replies[name], LABEL_REVEALED, identity(name), **changes)
    return replace(stage, replies={**stage.replies, name: reply})


def shares_of(stage: Stage, name: str) -> dict[str, bytes]:
    shares = body_of(stage.replies[name], LABEL_REVEALED, identity(name))["shares"]
    assert isinstance(shares, dict)
    return shares


@guarded_by("share-hash")
def test_wrong_share_names_the_lab_that_sent_it() -> None:
    stage = revealed(agreed(polled(masked(ready()))))
    stage = lies(stage, B, shares={**shares_of(stage, B), C: bytes(32)})
    with pytest.raises(WrongShares, match="lab-02 revealed a share of lab-03") as caught:
        unmasked(stage)
    assert caught.value.lab == B


@guarded_by("share-size")
def test_share_of_another_size_is_refused() -> None:
    stage = revealed(agreed(polled(masked(ready()))))
    stage = lies(stage, B, shares={**shares_of(stage, B), B: bytes(33)})
    with pytest.raises(WrongShares, match="lab-02 revealed a share of 33 bytes"):
        unmasked(stage)


@guarded_by("revealed-complete")
def test_withheld_share_is_noticed() -> None:
    stage = revealed(agreed(polled(masked(ready()))))
    shares = shares_of(stage, B)
    del shares[C]
    with pytest.raises(WrongShares, match="lab-02 did not reveal a share of every member"):
        unmasked(lies(stage, B, shares=shares))


@guarded_by("revealed-statement")
def test_shares_for_another_survivor_set_are_refused() -> None:
    stage = revealed(agreed(polled(masked(ready()))))
    stage = lies(stage, B, statement=bytes(32))
    with pytest.raises(Equivocation, match="lab-02 revealed shares for another survivor set"):
        unmasked(stage)


@guarded_by("revealed-survivor")
def test_shares_of_a_dropped_lab_are_refused() -> None:
    stage = revealed(agreed(polled(masked(ready(5, 2, 3), [A, B, C]))))
    body = body_of(stage.replies[A], LABEL_REVEALED, identity(A))
    reply = sign(identity(D), LABEL_REVEALED, wire.encode(body))
    with pytest.raises(WrongShares, match="lab-04 is not among the survivors"):
        unmasked(replace(stage, replies={**stage.replies, D: reply}))


def hostile_dealer(kind: int) -> Stage:
    """Lab D deals well-signed shares of a secret that it did not commit to (0: key, 1: seed)."""
    stage = announced(advertised(fresh(5, threshold=3)))
    state = stage.states[D]
    changed = replace(state, keys=bytes(64)) if kind == 0 else replace(state, seeds=bytes(64))
    stage = accepted(dealt(stage.with_state(D, changed)))
    return stage.with_state(D, replace(stage.states[D], keys=state.keys, seeds=state.seeds))


@guarded_by("seed-commitment")
def test_forged_seed_commitment_names_its_dealer() -> None:
    stage = revealed(agreed(polled(masked(hostile_dealer(1)))))
    with pytest.raises(WrongShares, match="the seed of lab-04 is not the one") as caught:
        unmasked(stage)
    assert caught.value.lab == D


@guarded_by("key-commitment")
def test_forged_key_names_its_dealer() -> None:
    stage = revealed(agreed(polled(masked(hostile_dealer(0), [A, B, C]))))
    with pytest.raises(WrongShares, match="the key of lab-04 is not the one") as caught:
        unmasked(stage)
    assert caught.value.lab == D


# ---- proof that a dealer lied


def spoiled(dealer: Stage | None = None) -> tuple[Stage, dict[str, Any]]:
    """A sum of all five labs that could not be unmasked, and every share that was released."""
    stage = revealed(agreed(polled(masked(hostile_dealer(1) if dealer is None else dealer))))
    assert stage.poll is not None
    return stage, {
        name: coordinator.check_revealed(stage.poll, name, reply)
        for name, reply in stage.replies.items()
    }


def proof(stage: Stage, released: Mapping[str, Any], dealer: str) -> Fraud:
    """What the coordinator would show of a dealer, true or not."""
    assert stage.poll is not None
    announcement = stage.poll.setup.announcement
    return Fraud(
        announcement.opening.digest, announcement.lists, 0, 2,
        stage.poll.setup.dealt[dealer].signed, 0,
        {name: shares[dealer] for name, shares in released.items()},
    )  # fmt: skip


def accusation(dealer: str, fraud: Fraud) -> bytes:
    """The request that shows it to labs."""
    return coordinator.call_convict(CHIEF, {dealer: fraud.to_bytes()})


def set_up_again(stage: Stage, by: Iterable[str]) -> Stage:
    """Another set-up, and the same model masked by these labs only."""
    alive = replace(stage, states={name: stage.states[name] for name in by}, setup=None)
    begun = advertised(alive, setup=2, first_slot=2)
    return masked(accepted(dealt(announced(begun))), by, slot=2)


def test_after_proof_of_fraud_the_same_model_is_summed_without_the_liar() -> None:
    stage, released = spoiled()
    poll, others = stage.poll, [name for name in names(5) if name != D]
    assert poll is not None
    with pytest.raises(WrongShares):
        unmasked(stage)
    request = coordinator.call_convict(CHIEF, {D: coordinator.prove(poll, released, D)})
    told, replies = answers(stage, lab.convict, dict.fromkeys(others, request))
    for name, reply in replies.items():
        coordinator.check_convicted(stage.cohort, [D], name, reply)
    assert all(state.liars == (D,) for name, state in told.states.items() if name != D)
    again = set_up_again(told, others)
    again = revealed(agreed(polled(again, slot=2)))
    assert np.array_equal(unmasked(again), true_sum(again))


@guarded_by("one-set-a-model")
def test_without_proof_of_fraud_no_second_sum_is_opened() -> None:
    stage, _ = spoiled()
    again = polled(set_up_again(stage, [A, B, C, "lab-05"]), slot=2)
    assert again.poll is not None
    for name in (A, B, C):
        refuses(again, name, lab.agree, again.poll.request, RoundClosed, "would show the diff")


@guarded_by("one-set-a-model")
def test_proof_of_fraud_of_one_lab_leaves_out_no_other() -> None:
    stage, released = spoiled()
    assert stage.poll is not None
    request = coordinator.call_convict(CHIEF, {D: coordinator.prove(stage.poll, released, D)})
    stage, _ = answers(stage, lab.convict, dict.fromkeys([A, B, C, "lab-05"], request))
    again = polled(set_up_again(stage, [A, B, C]), slot=2)
    assert again.poll is not None
    refuses(again, A, lab.agree, again.poll.request, RoundClosed, "would show the difference")


@guarded_by("fraud", "fraud-seed")
def test_dealer_whose_shares_give_what_it_committed_to_is_convicted_by_nobody() -> None:
    stage, released = spoiled(ready(5, 2, 3))
    for shown in (released, {name: released[name] for name in (B, C, D)}):
        request = accusation(B, proof(stage, shown, B))
        stops(stage, A, lab.convict, request, WrongShares, "are those of the seed that it commit")


@guarded_by("fraud-share")
def test_invented_share_convicts_nobody() -> None:
    stage, released = spoiled(ready(5, 2, 3))
    lied = {**released, C: {**released[C], B: bytes(32)}}
    request = accusation(B, proof(stage, lied, B))
    stops(stage, A, lab.convict, request, WrongShares, "has a share that lab-02 did not deal")


@guarded_by("dealt-signature", "signature")
def test_shares_dealt_in_another_labs_name_convict_nobody() -> None:
    """The coordinator deals shares of a seed of its own and signs their hashes."""
    stage, released = spoiled(ready(5, 2, 3))
    true = proof(stage, released, B)
    transcript = transcript_digest(true.opening, dict(true.lists))
    dealt_by_it = {name: bytes([at]) * 32 for at, name in enumerate(names(5))}
    hashes = {
        name: share_hashes(transcript, B, name, 0, (bytes(32) + share) * 2)
        for name, share in dealt_by_it.items()
    }
    body = wire.encode({"hashes": hashes, "transcript": transcript})
    signed = sign(Identity.generate(B), LABEL_DEALT, body)
    request = accusation(B, replace(true, dealt=signed, shares=dealt_by_it))
    stops(stage, A, lab.convict, request, WrongShares, "shares of lab-02 are not signed by it")


@guarded_by("dealt-transcript")
def test_shares_counted_in_another_order_convict_nobody() -> None:
    """True shares at wrong places give a wrong seed: who holds which is what the dealer saw."""
    stage, released = spoiled(ready(5, 2, 3))
    true = proof(stage, released, B)
    without = {name: document for name, document in true.lists.items() if name != A}
    shares = {name: share for name, share in true.shares.items() if name != A}
    request = accusation(B, replace(true, lists=without, shares=shares))
    stops(stage, A, lab.convict, request, Equivocation, "lab-02 dealt its shares for other key")


def test_proof_with_too_few_shares_or_of_another_slot_convicts_nobody() -> None:
    stage, released = spoiled()
    few = {name: released[name] for name in (A, B)}
    request = accusation(D, proof(stage, few, D))
    stops(stage, A, lab.convict, request, NotEnoughShares, "proof of fraud: 2 labs, need 3")
    true = proof(stage, released, D)
    for slot, why in ((1, "has a share that lab-04 did not deal"), (2, "is of no slot")):
        request = accusation(D, replace(true, slot=slot))
        stops(stage, A, lab.convict, request, WrongShares, why)
    request = accusation(D, replace(true, dealt=b"rubbish"))
    with pytest.raises(SecaggError):
        lab.convict(stage.states[A], identity(A), request)


def test_dealer_that_reveals_another_share_of_its_own_is_named_before_anything_is_unmasked() -> (
    None
):
    stage, _ = spoiled(ready(5, 2, 3))
    stage = lies(stage, B, shares={**shares_of(stage, B), B: bytes(32)})
    with pytest.raises(WrongShares, match="lab-02 revealed a share of lab-02") as caught:
        unmasked(stage)
    assert caught.value.lab == B


# ---- what the sum itself shows


def rounded(count: int, encoding: Encoding) -> np.ndarray[Any, Any]:
    """The sum of ``count`` encoded vectors of .5."""
    rng = np.random.default_rng(1)
    weight = encoding.max_weight
    total_W = np.zeros(encoding.words, encoding.dtype)
    for _ in range(count):
        values_P = np.full(encoding.parameters, 0.5, np.float32)
        add_words(total_W, encode(values_P, encoding, rng=rng, weight=weight).words_W)
    return total_W


@guarded_by("guard-word")
def test_vector_that_was_not_encoded_shows_in_the_guard_word() -> None:
    encoding = one_range(8, 1.0, bits=32, cohort=4)
    total_W = rounded(3, encoding)
    total_W[encoding.parameters] += 7
    with pytest.raises(SumError, match="guard word sums to 10, expected 3"):
        decode(total_W, encoding, count=3)


@guarded_by("sum-range")
def test_sum_beyond_what_the_labs_can_add_is_refused() -> None:
    encoding = one_range(8, 1.0, bits=32, cohort=8)
    total_W = rounded(3, encoding)
    total_W[0] = np.uint32(3 * encoding.top + 1)
    with pytest.raises(SumError, match="3 labs lies outside"):
        decode(total_W, encoding, count=3)


@guarded_by("weight-sum")
def test_weights_beyond_the_maximum_are_refused() -> None:
    encoding = Encoding((Part("update", 8, 1.0),), 32, 4, max_weight=10.0)
    total_W = rounded(3, encoding)
    total_W[encoding.parameters + 1] = 1 << 20
    with pytest.raises(SumError, match="weights sum to"):
        decode(total_W, encoding, count=3)


def test_update_with_nan_never_becomes_words() -> None:
    encoding = one_range(3, 1.0, bits=32, cohort=4)
    values_P = np.array([0.0, np.nan, 0.0], np.float32)
    with pytest.raises(Exception, match="non-finite values"):
        encode(values_P, encoding, rng=np.random.default_rng(1))


def test_two_labs_shown_different_weights_give_no_sum() -> None:
    """Their masks are bound to the weights: the coordinator cannot take them off."""
    stage = ready()
    one = masked(stage, [A, B, C])
    state = mask(stage, D, order_sha256=OTHER)
    lab.mask(
        stage.states[D],
        vector_W := words_of(D),
        round=1,
        slot=0,
        order_sha256=OTHER,
        work_sha256=MODEL,
    )
    stage = replace(
        one,
        states={**one.states, D: state},
        masked={**one.masked, D: vector_W},
        words={**one.words, D: words_of(D)},
        total_W=one.total_W + vector_W,
    )
    poll = polled(stage).poll
    assert poll is not None
    with pytest.raises(Equivocation, match="labs were told different things"):
        answers(stage, lab.agree, {D: poll.request})
