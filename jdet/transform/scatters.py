"""Scatters that combine, in the order of their indices.

Tree: an element of the operand, then its updates in the order of the index array (row-major),
one after another; in float32 for 16-bit floats, rounded once.

Schedules: XLA:CPU writes a scatter as a loop over its indices. Elsewhere a loop of scatters of one
index each (`lax.fori_loop`); where the indices are said to be unique, one scatter.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax import Array, lax
from jax.extend import core

from jdet.transform.fixed import Fixed, alone, inexact, narrowed, of_floats, wide
from jdet.transform.rules import Rules

_SCATTER = {
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}


def _in_order(scatter: Any, x: Array, indices: Array, updates: Array, numbers: Any) -> Array:
    """One index at a time; batching dimensions stay whole, for their targets differ."""
    batching = numbers.scatter_indices_batching_dims
    axes = [axis for axis in range(indices.ndim - 1) if axis not in batching]
    places = [d for d in range(updates.ndim) if d not in numbers.update_window_dims]
    extents = [indices.shape[axis] for axis in axes]

    def one(i: Array, x: Array) -> Array:
        index, update = indices, updates
        for axis, extent in zip(reversed(axes), reversed(extents), strict=True):
            index = lax.dynamic_slice_in_dim(index, i % extent, 1, axis)
            update = lax.dynamic_slice_in_dim(update, i % extent, 1, places[axis])
            i = i // extent
        return scatter(x, index, update)

    return lax.fori_loop(0, math.prod(extents), one, x)


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    del rules
    x, indices, updates = args
    if not inexact(x):
        return primitive.bind(*args, **params)
    numbers, unique = params["dimension_numbers"], params["unique_indices"]

    def scatter(x: Array, indices: Array, updates: Array) -> Array:
        return _SCATTER[primitive.name](
            x,
            indices,
            updates,
            numbers,
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=unique,
            mode=params["mode"],
        )

    dtype = wide(x.dtype)
    operands = (x.astype(dtype), indices, alone(updates.astype(dtype), platform))
    if platform == "cpu" or unique:
        return narrowed(scatter(*operands), x.dtype)
    return narrowed(_in_order(scatter, *operands, numbers), x.dtype)


FIXED = {
    name: Fixed(_lower, of_floats("updates in the order of their indices")) for name in _SCATTER
}
