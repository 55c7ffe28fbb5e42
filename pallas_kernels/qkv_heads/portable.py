"""The preparation of the heads in jnp: portable's norm, elementwise operations around it."""

from jdet.pallas_kernels.qkv_heads.reference import with_norm
from jdet.pallas_kernels.rms_norm.portable import rms_norm

qkv_heads = with_norm(rms_norm)
