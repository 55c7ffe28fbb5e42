"""Grouped gated matmul by plain XLA: not batch-invariant."""

from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.grouped_matmul.xla import grouped_matmul
from jdet.pallas_kernels.silu_mul.xla import silu_mul


def grouped_gated_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E two_f K"],
    sizes: Int32[Array, " E"],
    *,
    tokens: Int32[Array, " R"] | None = None,
) -> Float[Array, "R f"]:
    """See `reference.grouped_gated_matmul`."""
    return silu_mul(grouped_matmul(x if tokens is None else x[tokens], w, sizes))
