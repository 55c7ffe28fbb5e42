"""The Mosaic GPU attention in Pallas' simulator of a GPU: right, and one set of bits.

The bits of the real tensor core are compared on a GPU by scripts/check_gpu_attention.py; here the
copies, barriers, masks, padding and the fold of each schedule run on a CPU. Slots of the cache
that no query of their row sees, and padding queries, hold NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention import mosaic_gpu, reference
from jdet.pallas_kernels.attention.mosaic_gpu import Schedule

pytestmark = pytest.mark.usefixtures("unoptimized")

simulated = functools.partial(mosaic_gpu.attention, interpret=plgpu.InterpretGPUParams())
expected = jax.jit(
    reference.attention, static_argnames=("scale", "kv_split", "sliding_window", "soft_cap")
)

KV_SPLIT = 64
KINDS = {
    "walked": Schedule("walked"),
    "walked by two": Schedule("walked", wgs=2),
    "spread": Schedule("spread", blocks=3),
}
# Heads, heads of keys, head size: groups of 3, 4 and 2.
SMOL, QWEN, GEMMA = (6, 2, 64), (4, 1, 128), (2, 1, 256)


@pytest.fixture(scope="module")
def case(normal):
    """case(heads, positions, cache, dtype, window): q, k, v, positions, NaN where nobody looks.

    Numpy arrays here and from `attend`: each operation on one of jax's compiles a program.
    """

    def draw(heads, positions, cache=128, dtype=jnp.bfloat16, window=None):
        h, n, d = heads
        at = np.asarray(positions, np.int32)
        q = normal(0, (*at.shape, h, d), np.float32)
        q = np.where((at < 0)[..., None, None], np.nan, q)
        key, window = np.arange(cache), window or cache
        unseen = ~((key <= at[:, :, None]) & (key > at[:, :, None] - window)).any(1)
        k, v = (
            np.where(unseen[:, None, :, None], np.nan, normal(i, (len(at), n, cache, d), "f4"))
            for i in (1, 2)
        )
        return *(x.astype(dtype) for x in (q, k, v)), at

    return draw


def attend(case, schedule, kv_split=KV_SPLIT, page_table=None, **options):
    q, *_ = case = [jnp.asarray(x) for x in case]
    options = {"scale": q.shape[-1] ** -0.5, "kv_split": kv_split, **options}
    if page_table is not None:
        options["page_table"] = jnp.asarray(page_table)
    y = simulated(*case, schedule=schedule, **options)
    assert y.shape == q.shape and y.dtype == q.dtype
    # Which waits: the simulator shares XLA's few threads with whatever is next.
    return np.asarray(y)


def assert_right(y, case, **options):
    """Against the reference in float32, to the rounding of p and of the result."""
    q, k, v = (np.nan_to_num(x.astype(np.float32)) for x in case[:3])
    scale = q.shape[-1] ** -0.5
    want = expected(q, k, v, case[3], scale=scale, kv_split=KV_SPLIT, **options)
    eps = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(y.astype(np.float32), want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("kind", ["walked", "spread"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decode(case, kind, dtype):
    """A first key, the last of a split, and a row that is padding."""
    inputs = case(SMOL, [[0], [63], [-1]], dtype=dtype)
    y = attend(inputs, KINDS[kind])
    assert_right(y, inputs)
    assert not y[2].any()


def test_prefill_in_every_schedule(case, assert_same_bits):
    """Two tiles across the end of a split, padded; the bits of decode at two positions."""
    length = 32
    at = [[*range(40, 68), -1, -1, -1, -1]]
    inputs = case(SMOL, at)
    results = {name: attend(inputs, s) for name, s in KINDS.items()}
    assert_right(results["walked"], inputs)
    assert not results["walked"][0, length - 4 :].any()
    for name, y in results.items():
        assert_same_bits(y, results["walked"], name)
    q, k, v, _ = inputs
    alone = attend((q[:, 27:28], k, v, np.full((1, 1), 67, np.int32)), KINDS["spread"])
    assert_same_bits(alone, results["walked"][:, 27:28])


def test_head_size_128_and_two_tiles_in_a_split(case, assert_same_bits):
    """kv_split 256 is two tiles of 128 keys."""
    inputs = case(QWEN, [[200], [600]], cache=768)
    walked = attend(inputs, KINDS["walked"], 256)
    assert_right(walked, inputs)
    assert_same_bits(attend(inputs, KINDS["spread"], 256), walked)


# Rows of many splits and of none, in turn: shares end within a head, between heads and rows.
MIXED = [[319], [-1], [0], [-1], [200], [64], [-1]]


@pytest.fixture(scope="module")
def mixed(case):
    """MIXED's inputs, and what the walked schedule makes of them."""
    inputs = case(SMOL, MIXED, cache=320)
    walked = attend(inputs, KINDS["walked"])
    assert_right(walked, inputs)
    return inputs, walked


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("spread", blocks=1),
        Schedule("spread", blocks=5, fetch=3, merge_columns=32),
        Schedule("spread", blocks=40, fetch=4),
    ],
    ids=lambda s: f"{s.blocks}x{s.fetch}",
)
def test_shares_of_a_spread_grid(mixed, assert_same_bits, schedule):
    """Blocks that fold all, some and none of what they compute; groups of 3 heads."""
    inputs, walked = mixed
    assert_same_bits(attend(inputs, schedule), walked)


