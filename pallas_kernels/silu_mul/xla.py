"""SiLU gate by plain XLA."""

from jdet.pallas_kernels.silu_mul.reference import silu_mul

__all__ = ["silu_mul"]
