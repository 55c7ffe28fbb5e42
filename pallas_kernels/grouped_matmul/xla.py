"""Grouped matmul by plain XLA: not batch-invariant. The negative control and speed baseline."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

_ROWS_TIMES_NK = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "E N K"],
    sizes: Int32[Array, " E"],
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "R N"]:
    """`lax.ragged_dot_general` with float32 accumulation in whatever order XLA chooses.

    `leaves` has no meaning here: XLA owns the tree.
    """
    del leaves
    y = lax.ragged_dot_general(x, w, sizes, _ROWS_TIMES_NK, preferred_element_type=jnp.float32)
    grouped = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(grouped[:, None], y, 0).astype(out_dtype or x.dtype)
