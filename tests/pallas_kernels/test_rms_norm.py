"""RMSNorm: right against float64, and the same bits in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels import implementation_of

EPS = 1e-5


@pytest.fixture(scope="module")
def operands(normal):
    """operands(width, dtype): 300 rows of x and of a residual, and weights."""

    def draw(width, dtype):
        x, residual = normal(0, (300, width), dtype), normal(1, (300, width), dtype)
        return x, residual, normal(2, (width,), dtype)

    return draw


@pytest.mark.parametrize("width", [64, 576, 1000])
def test_right(op, implementation, dtype, width, operands, assert_same_bits):
    x, residual, weight = operands(width, dtype)
    y, s = op("rms_norm", implementation)(x[:5], weight, eps=EPS, residual=residual[:5])
    # One float32 addition and one rounding: nothing is left open.
    total = x[:5].astype(np.float32) + residual[:5].astype(np.float32)
    assert_same_bits(s, total.astype(dtype))
    assert y.dtype == dtype
    s64, weight64 = np.asarray(s).astype(np.float64), weight.astype(np.float64)
    want = s64 / np.sqrt((s64**2).mean(-1, keepdims=True) + EPS) * weight64
    tolerance = np.sqrt(width) * np.finfo(np.float32).eps + float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=tolerance, atol=0)


def test_no_residual_is_a_residual_of_zero(op, implementation, dtype, operands, assert_same_bits):
    x, _, weight = operands(576, dtype)
    norm = op("rms_norm", implementation)
    y, s = norm(x[:5], weight, eps=EPS)
    assert_same_bits(s, x[:5])
    assert_same_bits(y, norm(x[:5], weight, eps=EPS, residual=np.zeros_like(x[:5]))[0])


def test_row_does_not_follow_the_batch(op, invariant, dtype, rows, operands, assert_rows_alike):
    x, residual, weight = operands(576, dtype)
    norm = op("rms_norm", invariant)
    assert_rows_alike(lambda x, r: norm(x, weight, eps=EPS, residual=r), (x, residual), rows)


def test_negative_control(op, rows, operands, bits):
    """Plain XLA fails the comparison: it picks the order of a sum by the array's size.

    In float32; the rounding of bfloat16 results hides most of it.
    """
    x, _, weight = operands(576, jnp.float32)
    norm = op("rms_norm", "xla")
    whole = bits(norm(x, weight, eps=EPS)[0])
    assert any((bits(norm(x[:m], weight, eps=EPS)[0]) != whole[:m]).any() for m in rows)


def test_heads_do_not_follow_the_batch(op, invariant, dtype, few_rows, operands, assert_rows_alike):
    """The QK norm: one weight for every head, rows [M, heads, head size]."""
    x, _, weight = operands(8 * 128, dtype)
    norm = op("rms_norm", invariant)
    assert_rows_alike(
        lambda x: norm(x, weight[:128], eps=EPS)[0], (x.reshape(300, 8, 128),), few_rows
    )


def test_shape_of_the_batch_does_not_matter(op, invariant, dtype, operands, assert_same_bits):
    x, _, weight = operands(576, dtype)
    norm = op("rms_norm", invariant)
    flat = np.asarray(norm(x[:12], weight, eps=EPS)[0])
    for shape in ((12, 1), (1, 12), (3, 4)):
        y = norm(x[:12].reshape(*shape, 576), weight, eps=EPS)[0]
        assert_same_bits(np.asarray(y).reshape(12, 576), flat, str(shape))


def test_surroundings_do_not_matter(op, invariant, operands, assert_same_bits):
    """Inside another program, fused with what makes its input and what takes its result.

    LLVM turns a product and a sum in one fusion into one operation, so a fusion that ended
    elsewhere would change bits in float32.
    """
    x, _, weight = operands(576, jnp.float32)
    alone = np.asarray(op("rms_norm", invariant)(x, weight, eps=EPS)[0])
    norm, weight = implementation_of("rms_norm", invariant), jnp.asarray(weight)
    programs = {
        "producer": lambda x: norm(x * 2 * 0.5, weight, eps=EPS)[0],
        "consumer": lambda x: norm(x, weight, eps=EPS)[0] * 2,
        "loop": lambda x: jax.lax.map(lambda row: norm(row[None], weight, eps=EPS)[0][0], x),
        "vmap": jax.vmap(lambda row: norm(row, weight, eps=EPS)[0]),
    }
    for name, program in programs.items():
        y = np.asarray(jit(program, implementation=invariant)(x))
        assert_same_bits(y / 2 if name == "consumer" else y, alone, name)


def test_neighbours_of_nan(op, invariant, dtype, operands, assert_same_bits):
    x, residual, weight = operands(576, dtype)
    norm = op("rms_norm", invariant)
    among = np.full_like(x, np.nan)
    among[128] = x[128]
    y, s = norm(among, weight, eps=EPS, residual=residual)
    expected = norm(x, weight, eps=EPS, residual=residual)
    assert_same_bits(y[128], expected[0][128])
    assert_same_bits(s[128], expected[1][128])


def test_runs_twice_alike(op, invariant, dtype, operands, assert_same_bits):
    x, residual, weight = operands(576, dtype)
    norm = op("rms_norm", invariant)
    first, second = (norm(x, weight, eps=EPS, residual=residual) for _ in range(2))
    assert_same_bits(first[0], second[0])
    assert_same_bits(first[1], second[1])
