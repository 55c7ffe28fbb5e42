"""Matmul for TPU in Pallas: one tree, many schedules.

y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]), weights stored as checkpoints store
them. bfloat16 operands, or float32 ones, which are not narrowed (Precision.HIGHEST).

Tree (what the bits depend on):

- K is cut into blocks of `k_block(K / leaves, dtype)`, or of `k_block(K, dtype)` where blocks of
  the former do not divide a leaf. A block's part of a leaf is one product of the matrix unit,
  accumulated in float32; the order inside it belongs to the hardware and to Mosaic, which with
  `shape_invariant_numerics` does not look at M or N. Where a block reaches into another leaf,
  or beyond K, those elements of x are zeros, and of w too beyond K.
- The products of a leaf are added to its accumulator, ascending, from 0, in float32.
- The sums of the leaves are added in a balanced binary tree of neighbours, in float32.
- Then the bias is added in float32, and the result is rounded once to `out_dtype`.

The size of a block follows (K, leaves, dtype) alone.

Schedules (what the bits do not depend on): the rows and columns of a tile of y (`Schedule`). The
grid is (rows, columns, blocks of K), K innermost; Pallas' pipeline fetches the next blocks of x
and w while one is multiplied. Few rows: one tile has them all, and w streams through once, in
blocks of about 4 MiB. Rows and columns beyond the edges hold anything, give results of their own
alone, and are not stored.

`matmul_gated` is the same kernel with an elementwise gate of two results in its epilogue: w is
[2 F, K], read as [2, F, K], and a step multiplies a block of each half.

Budget: VMEM = two buffers each of x's, w's and y's blocks and one accumulator a leaf, under
24 MiB, and 32 with 8 leaves.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.

Sources: JAX's Pallas TPU guide (docs/pallas/tpu/matmul.md) for the shape of the pipeline.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.tpu import (
    LANES,
    SUBLANES,
    check_dtypes,
    compiler_params,
    dot_minor,
    lane_index,
    round_up,
)
from jdet.pallas_kernels.trees import balanced_sum

# Of two float32 results of `matmul`, rounded to x's dtype, in tiles: the gated result, float32.
type Gate = Callable[[jax.Array, jax.Array], jax.Array]

_FEW = 256  # rows that one tile holds whatever their number
_BLOCK_BYTES = 2**22  # of w in one step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A tile of y: `bm` rows (all of x's, or a multiple of 16), `bn` columns, multiple of 128."""

    bm: int
    bn: int


def k_block(k: int, itemsize: int) -> int:
    """Elements of K in one product: all, or the largest multiple of 128 that divides K.

    At most 2048 of 16 bits or 1024 of 32; where no quarter of that divides K, that much, and
    the last block ends with K.
    """
    most = 4096 // itemsize
    if k <= most:
        return k
    best = max((b for b in range(LANES, most + 1, LANES) if k % b == 0), default=0)
    return best if 4 * best >= most else most


def block_of(k: int, leaves: int, itemsize: int) -> int:
    """The size of the tree's blocks: one that divides a leaf where there is such a one."""
    leaf = k // leaves
    block = k_block(leaf, itemsize)
    even = leaf % block == 0 and (leaves == 1 or block % LANES == 0)
    return block if even else k_block(k, itemsize)


def default_schedule(
    m: int, n: int, k: int, itemsize: int, gated: bool = False, leaves: int = 1
) -> Schedule:
    """The schedule to use for a shape; n is y's columns. Speed only."""
    block = k_block(k, itemsize)
    if m > _FEW:
        bn = 512 if gated or itemsize == 4 else 1024
        # By the compiler's profile 512 rows take 1.2 times XLA's cycles, and 1024 take 1.05.
        bm = 1024 if m > 512 and bn == 1024 and leaves == 1 else 512
        return Schedule(bm, min(bn, round_up(n, LANES)))
    most = _BLOCK_BYTES // (block * itemsize * (2 if gated else 1)) // LANES * LANES
    # Four steps at least, so that all but the first block's copy has company.
    return Schedule(m, max(LANES, min(most, round_up(pl.cdiv(n, 4), LANES))))


def _masked(x: jax.Array, low: Any, high: Any) -> jax.Array:
    lane = lane_index(x.shape)
    return jnp.where((lane >= low) & (lane < high), x, jnp.zeros_like(x))


def accumulate(
    x: jax.Array, w: jax.Array, acc_ref: Any, *, block: Any, k: int, leaves: int
) -> None:
    """Add the products of block number `block` of K to the leaves' accumulators [leaves, M, N]."""
    size, leaf = x.shape[1], k // leaves
    if leaf % size == 0:
        at = lax.div(block, leaf // size) if leaves > 1 else 0
        acc_ref[at] += dot_minor(x, w)
        return
    start = block * size
    if k % size:
        w = _masked(w, 0, k - start)
    first = lax.div(start, leaf)
    # The most leaves that a block can meet, wherever it begins.
    for i in range(min(leaves, pl.cdiv(size - 1, leaf) + 1)):
        at = lax.min(first + i, leaves - 1)
        low, high = at * leaf - start, (at + 1) * leaf - start
        # A leaf that the block does not reach, or that was the last one's repetition: no element.
        high = jnp.where(first + i < leaves, high, low)
        acc_ref[at] += dot_minor(_masked(x, low, high), w)


def at_least_sublanes(x: jax.Array) -> jax.Array:
    """x, continued with zero rows up to `SUBLANES`."""
    missing = SUBLANES - x.shape[0]
    if missing <= 0:
        return x
    return jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)])


