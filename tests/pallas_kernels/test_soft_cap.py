"""Soft cap of logits: right against float64, and the same bits in any batch and program."""

import jax.numpy as jnp
import numpy as np

from jdet.compiler import jit
from jdet.pallas_kernels import implementation_of

CAP = 30.0


def test_right(op, implementation, dtype, normal):
    x = 40 * normal(0, (5, 1000), dtype)
    y = op("soft_cap", implementation)(x, cap=CAP)
    assert y.shape == x.shape and y.dtype == dtype
    want = CAP * np.tanh(x.astype(np.float64) / CAP)
    # A quotient, tanh within 2 ulp, a product; one rounding to the dtype.
    tolerance = 6 * np.finfo(np.float32).eps + float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=tolerance)


def test_row_does_not_follow_the_batch(op, invariant, few_rows, normal, assert_rows_alike):
    x = 40 * normal(0, (300, 1001), np.float32)
    soft_cap = op("soft_cap", invariant)
    assert_rows_alike(lambda x: soft_cap(x, cap=CAP), (x,), few_rows)


def test_what_follows_does_not_matter(op, invariant, normal, assert_same_bits):
    """A difference from a maximum, as in the log-probabilities, in one program and in two."""
    x = 40 * normal(0, (9, 1001), np.float32)
    soft_cap = implementation_of("soft_cap", invariant)

    def centred(x):
        y = soft_cap(x, cap=CAP)
        return y - jnp.max(y, axis=-1, keepdims=True)

    y = op("soft_cap", invariant)(x, cap=CAP)
    together = jit(centred, implementation=invariant)(x)
    assert_same_bits(together, y - jnp.max(y, axis=-1, keepdims=True))


def test_neighbours_of_nan(op, invariant, normal, assert_same_bits):
    x = normal(0, (9, 100), np.float32)
    among = np.full_like(x, np.nan)
    among[4] = x[4]
    soft_cap = op("soft_cap", invariant)
    assert_same_bits(soft_cap(among, cap=CAP)[4], soft_cap(x, cap=CAP)[4])
