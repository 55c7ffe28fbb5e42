"""The normalizer of logits: right against float64, and the same bits in any batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.ops import Ops
from jdet.pallas_kernels.trees import exp, log, tree_sum


@pytest.fixture(scope="module")
def logits(normal):
    """logits(vocabulary, dtype): 300 rows, peaked as a model's are."""

    def draw(vocabulary, dtype=np.float32):
        return (4 * normal(0, (300, vocabulary), np.float32)).astype(dtype)

    return draw


@pytest.mark.parametrize("vocabulary", [1000, 49152])
def test_right(op, implementation, dtype, vocabulary, logits):
    x = logits(vocabulary, dtype)[:4]
    y = op("log_normalizer", implementation)(x)
    assert y.maximum.dtype == y.log_sum.dtype == jnp.float32 and y.argmax.dtype == jnp.int32
    x64 = x.astype(np.float64)
    np.testing.assert_array_equal(np.asarray(y.maximum, np.float64), x64.max(-1))
    np.testing.assert_array_equal(y.argmax, x64.argmax(-1))
    want = np.log(np.exp(x64 - x64.max(-1, keepdims=True)).sum(-1))
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(y.log_sum, want, rtol=2 * eps, atol=np.sqrt(vocabulary) * eps)


def test_log_probs_of_some_tokens_are_those_of_all(op, implementation, logits, assert_same_bits):
    x = logits(1000)
    y = op("log_normalizer", implementation)(x)
    tokens = np.arange(300)[:, None] * 3 + np.arange(2)
    some = y.log_probs(jnp.asarray(np.take_along_axis(x, tokens, axis=-1)))
    whole = np.asarray(y.log_probs(jnp.asarray(x)))
    assert_same_bits(some, np.take_along_axis(whole, tokens, axis=-1))


@pytest.mark.parametrize("vocabulary", [1000, 49152])
def test_log_probs_are_those_of_a_log_softmax(vocabulary, logits, assert_same_bits):
    """Of one program that makes the whole array, as generation did before: the same bits."""

    def log_softmax(x):
        shifted = x - jnp.max(x, axis=-1, keepdims=True)
        return shifted - log(tree_sum(exp(shifted)))[..., None]

    def chosen(x, tokens):
        logit = jnp.take_along_axis(x, tokens, axis=-1)
        return Ops("portable").log_normalizer(x).log_probs(logit)

    x = logits(vocabulary)[:33]
    tokens = np.arange(33, dtype=np.int32)[:, None] * 29
    whole = np.asarray(jit(log_softmax)(x))
    assert_same_bits(jit(chosen)(x, tokens), np.take_along_axis(whole, tokens, axis=-1))
    assert_same_bits(Ops("portable").log_softmax(jnp.asarray(x)), whole)


def test_certainty_is_zero(op, implementation):
    """One token with all the probability; the others so unlikely that exp gives 0."""
    x = np.array([[0.0, -200.0, -jnp.inf]], np.float32)
    y = op("log_normalizer", implementation)(x)
    np.testing.assert_array_equal(y.log_probs(jnp.asarray(x)), x)
    np.testing.assert_array_equal(y.argmax, [0])


@pytest.mark.parametrize("vocabulary", [1000, 4096])
def test_first_of_equals(op, implementation, vocabulary):
    x = np.zeros((3, vocabulary), np.float32)
    x[1, [7, 999]] = 1
    x[2, [500, 999]] = np.nan
    y = op("log_normalizer", implementation)(x)
    np.testing.assert_array_equal(y.argmax, [0, 7, 500])
    assert np.isnan(y.log_probs(jnp.asarray(x[:, 500:501]))[2])


def test_no_probability_at_all(op, implementation):
    """Nothing finite, or infinity: NaN for the token that would be chosen."""
    x = np.full((2, 8), -np.inf, np.float32)
    x[1, 3] = np.inf
    y = op("log_normalizer", implementation)(x)
    np.testing.assert_array_equal(y.argmax, [0, 3])
    logprobs = np.asarray(y.log_probs(jnp.asarray(x)))
    assert np.isnan(logprobs[0]).all() and np.isnan(logprobs[1, 3])


def test_row_does_not_follow_the_batch(op, invariant, rows, logits, assert_rows_alike):
    assert_rows_alike(op("log_normalizer", invariant), (logits(1000),), rows)


def test_negative_control(op, rows, logits, bits):
    """Plain XLA fails the comparison: it picks the order of a sum by the array's size."""
    x, log_normalizer = logits(1000), op("log_normalizer", "xla")
    whole = bits(log_normalizer(x).log_sum)
    assert any((bits(log_normalizer(x[:m]).log_sum) != whole[:m]).any() for m in rows)


def test_row_of_bfloat16_does_not_follow_the_batch(
    op, invariant, few_rows, logits, assert_rows_alike
):
    assert_rows_alike(op("log_normalizer", invariant), (logits(1000, jnp.bfloat16),), few_rows)


def test_row_of_a_real_vocabulary_does_not_follow_the_batch(
    op, invariant, few_rows, logits, assert_rows_alike
):
    assert_rows_alike(op("log_normalizer", invariant), (logits(49152),), few_rows)


def test_shape_of_the_batch_does_not_matter(op, invariant, logits, assert_same_bits):
    x = logits(1000)[:12]
    flat = op("log_normalizer", invariant)(x)
    for shape in ((12, 1), (1, 12), (3, 4)):
        y = op("log_normalizer", invariant)(x.reshape(*shape, 1000))
        for actual, expected in zip(y, flat, strict=True):
            assert_same_bits(np.asarray(actual).reshape(12), expected, str(shape))


def test_neighbours_of_nan(op, invariant, logits, assert_same_bits):
    x = logits(1000)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    log_normalizer = op("log_normalizer", invariant)
    y = log_normalizer(among)
    for actual, expected in zip(y, log_normalizer(x), strict=True):
        assert_same_bits(actual[128], expected[128])
    assert np.isnan(y.log_probs(jnp.asarray(among))[127]).all()


def test_runs_twice_alike(op, invariant, logits, assert_same_bits):
    x = logits(49152)
    log_normalizer = op("log_normalizer", invariant)
    for first, second in zip(log_normalizer(x), log_normalizer(x), strict=True):
        assert_same_bits(first, second)
