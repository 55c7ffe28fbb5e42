"""Matmul for Hopper in Pallas Mosaic GPU: one tree, many schedules.

y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]), weights stored as checkpoints store
them. bfloat16 or float16 operands.

Tree (what the bits depend on):

- K is cut into `leaves` equal parts. A part is one float32 accumulator of the tensor core,
  fed 16 elements of K at a time, ascending, by `wgmma` with K = 16; a part whose length is
  no multiple of 16 ends in zeros. The order inside the 16 belongs to the hardware.
- The sums of the parts are added in a balanced binary tree of neighbours, in float32.
- Then the bias is added in float32, and the result is rounded once to `out_dtype`.

Nothing else touches an element: no split of K over blocks, no atomics, no second kernel.

Schedules (what the bits do not depend on; `Schedule` in mosaic_gpu_schedules.py): tiles, the
orientation, the pipeline's depth, the number of consumers, clusters, the order of the tiles.
That a row of y has the same bits under every schedule and for every M was measured, not
promised by a vendor: scripts/check_gpu.py repeats the measurement.

- `normal`: x is wgmma's A (M side, 64 rows or more), w its B. Rows of x beyond M are not
  read: the copy engine clips them, and rows of y beyond M are clipped by the store.
- `swapped`: w is A, x is B with 8, 16, 32, ... rows; the accumulator holds y transposed,
  and is transposed back on its way to shared memory (`stmatrix.trans` for 16-bit results).

The kernel: a persistent grid of at most one block an SM walks the tiles of y. A producer
warpgroup keeps a ring of `stages` buffers full: its warp 0 copies tiles of w, its warp 1
tiles of x (`cp.async.bulk.tensor`, completion on one mbarrier a buffer), running ahead over
the ends of tiles, so that one tile's epilogue hides the next one's first loads. One to three
consumer warpgroups each own an accumulator in registers, leave one step's wgmmas in flight
and hand a buffer back when the next step has been issued. In a cluster of `cm x cn` blocks,
a tile of w is fetched once for the `cm` blocks that use it and multicast, a tile of x once
for `cn`.

`matmul_gated` is the same kernel with an elementwise gate of two results in its epilogue: w is
[2 F, K], read as [2, F, K], and a tile of w is bn / 2 rows of each half, one below the other in
shared memory. So one accumulator holds both results of a pair, in one thread; they are rounded
as `matmul` rounds them before the gate sees them.

Ragged edges: every dimension is clipped by the copy engine (zeros in, nothing out), K at the
end of each part because x and w are viewed as [rows, leaves, K / leaves]. For that the
engine has to see an untiled buffer, while wgmma has to see tiles of 8 rows; with 64 columns
of 16 bits (one 128-byte swizzle row) both are the same bytes, so each buffer is a union of
the two views. K / leaves must be a multiple of 8 (16-byte strides); N that is none is
computed in a wider y and cut by XLA.

Budget: shared memory = stages * bk * (bm + bn) * 2 bytes for the ring, and per consumer one
or two buffers of 64 rows by up to 128 bytes (normal) or bm rows by 64 results (swapped) for the
store, under 227 KiB. Registers = bm * bn / (128 * wgs) for an accumulator, times
log2(leaves) + 1 for the partial sums, of 255 / 232 / 152 with 1 / 2 / 3 consumers.
`Schedule.fits` checks both; ptxas reports no spill for a registered schedule, but for 16 bytes
in the 256 x 192 tile that is not gated.

Sources: the PTX manual (wgmma, cp.async.bulk.tensor, mbarrier); JAX's Pallas Mosaic GPU guide
and its Hopper matmul (jax/experimental/pallas/ops/gpu/hopper_matmul_mgpu.py) for the shape of a
persistent warp-specialised kernel; CUTLASS's sm90 pipelines for releasing multicast buffers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import (
    CHUNK,
    PRODUCER_REGISTERS,
    Schedule,
    default_schedule,
    schedules,
)

__all__ = ["Schedule", "default_schedule", "matmul", "matmul_gated", "schedules"]

# (gate, up, layout of both in registers, interpret) -> the result, of their dtype.
Gate = Callable[[jax.Array, jax.Array, Any, bool], jax.Array]

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def _two_views(shape: tuple[int, ...], dtype: DTypeLike, interpret: bool) -> Any:
    """A buffer as the copy engine sees it (untiled) and as registers and wgmma do (tiled).

    Interpret mode knows no transforms, and keeps the members of a union apart: there both
    views are one plain buffer.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    width = swizzle // itemsize
    row = plgpu.SwizzleTransform(swizzle)
    tiled = plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), row))
    if interpret:
        return tiled
    if shape[-1] > width:
        *lead, rows, cols = shape
        shape = (*lead, rows // 8, cols // width, 8, width)
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(row,)), tiled)


