"""Noise is Gaussian, secret, never repeated in production, and repeatable in simulations."""

from __future__ import annotations

import copy
import inspect
import math
import multiprocessing
import pickle
from multiprocessing.connection import Connection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cytofed.privacy.noise import Randomness, SimulatedRandomness, SystemRandomness

BOTH: list[Randomness] = [SystemRandomness(), SimulatedRandomness(7)]


@pytest.mark.parametrize("randomness", BOTH, ids=repr)
def test_noise_is_standard_normal(randomness: Randomness) -> None:
    noise = randomness.normals(200_001)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "norm").pvalue > 1e-9
    assert 4 < np.abs(noise).max() < 8.7
    halves = noise[:100_000], noise[100_000:200_000]
    assert abs(np.corrcoef(*halves)[0, 1]) < 6.5 / math.sqrt(100_000)


@pytest.mark.parametrize("randomness", BOTH, ids=repr)
def test_uniforms_are_uniform(randomness: Randomness) -> None:
    uniform = randomness.uniforms(50_001)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-9


@given(count=st.integers(0, 40_000))
@settings(max_examples=15, deadline=None)
def test_any_number_is_drawn_and_none_twice(count: int) -> None:
    randomness = SystemRandomness()
    first, second = randomness.uniforms(count), randomness.uniforms(count)
    assert len(first) == len(second) == count
    assert len(np.unique(np.concatenate([first, second]))) == 2 * count
    assert randomness.normals(count).shape == (count,)


@given(among=st.integers(0, 60), at_most=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_chosen_numbers_are_different_and_in_range(among: int, at_most: int) -> None:
    chosen = SystemRandomness().choose(among, at_most)
    assert len(set(chosen.tolist())) == len(chosen) == min(among, at_most)
    assert all(0 <= number < among for number in chosen)


def test_every_cell_is_chosen_equally_often() -> None:
    randomness = SimulatedRandomness(1)
    counts = np.zeros(10)
    for _ in range(4000):
        counts[randomness.choose(10, 3)] += 1
    assert stats.chisquare(counts).pvalue > 1e-9


def test_production_randomness_takes_no_seed() -> None:
    assert list(inspect.signature(SystemRandomness.__init__).parameters) == ["self"]
    assert SystemRandomness.simulated is False
    assert SimulatedRandomness.simulated is True


def test_seeding_every_other_generator_does_not_repeat_the_noise() -> None:
    import torch

    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(SystemRandomness().normals(64))
    assert not np.array_equal(drawn[0], drawn[1])


def test_two_rounds_or_labs_of_a_simulation_do_not_share_noise() -> None:
    contexts = [
        (0, "lab-1", 1),
        (0, "lab-1", 2),
        (0, "lab-2", 1),
        (1, "lab-1", 1),
        (0, "lab-11", 0),
    ]
    drawn = [SimulatedRandomness(seed, lab, number).normals(8) for seed, lab, number in contexts]
    assert len({tuple(noise) for noise in drawn}) == len(contexts)


def test_a_simulation_repeats_itself_to_the_bit() -> None:
    one, two = SimulatedRandomness(3, "lab-1", 4), SimulatedRandomness(3, "lab-1", 4)
    assert np.array_equal(one.normals(1001), two.normals(1001))
    assert np.array_equal(one.uniforms(5), two.uniforms(5))


@pytest.mark.parametrize("randomness", BOTH, ids=repr)
def test_randomness_is_not_copied(randomness: Randomness) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="not copied"):
            duplicate(randomness)


def _send_noise(randomness: SystemRandomness, pipe: Connection) -> None:
    pipe.send_bytes(randomness.normals(16).tobytes())


def test_a_forked_process_does_not_repeat_the_noise() -> None:
    randomness = SystemRandomness()
    randomness.normals(1)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_noise, args=(randomness, sender))
    child.start()
    theirs = np.frombuffer(receiver.recv_bytes(), np.float32)
    child.join()
    assert not np.array_equal(theirs, randomness.normals(16))
