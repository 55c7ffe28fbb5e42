"""Matmul: right against float64, and the same bits in any batch, by any schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdet.compiler import jit
from jdet.pallas_kernels.matmul import portable

# K and N of SmolLM2's projections.
SHAPES = {"qkv": (576, 960), "gate_up": (576, 3072), "down": (1536, 576)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def operands(normal):
    """operands(shape, dtype): 300 rows of x, weights and a bias."""

    def draw(shape, dtype):
        k, n = shape
        return normal(0, (300, k), dtype), normal(1, (n, k), dtype), normal(2, (n,), dtype)

    return draw


def assert_right(y, x, w, bias=None):
    """Against float64: error of one float32 sum of K terms, and of one rounding.

    Added one by one, as some CPUs do, the worst of 10^4 sums is 1.2 sqrt(K) ulp of its typical
    size away.
    """
    x64, w64 = (np.asarray(a).astype(np.float64) for a in (x, w))
    want = x64 @ w64.T + (0 if bias is None else np.asarray(bias).astype(np.float64))
    typical = np.sqrt(x64**2 @ (w64**2).T) + 1
    tolerance = 2 * np.sqrt(x.shape[1]) * np.finfo(np.float32).eps * typical
    tolerance += float(jnp.finfo(y.dtype).eps) * abs(want)
    error = abs(np.asarray(y).astype(np.float64) - want)
    assert (error <= tolerance).all(), (error / tolerance).max()


@shapes
def test_right(op, implementation, shape, dtype, operands):
    x, w, bias = operands(shape, dtype)
    y = op("matmul", implementation)(x[:9], w, bias=bias)
    assert y.dtype == dtype
    assert_right(y, x[:9], w, bias)


@pytest.mark.parametrize("leaves", [2, 8])
def test_right_in_leaves(op, implementation, dtype, leaves, operands):
    x, w, _ = operands(SHAPES["down"], dtype)
    y = op("matmul", implementation)(x[:5], w, leaves=leaves, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert_right(y, x[:5], w)


@shapes
def test_row_does_not_follow_the_batch(
    op, invariant, shape, dtype, rows, operands, assert_rows_alike
):
    x, w, bias = operands(shape, dtype)
    matmul = op("matmul", invariant)
    assert_rows_alike(lambda x: matmul(x, w, bias=bias), (x,), rows)


def test_float32_result_of_bfloat16_does_not_follow_the_batch(
    op, invariant, few_rows, operands, assert_rows_alike
):
    x, w, _ = operands(SHAPES["qkv"], jnp.bfloat16)
    matmul = op("matmul", invariant)
    assert_rows_alike(lambda x: matmul(x, w, out_dtype=jnp.float32), (x,), few_rows)


@pytest.mark.parametrize("leaves", [2, 8])
def test_row_in_leaves_does_not_follow_the_batch(
    op, invariant, dtype, leaves, few_rows, operands, assert_rows_alike
):
    x, w, bias = operands(SHAPES["down"], dtype)
    matmul = op("matmul", invariant)
    assert_rows_alike(lambda x: matmul(x, w, bias=bias, leaves=leaves), (x,), few_rows)


def test_leaves_are_added_in_a_balanced_tree(op, invariant, operands, assert_same_bits):
    """Eight leaves are the four-leaf sums of neighbours: what a tensor-parallel half owns."""
    x, w, _ = operands(SHAPES["down"], jnp.float32)
    x, half = x[:5], SHAPES["down"][0] // 2
    matmul = op("matmul", invariant)
    low, high = (matmul(x[:, s], w[:, s], leaves=4) for s in (slice(half), slice(half, None)))
    whole = matmul(x, w, leaves=8)
    assert_same_bits(whole, np.asarray(low) + np.asarray(high))
    assert (np.asarray(whole) != np.asarray(matmul(x, w, leaves=1))).any(), "leaves do nothing"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="`whole` is a schedule for CPUs")
@pytest.mark.parametrize("shape", [SHAPES["qkv"], SHAPES["down"]], ids=["qkv", "down"])
def test_schedules_agree(shape, dtype, operands, assert_same_bits):
    x, w, _ = operands(shape, dtype)
    whole, tiled = jit(portable.dot_whole), jit(portable.dot_tiled, static_argnames="tile")
    for m in (1, 9, 300):
        for tile in (8, 16, 64):
            message = f"M={m}, tile={tile}"
            assert_same_bits(tiled(x[:m], w, tile=tile), whole(x[:m], w), message)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="`whole` is a schedule for CPUs")
@pytest.mark.parametrize("k", [16, 48, 576])
def test_last_rows_behind_a_block(dtype, k, operands, assert_same_bits):
    """With AMX the one or two bfloat16 rows behind a block of 64 had bits of their own, and the
    first where K leaves a rest of 32."""
    x, w, _ = operands(SHAPES["qkv"], dtype)
    x, w = x[:130, :k], w[:256, :k]
    whole, tiled = jit(portable.dot_whole), jit(portable.dot_tiled)(x, w)
    for m in (1, 4, 5, 6, 7, 8, 63, 64, 65, 66, 67, 129, 130):
        assert_same_bits(whole(x[:m], w), np.asarray(tiled)[:m], f"M={m}")


def test_negative_control(op, dtype, rows, operands, bits):
    """Plain XLA fails the comparison: on CPU a single row is summed in another order.

    Which numbers of rows agree on which CPU: scripts/bench/results/cpu-dot-classes.json. In
    bfloat16 results the rounding can hide it.
    """
    x, w, _ = operands(SHAPES["qkv"], dtype)
    matmul = op("matmul", "xla")
    whole = bits(matmul(x, w, out_dtype=jnp.float32))
    batches = (bits(matmul(x[:m], w, out_dtype=jnp.float32)) for m in rows)
    assert any((y != whole[: len(y)]).any() for y in batches)


def test_neighbours_of_nan_and_infinity(op, invariant, dtype, operands, assert_same_bits):
    x, w, _ = operands(SHAPES["qkv"], dtype)
    matmul = op("matmul", invariant)
    for m, row in ((2, 0), (9, 4), (300, 299)):
        for poison in (np.nan, np.inf):
            around = np.full_like(x[:m], poison)
            around[row] = x[row]
            y = matmul(around, w)
            assert_same_bits(y[row], matmul(x[:m], w)[row])
            assert not np.isfinite(np.asarray(y, np.float32)[row - 1]).any()


def test_runs_twice_alike(op, invariant, dtype, operands, assert_same_bits):
    x, w, bias = operands(SHAPES["qkv"], dtype)
    matmul = op("matmul", invariant)
    assert_same_bits(matmul(x, w, bias=bias), matmul(x, w, bias=bias))


@settings(max_examples=40)
@given(
    m=st.integers(1, 300),
    place=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 30),
)
def test_any_batch_any_row_any_content(
    op, invariant, operands, assert_same_bits, m, place, seed, exponent
):
    x, w, _ = operands(SHAPES["qkv"], jnp.float32)
    rng = np.random.default_rng(seed)
    row = int(place * m)
    batch = rng.standard_normal((m, x.shape[1]), np.float32) * np.float32(2.0**exponent)
    matmul = op("matmul", invariant)
    among = matmul(batch, w)
    assert among.shape == (m, w.shape[0])
    assert_same_bits(among[row], matmul(batch[row : row + 1], w)[0])
