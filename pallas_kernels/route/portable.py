"""Routing in jnp, batch-invariant on any backend: trees for the sums, comparisons for the order."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.pallas_kernels.route import Routing, routing
from jdet.pallas_kernels.trees import exp, tree_sum


def first_experts(
    p: Float32[Array, "M E"], k: int
) -> tuple[Int32[Array, "M k"], Float32[Array, "M k"]]:
    """The k largest of each row by value, then by index: indices, ascending, and values.

    Rows of maxima, minima and sums of integers, exact in any order, which XLA:GPU makes two kernels
    of: counting an expert's rank among all others takes it minutes to compile for 20,000 tokens.
    Probabilities are not negative, so their bits order as they do.
    """
    if p.shape[0] == 1:  # of a single row XLA:GPU makes a kernel of each reduction
        experts, weights = first_experts(jnp.concatenate([p, p]), k)
        return experts[:1], weights[:1]
    p = lax.optimization_barrier(p)  # so that the kernels hold no arithmetic of floats
    index = jnp.arange(p.shape[1], dtype=jnp.int32)
    value = lax.bitcast_convert_type(p, jnp.int32)
    left, chosen = jnp.where(jnp.isnan(p), -1, value), jnp.zeros(p.shape, bool)

    def first(mask: Bool[Array, "M E"]) -> Bool[Array, "M E"]:
        """Each row's first True alone."""
        return index == jnp.min(jnp.where(mask, index, p.shape[1]), axis=1, keepdims=True)

    for _ in range(k):
        chosen |= first(left == jnp.max(left, axis=1, keepdims=True))
        left = jnp.where(chosen, -2, left)
    place = jnp.full(p.shape, k, jnp.int32)
    for i in range(k):
        place = jnp.where(first(chosen), i, place)
        chosen &= place == k
    here = place[:, None, :] == jnp.arange(k)[:, None]

    def pick(x: Int32[Array, "*M E"]) -> Int32[Array, "M k"]:
        return jnp.sum(jnp.where(here, x[..., None, :], 0), axis=2, dtype=jnp.int32)

    experts, weights = lax.optimization_barrier((pick(index), pick(value)))
    return experts, lax.bitcast_convert_type(weights, jnp.float32)


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
    """See `reference.route`. Divisions are correctly rounded on a CPU, `div.full` on a GPU."""
    x = logits.astype(jnp.float32)
    e = exp(x - row_maximum(x))
    p = e / tree_sum(e)[:, None]
    experts, weights = first_experts(p, k)
    if normalise:
        weights = weights / tree_sum(weights)[:, None]
    return routing(experts, weights, routed, x.shape[1])
