"""Grouped matmul for Hopper in Pallas Mosaic GPU: `matmul`'s kernel over a plan of tiles.

y[r, n] = sum over k of x[r, k] * w[e, n, k], e the group of row r, weights stored as checkpoints
store them. bfloat16 or float16 operands.

Tree: that of matmul/mosaic_gpu.py, by the same code: one accumulator of the tensor core a part of
K, fed ascending, whatever tile a row stands in. So a row has the bits that `matmul` gives it with
its expert's weights (on an H100: scripts/bench/results/h100-check-grouped.json; times in
h100-grouped.json).

Schedules (`GroupedSchedule` in mosaic_gpu_schedules.py): groups are cut into tiles of at most
`height` rows, whose first rows, counts and experts follow from the sizes (`plan`, integers alone,
computed by XLA, or by route/mosaic_gpu.py); the kernel's blocks walk as many (tile of rows, tile of
N) as there are, N first, so that an expert's tiles run side by side and share x and w in L2. An
expert without rows is never read. A tile may begin at any row: the copy engine takes any first row
of x, and fetches rows of the next group too, whose results nobody stores. They must not be stored,
for another block writes those rows: results leave in copies of 64, 32, ..., 1 rows, those that make
up the count. Short tiles, of 8 rows, leave from registers instead. Tiles after the last group store
zeros, and read nothing.

With `tokens` the rows of x are not gathered where short tiles hold all of it: each tile reads every
token, which the tensor core multiplies at no cost, and stores the rows of its group.

y has a multiple of a copy's columns (64 of 16 bits, or fewer; 8 of short tiles), and is cut by XLA
where N is none.

Sources: as for `matmul`; the ladder of copies is that of JAX's Hopper ragged dot
(jax/experimental/pallas/ops/gpu/ragged_dot_mgpu.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.grouped_matmul.mosaic_gpu_schedules import (
    GroupedSchedule,
    default_schedule,
    plan_size,
    schedules,
)
from jdet.pallas_kernels.matmul.mosaic_gpu import check_operands, check_result
from jdet.pallas_kernels.matmul.mosaic_gpu_kernel import Gate, kernel

__all__ = ["GroupedSchedule", "default_schedule", "grouped", "grouped_matmul", "schedules"]


def plan(sizes: jax.Array, rows: int, height: int) -> jax.Array:
    """The tiles of rows, int32 [T + 1, 3], T static and enough for any sizes.

    Its first row is (tiles of groups, all tiles, 0); then (first row, rows, expert) of each tile,
    in ascending order of rows. The rows after the last group are tiles too, of no expert.

    Sums of integers over masks, and no gather: XLA makes three kernels of it, quickly.
    """
    experts = sizes.shape[0]
    expert = jnp.arange(experts, dtype=jnp.int32)
    at = jnp.arange(plan_size(rows, experts, height), dtype=jnp.int32)
    tiles = lax.div(sizes + (height - 1), jnp.int32(height))

    def running(x):
        """Sums of the first 1, 2, ... elements."""
        return jnp.sum(jnp.where(expert <= expert[:, None], x, 0), axis=1, dtype=jnp.int32)

    ends, tile_ends = running(sizes), running(tiles)
    used, real = ends[-1], tile_ends[-1]
    before = at[:, None] - (tile_ends - tiles)  # tiles of this group before this one
    mine = (before >= 0) & (at[:, None] < tile_ends)

    def of_group(x, otherwise):
        """Of each tile's group; `otherwise` for tiles after the last group."""
        found = jnp.sum(jnp.where(mine, x, 0), axis=1, dtype=jnp.int32)
        return jnp.where(at < real, found, otherwise)

    first = of_group(ends - sizes + before * height, used + (at - real) * height)
    count = jnp.minimum(of_group(ends, rows) - first, height)
    every = real + lax.div(rows - used + (height - 1), jnp.int32(height))
    total = jnp.stack([real, every, jnp.int32(0)])
    return jnp.concatenate([total[None], jnp.stack([first, count, of_group(expert, experts)], 1)])


