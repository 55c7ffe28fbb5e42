"""Attention for TPU in Pallas: one tree, one kernel for prefill, chunks and decode.

See `reference.attention` for the op. bfloat16 or float32, head_dim 64, 128 or a multiple, S a
multiple of kv_split, or pages (see `pages`). With a sliding window the positions of a row are
consecutive, padding (-1) at its end only.

Tree (what the bits depend on):

- Keys are cut at absolute positions into splits of kv_split. A split alone: scores, one product of
  the matrix unit over head_dim, accumulated in float32 (its order inside belongs to the hardware
  and to Mosaic, see matmul/mosaic_tpu.py), times scale, or with a soft cap
  tanh(score * (scale / cap)) * cap; -inf where the query does not see the key; m their maximum;
  p = exp(score - m).
- l, 128 sums: p in columns of 128 keys, the second half added to the first until one is left
  (a split under 128 is continued with zeros).
- o = p, rounded to v's dtype, times v, one product over the split. Rows of v that no query of the
  tile sees are zeros, whatever the cache holds.
- Splits are merged in ascending order, starting from (-inf, 0, 0): M = max(m, m'),
  l exp(m - M) + l' exp(m' - M), each of the 128 sums alone, o exp(m - M) + o' exp(m' - M). A split
  without a key changes nothing.
- The 128 sums are added at the end, lanes 64, 32, ..., 1 apart. The result is o / l, rounded once;
  0 where there is no key.

Schedules (what the bits do not depend on): the queries of a tile (`Schedule`). A tile is a row's
consecutive queries, with the heads that share keys as further rows; the kernel walks all key heads
of a split before the next one. Splits and tiles follow each other through two buffers of keys and
values: while one split is computed, the next is copied, be it the next tile's or the next row's. A
copy takes all heads of a split, or of a page. Pages and slots beyond the last key, or before
the windows, are not copied, or not used. The grid's first dimension halves the tiles, for chips
whose two cores share a program (v5p).

Budget, 8 key heads of 128, kv_split 256, bfloat16: VMEM = 2 MiB of keys and values, and a tile's
queries, results (two buffers each), accumulators and scores: 11 MiB for 512 rows. The page table is
in SMEM.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.

Sources: FlashAttention-2 (split softmax); JAX's ragged paged attention
(jax/experimental/pallas/ops/tpu/ragged_paged_attention) for copies of pages by hand.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdet.pallas_kernels.attention.pages import check_pages, split_count
from jdet.pallas_kernels.tpu import (
    LANES,
    SUBLANES,
    check_dtypes,
    compiler_params,
    dot_minor,
    fold_lanes,
    lane_index,
    lane_sum,
    precision_of,
    round_up,
)

_ROWS = 512  # of a tile, at most, unless a query has more heads
_ELEMENTS = 2**19  # of a tile's queries, at most, all key heads together
_UNROLLED = 64  # rows up to which all heads are written out, to overlap


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Queries of a tile."""

    queries: int


