"""The Pallas TPU gated matmul, interpreted: right, and the same bits in any batch and schedule."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.gated_matmul import ACTIVATIONS, mosaic_tpu, reference
from jdet.pallas_kernels.gated_matmul.mosaic_tpu import Schedule

pytestmark = pytest.mark.usefixtures("unoptimized")

DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize(("activation", "dtype"), tuple(zip(ACTIVATIONS, DTYPES, strict=True)))
def test_row_follows_neither_batch_nor_schedule(normal, assert_same_bits, activation, dtype):
    dtype = jnp.dtype(dtype)
    x = jnp.asarray(normal(0, (40, 136), dtype))
    w = jnp.asarray(normal(1, (2 * 144, 136), dtype)) / np.array(8, dtype)
    run = functools.partial(mosaic_tpu.gated_matmul, activation=activation, interpret=True)
    whole = run(x, w)
    want = reference.gated_matmul(*(a.astype(jnp.float32) for a in (x, w)), activation=activation)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(whole.astype(jnp.float32), want, rtol=8 * eps, atol=1e-5 + 8 * eps)
    for m in (1, 9):
        assert_same_bits(run(x[:m], w), whole[:m], f"M={m}")
    assert_same_bits(run(x, w, schedule=Schedule(16, 128)), whole)


def test_simulated(normal, simulated_tpu, assert_same_bits):
    x, w = (jnp.asarray(normal(i, s, jnp.bfloat16)) for i, s in enumerate(((9, 136), (288, 136))))
    got = simulated_tpu(mosaic_tpu.gated_matmul, x, w, schedule=Schedule(16, 128))
    assert_same_bits(got, mosaic_tpu.gated_matmul(x, w, interpret=True))
