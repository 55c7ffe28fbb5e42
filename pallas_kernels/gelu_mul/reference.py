"""GELU gate, written plainly."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import wide_dtype


def gelu_mul(gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
    """g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g**3))) * u, g and u the two halves.

    float32 (float64 for float64 inputs), rounded once. Hendrycks & Gimpel, arXiv:1606.08415;
    Shazeer, arXiv:2002.05202 (GEGLU).
    """
    wide = wide_dtype(gate_up)
    gate, up = jnp.split(gate_up.astype(wide), 2, axis=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate / 2 * (1 + jnp.tanh(inner)) * up).astype(gate_up.dtype)
