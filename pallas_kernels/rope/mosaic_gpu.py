"""RoPE on NVIDIA GPUs: elementwise, no sum to order, so XLA compiles the reference."""

from jdet.pallas_kernels.rope.reference import rope

__all__ = ["rope"]
