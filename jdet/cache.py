"""The KV cache: a plain pytree, donated to each step; and how entries are put into pages."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32


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


def write(
    cache: Float[Array, "B Hkv S D"],
    new: Float[Array, "B T Hkv D"],
    start: Int32[Array, " B"],
) -> Float[Array, "B Hkv S D"]:
    """Put row b's T new entries at the slots start[b], start[b] + 1, ...; start + T <= S."""

    def row(
        slots: Float[Array, "Hkv S D"], entries: Float[Array, "T Hkv D"], at: Int32[Array, ""]
    ) -> Float[Array, "Hkv S D"]:
        return lax.dynamic_update_slice_in_dim(slots, entries.transpose(1, 0, 2), at, 1)

    return jax.vmap(row)(cache, new, start)


def write_pages(
    pages: Float[Array, "P Hkv page D"],
    new: Float[Array, "B T Hkv D"],
    page_table: Int32[Array, "B N"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "P Hkv page D"]:
    """Put row b's entry for position s into slot s % page of page page_table[b, s // page].

    Position -1 is padding and is not written, nor is what no page of `pages` holds. Two entries
    must not meet in one slot: rows may share pages that none of them writes.
    """
    count, _, page_size, _ = pages.shape
    row_pages = page_table.shape[1]
    index = jnp.clip(positions // page_size, 0, row_pages - 1)
    page = jnp.take_along_axis(page_table, index, axis=1)
    there = (positions >= 0) & (positions < row_pages * page_size) & (page >= 0)
    page = jnp.where(there, page, count)
    return pages.at[page, :, positions % page_size].set(new, mode="drop")
