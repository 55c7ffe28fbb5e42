"""The normalizer of logits by plain XLA: not batch-invariant. Control and speed baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.trees import wide_dtype


def log_normalizer(logits: Float[Array, "*rows V"]) -> LogNormalizer:
    """The maximum m, log(sum(exp(logits - m))), and the first index of m.

    XLA owns the order of the sum.
    """
    x = logits.astype(wide_dtype(logits))
    maximum = x.max(axis=-1)
    log_sum = jnp.log(jnp.exp(x - maximum[..., None]).sum(axis=-1))
    return LogNormalizer(maximum, log_sum, jnp.argmax(x, axis=-1).astype(jnp.int32))
