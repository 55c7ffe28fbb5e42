"""SiLU gate in jnp: the exponential is ours, since XLA:CPU's differs in an array's tail."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdet.pallas_kernels.trees import silu


def silu_mul(gate_up: Float[Array, "*rows two_f"]) -> Float[Array, "*rows f"]:
    """See `reference.silu_mul`."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (silu(gate) * up).astype(gate_up.dtype)
