"""Dots of one left operand by several right ones, which the project's kernel makes in one launch.

The projections of a layer (queries, keys and values; gate and up) multiply the same rows by
matrices of their own. Apart, the small ones leave most of a GPU idle, and each launch costs the
host some microseconds. XLA merges its own dots so; a kernel it cannot. The bits are those of the
dots apart.

`merged_dots` is a primitive with the rules of its dots, one by one. What those make is not merged
again: a derivative multiplies the same rows by tangents, and no result may wait for those.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

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


class MergedDots(core.Primitive):
    """Bound as itself it is its dots: in the rules that its twin reads."""

    def bind(self, x: Any, *ys: Any, members: Sequence[Member]) -> list[Any]:
        return [lax.dot_general_p.bind(x, y, **dict(m)) for y, m in zip(ys, members, strict=True)]


merged_dots_p = MergedDots("merged_dots")
merged_dots_p.multiple_results = True


def member(dot: core.JaxprEqn) -> Member:
    """The parameters of a dot, as `merged_dots` carries them."""
    return tuple(sorted(dot.params.items()))


def mergeable(
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
    launches = [of[i : i + MOST] for of in found.values() for i in range(0, len(of), MOST)]
    return {of[0][0]: [dot for _, dot in of] for of in launches if len(of) > 1}


@merged_dots_p.def_abstract_eval
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


ad.primitive_jvps[merged_dots_p] = _jvp
_BATCHERS[merged_dots_p] = _batch


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


FIXED = {merged_dots_p.name: Fixed(_lower)}
