"""WIP"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import CHUNK, PRODUCER_REGISTERS as _PRODUCER_REGISTERS, SMS, Schedule


def _balanced(leaf_sum, first, leaves, shape):
    """Leaves first .. first + leaves - 1, added in a balanced binary tree of neighbours.

    Loops of two, so that only one partial sum a level is alive. A sum that started at +0 is
    never -0, hence adding the first half to +0 changes no bit.
    """
    if leaves == 1:
        return leaf_sum(first)

    def add(i, total):
        half = leaves // 2
        return total + _balanced(leaf_sum, first + i * half, half, shape)

    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, 2, add, zero)


def _views(shape, dtype, interpret):
    """One buffer seen twice: by the copy engine (untiled) and by registers and wgmma (tiled)."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    width = swizzle // itemsize
    tiling = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle))
    tiled = plgpu.SMEM(shape, dtype, transforms=tiling)
    if interpret:
        return tiled
    if shape[-1] > width:
        *lead, rows, cols = shape
        shape = (*lead, rows // 8, cols // width, 8, width)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(swizzle),)), tiled
    )


def _put(src, dst, row, col):
    """Starts the copies of `src` to `dst` at (row, col); what lies outside of `dst` is dropped."""
    if len(src.shape) == 2:
        plgpu.copy_smem_to_gmem(src, dst.at[pl.ds(row, src.shape[0]), pl.ds(col, src.shape[1])])
        return
    down, across, rows, cols = src.shape
    for i in range(down):
        for j in range(across):
            to = dst.at[pl.ds(row + i * rows, rows), pl.ds(col + j * cols, cols)]
            last = (i, j) == (down - 1, across - 1)
            plgpu.copy_smem_to_gmem(src.at[i, j], to, commit_group=last)


