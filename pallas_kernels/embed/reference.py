"""Embedding: rows of a table, perhaps times one number."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.trees import wide_dtype


def rows_of(tokens: Int32[Array, "*rows"], table: Float[Array, "V D"]) -> Float[Array, "*rows D"]:
    """table[tokens]. A token outside the table gives NaN, so that it cannot pass unseen."""
    tokens = jnp.where(tokens < 0, table.shape[0], tokens)  # take would count from the end
    return jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan)


def embed(
    tokens: Int32[Array, "*rows"], table: Float[Array, "V D"], *, scale: float | None = None
) -> Float[Array, "*rows D"]:
    """table[tokens] * scale; a token outside the table gives NaN.

    The scale is first rounded to the table's dtype, the product once.
    """
    rows = rows_of(tokens, table)
    if scale is None:
        return rows
    wide = wide_dtype(table)
    return (rows.astype(wide) * jnp.asarray(scale, table.dtype).astype(wide)).astype(table.dtype)
