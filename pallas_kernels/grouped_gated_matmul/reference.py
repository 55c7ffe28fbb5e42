"""Grouped gated matmul, the tree written plainly; in float64 inputs it is the oracle."""

from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.grouped_matmul.reference import grouped_matmul
from jdet.pallas_kernels.silu_mul.reference import silu_mul


def grouped_gated_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E two_f K"],
    sizes: Int32[Array, " E"],
    *,
    tokens: Int32[Array, " R"] | None = None,
) -> Float[Array, "R f"]:
    """silu(x[r] @ gate.T) * (x[r] @ up.T), w[e] of the group of row r being gate above up.

    Groups as in `grouped_matmul`: the first sizes[0] rows are group 0, and so on; rows after the
    last group are zeros. With tokens, row r is x[tokens[r]], and no group has a token twice.

    Tree: both products are `grouped_matmul`'s with one leaf, rounded to x's dtype; the gate is
    `silu_mul`'s, in float32 (float64 for float64 inputs), rounded once: the bits of
    `gated_matmul(x[r:r+1], w[e])`.
    """
    return silu_mul(grouped_matmul(x if tokens is None else x[tokens], w, sizes))
