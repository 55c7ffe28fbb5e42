"""The grouped Mosaic GPU matmuls in Pallas' simulator of a GPU: which rows meet which weights.

The bits of the real tensor core are compared on a GPU by scripts/check_gpu_grouped.py; here the
plan, the copies, tails and masks are run on a CPU. In the simulator a row has, rounded to
bfloat16, the bits that the simulated `matmul` gives it by the same tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.gated_matmul import mosaic_gpu as gated
from jdet.pallas_kernels.grouped_gated_matmul.mosaic_gpu import grouped_gated_matmul
from jdet.pallas_kernels.grouped_matmul import mosaic_gpu
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import GroupedSchedule, default_schedule, plan
from jdet.pallas_kernels.matmul import mosaic_gpu as dense
from jdet.pallas_kernels.matmul.mosaic_gpu import Schedule

pytestmark = pytest.mark.usefixtures("unoptimized")

simulator = plgpu.InterpretGPUParams()
planned = jax.jit(plan, static_argnums=(1, 2))

EXPERTS, ROWS, N, K = 4, 29, 40, 72  # tails of 8 in K and in N
TILE = Schedule("normal", 64, 32, stages=3)
TALL = Schedule("normal", 128, 32, stages=2, wgs=2)
GROUPS = {
    "a tail, one empty": (9, 0, 11, 4),
    "all to one": (0, 29, 0, 0),
}
groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)


def call(x, w, sizes, op=mosaic_gpu.grouped_matmul, **options):
    """Of numpy arrays, as everywhere here: each operation on one of jax's compiles a program."""
    x, w, sizes = (jnp.asarray(a) for a in (x, w, np.array(sizes, np.int32)))
    return np.asarray(op(x, w, sizes, **options))


simulated = functools.partial(call, interpret=simulator)


def one(f, x, w, **options):
    """[E, M, N]: x through f, simulated, with each expert's weights."""
    results = [f(jnp.asarray(x), jnp.asarray(e), interpret=simulator, **options) for e in w]
    return np.stack([np.asarray(y) for y in results])


@pytest.fixture(scope="module")
def operands(normal):
    """x and every expert's weights, bfloat16."""
    return normal(0, (ROWS, K), jnp.bfloat16), normal(1, (EXPERTS, N, K), jnp.bfloat16)


def pick(every, sizes):
    """The row of each of ROWS from [E, ROWS, N], zeros after the last group."""
    experts = np.repeat(np.arange(EXPERTS), sizes)
    y = np.zeros_like(every[0])
    y[: len(experts)] = every[experts, np.arange(len(experts))]
    return y


@pytest.fixture(scope="module")
def products(operands):
    """[E, ROWS, N]: the simulated matmul with each expert."""
    return one(dense.matmul, *operands, schedule=TILE)


@groups
def test_row_has_the_bits_of_its_product_alone(operands, products, assert_same_bits, sizes):
    """Tiles of 8 rows: groups of one tile, of more, and begun at any row."""
    x, w = operands
    y = simulated(x, w, sizes, schedule=GroupedSchedule(TILE, 8))
    assert_same_bits(y, pick(products, sizes))


def test_height_and_consumers_are_schedule(operands, products, assert_same_bits):
    """Also of no group at all: every row is zeros."""
    x, w = operands
    for sizes in (GROUPS["a tail, one empty"], (0, 0, 0, 0)):
        y = simulated(x, w, sizes, schedule=GroupedSchedule(TALL, 128))
        assert_same_bits(y, pick(products, sizes))


def test_tiles_that_routing_made(operands, products, assert_same_bits):
    """They are taken, and those of another height are not."""
    x, w = operands
    sizes, others, schedule = (9, 0, 11, 4), (0, 29, 0, 0), GroupedSchedule(TILE, 8)
    for height, found in ((8, others), (16, sizes)):
        tiles = planned(np.array(others, np.int32), ROWS, height)
        y = simulated(x, w, sizes, schedule=schedule, tiles=tiles)
        assert_same_bits(y, pick(products, found))


@pytest.mark.parametrize("height", [8, 16])
def test_leaves_and_float32_results(operands, height):
    """The simulator's own dots follow a row's place in float32, so these are compared by value."""
    x, w = operands
    x, w, sizes = x[:, :64], w[..., :64], (12, 0, 3, 14)
    options = {"leaves": 2, "out_dtype": jnp.float32}
    y = simulated(x, w, sizes, schedule=GroupedSchedule(TILE, height), **options)
    every = np.einsum("rk,enk->ern", x.astype(np.float64), w.astype(np.float64))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, pick(every, sizes), atol=1e-4)


def test_gated(operands, assert_same_bits):
    x, w = operands
    tile, sizes = Schedule("normal", 64, 64, stages=3, gated=True), GROUPS["a tail, one empty"]
    schedule = GroupedSchedule(tile, 16)
    y = simulated(x, w, sizes, grouped_gated_matmul, schedule=schedule)
    assert_same_bits(y, pick(one(gated.gated_matmul, x, w, schedule=tile), sizes))


