"""RoPE, written plainly. It sums nothing: two products and one addition an element."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.trees import wide_dtype


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H D"]:
    """Rotate the pairs (x[i], x[i + D/2]) by the angles of their token.

    Two products and one addition an element, in float32 (float64 for float64 inputs), rounded
    once to x's dtype. Su et al., "RoFormer", arXiv:2104.09864; halves as in Hugging Face's Llama.
    """
    wide = wide_dtype(x)
    c, s = cos.astype(wide)[:, :, None], sin.astype(wide)[:, :, None]
    low, high = jnp.split(x.astype(wide), 2, axis=-1)
    rotated = jnp.concatenate([low * c - high * s, high * c + low * s], axis=-1)
    return rotated.astype(x.dtype)


def rope(
    x: Float[Array, "B T H D"],
    cos: Float[Array, "P half"],
    sin: Float[Array, "P half"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T H D"]:
    """`rotate` by the angles of each token's position; position < 0 reads row 0 of the table.

    The table is computed outside (`models.rope.Rope.table`, in float64): no sine or cosine
    runs on the device.
    """
    at = jnp.maximum(positions, 0)
    return rotate(x, cos[at], sin[at])
