"""Attention for Hopper in Pallas Mosaic GPU: one tree, two ways to walk it.

See `reference.attention` for the op. bfloat16 or float16, head_dim 64 or 128, kv_split 64, 128 or
256, S a multiple of it. Positions of a row are consecutive, padding (-1) at its end only.

Tree (what the bits depend on):

- A query is one of 64 rows of a wgmma. Keys are cut at absolute positions into splits, a split
  into tiles of min(128, kv_split) keys.
- Scores of a tile: one float32 accumulator, over head_dim ascending, 16 elements at a time.
- m = (maximum of the split's scores, unseen ones -inf) * c, c = float32(scale * log2 e), rounded.
  p = ex2.approx.ftz(fma(score, c, -m)).
- l: the sum of p over a tile in the order of Mosaic's reduction of a [64, tile] wgmma layout
  (a thread's own elements, then its neighbours 1 and 2 lanes away); tiles are added ascending.
- o = p, rounded to v's dtype, times v: one float32 accumulator over the keys of the split,
  ascending, 16 at a time. Rows of v after the last key are zeros, whatever the cache holds.
- Splits are merged in ascending order, starting from (-inf, 0, 0): M = max(m, m'),
  a = ex2(m - M), b = ex2(m' - M), l = fma(l, a, l' * b), o = fma(o, a, o' * b). Merging a split
  without a key changes nothing, and merging into the start gives the split itself.
- The result is o / l (div.full), plus 0, rounded once; 0 where there is no key.

Products and sums that a compiler could fuse are single instructions of PTX (mosaic_gpu_merge).

Schedules (what the bits do not depend on; mosaic_gpu_schedules):

- `walked`: a block has 1 or 2 consumer warpgroups of 64 query rows (the heads that share keys x
  consecutive queries) and walks their splits in order; for prefill. Splits that all rows see
  in full are not masked.
- `spread`: 132 blocks take equal shares of all (row, head, split); each split is written alone,
  in float32, and `fold`, a second kernel, merges them in order. For decode: the blocks have
  equal work whatever the lengths.

Decode uses the same 64-row tile with few real rows: it waits for memory, not for the tensor core.
A producer warpgroup keeps a ring of tiles of keys and values full, in the order of use
(`cp.async.bulk.tensor`, one mbarrier a slot), across the ends of splits, heads and rows.

Budget: shared memory = a slot of 128 keys x 128 x 2 bytes = 32 KiB; 6 slots and 32 KiB of queries
(walked by 2), 5 slots, 2 x 16 KiB of queries and 16 KiB of results on their way out (spread),
under 227 KiB. Registers of a consumer thread: 128 of scores (then 64 of p and 64 of o'), 64 of
o, of 240 (walked by 2) or 255; at head_dim 128 ptxas spills 14 words (spread) or 281 (walked by
2), none at 64.

Sources: the PTX manual; FlashAttention-2 and -3 (split softmax, warp specialisation); FlashDecoding
(splits in parallel); jax's attention_mgpu.py for what Pallas offers. No code of theirs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention.mosaic_gpu_merge import (
    LANES,
    exact,
    fill,
    finish,
    fold_splits,
    merge,
)
from jdet.pallas_kernels.attention.mosaic_gpu_schedules import (
    ROWS,
    Schedule,
    Shape,
    default_schedule,
    schedules,
    shape_of,
    walk_block,
    walk_share,
)

__all__ = ["Schedule", "attention", "default_schedule", "schedules"]

_CHUNK = 64  # 16-bit elements in one 128-byte swizzle row
_PRODUCER_REGISTERS = 24
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
_TILED = (plgpu.TilingTransform((8, _CHUNK)), plgpu.SwizzleTransform(128))
_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def _union(shape: tuple[int, ...], tiled: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """A buffer as the copy engine sees it (rows of 128 bytes) and as wgmma and registers do."""
    row = plgpu.SwizzleTransform(128)
    width = 128 // jnp.dtype(dtype).itemsize
    view = plgpu.SMEM(tiled, dtype, transforms=(plgpu.TilingTransform((8, width)), row))
    if interpret:
        return view
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(row,)), view)


def _across(x: jax.Array, width: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (ROWS, width), (0,))


def _kernel(*refs: Any, s: Schedule, d: Shape, decode: bool, slots: int, interpret: bool) -> None:
    """Everything but the fold of a spread grid.

    rows_g: the position of each row of a tile; bounds_g: a tile's first and last position.
    """
    q_g, k_g, v_g, rows_g, bounds_g, o_g = refs
    spread = s.kind == "spread"
    chunks = d.dim // _CHUNK
    group = d.rows // d.queries
    split_slots = 2 * d.tiles
    length = q_g.shape[1]
    tiles = pl.cdiv(length, d.queries)
    q_slots = 2 if spread else s.wgs
    fma = functools.partial(exact, "fma.rn.f32", plgpu.Layout.WGMMA, interpret)
    fma_row = functools.partial(exact, "fma.rn.f32", _ROW_LAYOUT, interpret)

    def scope(q_s, kv_s, full, empty, q_full, q_empty, y_s: Any = None, p_s: Any = None):
        q_in, q_mma = (q_s, q_s) if interpret else q_s
        wg = lax.axis_index("wg")

        if spread:
            each_item = functools.partial(walk_share, bounds=bounds_g, d=d)
        else:
            each_item = functools.partial(walk_block, bounds=bounds_g, tiles=tiles, wgs=s.wgs, d=d)

        def q_copies(gmem, smem, row, head, slot, c):
            """Pairs of windows, chunk c of the queries' columns in tile `row` and in `slot`."""
            cols = pl.ds(c * _CHUNK, _CHUNK)
            if decode:
                return [(gmem.at[row, 0, head, :, cols], smem.at[slot, c, pl.ds(0, d.rows)])]
            batch, start = lax.div(row, tiles), lax.rem(row, tiles) * d.queries
            if not interpret:
                window = gmem.at[batch, pl.ds(start, d.queries), head, :, cols]
                return [(window, smem.at[slot, c])]
            return [
                (
                    gmem.at[batch, start + i, head, :, cols],
                    smem.at[slot, c, pl.ds(i * group, group)],
                )
                for i in range(d.queries)
            ]

        def produce():
            if s.wgs > 1:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

            def item(count, row, head, first, end, _):
                for i in range(s.wgs):
                    slot = lax.rem(count, 2) if spread else i
                    if spread:

                        @pl.when(count >= q_slots)
                        def _(slot=slot):
                            plgpu.barrier_wait(q_empty.at[slot])

                    # A tile past the last of its row is another row's, or nothing: never stored.
                    for c in range(chunks):
                        for src, dst in q_copies(q_g, q_in, row + i, head, slot, c):
                            plgpu.copy_gmem_to_smem(src, dst, q_full.at[slot if spread else 0])
                batch = row if decode else lax.div(row, tiles)
                begin = count * split_slots

                def split_loop(i, _):
                    for j in range(split_slots):
                        at = begin + (i - first) * split_slots + j
                        slot = lax.rem(at, slots)

                        @pl.when(at >= slots)
                        def _(slot=slot):
                            plgpu.barrier_wait(empty.at[slot])

                        src = k_g if j < d.tiles else v_g
                        key = i * d.kv_split + j % d.tiles * d.tile
                        plgpu.copy_gmem_to_smem(
                            src.at[batch, head, pl.ds(key, d.tile)], kv_s.at[slot], full.at[slot]
                        )

                lax.fori_loop(first, end, split_loop, None)

            splits = each_item(item)

            def drain(barrier, size, total):
                def wait(at, _):
                    plgpu.barrier_wait(barrier.at[lax.rem(at, size)])

                lax.fori_loop(lax.max(total - size, 0), total, wait, None)

            drain(empty, slots, splits * split_slots)
            if spread:
                drain(q_empty, 2, splits)

        def split(at, q_slot, start, limit, last_key):
            """(m, l, o) of one split, keys from `start`; `limit` masks, None if all are seen."""

            def slot_of(j):
                return lax.rem(at + j, slots)

            def score(*accs):
                for j, acc in enumerate(accs):
                    plgpu.barrier_wait(full.at[slot_of(j)])
                    for c in range(chunks):
                        k = kv_s.at[slot_of(j), :, pl.ds(c * _CHUNK, _CHUNK)]
                        plgpu.wgmma(acc, q_mma.at[q_slot, c], k.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return [acc[...] for acc in accs]

            acc = plgpu.ACC((ROWS, d.tile), jnp.float32)
            scores = pl.run_scoped(score, *[acc] * d.tiles)
            for j in range(d.tiles):
                plgpu.barrier_arrive(empty.at[slot_of(j)])
            if spread:
                plgpu.barrier_arrive(q_empty.at[q_slot])
            if limit is not None:
                for j in range(d.tiles):
                    key = (
                        start
                        + j * d.tile
                        + plgpu.broadcasted_iota(
                            jnp.int32, (ROWS, d.tile), 1, layout=plgpu.Layout.WGMMA
                        )
                    )
                    if limit.ndim:
                        limit_ = _across(limit, d.tile)
                    else:
                        limit_ = limit
                    scores[j] = jnp.where(key <= limit_, scores[j], -jnp.inf)
            m = scores[0].max(axis=1)
            for x in scores[1:]:
                m = jnp.maximum(m, x.max(axis=1))
            m = exact("mul.rn.f32", _ROW_LAYOUT, interpret, m, d.factor)
            base = m if limit is None else jnp.where(m == -jnp.inf, 0.0, m)
            total: Any = None
            p = []
            for x in scores:
                x = jnp.exp2(fma(x, d.factor, _across(-base, d.tile)))
                part = x.sum(axis=1)
                total = part if total is None else total + part
                p.append(x.astype(q_g.dtype))

            def weigh(acc):
                for j in range(d.tiles):
                    slot = slot_of(d.tiles + j)
                    plgpu.barrier_wait(full.at[slot])
                    if limit is not None:
                        clear(slot, last_key - start - j * d.tile)
                    weights = p[j]
                    if interpret:  # the simulator's wgmma takes no registers
                        p_s.at[wg][...] = p[j]
                        weights = p_s.at[wg]
                    plgpu.wgmma(acc, weights, kv_s.at[slot])
                plgpu.wgmma_wait(0)
                return acc[...]

            out = pl.run_scoped(weigh, plgpu.ACC((ROWS, d.dim), jnp.float32))
            for j in range(d.tiles):
                plgpu.barrier_arrive(empty.at[slot_of(d.tiles + j)])
            return m, total, [out]

        def clear(slot, last):
            """Zeros the rows of V after `last`: nobody has written them."""
            for r in range(0, d.tile, ROWS):

                @pl.when(last < r + ROWS - 1)
                def _(r=r):
                    part = kv_s.at[slot, pl.ds(r, ROWS)]
                    row = r + plgpu.broadcasted_iota(
                        jnp.int32, (ROWS, d.dim), 0, layout=plgpu.Layout.WGMMA
                    )
                    v = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=True)
                    part[...] = jnp.where(row <= last, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

        def row_limit(row):
            if decode:
                return bounds_g[row, 1]
            return plgpu.load(rows_g.at[row], layout=_ROW_LAYOUT, optimized=False)

        def consume_walked():
            def item(_, row, head, first, end, high):
                slot = wg if s.wgs > 1 else 0
                tile = lax.rem(row, tiles) + slot
                mine = row + jnp.where(tile < tiles, slot, 0)
                limit = row_limit(mine)
                plgpu.barrier_wait(q_full.at[0])
                whole = lax.min(lax.div(bounds_g[mine, 0] + 1, d.kv_split), end)

                def step(masked):
                    def body(i, state):
                        m, total, out = state
                        part = split(
                            i * split_slots,
                            slot,
                            i * d.kv_split,
                            limit if masked else None,
                            high,
                        )
                        m, total, out = merge(
                            (m, total, [out]), part, fma, fma_row, lambda x: _across(x, d.dim)
                        )
                        return m, total, out[0]

                    return body

                state = (
                    fill((ROWS,), -jnp.inf, _ROW_LAYOUT),
                    fill((ROWS,), 0.0, _ROW_LAYOUT),
                    fill((ROWS, d.dim), 0.0, plgpu.Layout.WGMMA),
                )
                state = lax.fori_loop(0, whole, step(False), state)
                _, total, out = lax.fori_loop(whole, end, step(True), state)
                if not decode:
                    total = jnp.where(limit < 0, 0.0, total)
                out = finish(_across(total, d.dim), out).astype(o_g.dtype)
                for c in range(chunks):
                    q_mma.at[slot, c][...] = out[:, c * _CHUNK : (c + 1) * _CHUNK]
                plgpu.commit_smem()

                @pl.when(tile < tiles)
                def _():
                    for c in range(chunks):
                        for dst, src in q_copies(o_g, q_in, mine, head, slot, c):
                            plgpu.copy_smem_to_gmem(src, dst)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            each_item(item)

        def consume_spread():
            y_out, y_reg = (y_s, y_s) if interpret else y_s

            def item(count, row, head, first, _, high):
                slot = lax.rem(count, 2)
                limit = row_limit(row)
                plgpu.barrier_wait(q_full.at[slot])
                m, total, (out,) = split(count * split_slots, slot, first * d.kv_split, limit, high)
                pieces = [out[:, c : c + LANES] for c in range(0, d.dim, LANES)]
                pieces += [_across(m, LANES), _across(total, LANES)]
                for c, piece in enumerate(pieces):
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    y_reg.at[c % 2][...] = piece
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        y_out.at[c % 2, pl.ds(0, d.rows)],
                        o_g.at[row, first, c, pl.ds(head * d.rows, d.rows)],
                    )

            each_item(item)
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

        def consume():
            if s.wgs > 1:
                plgpu.set_max_registers(240, action="increase")
            (consume_spread if spread else consume_walked)()

        lax.cond(wg == s.wgs, produce, consume)

    shape = (ROWS, _CHUNK) if decode else (d.queries, group, _CHUNK)
    barrier = plgpu.Barrier
    q_arrivals = s.wgs * chunks * (d.queries if interpret else 1)
    scratch = dict(
        q_s=_union(
            (q_slots, chunks, *shape), (q_slots, chunks, ROWS, _CHUNK), q_g.dtype, interpret
        ),
        kv_s=plgpu.SMEM((slots, d.tile, d.dim), q_g.dtype, transforms=_TILED),
        full=barrier(num_barriers=slots),
        empty=barrier(num_arrivals=s.wgs, num_barriers=slots),
        q_full=barrier(num_arrivals=q_arrivals, num_barriers=2 if spread else 1),
        q_empty=barrier(num_barriers=2),
    )
    if spread:
        scratch["y_s"] = _union((2, ROWS, LANES), (2, ROWS, LANES), jnp.float32, interpret)
    if interpret:
        scratch["p_s"] = plgpu.SMEM((s.wgs, ROWS, d.tile), q_g.dtype, transforms=_TILED)
    pl.run_scoped(scope, **scratch, collective_axes="wg")


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("scale", "kv_split", "s", "interpret"))
def _attention(q, k_cache, v_cache, positions, *, scale, kv_split, s, interpret):
    batch, length, heads, dim = q.shape
    kv_heads, cache = k_cache.shape[1:3]
    group, decode, spread = heads // kv_heads, length == 1, s.kind == "spread"
    d = shape_of(length, group, kv_heads, dim, kv_split, scale)
    queries, padded = d.queries, d.rows // d.queries
    tiles = pl.cdiv(length, queries)
    q = q.reshape(batch, length, kv_heads, group, dim)
    missing = tiles * queries - length if interpret else 0  # the simulator clips nothing
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, padded - group), (0, 0)))
    p = jnp.pad(positions, ((0, 0), (0, tiles * queries - length)), constant_values=-1)
    p = p.reshape(batch * tiles, queries)
    bounds = jnp.stack([p[:, 0], p.max(axis=1)], axis=1) if not decode else jnp.tile(p, (1, 2))
    rows = jnp.repeat(p, ROWS // queries, axis=1) if not decode else p
    if spread:
        out_type = d.parts(batch * tiles, cache // kv_split)
        grid = s.blocks
    else:
        out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
        grid = batch * pl.cdiv(tiles, s.wgs) * kv_heads
    params: dict[str, Any] = dict(
        compiler_params=plgpu.CompilerParams(approx_math=True), interpret=interpret or None
    )
    out = plgpu.kernel(
        functools.partial(
            _kernel, s=s, d=d, decode=decode, slots=s.slots(d), interpret=bool(interpret)
        ),
        out_type=out_type,
        grid=(grid,),
        grid_names=("block",),
        num_threads=s.wgs + 1,
        thread_name="wg",
        kernel_name="jdet_attention",
        **params,
    )(q, k_cache, v_cache, rows, bounds)
    if spread:
        out = fold_splits(out, bounds, d=d, s=s, dtype=q.dtype, **params)
        if not decode:
            out = out.reshape(batch, tiles, kv_heads, queries, padded, dim)
            out = out.transpose(0, 1, 3, 2, 4, 5)
            out = out.reshape(batch, tiles * queries, kv_heads, padded, dim)
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
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    batch, length, heads, dim = q.shape
    kv_heads, cache = k_cache.shape[1:3]
    if k_cache.shape != (batch, kv_heads, cache, dim) or v_cache.shape != k_cache.shape:
        raise ValueError(f"caches {k_cache.shape}, {v_cache.shape} do not go with q {q.shape}")
    if positions.shape != (batch, length) or heads % kv_heads or cache % kv_split:
        raise ValueError(
            f"q {q.shape} wants positions {(batch, length)}, heads in multiples of {kv_heads} and"
            f" {cache} slots in multiples of {kv_split}; positions are {positions.shape}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"one dtype, not {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if q.dtype not in _OPERANDS or dim not in (64, 128) or heads // kv_heads > ROWS:
        raise NotImplementedError(
            f"mosaic_gpu attention takes bfloat16 or float16, head_dim 64 or 128 and at most {ROWS}"
            f" heads to a key head, got {q.dtype}, {dim}, {heads // kv_heads}"
        )
    if kv_split not in (64, 128, 256) or scale <= 0:
        raise NotImplementedError(
            f"mosaic_gpu attention takes kv_split 64, 128 or 256 and a positive scale, got"
            f" {kv_split}, {scale}"
        )
    s = schedule or default_schedule(batch, length, heads, kv_heads)
    if length == 1:
        s = dataclasses.replace(s, wgs=1)
    return _attention(
        q, k_cache, v_cache, positions, scale=scale, kv_split=kv_split, s=s, interpret=interpret
    )
