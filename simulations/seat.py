"""What the coordinator's seat shows of one lab, and what colluding labs add to it.

The worst case for a lab: its update is one step on one image (in the curve of collusion also on
``CELLS``), of the small net of ``cytofed.simulations.attacks``. What the coordinator holds is made
by the code that ships: sealed messages, and secure aggregation from set-up to sum. Two tests of
what is held:

* *likeness*: the best picture that inversion gets of the lab's image;
* *matched*: which of ``CANDIDATES`` images, which the attacker has already, was this lab's? The
  share of labs for which the right one comes first (largest cosine of the gradients). The other
  labs' images are among the candidates, so a sum that gives all of them away still hides whose
  each is; ``took_part`` is the share for which the first is of any lab in the sum.

Shapes: N images, K labs, D pixels, U neurons, W words of a vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy import shares
from cytofed.privacy.encoding import Encoding, decode, encode, one_range
from cytofed.privacy.identity import Identity
from cytofed.privacy.masks import Mask, Words, add_masks, add_words
from cytofed.privacy.sealing import Context, Direction, seal, unseal
from cytofed.privacy.secagg import (
    KEY_BYTES,
    MIN_COHORT,
    Cohort,
    Place,
    check_rules,
    cut,
    public_key,
    seed_commitment,
)
from cytofed.simulations.attacks import (
    RECOGNISABLE,
    SHOWN,
    Floats,
    Sent,
    add,
    best_of,
    picture_of,
    square,
)

LABS = 8
CELLS = 6
"""images behind a lab's step where it is not one alone"""
CANDIDATES = 16
VICTIMS = 6
"""labs that are attacked one after the other; figures are means over them"""

_COORDINATOR = "coordinator"
_SHA256 = hashlib.sha256(b"audit").hexdigest()
_ROUND, _SLOT = 1, 0


# --- what is held, and the two tests


@dataclass(frozen=True)
class Held:
    """What an attacker holds of a lab, as the update that it may be."""

    sent: Sent = field(repr=False)
    labs: int
    """whose updates are in it"""


@dataclass(frozen=True)
class Victim:
    """One attacked lab, the first of its cohort. Lab k has ``cells`` images, from ``first(k)``."""

    number: int
    images_ND: Floats
    gradients: Sequence[Sent]
    cells: int = 1

    def first(self, lab: int) -> int:
        """The image of a lab that is asked for; beyond ``LABS``, one that no lab has."""
        at = self.cells * min(lab, LABS) + max(0, lab - LABS)
        return (self.number + at) % len(self.images_ND)

    def updates(self, labs: int) -> list[Sent]:
        """Of the victim and its peers, all of norm 1."""
        count = len(self.gradients)
        own = ([(self.first(k) + c) % count for c in range(self.cells)] for k in range(labs))
        return [_unit(add([self.gradients[n] for n in rows])) for rows in own]

    def tested(self, held: Held) -> dict[str, Any]:
        """Both tests, and the best picture."""
        mean_D: Floats = self.images_ND.mean(0)
        picture_D, likeness = best_of(held.sent, self.images_ND[self.number], mean_D)
        cosines = [_cosine(held.sent, self.gradients[self.first(k)]) for k in range(CANDIDATES)]
        first = int(np.argmax(cosines))
        return {
            "picture": picture_of(square(picture_D)),
            "likeness": likeness,
            "recognised": likeness >= RECOGNISABLE,
            "matched": first == 0,
            "took_part": first < held.labs,
        }


def _cosine(a: Sent, b: Sent) -> float:
    product = float(np.vdot(a.weight_UD, b.weight_UD)) + float(np.vdot(a.bias_U, b.bias_U))
    return product / max(_norm(a) * _norm(b), 1e-20)


def _unit(sent: Sent) -> Sent:
    scale = np.float32(1 / max(_norm(sent), 1e-20))
    return Sent(scale * sent.weight_UD, scale * sent.bias_U)


def _norm(sent: Sent) -> float:
    return float(np.hypot(np.linalg.norm(sent.weight_UD), np.linalg.norm(sent.bias_U)))


def _flat(sent: Sent) -> Floats:
    return np.concatenate([sent.weight_UD.ravel(), sent.bias_U])


def _unflat(values_P: Floats, like: Sent) -> Sent:
    cut_at = like.weight_UD.size
    weight_UD = values_P[:cut_at].reshape(like.weight_UD.shape).astype(np.float32)
    return Sent(weight_UD, values_P[cut_at : cut_at + like.bias_U.size].astype(np.float32))


def _read_as_update(words: Words, like: Sent) -> Sent:
    """Ciphertext or masked words, read as if they were an update in fixed point."""
    signed = words.view(np.int32)[: like.weight_UD.size + like.bias_U.size]
    return _unflat(signed.astype(np.float32) / np.float32(1 << 31), like)


