"""Soft cap by mosaic_tpu: elementwise, so XLA may compile `portable` (see silu_mul)."""

from jdet.pallas_kernels.soft_cap.portable import soft_cap

__all__ = ["soft_cap"]
