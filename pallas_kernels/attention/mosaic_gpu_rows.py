"""The rows of a wgmma's result in registers, for the Mosaic GPU attention: layouts, masks, sums.

A warp of the four holds rows 16 w to 16 w + 15, a thread of it two of them, 8 apart. Where at most
8 rows carry a query, half of every thread's numbers are nobody's: `Rows(8)` keeps the other half
only, and with it half of the registers and of the arithmetic. What is kept is computed as it was:
the sum of a row adds in the same order in both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from jdet.pallas_kernels.attention.mosaic_gpu_schedules import ROWS
from jdet.pallas_kernels.exact import exact

_HALF = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


class Rows:
    """Layouts of [height, n] and of [height], and what is done in them.

    Row r of 64 is row r of 64; of the 32 of `Rows(8)`, row 8 w + i is row 16 w + i of 64.
    """

    def __init__(self, used: int, half: bool, interpret: bool) -> None:
        self.used, self.half, self.interpret = used, half, interpret
        self.height = ROWS // 2 if self.half else ROWS
        self.layout: Any = _HALF if self.half else plgpu.Layout.WGMMA
        self.row_layout = self.layout.reduce(1)
        self.fma = functools.partial(exact, "fma.rn.f32", self.layout, interpret)
        self.fma_row = functools.partial(exact, "fma.rn.f32", self.row_layout, interpret)
        self.mul_row = functools.partial(exact, "mul.rn.f32", self.row_layout, interpret)

    def across(self, x: jax.Array, width: int) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.height, width), (0,)), self.layout)

    def _inline(self, f: Any, shape: tuple[int, ...], dtype: Any, layout: Any, *given: Any) -> Any:
        types = plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)
        return plgpu.inline_mgpu(arg_types=given, return_type=types)(f)

    def take(self, x: jax.Array) -> jax.Array:
        """Of [64, n], as a wgmma leaves it, the rows that are kept."""
        if not self.half:
            return x
        shape = (self.height, x.shape[1])
        if self.interpret:
            return x.reshape(4, 2, 8, -1)[:, 0].reshape(shape)

        def f(ctx: Any, x: Any) -> Any:
            del ctx
            registers = x.registers[:, :, :, :, 0]
            layout = self.layout.to_mgpu()
            registers = registers.reshape(layout.registers_shape(shape))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return self._inline(f, shape, x.dtype, self.layout, plgpu.Layout.WGMMA)(x)

    def give(self, x: jax.Array) -> jax.Array:
        """[64, n] for a wgmma, zeros where `take` has left rows out."""
        if not self.half:
            return x
        shape = (ROWS, x.shape[1])
        if self.interpret:
            x = x.reshape(4, 1, 8, -1)
            return jnp.concatenate([x, jnp.zeros_like(x)], axis=1).reshape(shape)

        def f(ctx: Any, x: Any) -> Any:
            del ctx
            layout = plgpu.Layout.WGMMA.to_mgpu()
            registers = np.empty(layout.registers_shape(shape), dtype=object)
            kind = x.registers.flat[0].type
            zero = ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(kind.element_type, 0.0))
            registers[...] = arith.constant(kind, zero)
            registers[:, :, :, :, 0] = x.registers.reshape(registers[:, :, :, :, 0].shape)
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return self._inline(f, shape, x.dtype, plgpu.Layout.WGMMA, self.layout)(x)

    def sum(self, x: jax.Array) -> jax.Array:
        """Of each row, in the order of Mosaic's sum of [64, n]: two partial sums a thread."""
        if not self.half or self.interpret:
            return x.sum(axis=1)

        def f(ctx: Any, x: Any) -> Any:
            del ctx
            return x.reduce("add", 1, acc_ilp=4)

        return self._inline(f, x.shape[:1], x.dtype, self.row_layout, self.layout)(x)

    def keep_seen(self, scores: jax.Array, last: jax.Array, sliding_window: int | None) -> Any:
        """Scores, -inf where the key, the column, is after `last` or `sliding_window` before it.

        `last` is a number or one a row. A thread holds the keys 8 i + 2 (lane % 4) and the next:
        they are compared as constants. An array of keys would be kept in registers.
        """
        if self.interpret:
            key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            last = jnp.broadcast_to(last, (self.height,))[:, None]
            seen = key <= last
            if sliding_window is not None:
                seen &= key > last - sliding_window
            return jnp.where(seen, scores, -jnp.inf)
        if not last.ndim:
            last = lax.broadcast_in_dim(last, (self.height,), ())
            last = plgpu.layout_cast(last, self.row_layout)

        def f(ctx: Any, x: Any, last: Any) -> Any:
            del ctx
            i32 = ir.IntegerType.get_signless(32)

            def number(value: int) -> Any:
                return arith.constant(i32, value)

            def element(pair: Any, index: int) -> Any:
                return vector.extract(pair, [], [index])

            skipped = arith.muli(arith.remui(mgpu.thread_idx(), number(4)), number(2))
            nothing = arith.constant(ir.F32Type.get(), -float("inf"))
            lasts = [arith.subi(element(row, 0), skipped) for row in last.registers.flat]
            registers = np.empty_like(x.registers)
            for index, pair in np.ndenumerate(x.registers):
                bound, values = lasts[0 if self.half else index[4]], []
                for i in range(2):
                    key = number(8 * index[1] + i)
                    seen = arith.cmpi(arith.CmpIPredicate.sle, key, bound)
                    if sliding_window is not None:
                        before = arith.subi(bound, number(sliding_window))
                        inside = arith.cmpi(arith.CmpIPredicate.sgt, key, before)
                        seen = arith.andi(seen, inside)
                    values.append(arith.select(seen, element(pair, i), nothing))
                registers[index] = vector.from_elements(pair.type, values)
            return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

        given = self.layout, self.row_layout
        return self._inline(f, scores.shape, scores.dtype, self.layout, *given)(scores, last)

    def store(self, to: Any, x: jax.Array, end: Any = None, keep: bool = False) -> None:
        """The rows in use, those before `end`, to memory of the device.

        Of x [height, n] or [height], to [rows, n], [i, j, n] (rows in this order) or [rows]. A
        thread's neighbours fill 32 bytes of a row, or 16 of a 16-bit x. `keep` is for what a later
        kernel reads: see `_kept`.
        """
        if self.interpret:
            to[...] = x[: self.used].reshape(to.shape)
            return
        wide, size = x.ndim == 2, 2 * x.dtype.itemsize
        ends = ()
        if end is not None:
            end = lax.broadcast_in_dim(end, (self.height,), ())
            ends = (plgpu.layout_cast(jnp.asarray(end, jnp.int32), self.row_layout),)

        def f(ctx: Any, to: Any, x: Any, *ends: Any) -> None:
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            put = _kept(to) if keep else None

            def number(value: int) -> Any:
                return arith.constant(i32, value)

            def place(*values: Any) -> list[Any]:
                return [arith.index_cast(ir.IndexType.get(), value) for value in values]

            thread = arith.remui(mgpu.thread_idx(), number(128))
            warp, lane = (op(thread, number(32)) for op in (arith.divui, arith.remui))
            first = arith.muli(warp, number(8 if self.half else 16))
            first = arith.addi(first, arith.divui(lane, number(4)))
            column = arith.muli(arith.remui(lane, number(4)), number(2))
            shape = ir.MemRefType(to.type).shape
            for half in range(1 if self.half else 2):
                row = arith.addi(first, number(8 * half))
                mine = arith.cmpi(arith.CmpIPredicate.ult, row, number(self.used))
                for end in ends:
                    bound = vector.extract(end.registers.flat[half], [], [0])
                    mine = arith.cmpi(arith.CmpIPredicate.slt, row, bound)
                if not wide:
                    once = arith.cmpi(arith.CmpIPredicate.eq, column, number(0))
                    with mgpu.when(arith.andi(mine, once)):
                        value = vector.extract(x.registers.flat[half], [], [0])
                        put([value], row) if put else memref.store(value, to, place(row))
                    continue
                with mgpu.when(mine):
                    at_row = [row]
                    if len(shape) == 3:
                        inner = number(shape[1])
                        at_row = [op(row, inner) for op in (arith.divui, arith.remui)]
                    for index, pair in np.ndenumerate(x.registers):
                        if not self.half and index[4] != half:
                            continue
                        at = *at_row, arith.addi(column, number(8 * index[1]))
                        if put:
                            put([vector.extract(pair, [], [i]) for i in range(2)], *at)
                        else:
                            vector.store(pair, to, place(*at), alignment=size)

        given: Any = plgpu.RefType(), self.layout if wide else self.row_layout
        given += (self.row_layout,) * len(ends)
        plgpu.inline_mgpu(arg_types=given)(f)(to, x, *ends)


def _kept(to: Any) -> Any:
    """put(values, *place): neighbouring float32 numbers to `to`, the last to leave the L2.

    Partial results are few beside the keys and values that stream through the L2. Written back to
    memory between those reads they cost several times their size.
    """
    strides, _ = ir.MemRefType(to.type).get_strides_and_offset()
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    base = utils.memref_ptr(to)
    last = "createpolicy.fractional.L2::evict_last.b64 $0, 1.0;"
    policy = llvm.inline_asm(i64, [], last, "=l", has_side_effects=False)

    def put(values: list[Any], *place: Any) -> None:
        at = functools.reduce(
            arith.addi,
            (arith.muli(i, arith.constant(i32, s)) for i, s in zip(place, strides, strict=True)),
        )
        address = utils.getelementptr(base, [at], ir.F32Type.get())
        n = len(values)
        data = ", ".join(f"${1 + i}" for i in range(n))
        vector_of = {1: "", 2: ".v2"}[n]
        llvm.inline_asm(
            None,
            [address, *values, policy],
            f"st.global.L2::cache_hint{vector_of}.f32 [$0], {{{data}}}, ${1 + n};",
            ",".join(["l", *"f" * n, "l"]),
            has_side_effects=True,
        )

    return put
