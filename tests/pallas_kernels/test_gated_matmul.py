"""Gated matmul: right against float64, its parts' bits, and the same bits in any batch."""

import jax.numpy as jnp
import numpy as np
import pytest

HIDDEN, INNER = 576, 1536  # SmolLM2's


@pytest.fixture(scope="module")
def operands(normal):
    """operands(dtype): 300 rows of x, and weights that give gates of about 2."""

    def draw(dtype):
        w = normal(1, (2 * INNER, HIDDEN), np.float32) * 2 * HIDDEN**-0.5
        return normal(0, (300, HIDDEN), dtype), w.astype(dtype)

    return draw


def test_right(op, implementation, dtype, operands):
    x, w = operands(dtype)
    x = x[:9]
    y = op("gated_matmul", implementation)(x, w)
    assert y.shape == (9, INNER) and y.dtype == dtype
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    gate, up = np.split(x64 @ w64.T, 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    # Each product: one float32 sum of K terms and one rounding. SiLU grows a gate's absolute
    # error by 1.1 at most. At the end one rounding more, and a few in float32.
    eps = float(jnp.finfo(dtype).eps)
    typical = np.sqrt(x64**2 @ (w64**2).T) + 1
    error = np.sqrt(HIDDEN) * np.finfo(np.float32).eps * typical
    gate_error, up_error = np.split(error + eps * abs(np.concatenate([gate, up], 1)), 2, axis=1)
    tolerance = 1.1 * gate_error * (abs(up) + up_error) + abs(gate) * up_error
    tolerance += 2 * eps * abs(want)
    assert (abs(np.asarray(y).astype(np.float64) - want) <= tolerance).all()


def test_bits_are_those_of_its_parts(
    op, implementation, dtype, few_rows, operands, assert_same_bits
):
    x, w = operands(dtype)
    whole, matmul, silu_mul = (
        op(name, implementation) for name in ("gated_matmul", "matmul", "silu_mul")
    )
    for m in few_rows:
        assert_same_bits(whole(x[:m], w), silu_mul(matmul(x[:m], w)), f"M={m}")


def test_gelu_bits_are_those_of_its_parts(op, implementation, dtype, operands, assert_same_bits):
    x, w = operands(dtype)
    whole, matmul, gelu_mul = (
        op(name, implementation) for name in ("gated_matmul", "matmul", "gelu_mul")
    )
    for m in (1, 33):
        want = gelu_mul(matmul(x[:m], w))
        assert_same_bits(whole(x[:m], w, activation="gelu_tanh"), want, f"M={m}")


def test_row_does_not_follow_the_batch(op, invariant, dtype, rows, operands, assert_rows_alike):
    x, w = operands(dtype)
    gated_matmul = op("gated_matmul", invariant)
    assert_rows_alike(lambda x: gated_matmul(x, w), (x,), rows)


def test_negative_control(op, rows, operands, bits):
    """Plain XLA fails the comparison; in bfloat16 the rounding can hide it."""
    x, w = operands(jnp.float32)
    gated_matmul = op("gated_matmul", "xla")
    whole = bits(gated_matmul(x, w))
    batches = (bits(gated_matmul(x[:m], w)) for m in rows)
    assert any((y != whole[: len(y)]).any() for y in batches)


def test_neighbours_of_nan(op, invariant, dtype, operands, assert_same_bits):
    x, w = operands(dtype)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    gated_matmul = op("gated_matmul", invariant)
    y = gated_matmul(among, w)
    assert_same_bits(y[128], gated_matmul(x, w)[128])
    assert np.isnan(np.asarray(y[127], np.float32)).all()


def test_runs_twice_alike(op, invariant, dtype, operands, assert_same_bits):
    x, w = operands(dtype)
    gated_matmul = op("gated_matmul", invariant)
    assert_same_bits(gated_matmul(x, w), gated_matmul(x, w))