def _kernel(x_g, w_g, *rest, s: Schedule, leaves, has_bias, interpret):
    bias_g, o_g = rest if has_bias else (None, rest[0])
    m, n = o_g.shape
    per_leaf = x_g.shape[-1]
    kc = s.bk // CHUNK
    leaf_steps = pl.cdiv(per_leaf, s.bk)
    steps = leaves * leaf_steps
    mt, nt = pl.cdiv(m, s.bm * s.cm), pl.cdiv(n, s.bn * s.cn)
    tiles = mt * nt
    out_dtype = o_g.dtype
    itemsize = jnp.dtype(out_dtype).itemsize
    rows, cols = s.wg_tile
    och_m, och_n = s.stage_tile(itemsize)
    slots = s.store_slots(itemsize)
    # Rows of x worth fetching; the rest of the tile is never read from memory, and what
    # shared memory happens to hold there only reaches rows of y that do not exist.
    part = 8 * s.cn
    fetch_m = s.bm if mt > 1 or s.cm > 1 else min(s.bm, pl.cdiv(m, part) * part)
    clustered = s.cm * s.cn > 1
    if clustered:
        axes = tuple(a for a, size in (("cm", s.cm), ("cn", s.cn)) if size > 1)
        empty_type = plgpu.ClusterBarrier(
            collective_axes=axes, num_arrivals=s.wgs, num_barriers=s.stages)
    else:
        empty_type = plgpu.Barrier(num_arrivals=s.wgs, num_barriers=s.stages)

    def scope(x_s, w_s, o_s, full, empty):
        (x_c, x_w) = (x_s, x_s) if interpret else x_s
        (w_c, w_w) = (w_s, w_s) if interpret else w_s
        (o_c, o_w) = (o_s, o_s) if interpret else o_s
        wg = lax.axis_index("wg")
        cluster = lax.axis_index("cluster")
        local = lax.div(tiles - cluster + lax.axis_size("cluster") - 1, lax.axis_size("cluster"))

        def tile_origin(t):
            q = cluster + t * lax.axis_size("cluster")
            if mt == 1:
                mi, ni = jnp.int32(0), q
            else:
                mi, ni = plgpu.planar_snake(q, (mt, nt), 0, s.group)
            m0 = (mi * s.cm + (lax.axis_index("cm") if s.cm > 1 else 0)) * s.bm
            n0 = (ni * s.cn + (lax.axis_index("cn") if s.cn > 1 else 0)) * s.bn
            return m0, n0

        def produce():
            if s.wgs > 1:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            total = local * steps

            def load(src, dst, size, origin, axis):
                def tile(t, _):
                    row = tile_origin(t)[origin]

                    def step(i, _):
                        it = t * steps + i
                        slot = lax.rem(it, s.stages)

                        @pl.when(it >= s.stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        for c in range(kc):
                            if leaves > 1:
                                leaf = lax.div(i, leaf_steps)
                                k0 = (i - leaf * leaf_steps) * s.bk + c * CHUNK
                                at = (leaf, pl.ds(k0, CHUNK))
                            else:
                                at = (pl.ds(i * s.bk + c * CHUNK, CHUNK),)
                            plgpu.copy_gmem_to_smem(
                                src.at[(pl.ds(row, size), *at)], dst.at[slot, c, pl.ds(0, size)],
                                full.at[slot], collective_axes=axis)
                        return None

                    lax.fori_loop(0, steps, step, None)

                lax.fori_loop(0, local, tile, None)

                def drain(it, _):
                    plgpu.barrier_wait(empty.at[lax.rem(it, s.stages)])
                    return None

                lax.fori_loop(lax.max(total - s.stages, 0), total, drain, None)

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    load(w_g, w_c, s.bn, 1, "cm" if s.cm > 1 else None)

                @pl.when(warp == 1)
                def _():
                    load(x_g, x_c, fetch_m, 0, "cn" if s.cn > 1 else None)

        def consume():
            if s.wgs > 1:
                plgpu.set_max_registers(s.consumer_registers, action="increase")

            def tile(t, _):
                m0, n0 = tile_origin(t)

                def leaf_sum(leaf):
                    base = t * steps + leaf * leaf_steps

                    def accumulate(acc):
                        def step(i, _):
                            slot = lax.rem(base + i, s.stages)
                            plgpu.barrier_wait(full.at[slot])
                            for c in range(kc):
                                a, b = (x_w, w_w) if s.kind == "normal" else (w_w, x_w)
                                if s.split == "m":
                                    a = a.at[slot, c, pl.ds(wg * rows, rows)]
                                    b = b.at[slot, c]
                                else:
                                    a = a.at[slot, c]
                                    b = b.at[slot, c, pl.ds(wg * cols, cols)]
                                plgpu.wgmma(acc, a, b.transpose((1, 0)))
                            plgpu.wgmma_wait(kc)

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(empty.at[lax.rem(base + i - 1, s.stages)])
                            return None

                        lax.fori_loop(0, leaf_steps, step, None)
                        return acc[...]

                    value = pl.run_scoped(accumulate, plgpu.ACC((rows, cols), jnp.float32))
                    plgpu.barrier_arrive(empty.at[lax.rem(base + leaf_steps - 1, s.stages)])
                    return value

                value = _balanced(leaf_sum, jnp.int32(0), leaves, (rows, cols))
                store(value, m0, n0)
                return None

            lax.fori_loop(0, local, tile, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(value, m0, n0):
            a0 = wg * rows if s.split == "m" else 0
            b0 = wg * cols if s.split == "n" else 0
            m0, n0 = (m0 + a0, n0 + b0) if s.kind == "normal" else (m0 + b0, n0 + a0)
            if bias_g is not None:
                dim = 1 if s.kind == "normal" else 0
                bias = plgpu.load(
                    bias_g.at[pl.ds(n0, value.shape[dim])],
                    layout=plgpu.Layout.WGMMA.reduce(1 - dim), optimized=False)
                value = value + lax.broadcast_in_dim(bias.astype(jnp.float32), value.shape, (dim,))
            value = value.astype(out_dtype)
            if s.kind == "normal":
                pieces = [(r, c) for r in range(0, rows, och_m) for c in range(0, cols, och_n)]
            else:
                pieces = [(0, c) for c in range(0, rows, och_n)]
            for i, (r, c) in enumerate(pieces):
                slot = i % slots
                plgpu.wait_smem_to_gmem(slots - 1 if i else 0, wait_read_only=True)
                if s.kind == "normal":
                    o_w.at[wg, slot][...] = value[r : r + och_m, c : c + och_n]
                else:
                    piece = plgpu.layout_cast(value[c : c + och_n], plgpu.Layout.WGMMA_TRANSPOSED) if itemsize == 4 else value[c : c + och_n]
                    o_w.at[wg, slot].transpose((1, 0))[...] = piece
                plgpu.commit_smem()
                _put(o_c.at[wg, slot], o_g, m0 + r, n0 + c)

        lax.cond(wg == s.wgs, produce, consume)

    pl.run_scoped(
        scope,
        x_s=_views((s.stages, kc, s.bm, CHUNK), x_g.dtype, interpret),
        w_s=_views((s.stages, kc, s.bn, CHUNK), x_g.dtype, interpret),
        o_s=_views((s.wgs, slots, och_m, och_n), out_dtype, interpret),
        full=plgpu.Barrier(num_arrivals=2 * kc, num_barriers=s.stages),
        empty=empty_type,
        collective_axes="wg",
    )


@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "interpret"))
def _matmul(x, w, bias, *, leaves, out_dtype, s, interpret):
    m, k = x.shape
    n = w.shape[0]
    if leaves > 1:
        x = x.reshape(m, leaves, k // leaves)
        w = w.reshape(n, leaves, k // leaves)
    tiles = pl.cdiv(m, s.bm * s.cm) * pl.cdiv(n, s.bn * s.cn)
    if bias is not None:
        bias = jnp.pad(bias, (0, -n % (s.bn * s.cn)))
    body = functools.partial(
        _kernel, s=s, leaves=leaves, has_bias=bias is not None, interpret=bool(interpret))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(min(tiles, SMS // (s.cm * s.cn)),),
        grid_names=("cluster",),
        cluster=(s.cn, s.cm) if s.cm * s.cn > 1 else (),
        cluster_names=("cn", "cm") if s.cm * s.cn > 1 else (),
        num_threads=s.wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or None,
    )
    return kernel(*((x, w) if bias is None else (x, w, bias)))


def matmul(x, w, *, bias=None, leaves=1, out_dtype=None, schedule=None, interpret=False):
    return _matmul(x, w, bias, leaves=leaves, out_dtype=jnp.dtype(out_dtype or x.dtype), s=schedule, interpret=interpret)
