"""The norm of the sum of a token's experts in jnp: its two parts, one after the other."""

from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.expert_sum.portable import expert_sum
from jdet.pallas_kernels.rms_norm.portable import rms_norm


def expert_norm(
    y: Float[Array, "R D"],
    weights: Float[Array, "M k"],
    places: Int32[Array, "M k"],
    weight: Float[Array, " D"],
    residual: Float[Array, "M D"],
    *,
    eps: float,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """See `reference.expert_norm`."""
    total = expert_sum(y, weights, places)
    return rms_norm(total, weight, eps=eps, residual=residual)
