"""Sealing and secure aggregation against Flower's SecAgg+ functions and the bare ciphers.

``python benchmarks/secagg.py [--quick] [--json]``; one JSON line last. Everything is measured in
this run, on one thread unless named otherwise, best of several interleaved repeats. The peer's
figures are Flower's own functions on the same number of parameters and labs: what
``secaggplus_mod`` calls for one lab's vector, and what its workflow calls to unmask.

P parameters, K labs, W words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes
from numpy.typing import NDArray

from cytofed.arrays import THREADS
from cytofed.privacy import secagg_coordinator as coordinator
from cytofed.privacy import secagg_lab as lab
from cytofed.privacy.encoding import encode, one_range
from cytofed.privacy.identity import Identity
from cytofed.privacy.masks import Mask, Words, add_to_share, add_words
from cytofed.privacy.sealing import Context, Direction, seal, unseal
from cytofed.privacy.secagg import Cohort, default_threshold

LABS = 8
DROPPED = 2
SLOTS = 20
MODEL = hashlib.sha256(b"weights").hexdigest()
ZERO = "0" * 64
FLOWER_RING = 1 << 32  # Flower's default mod_range
FLOWER_TARGET = 1 << 22  # and its target_range
CHIEF = Identity.generate("coordinator")


@dataclass(frozen=True)
class Federation:
    """A complete set-up among labs of one process, and how long each side took for it."""

    people: Mapping[str, Identity]
    states: Mapping[str, lab.LabState]
    setup: coordinator.Setup
    lab_s: float  # mean over labs
    coordinator_s: float
    up_bytes: int  # what one lab sends


def federation(count: int, slots: int) -> Federation:
    people = {
        name: Identity.generate(name) for name in (f"lab-{i:02d}" for i in range(1, count + 1))
    }
    cohort = Cohort(
        federation="benchmark",
        run="run",
        plan_sha256=ZERO,
        roster_sha256=ZERO,
        coordinator=CHIEF.public,
        labs=tuple(person.public for person in people.values()),
        threshold=default_threshold(count),
        min_cohort=3,
    )
    start = time.perf_counter()
    spent = 0.0

    def ask(
        step: Callable[..., tuple[lab.LabState, bytes]], requests: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        nonlocal spent
        since, replies = time.perf_counter(), {}
        for name, request in requests.items():
            states[name], replies[name] = step(states[name], people[name], request)
        spent += time.perf_counter() - since
        return replies

    states = {name: lab.LabState(cohort, name) for name in people}
    opening = coordinator.begin(cohort, CHIEF, setup=1, first_slot=0, slots=slots)
    lists = ask(lab.advertise, dict.fromkeys(people, opening.request))
    announcement = coordinator.announce(opening, CHIEF, lists)
    shared = ask(lab.share, dict.fromkeys(people, announcement.request))
    dealt = {
        name: coordinator.check_shares(announcement, name, reply) for name, reply in shared.items()
    }
    setup = coordinator.deliver(announcement, CHIEF, dealt)
    for name, reply in ask(lab.accept, setup.requests).items():
        coordinator.check_ready(setup, name, reply)
    total = time.perf_counter() - start
    sent = len(lists["lab-01"]) + len(shared["lab-01"])
    return Federation(people, states, setup, spent / count, total - spent, sent)


@dataclass(frozen=True)
class Round:
    """One round up to the revealed shares."""

    poll: coordinator.Poll
    total_W: Words
    truth_W: Words
    revealed: Mapping[str, Mapping[str, bytes]]
    agree_s: float  # signing and releasing shares, mean over survivors
    check_s: float  # checking all of it at the coordinator


def one_round(group: Federation, vectors: Mapping[str, Words]) -> Round:
    """The labs in ``vectors`` survive."""
    states = dict(group.states)
    first = next(iter(vectors.values()))
    total_W, truth_W = np.zeros_like(first), np.zeros_like(first)
    for name, words_W in vectors.items():
        add_words(truth_W, words_W)
        masked_W = words_W.copy()
        states[name] = lab.mask(
            states[name], masked_W, round=1, slot=0, order_sha256=MODEL, work_sha256=MODEL
        )
        add_words(total_W, masked_W)
    since = time.perf_counter()
    poll = coordinator.call_survivors(
        group.setup, CHIEF, round=1, slot=0, order_sha256=MODEL, survivors=list(vectors)
    )
    check_s = time.perf_counter() - since
    agreements, replies, agree_s = {}, {}, 0.0
    since = time.perf_counter()
    for name in vectors:
        states[name], agreements[name] = lab.agree(states[name], group.people[name], poll.request)
    agree_s += time.perf_counter() - since
    since = time.perf_counter()
    for name, reply in agreements.items():
        coordinator.check_agreed(poll, name, reply)
    request = coordinator.call_reveal(poll, CHIEF, agreements)
    check_s += time.perf_counter() - since
    since = time.perf_counter()
    for name in vectors:
        states[name], replies[name] = lab.reveal(states[name], group.people[name], request)
    agree_s += time.perf_counter() - since
    since = time.perf_counter()
    revealed = {
        name: coordinator.check_revealed(poll, name, reply) for name, reply in replies.items()
    }
    check_s += time.perf_counter() - since
    return Round(poll, total_W, truth_W, revealed, agree_s / len(vectors), check_s)


def best(repeats: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Best time of each task in seconds; the tasks take turns, so that all see the same machine."""
    times = dict.fromkeys(tasks, float("inf"))
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def peak_bytes(task: Callable[[], object]) -> int:
    """Most memory that ``task`` held at once, its result included."""
    tracemalloc.start()
    task()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def bare_keystream(size: int, keys: list[bytes], chunk: int) -> None:
    """The keystreams of the same masks, thrown away."""
    zeros, out = bytes(chunk), memoryview(bytearray(chunk))
    for key in keys:
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        for at in range(0, size, chunk):
            part = min(chunk, size - at)
            cipher.update_into(zeros if part == chunk else zeros[:part], out[:part])


