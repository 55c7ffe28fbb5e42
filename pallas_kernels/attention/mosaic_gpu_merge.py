"""The merge of splits for the Mosaic GPU attention, and the kernel that folds partial results.

The tree is `mosaic_gpu`'s. Both of its kernels compile the merge written here, and a compiler
may fuse a product and a sum of its own accord, in one kernel and not in the other: whatever could
be fused is therefore written as one explicit instruction (`exact`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.compat import store
from jdet.pallas_kernels.attention.mosaic_gpu_schedules import (
    FOLD_ROWS,
    Schedule,
    Shape,
    splits_of,
)
from jdet.pallas_kernels.exact import exact

RING = 8  # groups of splits on their way into the fold


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


def fold(*refs: Any, d: Shape, interpret: bool, **scratch: Any) -> None:
    """Folds what a spread grid left: some rows and columns of one tile and head, ascending.

    Heads that one team has met from their first split to their last are done.
    """
    parts_g, sums_g, left_g, last_g, y_g = refs
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    splits, left = splits_of(last_g[row], d), left_g[row, head]
    ring, group, size, columns = scratch["out_s"].shape
    every = d.dim // columns
    first = head * d.part_rows + lax.div(part, every) * size
    column = lax.rem(part, every) * columns
    # A row to each of the four warps, neighbouring columns to a thread.
    tiling = plgpu.Tiling(((4, columns), (columns // 32,)))
    layout: Any = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    row_layout = layout.reduce(1)
    fma = functools.partial(exact, "fma.rn.f32", layout, interpret)
    fma_row = functools.partial(exact, "fma.rn.f32", row_layout, interpret)

    def load(ref: Any, layout: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def across(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (size, columns), (0,)), layout)

    def known(i: Any, m: Any, total: Any, out: Any) -> Any:
        """A split after the last as one without a key: memory holds anything there."""

        def choose(x, other, layout):
            index = plgpu.layout_cast(lax.broadcast_in_dim(i, x.shape, ()), layout)
            return jnp.where(index < splits, x, other)

        m, total = choose(m, -jnp.inf, row_layout), choose(total, 0.0, row_layout)
        return m, total, choose(out, 0.0, layout)

    def merge_all(begin: Any, out_s: Any, sums_s: Any, full: Any) -> None:
        steps = lax.div(splits - begin + group - 1, group)

        def fetch(i):
            slot = lax.rem(i, ring)
            window, rows = pl.ds(begin + i * group, group), pl.ds(first, size)
            o_g = parts_g.at[row, window, rows, pl.ds(column, columns)]
            for gmem, smem in ((o_g, out_s), (sums_g.at[row, window, :, rows], sums_s)):
                plgpu.copy_gmem_to_smem(gmem, smem.at[slot, pl.ds(0, group)], full.at[slot])

        lax.fori_loop(0, lax.min(steps, ring), lambda i, _: fetch(i), None)

        def step(i, state):
            slot = lax.rem(i, ring)
            plgpu.barrier_wait(full.at[slot])
            for j in range(group):
                m, total = (load(sums_s.at[slot, j, c], row_layout) for c in range(2))
                out = load(out_s.at[slot, j], layout)
                if j:
                    m, total, out = known(begin + i * group + j, m, total, out)
                state = merge(state, (m, total, [out]), fma, fma_row, across)

            @pl.when(i + ring < steps)
            def _():
                plgpu.commit_smem()
                fetch(i + ring)

            return state

        state = (
            fill((size,), -jnp.inf, row_layout),
            fill((size,), 0.0, row_layout),
            [fill((size, columns), 0.0, layout)],
        )
        _, total, (out,) = lax.fori_loop(0, steps, step, state)
        y = finish(across(total), out).astype(y_g.dtype)
        store(y_g.at[row, pl.ds(first, size), pl.ds(column, columns)], y)

    # Of a tile without a key nobody has written anything.
    begin = jnp.where(splits == 0, 0, left)

    @pl.when(begin >= 0)
    def _():
        merge_all(begin, **scratch)


def fold_splits(
    spread: Any,
    last: jax.Array,
    *,
    d: Shape,
    s: Schedule,
    interpret: Any,
    compiler_params: Any,
) -> jax.Array:
    """The results, [tiles, heads of keys x part_rows, dim], of what a spread grid has left."""
    parts, sums, left, done = spread
    tiles, _, _, dim = parts.shape
    columns = min(s.merge_columns, dim)
    y = jax.new_ref(done)
    plgpu.kernel(
        functools.partial(fold, d=d, interpret=bool(interpret)),
        grid=(tiles, d.kv_heads, d.part_rows // FOLD_ROWS * (dim // columns)),
        grid_names=("row", "head", "part"),
        scratch_types=dict(
            out_s=plgpu.SMEM((RING, s.fetch, FOLD_ROWS, columns), jnp.float32),
            # In slots of 128 bytes, which copies ask for.
            sums_s=plgpu.SMEM((RING, -(-s.fetch // 4) * 4, 2, FOLD_ROWS), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=RING),
        ),
        kernel_name="jdet_attention_fold",
        compiler_params=compiler_params,
        interpret=interpret,
    )(parts, sums, left, last, y)
    return jax.freeze(y)
