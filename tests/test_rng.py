"""Noise is a function of seed, sample index, position and token id, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels import trees
from jdet.rng import MAX_SEED, gumbel

VOCABULARY = 1000
noise = jit(gumbel, static_argnames="vocab_size")


def words(*seeds):
    """Seeds as the two words that the library carries, high word first."""
    return np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32)


def ints(*values):
    return np.array(values, np.int32)


def bits(x):
    return np.asarray(x).view(np.int32)


def test_noise_is_that_of_the_documented_stream():
    """Threefry by jax.random, keyed by the seed's words, folded with index and position."""

    @jit
    def restated(seed, index, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, index), position)
        uniform = (jax.random.bits(key, (VOCABULARY,)) >> 9).astype(jnp.float32) + jnp.float32(0.5)
        return -trees.log(-trees.log(uniform * jnp.float32(2**-23)))

    for seed, index, position in ((0, 0, 0), (2**63 + 12345, 3, 77), (MAX_SEED, 1, 2**31 - 1)):
        [row] = noise(words(seed), ints(index), ints(position), VOCABULARY)
        with jax.threefry_partitionable(True):
            expected = restated(words(seed)[0], np.int32(index), np.int32(position))
        np.testing.assert_array_equal(bits(row), bits(expected))


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_user_s_setting_of_threefry_does_not_matter(partitionable):
    expected = bits(noise(words(7), ints(0), ints(0), VOCABULARY))
    with jax.threefry_partitionable(partitionable):
        again = jit(gumbel, static_argnames="vocab_size")(words(7), ints(0), ints(0), VOCABULARY)
    np.testing.assert_array_equal(bits(again), expected)


def test_row_does_not_follow_the_batch():
    seeds = np.random.default_rng(0).integers(0, 2**32, (65, 2), np.uint32)
    index, position = np.arange(65, dtype=np.int32) % 4, np.arange(65, dtype=np.int32) * 11
    whole = bits(noise(seeds, index, position, VOCABULARY))
    for batch in (1, 2, 7, 33):
        pick = (np.arange(batch) + 5 * batch) % 65
        part = noise(seeds[pick], index[pick], position[pick], VOCABULARY)
        assert part.shape == (batch, VOCABULARY)
        np.testing.assert_array_equal(bits(part), whole[pick])


def test_token_does_not_follow_the_size_of_the_vocabulary():
    """A padded vocabulary draws what the real one draws."""
    whole = bits(noise(words(7), ints(0), ints(0), VOCABULARY))
    for size in (1, 7, VOCABULARY - 1):
        part = bits(noise(words(7), ints(0), ints(0), size))
        np.testing.assert_array_equal(part, whole[:, :size])


def test_every_argument_counts():
    """Neighbouring values of each, both words of the seed, and no swap of two arguments."""
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, MAX_SEED - 1, MAX_SEED)
    arguments = [(s, i, p) for s in seeds for i in (0, 1, 2) for p in (0, 1, 2, 1000)]
    seed, index, position = zip(*arguments, strict=True)
    rows = bits(noise(words(*seed), ints(*index), ints(*position), VOCABULARY))
    assert len(np.unique(rows, axis=0)) == len(arguments)
    # Not a shifted copy of one stream either: equal values are as rare as chance makes them.
    assert len(np.unique(rows)) > 0.95 * rows.size


def test_noise_is_standard_gumbel():
    """Mean 0.5772, variance pi**2 / 6, and the distribution function itself, on 200,000 draws."""
    rows = 200
    draws = noise(words(*range(rows)), ints(*[0] * rows), ints(*[0] * rows), VOCABULARY)
    x = np.sort(np.asarray(draws).ravel().astype(np.float64))
    assert abs(x.mean() - np.euler_gamma) < 0.01
    assert abs(x.var() - np.pi**2 / 6) < 0.02
    empirical = (np.arange(x.size) + 0.5) / x.size
    # Kolmogorov-Smirnov, at one in a million.
    assert abs(np.exp(-np.exp(-x)) - empirical).max() < 2.7 / np.sqrt(x.size)


def test_extreme_words_give_finite_noise():
    """The smallest and the largest uniform number: a token can neither be banned nor forced."""
    ends = np.array([0.5 * 2.0**-23, 1 - 0.5 * 2.0**-23], np.float32)
    low, high = np.asarray(jit(lambda u: -trees.log(-trees.log(u)))(ends))
    assert np.isclose(low, -np.log(-np.log(ends[0])), rtol=1e-5)
    assert np.isclose(high, -np.log(-np.log(ends[1].astype(np.float64))), rtol=1e-5)