@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "interpret"))
def _grouped(x, w, sizes, tiles, tokens, *, leaves, out_dtype, s, gate, interpret):
    k, (experts, n, _) = x.shape[1], w.shape
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    if tiles is None or tiles.shape[0] != 1 + plan_size(rows, experts, s.height):
        tiles = plan(sizes, rows, s.height)
    if gate is not None:
        n //= 2
        w = w.reshape(experts, 2, n, k)
    if leaves > 1:
        x = x.reshape(-1, leaves, k // leaves)
        w = w.reshape(experts, n, leaves, k // leaves)
    # No copy of results may reach beyond y, nor may pairs of columns.
    columns = 8 if s.short else s.tile.stage_tile(out_dtype.itemsize)[1]
    wide = pl.cdiv(n, columns) * columns
    most = (tiles.shape[0] - 1) * pl.cdiv(wide, s.tile.out_cols)
    y = plgpu.kernel(
        functools.partial(
            kernel, s=s.tile, leaves=leaves, gate=gate, interpret=bool(interpret), height=s.height
        ),
        out_type=jax.ShapeDtypeStruct((rows, wide), out_dtype),
        grid=(min(most, s.tile.resident),),
        grid_names=("cluster",),
        num_threads=s.tile.wgs + 1,
        thread_name="wg",
        kernel_name="jdet_grouped_matmul" if gate is None else "jdet_grouped_gated_matmul",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or None,
    )(x, w, tiles, *(() if tokens is None else (tokens,)))
    return y[:, :n] if wide > n else y


def grouped(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    tiles: jax.Array | None = None,
    tokens: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    gate: Gate | None = None,
    schedule: GroupedSchedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`grouped_matmul`; with a gate, of w [E, 2 F, K], each expert's product is `matmul_gated`'s.

    With tokens [R], row r is x[tokens[r]], and the rows of a group are of different tokens.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    if w.ndim != 3 or sizes.shape != w.shape[:1]:
        raise ValueError(f"w must be [E, N, K] and sizes [E], got {w.shape} and {sizes.shape}")
    check_operands(x, w[0], leaves)
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    experts, n, _ = w.shape
    if gate is not None and n % 2:
        raise ValueError(f"w must be [E, 2 F, K], gate above up, got {w.shape}")
    out = check_result(x, out_dtype)
    if rows == 0 or n == 0:
        return jnp.zeros((rows, n if gate is None else n // 2), out)
    gated = gate is not None
    s = schedule or default_schedule(rows, experts, n, leaves, out.itemsize, gated)
    if s.tile.gated != gated:
        raise ValueError(f"{s} is {'a' if s.tile.gated else 'no'} gated schedule")
    if not s.fits(leaves, out.itemsize):
        raise NotImplementedError(f"{s} has no room for {leaves} leaves and {out} results")
    if tokens is not None and not (s.short and x.shape[0] <= s.height):
        x, tokens = x[tokens], None
    return _grouped(
        x,
        w,
        sizes,
        tiles,
        tokens,
        leaves=leaves,
        out_dtype=out,
        s=s,
        gate=gate,
        interpret=interpret,
    )


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    tiles: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    schedule: GroupedSchedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[R, N]: x[r] @ w[e]^T, e the group of row r; see the module for the tree.

    Args:
      x: [R, K], bfloat16 or float16.
      w: [E, N, K], of x's dtype.
      sizes: int32 [E], rows of each group; their sum must not exceed R. Rows after it are zeros.
      tiles: the plan of these sizes in tiles of the default height, where routing has made it.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; a 16-bit float or float32.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    return grouped(
        x,
        w,
        sizes,
        tiles=tiles,
        leaves=leaves,
        out_dtype=out_dtype,
        schedule=schedule,
        interpret=interpret,
    )
