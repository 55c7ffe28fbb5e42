"""The sum of a token's experts by mosaic_gpu: elementwise, so XLA may compile `portable`.

An element is k products and k - 1 sums in a written order; XLA emits them as `mul.rn` and
`add.rn`, which ptxas may not join (tests/gpu_compile).
"""

from jdet.pallas_kernels.expert_sum.portable import expert_sum

__all__ = ["expert_sum"]
