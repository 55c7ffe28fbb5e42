"""Dots of one left operand by several right ones, which the project's kernel makes in one launch.

The projections of a layer (queries, keys and values; gate and up) multiply the same rows by
matrices of their own. Apart, the small ones leave most of a GPU idle, and each launch costs the
host some microseconds. XLA merges its own dots so; a kernel it cannot. The bits are those of the
dots apart.

`dots` is a primitive with the rules of its dots, one by one. What those make is not merged again: a
derivative multiplies the same rows by tangents, and no result may wait for those.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.extend import core
from jax.interpreters import ad, batching

from jdet.transform import dots
from jdet.transform.fixed import Fixed
from jdet.transform.rules import Rules

# Products of a launch: each has instructions of its own in the kernel.
MOST = 4

type Member = tuple[tuple[str, Any], ...]

_BATCHERS: Any = batching.fancy_primitive_batchers

dots_p = core.Primitive("dots")
dots_p.multiple_results = True


def member(dot: core.JaxprEqn) -> Member:
    """The parameters of a dot, as `dots` carries them."""
    return tuple(sorted(dot.params.items()))


def families(
    equations: Sequence[core.JaxprEqn],
    outputs: Sequence[Any],
    wanted: Callable[[core.JaxprEqn], bool],
) -> dict[int, list[core.JaxprEqn]]:
    """Of `wanted` dots that can be made at once: all of them, by the place of the first.

    They have the same left operand, in the same way, no batch, and right operands that are there
    when the first is made. No more than `MOST` are together.
    """
    atoms = [atom for equation in equations for atom in equation.invars] + list(outputs)
    reads = Counter(atom for atom in atoms if not isinstance(atom, core.Literal))
    made: dict[Any, int] = {}
    first: dict[Any, int] = {}
    found: dict[int, list[tuple[int, core.JaxprEqn]]] = {}
    for place, equation in enumerate(equations):
        if equation.primitive is lax.dot_general_p and wanted(equation):
            left, right = equation.invars
            contracted, batch = equation.params["dimension_numbers"]
            rest = {k: v for k, v in equation.params.items() if k != "dimension_numbers"}
            literal = any(isinstance(atom, core.Literal) for atom in (left, right))
            if not (literal or batch[0]) and reads[equation.outvars[0]]:
                aval: Any = right.aval
                kind = left, aval.dtype, tuple(contracted[0]), tuple(sorted(rest.items()))
                start = first.setdefault(kind, place)
                if made.get(right, -1) < start:
                    found.setdefault(start, []).append((place, equation))
        for variable in equation.outvars:
            made[variable] = place
    launches = [dots[i : i + MOST] for dots in found.values() for i in range(0, len(dots), MOST)]
    return {dots[0][0]: [dot for _, dot in dots] for dots in launches if len(dots) > 1}


def _apart(x: Any, *ys: Any, members: Sequence[Member]) -> list[Any]:
    return [lax.dot_general_p.bind(x, y, **dict(m)) for y, m in zip(ys, members, strict=True)]


@dots_p.def_impl
def _impl(x: Array, *ys: Array, members: Sequence[Member]) -> list[Array]:
    return _apart(x, *ys, members=members)


@dots_p.def_abstract_eval
def _abstract(x: Any, *ys: Any, members: Sequence[Member]) -> list[Any]:
    return [
        lax.dot_general_p.abstract_eval(x, y, **dict(m))[0]
        for y, m in zip(ys, members, strict=True)
    ]


def _jvp(primals: Any, tangents: Any, *, members: Sequence[Member]) -> tuple[list[Any], list[Any]]:
    (x, *ys), (dx, *dys) = primals, tangents
    rule = ad.primitive_jvps[lax.dot_general_p]
    made = [rule((x, y), (dx, dy), **dict(m)) for y, dy, m in zip(ys, dys, members, strict=True)]
    return [out for out, _ in made], [d for _, d in made]


def _transpose(cotangents: Any, *args: Any, members: Sequence[Member]) -> list[Any]:
    linear = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]

    def bind(*unknown: Any) -> list[Any]:
        full = list(args)
        for i, x in zip(linear, unknown, strict=True):
            full[i] = x
        return _apart(*full, members=members)

    given = list(map(ad.instantiate_zeros, cotangents))
    made = jax.linear_transpose(bind, *(args[i].aval for i in linear))(given)
    out: list[Any] = [None] * len(args)
    for i, x in zip(linear, made, strict=True):
        out[i] = x
    return out


def _batch(
    data: Any, args: Any, dims: Any, *, members: Sequence[Member]
) -> tuple[list[Any], list[Any]]:
    (x, *ys), (dx, *dys) = args, dims
    made = [
        (lax.dot_general_p.bind(x, y, **dict(m)), None)
        if dx is dy is None
        else _BATCHERS[lax.dot_general_p](data, (x, y), (dx, dy), **dict(m))
        for y, dy, m in zip(ys, dys, members, strict=True)
    ]
    return [out for out, _ in made], [dim for _, dim in made]


ad.primitive_jvps[dots_p] = _jvp
ad.primitive_transposes[dots_p] = _transpose
_BATCHERS[dots_p] = _batch


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> list[Array]:
    del primitive
    x, *ys = args
    members = params["members"]
    products = [dots.product_of(x, y, platform, dict(m)) for y, m in zip(ys, members, strict=True)]
    left, _, out, _ = products[0]
    made = dots.contract_each(left, [right for _, right, _, _ in products], platform, rules, out)
    return [y.reshape(shape) for y, (_, _, _, shape) in zip(made, products, strict=True)]


FIXED = {"dots": Fixed(_lower)}
