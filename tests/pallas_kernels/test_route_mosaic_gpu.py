"""The Mosaic GPU routing in Pallas' simulator of a GPU: bits against `portable` on the same CPU.

There products and quotients are XLA's and sums the tree of `trees`; the instructions and shuffles
of a real card are compared by scripts/check_gpu_route.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import default_schedule as grouped_default
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import plan
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu_schedules import plan_size, tile_height
from jdet.pallas_kernels.route import mosaic_gpu, portable
from jdet.pallas_kernels.route.mosaic_gpu import SCHEDULES, Schedule, has_kernel

pytestmark = pytest.mark.usefixtures("unoptimized")

POOL, EXPERTS = 33, 128
TOGETHER, APART = SCHEDULES
wanted_of = jax.jit(portable.route, static_argnames=("k", "normalise"))
planned = jax.jit(plan, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def tokens(normal):
    """33 tokens: ties of all kinds, infinities, most that vanish, NaN, some that are not routed."""
    x = normal(0, (POOL, EXPERTS), np.float32) * 3
    x[1] = 0
    x[2] = np.repeat(x[2, :16], 8)
    x[4] = np.round(x[4])
    x[5, 5:] -= 200
    x[6, ::2] = -np.inf
    x[8:13] = np.arange(EXPERTS) * 0.1  # the same experts
    routed = np.ones(POOL, bool)
    routed[[3, 7, 14, 15, 31]] = False
    x[~routed] = np.nan
    return x, routed


def simulated(x, routed, s: Schedule, k=8, normalise=True):
    """The `Routing`, in numpy arrays."""
    given = jnp.asarray(x), jnp.asarray(routed)
    simulator = plgpu.InterpretGPUParams()
    run = mosaic_gpu.route
    r = run(*given, k=k, normalise=normalise, schedule=s, interpret=simulator)
    return jax.tree.map(np.asarray, r)


def check(r, x, routed, assert_same_bits, k=8, normalise=True) -> None:
    """Every field, and of the plan what is used."""
    wanted = wanted_of(x, routed, k=k, normalise=normalise)
    for name in ("experts", "weights", "tokens", "places", "sizes"):
        assert_same_bits(getattr(r, name), getattr(wanted, name), name)
    rows, experts = len(x) * k, x.shape[1]
    tiles = np.asarray(planned(wanted.sizes, rows, tile_height(rows, experts)))
    assert r.tiles is not None and r.tiles.shape == tiles.shape
    used = 1 + tiles[0, 1]
    np.testing.assert_array_equal(r.tiles[:used], tiles[:used])


# A row for all warps; windows of 4 and 8 that overlap; loops with rests; several blocks.
@pytest.mark.parametrize(
    ("m", "s"),
    [(m, TOGETHER) for m in (1, 3, 5, 8, 13, 17)] + [(m, APART) for m in (2, 4, 7, 8, 9, 33)],
)
def test_bits_are_portables(tokens, assert_same_bits, m, s):
    x, routed = (a[(np.arange(m) + 5 * (m % 5)) % POOL] for a in tokens)
    check(simulated(x, routed, s), x, routed, assert_same_bits)


@pytest.mark.parametrize(
    ("k", "experts", "normalise"), [(1, 128, True), (32, 128, True), (4, 256, False)]
)
def test_other_shapes(normal, assert_same_bits, k, experts, normalise):
    x, routed = normal(1, (5, experts), np.float32), np.arange(5) != 2
    r = simulated(x, routed, TOGETHER, k, normalise)
    check(r, x, routed, assert_same_bits, k, normalise)


@pytest.mark.parametrize("s", SCHEDULES, ids=str)
def test_all_tokens_choose_the_same(assert_same_bits, s):
    """Groups of several tiles, and experts with none."""
    x, routed = np.tile(np.arange(EXPERTS, dtype=np.float32), (20, 1)), np.ones(20, bool)
    r = simulated(x, routed, s)
    check(r, x, routed, assert_same_bits)
    assert (r.sizes[-8:] == 20).all() and r.sizes[:-8].sum() == 0


@pytest.mark.parametrize("s", SCHEDULES, ids=str)
def test_nothing_is_routed(assert_same_bits, s):
    x, routed = np.full((9, EXPERTS), np.nan, np.float32), np.zeros(9, bool)
    check(simulated(x, routed, s), x, routed, assert_same_bits)


def test_nan_keeps_to_its_token(tokens, assert_same_bits):
    x, _ = (a[16:25].copy() for a in tokens)
    routed = np.ones(9, bool)
    clean = simulated(x, routed, TOGETHER)
    x[[0, 4], [0, 77]], x[6, 9] = np.nan, np.inf
    r = simulated(x, routed, TOGETHER)
    ruined = [0, 4, 6]
    assert np.isnan(r.weights[ruined]).all() and (r.experts[ruined] == np.arange(8)).all()
    keep = np.setdiff1d(np.arange(9), ruined)
    for name in ("experts", "weights"):
        assert_same_bits(getattr(r, name)[keep], getattr(clean, name)[keep], name)


def test_what_has_no_kernel_is_left_to_xla(normal, assert_same_bits):
    shapes = ((257, 128, 8), (1, 64, 8), (1, 192, 8), (4, 1024, 8), (1, 128, 6), (0, 128, 8))
    assert not any(has_kernel(*shape) for shape in shapes)
    assert has_kernel(256, 128, 8) and has_kernel(64, 512, 32) and has_kernel(1, 128, 1)
    x, routed = normal(2, (3, 64), np.float32), np.ones(3, bool)
    r = mosaic_gpu.route(jnp.asarray(x), jnp.asarray(routed), k=8, normalise=True)
    assert r.tiles is None
    wanted = wanted_of(x, routed, k=8, normalise=True)
    assert_same_bits(r.weights, wanted.weights)


def test_plan_is_that_of_the_grouped_matmuls() -> None:
    """Of the height that they choose, which its length tells, or there is no difference."""
    for m in (*range(1, 65), 128, 256):
        for experts in (128, 256):
            rows, height = m * 8, tile_height(m * 8, experts)
            for n, gated in ((1536, True), (2048, False), (768, False)):
                assert grouped_default(rows, experts, n, gated=gated).height == height
    for rows in range(1, 300):
        lengths = [plan_size(rows, 128, height) for height in (8, 16, 32, 64, 128)]
        for i, length in enumerate(lengths):
            if length in lengths[:i]:
                assert rows < 8 << i
