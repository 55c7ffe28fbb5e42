"""The kernel of the Mosaic GPU matmul; its tree and its schedules stand in `mosaic_gpu`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.matmul.mosaic_gpu_buffers import (
    rows_view,
    store_pairs,
    store_rows,
    store_tile,
    two_views,
)
from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import (
    CHUNK,
    PRODUCER_REGISTERS,
    SHORT,
    Schedule,
)

# (gate, up, layout of both in registers, interpret) -> the result, of their dtype.
Gate = Callable[[jax.Array, jax.Array, Any, bool], jax.Array]


def _window(index: jax.Array, size: int, extent: int) -> jax.Array:
    """Where a tile begins: the last ones end with the extent, if they find room.

    What two tiles share is computed and written twice, alike. The copy engine is slow over rows
    that do not exist: 65 rows in tiles of 64 took nearly twice as long (h200-matmul-sweep.json).
    """
    return lax.min(index * size, jnp.int32(max(extent - size, 0)))


def _balanced(leaf_sum: Any, first: jax.Array, leaves: int, shape: tuple[int, int]) -> jax.Array:
    """Leaves first .. first + leaves - 1, added in a balanced binary tree of neighbours.

    Loops of two, so that one partial sum a level is alive and the compiler cannot put the
    additions off. They start from -0, to which adding changes no bit of anything.
    """
    if leaves == 1:
        return leaf_sum(first)

    def add(i, total):
        half = leaves // 2
        return total + _balanced(leaf_sum, first + i * half, half, shape)

    nothing = plgpu.layout_cast(jnp.full(shape, -0.0, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, 2, add, nothing)


def kernel(
    *refs: Any,
    s: Schedule,
    leaves: int,
    gate: Gate | None,
    interpret: bool,
    height: int | None = None,
    k_last: bool = True,
    parts: int = 1,
    products: int = 1,
) -> None:
    """The whole kernel; refs are x, w, bias if there is one, y; x, w and y may begin with a batch.

    With several `products`, refs are x, as many w and as many y: the walk goes over the tiles of
    the first, the second and so on, of as many columns as each has.

    With several `parts`, x and w begin with an axis of those, and a leaf is the sum of every part
    of x by every part of w, in this order of pairs, each over all of the leaf's K.

    w is [N, K], or [K, N] if not `k_last`: then it stands in shared memory as it lies, in squares
    of `CHUNK` by `CHUNK`, and wgmma reads those transposed.

    Grouped, with `height`: refs are x, w [E, ...], plan, tokens if not every row has an x of its
    own, y. Tiles of at most `height` rows of x stand in the plan, `grouped_matmul.mosaic_gpu.plan`:
    they may begin at any row, belong to one expert each, and store no row beyond their count. Those
    after the last group store zeros. With tokens a tile takes all of x, which has no more rows than
    the tile, and stores the rows of its group, each from the place of its token.
    """
    x_g, *bias_g = refs
    w_gs, bias_g, y_gs = bias_g[:products], bias_g[products:-products], bias_g[-products:]
    tokens_g = bias_g.pop() if height and len(bias_g) == 2 else None
    plan_g: Any = bias_g.pop() if height else None
    short = height == SHORT
    *batch, m, _ = y_gs[0].shape
    out_dtype, out_size = y_gs[0].dtype, jnp.dtype(y_gs[0].dtype).itemsize
    chunks = s.bk // CHUNK
    pair_steps = pl.cdiv(x_g.shape[-1], s.bk)
    leaf_steps = parts**2 * pair_steps
    steps = leaves * leaf_steps
    m_tiles = pl.cdiv(m, s.bm * s.cm)
    # Of each product, where its tiles of N begin; then where the last ones end.
    begins = [0]
    for y_g in y_gs:
        begins.append(begins[-1] + pl.cdiv(y_g.shape[-1], s.out_cols * s.cn))
    n_tiles = begins[-1]
    rows, cols = s.wg_tile
    out_rows, out_cols = s.out_tile
    matrices = 2 if s.gated else 1
    wgmmas = 1 if k_last else s.wg_tile[0 if s.kind == "swapped" else 1] // CHUNK
    put_rows, put_cols = s.stage_tile(out_size)
    slots = s.store_slots(out_size)
    squares = 0 if k_last else s.bn // CHUNK
    # Rows of x worth fetching. What shared memory happens to hold in the others of its tile
    # only reaches rows of y that do not exist.
    part = 8 * s.cn
    x_rows = height or min(s.bm, pl.cdiv(m, part) * part)
    barrier = functools.partial(plgpu.Barrier, num_barriers=s.stages)
    empty_barrier = barrier
    if s.cm * s.cn > 1:
        shared = tuple(a for a, size in (("cm", s.cm), ("cn", s.cn)) if size > 1)
        empty_barrier = functools.partial(
            plgpu.ClusterBarrier, collective_axes=shared, num_barriers=s.stages
        )

    def scope(x_s, w_s, full, empty, y_s: Any = None):
        (x_in, x_mma), (w_in, w_mma) = ((b, b) if interpret else b for b in (x_s, w_s))
        y_out, y_reg = (y_s, y_s) if interpret or plan_g is not None else y_s
        wg = lax.axis_index("wg")
        cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")

        def local(tiles):
            return lax.div(tiles * n_tiles - cluster + clusters - 1, clusters)

        tiles_of_one = m_tiles * n_tiles  # of an entry of the batch
        local_tiles = local(math.prod(batch) * m_tiles if plan_g is None else plan_g[0, 0])

        def entry(t):
            """The entry of the batch that a tile belongs to, as an index."""
            return (lax.div(cluster + t * clusters, tiles_of_one),) if batch else ()

        def planned(t):
            """Of a tile: its row of the plan, and its first column of y."""
            at = cluster + t * clusters
            row = lax.div(at, n_tiles)
            return row + 1, (at - row * n_tiles) * s.out_cols

        def place(t):
            """Of a tile without a plan: which of `m_tiles` and of `n_tiles` it is."""
            at = cluster + t * clusters
            if batch:
                at = lax.rem(at, tiles_of_one)
            if m_tiles == 1:
                return jnp.int32(0), at
            return plgpu.planar_snake(at, (m_tiles, n_tiles), 0, s.group)

        def row_of(t):
            """A tile's first row of x."""
            if plan_g is not None:
                return plan_g[planned(t)[0], 0]
            mi = place(t)[0] * s.cm + (lax.axis_index("cm") if s.cm > 1 else 0)
            return _window(mi, s.bm, m)

        def columns_of(t):
            """Of each product: whether it is the tile's, None if there is one alone, and the tile's
            first column there."""
            if plan_g is not None:
                return [(None, planned(t)[1])]
            _, ni = place(t)
            found = []
            for i, y_g in enumerate(y_gs):
                here = (ni >= begins[i]) & (ni < begins[i + 1]) if products > 1 else None
                column = (ni - begins[i]) * s.cn + (lax.axis_index("cn") if s.cn > 1 else 0)
                found.append((here, _window(column, s.out_cols, y_g.shape[-1])))
            return found

        def for_product(columns, f):
            """f(the tile's product, its first column there)."""
            for i, (here, column) in enumerate(columns):
                if here is None:
                    f(i, column)
                else:
                    pl.when(here)(functools.partial(f, i, column))

        def produce():
            if s.wgs > 1:
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load(srcs, dst, size, side, axis, matrices=1, squares=0):
                def tile(t, _):
                    if side == 1:
                        for_product(columns_of(t), functools.partial(fill, t))
                    else:
                        fill(t, 0, 0 if tokens_g is not None else row_of(t))

                def fill(t, product, row):
                    src, lead = srcs[product], entry(t)
                    if side == 1 and plan_g is not None:
                        lead = (plan_g[planned(t)[0], 2],)

                    def step(i, _):
                        at = t * steps + i
                        slot = lax.rem(at, s.stages)

                        @pl.when(at >= s.stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        leaf = pair = lax.div(i, pair_steps)
                        first = lead
                        if parts > 1:
                            leaf = lax.div(i, leaf_steps)
                            of_x = lax.div(pair - leaf * parts**2, parts)
                            first = (lax.rem(pair, parts) if side else of_x, *lead)
                        for c in range(chunks):
                            k0 = (i - pair * pair_steps) * s.bk + c * CHUNK
                            k_part = (leaf, pl.ds(k0, CHUNK)) if leaves > 1 else (pl.ds(k0, CHUNK),)
                            for j in range(squares):
                                plgpu.copy_gmem_to_smem(
                                    src.at[(*first, *k_part, pl.ds(row + j * CHUNK, CHUNK))],
                                    dst.at[slot, c, j],
                                    full.at[slot],
                                    collective_axes=axis,
                                )
                            for half in range(0 if squares else matrices):
                                which = (*first, half) if matrices > 1 else first
                                plgpu.copy_gmem_to_smem(
                                    src.at[(*which, pl.ds(row, size), *k_part)],
                                    dst.at[slot, c, pl.ds(half * size, size)],
                                    full.at[slot],
                                    collective_axes=axis,
                                )

                    lax.fori_loop(0, steps, step, None)

                lax.fori_loop(0, local_tiles, tile, None)

                # A block may not end while others of its cluster can still signal it.
                def drain(at, _):
                    plgpu.barrier_wait(empty.at[lax.rem(at, s.stages)])

                total = local_tiles * steps
                lax.fori_loop(lax.max(total - s.stages, 0), total, drain, None)

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    axis = "cm" if s.cm > 1 else None
                    load(w_gs, w_in, s.bn // matrices, 1, axis, matrices, squares)

                @pl.when(warp == 1)
                def _():
                    load([x_g], x_in, x_rows, 0, "cn" if s.cn > 1 else None)

        def multiply(acc, slot, c):
            """Adds `CHUNK` elements of K, in `wgmmas` instructions of as many parts of acc."""
            if k_last:
                a, b = (x_mma, w_mma) if s.kind == "normal" else (w_mma, x_mma)
                a, b = a.at[slot, c], b.at[slot, c]
                if s.split == "m":
                    a = a.at[pl.ds(wg * rows, rows)]
                else:
                    b = b.at[pl.ds(wg * cols, cols)]
                plgpu.wgmma(acc, a, b.transpose((1, 0)))
                return
            x, side = x_mma.at[slot, c], 0 if s.kind == "swapped" else 1
            splits_w = s.split == "mn"[side]
            if s.wgs > 1 and not splits_w:
                size = s.bm // s.wgs
                x = x.at[pl.ds(wg * size, size)]
            for j in range(wgmmas):
                square = w_mma.at[slot, c, wg * wgmmas + j if splits_w else j]
                here = pl.ds(j * CHUNK, CHUNK)
                part = (here, slice(None)) if side == 0 else (slice(None), here)
                to = acc.at[part] if wgmmas > 1 else acc
                if s.kind == "normal":
                    plgpu.wgmma(to, x, square)
                else:
                    plgpu.wgmma(to, square.transpose((1, 0)), x.transpose((1, 0)))

        def consume():
            if s.wgs > 1:
                plgpu.set_max_registers(s.consumer_registers, action="increase")

            def tile(t, group):
                if short:
                    # Read long before they are used: the loads do not hold up the products.
                    first, count = group
                    tokens = []
                    if tokens_g is not None:
                        tokens = [tokens_g[lax.min(first + i, m - 1)] for i in range(SHORT)]
                    following = group_of(lax.min(t + 1, local_tiles - 1))

                def leaf_sum(leaf):
                    begin = t * steps + leaf * leaf_steps

                    def accumulate(acc):
                        def step(i, _):
                            slot = lax.rem(begin + i, s.stages)
                            plgpu.barrier_wait(full.at[slot])
                            for c in range(chunks):
                                multiply(acc, slot, c)
                            plgpu.wgmma_wait(chunks * wgmmas)

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(empty.at[lax.rem(begin + i - 1, s.stages)])

                        lax.fori_loop(0, leaf_steps, step, None)
                        return acc[...]

                    value = pl.run_scoped(accumulate, plgpu.ACC((rows, cols), jnp.float32))
                    plgpu.barrier_arrive(empty.at[lax.rem(begin + leaf_steps - 1, s.stages)])
                    return value

                value = _balanced(leaf_sum, jnp.int32(0), leaves, (rows, cols))
                if not short:
                    return store(t, value)
                store_short(t, value, first, count, tokens)
                return following

            lax.fori_loop(0, local_tiles, tile, group_of(0) if short else None)
            if plan_g is not None:
                zeros = jnp.full((rows, cols), 0, jnp.float32)

                def rest(t, _):
                    value = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    if short:
                        store_short(t, value, *group_of(t), [])
                    else:
                        store(t, value)

                lax.fori_loop(local_tiles, local(plan_g[0, 1]), rest, None)
            if not short:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def group_of(t):
            """Of a tile: its first row of y, and how many it has."""
            at, _ = planned(t)
            return plan_g[at, 0], plan_g[at, 1]

        def store_short(t, value, first, count, tokens):
            """Rows of a tile in their order, or those of its tokens."""
            row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            if s.split == "m":
                row += wg * rows
            to = jnp.full_like(row, -1) if tokens else jnp.where(row < count, first + row, -1)
            for i, token in enumerate(tokens):
                to = jnp.where(row == jnp.where(i < count, token, -1), first + i, to)
            value = value.astype(out_dtype)
            if gate is not None:
                parts = value[:, :out_cols], value[:, cols - out_cols :]
                value = gate(*parts, plgpu.Layout.WGMMA, interpret)
            n0 = planned(t)[1] + (wg * cols if s.split == "n" else 0)
            store_pairs(value, y_gs[0], to, n0, interpret)

        def store(t, value):
            m_side = 0 if s.kind == "normal" else 1
            offsets = (wg * rows, 0) if s.split == "m" else (0, wg * cols)
            m0 = row_of(t) + offsets[m_side]
            columns = [(here, n0 + offsets[1 - m_side]) for here, n0 in columns_of(t)]
            if bias_g:
                along = plgpu.Layout.WGMMA.reduce(m_side)
                at = bias_g[0].at[pl.ds(columns[0][1], value.shape[1 - m_side])]
                bias = plgpu.load(at, layout=along, optimized=False).astype(jnp.float32)
                value = value + lax.broadcast_in_dim(bias, value.shape, (1 - m_side,))
            value = value.astype(out_dtype)
            high, wide = (put_rows, put_cols)[:: 1 if s.kind == "normal" else -1]
            pieces = [(r, c) for r in range(0, out_rows, high) for c in range(0, out_cols, wide)]
            for i, (r, c) in enumerate(pieces):
                plgpu.wait_smem_to_gmem(slots - 1 if i else 0, wait_read_only=True)
                piece = value[r : r + high, c : c + wide]
                if gate is not None:
                    r_up, c_up = r + rows - out_rows, c + cols - out_cols
                    up = value[r_up : r_up + high, c_up : c_up + wide]
                    piece = gate(piece, up, plgpu.Layout.WGMMA, interpret)
                if s.kind == "normal":
                    y_reg.at[wg, i % slots][...] = piece
                else:
                    if out_size == 4:  # 16-bit results are transposed by stmatrix
                        piece = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                    y_reg.at[wg, i % slots].transpose((1, 0))[...] = piece
                plgpu.commit_smem()
                m_at, n_at = (r, c) if s.kind == "normal" else (c, r)
                if plan_g is None:

                    def put(product, n0, src=y_out.at[wg, i % slots], m_at=m_at, n_at=n_at):
                        y_g = y_gs[product]
                        store_tile(src, y_g.at[entry(t)] if batch else y_g, m0 + m_at, n0 + n_at)

                    for_product(columns, put)
                    continue
                most = min(put_rows, x_rows)
                left = plan_g[planned(t)[0], 1] - offsets[0] - m_at
                count = lax.clamp(jnp.int32(0), left, jnp.int32(most))
                src, n0 = y_out.at[wg, i % slots, pl.ds(0, most)], columns[0][1] + n_at
                store_rows(src, y_gs[0], m0 + m_at, n0, count)
                if not interpret:  # which waits for every copy
                    plgpu.commit_smem_to_gmem_group()

        lax.cond(wg == s.wgs, produce, consume)

    staged = (
        {}
        if short
        else {
            "y_s": (two_views if plan_g is None else rows_view)(
                (s.wgs, slots, put_rows, put_cols), out_dtype, interpret
            )
        }
    )
    pl.run_scoped(
        scope,
        **staged,
        x_s=two_views((s.stages, chunks, s.bm, CHUNK), x_g.dtype, interpret),
        w_s=two_views(
            (s.stages, chunks, *((s.bn,) if k_last else (squares, CHUNK)), CHUNK),
            x_g.dtype,
            interpret,
        ),
        full=barrier(num_arrivals=(1 + (squares or matrices)) * chunks),
        empty=empty_barrier(num_arrivals=s.wgs),
        collective_axes="wg",
    )
