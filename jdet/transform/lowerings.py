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
    merged_dots,
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
    **merged_dots.FIXED,
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


def _is_instruction(primitive: core.Primitive, platform: str | None, rules: Rules) -> bool:
    """Whether the card rounds it to 16 bits itself, and XLA leaves that to the card.

    It does for Hopper (tests/gpu_compile/test_transform.py), where alone `mosaic_gpu` runs.
    """
    hopper = platform == "cuda" and rules.implementation == "mosaic_gpu"
    return hopper and primitive.name in harmless.INSTRUCTIONS


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
        if elementwise.narrow(aval.dtype) and not _is_instruction(primitive, platform, rules):
            return elementwise.rounded(primitive, args, params)
    made = primitive.bind(*args, **params)
    return alone(made, platform) if primitive.name in harmless.PRODUCTS else made
