"""SiLU gate by mosaic_gpu: elementwise, so XLA may compile `portable`.

Its exponential is made of additions and products, so that it is the same in whatever fusion and
by whatever emitter; XLA emits them as `mul.rn` and `add.rn`, which ptxas may not join
(tests/gpu_compile).
"""

from jdet.pallas_kernels.silu_mul.portable import silu_mul

__all__ = ["silu_mul"]