def default_schedule(length: int, group: int, kv_heads: int, dim: int) -> Schedule:
    """The schedule to use for a number of queries a row. Speed only."""
    rows = min(_ROWS, _ELEMENTS // (kv_heads * max(dim, LANES)))
    return Schedule(min(length, max(1, rows // group)))


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    kv_split: int
    sliding_window: int | None
    soft_cap: float | None


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[R, 128] of equal lanes to [R, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _kernel(*refs: Any, o: _Options, count: int, tiles: int, pages: int, page_size: int) -> None:
    """refs: bounds [4, count] of each tile: its first split, its end, the first and last position
    that it sees; with `pages` a row, the page table, flat; q, positions, k, v; out; the buffers of
    k and v; m, l, o; the buffer in use; semaphores.
    """
    bounds, *rest = refs
    table: Any = rest.pop(0) if pages else None
    q_ref, at_ref, k_hbm, v_hbm, out_ref, k_buf, v_buf, m_ref, l_ref, o_ref, slot_ref, sems = rest
    kv_heads, rows, dim = q_ref.shape
    split = o.kv_split
    core, step = pl.program_id(0), pl.program_id(1)
    steps = pl.num_programs(1)
    tile = core * steps + step
    end_of_core = lax.min((core + 1) * steps, count)

    def each_copy(tile, index, slot, do):
        """`do` each copy of split `index` of `tile`."""
        row = lax.div(tile, tiles)
        sides = ((k_hbm, k_buf, 0), (v_hbm, v_buf, 1))
        if not pages:
            for hbm, buf, side in sides:
                source = hbm.at[row, :, pl.ds(pl.multiple_of(index * split, split), split), :]
                do(pltpu.make_async_copy(source, buf.at[slot], sems.at[slot, side]))
            return
        for i in range(split // page_size):
            start = index * split + i * page_size

            @pl.when((start <= bounds[3, tile]) & (start + page_size > bounds[2, tile]))
            def _(i=i, start=start):
                page = table[row * pages + lax.div(start, page_size)]
                page = lax.clamp(0, page, k_hbm.shape[0] - 1)
                slots = pl.ds(i * page_size, page_size)
                for hbm, buf, side in sides:
                    target = buf.at[slot, :, slots, :]
                    do(pltpu.make_async_copy(hbm.at[page], target, sems.at[slot, side]))

    def merge(heads, slot, start):
        """Merge some heads' parts of the split in `slot`, step by step, so that they overlap."""
        scores = [dot_minor(q_ref[head], k_buf[slot, head]) for head in heads]
        if o.soft_cap is None:
            scores = [score * o.scale for score in scores]
        else:
            scores = [jnp.tanh(score * (o.scale / o.soft_cap)) * o.soft_cap for score in scores]
        key, at = start + lane_index(scores[0].shape), at_ref[...]
        seen = key <= at
        if o.sliding_window is not None:
            seen &= key > at - o.sliding_window
        scores = [jnp.where(seen, score, -jnp.inf) for score in scores]
        maxima = [jnp.max(score, axis=1, keepdims=True) for score in scores]
        weights = [
            jnp.exp(score - jnp.where(m == -jnp.inf, 0.0, m))
            for score, m in zip(scores, maxima, strict=True)
        ]
        outs = [
            lax.dot_general(
                p.astype(v_buf.dtype),
                v_buf[slot, head],
                (((1,), (0,)), ((), ())),
                precision=precision_of(v_buf.dtype),
                preferred_element_type=jnp.float32,
            )
            for head, p in zip(heads, weights, strict=True)
        ]
        for head, m_split, p, o_split in zip(heads, maxima, weights, outs, strict=True):
            if split < LANES:
                p = jnp.concatenate([p, jnp.zeros((rows, LANES - split), p.dtype)], axis=1)
            m, m_split = m_ref[head], jnp.broadcast_to(m_split, (rows, LANES))
            both = jnp.maximum(m, m_split)
            base = jnp.where(both == -jnp.inf, 0.0, both)
            a, b = jnp.exp(m - base), jnp.exp(m_split - base)
            m_ref[head] = both
            l_ref[head] = l_ref[head] * a + fold_lanes(p, jnp.add, 0) * b
            o_ref[head] = o_ref[head] * _spread(a, dim) + o_split * _spread(b, dim)

    def each_head(do):
        """`do` of all heads at once where they have few rows, or else of one after the other."""
        if rows <= _UNROLLED:
            do(range(kv_heads))
        else:
            lax.fori_loop(0, kv_heads, lambda head, _: do([head]), None)

    def walk(index, _):
        slot = slot_ref[0]
        ends = index + 1 == bounds[1, tile]
        next_tile = jnp.where(ends, tile + 1, tile)

        @pl.when(next_tile < end_of_core)
        def _():
            first = bounds[0, lax.min(next_tile, count - 1)]
            following = jnp.where(ends, first, index + 1)
            each_copy(next_tile, following, 1 - slot, lambda copy: copy.start())

        each_copy(tile, index, slot, lambda copy: copy.wait())
        start, low, last = index * split, bounds[2, tile], bounds[3, tile]

        # What nobody has written, or what was freed, may be NaN, and 0 * NaN is NaN.
        @pl.when((start < low) | (start + split - 1 > last))
        def _():
            def clear(heads):
                for head in heads:
                    v = v_buf[slot, head].astype(jnp.float32)
                    key = start + lax.broadcasted_iota(jnp.int32, v.shape, 0)
                    kept = jnp.where((key >= low) & (key <= last), v, 0.0)
                    v_buf[slot, head] = kept.astype(v_buf.dtype)

            each_head(clear)

        each_head(functools.partial(merge, slot=slot, start=start))
        slot_ref[0] = 1 - slot

    @pl.when(tile < count)
    def _():
        @pl.when(step == 0)
        def _():
            slot_ref[0] = 0
            each_copy(tile, bounds[0, tile], 0, lambda copy: copy.start())

        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        o_ref[...] = jnp.zeros_like(o_ref)
        lax.fori_loop(bounds[0, tile], bounds[1, tile], walk, None)

        def finish(heads):
            for head in heads:
                total = lane_sum(l_ref[head])
                out = jnp.where(total == 0, 0.0, o_ref[head] / total)
                out_ref[head] = out.astype(out_ref.dtype)

        each_head(finish)


def _bounds(positions: jax.Array, splits: int, o: _Options) -> jax.Array:
    """int32 [4, tiles]: first split, end, first and last position seen, of positions [tiles, n].

    A tile that sees nothing has one split, all masked.
    """
    last = jnp.max(positions, axis=1)
    low = jnp.zeros_like(last)
    if o.sliding_window is not None:
        earliest = jnp.min(jnp.where(positions < 0, last[:, None], positions), axis=1)
        low = jnp.maximum(earliest - (o.sliding_window - 1), 0)
    first = jnp.minimum(lax.div(low, jnp.int32(o.kv_split)), splits - 1)
    end = jnp.minimum(lax.div(jnp.maximum(last, 0), jnp.int32(o.kv_split)) + 1, splits)
    return jnp.stack([first, jnp.maximum(end, first + 1), low, last])


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("o", "s", "interpret"))
def _attention(q, k_cache, v_cache, positions, page_table, *, o, s, interpret):
    batch, length, heads, dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    group, tiles = heads // kv_heads, pl.cdiv(length, s.queries)
    used = s.queries * group
    rows = round_up(used, SUBLANES)
    missing = tiles * s.queries - length
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    q = q.reshape(batch, tiles, s.queries, kv_heads, group, dim).transpose(0, 3, 1, 2, 4, 5)
    q = q.reshape(batch, kv_heads, tiles, used, dim)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, rows - used), (0, 0)))
    at = jnp.pad(positions, ((0, 0), (0, missing)), constant_values=-1)
    at = at.reshape(batch * tiles, s.queries)
    bounds = _bounds(at, split_count(k_cache, page_table, o.kv_split), o)
    at = jnp.pad(jnp.repeat(at, group, axis=1), ((0, 0), (0, rows - used)), constant_values=-1)
    count = batch * tiles
    cores = min(2, count)
    steps = pl.cdiv(count, cores)

    def place(core, step, *_):
        tile = lax.min(core * steps + step, count - 1)
        return lax.div(tile, tiles), 0, lax.rem(tile, tiles), 0, 0

    of_tile = pl.BlockSpec((None, kv_heads, None, rows, dim), place)
    prefetched = [bounds]
    if page_table is not None:
        prefetched.append(page_table.reshape(-1))
    buffer = pltpu.VMEM((2, kv_heads, o.kv_split, dim), k_cache.dtype)
    per_row = pltpu.VMEM((kv_heads, rows, LANES), jnp.float32)
    slots = page_size * (1 if page_table is None else page_table.shape[1])
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            o=o,
            count=count,
            tiles=tiles,
            pages=0 if page_table is None else page_table.shape[1],
            page_size=page_size,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(cores, steps),
            in_specs=[
                of_tile,
                pl.BlockSpec(
                    (None, rows, 1), lambda c, i, *_: (lax.min(c * steps + i, count - 1), 0, 0)
                ),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=of_tile,
            scratch_shapes=[
                buffer,
                buffer,
                per_row,
                per_row,
                pltpu.VMEM((kv_heads, rows, dim), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * length * heads * dim * slots,
            transcendentals=batch * length * heads * slots,
            bytes_accessed=2 * count * kv_heads * slots * dim * k_cache.dtype.itemsize,
        ),
        name="jdet_attention",
        interpret=interpret,
    )(*prefetched, q, at[..., None], k_cache, v_cache)
    out = out[:, :, :, :used].reshape(batch, kv_heads, tiles, s.queries, group, dim)
    out = out.transpose(0, 2, 3, 1, 4, 5).reshape(batch, tiles * s.queries, heads, dim)
    return out[:, :length]


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
    """Causal attention of q [B, T, H, D] over the caches; see the module for the tree.

    Args:
      q, k_cache, v_cache: bfloat16 or float32, all alike.
      positions: int32 [B, T], -1 for padding.
      scale, kv_split, page_table, sliding_window, soft_cap: as `reference.attention` has them.
      schedule: by shape unless given. Never changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      ValueError: a page table that fits neither the batch nor the splits.
      NotImplementedError: other dtypes, or head_dim neither 64 nor a multiple of 128.
    """
    check_dtypes("attention", q, k_cache, v_cache)
    dim = q.shape[3]
    if dim != 64 and dim % LANES:
        raise NotImplementedError(
            f"mosaic_tpu attention needs head_dim 64 or a multiple of 128, got {dim}"
        )
    if page_table is not None:
        check_pages(page_table, q.shape[0], k_cache.shape[2], kv_split)
    if not q.size:
        return q
    o = _Options(scale, kv_split, sliding_window, soft_cap)
    kv_heads = k_cache.shape[1]
    s = schedule or default_schedule(q.shape[1], q.shape[2] // kv_heads, kv_heads, dim)
    return _attention(q, k_cache, v_cache, positions, page_table, o=o, s=s, interpret=interpret)
