"""Attention in jnp, batch-invariant on any backend. Tree: that of `reference`.

Schedules:

- `whole` (CPU): all rows of the batch in one batched dot per split, `lax.fori_loop` over the
  splits that any row needs. A batched dot gives each row the bits it has alone where its rows of
  queries are as many as `matmul.portable.padded_rows` says, so they are padded to that.
- `tiled` (any other backend): `lax.map` over the rows of the batch and over tiles of
  `QUERY_TILE` queries; every dot has one fixed shape.

Which splits are walked follows the batch: up to the longest neighbour's last, and with a sliding
window from the first that any row sees. The extra ones are masked, and a masked split is an
exact identity of the merge. Pages are gathered split by split, so that what is read follows the
contexts and not the page table's width.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.pallas_kernels.attention.masks import sees
from jdet.pallas_kernels.attention.pages import check_pages, split_count, take_split
from jdet.pallas_kernels.matmul.portable import padded_rows
from jdet.pallas_kernels.trees import exp, tanh, tree_sum

QUERY_TILE = 16
# In float32, and float16, which XLA:CPU widens: the longest split, by head dim, whose product with
# values as they lie has one order (scripts/bench/results/cpu-attention-dots-2.json).
_AS_THEY_LIE = {64: 1 << 31, 128: 256}

# Running maximum, sum and weighted values of a set of query rows.
type Partial = tuple[Float32[Array, "B N R"], Float32[Array, "B N R"], Float32[Array, "B N R D"]]


def _batched_dot(
    a: Float[Array, "B N R C"], b: Float[Array, "B N X Y"], contract: int
) -> Float32[Array, "B N R O"]:
    return lax.dot_general(
        a,
        b,
        (((3,), (contract,)), ((0, 1), (0, 1))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _weigh(p: Float[Array, "B N R S"], v: Float[Array, "B N S D"]) -> Float32[Array, "B N R D"]:
    """p @ v over the keys, ascending.

    From some number of rows on XLA:CPU sums it in another order, but in bfloat16 and up to the
    splits of `_AS_THEY_LIE`. Elsewhere V is first laid out as the keys of the scores are, which
    has one order for any number of rows; where both do, it is the same one.
    """
    if v.dtype == jnp.bfloat16 or v.shape[2] <= _AS_THEY_LIE.get(v.shape[3], 0):
        return _batched_dot(p, v, 2)
    # Without the barrier XLA folds the transposition back into the product.
    return _batched_dot(p, lax.optimization_barrier(v.swapaxes(2, 3)), 3)


def _split(
    q: Float[Array, "B N R D"],
    k: Float[Array, "B N S D"],
    v: Float[Array, "B N S D"],
    seen: Bool[Array, "B R S"],
    written: Bool[Array, "B S"],
    scale: float,
    soft_cap: float | None,
) -> Partial:
    """One split alone; `written` marks the keys that some query of the row sees."""
    score = _batched_dot(q, k, 3)
    if soft_cap is None:
        score = score * jnp.float32(scale)
    else:
        score = tanh(score * jnp.float32(scale / soft_cap)) * jnp.float32(soft_cap)
        # One value for the maximum and for p: XLA may compute it in both places otherwise.
        score = lax.optimization_barrier(score)
    score = jnp.where(seen[:, None], score, -jnp.inf)
    m = jnp.max(score, axis=-1)  # a maximum is exact in any order
    # One value for the sum and for the product with the values, as above.
    p = lax.optimization_barrier(exp(score - jnp.where(m == -jnp.inf, 0, m)[..., None]))
    # Slots that nobody has written, or that were freed, may hold NaN, and 0 * NaN is NaN.
    v = jnp.where(written[:, None, :, None], v, jnp.zeros((), v.dtype))
    return m, tree_sum(p), _weigh(p.astype(v.dtype), v)


def _merge(left: Partial, right: Partial) -> Partial:
    """The tree's one merge: `left` holds the lower positions."""
    (m0, l0, o0), (m1, l1, o1) = left, right
    m = jnp.maximum(m0, m1)
    base = jnp.where(m == -jnp.inf, 0, m)
    a, b = exp(m0 - base), exp(m1 - base)
    return m, l0 * a + l1 * b, o0 * a[..., None] + o1 * b[..., None]


