"""RMSNorm with the residual's addition for TPU in Pallas: a row is read and written once.

Tree (a function of D alone): s = x + residual in float32, rounded to x's dtype. The squares of
s, continued with zeros to a multiple of 128, are added by columns of 128 lanes, the second
half to the first (an odd number is continued by zeros), then lanes 64, 32, ..., 1 apart:
`tpu.lane_sum`, and with D a power of two from 128 the tree of `trees.tree_sum`.
y = s * rsqrt(sum * float32(1 / D) + eps) * weight, left to right in float32, rounded once.

Schedule (what the bits do not depend on): the number of rows in a block. A row's operations
do not see the others.

Budget: VMEM = two buffers of each block of x, residual, y and s, under 16 MiB.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jdet.pallas_kernels.tpu import (
    LANES,
    check_dtypes,
    compiler_params,
    lane_index,
    lane_sum,
    round_up,
)

_BLOCK = 2**19  # elements of x in a block, about


def default_rows(rows: int, width: int) -> int:
    """Rows of a block: all of them where they are few, else a multiple of 16. Speed only."""
    return min(rows, max(16, _BLOCK // round_up(width, LANES) // 16 * 16))


def _kernel(*refs: Any, size: int, eps: float, has_residual: bool) -> None:
    """refs are x, weight, perhaps residual; y, and with a residual s."""
    x_ref, weight_ref, *rest = refs
    s = x_ref[...]
    if has_residual:
        residual_ref, y_ref, s_ref = rest
        s = s.astype(jnp.float32) + residual_ref[...].astype(jnp.float32)
        s = s.astype(x_ref.dtype)
        s_ref[...] = s
    else:
        (y_ref,) = rest
    v = s.astype(jnp.float32)
    if size % LANES:
        v = jnp.where(lane_index(v.shape) < size, v, 0.0)
    # The maximum, exact, keeps the product from being contracted into the first addition.
    total = lane_sum(jnp.maximum(v * v, 0.0))
    scale = lax.rsqrt(total * jnp.float32(1.0 / size) + jnp.float32(eps))
    y_ref[...] = (v * scale * weight_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "block_rows", "interpret"))
def _rms_norm(x, weight, residual, *, eps, block_rows, interpret):
    rows, size = x.shape
    width = round_up(size, LANES)
    of_rows = pl.BlockSpec((block_rows, width), lambda i: (i, 0))
    one = jax.ShapeDtypeStruct(x.shape, x.dtype)
    args, specs, outputs = [x, weight.reshape(1, size)], [of_rows], 1
    specs.append(pl.BlockSpec((1, width), lambda i: (0, 0)))
    if residual is not None:
        args.append(residual)
        specs.append(of_rows)
        outputs = 2
    y, *s = pl.pallas_call(
        functools.partial(_kernel, size=size, eps=eps, has_residual=residual is not None),
        out_shape=[one] * outputs,
        grid=(pl.cdiv(rows, block_rows),),
        in_specs=specs,
        out_specs=[of_rows] * outputs,
        compiler_params=compiler_params("parallel"),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.size,
            transcendentals=rows,
            bytes_accessed=2 * outputs * x.size * x.dtype.itemsize,
        ),
        name="jdet_rms_norm",
        interpret=interpret,
    )(*args)
    return y, s[0] if s else x


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    block_rows: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(norm of s times weight, s) with s = x + residual; see the module for the tree.

    Args:
      x: [..., D], bfloat16 or float32.
      weight: [D], any float dtype.
      eps: added to the mean of the squares.
      residual: as x.
      block_rows: the schedule; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      NotImplementedError: dtypes that the kernel does not take.
    """
    check_dtypes("rms_norm", x, residual)
    *lead, size = x.shape
    flat = x.reshape(-1, size)
    if not flat.size:
        return x, x
    r = None if residual is None else residual.reshape(flat.shape)
    block_rows = block_rows or default_rows(*flat.shape)
    y, s = _rms_norm(flat, weight, r, eps=eps, block_rows=block_rows, interpret=interpret)
    return y.reshape(x.shape), s.reshape(x.shape)
