"""RoPE by mosaic_tpu: elementwise, so XLA may compile the reference."""

from jdet.pallas_kernels.rope.reference import rope

__all__ = ["rope"]
