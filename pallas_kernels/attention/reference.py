"""Attention, the tree written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.attention.masks import sees
from jdet.pallas_kernels.attention.pages import contiguous
from jdet.pallas_kernels.trees import wide_dtype


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
    """Query (b, t) attends to the keys 0..positions[b, t] of its row; position -1 gives zeros.

    With a `sliding_window` W it sees of them only the last W, its own among them. With a
    `soft_cap` c a score becomes c * tanh(score / c).

    Tree: the keys are cut at absolute positions into splits of `kv_split`. A split alone:
    scores q.k in float32 times `scale` (with a cap: times scale / c, then tanh, then times c),
    -inf where the query does not see the key; their maximum m; p = exp(score - m); l = the sum
    of p (halving tree over the split); o = p, rounded to v's dtype, times v, in float32. Splits
    are merged in ascending order, (m, l, o) with (m', l', o') giving
    M = max(m, m'), l exp(m - M) + l' exp(m' - M), o exp(m - M) + o' exp(m' - M).
    A split with no key for the query leaves the running value exactly as it was: a window skips
    leading splits, and one as long as the context changes no bit.
    The result is o / l, rounded once to q's dtype. float64 inputs are computed in float64.

    The cache of row b is row b of `k_cache` and `v_cache`; or, with a `page_table`, they hold
    pages, and it is those that row b of the table names (see `pages`). What no query of a row
    sees, after its last key or before its windows, is not used: neither slots, nor pages, nor
    entries of the table.
    """
    k_cache, v_cache = contiguous(k_cache, v_cache, page_table, positions, kv_split)
    batch, length, heads, dim = q.shape
    kv_heads, cache_length = k_cache.shape[1:3]
    wide = wide_dtype(q)
    high = lax.Precision.HIGHEST
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim).astype(wide)
    m = jnp.full((batch, kv_heads, heads // kv_heads, length), -jnp.inf, wide)
    total = jnp.zeros_like(m)
    out = jnp.zeros((*m.shape, dim), wide)
    for start in range(0, cache_length, kv_split):
        keys = jnp.arange(start, min(start + kv_split, cache_length))
        seen = sees(positions, keys, sliding_window)
        k = k_cache[:, :, keys]
        v = jnp.where(seen.any(1)[:, None, :, None], v_cache[:, :, keys], 0)
        score = jnp.einsum("btngd,bnsd->bngts", grouped, k.astype(wide), precision=high)
        if soft_cap is None:
            score = score * scale
        else:
            score = jnp.tanh(score * (scale / soft_cap)) * soft_cap
        score = jnp.where(seen[:, None, None], score, -jnp.inf)
        m_split = score.max(-1)
        p = jnp.exp(score - jnp.where(m_split == -jnp.inf, 0, m_split)[..., None])
        o_split = jnp.einsum(
            "bngts,bnsd->bngtd", p.astype(v.dtype).astype(wide), v.astype(wide), precision=high
        )
        m_new = jnp.maximum(m, m_split)
        base = jnp.where(m_new == -jnp.inf, 0, m_new)
        a, b = jnp.exp(m - base), jnp.exp(m_split - base)
        m, total = m_new, total * a + p.sum(-1) * b
        out = out * a[..., None] + o_split * b[..., None]
    out = jnp.where(total[..., None] == 0, 0, out / total[..., None])
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
