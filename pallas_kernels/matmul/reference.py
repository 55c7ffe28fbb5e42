"""Matmul, the tree written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import balanced_sum, wide_dtype


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    bias: Float[Array, " N"] | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M N"]:
    """y[m, n] = sum over k of x[m, k] * w[n, k], plus bias[n].

    Tree: K is cut into `leaves` equal parts; each part is summed over k ascending in
    float32 (float64 for float64 inputs); the part sums are added in a balanced binary
    tree of neighbours; the bias is added; one rounding to `out_dtype` (x's dtype).
    """
    wide = wide_dtype(x)
    parts = [
        jnp.einsum("mk,nk->mn", xs.astype(wide), ws.astype(wide), precision=lax.Precision.HIGHEST)
        for xs, ws in zip(jnp.split(x, leaves, axis=1), jnp.split(w, leaves, axis=1), strict=True)
    ]
    y = balanced_sum(parts)
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(out_dtype or x.dtype)
