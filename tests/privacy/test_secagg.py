"""Secure aggregation when nobody lies: exact sums, dropouts, restarts, repeats, agreement with a
slow reference. Lies are in tests/attacks.

K labs, W words, P parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytofed.errors import InputError
from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy.encoding import Encoding, Part, decode, encode
from cytofed.privacy.masks import add_words
from cytofed.privacy.secagg import (
    AlreadyAnswered,
    Cohort,
    CohortTooSmall,
    NotEnoughShares,
    check_rules,
    default_threshold,
    seed_commitment,
)
from tests.attacks.stage import (
    CHIEF,
    MODEL,
    ORDER,
    accepted,
    advertised,
    agreed,
    announced,
    cohort_of,
    dealt,
    fresh,
    identity,
    masked,
    names,
    polled,
    ready,
    revealed,
    true_sum,
    unmasked,
    words_of,
)
from tests.privacy import reference_secagg as reference
from tests.vectors import make_vectors

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
A, B, C, D = names(4)

# Few sizes, so that a set-up is made once for each and shared by all examples.
SIZES = st.sampled_from([3, 4, 5, 6, 8, 13, 21])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=SIZES, dtype=st.sampled_from(["u4", "u2"]))
def test_sum_over_survivors_is_exact(data: st.DataObject, count: int, dtype: str) -> None:
    """Labs may drop before the vector, before the agreement and before the shares."""
    stage = ready(count, 1)
    need = stage.cohort.need
    order = data.draw(st.permutations(names(count)))
    survivors = order[: data.draw(st.integers(need, count))]
    signers = survivors[: data.draw(st.integers(need, len(survivors)))]
    revealers = signers[: data.draw(st.integers(need, len(signers)))]
    stage = masked(stage, survivors, dtype=dtype)
    stage = revealed(agreed(polled(stage), by=sorted(signers)), by=sorted(revealers))
    assert np.array_equal(unmasked(stage), true_sum(stage))


def test_forty_labs_of_which_thirteen_drop_sum_exactly() -> None:
    stage = ready(40, 1)
    stage = revealed(agreed(polled(masked(stage, names(40)[6:33]))))
    assert np.array_equal(unmasked(stage), true_sum(stage))


@pytest.mark.faults
@pytest.mark.parametrize("count", range(3, 41))
def test_cohort_of_any_size_sums_exactly_with_as_many_dropouts_as_it_bears(count: int) -> None:
    stage = advertised(fresh(count), slots=1)
    stage = accepted(dealt(announced(stage)))
    survivors = names(count)[-stage.cohort.need :]
    stage = revealed(agreed(polled(masked(stage, survivors))))
    assert np.array_equal(unmasked(stage), true_sum(stage))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), count=SIZES)
def test_nothing_is_revealed_below_the_threshold(data: st.DataObject, count: int) -> None:
    stage = ready(count, 1)
    need = stage.cohort.need
    order = data.draw(st.permutations(names(count)))
    few = order[: data.draw(st.integers(0, need - 1))]
    with pytest.raises((NotEnoughShares, CohortTooSmall)):
        polled(masked(stage, few))
    stage = polled(masked(stage, order))
    with pytest.raises(NotEnoughShares):
        revealed(agreed(stage, by=few))
    stage = revealed(agreed(stage), by=few)
    before = stage.total_W.copy()
    with pytest.raises(NotEnoughShares):
        unmasked(stage)
    assert np.array_equal(stage.total_W, before)


@settings(max_examples=6, deadline=None)
@given(count=st.integers(3, 12), data=st.data())
def test_every_cohort_size_sums_with_labs_lost_during_the_set_up(
    count: int, data: st.DataObject
) -> None:
    spare = count - check_rules(count, threshold=None, min_cohort=3)
    lost = data.draw(st.permutations(names(count)))[: data.draw(st.integers(0, spare))]
    stage = dealt(announced(advertised(fresh(count), slots=1)), without=lost)
    stage = revealed(agreed(polled(masked(accepted(stage)))))
    assert np.array_equal(unmasked(stage), true_sum(stage))


def test_lab_that_missed_its_shares_counts_as_dropped() -> None:
    stage = dealt(announced(advertised(fresh(5, threshold=3))))
    stage = masked(accepted(stage, without=[B]), [A, C, D])
    assert np.array_equal(unmasked(revealed(agreed(polled(stage)))), true_sum(stage))


def test_one_masked_vector_looks_like_noise() -> None:
    """Equal words of all labs: masked, no two vectors agree and no word is favoured."""
    stage = ready(4)
    vectors = []
    for name in (A, B, C):
        words_W = np.zeros(40_000, np.uint32)
        lab.mask(
            stage.states[name], words_W, round=1, slot=0, order_sha256=ORDER, work_sha256=MODEL
        )
        vectors.append(words_W)
    for i, words_W in enumerate(vectors):
        bytes_ = np.bincount(words_W.view(np.uint8), minlength=256)
        expected = 4 * 40_000 / 256
        assert ((bytes_ - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom
        assert all(np.mean(words_W == other) < 0.001 for other in vectors[:i])


def test_masks_of_two_slots_and_rounds_have_nothing_in_common() -> None:
    state = ready(4, 2).states[A]
    seen = []
    for round_, slot in ((1, 0), (1, 1), (2, 0), (2, 1)):
        words_W = np.zeros(1000, np.uint32)
        lab.mask(state, words_W, round=round_, slot=slot, order_sha256=ORDER, work_sha256=MODEL)
        seen.append(words_W)
    for i, words_W in enumerate(seen):
        assert all(np.mean(words_W == other) < 0.01 for other in seen[:i])


def test_rounds_follow_each_other_slot_by_slot_and_set_up_by_set_up() -> None:
    stage = fresh(4)
    for slot, round_ in enumerate(range(1, 6)):
        if round_ % 2 == 1:
            stage = replace(stage, setup=None, poll=None, replies={})
            stage = advertised(stage, setup=round_, first_slot=slot)
            stage = accepted(dealt(announced(stage)))
        stage = masked(stage, [A, B, D], round=round_, slot=slot)
        stage = revealed(agreed(polled(stage, round=round_, slot=slot)))
        assert np.array_equal(unmasked(stage), true_sum(stage))


def test_retry_in_the_next_slot_sums_the_same_survivors() -> None:
    stage = agreed(polled(masked(ready(4), [A, B, C])))
    stage = revealed(agreed(polled(masked(stage, [A, B, C], slot=1), slot=1)))
    assert np.array_equal(unmasked(stage), true_sum(stage))


def test_every_state_survives_a_restart() -> None:
    """Kept as bytes after every step, the labs go on as if nothing had happened."""

    def restarted(stage: Any) -> Any:
        states = {
            name: lab.LabState.from_bytes(state.to_bytes()) for name, state in stage.states.items()
        }
        assert states == stage.states
        return replace(stage, states=states)

    stage = restarted(fresh(4))
    stage = restarted(advertised(stage))
    stage = restarted(dealt(announced(stage)))
    stage = restarted(accepted(stage))
    stage = restarted(masked(stage, [A, C, D]))
    stage = restarted(agreed(polled(stage)))
    stage = restarted(revealed(stage))
    assert np.array_equal(unmasked(stage), true_sum(stage))


def test_repeated_request_gets_the_same_reply() -> None:
    stage = advertised(fresh(4))
    assert stage.opening is not None
    state, reply = lab.advertise(stage.states[A], identity(A), stage.opening.request)
    assert reply == stage.replies[A]
    assert state == stage.states[A]
    stage = dealt(announced(stage))
    assert stage.announcement is not None
    _, reply = lab.share(stage.states[A], identity(A), stage.announcement.request)
    assert reply == stage.replies[A]
    stage = revealed(agreed(polled(masked(accepted(stage)))))
    _, reply = lab.reveal(stage.states[A], identity(A), stage.reveal)
    assert reply == stage.replies[A]


def test_vector_is_unchanged_when_masking_is_refused() -> None:
    stage = masked(ready(4))
    words_W = words_of(A)
    with pytest.raises(AlreadyAnswered):
        lab.mask(stage.states[A], words_W, round=1, slot=0, order_sha256=ORDER, work_sha256=MODEL)
    assert np.array_equal(words_W, words_of(A))


def test_own_secrets_of_a_slot_are_erased_when_it_is_masked() -> None:
    before = ready(4, 2).states[A]
    after = masked(ready(4, 2)).states[A]
    kept = after.to_bytes()
    assert before.keys[:32] not in kept
    assert before.seeds[:32] not in kept
    assert before.keys[32:] in kept


def test_secrets_stay_out_of_repr() -> None:
    state = ready(4).states[A]
    text = repr(state)
    assert text.startswith("LabState('lab-01', run='run-1', ready")
    for secret in (state.keys, state.seeds, *state.shares.values()):
        assert repr(secret)[2:20] not in text
        assert secret.hex()[:16] not in text


def test_weights_travel_in_the_masked_vector() -> None:
    """Weighted mean of updates and of a control variate with a range of its own, in one sum."""
    stage = ready(5)
    encoding = Encoding((Part("update", 50, 0.1), Part("control", 50, 1.0)), 32, 5, 5000.0)
    rng = np.random.default_rng(3)
    weights = dict(zip(names(5), [10.0, 4000.0, 250.0, 33.0, 1200.0], strict=True))
    survivors = [A, B, D, "lab-05"]
    updates = {n: rng.uniform(-0.1, 0.1, 100).astype(np.float32) for n in survivors}
    total_W = np.zeros(encoding.words, encoding.dtype)
    states = dict(stage.states)
    for name in survivors:
        words_W = encode(updates[name], encoding, rng=rng, weight=weights[name]).words_W
        states[name] = lab.mask(
            states[name], words_W, round=1, slot=0, order_sha256=ORDER, work_sha256=MODEL
        )
        add_words(total_W, words_W)
    stage = replace(stage, states=states, total_W=total_W, masked=dict.fromkeys(survivors, total_W))
    total_W = unmasked(revealed(agreed(polled(stage))))
    decoded = decode(total_W, encoding, count=4)
    truth_P = np.average(
        [updates[n].astype(np.float64) for n in survivors],
        axis=0,
        weights=[weights[n] for n in survivors],
    )
    assert np.abs(decoded.mean_P - truth_P).max() < 1e-5
    assert decoded.weight == pytest.approx(5243, abs=0.01)


# ---- rules


@pytest.mark.parametrize(("labs", "threshold"), [(3, 3), (4, 3), (8, 6), (9, 7), (40, 27)])
def test_default_threshold_is_more_than_two_thirds(labs: int, threshold: int) -> None:
    assert default_threshold(labs) == threshold


@pytest.mark.parametrize(
    ("labs", "threshold", "min_cohort", "says"),
    [
        (8, 4, 3, "expected 5 to 8"),
        (8, 9, 3, "expected 5 to 8"),
        (2, None, 3, "at least min_cohort=3"),
        (8, None, 2, "expected at least 3"),
        (41, None, 3, "at most 40"),
    ],
)
def test_unsafe_rules_are_refused(
    labs: int, threshold: int | None, min_cohort: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_rules(labs, threshold=threshold, min_cohort=min_cohort)


def test_cohort_with_one_key_twice_is_refused() -> None:
    twin = replace(identity(A).public, name=B)
    with pytest.raises(InputError, match="the same key"):
        cohort_of(3, labs=(identity(A).public, twin, identity(C).public))


def test_cohort_survives_its_bytes() -> None:
    cohort = cohort_of(5)
    assert Cohort.from_bytes(cohort.to_bytes()) == cohort


def test_secure_aggregation_imports_neither_torch_nor_flower() -> None:
    code = (
        "import sys; import cytofed.privacy.secagg_coordinator, cytofed.privacy.secagg_lab;"
        "print([m for m in ('torch', 'flwr', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- agreement with the reference

STORED: dict[str, Any] = json.loads((VECTORS / "secagg.json").read_text())
INDEX = {name: position for position, name in enumerate(STORED["labs"], start=1)}


def secret(name: str, kind: str) -> bytes:
    return bytes.fromhex(STORED["secrets"][name][kind])


def public(name: str) -> bytes:
    return bytes.fromhex(STORED["publics"][name])


def place(case: dict[str, Any]) -> tuple[str, int, int, int, int]:
    words = len(case["sum"])
    return STORED["order_sha256"], STORED["round"], STORED["slot"], words, case["bits"]


def test_code_still_makes_the_vectors() -> None:
    assert make_vectors.secagg() == STORED


def test_reference_matches_published_vectors() -> None:
    """RFC 7748 section 5.2, FIPS 197 C.3, NIST SP 800-38A F.5.5, RFC 5869 A.1 (first block)."""
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    made = reference.x25519(bytes.fromhex(scalar), bytes.fromhex(point))
    assert made.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    rounds = reference._expand(bytes(range(32)))
    block = reference._encrypt_block(rounds, bytes.fromhex("00112233445566778899aabbccddeeff"))
    assert block.hex() == "8ea2b7ca516745bfeafc49904b496089"
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    okm = reference.hkdf(b"\x0b" * 22, salt, info)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


@pytest.mark.parametrize("case", STORED["rounds"], ids=lambda case: f"{case['bits']} bits")
def test_reference_masks_the_same_vectors(case: dict[str, Any]) -> None:
    view = bytes.fromhex(STORED["view"])
    for name, own in INDEX.items():
        vector = reference.masked_vector(
            case["vectors"][name],
            own,
            secret(name, "private"),
            secret(name, "seed"),
            {index: public(peer) for peer, index in INDEX.items() if peer != name},
            view,
            place(case),
        )
        assert vector == case["masked"][name]


@pytest.mark.parametrize("case", STORED["rounds"], ids=lambda case: f"{case['bits']} bits")
def test_reference_takes_the_masks_off(case: dict[str, Any]) -> None:
    """From the masked vectors and three labs' shares alone, as the coordinator has them."""
    dropped, holders = STORED["dropped"], [n for n in STORED["labs"] if n != STORED["dropped"]]
    survivors = {INDEX[name]: name for name in holders}
    seeds: dict[int, bytes] = {}
    keys: dict[int, bytes] = {}
    for dealer, index in INDEX.items():
        at = 0 if dealer == dropped else 32
        held = {INDEX[h]: bytes.fromhex(STORED["shares"][dealer][h])[at : at + 32] for h in holders}
        (keys if dealer == dropped else seeds)[index] = reference.combine(held)
    assert keys == {INDEX[dropped]: secret(dropped, "private")}
    assert seeds == {index: secret(name, "seed") for index, name in survivors.items()}
    total = reference.unmasked_sum(
        {index: case["masked"][name] for index, name in survivors.items()},
        seeds,
        keys,
        {index: public(name) for name, index in INDEX.items()},
        bytes.fromhex(STORED["view"]),
        place(case),
    )
    assert total == case["sum"]


def test_vectors_hold_together() -> None:
    opening, slot = bytes.fromhex(STORED["opening"]), STORED["slot"]
    for name in STORED["labs"]:
        assert reference.x25519_public(secret(name, "private")) == public(name)
        made = seed_commitment(opening, name, slot, secret(name, "seed"))
        assert made.hex() == STORED["commitments"][name]


def test_begin_with_senseless_numbers_is_refused() -> None:
    for setup, first_slot, slots in ((0, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, 5000)):
        with pytest.raises(InputError):
            coordinator.begin(cohort_of(3), CHIEF, setup=setup, first_slot=first_slot, slots=slots)