def flower_mask(quantized: list[NDArray[Any]], keys: list[bytes]) -> list[bytes]:
    """As secaggplus_mod._collect_masked_vectors: own mask, one with each peer, as bytes to send."""
    shapes: list[tuple[int, ...]] = [array.shape for array in quantized]
    masked = parameters_addition(quantized, pseudo_rand_gen(keys[0], FLOWER_RING, shapes))
    for number, key in enumerate(keys[1:]):
        pair = pseudo_rand_gen(key, FLOWER_RING, shapes)
        combine = parameters_addition if number % 2 else parameters_subtraction
        masked = combine(masked, pair)
    return [ndarray_to_bytes(array) for array in parameters_mod(masked, FLOWER_RING)]


def flower_unmask(total: list[NDArray[Any]], own: list[bytes], pairs: list[bytes]) -> None:
    """As in SecAggPlusWorkflow's unmask stage."""
    shapes: list[tuple[int, ...]] = [array.shape for array in total]
    for key in own:
        total = parameters_subtraction(total, pseudo_rand_gen(key, FLOWER_RING, shapes))
    for key in pairs:
        total = parameters_addition(total, pseudo_rand_gen(key, FLOWER_RING, shapes))
    parameters_mod(total, FLOWER_RING)


def measure_masking(parameters: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One lab's vector among eight."""
    rng = np.random.default_rng(1)
    update_P = rng.normal(0, 0.01, parameters).astype(np.float32)
    group = federation(LABS, 1)
    state = group.states["lab-01"]
    keys = [os.urandom(32) for _ in range(LABS)]
    ours: dict[str, Any] = {}
    peer: dict[str, Any] = {}
    words = {
        bits: encode(update_P, one_range(parameters, 0.1, bits=bits, cohort=LABS), rng=rng).words_W
        for bits in (32, 16)
    }
    update_D = update_P.astype(np.float64)
    quantized = quantize([update_D], 0.1, FLOWER_TARGET)
    flower_keys = [os.urandom(32) for _ in range(LABS)]

    def mask(words_W: Words) -> None:  # what is left in place is what is sent
        lab.mask(state, words_W, round=1, slot=0, order_sha256=MODEL, work_sha256=MODEL)

    streams = [Mask(key, 1) for key in keys]

    times = best(
        repeats,
        flower=lambda: flower_mask(quantized, flower_keys),
        ours=lambda: mask(words[32]),
        bare=lambda: bare_keystream(4 * parameters, keys, 1 << 18),
        bare_large=lambda: bare_keystream(4 * parameters, keys, 1 << 20),
        ours_16=lambda: mask(words[16]),
        bare_16=lambda: bare_keystream(2 * parameters, keys, 1 << 18),
        one_thread=lambda: add_to_share(words[32], streams, slice(0, parameters)),
        quantize=lambda: quantize([update_D], 0.1, FLOWER_TARGET),
        encode=lambda: encode(update_P, one_range(parameters, 0.1, bits=32, cohort=LABS), rng=rng),
    )
    ours["mask_s"], ours["mask_16_bits_s"] = times["ours"], times["ours_16"]
    ours["mask_1_thread_s"], ours["encode_s"] = times["one_thread"], times["encode"]
    ours["bare_keystream_s"] = min(times["bare"], times["bare_large"])
    ours["bare_keystream_16_bits_s"] = times["bare_16"]
    peer["mask_s"], peer["quantize_s"] = times["flower"], times["quantize"]
    ours["mask_extra_memory"] = peak_bytes(lambda: mask(words[32])) / update_P.nbytes
    peer["mask_extra_memory"] = (
        peak_bytes(lambda: flower_mask(quantized, flower_keys)) / update_P.nbytes
    )
    context = place(group)
    for bits, words_W in words.items():
        sealed = seal(words_W.data, context, sender=group.people["lab-01"], receiver=CHIEF.public)
        ours[f"bytes_per_parameter_{bits}_bits"] = sealed.nbytes / parameters
    sent = flower_mask(quantized, flower_keys)
    peer["bytes_per_parameter"] = sum(len(data) for data in sent) / parameters
    return ours, peer


def place(group: Federation) -> Context:
    cohort = group.setup.cohort
    return Context(
        federation=cohort.federation,
        run=cohort.run,
        plan_sha256=ZERO,
        roster_sha256=ZERO,
        round=1,
        slot=0,
        sender="lab-01",
        receiver="coordinator",
        direction=Direction.TO_COORDINATOR,
        content="update",
    )


def measure_unmasking(parameters: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two of eight labs dropped."""
    rng = np.random.default_rng(2)
    group = federation(LABS, 1)
    survivors = [f"lab-{number:02d}" for number in range(1, LABS - DROPPED + 1)]
    vectors = {name: rng.integers(0, 1 << 32, parameters, dtype=np.uint32) for name in survivors}
    done = one_round(group, vectors)
    del vectors
    start = time.perf_counter()
    coordinator.unmask(done.poll, done.total_W, done.revealed)
    ours: dict[str, Any] = {"unmask_2_of_8_dropped_s": time.perf_counter() - start}
    ours["sum_exact"] = bool(np.array_equal(done.total_W, done.truth_W))
    own = [os.urandom(32) for _ in survivors]
    pairs = [os.urandom(32) for _ in range(len(survivors) * DROPPED)]
    total = [done.truth_W.astype(np.int64)]
    start = time.perf_counter()
    flower_unmask(total, own, pairs)
    return ours, {"unmask_2_of_8_dropped_s": time.perf_counter() - start}


def measure_sealing(size: int, repeats: int) -> dict[str, Any]:
    payload = memoryview(np.random.default_rng(3).bytes(size))
    group = federation(3, 1)
    context, sender = place(group), group.people["lab-01"]
    bare = AESGCM(os.urandom(32))
    sealed = seal(payload, context, sender=sender, receiver=CHIEF.public)
    encrypted = bare.encrypt(bytes(12), payload, None)
    times = best(
        repeats,
        seal=lambda: seal(payload, context, sender=sender, receiver=CHIEF.public),
        bare=lambda: bare.encrypt(bytes(12), payload, None),
        unseal=lambda: unseal(sealed, context, sender=sender.public, receiver=CHIEF),
        bare_open=lambda: bare.decrypt(bytes(12), encrypted, None),
    )
    peak = peak_bytes(lambda: seal(payload, context, sender=sender, receiver=CHIEF.public))
    return {
        "seal_s": times["seal"],
        "bare_gcm_s": times["bare"],
        "unseal_s": times["unseal"],
        "bare_gcm_open_s": times["bare_open"],
        "seal_added_bytes": sealed.nbytes - size,
        "seal_memory": peak / size,
    }


def measure_sizes(sizes: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Set-up for 20 slots, and unmasking without the keystreams' share, by number of labs."""
    ours: dict[str, Any] = {}
    peer: dict[str, Any] = {}
    for count in sizes:
        group = federation(count, SLOTS)
        survivors = list(group.people)[: default_threshold(count)]
        vectors: dict[str, Words] = {name: np.ones(1000, np.uint32) for name in survivors}
        done = one_round(group, vectors)
        start = time.perf_counter()
        coordinator.unmask(done.poll, done.total_W, done.revealed)
        combine_s = time.perf_counter() - start
        ours[str(count)] = {
            "setup_lab_s": group.lab_s,
            "setup_coordinator_s": group.coordinator_s,
            "setup_up_bytes": group.up_bytes,
            "state_bytes": len(group.states["lab-01"].to_bytes()),
            "agree_and_reveal_lab_s": done.agree_s,
            "check_coordinator_s": done.check_s,
            "unmask_keys_s": combine_s,
        }
        peer[str(count)] = flower_size(count)
    return ours, peer


def flower_size(count: int) -> dict[str, float]:
    """Flower's share stage of one lab for one round, and the combining of all secrets."""
    threshold = default_threshold(count)
    start = time.perf_counter()
    own, _ = generate_key_pairs()
    secrets = (os.urandom(32), private_key_to_bytes(own))
    dealt = [create_shares(secret, threshold, count) for secret in secrets]
    for index in range(count - 1):
        _, public = generate_key_pairs()
        encrypt(generate_shared_key(own, public), dealt[0][index] + dealt[1][index])
    share_s = time.perf_counter() - start
    start = time.perf_counter()
    for position in range(count):  # seeds of the survivors, keys of the dropped
        combine_shares(dealt[0 if position < threshold else 1][:threshold])
    return {
        "setup_lab_s_one_round": share_s,
        "setup_lab_s_20_rounds": share_s * SLOTS,
        "combine_s": time.perf_counter() - start,
    }


def goal(name: str, value: float, op: str, limit: float) -> dict[str, Any]:
    met = value <= limit if op == "<=" else value >= limit
    return {"name": name, "value": round(value, 4), "op": op, "limit": limit, "met": bool(met)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer parameters, labs, repeats")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    parameters = 4_000_000 if arguments.quick else 11_200_000
    repeats = 6 if arguments.quick else 10
    sizes = [3, 8, 20] if arguments.quick else [3, 5, 8, 12, 20, 30, 40]

    ours, peer = measure_masking(parameters, repeats)
    for figures, more in zip((ours, peer), measure_unmasking(parameters), strict=True):
        figures.update(more)
    ours.update(measure_sealing(4 * parameters, repeats))
    ours["by_labs"], peer["by_labs"] = measure_sizes(sizes)
    ours["parameters"], ours["labs"], ours["threads"] = parameters, LABS, THREADS
    goals = [
        goal("masking, times faster than Flower", peer["mask_s"] / ours["mask_s"], ">=", 10),
        goal(
            "masking / bare AES-CTR keystream, one thread each",
            ours["mask_1_thread_s"] / ours["bare_keystream_s"],
            "<=",
            1.5,
        ),
        goal("bytes per parameter, 32 bits", ours["bytes_per_parameter_32_bits"], "<=", 4.01),
        goal("bytes per parameter, 16 bits", ours["bytes_per_parameter_16_bits"], "<=", 2.01),
        goal("extra memory / update", ours["mask_extra_memory"], "<=", 0.25),
        goal("sealing / bare AES-256-GCM speed", ours["bare_gcm_s"] / ours["seal_s"], ">=", 0.8),
        goal(
            "unsealing / bare AES-256-GCM speed",
            ours["bare_gcm_open_s"] / ours["unseal_s"],
            ">=",
            0.8,
        ),
        goal("sealing memory / payload", ours["seal_memory"], "<=", 1.1),
        goal("sum over 6 of 8 labs is exact", float(ours["sum_exact"]), ">=", 1),
    ]
    result = {"name": "secagg", "ours": ours, "peer": peer, "goals": goals}
    if not arguments.json:
        for item in goals:
            mark = "met" if item["met"] else "MISSED"
            print(f"{item['name']:50} {item['value']:8.3f} {item['op']} {item['limit']:<6} {mark}")
    print(json.dumps(rounded(result)))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
