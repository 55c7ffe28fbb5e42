"""SiLU gate by mosaic_tpu: elementwise, so XLA may compile `portable`.

Its exponential is made of additions and products: the same instructions in whatever fusion.
"""

from jdet.pallas_kernels.silu_mul.portable import silu_mul

__all__ = ["silu_mul"]
