"""Log-softmax by plain XLA: not batch-invariant. Negative control and speed baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def log_softmax(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    """logits - m - log(sum(exp(logits - m))), m the row's maximum.

    XLA owns the order of the sum.
    """
    wide = wide_dtype(logits)
    shifted = logits.astype(wide) - logits.max(axis=-1, keepdims=True).astype(wide)
    return shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True))
