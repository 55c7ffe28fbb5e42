"""Log-softmax, written plainly; in float64 inputs it is the oracle."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def log_softmax(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    """logits - m - log(sum(exp(logits - m))), m the row's maximum.

    Tree: the exponentials are summed in float32 (float64 for float64 inputs) in the halving
    tree of `trees.tree_sum`. The result is (logits - m) - log(sum): two roundings.
    """
    wide = wide_dtype(logits)
    shifted = logits.astype(wide) - logits.max(axis=-1, keepdims=True).astype(wide)
    return shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True))
