"""Embedding by mosaic_gpu: nothing is computed, so the reference is the implementation."""

from jdet.pallas_kernels.embed.reference import embed

__all__ = ["embed"]
