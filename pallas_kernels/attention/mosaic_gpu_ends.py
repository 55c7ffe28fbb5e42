"""Where the heads of a spread grid end, counted by each of its blocks.

A kernel of its own for these sums costs more than the sums.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm

from jdet.pallas_kernels.attention.mosaic_gpu_schedules import Shape, splits_of

COUNTED = 256  # tiles of queries: ends and last keys of more find no room beside the slots
_WARP = 32


def count_ends(last_g: Any, last_s: Any, ends_s: Any, *, d: Shape, interpret: bool) -> None:
    """In a kernel, by one warpgroup: `ends_of` and the last keys into shared memory.

    A lane of its first warp has neighbouring tiles; what those of lower lanes have comes from them.
    """
    (size,) = last_g.shape
    if interpret:
        last_s[...] = last = last_g[...]
        ends_s[...] = jnp.cumsum(splits_of(last, d) * d.kv_heads)
        return
    share = -(-size // _WARP)

    def f(ctx: Any, last_g: Any, last_s: Any, ends_s: Any) -> None:
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def number(value: int) -> Any:
            return arith.constant(i32, value)

        def place(value: Any) -> Any:
            return arith.index_cast(ir.IndexType.get(), value)

        thread = arith.remui(mgpu.thread_idx(), number(4 * _WARP))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, thread, number(_WARP))):
            first = arith.muli(thread, number(share))
            tiles = [arith.addi(first, number(i)) for i in range(share)]
            there = [arith.cmpi(arith.CmpIPredicate.ult, t, number(size)) for t in tiles]
            clamped = [place(arith.minui(t, number(size - 1))) for t in tiles]
            lasts = [memref.load(last_g, [at]) for at in clamped]
            ends = []
            for inside, last in zip(there, lasts, strict=True):
                splits = arith.divui(arith.addi(last, number(d.kv_split)), number(d.kv_split))
                items = arith.muli(splits, number(d.kv_heads))
                items = arith.select(inside, items, number(0))
                ends.append(arith.addi(ends[-1], items) if ends else items)
            before = ends[-1]
            for distance in (1, 2, 4, 8, 16):
                full, clamp = number(-1), number(0)
                kind = nvvm.ShflKind.up
                lower = nvvm.shfl_sync(full, before, number(distance), clamp, kind)
                has = arith.cmpi(arith.CmpIPredicate.uge, thread, number(distance))
                before = arith.addi(before, arith.select(has, lower, number(0)))
            before = arith.subi(before, ends[-1])
            for inside, at, last, end in zip(there, clamped, lasts, ends, strict=True):
                with mgpu.when(inside):
                    memref.store(last, last_s, [at])
                    memref.store(arith.addi(before, end), ends_s, [at])

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)(f)(last_g, last_s, ends_s)
