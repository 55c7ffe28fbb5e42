"""RMSNorm, written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def rms_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    residual: Float[Array, "*rows D"] | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """(weight * s / sqrt(mean(s**2) + eps), s) where s = x + residual (x when None).

    Tree: s is rounded to x's dtype; the squares are summed in float32 (float64 for float64
    inputs) in the halving tree of `trees.tree_sum`; one rounding of the product at the end.
    Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    wide = wide_dtype(x)
    s = x if residual is None else (x.astype(wide) + residual.astype(wide)).astype(x.dtype)
    v = s.astype(wide)
    scale = 1 / jnp.sqrt(jnp.mean(v * v, axis=-1, keepdims=True) + eps)
    return (v * scale * weight.astype(wide)).astype(x.dtype), s
