"""Reductions as trees over each reduced axis, the last axis first.

Tree over one axis: the second half is added to the first, elementwise, until one is left; an odd
extent is first padded by one identity. It depends on the extents of the reduced axes alone.
16-bit floats are summed in float32 and rounded once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from jdet.transform.fixed import Fixed, alone, inexact, narrowed, of_floats, wide
from jdet.transform.rules import Rules

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


def tree(parts: tuple[Array, ...], axis: int, combine: Any, identities: tuple[Any, ...]) -> Any:
    """Arrays combined over one axis, which goes; `combine` takes and gives tuples."""
    n = parts[0].shape[axis]

    def cut(x: Array, start: int, stop: int) -> Array:
        return lax.slice_in_dim(x, start, stop, axis=axis)

    if n == 0:
        shape = tuple(np.delete(parts[0].shape, axis))
        return tuple(
            jnp.full(shape, i, x.dtype) for x, i in zip(parts, identities, strict=True)
        )
    while n > 1:
        if n % 2:
            edge = [(0, 0, 0)] * parts[0].ndim
            edge[axis] = (0, 1, 0)
            parts = tuple(
                lax.pad(x, jnp.asarray(i, x.dtype), edge)
                for x, i in zip(parts, identities, strict=True)
            )
            n += 1
        n //= 2
        parts = combine(tuple(cut(x, 0, n) for x in parts), tuple(cut(x, n, 2 * n) for x in parts))
    return tuple(lax.squeeze(x, (axis,)) for x in parts)


def reduce_axes(x: Array, axes: Sequence[int], kind: str) -> Array:
    """"sum", "prod", "max" or "min" over several axes, the last one first."""
    combine, identity = COMBINE[kind]
    for axis in sorted(axes, reverse=True):
        [x] = tree((x,), axis, lambda a, b: (combine(a[0], b[0]),), (identity(x.dtype),))
    return x


def _lower(kind: str) -> Any:
    def lower(
        primitive: core.Primitive,
        platform: str | None,
        rules: Rules,
        args: Sequence[Array],
        params: dict[str, Any],
    ) -> Array:
        del platform, rules
        [x] = args
        if not inexact(x):
            return primitive.bind(x, **params)
        made = reduce_axes(alone(x.astype(wide(x.dtype))), params["axes"], kind)
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
    jaxpr = params["jaxpr"]
    run = core.jaxpr_as_fun(jaxpr) if not params.get("consts") else None
    assert run is not None

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        # The computation is of scalars.
        def scalars(*xs: Array) -> tuple[Array, ...]:
            return tuple(run(*xs))

        import jax

        flat = [jnp.ravel(x) for x in (*a, *b)]
        made = jax.vmap(scalars)(*flat)
        return tuple(y.reshape(x.shape) for x, y in zip(a, made, strict=True))

    for axis in sorted(params["dimensions"], reverse=True):
        parts = tree(parts, axis, combine, starts)
    return list(combine(tuple(jnp.broadcast_to(s, p.shape) for s, p in zip(starts, parts, strict=True)), parts))


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
