"""The norm of the sum of a token's experts, written plainly; in float64 inputs it is the oracle."""

from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.expert_sum.reference import expert_sum
from jdet.pallas_kernels.rms_norm.reference import rms_norm


def expert_norm(
    y: Float[Array, "R D"],
    weights: Float[Array, "M k"],
    places: Int32[Array, "M k"],
    weight: Float[Array, " D"],
    residual: Float[Array, "M D"],
    *,
    eps: float,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """`rms_norm` of `expert_sum`: (weight * s / sqrt(mean(s**2) + eps), s), s = sum + residual.

    Tree: that of the one, and of its result, rounded to y's dtype, that of the other.
    """
    total = expert_sum(y, weights, places)
    return rms_norm(total, weight, eps=eps, residual=residual)