def _put(src: Any, dst: Any, row: jax.Array, col: jax.Array) -> None:
    """Starts the copy of `src` to `dst` at (row, col); what lies outside of `dst` is dropped."""
    if len(src.shape) == 2:
        rows, cols = src.shape
        plgpu.copy_smem_to_gmem(src, dst.at[pl.ds(row, rows), pl.ds(col, cols)])
        return
    down, across, rows, cols = src.shape
    for i in range(down):
        for j in range(across):
            to = dst.at[pl.ds(row + i * rows, rows), pl.ds(col + j * cols, cols)]
            last = (i, j) == (down - 1, across - 1)
            plgpu.copy_smem_to_gmem(src.at[i, j], to, commit_group=last)


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


def _kernel(*refs: Any, s: Schedule, leaves: int, gate: Gate | None, interpret: bool) -> None:
    """The whole kernel; refs are x, w, bias if there is one, y."""
    x_g, w_g, *bias_g, y_g = refs
    m, n = y_g.shape
    out_dtype, out_size = y_g.dtype, jnp.dtype(y_g.dtype).itemsize
    chunks = s.bk // CHUNK
    leaf_steps = pl.cdiv(x_g.shape[-1], s.bk)
    steps = leaves * leaf_steps
    m_tiles, n_tiles = pl.cdiv(m, s.bm * s.cm), pl.cdiv(n, s.out_cols * s.cn)
    rows, cols = s.wg_tile
    out_rows, out_cols = s.out_tile
    matrices = 2 if s.gated else 1
    put_rows, put_cols = s.stage_tile(out_size)
    slots = s.store_slots(out_size)
    # Rows of x worth fetching. What shared memory happens to hold in the others of its tile
    # only reaches rows of y that do not exist.
    part = 8 * s.cn
    x_rows = min(s.bm, pl.cdiv(m, part) * part) if m_tiles * s.cm == 1 else s.bm
    barrier = functools.partial(plgpu.Barrier, num_barriers=s.stages)
    empty_barrier = barrier
    if s.cm * s.cn > 1:
        shared = tuple(a for a, size in (("cm", s.cm), ("cn", s.cn)) if size > 1)
        empty_barrier = functools.partial(
            plgpu.ClusterBarrier, collective_axes=shared, num_barriers=s.stages
        )

    def scope(x_s, w_s, y_s, full, empty):
        (x_in, x_mma), (w_in, w_mma), (y_out, y_reg) = (
            (b, b) if interpret else b for b in (x_s, w_s, y_s)
        )
        wg = lax.axis_index("wg")
        cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
        local_tiles = lax.div(m_tiles * n_tiles - cluster + clusters - 1, clusters)

        def tile_origin(t):
            at = cluster + t * clusters
            if m_tiles == 1:
                mi, ni = jnp.int32(0), at
            else:
                mi, ni = plgpu.planar_snake(at, (m_tiles, n_tiles), 0, s.group)
            mi = mi * s.cm + (lax.axis_index("cm") if s.cm > 1 else 0)
            ni = ni * s.cn + (lax.axis_index("cn") if s.cn > 1 else 0)
            return mi * s.bm, ni * s.out_cols

        def produce():
            if s.wgs > 1:
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load(src, dst, size, side, axis, matrices=1):
                def tile(t, _):
                    row = tile_origin(t)[side]

                    def step(i, _):
                        at = t * steps + i
                        slot = lax.rem(at, s.stages)

                        @pl.when(at >= s.stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        leaf = lax.div(i, leaf_steps)
                        for c in range(chunks):
                            k0 = (i - leaf * leaf_steps) * s.bk + c * CHUNK
                            k_part = (leaf, pl.ds(k0, CHUNK)) if leaves > 1 else (pl.ds(k0, CHUNK),)
                            for half in range(matrices):
                                which = (half,) if matrices > 1 else ()
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
                    load(w_g, w_in, s.bn // matrices, 1, axis, matrices)

                @pl.when(warp == 1)
                def _():
                    load(x_g, x_in, x_rows, 0, "cn" if s.cn > 1 else None)

        def operands(slot, c):
            a, b = (x_mma, w_mma) if s.kind == "normal" else (w_mma, x_mma)
            if s.split == "m":
                return a.at[slot, c, pl.ds(wg * rows, rows)], b.at[slot, c]
            return a.at[slot, c], b.at[slot, c, pl.ds(wg * cols, cols)]

        def consume():
            if s.wgs > 1:
                plgpu.set_max_registers(s.consumer_registers, action="increase")

            def tile(t, _):
                def leaf_sum(leaf):
                    begin = t * steps + leaf * leaf_steps

                    def accumulate(acc):
                        def step(i, _):
                            slot = lax.rem(begin + i, s.stages)
                            plgpu.barrier_wait(full.at[slot])
                            for c in range(chunks):
                                a, b = operands(slot, c)
                                plgpu.wgmma(acc, a, b.transpose((1, 0)))
                            plgpu.wgmma_wait(chunks)

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(empty.at[lax.rem(begin + i - 1, s.stages)])

                        lax.fori_loop(0, leaf_steps, step, None)
                        return acc[...]

                    value = pl.run_scoped(accumulate, plgpu.ACC((rows, cols), jnp.float32))
                    plgpu.barrier_arrive(empty.at[lax.rem(begin + leaf_steps - 1, s.stages)])
                    return value

                store(_balanced(leaf_sum, jnp.int32(0), leaves, (rows, cols)), *tile_origin(t))

            lax.fori_loop(0, local_tiles, tile, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(value, m0, n0):
            m_side = 0 if s.kind == "normal" else 1
            offsets = (wg * rows, 0) if s.split == "m" else (0, wg * cols)
            m0, n0 = m0 + offsets[m_side], n0 + offsets[1 - m_side]
            if bias_g:
                along = plgpu.Layout.WGMMA.reduce(m_side)
                at = bias_g[0].at[pl.ds(n0, value.shape[1 - m_side])]
                bias = plgpu.load(at, layout=along, optimized=False).astype(jnp.float32)
                value = value + lax.broadcast_in_dim(bias, value.shape, (1 - m_side,))
            value = value.astype(out_dtype)
            high, wide = (put_rows, put_cols) if s.kind == "normal" else (put_cols, cols)
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
                _put(y_out.at[wg, i % slots], y_g, m0 + m_at, n0 + n_at)

        lax.cond(wg == s.wgs, produce, consume)

    pl.run_scoped(
        scope,
        x_s=_two_views((s.stages, chunks, s.bm, CHUNK), x_g.dtype, interpret),
        w_s=_two_views((s.stages, chunks, s.bn, CHUNK), x_g.dtype, interpret),
        y_s=_two_views((s.wgs, slots, put_rows, put_cols), out_dtype, interpret),
        full=barrier(num_arrivals=(1 + matrices) * chunks),
        empty=empty_barrier(num_arrivals=s.wgs),
        collective_axes="wg",
    )


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "interpret"))
def _matmul(x, w, bias, *, leaves, out_dtype, s, gate, interpret):
    m, k = x.shape
    n = w.shape[0]
    if gate is not None:
        n //= 2
        w = w.reshape(2, n, k)
    if leaves > 1:
        x = x.reshape(m, leaves, k // leaves)
        w = w.reshape(n, leaves, k // leaves)
    lane = 16 // out_dtype.itemsize
    wide = pl.cdiv(n, lane) * lane  # rows of y must start at multiples of 16 bytes
    args = (x, w)
    if bias is not None:
        args += (jnp.pad(bias, (0, -n % (s.bn * s.cn))),)
    clusters = pl.cdiv(m, s.bm * s.cm) * pl.cdiv(wide, s.out_cols * s.cn)
    clustered = s.cm * s.cn > 1
    y = plgpu.kernel(
        functools.partial(_kernel, s=s, leaves=leaves, gate=gate, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((m, wide), out_dtype),
        grid=(min(clusters, s.resident),),
        grid_names=("cluster",),
        cluster=(s.cn, s.cm) if clustered else (),
        cluster_names=("cn", "cm") if clustered else (),
        num_threads=s.wgs + 1,
        thread_name="wg",
        kernel_name="jdet_matmul" if gate is None else "jdet_gated_matmul",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or None,
    )(*args)
    return y[:, :n] if wide > n else y


def _check_operands(x: jax.Array, w: jax.Array, leaves: int = 1) -> None:
    """Raise unless x [M, K] and w [N, K] are what the kernel multiplies."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x [M, K] and w [N, K] must share K, got {x.shape} and {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must share a dtype, got {x.dtype} and {w.dtype}")
    k = x.shape[1]
    if leaves < 1 or leaves & (leaves - 1) or k % leaves:
        raise ValueError(f"leaves must be a power of two that divides K = {k}, got {leaves}")
    if x.dtype not in _OPERANDS:
        raise NotImplementedError(f"mosaic_gpu matmul takes bfloat16 or float16, got {x.dtype}")
    if k == 0 or (k // leaves) % 8:
        raise NotImplementedError(
            f"mosaic_gpu matmul needs K / leaves in multiples of 8, got {k} / {leaves}"
        )


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, N] = x[M, K] @ w[N, K]^T + bias[N]; see the module for the tree.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [N, K], of x's dtype.
      bias: [N], any float dtype; added in float32.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; a 16-bit float or float32.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    _check_operands(x, w, leaves)
    (m, k), n = x.shape, w.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape {(n,)} for w {w.shape}, got {bias.shape}")
    out = jnp.dtype(out_dtype or x.dtype)
    if out not in (*_OPERANDS, jnp.dtype(jnp.float32)):
        raise NotImplementedError(f"mosaic_gpu matmul cannot write {out}")
    if m == 0 or n == 0:
        return jnp.zeros((m, n), out)
    s = schedule or default_schedule(m, n, k, x.dtype, leaves)
    if s.gated:
        raise ValueError(f"{s} is a schedule of matmul_gated")
    if not s.fits(leaves, out.itemsize):
        raise NotImplementedError(f"{s} has no room for {leaves} leaves and {out} results")
    return _matmul(x, w, bias, leaves=leaves, out_dtype=out, s=s, gate=None, interpret=interpret)


def matmul_gated(
    x: jax.Array,
    w: jax.Array,
    gate: Gate,
    *,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, F] = gate(x @ w[:F]^T, x @ w[F:]^T): `matmul` with a gate in its epilogue.

    The gate sees what `matmul` returns: the same sums, rounded to x's dtype.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [2 F, K], of x's dtype.
      gate: elementwise, of two tiles in registers; a function of a module, since programs are
        cached by it.
      schedule: a gated one; by shape unless given. Never changes the result.
      interpret: as for `matmul`.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    _check_operands(x, w)
    (m, k), n = x.shape, w.shape[0]
    if n % 2:
        raise ValueError(f"w must be [2 F, K], gate above up, got {w.shape}")
    if m == 0 or n == 0:
        return jnp.zeros((m, n // 2), x.dtype)
    s = schedule or default_schedule(m, n, k, x.dtype, gated=True)
    if not s.gated:
        raise ValueError(f"{s} is no gated schedule")
    if not s.fits(itemsize=x.dtype.itemsize):
        raise NotImplementedError(f"{s} has no room for {x.dtype} results")
    return _matmul(x, w, None, leaves=1, out_dtype=x.dtype, s=s, gate=gate, interpret=interpret)
