"""Arrays that no input reaches, hidden from XLA.

XLA joins constants: x + c + d becomes x + (c + d), rounded elsewhere, if c and d are constants of
x's shape, but not if they are broadcast to it. So a row alone, to whose shape nothing has to be
broadcast, would have other bits than among others. Behind a barrier an array is no constant.
Numbers, and arrays of one number, are joined in every shape.

Floats are hidden where they are made, of integers or of nothing, at whatever depth of calls and
loops. Integers and truth values are exact and stay seen: a mask is computed where it is used.
What is a constant to the caller of the whole function cannot be told from an input, nor from a
cotangent: arrays are hidden where they enter and, for their cotangents, where they leave
(`fenced`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import dtypes, lax
from jax.core import ShapedArray, Tracer
from jax.extend import core

from jdet.transform.fixed import inexact

# Of arrays of one number they make another.
_UNIFORM = frozenset("broadcast_in_dim convert_element_type neg reshape squeeze".split())

# The equations that the interpreter reads inside.
INSIDE = frozenset(
    """
    jit pjit closed_call scan while cond shard_map remat2 checkpoint custom_jvp_call
    custom_vjp_call
    """.split()
)


def fenced(arrays: Sequence[Any], floats: bool = True) -> list[Any]:
    """What enters or leaves a function that is traced within another: behind barriers.

    One for each: behind a barrier for all, each would wait for all.

    Args:
      arrays: some of which may be constants of the other function.
      floats: whether those of floats are among what may be.
    """
    if not any(isinstance(x, Tracer) for x in arrays):
        return list(arrays)  # computed now: XLA gets each operation alone
    return [
        lax.optimization_barrier(x) if _array(aval) and (floats or not _floats(aval)) else x
        for x, aval in zip(arrays, map(jax.typeof, arrays), strict=True)
    ]


def _array(aval: Any) -> bool:
    """Not a number, a key, or a reference."""
    plain = isinstance(aval, ShapedArray)
    return plain and aval.ndim > 0 and not jnp.issubdtype(aval.dtype, dtypes.extended)


def _floats(aval: Any) -> bool:
    return isinstance(aval, ShapedArray) and inexact(aval)


class Constants:
    """The variables of a jaxpr that no input reaches.

    Attributes:
      seen: those that XLA may see: of floats, numbers and uniform arrays.
      born: the arrays of floats that are to be hidden.
    """

    def __init__(self, jaxpr: core.Jaxpr, seen: Sequence[bool]) -> None:
        """`seen`: which of the jaxpr's inputs are constants that XLA may see."""
        self.seen = {v for v, known in zip(jaxpr.invars, seen, strict=True) if known}
        self.born: set[Any] = set()
        self._add(jaxpr.constvars, uniform=False)
        for equation in jaxpr.eqns:
            if equation.primitive.name in INSIDE:
                self.seen |= set(self._leaving(equation))
            elif all(self.of(equation)):
                avals: list[Any] = [atom.aval for atom in equation.invars]
                # What is seen of floats is uniform.
                of_one = all(not _array(aval) or _floats(aval) for aval in avals)
                self._add(equation.outvars, of_one and equation.primitive.name in _UNIFORM)

    def of(self, equation: core.JaxprEqn) -> list[bool]:
        """Which operands of an equation are constants that XLA may see."""
        return list(map(self._sees, equation.invars))

    def _sees(self, atom: Any) -> bool:
        return isinstance(atom, core.Literal) or atom in self.seen

    def _add(self, variables: Sequence[Any], uniform: bool) -> None:
        for variable in variables:
            hide = _array(variable.aval) and _floats(variable.aval) and not uniform
            (self.born if hide else self.seen).add(variable)

    def _leaving(self, equation: core.JaxprEqn) -> Iterator[Any]:
        """Results of a call, a loop or a branch that are such constants inside of it."""
        for jaxpr in _inner(equation):
            if jaxpr is not equation.params.get("cond_jaxpr"):
                found = Constants(jaxpr, seen_inside(equation, jaxpr, self.of(equation)))
                for variable, atom in zip(equation.outvars, jaxpr.outvars, strict=True):
                    if found._sees(atom):
                        yield variable


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        values = value if isinstance(value, tuple) else (value,)
        yield from (v for v in values if isinstance(v, core.Jaxpr))


def seen_inside(
    equation: core.JaxprEqn, jaxpr: core.Jaxpr, seen: Sequence[bool]
) -> tuple[bool, ...]:
    """Which inputs of an inner jaxpr are constants, where `seen` are of the equation's operands.

    What a loop carries counts as one if it starts as one and holds no floats. That is too much for
    what the loop changes, and costs it a barrier.
    """
    name, params = equation.primitive.name, equation.params
    if name == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        own = seen[: split[0]] if jaxpr is params["cond_jaxpr"] else seen[split[0] : split[1]]
        seen = [*own, *seen[split[1] :]]
    elif name == "cond":
        seen = seen[1:]
    loop = name in ("scan", "while")
    return tuple(
        known and not (loop and _floats(variable.aval))
        for variable, known in zip(jaxpr.invars, seen, strict=True)
    )
