"""GELU gate by mosaic_tpu: elementwise, so XLA may compile `portable` (see silu_mul)."""

from jdet.pallas_kernels.gelu_mul.portable import gelu_mul

__all__ = ["gelu_mul"]
