"""The sum of a token's experts by mosaic_tpu: elementwise, so XLA may compile `portable`.

An element is k products and k - 1 sums in a written order.
"""

from jdet.pallas_kernels.expert_sum.portable import expert_sum

__all__ = ["expert_sum"]
