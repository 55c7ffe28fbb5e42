"""The normalizer of logits, written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.trees import wide_dtype


def log_normalizer(logits: Float[Array, "*rows V"]) -> LogNormalizer:
    """The maximum m, log(sum(exp(logits - m))), and the first index of m.

    Tree: the exponentials are summed in float32 (float64 for float64 inputs) in the halving
    tree of `trees.tree_sum`.
    """
    x = logits.astype(wide_dtype(logits))
    maximum = x.max(axis=-1)
    log_sum = jnp.log(jnp.exp(x - maximum[..., None]).sum(axis=-1))
    return LogNormalizer(maximum, log_sum, jnp.argmax(x, axis=-1).astype(jnp.int32))
