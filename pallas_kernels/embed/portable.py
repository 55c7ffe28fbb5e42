"""Embedding by portable: the reference, its product kept apart from what follows it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.embed import reference


def embed(
    tokens: Int32[Array, "*rows"], table: Float[Array, "V D"], *, scale: float | None = None
) -> Float[Array, "*rows D"]:
    """See `reference.embed`."""
    rows = reference.embed(tokens, table, scale=scale)
    # The maximum, exact, keeps LLVM from contracting the product into the first residual's
    # addition (an FMA), which would follow fusion.
    return rows if scale is None else jnp.maximum(rows, jnp.finfo(rows.dtype).min)
