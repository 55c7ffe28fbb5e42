"""What the Pallas TPU kernels share: the compiler's parameters, products, a tree over lanes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32

from jdet.pallas_kernels.generations import OPERANDS

LANES = 128
# Rows that a product has at least: a vector register holds 8 rows of 32 bits, used or not. In the
# interpreter it keeps XLA:CPU from its matrix-vector product, which sums in another order.
SUBLANES = 8
# Of a core's VMEM, 64 MiB on the smallest chip; schedules take less than half of it.
_VMEM = 56 * 2**20


def compiler_params(*semantics: str) -> pltpu.CompilerParams:
    """Of a kernel whose grid has dimensions of these semantics, "parallel" or "arbitrary".

    `shape_invariant_numerics`: an operation on a given type of vector always gives the same
    result, and a map along a dimension does not depend on the dimension's size. The promise
    of every schedule rests on it.
    """
    params = pltpu.CompilerParams(
        dimension_semantics=tuple(pltpu.GridDimensionSemantics(s) for s in semantics),
        vmem_limit_bytes=_VMEM,
        shape_invariant_numerics=True,
    )
    assert params.shape_invariant_numerics
    return params


def check_dtypes(op: str, *arrays: jax.Array | None) -> None:
    """Raise NotImplementedError unless all are of one dtype, bfloat16 or float32."""
    dtypes = {x.dtype for x in arrays if x is not None}
    if len(dtypes) != 1 or not dtypes <= set(OPERANDS):
        raise NotImplementedError(
            f"mosaic_tpu {op} takes bfloat16 or float32, all alike;"
            f" got {', '.join(sorted(map(str, dtypes)))}"
        )


def precision_of(dtype: Any) -> lax.Precision:
    """Of a product: float32 operands are not narrowed to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def dot_minor(x: jax.Array, w: jax.Array) -> jax.Array:
    """x[M, K] @ w[N, K].T in float32, in one product of the matrix unit's."""
    return lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )


def lane_index(shape: tuple[int, ...]) -> jax.Array:
    """Each element's place in its row, int32."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def fold_lanes(x: jax.Array, merge: Callable[..., jax.Array], neutral: Any) -> jax.Array:
    """x[R, n] to [R, 128]: merge columns of 128 lanes, the first half with the second, to one.

    An odd number of columns is first continued by one that is `neutral`.
    """
    columns = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(columns) > 1:
        if len(columns) % 2:
            columns.append(jnp.full_like(columns[0], neutral))
        half = len(columns) // 2
        columns = [merge(a, b) for a, b in zip(columns[:half], columns[half:], strict=True)]
    return columns[0]


def across_lanes(x: jax.Array, merge: Callable[..., jax.Array], neutral: Any) -> jax.Array:
    """x[R, n] merged to [R, 1]: `fold_lanes`, then lanes 64, 32, ..., 1 apart.

    For sums with n a power of two from 128 it is the tree of `trees.tree_sum`. An addition
    gives the same bits in either order, so that all lanes come to hold the same.
    """
    x = fold_lanes(x, merge, neutral)
    for distance in (64, 32, 16, 8, 4, 2, 1):
        x = merge(x, pltpu.roll(x, distance, 1))
    return x[:, :1]


def lane_sum(x: Float32[Array, "R n"]) -> Float32[Array, "R 1"]:
    """The sum of each row in the tree of `across_lanes`."""
    return across_lanes(x, jnp.add, 0)


def round_up(n: int, multiple: int) -> int:
    """The next multiple, n itself where it is one."""
    return pl.cdiv(n, multiple) * multiple
