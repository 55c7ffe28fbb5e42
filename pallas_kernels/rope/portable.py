"""RoPE by portable: elementwise, so the reference is the implementation."""

from jdet.pallas_kernels.rope.reference import rope

__all__ = ["rope"]
