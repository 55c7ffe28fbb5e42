"""Buffers of the Mosaic GPU matmul in shared memory, and the ways from there to its result."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector


def two_views(shape: tuple[int, ...], dtype: DTypeLike, interpret: bool) -> Any:
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


def rows_view(shape: tuple[int, ...], dtype: DTypeLike, interpret: bool) -> Any:
    """A buffer of which any rows can be copied: the bytes of `two_views`, in tiles of one row."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    tiles = plgpu.TilingTransform((1, swizzle // itemsize))
    return plgpu.SMEM(
        shape, dtype, transforms=() if interpret else (tiles, plgpu.SwizzleTransform(swizzle))
    )


def store_tile(src: Any, dst: Any, row: jax.Array, col: jax.Array) -> None:
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


def store_rows(src: Any, dst: Any, row: jax.Array, col: jax.Array, count: jax.Array) -> None:
    """Starts the copy of the first `count` rows of `src`, 0 to all, to `dst` at (row, col).

    A copy has a static size: one for each power of two, taken where `count` has that bit. `src`
    has a power of two of rows.
    """
    size, cols = src.shape
    while size:
        first = count & -(2 * size)

        @pl.when((count & size) != 0)
        def _(first=first, size=size):
            to = dst.at[pl.ds(row + first, size), pl.ds(col, cols)]
            plgpu.copy_smem_to_gmem(src.at[pl.ds(first, size)], to, commit_group=False)

        size //= 2


def store_pairs(value: jax.Array, dst: Any, to: jax.Array, col: jax.Array, interpret: bool) -> None:
    """Stores row i of `value` at (to[i], col) of `dst`, where to[i] is no less than 0.

    For at most 8 rows, of which it stores from registers: an instruction takes a pair of
    neighbours of each, and there is no copy engine to wait for. `dst` has a multiple of 8 columns;
    what lies outside is dropped.
    """
    width, size = dst.shape[1], jnp.dtype(dst.dtype).itemsize
    if interpret:
        for i in range(8):
            for c in range(0, value.shape[1], 8):

                @pl.when((to[i] >= 0) & (col + c < width))
                def _(i=i, c=c):
                    dst[to[i], pl.ds(col + c, 8)] = value[i, c : c + 8]

        return
    layout = plgpu.Layout.WGMMA
    columns = col + plgpu.broadcasted_iota(jnp.int32, value.shape, 1, layout=layout)
    to = lax.broadcast_in_dim(to, value.shape, (0,))
    at = jnp.where((to >= 0) & (columns < width), to * width + columns, -1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def put(ctx, *operands):
        del ctx
        dst, value, at = operands
        base, word = mgpu_utils.memref_ptr(dst), ir.IntegerType.get_signless(16 * size)
        code = (
            "{ .reg .pred p; .reg .b64 a; setp.ge.s32 p, $1, 0;"
            f" mad.wide.s32 a, $1, {size}, $0; @p st.global.b{16 * size} [a], $2; }}"
        )
        # Registers of rows 0 to 7 of a warp's 16 and of rows 8 to 15 take turns.
        pairs = zip(value.registers.flat[::2], at.registers.flat[::2], strict=True)
        for pair, index in pairs:
            first = vector.extract(index, dynamic_position=[], static_position=[0])
            pair = mgpu_utils.bitcast(pair, word)
            mgpu_utils.inline_ptx(code, base, first, pair, has_side_effects=True)

    put(dst, value, at)
