"""Log-softmax on NVIDIA GPUs: the written-out tree of `portable`, compiled by XLA.

No kernel of its own yet: the tree is additions of array halves, elementwise operations whose
order XLA cannot change. A kernel would read the logits once instead of several times.
"""

from jdet.pallas_kernels.log_softmax.portable import log_softmax

__all__ = ["log_softmax"]
