"""Windowed reductions in trees that depend on the window alone.

Tree: axis by axis, the last one first; along one axis a window is cut into powers of two, each
combined pairwise from its halves, and the powers are combined from the smallest up, in the order
of the positions. 16-bit floats are combined in float32 and rounded once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.transform.fixed import Fixed, alone, inexact, narrowed, of_floats, wide
from jdet.transform.reductions import COMBINE, highest, lowest
from jdet.transform.rules import Rules

type Parts = tuple[Array, ...]
type Combine = Callable[[Parts, Parts], Parts]


def _padded(x: Array, fill: Any, params: dict[str, Any]) -> Array:
    dilation = params.get("base_dilation") or (1,) * x.ndim
    config = [
        (low, high, d - 1) for (low, high), d in zip(params["padding"], dilation, strict=True)
    ]
    return lax.pad(x, jnp.asarray(fill, x.dtype), config)


def over_windows(parts: Parts, combine: Combine, params: dict[str, Any]) -> Parts:
    """The windows of padded arrays, combined; strides are taken last."""
    ndim = parts[0].ndim
    dilations = params.get("window_dilation") or (1,) * ndim
    for axis in reversed(range(ndim)):
        width, step = params["window_dimensions"][axis], dilations[axis]
        stop = max(parts[0].shape[axis] - (width - 1) * step, 0)

        def cut(parts: Parts, start: int, stop: int, axis: int = axis) -> Parts:
            return tuple(lax.slice_in_dim(x, start, stop, axis=axis) for x in parts)

        power, held, offset, made = parts, 1, 0, None
        while stop and width:
            if width & held:
                piece = cut(power, offset, offset + stop)
                made = piece if made is None else combine(made, piece)
                offset, width = offset + held * step, width - held
            if width:
                size = power[0].shape[axis]
                power = combine(cut(power, 0, size - held * step), cut(power, held * step, size))
                held *= 2
        parts = cut(parts, 0, 0) if made is None else made
        stride = params["window_strides"][axis]
        parts = tuple(lax.slice_in_dim(x, 0, x.shape[axis], stride, axis) for x in parts)
    return parts


def _lower(kind: str) -> Any:
    combine, identity = COMBINE[kind]

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
        wider = alone(x.astype(wide(x.dtype)), platform)
        wider = _padded(wider, identity(wider.dtype), params)
        [made] = over_windows((wider,), lambda a, b: (combine(a[0], b[0]),), params)
        return narrowed(made, x.dtype)

    return lower


def _generic(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> list[Array]:
    """`lax.reduce_window` with a computation of the user's."""
    del primitive, platform, rules
    count = len(args) // 2
    run = core.jaxpr_as_fun(params["jaxpr"])

    def combine(a: Parts, b: Parts) -> Parts:
        made = jax.vmap(lambda *xs: tuple(run(*xs)))(*(jnp.ravel(x) for x in (*a, *b)))
        return tuple(y.reshape(x.shape) for x, y in zip(a, made, strict=True))

    parts = tuple(_padded(x, s, params) for x, s in zip(args[:count], args[count:], strict=True))
    made = over_windows(parts, combine, params)
    starts = tuple(jnp.broadcast_to(s, x.shape) for s, x in zip(args[count:], made, strict=True))
    return list(combine(starts, made))


def _picking(params: dict[str, Any]) -> tuple[Combine, Callable[[Any], Any]]:
    """(of two, the selected one: the first where both are alike; what is never selected)."""
    first = params["select_prim"].name
    compare = {"ge": lax.ge, "le": lax.le}[first]

    def combine(a: Parts, b: Parts) -> Parts:
        keep = compare(a[0], b[0])
        return tuple(jnp.where(keep, x, y) for x, y in zip(a, b, strict=True))

    return combine, lowest if first == "ge" else highest


def _gather_add(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    """The tangent of the selected element of each window: moves, sums nothing."""
    del primitive, platform, rules
    tangents, x = args
    combine, fill = _picking(params)
    parts = _padded(x, fill(x.dtype), params), _padded(tangents, 0, params)
    return over_windows(parts, combine, params)[1]


def _scatter_add(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    """Each window's source at its selected element; windows that share one add by place in it.

    Tree: to zero the source whose window has the element first, second, ... in row-major order.
    """
    del primitive, rules
    source, x = args
    combine, fill = _picking(params)
    padded = _padded(x, fill(x.dtype), params)
    places = lax.iota(jnp.int32, padded.size).reshape(padded.shape)
    _, chosen = over_windows((padded, places), combine, params)
    wider = alone(source.astype(wide(source.dtype)), platform)
    total = jnp.zeros(padded.shape, wider.dtype)
    strides = params["window_strides"]
    for place in itertools.product(*map(range, params["window_dimensions"])):
        spread = [
            (at, size - at - (count - 1) * stride - 1, stride - 1)
            for at, size, count, stride in zip(
                place, padded.shape, source.shape, strides, strict=True
            )
        ]
        here = lax.slice(
            places,
            place,
            [
                at + (count - 1) * s + 1
                for at, count, s in zip(place, source.shape, strides, strict=True)
            ],
            strides,
        )
        share = jnp.where(chosen == here, wider, jnp.zeros((), wider.dtype))
        total = total + lax.pad(share, jnp.zeros((), wider.dtype), spread)
    back = [(-low, -high, 0) for low, high in params["padding"]]
    return narrowed(lax.pad(total, jnp.zeros((), wider.dtype), back), source.dtype)


_WHY = of_floats("tree over the window")

FIXED = {
    **{f"reduce_window_{kind}": Fixed(_lower(kind), _WHY) for kind in ("sum", "max", "min")},
    "reduce_window": Fixed(_generic),
    "select_and_gather_add": Fixed(_gather_add),
    "select_and_scatter_add": Fixed(_scatter_add),
}
