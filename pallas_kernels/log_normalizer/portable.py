"""The normalizer of logits in jnp, batch-invariant on any backend: a written-out tree."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.trees import exp, log, tree_sum


def log_normalizer(logits: Float[Array, "*rows V"]) -> LogNormalizer:
    """See `reference.log_normalizer`. A maximum and its first index are exact in any order."""
    x = logits.astype(jnp.float32)
    maximum = jnp.max(x, axis=-1)
    log_sum = log(tree_sum(exp(x - maximum[..., None])))
    return LogNormalizer(maximum, log_sum, jnp.argmax(x, axis=-1).astype(jnp.int32))
