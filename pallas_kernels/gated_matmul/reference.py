"""Gated matmul, the tree written plainly; in float64 inputs it is the oracle."""

from jaxtyping import Array, Float

from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.gelu_mul.reference import gelu_mul
from jdet.pallas_kernels.matmul.reference import matmul
from jdet.pallas_kernels.silu_mul.reference import silu_mul

_GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated_matmul(
    x: Float[Array, "M K"], w: Float[Array, "two_f K"], *, activation: Activation = "silu"
) -> Float[Array, "M f"]:
    """activation(x @ w[:F].T) * (x @ w[F:].T).

    Tree: both products are `matmul`'s with one leaf, rounded to x's dtype; the gate is
    `silu_mul`'s or `gelu_mul`'s, in float32 (float64 for float64 inputs), rounded once.
    """
    return _GATES[activation](matmul(x, w))