@pytest.mark.parametrize(("rows", "height"), [(5, 8), (5, 16), (9, 8)])
def test_rows_named_by_tokens(operands, assert_same_bits, rows, height):
    """Those of x that no group names hold NaN, and two rows of no group are of one token."""
    x, w = operands
    tile, sizes = Schedule("normal", 64, 64, stages=3, gated=True), (3, 0, 1, 2)
    tokens = np.array([0, 1, 4, 1, 0, 4, 3, 3], np.int32)
    x = x[:rows].copy()
    x[[2, 3, *range(5, rows)]] = np.nan
    options = {"schedule": GroupedSchedule(tile, height)}
    y = simulated(x, w, sizes, grouped_gated_matmul, tokens=jnp.asarray(tokens), **options)
    want = simulated(x[tokens], w, sizes, grouped_gated_matmul, **options)
    assert_same_bits(y, want)
    assert not np.isnan(y.astype(np.float32)).any() and (y[6:] == 0).all()


def test_nan_keeps_to_its_row(operands, products, assert_same_bits):
    """In the same tile, in rows of no group, in experts nobody was routed to."""
    x, w = (a.copy() for a in operands)
    sizes, ruined = GROUPS["a tail, one empty"], np.array([0, 8, 12, *range(24, ROWS)])
    x[ruined] = w[1] = np.nan
    y = simulated(x, w, sizes, schedule=GroupedSchedule(TILE, 8))
    want = pick(products, sizes)
    want[ruined[:3]] = np.nan
    assert np.isnan(y[ruined[:3]].astype(np.float32)).all()
    keep = np.setdiff1d(np.arange(ROWS), ruined[:3])
    assert_same_bits(y[keep], want[keep])


@pytest.mark.parametrize("height", [8, 64])
@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_plan_covers_each_row_once(rows, height):
    rng = np.random.default_rng(rows)
    cases = [rng.multinomial(n, np.ones(5) / 5) for n in (0, rows // 2, rows)]
    for sizes in (*cases, np.array([0, 0, rows, 0, 0])):
        tiles = planned(sizes.astype(np.int32), rows, height)
        (real, every, _), *tiles = np.asarray(tiles).tolist()
        assert real <= every <= len(tiles)
        owner = np.full(rows, -1)
        for at, (first, count, expert) in enumerate(tiles[:every]):
            assert 0 < count <= height and (owner[first : first + count] == -1).all()
            assert (expert < 5) == (at < real)
            owner[first : first + count] = expert
        want = np.concatenate([np.repeat(np.arange(5), sizes), np.full(rows - sizes.sum(), 5)])
        np.testing.assert_array_equal(owner, want)


@pytest.mark.parametrize("gated", [False, True])
def test_default_is_registered_and_has_room(gated):
    for rows in (1, 8, 64, 512, 2048, 8192, 65536):
        for experts, n in ((8, 768), (128, 1536), (128, 2048), (128, 3072)):
            for leaves in (1,) if gated else (1, 8):
                for out_size in (2, 4):
                    s = default_schedule(rows, experts, n, leaves, out_size, gated)
                    assert s in mosaic_gpu.schedules(leaves, out_size, gated)
                    assert s.tile.gated == gated


@pytest.mark.parametrize("out_size", [2, 4])
@pytest.mark.parametrize("with_gate", [False, True])
def test_copies_of_any_number_of_rows_are_aligned(with_gate, out_size):
    """Of the rows of a tile of results, every copy starts at 128 bytes: an H100 stops otherwise."""
    for s in mosaic_gpu.schedules(out_size=out_size, gated=with_gate):
        if s.short:  # which leaves from registers
            continue
        row = s.tile.stage_tile(out_size)[1] * out_size
        for count in range(1, s.height + 1):
            firsts = [count & -(2 * bit) for bit in (1, 2, 4, 8, 16, 32, 64) if count & bit]
            assert [first * row % 128 for first in firsts] == [0] * len(firsts), str(s)


def test_nothing_to_do():
    x, w = np.zeros((0, 64), jnp.bfloat16), np.ones((2, 8, 64), jnp.bfloat16)
    assert call(x, w, (0, 0)).shape == (0, 8)


@pytest.mark.parametrize(
    ("tile", "height", "message"),
    [
        (Schedule("swapped", 16, 64, stages=3), 16, "normal and stand alone"),
        (Schedule("normal", 64, 64, stages=2, cn=2), 16, "normal and stand alone"),
        (TILE, 4, "powers of two from 8 to 64"),
        (TILE, 24, "powers of two"),
        (TILE, 128, "powers of two"),
    ],
)
def test_impossible_schedules_are_refused(tile, height, message):
    with pytest.raises(ValueError, match=message):
        GroupedSchedule(tile, height)


@pytest.mark.parametrize(
    ("x", "w", "sizes", "options", "error", "message"),
    [
        ((2, 64), (3, 8, 72), 3, {}, ValueError, "share K"),
        ((2, 64), (8, 64), 8, {}, ValueError, r"\[E, N, K\]"),
        ((2, 64), (3, 8, 64), 2, {}, ValueError, r"sizes \[E\]"),
        ((2, 60), (3, 8, 60), 3, {}, NotImplementedError, "multiples of 8"),
        ((2, 64), (3, 8, 64), 3, {"out_dtype": jnp.int8}, NotImplementedError, "cannot write"),
    ],
)
def test_what_it_cannot_do_is_said(x, w, sizes, options, error, message):
    x, w = np.ones(x, jnp.bfloat16), np.ones(w, jnp.bfloat16)
    with pytest.raises(error, match=message):
        call(x, w, [0] * sizes, **options)
    plain = GroupedSchedule(TILE, 8)
    with pytest.raises(ValueError, match="no gated schedule"):
        x, w = np.ones((2, 64), jnp.bfloat16), np.ones((3, 8, 64), jnp.bfloat16)
        call(x, w, [0] * 3, grouped_gated_matmul, schedule=plain)
