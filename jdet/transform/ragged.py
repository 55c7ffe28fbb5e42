"""ragged_dot_general: the groups one after another, each in the tree of `dots.contract`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.transform import dots
from jdet.transform.fixed import Fixed
from jdet.transform.rules import Rules


def _mode(params: dict[str, Any]) -> str:
    numbers = params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    if any(batch) or len(contracted[0]) != 1 or len(numbers.lhs_ragged_dimensions) != 1:
        return ""
    ragged = numbers.lhs_ragged_dimensions[0]
    if ragged in contracted[0]:
        return "contracting" if not numbers.rhs_group_dimensions else ""
    return "rows" if len(numbers.rhs_group_dimensions) == 1 else ""


def _refuses(equation: core.JaxprEqn) -> str:
    avals: list[Any] = [atom.aval for atom in equation.invars[:2]]
    ranks = [len(aval.shape) for aval in avals]
    mode = _mode(equation.params)
    if (mode, ranks) not in (("rows", [2, 3]), ("contracting", [2, 2])):
        return (
            "allowed: one ragged dimension and one contracted dimension, no batch dimension; "
            "[M, K] x [G, K, N] (rows in groups) or [K, M] x [K, N] (K in groups)"
        )
    if equation.params.get("group_offset") is not None:
        return "group_offset is not supported"
    return dots.refuses(equation)


def _product(x: Array, y: Array, platform: str | None, rules: Rules, out: Any) -> Array:
    """[M, K] x [N, K] -> [M, N]"""
    return dots.contract(dots.Matrix(x[None]), dots.Matrix(y[None]), platform, rules, out)[0]


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    x, w, sizes = args
    aval, _ = primitive.abstract_eval(*map(jax.typeof, args), **params)
    numbers = params["ragged_dot_dimension_numbers"]
    contracted, _ = numbers.dot_dimension_numbers
    x, w = dots.prepared(x, w, params["precision"])
    mode = _mode(params)
    ends = jnp.cumsum(sizes)
    if mode == "rows":
        group = numbers.rhs_group_dimensions[0]
        x = jnp.moveaxis(x, contracted[0][0], 1)
        w = jnp.moveaxis(w, (group, contracted[1][0]), (0, 2))
        row = jnp.arange(x.shape[0], dtype=sizes.dtype)

        def one(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
            weights, start, end = group
            made = _product(x, weights, platform, rules, aval.dtype)
            return jnp.where(((row >= start) & (row < end))[:, None], made, y), None

        start = jnp.zeros((x.shape[0], w.shape[1]), aval.dtype)
        return lax.scan(one, start, (w, ends - sizes, ends))[0]
    x = jnp.moveaxis(x, contracted[0][0], 1)
    w = jnp.moveaxis(w, contracted[1][0], 1)
    place = jnp.arange(x.shape[1], dtype=sizes.dtype)

    def masked(group: tuple[Array, Array]) -> Array:
        inside = (place >= group[0]) & (place < group[1])
        left = jnp.where(inside, x, jnp.zeros((), x.dtype))
        right = jnp.where(inside, w, jnp.zeros((), w.dtype))
        return _product(left, right, platform, rules, aval.dtype)

    return lax.map(masked, (ends - sizes, ends))


FIXED = {"ragged_dot_general": Fixed(_lower, lambda equation: (True, "groups in order"), _refuses)}
