"""The Pallas TPU norm, interpreted: right, the tree it says, the same bits in any block."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.rms_norm import mosaic_tpu, reference

norm = functools.partial(mosaic_tpu.rms_norm, eps=1e-6)


@pytest.fixture(scope="module")
def operands(normal):
    """operands(rows, size, dtype): x, weight, residual."""

    def draw(rows, size, dtype):
        shapes = ((rows, size), (size,), (rows, size))
        return tuple(jnp.asarray(normal(i, s, dtype)) for i, s in enumerate(shapes))

    return draw


@pytest.mark.parametrize("size", [576, 1024])
def test_row_follows_neither_batch_nor_schedule(operands, dtype, op, assert_same_bits, size):
    x, weight, residual = operands(50, size, dtype)
    y, s = norm(x, weight, residual=residual, interpret=True)
    want = reference.rms_norm(*(a.astype(jnp.float32) for a in (s, weight)), eps=1e-6)[0]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=eps + 1e-6, atol=1e-6)
    if size == 1024:  # a power of two: the tree of `trees.tree_sum`
        portable = op("rms_norm", "portable")(x, weight, residual=residual, eps=1e-6)
        assert_same_bits(s, portable[1])
        np.testing.assert_allclose(
            y.astype(jnp.float32), portable[0].astype(jnp.float32), rtol=eps, atol=0
        )
    for m in (1, 9):
        part = norm(x[:m], weight, residual=residual[:m], interpret=True)
        assert_same_bits(part[0], y[:m], f"M={m}")
        assert_same_bits(part[1], s[:m], f"M={m}")
    blocks = norm(x, weight, residual=residual, block_rows=16, interpret=True)
    assert_same_bits(blocks[0], y)


def test_simulated(operands, simulated_tpu, assert_same_bits):
    """A ragged last block and ragged lanes, which hold NaN; a weight of another dtype."""
    x, weight, _ = operands(20, 576, jnp.bfloat16)
    weight = weight.astype(jnp.float32)
    y, s = simulated_tpu(norm, x, weight, block_rows=16, seed=3)
    assert_same_bits(y, norm(x, weight, interpret=True)[0])
    assert_same_bits(s, x)


def test_refuses_float16():
    x = jnp.zeros((2, 16), jnp.float16)
    with pytest.raises(NotImplementedError, match="rms_norm takes bfloat16 or float32"):
        norm(x, x[0])
