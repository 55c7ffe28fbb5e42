"""Gated matmul in jnp: its two parts, one after the other."""

from jaxtyping import Array, Float

from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.gelu_mul.portable import gelu_mul
from jdet.pallas_kernels.matmul.portable import matmul
from jdet.pallas_kernels.silu_mul.portable import silu_mul

_GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated_matmul(
    x: Float[Array, "M K"], w: Float[Array, "two_f K"], *, activation: Activation = "silu"
) -> Float[Array, "M f"]:
    """See `reference.gated_matmul`."""
    return _GATES[activation](matmul(x, w))
