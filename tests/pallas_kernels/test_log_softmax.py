"""Log-softmax: right against float64, and the same bits in any batch."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def logits(normal):
    """logits(vocabulary, dtype): 300 rows, peaked as a model's are."""

    def draw(vocabulary, dtype=np.float32):
        return (4 * normal(0, (300, vocabulary), np.float32)).astype(dtype)

    return draw


@pytest.mark.parametrize("vocabulary", [1000, 49152])
def test_right(op, implementation, dtype, vocabulary, logits):
    x = logits(vocabulary, dtype)[:4]
    y = op("log_softmax", implementation)(x)
    assert y.dtype == jnp.float32
    x64 = x.astype(np.float64)
    shifted = x64 - x64.max(-1, keepdims=True)
    want = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(y, want, rtol=2 * eps, atol=np.sqrt(vocabulary) * eps)


def test_certainty_is_zero(op, implementation):
    """One token with all the probability; the others so unlikely that exp gives 0."""
    x = np.array([[0.0, -200.0, -jnp.inf]], np.float32)
    y = op("log_softmax", implementation)(x)
    np.testing.assert_array_equal(y, x)


def test_row_does_not_follow_the_batch(op, invariant, rows, logits, assert_rows_alike):
    assert_rows_alike(op("log_softmax", invariant), (logits(1000),), rows)


def test_negative_control(op, rows, logits, bits):
    """Plain XLA fails the comparison: it picks the order of a sum by the array's size."""
    x, log_softmax = logits(1000), op("log_softmax", "xla")
    whole = bits(log_softmax(x))
    assert any((bits(log_softmax(x[:m])) != whole[:m]).any() for m in rows)


def test_row_of_bfloat16_does_not_follow_the_batch(
    op, invariant, few_rows, logits, assert_rows_alike
):
    assert_rows_alike(op("log_softmax", invariant), (logits(1000, jnp.bfloat16),), few_rows)


def test_row_of_a_real_vocabulary_does_not_follow_the_batch(
    op, invariant, few_rows, logits, assert_rows_alike
):
    assert_rows_alike(op("log_softmax", invariant), (logits(49152),), few_rows)


def test_shape_of_the_batch_does_not_matter(op, invariant, logits, assert_same_bits):
    x = logits(1000)[:12]
    flat = np.asarray(op("log_softmax", invariant)(x))
    for shape in ((12, 1), (1, 12), (3, 4)):
        y = op("log_softmax", invariant)(x.reshape(*shape, 1000))
        assert_same_bits(np.asarray(y).reshape(12, 1000), flat, str(shape))


def test_neighbours_of_nan(op, invariant, logits, assert_same_bits):
    x = logits(1000)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    log_softmax = op("log_softmax", invariant)
    y = log_softmax(among)
    assert_same_bits(y[128], log_softmax(x)[128])
    assert np.isnan(y[127]).all()


def test_runs_twice_alike(op, invariant, logits, assert_same_bits):
    x = logits(49152)
    log_softmax = op("log_softmax", invariant)
    assert_same_bits(log_softmax(x), log_softmax(x))