def epilogue(
    acc_ref: Any, rows: int, dtype: Any, bias: jax.Array | None, gate: Gate | None
) -> jax.Array:
    """The float32 results of a tile's first `rows`, before their rounding."""
    halves, leaves = acc_ref.shape[:2]
    results = [
        balanced_sum([acc_ref[half, leaf] for leaf in range(leaves)])[:rows]
        for half in range(halves)
    ]
    if bias is not None:
        results = [y + bias.astype(jnp.float32) for y in results]
    if gate is None:
        return results[0]
    return gate(*(y.astype(dtype).astype(jnp.float32) for y in results))


def _kernel(*refs: Any, k: int, leaves: int, has_bias: bool, gate: Gate | None) -> None:
    """refs are x, w, perhaps bias, y, and the accumulators [halves, leaves, rows, columns]."""
    x_ref, w_ref, *optional, y_ref, acc_ref = refs
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    x = at_least_sublanes(x_ref[...])
    for half in range(acc_ref.shape[0]):
        w = w_ref[...] if gate is None else w_ref[half]
        accumulate(x, w, acc_ref.at[half], block=block, k=k, leaves=leaves)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        bias = optional[0][...] if has_bias else None
        y_ref[...] = epilogue(acc_ref, y_ref.shape[0], x_ref.dtype, bias, gate).astype(y_ref.dtype)


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "interpret"))
def _matmul(x, w, bias, *, leaves, out_dtype, s, gate, interpret):
    m, k = x.shape
    halves = 1 if gate is None else 2
    n = w.shape[0] // halves
    block = block_of(k, leaves, x.dtype.itemsize)
    specs = [pl.BlockSpec((s.bm, block), lambda i, j, b: (i, b))]
    if gate is None:
        specs.append(pl.BlockSpec((s.bn, block), lambda i, j, b: (j, b)))
    else:
        w = w.reshape(2, n, k)
        specs.append(pl.BlockSpec((2, s.bn, block), lambda i, j, b: (0, j, b)))
    args = [x, w]
    if bias is not None:
        args.append(bias.reshape(1, n))
        specs.append(pl.BlockSpec((1, s.bn), lambda i, j, b: (0, j)))
    itemsize = x.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, k=k, leaves=leaves, has_bias=bias is not None, gate=gate),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(m, s.bm), pl.cdiv(n, s.bn), pl.cdiv(k, block)),
        in_specs=specs,
        out_specs=pl.BlockSpec((s.bm, s.bn), lambda i, j, b: (i, j)),
        scratch_shapes=[pltpu.VMEM((halves, leaves, max(s.bm, SUBLANES), s.bn), jnp.float32)],
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * halves * k,
            transcendentals=0,
            bytes_accessed=(x.size + w.size) * itemsize + m * n * out_dtype.itemsize,
        ),
        name="jdet_matmul" if gate is None else "jdet_gated_matmul",
        interpret=interpret,
    )(*args)


def check_result(out_dtype: DTypeLike) -> Any:
    """The dtype of the result. Raise if it is none that the kernel writes."""
    out = jnp.dtype(out_dtype)
    if out not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise NotImplementedError(f"mosaic_tpu matmul cannot write {out}")
    return out


def check_operands(x: jax.Array, w: jax.Array, leaves: int = 1) -> None:
    """Raise unless x [M, K] and w [N, K] are what the kernel multiplies."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x [M, K] and w [N, K] must share K, got {x.shape} and {w.shape}")
    k = x.shape[1]
    if leaves < 1 or leaves & (leaves - 1) or k % leaves:
        raise ValueError(f"leaves must be a power of two that divides K = {k}, got {leaves}")
    check_dtypes("matmul", x, w)


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
      x: [M, K], bfloat16 or float32.
      w: [N, K], of x's dtype.
      bias: [N], any float dtype; added in float32.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; bfloat16 or float32.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes that the kernel does not take.
    """
    check_operands(x, w, leaves)
    (m, k), n = x.shape, w.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape {(n,)} for w {w.shape}, got {bias.shape}")
    out = check_result(out_dtype or x.dtype)
    if m == 0 or n == 0:
        return jnp.zeros((m, n), out)
    s = schedule or default_schedule(m, n, k, x.dtype.itemsize, leaves=leaves)
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

    The gate sees what `matmul` returns, the same sums rounded to x's dtype, as float32.

    Args:
      x: [M, K], bfloat16 or float32.
      w: [2 F, K], of x's dtype.
      gate: elementwise, of two tiles; a function of a module, since programs are cached by it.
      schedule: by shape unless given. Never changes the result.
      interpret: as for `matmul`.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes that the kernel does not take.
    """
    check_operands(x, w)
    (m, k), n = x.shape, w.shape[0]
    if n % 2:
        raise ValueError(f"w must be [2 F, K], gate above up, got {w.shape}")
    if m == 0 or n == 0:
        return jnp.zeros((m, n // 2), x.dtype)
    s = schedule or default_schedule(m, n // 2, k, x.dtype.itemsize, gated=True)
    return _matmul(x, w, None, leaves=1, out_dtype=x.dtype, s=s, gate=gate, interpret=interpret)
