"""Gated matmul by plain XLA: not batch-invariant. The negative control and the speed baseline."""

from jaxtyping import Array, Float

from jdet.pallas_kernels.gated_matmul import Activation
from jdet.pallas_kernels.gelu_mul.xla import gelu_mul
from jdet.pallas_kernels.matmul.xla import matmul
from jdet.pallas_kernels.silu_mul.xla import silu_mul

_GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated_matmul(
    x: Float[Array, "M K"], w: Float[Array, "two_f K"], *, activation: Activation = "silu"
) -> Float[Array, "M f"]:
    """See `reference.gated_matmul`."""
    return _GATES[activation](matmul(x, w))
