"""The sum of a token's experts in jnp, batch-invariant on any backend."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def expert_sum(
    y: Float[Array, "R D"], weights: Float[Array, "M k"], places: Int32[Array, "M k"]
) -> Float[Array, "M D"]:
    """See `reference.expert_sum`."""
    products = []
    for j in range(places.shape[1]):
        product = y[places[:, j]] * weights[:, j, None].astype(y.dtype)
        # The choice changes no value; it keeps LLVM from contracting a float32 product and the
        # addition into an FMA, which would follow fusion.
        products.append(jnp.where(jnp.isnan(product), jnp.nan, product).astype(jnp.float32))
    return functools.reduce(jnp.add, products).astype(y.dtype)
