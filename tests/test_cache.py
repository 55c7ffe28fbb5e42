"""The KV cache: entries land at each row's own start, and nothing else is touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.cache import CacheShape, create_cache, write, write_pages


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of two layers, three key heads of eight."""

    num_hidden_layers: int = 2
    num_key_value_heads: int = 3
    head_dim: int = 8


write_jit = jax.jit(write)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return jnp.dtype(request.param)


def test_cache_has_a_side_a_layer(dtype):
    assert isinstance(Shape(), CacheShape)
    cache = create_cache(Shape(), batch_size=5, length=16, dtype=dtype)
    assert len(cache.k) == len(cache.v) == 2 and cache.length == 16
    for side in (*cache.k, *cache.v):
        assert side.shape == (5, 3, 16, 8) and side.dtype == dtype
        assert (side == 0).all()


def test_no_two_buffers_are_one(dtype):
    """A donated buffer that stands in two places cannot be reused."""
    cache = create_cache(Shape(), 5, 16, dtype)
    pointers = [side.unsafe_buffer_pointer() for side in (*cache.k, *cache.v)]
    assert len(set(pointers)) == 4


@pytest.mark.parametrize("length", [1, 4])
def test_write_places_entries_at_each_row_s_start(dtype, length):
    rng = np.random.default_rng(0)
    before = rng.standard_normal((5, 3, 16, 8)).astype(dtype)
    before[:, :, 10:] = np.nan
    new = rng.standard_normal((5, length, 3, 8)).astype(dtype)
    start = np.array([0, 3, 16 - length, 9, 3], np.int32)
    after = np.asarray(write_jit(before, new, start))
    expected = before.copy()
    for row, at in enumerate(start):
        for t in range(length):
            expected[row, :, at + t] = new[row, t]
    integer = {2: np.uint16, 4: np.int32}[dtype.itemsize]
    np.testing.assert_array_equal(after.view(integer), expected.view(integer))


def test_fill_stays_where_nothing_was_written(dtype):
    cache = create_cache(Shape(), 2, 16, dtype, fill=float("nan"))
    new = np.ones((2, 4, 3, 8), dtype)
    for side in (*cache.k, *cache.v):
        after = np.asarray(write_jit(side, new, np.array([0, 12], np.int32))).astype(np.float32)
        assert (after[0, :, :4] == 1).all() and np.isnan(after[0, :, 4:]).all()
        assert (after[1, :, 12:] == 1).all() and np.isnan(after[1, :, :12]).all()


def test_write_pages_places_entries_by_the_table(dtype):
    """Padding, entries without a page and positions past the table are dropped."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((6, 3, 16, 8)).astype(dtype)
    new = rng.standard_normal((4, 3, 3, 8)).astype(dtype)
    table = np.array([[5, 2], [0, -7], [3, 6], [1, 2**31 - 1]], np.int32)
    positions = np.array([[15, 16, 17], [0, 31, -1], [4, 16, 32], [-1, -1, -1]], np.int32)
    after = np.asarray(jax.jit(write_pages)(before, new, table, positions))
    expected = before.copy()
    for page, slot, entry in (
        (5, 15, new[0, 0]),
        (2, 0, new[0, 1]),
        (2, 1, new[0, 2]),
        (0, 0, new[1, 0]),
        (3, 4, new[2, 0]),
    ):
        expected[page, :, slot] = entry
    np.testing.assert_array_equal(after, expected)
