"""Routing by mosaic_tpu: XLA may compile `portable`.

Its sums of floats are additions written out, its exponential is made of additions and products;
the rest is maxima, comparisons and integers, exact in any order.
"""

from jdet.pallas_kernels.route.portable import route

__all__ = ["route"]
