"""Soft cap in jnp: tanh is that of `trees`, since XLA's follows the array's length."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import tanh


def soft_cap(x: Float[Array, "*rows V"], *, cap: float) -> Float[Array, "*rows V"]:
    """See `reference.soft_cap`."""
    y = tanh(x.astype(jnp.float32) / jnp.float32(cap)) * jnp.float32(cap)
    # The maximum, exact, keeps LLVM from contracting the product into an addition that follows.
    return jnp.maximum(y, jnp.float32(-cap)).astype(x.dtype)
