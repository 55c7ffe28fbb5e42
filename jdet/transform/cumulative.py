"""Cumulative sums and their like, in trees that depend on the extent of the axis alone.

Tree: to each element the one 1 before it is combined, then 2, 4, ... before (Hillis & Steele,
"Data Parallel Algorithms", CACM 29(12), 1986); in float32 for 16-bit floats, rounded once.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.transform.elementwise import exp
from jdet.transform.fixed import Fixed, alone, inexact, narrowed, of_floats, wide
from jdet.transform.reductions import COMBINE
from jdet.transform.rules import Rules


def _logaddexp(a: Array, b: Array) -> Array:
    high, low = lax.max(a, b), lax.min(a, b)
    # Two equal infinities differ by NaN; their sum is themselves.
    gap = jnp.where(high == low, jnp.zeros_like(high), low - high)
    return jnp.where(jnp.isfinite(high), high + lax.log1p(exp(gap)), high)


_KINDS = {
    **{f"cum{kind}": pair for kind, pair in COMBINE.items()},
    "cumlogsumexp": (_logaddexp, lambda dtype: -jnp.inf),
}


def scan_axis(x: Array, axis: int, kind: str, reverse: bool = False) -> Array:
    """The cumulative form of `kind` along one axis."""
    combine, identity = _KINDS[kind]
    n, distance = x.shape[axis], 1
    while distance < n:
        edge = [(0, 0, 0)] * x.ndim
        edge[axis] = (-distance, distance, 0) if reverse else (distance, -distance, 0)
        x = combine(x, lax.pad(x, jnp.asarray(identity(x.dtype), x.dtype), edge))
        distance *= 2
    return x


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    del rules
    [x] = args
    if not inexact(x):
        return primitive.bind(x, **params)
    wider = alone(x.astype(wide(x.dtype)), platform)
    made = scan_axis(wider, params["axis"], primitive.name, params["reverse"])
    return narrowed(made, x.dtype)


FIXED = {name: Fixed(_lower, of_floats("tree over the axis")) for name in _KINDS}
