"""Grouped gated matmul for Hopper: `gated_matmul`'s gate in the grouped matmul's epilogue.

Tree: both products are `grouped_matmul`'s of mosaic_gpu with one leaf, rounded to the operands'
dtype; the gate is `silu_mul` of gated_matmul/mosaic_gpu.py, one fixed sequence of instructions.
So a row has the bits that `gated_matmul` gives it with its expert's weights (on an H100:
scripts/bench/results/h100-check-grouped.json; times in h100-grouped.json).
"""

from typing import Any

import jax

from jdet.pallas_kernels.gated_matmul.mosaic_gpu import silu_mul
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu import GroupedSchedule, grouped


def grouped_gated_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    tiles: jax.Array | None = None,
    tokens: jax.Array | None = None,
    schedule: GroupedSchedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[R, F] = silu(x[r] @ gate^T) * (x[r] @ up^T), w[e] of row r's group being gate above up.

    Args and errors as for `grouped_matmul`; w is [E, 2 F, K], and a schedule a gated one. With
    tokens, int32 [R], row r is x[tokens[r]], x being [M, K], and no group has a token twice: up to
    8 tokens are read where they stand, more are gathered by XLA.
    """
    return grouped(
        x,
        w,
        sizes,
        tiles=tiles,
        tokens=tokens,
        gate=silu_mul,
        schedule=schedule,
        interpret=interpret,
    )
