"""The KV cache: buffers of the model's shape, none of them twice."""

import dataclasses

import jax.numpy as jnp
import pytest

from jdet.cache import CacheShape, create_cache


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of two layers, three key heads of eight."""

    num_hidden_layers: int = 2
    num_key_value_heads: int = 3
    head_dim: int = 8


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


def test_fill_stands_in_every_slot(dtype):
    cache = create_cache(Shape(), 2, 16, dtype, fill=float("nan"))
    assert all(jnp.isnan(side).all() for side in (*cache.k, *cache.v))
