"""Routing, written plainly; in float64 logits it is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jdet.pallas_kernels.route import Routing, routing


def route(
    logits: Float[Array, "M E"],
    routed: Bool[Array, " M"],
    *,
    k: int,
    normalise: bool,
) -> Routing:
    """The k experts of largest probability of each token that is `routed`, and their weights.

    Probabilities are the softmax of the logits over all experts. Of two that are equal, the
    expert with the lower index comes first; NaN comes last. With `normalise` a token's weights
    are divided by their sum.

    Tree: exponentials of the differences to the row's maximum are summed over the experts in the
    halving tree of `trees.tree_sum`, float32 (float64 for float64 logits), and divided by the
    sum; the k weights, in ascending order of experts, are summed in the same tree. Every token
    is on its own: there is no capacity, and none is dropped.

    Softmax, then top-k: Qwen3 Technical Report, arXiv:2505.09388; Shazeer et al.,
    arXiv:1701.06538.
    """
    e = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    first = jnp.argsort(-jnp.nan_to_num(p, nan=-1.0), axis=-1, stable=True)
    experts = jnp.sort(first[:, :k], axis=-1)
    weights = jnp.take_along_axis(p, experts, axis=-1)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return routing(experts, weights, routed, logits.shape[-1])