def test_more_tiles_than_a_block_counts(mixed, assert_same_bits, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "COUNTED", len(MIXED) - 1)
    inputs, walked = mixed
    assert_same_bits(attend(inputs, Schedule("spread", blocks=4)), walked)


def test_share_of_no_block(case):
    """Nothing but padding: no block has an item, and the fold reads nothing."""
    y = attend(case(SMOL, [[-1], [-1]]), Schedule("spread", blocks=2, fetch=4))
    assert not y.any()


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
    q[..., 0] = -1.0
    k[:, 1, 128:192, 0] = v[:, 0, 128:192] = np.inf
    inputs = q, k, v, at
    walked = attend(inputs, KINDS["walked"])
    assert np.isinf(walked[:, :, :3]).all()
    assert np.isfinite(walked[:, :, 3:]).all(), "scores of -inf are those of no key"
    assert_same_bits(attend(inputs, Schedule("spread", blocks=5)), walked)
    rising = at + np.arange(-15, 1, dtype=np.int32)
    prefill = np.tile(q, (1, 16, 1, 1)), k, v, rising
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
    for x in (k, v):
        x[:, :, :length] = x[:1, :, :length]
    walked = attend((q, k, v, at), KINDS["walked"])
    *pages, table = paged(k, v, at, page_size, shared)
    assert_same_bits(attend((q, *pages, at), KINDS[kind], page_table=table), walked)


@pytest.mark.parametrize("page_size", [32, 256])
def test_pages_smaller_and_larger_than_a_tile(case, paged, assert_same_bits, page_size):
    """A split of 256 keys is two tiles; the last key lies in the first of them, or before."""
    q, k, v, at = case(QWEN, [[300], [600]], cache=768)
    walked = attend((q, k, v, at), KINDS["walked"], 256)
    *pages, table = paged(k, v, at, page_size)
    assert_same_bits(attend((q, *pages, at), KINDS["spread"], 256, table), walked)


def test_decode_with_a_window(case, paged, assert_same_bits):
    """Rows that skip three splits, one and none; pages and entries before the windows are lost."""
    at, options = [[300], [-1], [63], [140]], {"sliding_window": 70}
    q, k, v, at = inputs = case(SMOL, at, cache=320, window=70)
    walked = attend(inputs, KINDS["walked"], **options)
    assert_right(walked, inputs, **options)
    *pages, table = paged(k, v, at, 16)
    for row, last in enumerate((300, -1, 63, 140)):
        table[row, : max(0, last - 69) // 16] = (10**6, -7)[row % 2]
    y = attend((q, *pages, at), KINDS["spread"], page_table=table, **options)
    assert_same_bits(y, walked)


def test_prefill_with_a_window_and_a_cap(case, assert_same_bits):
    """Two tiles that begin in different splits, padded; decode at two positions."""
    options = {"sliding_window": 22, "soft_cap": 3.0}
    inputs = case(SMOL, [[*range(140, 168), -1, -1, -1, -1]], cache=192, window=22)
    both = attend(inputs, KINDS["walked by two"], **options)
    assert_right(both, inputs, **options)
    assert_same_bits(attend(inputs, KINDS["spread"], **options), both)
    q, k, v, _ = inputs
    q, k, v = (np.concatenate(x) for x in ((q[:, 3:4], q[:, 27:28]), (k, k), (v, v)))
    steps = attend((q, k, v, np.array([[143], [167]], np.int32)), KINDS["spread"], **options)
    assert_same_bits(steps[:, 0], both[0, [3, 27]])


def test_head_size_256(case, assert_same_bits):
    """Two consumers with half of the columns each; a window in the prefill's third split."""
    inputs = case(GEMMA, [[180]], cache=192)
    walked = attend(inputs, KINDS["walked"])
    assert_right(walked, inputs)
    assert_same_bits(attend(inputs, KINDS["spread"]), walked)
    options = {"sliding_window": 40}
    inputs = case(GEMMA, [[*range(180, 191)]], cache=192, window=40)
    assert_right(attend(inputs, KINDS["walked"], **options), inputs, **options)


@pytest.mark.parametrize(("length", "dim"), [(1, 128), (300, 128), (1, 256), (300, 256)])
def test_registered_schedules(length, dim):
    """The defaults are among those that the script compares on a GPU."""
    registered = mosaic_gpu.schedules(length, dim)
    for batch in (1, 8, 64):
        assert mosaic_gpu.default_schedule(batch, length, 32, 8, dim) in registered


def test_refuses_what_it_cannot_compute(case):
    q, k, v, at = map(jnp.asarray, case(SMOL, [[3]]))
    call = functools.partial(mosaic_gpu.attention, scale=1.0, kv_split=KV_SPLIT)
    with pytest.raises(NotImplementedError, match="float32"):
        call(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), at)
    with pytest.raises(NotImplementedError, match="kv_split"):
        mosaic_gpu.attention(q, k, v, at, scale=1.0, kv_split=32)
    with pytest.raises(NotImplementedError, match="head_dim 256 needs wgs=1"):
        two = map(jnp.asarray, case(GEMMA, [[3, 4]]))
        call(*two, schedule=KINDS["walked by two"])
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
