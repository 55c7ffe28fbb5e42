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

from jdet.pallas_kernels.attention.mosaic_gpu_schedules import Schedule, Shape
from jdet.pallas_kernels.exact import exact

LANES = 32  # 32-bit elements in one 128-byte row
RING = 16  # splits on their way into the fold


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


def fold(
    part_g: Any,
    bounds_g: Any,
    y_g: Any,
    part_s: Any,
    y_s: Any,
    full: Any,
    *,
    d: Shape,
    interpret: bool,
) -> None:
    """Folds the splits of `merge_rows` rows in ascending order."""
    pieces = d.dim // LANES
    size = part_s.shape[2]
    row, first = lax.axis_index("row"), lax.axis_index("part") * size
    splits = lax.div(bounds_g[row, 1] + d.kv_split, d.kv_split)

    def fetch(i):
        slot = lax.rem(i, RING)
        plgpu.copy_gmem_to_smem(
            part_g.at[row, i, :, pl.ds(first, size)], part_s.at[slot], full.at[slot]
        )

    lax.fori_loop(0, lax.min(splits, RING), lambda i, _: fetch(i), None)
    shape = (size, LANES)
    layout = plgpu.Layout.WG_STRIDED(shape, 1)
    fma = functools.partial(exact, "fma.rn.f32", layout, interpret)

    def step(i, state):
        slot = lax.rem(i, RING)
        plgpu.barrier_wait(full.at[slot])
        *out, m, total = [part_s[slot, c] for c in range(pieces + 2)]
        state = merge(state, (m, total, out), fma, fma, lambda x: x)
        plgpu.commit_smem()

        @pl.when(i + RING < splits)
        def _():
            fetch(i + RING)

        return state

    zero = fill(shape, 0.0, layout)
    state = (fill(shape, -jnp.inf, layout), zero, [zero] * pieces)
    _, total, out = lax.fori_loop(0, splits, step, state)
    for c, x in enumerate(out):
        y_s[c] = finish(total, x).astype(y_g.dtype)
    plgpu.commit_smem()
    for c in range(pieces):
        to = y_g.at[row, pl.ds(first, size), pl.ds(c * LANES, LANES)]
        plgpu.copy_smem_to_gmem(y_s.at[c], to)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fold_splits(
    parts: jax.Array,
    bounds: jax.Array,
    *,
    d: Shape,
    s: Schedule,
    dtype: Any,
    interpret: Any,
    compiler_params: Any,
) -> jax.Array:
    """[tiles, heads of keys x rows, dim] from what a spread grid has left."""
    tiles, _, chunks, rows, _ = parts.shape
    return plgpu.kernel(
        functools.partial(fold, d=d, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((tiles, rows, d.dim), dtype),
        grid=(tiles, pl.cdiv(rows, s.merge_rows)),
        grid_names=("row", "part"),
        scratch_types=dict(
            part_s=plgpu.SMEM((RING, chunks, s.merge_rows, LANES), jnp.float32),
            y_s=plgpu.SMEM((chunks - 2, s.merge_rows, LANES), dtype),
            full=plgpu.Barrier(num_barriers=RING),
        ),
        kernel_name="jdet_attention_fold",
        compiler_params=compiler_params,
        interpret=interpret,
    )(parts, bounds)
