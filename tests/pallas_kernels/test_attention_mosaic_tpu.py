"""The Pallas TPU attention, interpreted: one tree for prefill, chunks, decode and pages."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.attention.mosaic_tpu import Schedule, attention

pytestmark = pytest.mark.usefixtures("unoptimized")

HEADS = (4, 2, 64)
LENGTH, SLOTS, SPLIT = 150, 192, 64
OPTIONS = {"plain": {}, "window, cap": {"sliding_window": 70, "soft_cap": 5.0}}
CASES = (("float32", "plain"), ("bfloat16", "window, cap"))
cases = pytest.mark.parametrize(("dtype", "options"), CASES)
run = functools.partial(attention, scale=HEADS[2] ** -0.5, kv_split=SPLIT)


@pytest.fixture(scope="module")
def request_(request_of):
    """(q, k, v) in a dtype: a request of LENGTH tokens, NaN in the slots after them."""

    @functools.cache
    def draw(dtype):
        q, k, v = request_of(0, HEADS, LENGTH, SLOTS, jnp.dtype(dtype))
        k[:, :, LENGTH:] = v[:, :, LENGTH:] = np.nan
        return tuple(jnp.asarray(x) for x in (q, k, v))

    return draw


@pytest.fixture(scope="module")
def prefill(request_):
    """prefill(dtype, options): of the whole request at once."""

    @functools.cache
    def call(dtype, options):
        positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        q, k, v = request_(dtype)
        return run(q, k, v, positions, **OPTIONS[options], interpret=True)

    return call


def part(request, start, stop, **options):
    q, k, v = request
    written = (jnp.arange(SLOTS) < stop)[:, None]
    k, v = (jnp.where(written, x, jnp.array(jnp.nan, x.dtype)) for x in (k, v))
    positions = jnp.arange(start, stop, dtype=jnp.int32)[None]
    return run(q[:, start:stop], k, v, positions, **options, interpret=True)


@cases
def test_right(request_, prefill, dtype, options, assert_attends):
    q, k, v = (np.asarray(x) for x in request_(dtype))
    out = np.asarray(prefill(dtype, options))
    assert_attends(out, q, k, v, np.arange(LENGTH)[None], **OPTIONS[options])


def test_chunk_and_tiles(request_, prefill, assert_same_bits):
    """A chunk that starts inside a split; the queries cut into tiles that end inside splits."""
    dtype = "float32"
    whole = prefill(dtype, "plain")
    assert_same_bits(part(request_(dtype), 37, 101), whole[:, 37:101])
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    q, k, v = request_(dtype)
    tiles = run(q, k, v, positions, schedule=Schedule(40), interpret=True)
    assert_same_bits(tiles, whole)


@cases
def test_decode_is_prefill(request_, prefill, dtype, options, assert_same_bits):
    whole = prefill(dtype, options)
    for t in (0, 63, 64, 65, 127, 128, 149):
        step = part(request_(dtype), t, t + 1, **OPTIONS[options])
        assert_same_bits(step, whole[:, t : t + 1], f"position {t}")


def test_control_another_split(request_, prefill):
    """Another tree gives other bits: the tests above can fail."""
    whole = prefill("float32", "plain")
    step = part(request_("float32"), 149, 150, kv_split=16)
    assert (np.asarray(step) != np.asarray(whole[:, 149:])).any()


@cases
def test_pages_simulated(request_, prefill, paged, simulated_tpu, assert_same_bits, dtype, options):
    """Decode of rows at other places of the request, one of padding, in poisoned pages."""
    q, k, v = (np.asarray(x) for x in request_(dtype))
    at = np.array([3, 149, 64, 128], np.int32)
    k, v = (np.broadcast_to(x, (4, *x.shape[1:])) for x in (k, v))
    k, v, table = (jnp.asarray(x) for x in paged(k, v, at[:, None], 16))
    positions = at[:, None].copy()
    positions[2] = -1
    rows = jnp.asarray(q[0, at][:, None])
    call = functools.partial(run, page_table=table, **OPTIONS[options])
    got = np.asarray(simulated_tpu(call, rows, k, v, jnp.asarray(positions), seed=5))
    for row in (0, 1, 3):
        want = prefill(dtype, options)[0, at[row]]
        assert_same_bits(got[row, 0], want, f"row {row}")
    np.testing.assert_array_equal(got[2].astype(np.float32), 0)


def test_refuses():
    q, cache, at = jnp.zeros((1, 1, 2, 32)), jnp.zeros((1, 1, 64, 32)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="head_dim 64 or a multiple of 128, got 32"):
        run(q, cache, cache, at)
    half = jnp.float16
    with pytest.raises(NotImplementedError, match="attention takes bfloat16 or float32"):
        run(q.astype(half), cache.astype(half), cache.astype(half), at)
