"""The sum of a token's experts by plain XLA: not batch-invariant."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def expert_sum(
    y: Float[Array, "R D"], weights: Float[Array, "M k"], places: Int32[Array, "M k"]
) -> Float[Array, "M D"]:
    """See `reference.expert_sum`; in XLA's order."""
    return jnp.einsum(
        "mkd,mk->md", y[places], weights.astype(y.dtype), preferred_element_type=jnp.float32
    ).astype(y.dtype)
