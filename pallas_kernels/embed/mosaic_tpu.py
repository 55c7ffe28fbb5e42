"""Embedding by mosaic_tpu: it sums nothing, so XLA may compile `portable`."""

from jdet.pallas_kernels.embed.portable import embed

__all__ = ["embed"]
