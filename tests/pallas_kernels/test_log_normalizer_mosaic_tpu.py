"""The Pallas TPU normalizer, interpreted: right, and the same bits in any batch and block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.log_normalizer.mosaic_tpu import log_normalizer

SIZE = 16384 + 4000  # a whole chunk and a ragged one


@pytest.fixture(scope="module")
def logits(normal):
    """20 rows; some with ties, NaN, or without a finite logit in a chunk."""
    x = normal(0, (20, SIZE), np.float32) * 3
    x[3, [777, 18000]] = 30
    x[4, [50, 17000]] = np.nan
    x[5] = -np.inf
    x[6, 16000:] = -np.inf
    x[7, :17000] = -np.inf
    x[8, 5] = np.inf
    x[9, 20000] = 25
    return x


@pytest.fixture(scope="module")
def whole(logits):
    """All rows in one block."""
    return jax.tree.map(np.asarray, log_normalizer(jnp.asarray(logits), interpret=True))


def test_right(logits, whole):
    assert whole.argmax[[3, 4, 5, 8, 9]].tolist() == [777, 50, 0, 5, 20000]
    finite = np.delete(np.arange(20), [4, 5, 8])
    x = logits[finite].astype(np.float64)
    np.testing.assert_array_equal(whole.argmax[finite], x.argmax(1))
    np.testing.assert_array_equal(whole.maximum[finite], x.max(1))
    log_sum = np.log(np.exp(x - x.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(whole.log_sum[finite], log_sum, rtol=2e-6, atol=1e-6)
    assert np.isnan(whole.log_sum[[4, 8]]).all() and whole.log_sum[5] == -np.inf


def test_row_follows_neither_batch_nor_block(logits, whole, assert_same_bits):
    for rows, block in ((20, 8), (1, None)):
        part = log_normalizer(jnp.asarray(logits[:rows]), block_rows=block, interpret=True)
        for got, want in zip(part, whole, strict=True):
            assert_same_bits(got, want[:rows], f"{rows} rows in blocks of {block}")


def test_simulated(logits, whole, simulated_tpu, assert_same_bits):
    part = simulated_tpu(log_normalizer, jnp.asarray(logits[:12]), block_rows=8, seed=5)
    for got, want in zip(part, whole, strict=True):
        assert_same_bits(got, want[:12])


def test_refuses_bfloat16():
    with pytest.raises(NotImplementedError, match="log_normalizer takes float32, got bfloat16"):
        log_normalizer(jnp.zeros((2, 16), jnp.bfloat16))
