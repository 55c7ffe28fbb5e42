"""The norm of the sum of a token's experts for Hopper: `rms_norm`'s kernel, which adds them first.

Tree: `expert_sum`'s, with its products as named instructions, and of the rounded sum that of
rms_norm/mosaic_gpu.py: the bits of the one after the other. A block takes one row.
"""

from typing import Any

import jax

from jdet.pallas_kernels.rms_norm.mosaic_gpu import rms_norm


def expert_norm(
    y: jax.Array,
    weights: jax.Array,
    places: jax.Array,
    weight: jax.Array,
    residual: jax.Array,
    *,
    eps: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(norm of s, s) with s = sum + residual; see the module for the tree.

    Args:
      y: [R, D], what the experts gave: bfloat16, float16 or float32.
      weights, places: [M, k], as `reference.expert_sum` takes them.
      weight: [D], of y's dtype or float32.
      residual: [M, D], of y's dtype.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      NotImplementedError: what `rms_norm` raises it for.
    """
    experts = weights, places
    return rms_norm(y, weight, eps=eps, residual=residual, experts=experts, interpret=interpret)
