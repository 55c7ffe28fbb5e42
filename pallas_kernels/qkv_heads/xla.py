"""The preparation of the heads by plain XLA: the order of the norms' sums is XLA's."""

from jdet.pallas_kernels.qkv_heads.reference import with_norm
from jdet.pallas_kernels.rms_norm.xla import rms_norm

qkv_heads = with_norm(rms_norm)
