"""Log-softmax in jnp, batch-invariant on any backend: the sum is a written-out tree."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jdet.pallas_kernels.trees import exp, log, tree_sum


def log_softmax(logits: Float[Array, "*rows V"]) -> Float32[Array, "*rows V"]:
    """See `reference.log_softmax`."""
    x = logits.astype(jnp.float32)
    shifted = x - jnp.max(x, axis=-1, keepdims=True)  # a maximum is exact in any order
    return shifted - log(tree_sum(exp(shifted)))[..., None]
