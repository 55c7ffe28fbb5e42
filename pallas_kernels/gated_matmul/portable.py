"""Gated matmul in jnp: its two parts, one after the other."""

from jaxtyping import Array, Float

from jdet.pallas_kernels.matmul.portable import matmul
from jdet.pallas_kernels.silu_mul.portable import silu_mul


def gated_matmul(x: Float[Array, "M K"], w: Float[Array, "two_f K"]) -> Float[Array, "M f"]:
    """See `reference.gated_matmul`."""
    return silu_mul(matmul(x, w))
