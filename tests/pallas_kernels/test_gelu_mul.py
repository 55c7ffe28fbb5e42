"""GELU gate: right against float64, and the same bits in any batch."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def gate_up(normal):
    """gate_up(dtype): 300 rows of a gate and an up projection."""
    return lambda dtype: 3 * normal(0, (300, 2 * 640), dtype)


def gelu(gate):
    """In float64."""
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


def test_right(op, implementation, dtype, gate_up):
    x = gate_up(dtype)[:5]
    y = op("gelu_mul", implementation)(x)
    assert y.shape == (5, 640) and y.dtype == dtype
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    # Far below zero 1 + tanh cancels in float32 (the reference, and transformers).
    eps = float(jnp.finfo(dtype).eps)
    tolerance = 4e-7 * (1 + abs(gate)) * abs(up) + eps * abs(gelu(gate) * up)
    assert (abs(np.asarray(y).astype(np.float64) - gelu(gate) * up) <= tolerance).all()


def test_portable_keeps_closed_gates(op):
    """Written with an exponential, the tail keeps its digits."""
    gate = np.linspace(-5, -2, 64, dtype=np.float32)
    y = op("gelu_mul", "portable")(np.concatenate([gate, np.ones(64, np.float32)])[None])
    want = gelu(gate.astype(np.float64))[None]
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=1e-5)


def test_gates_far_from_zero(op, implementation, dtype):
    """Closed gates give nothing, open ones let pass; none overflows to NaN."""
    gate = np.array([-1e30, -300, -100, 0, 100, 300], dtype)
    y = op("gelu_mul", implementation)(np.concatenate([gate, np.ones(6, dtype)])[None])
    want = np.where(gate > 0, gate, 0).astype(np.float64)[None]
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, atol=1e-8)


def test_row_does_not_follow_the_batch(op, invariant, dtype, few_rows, gate_up, assert_rows_alike):
    assert_rows_alike(op("gelu_mul", invariant), (gate_up(dtype),), few_rows)


def test_narrow_rows_do_not_follow_the_batch(op, invariant, dtype, gate_up, assert_rows_alike):
    """Few elements in all: where XLA's own exponential takes another routine."""
    assert_rows_alike(op("gelu_mul", invariant), (gate_up(dtype)[:, :6],), (1, 2, 3, 5, 7, 9))


def test_neighbours_of_nan(op, invariant, dtype, gate_up, assert_same_bits):
    x = gate_up(dtype)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    gelu_mul = op("gelu_mul", invariant)
    assert_same_bits(gelu_mul(among)[128], gelu_mul(x)[128])