def _mean(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means = {key: float(np.mean([t[key] for t in tests])) for key in tests[0] if key != "picture"}
    return means | {"pictures": [test["picture"] for test in tests[:SHOWN]]}


# --- the coordinator's seat


def sit(images_ND: Floats, gradients: Sequence[Sent]) -> dict[str, Any]:
    """The objects ``seat`` and ``collusion`` of audit.json."""
    victims = [Victim(v, images_ND, gradients) for v in range(VICTIMS)]
    many = [_secure_round(victim.updates(LABS)) for victim in victims]
    seat = _seat(victims, many)
    curves = [_collusion(victims, many)]
    victims = [replace(victim, cells=CELLS) for victim in victims]
    curves.append(_collusion(victims, [_secure_round(v.updates(LABS)) for v in victims]))
    threshold = many[0].setup.cohort.threshold
    return {
        "seat": seat,
        "collusion": {
            "labs": LABS,
            "threshold": threshold,
            "lying_from": 2 * threshold - LABS,
            "candidates": CANDIDATES,
            "curves": curves,
        },
    }


def _seat(victims: Sequence[Victim], many: Sequence[SecureRound]) -> dict[str, Any]:
    """What is held of one lab with each way of sending, and what the tests make of it."""
    few = [_secure_round(victim.updates(MIN_COHORT)) for victim in victims]
    rows = []

    def row(way: str, holds: str, held: Sequence[Held]) -> None:
        tests = [victim.tested(h) for victim, h in zip(victims, held, strict=True)]
        rows.append({"way": way, "holds": holds} | _mean(tests))

    row("plain", "each lab's update", [Held(v.updates(1)[0], 1) for v in victims])
    sealed = [_sealed(v.updates(1)[0]) for v in victims]
    row("sealed, on the way", "what the network sees of an update", [Held(s, 1) for s, _ in sealed])
    row("sealed", "each lab's update, once opened", [Held(s, 1) for _, s in sealed])
    for labs, done in ((LABS, many), (MIN_COHORT, few)):
        way = f"secure aggregation, {labs} labs"
        row(way, "one lab's masked upload", [Held(d.upload(0), 1) for d in done])
        row(way, f"the sum of {labs} labs", [Held(d.total(), labs) for d in done])
    return {
        "images": [picture_of(square(v.images_ND[v.number])) for v in victims[:SHOWN]],
        "candidates": CANDIDATES,
        "labs": LABS,
        "rows": rows,
    }


def _sealed(sent: Sent) -> tuple[Sent, Sent]:
    """What travels of an update that is sealed for the coordinator, and what it opens."""
    sender, receiver = Identity.generate("lab"), Identity.generate(_COORDINATOR)
    context = Context(
        federation="audit",
        run="audit",
        plan_sha256=_SHA256,
        roster_sha256=_SHA256,
        round=_ROUND,
        slot=_SLOT,
        sender="lab",
        receiver=_COORDINATOR,
        direction=Direction.TO_COORDINATOR,
        content="update",
    )
    payload = _flat(sent).tobytes()
    sealed = seal(payload, context, sender=sender, receiver=receiver.public)
    travels = np.frombuffer(bytes(sealed.body[: len(payload)]), np.uint32)
    opened = unseal(sealed, context, sender=sender.public, receiver=receiver)
    return _read_as_update(travels, sent), _unflat(np.frombuffer(opened.payload, np.float32), sent)


# --- a round of secure aggregation, as it is


@dataclass(frozen=True)
class SecureRound:
    """One round over K labs: what each party holds when it is over."""

    names: tuple[str, ...]
    setup: coordinator.Setup
    states: Mapping[str, lab.LabState] = field(repr=False)
    """before the round: what a lab that colludes has kept"""
    encoding: Encoding
    words: Sequence[Words] = field(repr=False)
    """each lab's own, before its masks"""
    uploads: Sequence[Words] = field(repr=False)
    sum_W: Words = field(repr=False)
    like: Sent = field(repr=False)

    def upload(self, number: int) -> Sent:
        """One lab's upload as the coordinator sees it."""
        return _read_as_update(self.uploads[number], self.like)

    def total(self) -> Sent:
        """The sum of all labs, as the coordinator gets it (their mean: it knows how many)."""
        return self._decoded(self.sum_W, len(self.names))

    def without(self, colluding: Sequence[int]) -> Sent:
        """The sum less what labs that collude tell of themselves."""
        left_W = self.sum_W.copy()
        for number in colluding:
            left_W -= self.words[number]
        return self._decoded(left_W, len(self.names) - len(colluding))

    def unmasked(self, victim: int, colluding: Sequence[int]) -> Sent | None:
        """A lab's own update, where the shares that colluding labs keep give both its secrets."""
        secrets = self._secrets(self.names[victim], colluding)
        if secrets is None:
            return None
        key, seed = secrets
        announcement, own = self.setup.announcement, victim + 1
        words_W = self.uploads[victim].copy()
        size = len(words_W)
        place = Place(self.setup.view, _ROUND, _SLOT, _SHA256, size, 8 * words_W.dtype.itemsize)
        masks = [place.self_mask(seed, own)]
        for peer, name in enumerate(self.names, start=1):
            if peer != own:
                public = cut(announcement.publics[name], KEY_BYTES, _SLOT)
                masks.append(place.pair_mask(key, public, own, peer))
        add_masks(words_W, [Mask(mask.key, -mask.sign) for mask in masks])
        return self._decoded(words_W, 1)

    def _secrets(self, victim: str, colluding: Sequence[int]) -> tuple[bytes, bytes] | None:
        """Key and seed of a lab from all shares of it that are at hand, if they are the right."""
        held = {n + 1: self.states[self.names[n]].shares[victim] for n in colluding}
        if not held:
            return None
        rows = {index: [row[:KEY_BYTES], row[KEY_BYTES:]] for index, row in held.items()}
        key, seed = shares.combine(rows, threshold=len(rows))
        announcement = self.setup.announcement
        committed = cut(announcement.commitments[victim], KEY_BYTES, _SLOT)
        opening = announcement.opening.digest
        if public_key(key) != cut(announcement.publics[victim], KEY_BYTES, _SLOT):
            return None
        return (key, seed) if seed_commitment(opening, victim, _SLOT, seed) == committed else None

    def _decoded(self, words_W: Words, count: int) -> Sent:
        return _unflat(decode(words_W, self.encoding, count=count).mean_P, self.like)


def _secure_round(updates: Sequence[Sent]) -> SecureRound:
    names = tuple(f"lab-{number:02d}" for number in range(1, len(updates) + 1))
    chief = Identity.generate(_COORDINATOR)
    parties = {name: Identity.generate(name) for name in names}
    cohort = Cohort(
        federation="audit",
        run="audit",
        plan_sha256=_SHA256,
        roster_sha256=_SHA256,
        coordinator=chief.public,
        labs=tuple(party.public for party in parties.values()),
        threshold=check_rules(len(names), threshold=None, min_cohort=MIN_COHORT),
        min_cohort=MIN_COHORT,
    )
    states = {name: lab.LabState(cohort, name) for name in names}

    def ask(
        step: Callable[..., tuple[lab.LabState, bytes]], requests: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        replies = {}
        for name, request in requests.items():
            states[name], replies[name] = step(states[name], parties[name], request)
        return replies

    opening = coordinator.begin(cohort, chief, setup=1, first_slot=_SLOT, slots=1)
    lists = ask(lab.advertise, dict.fromkeys(names, opening.request))
    announcement = coordinator.announce(opening, chief, lists)
    dealt = ask(lab.share, dict.fromkeys(names, announcement.request))
    checked = {n: coordinator.check_shares(announcement, n, reply) for n, reply in dealt.items()}
    setup = coordinator.deliver(announcement, chief, checked)
    ask(lab.accept, setup.requests)
    kept = dict(states)
    encoding = one_range(_flat(updates[0]).size, 1.0, bits=32, cohort=len(names))
    rng = np.random.default_rng()
    words = [encode(_flat(update), encoding, rng=rng).words_W for update in updates]
    uploads = [words_W.copy() for words_W in words]
    sum_W = np.zeros_like(words[0])
    for name, upload_W in zip(names, uploads, strict=True):
        states[name] = lab.mask(
            states[name],
            upload_W,
            round=_ROUND,
            slot=_SLOT,
            order_sha256=_SHA256,
            work_sha256=_SHA256,
        )
        add_words(sum_W, upload_W)
    poll = coordinator.call_survivors(
        setup, chief, round=_ROUND, slot=_SLOT, order_sha256=_SHA256, survivors=names
    )
    agreements = ask(lab.agree, dict.fromkeys(names, poll.request))
    reveal = coordinator.call_reveal(poll, chief, agreements)
    replies = ask(lab.reveal, dict.fromkeys(names, reveal))
    revealed = {n: coordinator.check_revealed(poll, n, reply) for n, reply in replies.items()}
    coordinator.unmask(poll, sum_W, revealed)
    return SecureRound(names, setup, kept, encoding, words, uploads, sum_W, updates[0])


# --- collusion


def _collusion(victims: Sequence[Victim], rounds: Sequence[SecureRound]) -> dict[str, Any]:
    """What k of ``LABS`` labs and an honest-but-curious coordinator get of one more lab.

    Colluding labs tell their own updates, and the shares of the victim's secrets that they keep.
    ``lying_from`` colluding labs let a coordinator that lies about who is alive have both secrets
    of every lab (see ``cytofed.privacy.secagg``); that is not played here.
    """
    rows = []
    for colluding in range(LABS):
        others = range(LABS - colluding, LABS)  # the last ones; the victim is the first
        tests, cosines, opened = [], [], []
        for victim, done in zip(victims, rounds, strict=True):
            alone = done.unmasked(0, others)
            left = alone or done.without(others)
            tests.append(victim.tested(Held(left, 1 if alone else LABS - colluding)))
            cosines.append(_cosine(left, victim.updates(1)[0]))
            opened.append(alone is not None)
        row = {
            "colluding": colluding,
            "left": 1 if all(opened) else LABS - colluding,
            "opened": all(opened),
            "cosine": float(np.mean(cosines)),
        }
        means = _mean(tests)
        del means["pictures"]
        rows.append(row | means)
    return {"cells": victims[0].cells, "rows": rows}
