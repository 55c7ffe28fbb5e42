"""What each twin computes: one fixed tree, written in jnp."""

from typing import Any

import jax
from jax import Array
from jax.extend import core

from jdet.transform import (
    convolutions,
    cumulative,
    dots,
    elementwise,
    harmless,
    ragged,
    reductions,
    scatters,
    sorts,
    windows,
)
from jdet.transform.fixed import Fixed, alone
from jdet.transform.rules import Rules

FIXED: dict[str, Fixed] = {
    **dots.FIXED,
    **ragged.FIXED,
    **convolutions.FIXED,
    **reductions.FIXED,
    **cumulative.FIXED,
    **windows.FIXED,
    **scatters.FIXED,
    **sorts.FIXED,
    **elementwise.FIXED,
}


def check(equation: core.JaxprEqn) -> str:
    """Why the twin cannot compute this equation; "" where it can."""
    return FIXED[equation.primitive.name].refuses(equation)


def lower(
    primitive: core.Primitive, platform: str | None, *args: Array, rules: Rules, **params: Any
) -> Any:
    """The twin's results on a platform ("cpu", "cuda", or None for any other)."""
    fixed = FIXED.get(primitive.name)
    if fixed is not None:
        return fixed.lower(primitive, platform, rules, args, params)
    if not primitive.multiple_results:
        if primitive.name == "convert_element_type":
            return elementwise.convert(primitive, args[0], params)
        aval, _ = primitive.abstract_eval(*map(jax.typeof, args), **params)
        if elementwise.narrow(aval.dtype):
            return elementwise.rounded(primitive, args, params)
    made = primitive.bind(*args, **params)
    return alone(made, platform) if primitive.name in harmless.PRODUCTS else made
