"""SiLU gate on NVIDIA GPUs: elementwise, so XLA compiles `portable`; no kernel of its own."""

from jdet.pallas_kernels.silu_mul.portable import silu_mul

__all__ = ["silu_mul"]
