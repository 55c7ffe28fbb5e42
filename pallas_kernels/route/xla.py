"""Routing by plain XLA: not batch-invariant."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jdet.pallas_kernels.route import Routing, routing


def route(
    logits: Float[Array, "M E"],
    routed: Bool[Array, " M"],
    *,
    k: int,
    normalise: bool,
) -> Routing:
    """`jax.nn.softmax` and `lax.top_k`; see `reference.route`."""
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    experts = jnp.sort(lax.top_k(p, k)[1].astype(jnp.int32), axis=-1)
    weights = jnp.take_along_axis(p, experts, axis=-1)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return routing(experts, weights, routed, logits.shape[-1])
