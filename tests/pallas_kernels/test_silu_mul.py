"""SiLU gate: right against float64, and the same bits in any batch."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def gate_up(normal):
    """gate_up(dtype): 300 rows of SmolLM2's gate and up projections."""
    return lambda dtype: 3 * normal(0, (300, 2 * 1536), dtype)


def test_right(op, implementation, dtype, gate_up):
    x = gate_up(dtype)[:5]
    y = op("silu_mul", implementation)(x)
    assert y.shape == (5, 1536) and y.dtype == dtype
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    want = gate / (1 + np.exp(-gate)) * up
    # exp is within 2 ulp; an addition, a division, a product; one rounding to the dtype.
    tolerance = 5 * np.finfo(np.float32).eps + float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=tolerance, atol=0)


def test_gates_far_from_zero(op, implementation, dtype):
    """Closed gates give nothing, open ones let pass; none overflows to NaN."""
    gate = np.array([-300, -100, 0, 100, 300], dtype)
    y = op("silu_mul", implementation)(np.concatenate([gate, np.ones(5, dtype)])[None])
    want = np.where(gate > 0, gate, 0).astype(np.float64)[None]
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, atol=1e-30)


def test_row_does_not_follow_the_batch(op, invariant, dtype, rows, gate_up, assert_rows_alike):
    assert_rows_alike(op("silu_mul", invariant), (gate_up(dtype),), rows)


def test_narrow_rows_do_not_follow_the_batch(op, invariant, dtype, gate_up, assert_rows_alike):
    """Few elements in all: where XLA's own exponential takes another routine."""
    assert_rows_alike(op("silu_mul", invariant), (gate_up(dtype)[:, :6],), (1, 2, 3, 5, 7, 9))


def test_neighbours_of_nan(op, invariant, dtype, gate_up, assert_same_bits):
    x = gate_up(dtype)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    silu_mul = op("silu_mul", invariant)
    assert_same_bits(silu_mul(among)[128], silu_mul(x)[128])


def test_runs_twice_alike(op, invariant, dtype, gate_up, assert_same_bits):
    x = gate_up(dtype)
    silu_mul = op("silu_mul", invariant)
    assert_same_bits(silu_mul(x), silu_mul(x))
