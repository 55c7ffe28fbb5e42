"""Grouped matmul, the tree written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.matmul.reference import matmul


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "E N K"],
    sizes: Int32[Array, " E"],
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "R N"]:
    """y[r, n] = sum over k of x[r, k] * w[e, n, k], e the group of row r.

    The first sizes[0] rows are group 0, the next sizes[1] group 1, and so on; a group may be
    empty. Rows after the last group are zeros, whatever x holds there. The sizes are data: their
    sum must not exceed R.

    Tree: `matmul`'s, of the row and its expert's weights, with `leaves` parts of K and one
    rounding to `out_dtype` (x's dtype). It does not see the sizes: a row has the bits that
    `matmul(x[r:r+1], w[e])` gives it.
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    y = jnp.zeros((x.shape[0], w.shape[1]), out_dtype or x.dtype)
    for e in range(w.shape[0]):
        mine = (ends[e] - sizes[e] <= row) & (row < ends[e])
        y = jnp.where(mine, matmul(x, w[e], leaves=leaves, out_dtype=out_dtype), y)
    return y
