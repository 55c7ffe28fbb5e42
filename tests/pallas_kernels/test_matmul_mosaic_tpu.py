"""The Pallas TPU matmul, interpreted: right, and the same bits under every schedule and batch.

The interpreter's products are XLA:CPU's, one order for any number of rows from `SUBLANES` on;
that of the real matrix unit no one has measured yet. What is compared here is the rest of the
tree: which elements meet in a product, and the order of the products.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels import tpu
from jdet.pallas_kernels.matmul import mosaic_tpu, reference
from jdet.pallas_kernels.matmul.mosaic_tpu import Schedule, block_of, k_block

pytestmark = pytest.mark.usefixtures("unoptimized")

interpreted = functools.partial(mosaic_tpu.matmul, interpret=True)
# (dtype, K, leaves): one block; a ragged last one; leaves inside a block; leaves of whole blocks.
CUTS = (("float32", 576, 1), ("float32", 2120, 1), ("bfloat16", 576, 8), ("bfloat16", 2560, 2))


@pytest.fixture(scope="module")
def operands(normal):
    """operands(m, n, k, dtype): x, w, bias."""

    def draw(m, n, k, dtype):
        return tuple(jnp.asarray(normal(i, s, dtype)) for i, s in enumerate(((m, k), (n, k), (n,))))

    return draw


@pytest.mark.parametrize(("dtype", "k", "leaves"), CUTS)
def test_row_follows_neither_batch_nor_schedule(operands, dtype, assert_same_bits, k, leaves):
    x, w, bias = operands(40, 200, k, jnp.dtype(dtype))
    run = functools.partial(interpreted, bias=bias, leaves=leaves, out_dtype=jnp.float32)
    whole = run(x, w)
    x64, w64, bias64 = (np.asarray(a).astype(np.float64) for a in (x, w, bias))
    np.testing.assert_allclose(whole, x64 @ w64.T + bias64, atol=1e-5 * np.sqrt(k), rtol=1e-5)
    for m in (1, 9):
        assert_same_bits(run(x[:m], w), whole[:m], f"M={m}")
    assert_same_bits(run(x, w, schedule=Schedule(16, 128)), whole)


def test_leaves_are_added_as_the_reference_adds_them(operands, assert_same_bits):
    """Whole numbers are exact in any order inside a leaf, so that only the leaves' tree is left."""
    x, w, _ = operands(3, 16, 576, jnp.float32)
    x, w = jnp.round(x), jnp.round(w * 4)
    scale = np.repeat(10 ** np.arange(8), 72).astype(np.float32)  # leaves round each other
    got = interpreted(x * scale, w, leaves=8)
    assert_same_bits(got, reference.matmul(x * scale, w, leaves=8))
    assert (got != interpreted(x * scale, w, leaves=1)).any()


def test_control_blocks_that_follow_the_batch(operands, monkeypatch):
    """With K blocks chosen by another rule a row has other bits: the tests above can fail."""
    x, w, _ = operands(9, 64, 1024, jnp.float32)
    whole = interpreted(x, w)
    monkeypatch.setattr(mosaic_tpu, "block_of", lambda k, leaves, itemsize: 128)
    jitted: Any = mosaic_tpu._matmul
    monkeypatch.setattr(mosaic_tpu, "_matmul", jitted.__wrapped__)  # which no cache answers
    assert (np.asarray(interpreted(x, w)) != np.asarray(whole)).any()


def test_simulated(operands, simulated_tpu, assert_same_bits):
    """Ragged in M, N and K, whose edges hold NaN in the simulator; a row of NaN stays alone."""
    x, w, bias = operands(20, 200, 2120, jnp.bfloat16)
    run = functools.partial(mosaic_tpu.matmul, bias=bias)
    want = run(x, w, interpret=True)
    x = x.at[3].set(jnp.nan)
    got = simulated_tpu(run, x, w, seed=7, schedule=Schedule(16, 128))
    keep = np.delete(np.arange(20), 3)
    assert_same_bits(got[keep], want[keep])
    assert jnp.isnan(got[3]).all()


def test_blocks_follow_k_and_dtype_alone():
    assert [k_block(k, 2) for k in (576, 2048, 4096, 12288, 2560, 11008)] == [
        576,
        2048,
        2048,
        2048,
        1280,
        2048,
    ]
    assert k_block(4096, 4) == 1024
    assert [block_of(12288, 8, 2), block_of(576, 8, 2), block_of(11008, 8, 2)] == [1536, 576, 2048]


def test_shape_invariant_numerics_is_asked_for():
    params = tpu.compiler_params("parallel", "arbitrary")
    assert params.shape_invariant_numerics


def test_refuses():
    x = jnp.zeros((2, 16), jnp.float16)
    with pytest.raises(NotImplementedError, match="takes bfloat16 or float32, all alike; got flo"):
        mosaic_tpu.matmul(x, x)
    x = jnp.zeros((2, 16))
    with pytest.raises(ValueError, match="must share K"):
        mosaic_tpu.matmul(x, x[:, :8])
    with pytest.raises(ValueError, match="bias must have shape"):
        mosaic_tpu.matmul(x, x, bias=x[0])
    with pytest.raises(
        ValueError, match="leaves must be a power of two that divides K = 16, got 3"
    ):
        mosaic_tpu.matmul(x, x, leaves=3)
    with pytest.raises(NotImplementedError, match="cannot write float16"):
        mosaic_tpu.matmul(x, x, out_dtype=jnp.float16)
