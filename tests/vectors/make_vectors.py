"""Write the test vectors of this folder: ``python tests/vectors/make_vectors.py``.

All randomness that the code takes as an argument comes from SHAKE-256 of a name, so that
``secagg.json`` and ``messages.json`` come out the same each time; HPKE draws its own, so that
``sealed.json`` does not. The tests check them with the code under test and with
tests/privacy/reference_secagg.py, which shares no code with it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from cytofed.privacy import secagg_coordinator as coordinator  # noqa: E402
from cytofed.privacy import secagg_lab, shares, wire  # noqa: E402
from cytofed.privacy.encoding import Encoding, Part, decode, encode  # noqa: E402
from cytofed.privacy.identity import Entropy, Identity, sign  # noqa: E402
from cytofed.privacy.sealing import Context, Direction, seal, seal_for_all  # noqa: E402
from cytofed.privacy.secagg import Cohort, seed_commitment, share_digest  # noqa: E402

LABS = ("bonn", "graz", "leeds", "lyon")
DROPPED = "graz"
ORDER = hashlib.sha256(b"order").hexdigest()
WORK = hashlib.sha256(b"global weights").hexdigest()
ROUND, SLOTS = 7, 2


def drawn(name: str) -> Entropy:
    """The same bytes for the same calls."""
    count = 0

    def entropy(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(f"{name} {count}".encode()).digest(size)

    return entropy


def identities() -> dict[str, Identity]:
    return {
        name: Identity.generate(name, entropy=drawn(f"identity of {name}"))
        for name in (*LABS, "coordinator")
    }


def secagg() -> dict[str, Any]:
    """One round of four labs, one of which drops, in both rings."""
    people = identities()
    chief = people["coordinator"]
    cohort = Cohort(
        federation="marrow",
        run="run-1",
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
        roster_sha256=hashlib.sha256(b"roster").hexdigest(),
        coordinator=chief.public,
        labs=tuple(people[name].public for name in LABS),
        threshold=3,
        min_cohort=3,
    )
    opening = coordinator.begin(cohort, chief, setup=1, first_slot=4, slots=SLOTS)
    states, lists, dealt = {}, {}, {}
    for name in LABS:
        states[name], lists[name] = secagg_lab.advertise(
            secagg_lab.LabState(cohort, name),
            people[name],
            opening.request,
            entropy=drawn(f"keys of {name}"),
        )
    secrets = {
        name: {"private": states[name].keys[32:].hex(), "seed": states[name].seeds[32:].hex()}
        for name in LABS
    }
    announcement = coordinator.announce(opening, chief, lists)
    for name in LABS:
        states[name], reply = secagg_lab.share(
            states[name], people[name], announcement.request, entropy=drawn(f"shares of {name}")
        )
        dealt[name] = coordinator.check_shares(announcement, name, reply)
    setup = coordinator.deliver(announcement, chief, dealt)
    for name in LABS:
        states[name], _ = secagg_lab.accept(states[name], people[name], setup.requests[name])
    slot = setup.slots[1]
    rounds = []
    for bits in (32, 16):
        encoding = Encoding((Part("body", 9, 0.5), Part("head", 4, 2.0)), bits, len(LABS))
        vectors, masked = {}, {}
        for name in LABS:
            rng = np.random.default_rng(LABS.index(name))
            values_P = rng.normal(0, 0.4, encoding.parameters).astype(np.float32)
            words_W = encode(values_P, encoding, rng=rng).words_W
            vectors[name] = words_W.tolist()
            secagg_lab.mask(
                states[name],
                words_W,
                round=ROUND,
                slot=slot,
                order_sha256=ORDER,
                work_sha256=WORK,
            )
            masked[name] = words_W.tolist()
        total_W = np.zeros(encoding.words, encoding.dtype)
        for name in LABS:
            if name != DROPPED:
                total_W += np.array(vectors[name], encoding.dtype)
        mean_P = decode(total_W, encoding, count=len(LABS) - 1).mean_P
        rounds.append(
            {
                "bits": bits,
                "parts": [asdict(part) for part in encoding.parts],
                "vectors": vectors,
                "masked": masked,
                "sum": total_W.tolist(),
                "mean": mean_P.tolist(),
            }
        )
    held = {
        dealer: {holder: states[holder].shares[dealer][64:].hex() for holder in LABS}
        for dealer in LABS
    }
    return {
        "what": "one round of four labs; graz drops after the set-up; shares: key, then seed",
        "labs": list(LABS),
        "dropped": DROPPED,
        "threshold": 3,
        "round": ROUND,
        "slot": slot,
        "order_sha256": ORDER,
        "opening": opening.digest.hex(),
        "transcript": announcement.transcript.hex(),
        "view": setup.view.hex(),
        "secrets": secrets,
        "publics": {name: announcement.publics[name][32:].hex() for name in LABS},
        "commitments": {name: announcement.commitments[name][32:].hex() for name in LABS},
        "shares": held,
        "rounds": rounds,
    }


def messages() -> dict[str, Any]:
    """Canonical bytes, signed documents, hashes."""
    people = identities()
    values: list[wire.Value] = [
        0,
        23,
        24,
        65_536,
        2**64 - 1,
        b"\x00\x01",
        "Zürich",
        [1, [2, b""]],
        {"b": 1, "a": 2, "aa": 3},
        {"slot": 4, "view": bytes(32), "labs": ["bonn", "lyon"]},
    ]
    return {
        "what": "values and their canonical bytes (deterministic CBOR); bytes as {'hex': ...}",
        "canonical": [[readable(value), wire.encode(value).hex()] for value in values],
        "identity": people["bonn"].to_bytes().hex(),
        "fingerprint": people["bonn"].public.fingerprint,
        "signed": sign(people["bonn"], "cytofed/1/test", b"body").hex(),
        "seed_commitment": seed_commitment(bytes(32), "bonn", 4, bytes(32)).hex(),
        "share_digest": share_digest(bytes(32), "bonn", "lyon", 4, "seed", bytes(32)).hex(),
        "split": [
            [share.hex() for share in holder]
            for holder in shares.split(
                [bytes(range(32))], threshold=3, count=5, entropy=drawn("split")
            )
        ],
    }


def readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    return value


def sealed() -> dict[str, Any]:
    """Sealed messages that must open, for one receiver and for two."""
    people = identities()
    context = Context(
        federation="marrow",
        run="run-1",
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
        roster_sha256=hashlib.sha256(b"roster").hexdigest(),
        round=ROUND,
        slot=4,
        sender="bonn",
        receiver="coordinator",
        direction=Direction.TO_COORDINATOR,
        content="update",
    )
    payload = b"an update of a few bytes"
    up = seal(
        payload,
        context,
        sender=people["bonn"],
        receiver=people["coordinator"].public,
        manifest=b"manifest",
    )
    down = Context(
        **{
            **asdict(context),
            "sender": "coordinator",
            "direction": Direction.TO_LAB,
            "content": "weights",
        }
    )
    both = seal_for_all(
        payload,
        down,
        sender=people["coordinator"],
        receivers=[people["bonn"].public, people["lyon"].public],
    )
    return {
        "what": "identities are those of make_vectors.py; the payload opens with these contexts",
        "payload": payload.hex(),
        "manifest": b"manifest".hex(),
        "context": asdict(context),
        "sealed": up.to_bytes().hex(),
        "for_all_context": asdict(down),
        "for_all": {name: message.to_bytes().hex() for name, message in both.items()},
    }


def main() -> None:
    for name, make in (("secagg", secagg), ("messages", messages), ("sealed", sealed)):
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
