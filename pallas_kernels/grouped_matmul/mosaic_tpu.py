"""Grouped matmul for TPU in Pallas: `matmul`'s products over a plan of tiles.

y[r, n] = sum over k of x[r, k] * w[e, n, k], e the group of row r, weights stored as checkpoints
store them. bfloat16 or float32.

Tree: that of matmul/mosaic_tpu.py, by the same code; a row has the bits that `matmul` gives it
with its expert's weights.

Schedules (what the bits do not depend on; `Schedule` of `matmul`): the rows are cut into tiles of
`bm`, wherever groups end. A step multiplies one tile by a block of one expert's weights: a tile
that k groups share is visited k times, each visit storing its own group's rows. XLA computes the
plan of visits from the sizes (`plan`, integers alone). The grid is (columns, visits, blocks of K):
the visits of a tile follow each other, so that its results stay in VMEM meanwhile. An
expert without rows is not read. Rows after the last group are zeros.

Budget: as for `matmul`.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.

Sources: MegaBlocks, arXiv:2211.15841, and JAX's megablox (ops/tpu/megablox) for a plan of visits
in scalar memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.matmul.mosaic_tpu import (
    Gate,
    Schedule,
    accumulate,
    at_least_sublanes,
    block_of,
    check_operands,
    check_result,
    default_schedule,
    epilogue,
)
from jdet.pallas_kernels.tpu import SUBLANES, compiler_params

__all__ = ["Schedule", "grouped", "grouped_matmul", "plan"]

_ROWS = 128  # of a tile, at most: a visit multiplies all of them, its group's or not


def _running(x: jax.Array) -> jax.Array:
    """Sums of the first 1, 2, ... elements; of integers, and few."""
    index = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(index[None] <= index[:, None], x[None], 0), axis=1, dtype=jnp.int32)


def plan(sizes: jax.Array, rows: int, height: int) -> jax.Array:
    """The visits, int32 [4, V], V static and enough for any sizes: tile, expert, first row, end.

    In ascending order of rows; every tile is visited. Rows after the last group belong to
    visits of no row, with the weights of the expert before.
    """
    experts = sizes.shape[0]
    ends = _running(sizes)
    starts = ends - sizes
    first_tile = lax.div(starts, jnp.int32(height))
    tiles = jnp.where(sizes > 0, lax.div(ends - 1, jnp.int32(height)) - first_tile + 1, 0)
    visit_ends = _running(tiles)
    count = pl.cdiv(rows, height)
    visits = count + min(experts, rows) - 1
    at = jnp.arange(visits, dtype=jnp.int32)
    expert = jnp.sum(visit_ends[None] <= at[:, None], axis=1, dtype=jnp.int32)
    real = expert < experts
    # Of the last one with rows, so that nothing else is fetched.
    last = jnp.max(jnp.where(sizes > 0, jnp.arange(experts), 0)).astype(jnp.int32)
    expert = jnp.where(real, expert, last)
    tile = first_tile[expert] + at - (visit_ends - tiles)[expert]
    # Visits beyond: the tiles after the last group's, then the last tile again.
    reached = jnp.where(ends[-1] > 0, lax.div(ends[-1] - 1, jnp.int32(height)), -1)
    beyond = jnp.minimum(reached + 1 + at - visit_ends[-1], count - 1)
    tile = jnp.where(real, tile, beyond)
    first, end = (jnp.where(real, x[expert], 0) for x in (starts, ends))
    return jnp.stack([tile, expert, first, end])


def _kernel(*refs: Any, k: int, leaves: int, gate: Gate | None) -> None:
    """refs are the plan, x, w, y, and the accumulators [halves, leaves, rows, columns]."""
    plan_ref, x_ref, w_ref, y_ref, acc_ref = refs
    visit, block = pl.program_id(1), pl.program_id(2)
    tile, first, end = plan_ref[0, visit], plan_ref[2, visit], plan_ref[3, visit]
    rows = y_ref.shape[0]

    @pl.when((block == 0) & ((visit == 0) | (plan_ref[0, lax.max(visit - 1, 0)] != tile)))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(end > first)
    def _():
        @pl.when(block == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        x = at_least_sublanes(x_ref[...])
        for half in range(acc_ref.shape[0]):
            w = w_ref[...] if gate is None else w_ref[half]
            accumulate(x, w, acc_ref.at[half], block=block, k=k, leaves=leaves)

        @pl.when(block == pl.num_programs(2) - 1)
        def _():
            result = epilogue(acc_ref, rows, x_ref.dtype, None, gate)
            row = tile * rows + lax.broadcasted_iota(jnp.int32, result.shape, 0)
            mine = (row >= first) & (row < end)
            kept = y_ref[...].astype(jnp.float32)
            y_ref[...] = jnp.where(mine, result, kept).astype(y_ref.dtype)


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "interpret"))
def _grouped(x, w, sizes, *, leaves, out_dtype, s, gate, interpret):
    (rows, k), (experts, n, _) = x.shape, w.shape
    halves = 1 if gate is None else 2
    n //= halves
    visits = plan(sizes, rows, s.bm)
    block = block_of(k, leaves, x.dtype.itemsize)
    blocks = pl.cdiv(k, block)

    def k_of(b, visit, plan_ref):
        # A visit without rows stays where the one before it was.
        return jnp.where(plan_ref[3, visit] > plan_ref[2, visit], b, blocks - 1)

    if gate is None:
        of_w = pl.BlockSpec((None, s.bn, block), lambda j, v, b, p: (p[1, v], j, k_of(b, v, p)))
    else:
        w = w.reshape(experts, 2, n, k)
        of_w = pl.BlockSpec(
            (None, 2, s.bn, block), lambda j, v, b, p: (p[1, v], 0, j, k_of(b, v, p))
        )
    return pl.pallas_call(
        functools.partial(_kernel, k=k, leaves=leaves, gate=gate),
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, s.bn), visits.shape[1], blocks),
            in_specs=[
                pl.BlockSpec((s.bm, block), lambda j, v, b, p: (p[0, v], k_of(b, v, p))),
                of_w,
            ],
            out_specs=pl.BlockSpec((s.bm, s.bn), lambda j, v, b, p: (p[0, v], j)),
            scratch_shapes=[pltpu.VMEM((halves, leaves, max(s.bm, SUBLANES), s.bn), jnp.float32)],
        ),
        compiler_params=compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * n * halves * k,
            transcendentals=0,
            bytes_accessed=(x.size + min(rows, experts) * w.size // experts) * x.dtype.itemsize,
        ),
        name="jdet_grouped_matmul" if gate is None else "jdet_grouped_gated_matmul",
        interpret=interpret,
    )(visits, x, w)


def grouped(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    gate: Gate | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`grouped_matmul`; with a gate, of w [E, 2 F, K], each expert's product is `matmul_gated`'s.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes that the kernel does not take.
    """
    if w.ndim != 3 or sizes.shape != w.shape[:1]:
        raise ValueError(f"w must be [E, N, K] and sizes [E], got {w.shape} and {sizes.shape}")
    check_operands(x, w[0], leaves)
    (rows, k), (_, n, _) = x.shape, w.shape
    if gate is not None:
        if n % 2:
            raise ValueError(f"w must be [E, 2 F, K], gate above up, got {w.shape}")
        n //= 2
    out = check_result(out_dtype or x.dtype)
    if rows == 0 or n == 0:
        return jnp.zeros((rows, n), out)
    s = schedule or default_schedule(
        min(rows, _ROWS), n, k, x.dtype.itemsize, gated=gate is not None
    )
    return _grouped(x, w, sizes, leaves=leaves, out_dtype=out, s=s, gate=gate, interpret=interpret)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[R, N]: x[r] @ w[e]^T, e the group of row r; see the module for the tree.

    Args:
      x: [R, K], bfloat16 or float32.
      w: [E, N, K], of x's dtype.
      sizes: int32 [E], rows of each group; their sum must not exceed R. Rows after it are zeros.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; bfloat16 or float32.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes that the kernel does not take.
    """
    return grouped(
        x,
        w,
        sizes,
        leaves=leaves,
        out_dtype=out_dtype,
        schedule=schedule,
        interpret=interpret,
    )
