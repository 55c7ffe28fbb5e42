"""The Mosaic GPU attention in Pallas' simulator of a GPU: right, and one set of bits.

The bits of the real tensor core are compared on a GPU by scripts/check_gpu_attention.py; here the
copies, barriers, masks, padding and the fold of each schedule run on a CPU. Slots of the cache
that nobody has written, and padding queries, hold NaN.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention import mosaic_gpu, reference
from jdet.pallas_kernels.attention.mosaic_gpu import Schedule

simulated = functools.partial(mosaic_gpu.attention, interpret=plgpu.InterpretGPUParams())

KV_SPLIT = 64
KINDS = {
    "walked": Schedule("walked"),
    "walked by two": Schedule("walked", wgs=2),
    "spread": Schedule("spread", blocks=3),
}
SMOL, QWEN = (6, 2, 64), (4, 1, 128)  # heads, heads of keys, head size: groups of 3 and 4


@pytest.fixture(scope="module")
def case(normal):
    """case(heads, positions, cache, dtype): q, k, v, positions, NaN where nobody may look."""

    def draw(heads, positions, cache=128, dtype=jnp.bfloat16):
        h, n, d = heads
        at = np.asarray(positions, np.int32)
        q = normal(0, (*at.shape, h, d), np.float32)
        q = np.where((at < 0)[..., None, None], np.nan, q)
        unseen = np.arange(cache) > at.max(1, keepdims=True)
        k, v = (
            np.where(unseen[:, None, :, None], np.nan, normal(i, (len(at), n, cache, d), "f4"))
            for i in (1, 2)
        )
        return (*(jnp.asarray(x).astype(dtype) for x in (q, k, v)), jnp.asarray(at))

    return draw


def attend(case, schedule, kv_split=KV_SPLIT, page_table=None):
    q = case[0]
    scale = q.shape[-1] ** -0.5
    y = simulated(*case, scale=scale, kv_split=kv_split, schedule=schedule, page_table=page_table)
    assert y.shape == q.shape and y.dtype == q.dtype
    return y.block_until_ready()  # the simulator shares XLA's few threads with whatever is next


def assert_right(y, case):
    """Against the reference in float32, to the rounding of p and of the result."""
    q, k, v = (jnp.nan_to_num(x.astype(jnp.float32)) for x in case[:3])
    scale = q.shape[-1] ** -0.5
    want = reference.attention(q, k, v, case[3], scale=scale, kv_split=KV_SPLIT)
    eps = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("kind", ["walked", "spread"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decode(case, kind, dtype):
    """A first key, the last of a split, and a row that is padding."""
    inputs = case(SMOL, [[0], [63], [-1]], dtype=dtype)
    y = attend(inputs, KINDS[kind])
    assert_right(y, inputs)
    assert not np.asarray(y[2]).any()


def test_prefill_in_every_schedule(case, assert_same_bits):
    """Two tiles across the end of a split, padded; the bits of decode at two positions."""
    length = 32
    at = [[*range(40, 68), -1, -1, -1, -1]]
    inputs = case(SMOL, at)
    results = {name: attend(inputs, s) for name, s in KINDS.items()}
    assert_right(results["walked"], inputs)
    assert not np.asarray(results["walked"][0, length - 4 :]).any()
    for name, y in results.items():
        assert_same_bits(y, results["walked"], name)
    q, k, v, _ = inputs
    alone = attend((q[:, 27:28], k, v, jnp.full((1, 1), 67, jnp.int32)), KINDS["spread"])
    assert_same_bits(alone, results["walked"][:, 27:28])


def test_head_size_128_and_two_tiles_in_a_split(case, assert_same_bits):
    """kv_split 256 is two tiles of 128 keys."""
    inputs = case(QWEN, [[200], [600]], cache=768)
    walked = attend(inputs, KINDS["walked"], 256)
    assert_right(walked, inputs)
    assert_same_bits(attend(inputs, KINDS["spread"], 256), walked)


# Rows of many splits and of none, in turn: shares end within a head, between heads and rows.
MIXED = [[319], [-1], [0], [-1], [200], [64], [-1]]


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("spread", blocks=1),
        Schedule("spread", blocks=5, fetch=3, merge_rows=8, merge_columns=32),
        Schedule("spread", blocks=40, fetch=4),
    ],
    ids=lambda s: f"{s.blocks}x{s.fetch}",
)
def test_shares_of_a_spread_grid(case, assert_same_bits, schedule):
    """Blocks that fold all, some and none of what they compute; groups of 3 heads."""
    inputs = case(SMOL, MIXED, cache=320)
    walked = attend(inputs, KINDS["walked"])
    assert_right(walked, inputs)
    assert_same_bits(attend(inputs, schedule), walked)


def test_share_of_no_block(case):
    """Nothing but padding: no block has an item, and the fold reads nothing."""
    y = attend(case(SMOL, [[-1], [-1]]), Schedule("spread", blocks=2, fetch=4))
    assert not np.asarray(y).any()


def test_group_of_five_heads(case, assert_same_bits):
    """It leaves rows of the partial results that nobody writes."""
    inputs = case((5, 1, 64), [[180], [70]], cache=192)
    walked = attend(inputs, KINDS["walked"])
    assert_right(walked, inputs)
    assert_same_bits(attend(inputs, Schedule("spread", blocks=3, fetch=2)), walked)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the simulator's matmul
def test_overflow_in_one_split(case, assert_same_bits):
    """An infinity stays what the tree makes of it: no later split of a block may meet it."""
    q, k, v, at = case(SMOL, [[319]], cache=320)
    v = v.at[:, 0, 128:192].set(jnp.inf)
    inputs = q.at[..., 0].set(-1.0), k.at[:, 1, 128:192, 0].set(jnp.inf), v, at
    walked = attend(inputs, KINDS["walked"])
    assert jnp.isinf(walked[:, :, :3]).all()
    assert jnp.isfinite(walked[:, :, 3:]).all(), "scores of -inf are those of no key"
    assert_same_bits(attend(inputs, Schedule("spread", blocks=5)), walked)
    prefill = [jnp.tile(inputs[0], (1, 16, 1, 1)), *inputs[1:3], at + jnp.arange(-15, 1)]
    assert_same_bits(attend(prefill, KINDS["walked"])[:, 15:], walked)


@pytest.mark.parametrize(
    ("kind", "page_size", "shared"),
    [("walked", 16, 0), ("spread", 16, 4), ("spread", 64, 2), ("walked by two", 64, 0)],
)
def test_pages(case, paged, assert_same_bits, kind, page_size, shared):
    """Decode, or tiles of a chunk: rows of pages in any order, some of them shared."""
    decode = [[130], [-1], [200], [128]]
    chunk = [[*range(100, 130)], [*range(70, 90), *[-1] * 10]]
    q, k, v, at = case(SMOL, chunk if kind == "walked by two" else decode, cache=256)
    length = shared * page_size
    k, v = (x.at[:, :, :length].set(x[:1, :, :length]) for x in (k, v))
    walked = attend((q, k, v, at), KINDS["walked"])
    *pages, table = paged(k, v, at, page_size, shared)
    inputs = q, *map(jnp.asarray, pages), at
    assert_same_bits(attend(inputs, KINDS[kind], page_table=jnp.asarray(table)), walked)


@pytest.mark.parametrize("page_size", [32, 256])
def test_pages_smaller_and_larger_than_a_tile(case, paged, assert_same_bits, page_size):
    """A split of 256 keys is two tiles; the last key lies in the first of them, or before."""
    q, k, v, at = case(QWEN, [[300], [600]], cache=768)
    walked = attend((q, k, v, at), KINDS["walked"], 256)
    *pages, table = paged(k, v, at, page_size)
    inputs = q, *map(jnp.asarray, pages), at
    y = attend(inputs, KINDS["spread"], 256, jnp.asarray(table))
    assert_same_bits(y, walked)


@pytest.mark.parametrize("length", [1, 300])
def test_registered_schedules(length):
    """The defaults are among those that the script compares on a GPU."""
    registered = mosaic_gpu.schedules(length)
    for batch in (1, 8, 64):
        assert mosaic_gpu.default_schedule(batch, length, 32, 8) in registered


def test_refuses_what_it_cannot_compute(case):
    q, k, v, at = case(SMOL, [[3]])
    call = functools.partial(mosaic_gpu.attention, scale=1.0, kv_split=KV_SPLIT)
    with pytest.raises(NotImplementedError, match="float32"):
        call(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), at)
    with pytest.raises(NotImplementedError, match="kv_split"):
        mosaic_gpu.attention(q, k, v, at, scale=1.0, kv_split=32)
    with pytest.raises(NotImplementedError, match="sliding_window=5, soft_cap=None"):
        call(q, k, v, at, sliding_window=5)
    with pytest.raises(ValueError, match="positions"):
        call(q, k, v, at[0])
    with pytest.raises(ValueError, match="pages of 128 slots"):
        call(q, k, v, at, page_table=jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="want 2 rows"):
        call(jnp.tile(q, (2, 1, 1, 1)), k, v, jnp.tile(at, (2, 1)))
    with pytest.raises(ValueError, match="dtype"):
        call(q, k.astype(jnp.float16), v, at)
    with pytest.raises(ValueError, match="kind"):
        Schedule("sideways")