def _attend(
    q: Float[Array, "B N R D"],
    k_cache: Float[Array, "P N S D"],
    v_cache: Float[Array, "P N S D"],
    positions: Int32[Array, "B R"],
    page_table: Int32[Array, "B pages"] | None,
    *,
    scale: float,
    kv_split: int,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Float[Array, "B N R D"]:
    """Walk the splits in ascending order for query rows that share their keys' head."""

    def partial_at(index: Int32[Array, ""]) -> Partial:
        start = index * kv_split
        k, v = (take_split(c, page_table, index, kv_split) for c in (k_cache, v_cache))
        keys = start + jnp.arange(kv_split)
        seen = sees(positions, keys, sliding_window)
        if sliding_window is None:
            written = keys <= jnp.max(positions, axis=1, keepdims=True)
        else:
            written = seen.any(axis=1)
        return _split(q, k, v, seen, written, scale, soft_cap)

    last, begin = jnp.max(positions), jnp.int32(0)
    if sliding_window is not None:
        earliest = jnp.min(jnp.where(positions < 0, last, positions))
        begin = jnp.maximum(earliest - (sliding_window - 1), 0) // kv_split
    if split_count(k_cache, page_table, kv_split) == 1:
        _, total, out = partial_at(begin)
    else:
        nothing = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)  # the merge's identity
        _, total, out = lax.fori_loop(
            begin,
            last // kv_split + 1,
            lambda index, state: _merge(state, partial_at(index)),
            (nothing, jnp.zeros_like(nothing), jnp.zeros(q.shape, jnp.float32)),
        )
    total = total[..., None]
    return jnp.where(total == 0, 0, out / total).astype(q.dtype)


def attention_whole(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "P Hkv S D"],
    v_cache: Float[Array, "P Hkv S D"],
    positions: Int32[Array, "B T"],
    page_table: Int32[Array, "B N"] | None = None,
    *,
    scale: float,
    kv_split: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H D"]:
    """The `whole` schedule."""
    batch, length, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    rows = q.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, dim)
    row_positions = jnp.tile(positions, (1, group))
    # The scores are summed over dim, the values over kv_split.
    padded = max(padded_rows(group * length, k, q.dtype) for k in (dim, kv_split))
    missing = padded - group * length
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
    row_positions = jnp.pad(row_positions, ((0, 0), (0, missing)), constant_values=-1)
    out = _attend(
        rows,
        k_cache,
        v_cache,
        row_positions,
        page_table,
        scale=scale,
        kv_split=kv_split,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    out = out[:, :, : group * length].reshape(batch, kv_heads, group, length, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def attention_tiled(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "P Hkv S D"],
    v_cache: Float[Array, "P Hkv S D"],
    positions: Int32[Array, "B T"],
    page_table: Int32[Array, "B N"] | None = None,
    *,
    scale: float,
    kv_split: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H D"]:
    """The `tiled` schedule."""
    batch, length, heads, dim = q.shape
    tiles = -(-length // QUERY_TILE)
    missing = tiles * QUERY_TILE - length
    q_tiles = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    q_tiles = q_tiles.reshape(batch * tiles, QUERY_TILE, heads, dim)
    p_tiles = jnp.pad(positions, ((0, 0), (0, missing)), constant_values=-1)
    p_tiles = p_tiles.reshape(batch * tiles, QUERY_TILE)

    def one_tile(args: tuple[Array, Array, Array]) -> Float[Array, "QT H D"]:
        row, q_tile, p_tile = args
        if page_table is None:
            k, v = (lax.dynamic_index_in_dim(c, row, 0) for c in (k_cache, v_cache))
            table = None
        else:
            k, v, table = k_cache, v_cache, lax.dynamic_index_in_dim(page_table, row, 0)
        return attention_whole(
            q_tile[None],
            k,
            v,
            p_tile[None],
            table,
            scale=scale,
            kv_split=kv_split,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )[0]

    rows = jnp.arange(batch * tiles) // tiles
    out = lax.map(one_tile, (rows, q_tiles, p_tiles))
    return out.reshape(batch, tiles * QUERY_TILE, heads, dim)[:, :length]


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
    """See `reference.attention`; without pages S must be a multiple of `kv_split`."""
    if page_table is not None:
        check_pages(page_table, positions.shape[0], k_cache.shape[2], kv_split)
    options: dict[str, Any] = dict(
        scale=scale, kv_split=kv_split, sliding_window=sliding_window, soft_cap=soft_cap
    )
    return lax.platform_dependent(
        q,
        k_cache,
        v_cache,
        positions,
        page_table,
        cpu=functools.partial(attention_whole, **options),
        default=functools.partial(attention_tiled, **options),
    )
