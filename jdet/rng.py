"""Sampling noise: a function of the request alone.

noise = f(seed, sample index, position in the request's own completion, token id), by
counter-based Threefry (Salmon et al., SC 2011): no batch key, no row number, no rank after
sorting, no padded step. A batch-mate can change none of the arguments.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jdet.compat import partitionable_threefry
from jdet.pallas_kernels.trees import log

MAX_SEED = 2**64 - 1


def gumbel(
    seed: UInt32[Array, "B 2"],
    sample_index: Int32[Array, " B"],
    position: Int32[Array, " B"],
    vocab_size: int,
) -> Float32[Array, "B V"]:
    """Standard Gumbel noise, -log(-log u), u uniform on the 2**23 midpoints of (0, 1)."""

    def row(
        words: UInt32[Array, "2"], index: Int32[Array, ""], at: Int32[Array, ""]
    ) -> UInt32[Array, " V"]:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, index), at)
        return jax.random.bits(key, (vocab_size,), jnp.uint32)

    with partitionable_threefry():
        bits = jax.vmap(row)(seed, sample_index, position)
    u = ((bits >> 9).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-23)
    return -log(-log(u))
