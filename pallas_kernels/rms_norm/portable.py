"""RMSNorm in jnp, batch-invariant on any backend: the sum is a written-out tree."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import tree_sum


def rms_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    residual: Float[Array, "*rows D"] | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """See `reference.rms_norm`. Square root and division are correctly rounded operations."""
    s = x
    if residual is not None:
        s = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
    v = s.astype(jnp.float32)
    # The maximum, exact, keeps LLVM from contracting the product into the tree's first
    # addition (an FMA), which would follow fusion.
    squares = jnp.maximum(v * v, jnp.float32(0))
    mean = tree_sum(squares)[..., None] * jnp.float32(1.0 / x.shape[-1])
    scale = jnp.float32(1.0) / jnp.sqrt(mean + jnp.float32(eps))
    return (v * scale * weight.astype(jnp.float32)).astype(x.dtype), s
