"""A whole federation in one process, for tests: honest labs and a coordinator that can be told to
lie.

K labs, W words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy import wire
from cytofed.privacy.identity import Identity, sign, verify
from cytofed.privacy.masks import add_words
from cytofed.privacy.secagg import Cohort, SecaggError, Stopped, check_rules

PLAN = hashlib.sha256(b"plan").hexdigest()
ROSTER = hashlib.sha256(b"roster").hexdigest()
ORDER = hashlib.sha256(b"order of round 1").hexdigest()
MODEL = hashlib.sha256(b"global weights of round 1").hexdigest()
OTHER = hashlib.sha256(b"something else").hexdigest()


@cache
def identity(name: str) -> Identity:
    """The same keys for a name throughout a test run: making them is not what is tested."""
    seeds = hashlib.shake_256(f"identity of {name}".encode())
    return Identity.generate(name, entropy=seeds.digest)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"lab-{number:02d}" for number in range(1, count + 1))


def cohort_of(count: int, **changes: Any) -> Cohort:
    """The approved cohort of ``count`` labs; ``changes`` to single fields."""
    fields: dict[str, Any] = {
        "federation": "marrow",
        "run": "run-1",
        "plan_sha256": PLAN,
        "roster_sha256": ROSTER,
        "coordinator": identity("coordinator").public,
        "labs": tuple(identity(name).public for name in names(count)),
        "threshold": check_rules(count, threshold=None, min_cohort=3),
        "min_cohort": 3,
    }
    return Cohort(**{**fields, **changes})


@dataclass(frozen=True)
class Stage:
    """Where a run stands: the labs' states and what the coordinator holds."""

    cohort: Cohort
    states: Mapping[str, lab.LabState]
    setup: coordinator.Setup | None = None
    announcement: coordinator.Announcement | None = None
    opening: coordinator.Opening | None = None
    total_W: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint32))
    masked: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    words: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    poll: coordinator.Poll | None = None
    agreements: Mapping[str, bytes] = field(default_factory=dict)
    reveal: bytes = b""
    replies: Mapping[str, bytes] = field(default_factory=dict)

    def with_state(self, name: str, state: lab.LabState) -> Stage:
        return replace(self, states={**self.states, name: state})


CHIEF = identity("coordinator")


def fresh(count: int = 4, **changes: Any) -> Stage:
    """Labs that approved a plan, before any set-up."""
    cohort = cohort_of(count, **changes)
    return Stage(cohort, {name: lab.LabState(cohort, name) for name in names(count)})


def answers(
    stage: Stage,
    step: Callable[..., tuple[lab.LabState, bytes]],
    requests: Mapping[str, bytes],
) -> tuple[Stage, dict[str, bytes]]:
    """Let labs answer their requests."""
    states, replies = dict(stage.states), {}
    for name, request in requests.items():
        states[name], replies[name] = step(states[name], identity(name), request)
    return replace(stage, states=states), replies


def advertised(stage: Stage, *, setup: int = 1, first_slot: int = 0, slots: int = 2) -> Stage:
    """All labs have advertised their keys."""
    opening = coordinator.begin(
        stage.cohort, CHIEF, setup=setup, first_slot=first_slot, slots=slots
    )
    stage, replies = answers(stage, lab.advertise, dict.fromkeys(stage.states, opening.request))
    return replace(stage, opening=opening, replies=replies)


def announced(stage: Stage) -> Stage:
    """The coordinator has put all key lists together."""
    assert stage.opening is not None
    return replace(
        stage, announcement=coordinator.announce(stage.opening, CHIEF, stage.replies), replies={}
    )


def dealt(stage: Stage, *, without: Iterable[str] = ()) -> Stage:
    """The labs have dealt their shares; those in ``without`` dropped before."""
    announcement = stage.announcement
    assert announcement is not None
    alive = [name for name in announcement.order if name not in set(without)]
    stage, replies = answers(stage, lab.share, dict.fromkeys(alive, announcement.request))
    checked = {
        name: coordinator.check_shares(announcement, name, reply) for name, reply in replies.items()
    }
    setup = coordinator.deliver(announcement, CHIEF, checked)
    return replace(stage, setup=setup, replies=replies)


def accepted(stage: Stage, *, without: Iterable[str] = ()) -> Stage:
    """The members have accepted the shares of their peers."""
    setup = stage.setup
    assert setup is not None
    requests = {name: setup.requests[name] for name in setup.members if name not in set(without)}
    stage, replies = answers(stage, lab.accept, requests)
    for name, reply in replies.items():
        coordinator.check_ready(setup, name, reply)
    return replace(stage, replies={})


@cache
def ready(count: int = 4, slots: int = 2, threshold: int | None = None) -> Stage:
    """A complete set-up; states are frozen, so every test may start from the same one."""
    changes = {} if threshold is None else {"threshold": threshold}
    return accepted(dealt(announced(advertised(fresh(count, **changes), slots=slots))))


def words_of(name: str, count: int = 64, dtype: str = "u4", salt: str = "") -> NDArray[Any]:
    """One lab's vector: any ring words do."""
    raw = hashlib.shake_256(f"words of {name} {salt}".encode()).digest(count * int(dtype[1:]))
    return np.frombuffer(raw, dtype).copy()


