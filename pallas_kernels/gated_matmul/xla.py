"""Gated matmul by plain XLA: not batch-invariant. The negative control and the speed baseline."""

from jaxtyping import Array, Float

from jdet.pallas_kernels.matmul.xla import matmul
from jdet.pallas_kernels.silu_mul.xla import silu_mul


def gated_matmul(x: Float[Array, "M K"], w: Float[Array, "two_f K"]) -> Float[Array, "M f"]:
    """See `reference.gated_matmul`."""
    return silu_mul(matmul(x, w))
