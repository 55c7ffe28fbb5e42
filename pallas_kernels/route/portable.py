"""Routing in jnp, batch-invariant on any backend: trees for the sums, comparisons for the order."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.pallas_kernels.route import Routing, routing
from jdet.pallas_kernels.trees import exp, tree_sum


def first_experts(p: Float32[Array, "M E"], k: int) -> Int32[Array, "M k"]:
    """The k largest of each row by value, then by index, in ascending order of index.

    No sort and no top-k: an expert's rank is the number of those before it, counted, and every
    rank below k is one expert. Counts of integers are exact in any order.
    """
    p = jnp.where(jnp.isnan(p), -1, p)  # so that a row of NaN has ranks too
    index = jnp.arange(p.shape[1])
    mine, other = p[:, :, None], p[:, None, :]
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=2, dtype=jnp.int32)
    by_rank = jnp.sum(
        jnp.where(rank[:, None, :] == jnp.arange(k)[:, None], index, 0), axis=2, dtype=jnp.int32
    )
    place = jnp.sum(by_rank[:, None, :] < by_rank[:, :, None], axis=2, dtype=jnp.int32)
    at = place[:, None, :] == jnp.arange(k)[:, None]
    return jnp.sum(jnp.where(at, by_rank[:, None, :], 0), axis=2, dtype=jnp.int32)


def row_maximum(x: Float32[Array, "M E"]) -> Float32[Array, "M 1"]:
    """The maximum of each row, NaN where it has one.

    Written out, though exact in any order: a reduction, its broadcast and a difference are
    a pattern that XLA:GPU gives to Triton, exponential and all.
    """
    while x.shape[1] > 1:
        half = -(-x.shape[1] // 2)
        x = jnp.maximum(x[:, :half], x[:, -half:])
    return x


def route(
    logits: Float[Array, "M E"],
    routed: Bool[Array, " M"],
    *,
    k: int,
    normalise: bool,
) -> Routing:
    """See `reference.route`. Divisions are correctly rounded operations."""
    x = logits.astype(jnp.float32)
    e = exp(x - row_maximum(x))
    p = e / tree_sum(e)[:, None]
    experts = first_experts(p, k)
    weights = jnp.take_along_axis(p, experts, axis=-1)
    if normalise:
        weights = weights / tree_sum(weights)[:, None]
    return routing(experts, weights, routed, x.shape[1])
