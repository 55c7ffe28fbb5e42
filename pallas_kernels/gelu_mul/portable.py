"""GELU gate in jnp: tanh by the exponential of `trees`, as in silu_mul."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import gelu_tanh


def gelu_mul(gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
    """See `reference.gelu_mul`."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (gelu_tanh(gate) * up).astype(gate_up.dtype)
