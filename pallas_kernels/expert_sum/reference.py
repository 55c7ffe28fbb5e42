"""The sum of a token's experts, written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.trees import wide_dtype


def expert_sum(
    y: Float[Array, "R D"], weights: Float[Array, "M k"], places: Int32[Array, "M k"]
) -> Float[Array, "M D"]:
    """sum over j of weights[m, j] * y[places[m, j]], in the order of j: of ascending experts.

    Tree: a weight is rounded to y's dtype, and so is each product; the products are added one
    after another in float32 (float64 for float64 inputs), and the sum is rounded to y's dtype. A
    token gathers its own rows: nothing is scattered, and no other token matters.
    """
    wide = wide_dtype(y)
    total = jnp.zeros((places.shape[0], y.shape[1]), wide)
    for j in range(places.shape[1]):
        product = y[places[:, j]] * weights[:, j, None].astype(y.dtype)
        total = total + product.astype(wide)
    return total.astype(y.dtype)
