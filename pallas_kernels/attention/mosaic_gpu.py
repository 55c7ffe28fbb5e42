"""Attention for Hopper in Pallas Mosaic GPU: one tree, two ways to walk it.

See `reference.attention` for the op. bfloat16 or float16, head_dim 64, 128 or 256, kv_split 64, 128
or 256, S a multiple of it, or pages (see `pages`). Positions of a row are consecutive, padding (-1)
at its end only.

Tree (what the bits depend on):

- A query is one of 64 rows of a wgmma. Keys are cut at absolute positions into splits, a split
  into tiles of min(128, kv_split) keys.
- Scores of a tile: one float32 accumulator, over head_dim ascending, 16 elements at a time.
- m = (maximum of the split's scores, unseen ones -inf) * c, c = float32(scale * log2 e), rounded.
  p = ex2.approx.ftz(fma(score, c, -m)).
- With a soft cap, in float32: e = ex2(score * f), f = float32(2 scale / soft_cap * log2 e), of
  infinity where it overflows; z = fma(rcp.approx.ftz(e + 1), -2 g, g), g = float32(soft_cap *
  log2 e), which is soft_cap * tanh(...) * log2 e to about 2e-7 g; m = the maximum of z (unseen
  keys -inf), p = ex2(z - m).
- l: the sum of p over a tile in the order of Mosaic's reduction of a [64, tile] wgmma layout
  (a thread's own elements, then its neighbours 1 and 2 lanes away); tiles are added ascending.
- o = p, rounded to v's dtype, times v: one float32 accumulator over the keys of the split,
  ascending, 16 at a time. Rows of v after the last key, or before the first window, are zeros,
  whatever the cache holds.
- Splits are merged in ascending order, starting from (-inf, 0, 0): M = max(m, m'),
  a = ex2(m - M), b = ex2(m' - M), l = fma(l, a, l' * b), o = fma(o, a, o' * b). Merging a split
  without a key changes nothing, and merging into the start gives the split itself.
- The result is o / l (div.full), plus 0, rounded once; 0 where there is no key.

Products and sums that a compiler could fuse are single instructions of PTX (`exact`).

Schedules (what the bits do not depend on; mosaic_gpu_schedules):

- `walked`: a block has 1 or 2 consumer warpgroups of 64 query rows (the heads that share keys x
  consecutive queries) and walks their splits in order; for prefill. A block a multiprocessor,
  which goes on to other rows: the next queries and keys come while it finishes. Splits that all
  rows see in full are not masked, tiles of keys that none sees are left out (without a window).
  The exponentials of a tile are taken while the one before it is weighed. Two consumers take
  turns at the scores, so that one has exponentials to take while the other multiplies.
- `spread`: equal, contiguous shares of all (tile, head, split), which each block counts itself.
  Where at most 8 rows of a tile carry a query, a head that the taker of a share meets from its
  first split to its last is done. Of any other the taker of split 0 folds what it meets and leaves
  it at the last of these splits; the rest of its splits are left alone. Both lie in memory in
  float32, and `fold`, a second kernel, merges them in order. For decode: equal work whatever the
  lengths, and no partial results where shares hold many heads. A block of the fold takes all
  columns, or 32 where there are few heads and many splits to fetch.

Decode uses the same 64-row tile with few real rows. Where they are at most 8, half of every
thread's registers hold no row, and are left out (mosaic_gpu_rows): half of the exponentials, and
registers for two teams of a producer and a consumer in a block, each with a share of its own. One
waits for memory, the tensor core or exponentials while the other computes, so that a block takes
what the memory gives and not what one consumer can use: with one, blocks ended 10 % apart
(scripts/bench/results/h200-attention-decode-experiments.json).

With a sliding window a block begins with the first split that its queries need; those before it are
neither loaded nor counted in the shares. At head_dim 256 two consumers share a tile of queries:
each computes all scores, and 128 columns of o, as many as its registers hold.
A producer warpgroup keeps a ring of tiles of keys and values full, in the order of use
(`cp.async.bulk.tensor`, one mbarrier a slot), across the ends of splits, heads and rows. Of a paged
cache it reads the page numbers itself, and starts one copy for each page that a tile meets.

Budget: shared memory = a slot of 128 keys x 128 x 2 bytes = 32 KiB; 6 slots and 32 KiB of queries
(walked by 2), 3 slots and 16 KiB for each of two teams, 6 slots and 16 KiB for one, under 227 KiB.
At head_dim 256 a tile is two slots: 6 slots and 32 KiB. The fold: 8 * fetch splits of 2 KiB, or 0.5
for 32 columns. Registers of a consumer thread: 128 of scores (then 64 of p and 64 of o'; walked,
o' beside half of each), 64 of o, of 240 (walked by 2) or 255; in a team of two 216: 128 of scores,
then half, 32 of o. Words that ptxas stores to local memory, a thread: none in decode; 100 in spread
prefill; 98 walked by 2, of which 12 in the loop over unmasked splits; at 256 none or 10 in decode,
190 to 270 walked. Pages of 16 add 30 to 130, in the producer. Those 12 decide: 40 or 52 cost 14 to
26 % in time (scripts/bench/results/h200-attention-experiments.json).

Bits: scripts/bench/results/h200-attention-3.json (decode) and h200-attention-prefill.json: those
that earlier forms had on an H100 and an H200 (h100-check-attention.json, h200-attention-2.json,
h200-check-attention-options.json). Times on an H200: the first two.

Sources: the PTX manual; FlashAttention-2 and -3 (split softmax, warp specialisation); FlashDecoding
(splits in parallel); stream-K (equal shares); jax's attention_mgpu.py for what Pallas offers. No
code of theirs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention.mosaic_gpu_ends import COUNTED
from jdet.pallas_kernels.attention.mosaic_gpu_kernel import attention_kernel
from jdet.pallas_kernels.attention.mosaic_gpu_merge import fold_splits
from jdet.pallas_kernels.attention.mosaic_gpu_schedules import (
    ROWS,
    SMS,
    Schedule,
    default_schedule,
    ends_of,
    origins_of,
    schedules,
    shape_of,
)
from jdet.pallas_kernels.attention.pages import check_pages

__all__ = ["Schedule", "attention", "default_schedule", "schedules"]

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(
    jax.jit,
    static_argnames=("scale", "kv_split", "sliding_window", "soft_cap", "s", "interpret"),
)
def _attention(
    q,
    k_cache,
    v_cache,
    positions,
    page_table,
    *,
    scale,
    kv_split,
    sliding_window,
    soft_cap,
    s,
    interpret,
):
    batch, length, heads, dim = q.shape
    kv_heads, cache = k_cache.shape[1:3]
    if page_table is not None:
        cache *= page_table.shape[1]
    group, decode, spread = heads // kv_heads, length == 1, s.kind == "spread"
    d = shape_of(length, group, kv_heads, dim, kv_split, scale, sliding_window, soft_cap)
    queries, padded = d.queries, d.rows // d.queries
    tiles = pl.cdiv(length, queries)
    q = q.reshape(batch, length, kv_heads, group, dim)
    missing = tiles * queries - length if interpret else 0  # the simulator clips nothing
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, padded - group), (0, 0)))
    p = jnp.pad(positions, ((0, 0), (0, tiles * queries - length)), constant_values=-1)
    p = p.reshape(batch * tiles, queries)
    inputs = dict(q=q, k=k_cache, v=v_cache)
    if sliding_window is not None:
        # The kernels count splits and positions from there, but where they copy.
        origin = inputs["origin"] = origins_of(p[:, 0], tiles, s.wgs, d)
        p = jnp.where(p < 0, -1, p - origin[:, None] * kv_split)
    last = inputs["last"] = p.max(axis=1)
    if not decode:
        inputs["rows"] = jnp.repeat(p, d.rows // queries, axis=1)
    if page_table is not None:
        inputs["table"] = page_table
    if spread:
        if batch * tiles > COUNTED:
            inputs["ends"] = ends_of(last, d)
        splits = d.most_splits(cache)
        s = dataclasses.replace(s, fetch=min(s.fetch, splits))
        out_type = d.parts(batch * tiles, splits, s.fetch, q.dtype)
        grid = s.blocks
    else:
        out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
        grid = min(batch * pl.cdiv(tiles, s.wgs) * kv_heads, SMS)
    if not spread or (sliding_window is not None and not decode):
        inputs["first"] = p[:, 0]
    # Rows are reduced by shuffles within a warp: without memory.
    compiler_params = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)
    params: dict[str, Any] = dict(compiler_params=compiler_params, interpret=interpret or None)
    out = plgpu.kernel(
        functools.partial(
            attention_kernel,
            names=tuple(inputs),
            s=s,
            d=d,
            slots=s.slots(d),
            interpret=bool(interpret),
        ),
        out_type=out_type,
        grid=(grid,),
        grid_names=("block",),
        num_threads=s.warpgroups(d),
        thread_name="wg",
        kernel_name="jdet_attention",
        **params,
    )(*inputs.values())
    if spread:
        out = fold_splits(out, last, d=d, s=s, **params)
        if decode:
            out = out.reshape(batch, 1, kv_heads, d.part_rows, dim)[..., :group, :]
        else:
            out = out.reshape(batch, tiles, kv_heads, queries, padded, dim)
            out = out.transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(batch, -1, kv_heads, padded, dim)[:, :length, :, :group]
    return out.reshape(batch, length, heads, dim)


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    kv_split: int,
    page_table: jax.Array | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `reference.attention` for the op and the module for its tree.

    Args:
      q: [B, T, H, D], bfloat16 or float16.
      k_cache, v_cache: [B, Hkv, S, D], of q's dtype; slots after a row's last position are not
        used, whatever they hold.
      positions: [B, T], consecutive in a row; -1 at a row's end is padding, and gives zeros.
      scale: factor of the scores, positive.
      kv_split: keys of a split: 64, 128 or 256.
      sliding_window: keys that a query sees at most, its own and those before it.
      soft_cap: c of c * tanh(score / c), positive.
      page_table: [B, N]; the caches are then [pages, Hkv, page_size, D], see `pages`. The
        copies follow the table: nothing is gathered.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    batch, length, heads, dim = q.shape
    kv_heads, cache = k_cache.shape[1:3]
    if k_cache.shape[3] != dim or v_cache.shape != k_cache.shape:
        raise ValueError(f"caches {k_cache.shape}, {v_cache.shape} do not go with q {q.shape}")
    if positions.shape != (batch, length) or heads % kv_heads:
        raise ValueError(
            f"q {q.shape} wants positions {(batch, length)} and heads in multiples of {kv_heads};"
            f" positions are {positions.shape}"
        )
    if page_table is not None:
        check_pages(page_table, batch, cache, kv_split)
    elif k_cache.shape[0] != batch or cache % kv_split:
        raise ValueError(
            f"caches {k_cache.shape} want {batch} rows of slots in multiples of {kv_split}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"one dtype, not {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if q.dtype not in _OPERANDS or dim not in (64, 128, 256) or heads // kv_heads > ROWS:
        raise NotImplementedError(
            "mosaic_gpu attention takes bfloat16 or float16, head_dim 64, 128 or 256 and at most"
            f" {ROWS} heads to a key head, got {q.dtype}, {dim}, {heads // kv_heads}"
        )
    if kv_split not in (64, 128, 256) or scale <= 0:
        raise NotImplementedError(
            f"mosaic_gpu attention takes kv_split 64, 128 or 256 and a positive scale, got"
            f" {kv_split}, {scale}"
        )
    s = schedule or default_schedule(batch, length, heads, kv_heads, dim)
    if length == 1:
        s = dataclasses.replace(s, wgs=1)
    if dim > 128 and s.wgs > 1:
        raise NotImplementedError(f"mosaic_gpu attention at head_dim {dim} needs wgs=1, got {s}")
    return _attention(
        q,
        k_cache,
        v_cache,
        positions,
        page_table,
        scale=scale,
        kv_split=kv_split,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        s=s,
        interpret=interpret,
    )
