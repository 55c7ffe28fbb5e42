"""Grouped matmuls: matmul's bits with each row's expert, whatever the groups are."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels.grouped_matmul import portable

EXPERTS, HIDDEN, INNER = 5, 576, 384
ROWS = 65
# Sizes of the groups by name: none empty, some, all but one; around the heights of tiles.
GROUPS = {
    "even": (13, 13, 13, 13, 13),
    "first": (65, 0, 0, 0, 0),
    "last": (0, 0, 0, 0, 65),
    "none": (0, 0, 0, 0, 0),
    "one each": (1, 1, 1, 1, 1),
    "32 and 33": (0, 32, 0, 33, 0),
    "31 and a tail": (31, 1, 0, 0, 2),
    "skewed": (1, 0, 50, 3, 4),
}


@pytest.fixture(scope="module")
def operands(normal):
    """operands(dtype): 65 rows of x, and every expert's weights (gate above up)."""

    @functools.cache
    def draw(dtype):
        w = normal(1, (EXPERTS, 2 * INNER, HIDDEN), np.float32) * 2 * HIDDEN**-0.5
        return normal(0, (ROWS, HIDDEN), dtype), w.astype(dtype)

    return draw


def experts_of(sizes):
    """The expert of each row, and E after the last group."""
    experts = np.repeat(np.arange(EXPERTS), sizes)
    return np.concatenate([experts, np.full(ROWS - len(experts), EXPERTS)])


@pytest.fixture(scope="module")
def by_expert(op, operands):
    """by_expert(name, implementation, dtype, **static): [E + 1, 65, N], the last of zeros."""

    @functools.cache
    def compute(name, implementation, dtype, **static):
        x, w = operands(dtype)
        one = op(name, implementation)
        y = np.stack([np.asarray(one(x, w[e], **static)) for e in range(EXPERTS)])
        return np.concatenate([y, np.zeros_like(y[:1])])

    return compute


@pytest.mark.parametrize("name", ["grouped_matmul", "grouped_gated_matmul"])
def test_right(op, implementation, dtype, name, operands):
    x, w = operands(dtype)
    sizes = np.array(GROUPS["31 and a tail"], np.int32)
    y = np.asarray(op(name, implementation)(x, w, sizes))
    assert y.dtype == dtype
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    want = np.zeros((ROWS, 2 * INNER))
    for row, expert in enumerate(experts_of(sizes)):
        if expert < EXPERTS:
            want[row] = x64[row] @ w64[expert].T
    if name == "grouped_gated_matmul":
        gate, up = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * up
    # Values of about 2, and of about 4: one float32 sum of K terms, a few roundings.
    tolerance = 1e-5 * (1 + abs(want)) if dtype == jnp.float32 else 0.02 * (1 + abs(want))
    assert (abs(y.astype(np.float64) - want) <= tolerance).all()
    assert (y[34:] == 0).all()


@pytest.mark.parametrize(
    ("name", "one", "static"),
    [
        ("grouped_matmul", "matmul", {}),
        ("grouped_matmul", "matmul", {"leaves": 8, "out_dtype": jnp.dtype(jnp.float32)}),
        ("grouped_gated_matmul", "gated_matmul", {}),
    ],
    ids=["matmul", "in leaves", "gated"],
)
def test_a_row_has_the_bits_of_its_product_alone(
    op, invariant, dtype, name, one, static, operands, by_expert, assert_same_bits
):
    x, w = operands(dtype)
    every = by_expert(one, invariant, dtype, **static)
    for label, sizes in GROUPS.items():
        y = op(name, invariant)(x, w, np.array(sizes, np.int32), **static)
        assert_same_bits(y, every[experts_of(sizes), np.arange(ROWS)], label)


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_row_does_not_follow_the_batch(
    op, invariant, dtype, rows, operands, by_expert, assert_same_bits
):
    x, w = operands(dtype)
    every = by_expert("matmul", invariant, dtype)
    for expert in (0, 3):
        sizes = np.zeros(EXPERTS, np.int32)
        sizes[expert], sizes[4] = rows - rows // 3, rows // 3
        y = op("grouped_matmul", invariant)(x[:rows], w, sizes)
        assert_same_bits(y, every[experts_of(sizes)[:rows], np.arange(rows)], f"R={rows}")


@pytest.mark.parametrize("tile", [4, 64])
def test_height_of_a_tile_is_schedule(dtype, tile, operands, by_expert, assert_same_bits):
    """Also what a backend other than CPU runs, 64 rows a tile."""
    x, w = operands(dtype)
    every = by_expert("matmul", "portable", dtype)
    run = jit(functools.partial(portable.grouped_tiles, tile=tile, leaves=1, out_dtype=dtype))
    for label in ("skewed", "32 and 33"):
        y = run(x, w, np.array(GROUPS[label], np.int32))
        assert_same_bits(y, every[experts_of(GROUPS[label]), np.arange(ROWS)], label)


def test_height_follows_the_average_group():
    heights = [
        portable.cpu_tile(rows, 128, 2048, jnp.bfloat16) for rows in (1, 512, 1024, 2048, 65536)
    ]
    assert heights == [4, 4, 8, 16, 64]
    assert portable.cpu_tile(1, 128, 48, jnp.bfloat16) == 16, "a K that AMX leaves a rest of"


@pytest.mark.parametrize("name", ["grouped_matmul", "grouped_gated_matmul"])
def test_nan_keeps_to_its_row(op, invariant, dtype, name, operands, assert_same_bits):
    """In neighbours of its group and of others, in rows of no group, and in unused experts."""
    x, w = operands(dtype)
    grouped, sizes = op(name, invariant), np.array((7, 0, 20, 1, 0), np.int32)
    clean = np.asarray(grouped(x, w, sizes))
    poisoned, unused = x.copy(), w.copy()
    ruined = np.array([0, 6, 8, 26, *range(28, ROWS)])
    poisoned[ruined], unused[[1, 4]] = np.nan, np.nan
    y = np.asarray(grouped(poisoned, unused, sizes))
    keep = np.setdiff1d(np.arange(28), ruined)
    assert_same_bits(y[keep], clean[keep])
    assert np.isnan(y[ruined[:4]].astype(np.float32)).all()
    assert (y[28:] == 0).all()


def test_negative_control(op, operands, bits):
    """Plain XLA fails: a row alone is summed in another order than in a group of 65."""
    x, w = operands(jnp.float32)
    grouped = op("grouped_matmul", "xla")
    whole = bits(grouped(x, w, np.array(GROUPS["first"], np.int32)))
    sizes = ((m, np.array((m, 0, 0, 0, 0), np.int32)) for m in (1, 2, 33))
    assert any((bits(grouped(x[:m], w, groups)) != whole[:m]).any() for m, groups in sizes)