def masked(
    stage: Stage,
    survivors: Iterable[str] | None = None,
    *,
    round: int = 1,
    slot: int = 0,
    order: str = ORDER,
    work: str = MODEL,
    count: int = 64,
    dtype: str = "u4",
) -> Stage:
    """The survivors have masked their vectors and the coordinator has summed them."""
    assert stage.setup is not None
    alive = sorted(stage.setup.members if survivors is None else survivors)
    states, vectors, words = dict(stage.states), {}, {}
    total_W = np.zeros(count, dtype)
    for name in alive:
        words[name] = words_of(name, count, dtype)
        vectors[name] = words[name].copy()
        states[name] = lab.mask(
            states[name],
            vectors[name],
            round=round,
            slot=slot,
            order_sha256=order,
            work_sha256=work,
        )
        add_words(total_W, vectors[name])
    return replace(stage, states=states, masked=vectors, words=words, total_W=total_W)


def polled(
    stage: Stage,
    survivors: Iterable[str] | None = None,
    *,
    round: int = 1,
    slot: int = 0,
    order: str = ORDER,
) -> Stage:
    """The coordinator has a survivor set to be agreed on."""
    assert stage.setup is not None
    alive = sorted(stage.masked if survivors is None else survivors)
    poll = coordinator.call_survivors(
        stage.setup, CHIEF, round=round, slot=slot, order_sha256=order, survivors=alive
    )
    return replace(stage, poll=poll)


def agreed(stage: Stage, *, by: Iterable[str] | None = None) -> Stage:
    """The survivors (or those in ``by``) have signed the survivor set."""
    poll = stage.poll
    assert poll is not None
    signers = poll.statement.survivors if by is None else tuple(by)
    stage, replies = answers(stage, lab.agree, dict.fromkeys(signers, poll.request))
    for name, reply in replies.items():
        coordinator.check_agreed(poll, name, reply)
    return replace(stage, agreements=replies)


def revealed(stage: Stage, *, by: Iterable[str] | None = None) -> Stage:
    """The survivors (or those in ``by``) have released their shares."""
    assert stage.poll is not None
    request = coordinator.call_reveal(stage.poll, CHIEF, stage.agreements)
    signers = tuple(stage.agreements) if by is None else tuple(by)
    stage, replies = answers(stage, lab.reveal, dict.fromkeys(signers, request))
    return replace(stage, reveal=request, replies=replies)


def unmasked(stage: Stage) -> NDArray[Any]:
    """The ring sum that the coordinator gets."""
    assert stage.poll is not None
    shares = {
        name: coordinator.check_revealed(stage.poll, name, reply)
        for name, reply in stage.replies.items()
    }
    total_W = stage.total_W.copy()
    coordinator.unmask(stage.poll, total_W, shares)
    return total_W


def true_sum(stage: Stage) -> NDArray[Any]:
    """The sum of the survivors' words, taken in the open."""
    vectors = list(stage.words.values())
    total_W = np.zeros_like(vectors[0])
    for words_W in vectors:
        total_W += words_W
    return total_W


def forged(document: bytes, label: str, signer: Identity, **changes: Any) -> bytes:
    """The same document with other fields, signed anew by ``signer``."""
    body = wire.decode(verify(document, label=label, signer=signer.public))
    return sign(signer, label, wire.encode({**body, **changes}))


def body_of(document: bytes, label: str, signer: Identity) -> dict[str, Any]:
    """The fields of a signed document."""
    body = wire.decode(verify(document, label=label, signer=signer.public))
    assert isinstance(body, dict)
    return body


Attack = Callable[[], None]


def guarded_by(*guards: str) -> Callable[[Attack], Attack]:
    """Names the guards (``# guard: NAME`` in the source) without which this test must fail.

    tests/attacks/mutate.py removes them one by one.
    """

    def mark(test: Attack) -> Attack:
        test.guards = guards  # type: ignore[attr-defined]
        return test

    return mark


def stops(
    stage: Stage,
    name: str,
    step: Callable[..., tuple[lab.LabState, bytes]],
    request: bytes,
    error: type[Exception],
    match: str,
) -> None:
    """The lab answers this request with ``error``, says why, and answers nothing ever after."""
    with pytest.raises(error, match=match) as caught:
        step(stage.states[name], identity(name), request)
    assert isinstance(caught.value, SecaggError)
    state = caught.value.state
    assert state is not None
    assert state.stopped == caught.value.message[: len(state.stopped)]
    state = lab.LabState.from_bytes(state.to_bytes())
    with pytest.raises(Stopped, match="this lab stopped"):
        step(state, identity(name), request)


def refuses(
    stage: Stage,
    name: str,
    step: Callable[..., tuple[lab.LabState, bytes]],
    request: bytes,
    error: type[Exception],
    match: str,
) -> None:
    """The lab answers this request with ``error``, and stays as it was."""
    with pytest.raises(error, match=match) as caught:
        step(stage.states[name], identity(name), request)
    assert getattr(caught.value, "state", None) is None
