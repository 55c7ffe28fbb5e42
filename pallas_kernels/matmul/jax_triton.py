"""Matmul as a Triton kernel, called through jax_triton: the road to cards without Mosaic GPU.

Tree: that of `mosaic_gpu`, and on a Hopper card its bits (scripts/check_gpu_triton.py). K is cut
into `leaves` equal parts, each one float32 accumulator fed by `tl.dot` 16 elements of K at a
time, ascending; the parts are added in a balanced binary tree of neighbours; then the bias, in
float32; one rounding. Elements beyond K are zeros.

Schedules: tiles of 16 to 128 rows (`mma` below 64, `wgmma` from there on a Hopper card), chosen
by M. Nothing splits K over blocks. No autotuner: it would choose by its own timing.

Needs the extra `triton` (jax-triton 0.3.1 for Triton 3.6). Only matmul has this implementation, so
no whole model runs on it.

Sources: Triton's matrix multiplication tutorial for the form of such a kernel;
github.com/jax-ml/jax-triton.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from jax_triton import triton_call  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise ImportError(
        "the jax_triton matmul needs the extra: pip install 'jdet[triton]'"
    ) from error

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_LEAVES = (1, 2, 4, 8)

# (largest M, rows, columns and K elements of a tile, warps, pipeline stages)
_SCHEDULES = (
    (16, 16, 64, 128, 4, 4),
    (32, 32, 64, 128, 4, 4),
    (64, 64, 64, 128, 4, 4),
    (1 << 31, 128, 128, 64, 8, 3),
)


@triton.jit
def _kernel(
    x,
    w,
    bias,
    y,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    leaves: tl.constexpr,
    has_bias: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
):
    rows = tl.program_id(0) * bm + tl.arange(0, bm)
    cols = tl.program_id(1) * bn + tl.arange(0, bn)
    steps = tl.arange(0, bk)
    x_rows = x + rows[:, None].to(tl.int64) * k
    w_rows = w + cols[None, :].to(tl.int64) * k
    per_leaf: tl.constexpr = k // leaves
    total = tl.zeros((bm, bn), tl.float32)
    # Sums of 1, 2 and 4 leaves that wait for their neighbour.
    ones, twos, fours = total, total, total
    for leaf in tl.static_range(leaves):
        part = tl.zeros((bm, bn), tl.float32)
        for start in range(0, per_leaf, bk):
            inside = start + steps < per_leaf
            at = leaf * per_leaf + start + steps
            a = tl.load(x_rows + at[None, :], (rows[:, None] < m) & inside[None, :], 0.0)
            b = tl.load(w_rows + at[:, None], (cols[None, :] < n) & inside[:, None], 0.0)
            part = tl.dot(a, b, part)
        if leaf & 1:
            part = ones + part
            if leaf & 2:
                part = twos + part
                if leaf & 4:
                    part = fours + part
                else:
                    fours = part
            else:
                twos = part
        else:
            ones = part
        total = part
    if has_bias:
        total += tl.load(bias + cols, cols < n, 0.0).to(tl.float32)[None, :]
    where = y + rows[:, None].to(tl.int64) * n + cols[None, :]
    tl.store(where, total.to(y.dtype.element_ty), (rows[:, None] < m) & (cols[None, :] < n))


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """y[M, N] = x[M, K] @ w[N, K]^T + bias[N]; see the module for the tree.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [N, K], of x's dtype.
      bias: [N], any float dtype; added in float32.
      leaves: 1, 2, 4 or 8 equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: dtypes or leaves this kernel does not have.
    """
    (m, k), n = x.shape, w.shape[0]
    if w.shape != (n, k) or (bias is not None and bias.shape != (n,)):
        raise ValueError(f"x [M, K], w [N, K], bias [N] do not fit: {x.shape}, {w.shape}")
    if x.dtype not in _OPERANDS or w.dtype != x.dtype:
        raise NotImplementedError(
            f"jax_triton matmul takes bfloat16 or float16, got {x.dtype} and {w.dtype}"
        )
    if leaves not in _LEAVES or k % leaves:
        raise NotImplementedError(
            f"jax_triton matmul takes 1, 2, 4 or 8 leaves that divide K = {k}, got {leaves}"
        )
    _, bm, bn, bk, warps, stages = next(s for s in _SCHEDULES if m <= s[0])
    return triton_call(
        x,
        w,
        x if bias is None else bias,
        kernel=_kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype or x.dtype),
        grid=(-(-m // bm), -(-n // bn)),
        num_warps=warps,
        num_stages=stages,
        m=m,
        n=n,
        k=k,
        leaves=leaves,
        has_bias=bias is not None,
        bm=bm,
        bn=bn,
        bk=bk,
    )
