"""SiLU gate, written plainly."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def silu_mul(gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
    """g / (1 + exp(-g)) * u, g and u the two halves of the last axis.

    float32 (float64 for float64 inputs), rounded once. Shazeer, arXiv:2002.05202 (SwiGLU).
    """
    wide = wide_dtype(gate_up)
    gate, up = jnp.split(gate_up.astype(wide), 2, axis=-1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(gate_up.dtype)
