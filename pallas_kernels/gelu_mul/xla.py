"""GELU gate by plain XLA."""

from jdet.pallas_kernels.gelu_mul.reference import gelu_mul

__all__ = ["gelu_mul"]
