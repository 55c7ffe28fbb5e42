"""The preparation of the heads, written plainly; in float64 inputs it is the oracle."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.rms_norm.reference import rms_norm
from jdet.pallas_kernels.rope.reference import rotate


def slots(
    positions: Int32[Array, "B T"],
    cache: Float[Array, "P Hkv S D"],
    page_table: Int32[Array, "B N"] | None,
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """(page, slot in it) of each token; a page beyond the last for a token without one.

    A contiguous cache has one page a row. What has no page gets places that differ from one
    another, so that no two tokens share a place.
    """
    pages, _, size, _ = cache.shape
    batch, length = positions.shape
    rows, columns = jnp.arange(batch)[:, None], jnp.arange(length)[None]
    page, slot = rows, positions
    written = positions >= 0
    if page_table is not None:
        page = page_table.at[rows, positions // size].get(mode="fill", fill_value=-1)
        slot = positions % size
        written &= page >= 0
    return jnp.where(written, page, pages + rows), jnp.where(written, slot, columns)


def with_norm(rms_norm: Callable[..., Any]) -> Callable[..., Any]:
    """The op with an implementation's norm: nothing else of it sums over an axis."""

    def qkv_heads(
        qkv: Float[Array, "B T width"],
        q_norm: Float[Array, " D"] | None,
        k_norm: Float[Array, " D"] | None,
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        positions: Int32[Array, "B T"],
        k_cache: Float[Array, "P Hkv S D"],
        v_cache: Float[Array, "P Hkv S D"],
        *,
        eps: float,
        page_table: Int32[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "P Hkv S D"], Float[Array, "P Hkv S D"]]:
        """(q, k_cache, v_cache): the query heads, and the caches with the tokens' keys and values.

        Args:
          qkv: the fused projection: H query heads, then Hkv of keys, then Hkv of values, of D each.
          q_norm, k_norm: weights of the RMS norm of each query and key head; None for no norm.
          cos, sin: of the angles of each token's position. They come from a table that is computed
            outside, in float64 (`models.rope.Rope.table`): no sine or cosine runs on the device.
          positions: the slot of each token's key and value; -1, padding, writes nothing.
          k_cache, v_cache: one page a row (P = B, position s in slot s), or with a page table any
            number of pages. Every slot but those of the tokens keeps its bits.
          eps: of the norms.
          page_table: the page of positions n * S to (n + 1) * S - 1 of row b stands in [b, n]. A
            position without a page (beyond the table, or below 0 there) writes nothing.

        q of a padding token is not specified.

        Tree: that of `rms_norm`, rounded to qkv's dtype, then low * cos - high * sin and
        high * cos + low * sin in float32, rounded once. Values are copied.
        """
        _, kv_heads, _, dim = k_cache.shape
        x = qkv.reshape(*qkv.shape[:2], -1, dim)
        heads = x.shape[2] - 2 * kv_heads
        q, k, v = jnp.split(x, (heads, heads + kv_heads), axis=2)
        if q_norm is not None:
            q, _ = rms_norm(q, q_norm, eps=eps)
        if k_norm is not None:
            k, _ = rms_norm(k, k_norm, eps=eps)
        page, slot = slots(positions, k_cache, page_table)
        k_cache, v_cache = (
            cache.at[page, :, slot].set(new, mode="drop", unique_indices=True)
            for cache, new in ((k_cache, rotate(k, cos, sin)), (v_cache, v))
        )
        return rotate(q, cos, sin), k_cache, v_cache

    return qkv_heads


qkv_heads = with_norm(rms_norm)
