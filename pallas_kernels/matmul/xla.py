"""Matmul by plain XLA: not batch-invariant. The negative control and the speed baseline."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    bias: Float[Array, " N"] | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M N"]:
    """One dot_general with float32 accumulation in whatever order XLA chooses for this M.

    `leaves` has no meaning here: XLA owns the tree.
    """
    del leaves
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)
