"""Reductions as trees over each reduced axis, the last axis first.

Tree over one axis: blocks of `LANES` elements, the last one continued by identities, are combined
elementwise, neighbours first (an odd number of blocks is continued by a block of identities); of
the one block that is left, the second half is combined with the first until one element is left.
Places are absolute: identities behind the last element (masked padding) change nothing, and neither
does any other extent. 16-bit floats are summed in float32 and rounded once.

Where XLA makes a thread of every element that a fusion writes (not on a CPU), the one block is
written: threads side by side read lanes side by side, and none sums a whole row. Of many elements
so is the result, which every reader would make of the block anew, and every fourth sum of blocks,
so that there are threads enough and none is thousands of instructions long.

On NVIDIA cards maxima and minima of float32 and less are XLA's own: `max.NaN` puts -0 below 0 and
makes one NaN of all, and so is exact in any order (PTX ISA 9.7.3, "max").

A reduction with a function of the user's has no identity known: neighbours are combined, and an odd
last element waits for the next round.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from jdet.transform.fixed import Fixed, alone, inexact, narrowed, of_floats, wide
from jdet.transform.rules import Rules

LANES = 16
_MANY = 1 << 20
_SUMS = 4

type Combine = Callable[[Array, Array], Array]


def lowest(dtype: Any) -> Any:
    """The identity of a maximum."""
    return -jnp.inf if inexact(np.empty(0, dtype)) else jnp.iinfo(dtype).min


def highest(dtype: Any) -> Any:
    """The identity of a minimum."""
    return jnp.inf if inexact(np.empty(0, dtype)) else jnp.iinfo(dtype).max


COMBINE: dict[str, tuple[Combine, Callable[[Any], Any]]] = {
    "sum": (lax.add, lambda dtype: 0),
    "prod": (lax.mul, lambda dtype: 1),
    "max": (lax.max, lowest),
    "min": (lax.min, highest),
}


def _written(x: Array, singly: bool) -> Array:
    """x behind a barrier; `singly`: by a thread for each element.

    XLA:GPU has a thread write four elements side by side where their number is even. What a warp
    then reads at once, of the blocks that it sums, lies in eight places instead of two.
    """
    if not singly or any(jax.typeof(x).sharding.spec):  # which no flat array could have
        return lax.optimization_barrier(x)
    odd = lax.pad(x.reshape(-1), jnp.zeros((), x.dtype), [(0, 1, 0)])
    return lax.optimization_barrier(odd)[:-1].reshape(x.shape)


def tree(
    parts: tuple[Array, ...],
    axis: int,
    combine: Any,
    identities: tuple[Any, ...],
    platform: str | None,
) -> tuple[Array, ...]:
    """Arrays combined over one axis, which goes; `combine` takes and gives tuples."""
    shape, many = parts[0].shape, parts[0].size > _MANY

    def continued(parts: tuple[Array, ...], count: int) -> tuple[Array, ...]:
        edge = [(0, count if i == axis else 0, 0) for i in range(parts[0].ndim)]
        pairs = zip(parts, identities, strict=True)
        return tuple(lax.pad(x, jnp.asarray(i, x.dtype), edge) for x, i in pairs)

    def combined(parts: tuple[Array, ...], pairs: list[tuple[int, int, int]]) -> tuple[Array, ...]:
        """Of two slices of the axis, each (start, stop, step)."""
        left, right = (tuple(lax.slice_in_dim(x, *at, axis) for x in parts) for at in pairs)
        return combine(left, right)

    blocks, sums = max(-(-shape[axis] // LANES), 1), 0
    if missing := blocks * LANES - shape[axis]:
        parts = continued(parts, missing)
    parts = tuple(x.reshape(*shape[:axis], blocks, LANES, *shape[axis + 1 :]) for x in parts)
    while blocks > 1:
        if blocks % 2:
            parts = continued(parts, 1)
        even = parts[0].shape[axis]
        parts, sums = combined(parts, [(0, even, 2), (1, even, 2)]), sums + 1
        blocks = parts[0].shape[axis]
        if platform != "cpu" and (blocks == 1 or (many and sums % _SUMS == 0)):
            parts = tuple(_written(x, platform == "cuda" and many) for x in parts)
    parts, size = tuple(lax.squeeze(x, (axis,)) for x in parts), LANES
    while size > 1:
        parts, size = combined(parts, [(0, size // 2, 1), (size // 2, size, 1)]), size // 2
    if platform != "cpu" and many:
        parts = tuple(map(lax.optimization_barrier, parts))
    return tuple(lax.squeeze(x, (axis,)) for x in parts)


def pairs_of(parts: tuple[Array, ...], axis: int, combine: Any) -> tuple[Array, ...]:
    """`tree` where no identity is known; the axis is not empty."""
    while (extent := parts[0].shape[axis]) > 1:
        even = extent // 2 * 2
        left = tuple(lax.slice_in_dim(x, 0, even, 2, axis) for x in parts)
        right = tuple(lax.slice_in_dim(x, 1, even, 2, axis) for x in parts)
        rest = tuple(lax.slice_in_dim(x, even, extent, 1, axis) for x in parts)
        made = combine(left, right)
        parts = tuple(lax.concatenate(xs, axis) for xs in zip(made, rest, strict=True))
    return tuple(lax.squeeze(x, (axis,)) for x in parts)


def reduce_axes(x: Array, axes: Sequence[int], kind: str, platform: str | None) -> Array:
    """ "sum", "prod", "max" or "min" over several axes, the last one first."""
    combine, identity = COMBINE[kind]
    for axis in sorted(axes, reverse=True):
        one = (identity(x.dtype),)
        [x] = tree((x,), axis, lambda a, b: (combine(a[0], b[0]),), one, platform)
    return x


def _lower(kind: str) -> Any:
    def lower(
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
        if platform == "cuda" and kind in ("max", "min") and wide(x.dtype) == jnp.float32:
            # Apart, or XLA makes one Triton kernel of a softmax's first half, and a larger result.
            return lax.optimization_barrier(primitive.bind(x, **params))
        if platform == "cpu" and x.ndim - 1 in params["axes"] and x.shape[-1] % (2 * LANES):
            # XLA:CPU would make it anew, element by element, in the loop of the pad.
            x = lax.optimization_barrier(x)
        wider = alone(x.astype(wide(x.dtype)), platform)
        made = reduce_axes(wider, params["axes"], kind, platform)
        return narrowed(made, x.dtype)

    return lower


def _generic(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> list[Array]:
    """`lax.reduce` with a computation of the user's."""
    del primitive, platform, rules
    count = len(args) // 2
    parts, starts = tuple(args[:count]), tuple(args[count:])
    run = core.jaxpr_as_fun(params["jaxpr"])

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        # The computation is of scalars.
        made = jax.vmap(lambda *xs: tuple(run(*xs)))(*(jnp.ravel(x) for x in (*a, *b)))
        return tuple(y.reshape(x.shape) for x, y in zip(a, made, strict=True))

    axes = sorted(params["dimensions"], reverse=True)
    shape = tuple(n for i, n in enumerate(parts[0].shape) if i not in axes)
    first = tuple(jnp.broadcast_to(x, shape) for x in starts)
    if any(parts[0].shape[axis] == 0 for axis in axes):
        return list(first)
    for axis in axes:
        parts = pairs_of(parts, axis, combine)
    return list(combine(first, parts))


FIXED = {
    **{
        f"reduce_{kind}": Fixed(_lower(kind), of_floats("tree over the reduced axes"))
        for kind in COMBINE
    },
    # Bitwise: exact in any order.
    **{
        f"reduce_{kind}": Fixed(
            lambda primitive, platform, rules, args, params: primitive.bind(*args, **params),
            lambda equation: (False, "bitwise: exact in any order"),
        )
        for kind in ("and", "or", "xor")
    },
    "reduce": Fixed(_generic),
}
