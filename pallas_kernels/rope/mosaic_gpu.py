"""RoPE by mosaic_gpu: elementwise, so XLA may compile the reference.

An element is two products and a sum of two numbers, whatever XLA fuses them with; it emits
`mul.rn` and `add.rn`, which ptxas may not join (tests/gpu_compile).
"""

from jdet.pallas_kernels.rope.reference import rope

__all__ = ["rope"]
