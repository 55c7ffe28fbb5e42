"""Routing of tokens to experts: which, with what weights, and the rows of the grouped matmul."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


class Routing(NamedTuple):
    """M tokens with k experts each, and R = M k rows sorted by expert; a pytree.

    A token that is not routed has experts E, weights 0, and rows after those of every group.

    Attributes:
      experts: of each token, ascending.
      weights: of the expert at the same place.
      tokens: the token of each row. Rows are sorted by expert, those of one expert by token.
      places: the row of each token's expert.
      sizes: rows of each expert.
      tiles: what the grouped matmuls of the implementation make of the sizes, where routing did
        it for them (`grouped_matmul.mosaic_gpu.plan`).
    """

    experts: Int32[Array, "M k"]
    weights: Float[Array, "M k"]
    tokens: Int32[Array, " R"]
    places: Int32[Array, "M k"]
    sizes: Int32[Array, " E"]
    tiles: Int32[Array, "T 3"] | None = None


_FEW = 512  # rows up to which they are counted rather than sorted: fewer kernels on a GPU


def routing(
    experts: Int32[Array, "M k"],
    weights: Float[Array, "M k"],
    routed: Bool[Array, " M"],
    num_experts: int,
) -> Routing:
    """The rows of experts that have been chosen; integers alone, exact in any order."""
    experts = jnp.where(routed[:, None], experts, num_experts)
    weights = jnp.where(routed[:, None], weights, 0)
    rows, k = experts.size, experts.shape[1]
    # One key that is unique, so that no sort has ties to break.
    number = jnp.arange(rows, dtype=jnp.int32)
    keys = experts.reshape(-1) * rows + number
    if rows <= _FEW:
        places = jnp.sum(keys < keys[:, None], axis=1, dtype=jnp.int32)
        here = places == number[:, None]
        tokens = jnp.sum(jnp.where(here, lax.div(number, k), 0), axis=1, dtype=jnp.int32)
    else:
        keys = lax.sort(keys)
        order = keys - lax.div(keys, jnp.int32(rows)) * rows
        places = jnp.zeros_like(number).at[order].set(number, unique_indices=True)
        tokens = lax.div(order, jnp.int32(k))
    sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Routing(experts, weights, tokens, places.reshape(experts.shape), sizes)
