"""Grouped gated matmul for TPU: `gated_matmul`'s gate in the grouped matmul's epilogue.

Tree: both products are `grouped_matmul`'s of mosaic_tpu with one leaf, rounded to the operands'
dtype; the gate is `silu_mul` of gated_matmul/mosaic_tpu.py. A row has the bits that `gated_matmul`
gives it with its expert's weights.
"""

from typing import Any

import jax

from jdet.pallas_kernels.gated_matmul.mosaic_tpu import silu_mul
from jdet.pallas_kernels.grouped_matmul.mosaic_tpu import Schedule, grouped


def grouped_gated_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    tokens: jax.Array | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[R, F] = silu(x[r] @ gate^T) * (x[r] @ up^T), w[e] of row r's group being gate above up.

    Args and errors as for `grouped_matmul`; w is [E, 2 F, K]. With tokens, int32 [R], row r is
    x[tokens[r]].
    """
    x = x if tokens is None else x[tokens]
    return grouped(x, w, sizes, gate=silu_mul, schedule=schedule, interpret=interpret)
