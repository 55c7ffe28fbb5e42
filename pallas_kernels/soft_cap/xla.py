"""Soft cap by plain XLA."""

from jdet.pallas_kernels.soft_cap.reference import soft_cap

__all__ = ["soft_cap"]
