"""The merge of splits for the Mosaic GPU attention, and the kernel that folds partial results.

The tree is `mosaic_gpu`'s. Both of its kernels compile the merge written here, and a compiler
may fuse a product and a sum of its own accord, in one kernel and not in the other: whatever could
be fused is therefore written as one explicit instruction (`exact`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention.mosaic_gpu_schedules import (
    Schedule,
    Shape,
    share_of,
    splits_of,
)
from jdet.pallas_kernels.exact import exact

LANES = 32  # 32-bit elements in one 128-byte row
RING = 4  # groups of splits on their way into the fold


def fill(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def merge(left: Any, right: Any, fma: Any, fma_row: Any, wide: Any) -> Any:
    """The tree's one merge; `wide` spreads a value of a row over the row's elements."""
    (m0, l0, o0), (m1, l1, o1) = left, right
    m = jnp.maximum(m0, m1)
    base = jnp.where(m == -jnp.inf, 0.0, m)
    a, b = jnp.exp2(m0 - base), jnp.exp2(m1 - base)
    out = [fma(x, wide(a), y * wide(b)) for x, y in zip(o0, o1, strict=True)]
    return m, fma_row(l0, a, l1 * b), out


def finish(total: jax.Array, out: jax.Array) -> jax.Array:
    """o / l; 0 where there was no key. Adding 0 turns the sign of a zero to plus."""
    none = total == 0.0
    return jnp.where(none, 0.0, out / jnp.where(none, 1.0, total) + 0.0)


def fold(*refs: Any, d: Shape, shares: int, interpret: bool, **scratch: Any) -> None:
    """Folds what a spread grid left: some rows and columns of one tile and head, ascending."""
    part_g, last_g, ends_g, y_g = refs
    out_s, sums_s, y_s, full = (scratch[name] for name in ("out_s", "sums_s", "y_s", "full"))
    ring, group, pieces, size = out_s.shape[:4]
    every = d.dim // LANES
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    first = head * d.part_rows + lax.div(part, every // pieces) * size
    column = lax.rem(part, every // pieces) * pieces
    splits = splits_of(last_g[row], d)
    # The team that met split 0 has folded all of its own: they lie at the last of them.
    share = share_of(ends_g, shares)
    item = ends_g[row] - (d.kv_heads - head) * splits
    begin = lax.min((lax.div(item, share) + 1) * share - item, splits) - 1
    begin = lax.max(begin, 0)
    steps = lax.div(splits - begin + group - 1, group)

    def fetch(i):
        slot = lax.rem(i, ring)
        window = pl.ds(begin + i * group, group)
        for smem, chunks in ((out_s, pl.ds(column, pieces)), (sums_s, pl.ds(every, 2))):
            gmem = part_g.at[row, window, chunks, pl.ds(first, size)]
            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], full.at[slot])

    lax.fori_loop(0, lax.min(steps, ring), lambda i, _: fetch(i), None)
    shape = (size, LANES)
    layout = plgpu.Layout.WG_STRIDED(shape, 1)
    fma = functools.partial(exact, "fma.rn.f32", layout, interpret)

    def step(i, state):
        slot = lax.rem(i, ring)
        plgpu.barrier_wait(full.at[slot])
        for j in range(group):
            m, total = (sums_s[slot, j, c] for c in range(2))
            out = [out_s[slot, j, c] for c in range(pieces)]
            m1, total1, out1 = merge(state, (m, total, out), fma, fma, lambda x: x)
            if j:
                m0, total0, out0 = state
                index = lax.broadcast_in_dim(begin + i * group + j, shape, ())
                there = plgpu.layout_cast(index, layout) < splits
                m1, total1 = jnp.where(there, m1, m0), jnp.where(there, total1, total0)
                out1 = [jnp.where(there, x, y) for x, y in zip(out1, out0, strict=True)]
            state = m1, total1, out1
        plgpu.commit_smem()

        @pl.when(i + ring < steps)
        def _():
            fetch(i + ring)

        return state

    zero = fill(shape, 0.0, layout)
    state = (fill(shape, -jnp.inf, layout), zero, [zero] * pieces)
    _, total, out = lax.fori_loop(0, steps, step, state)
    for c, x in enumerate(out):
        y_s[c] = finish(total, x).astype(y_g.dtype)
    plgpu.commit_smem()
    for c in range(pieces):
        to = y_g.at[row, pl.ds(first, size), pl.ds((column + c) * LANES, LANES)]
        plgpu.copy_smem_to_gmem(y_s.at[c], to)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fold_splits(
    parts: jax.Array,
    last: jax.Array,
    ends: jax.Array,
    *,
    d: Shape,
    s: Schedule,
    dtype: Any,
    interpret: Any,
    compiler_params: Any,
) -> jax.Array:
    """[tiles, heads of keys x part_rows, dim] from what a spread grid has left."""
    tiles, _, _, rows, _ = parts.shape
    size, pieces = math.gcd(s.merge_rows, d.part_rows), min(s.merge_columns, d.dim) // LANES
    return plgpu.kernel(
        functools.partial(fold, d=d, shares=s.shares(d), interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((tiles, rows, d.dim), dtype),
        grid=(tiles, d.kv_heads, d.part_rows // size * (d.dim // LANES // pieces)),
        grid_names=("row", "head", "part"),
        scratch_types=dict(
            out_s=plgpu.SMEM((RING, s.fetch, pieces, size, LANES), jnp.float32),
            sums_s=plgpu.SMEM((RING, s.fetch, 2, size, LANES), jnp.float32),
            y_s=plgpu.SMEM((pieces, size, LANES), dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=RING),
        ),
        kernel_name="jdet_attention_fold",
        compiler_params=compiler_params,
        interpret=interpret,
    )(parts, last, ends)
