"""The KV cache: a plain pytree, donated to each step; and how entries are put into pages."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float


@runtime_checkable
class CacheShape(Protocol):
    """What of a model's config decides the shape of its cache."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache(NamedTuple):
    """Keys and values of every layer; slot s of a row holds the token at position s."""

    k: tuple[Float[Array, "B Hkv S D"], ...]
    v: tuple[Float[Array, "B Hkv S D"], ...]

    @property
    def length(self) -> int:
        """Slots a row."""
        return self.k[0].shape[2]


def create_cache(
    config: CacheShape, batch_size: int, length: int, dtype: DTypeLike, fill: ArrayLike = 0.0
) -> KVCache:
    """A cache of `length` slots a row, every element `fill` (NaN to poison unused slots)."""
    shape = (batch_size, config.num_key_value_heads, length, config.head_dim)

    def side() -> tuple[Array, ...]:
        return tuple(jnp.full(shape, fill, dtype) for _ in range(config.num_hidden_layers))

    return KVCache(k=side(), v=side())
