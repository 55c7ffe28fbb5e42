"""Attention by plain XLA: not batch-invariant. The negative control and the speed baseline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.attention.masks import sees
from jdet.pallas_kernels.attention.pages import contiguous


def attention(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "P Hkv S D"],
    v_cache: Float[Array, "P Hkv S D"],
    positions: Int32[Array, "B T"],
    *,
    scale: float,
    kv_split: int,
    page_table: Int32[Array, "B N"] | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H D"]:
    """einsum, softmax over the whole cache, einsum. `kv_split` matters only to pages' layout."""
    k_cache, v_cache = contiguous(k_cache, v_cache, page_table, positions, kv_split)
    batch, length, heads, dim = q.shape
    kv_heads, cache_length = k_cache.shape[1:3]
    group = heads // kv_heads
    # Batch dimensions first: XLA:CPU has no bfloat16 dot with float32 result for other orders.
    rows = q.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, dim)
    score = jnp.einsum("bnrd,bnsd->bnrs", rows, k_cache, preferred_element_type=jnp.float32)
    if soft_cap is None:
        score = score * jnp.float32(scale)
    else:
        score = jnp.tanh(score * jnp.float32(scale / soft_cap)) * jnp.float32(soft_cap)
    seen = sees(positions, jnp.arange(cache_length), sliding_window)
    seen = jnp.tile(seen, (1, group, 1))[:, None]
    # A finite minimum: padding sees no key, and -inf would make it NaN, which V would spread.
    masked = jnp.where(seen, score, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(masked, axis=-1).astype(q.dtype)
    out = jnp.einsum("bnrs,bnsd->bnrd", p, v_cache, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, group, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
