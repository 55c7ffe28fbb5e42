"""Soft cap of logits, written plainly."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def soft_cap(x: Float[Array, "*rows V"], *, cap: float) -> Float[Array, "*rows V"]:
    """cap * tanh(x / cap), in float32 (float64 for float64 inputs), rounded once.

    Bello et al., "Neural Combinatorial Optimization", arXiv:1611.09940.
    """
    return (jnp.tanh(x.astype(wide_dtype(x)) / cap) * cap).astype(x.dtype)
