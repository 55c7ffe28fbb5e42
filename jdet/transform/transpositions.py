"""Dots of operands as they lie: a transposition in front of one is read through.

`x @ w.T` gives the axes of w other places, and the dot finds them there. With the places they
have in w itself it is the same dot, and nothing has to be moved for it: `jdet.transform.dots`
multiplies operands as they lie in memory, and copies one that a transposition has turned.
"""

from collections.abc import Callable
from typing import Any

from jax.extend import core


def read_through(jaxpr: core.Jaxpr, wanted: Callable[[core.JaxprEqn], bool]) -> list[core.JaxprEqn]:
    """The equations of a jaxpr, the `wanted` dots on what was turned for them.

    A transposition that nothing else reads is left out.
    """
    turned: dict[Any, core.JaxprEqn] = {}
    equations: list[core.JaxprEqn] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "transpose":
            turned[equation.outvars[0]] = equation
        elif equation.primitive.name == "dot_general" and wanted(equation):
            equation = _of_sources(equation, turned)
        equations.append(equation)
    atoms = [atom for equation in equations for atom in equation.invars] + list(jaxpr.outvars)
    read = {atom for atom in atoms if not isinstance(atom, core.Literal)}
    return [e for e in equations if e.primitive.name != "transpose" or e.outvars[0] in read]


def _of_sources(dot: core.JaxprEqn, turned: dict[Any, core.JaxprEqn]) -> core.JaxprEqn:
    operands = list(dot.invars)
    contracted, batch = ([tuple(axes) for axes in pair] for pair in dot.params["dimension_numbers"])
    for side in (0, 1):
        while not isinstance(operands[side], core.Literal) and operands[side] in turned:
            permutation = turned[operands[side]].params["permutation"]
            named = contracted[side] + batch[side]
            free = [axis for i, axis in enumerate(permutation) if i not in named]
            if free != sorted(free):
                break  # the result would have them in another order
            contracted[side] = tuple(permutation[i] for i in contracted[side])
            batch[side] = tuple(permutation[i] for i in batch[side])
            operands[side] = turned[operands[side]].invars[0]
    numbers = tuple(contracted), tuple(batch)
    return dot.replace(invars=operands, params=dict(dot.params, dimension_numbers=numbers))
