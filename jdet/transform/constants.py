"""Arrays that no input reaches, hidden from XLA.

XLA joins constants: x + c + d becomes x + (c + d), rounded elsewhere, if c and d are constants of
x's shape, but not if they are broadcast to it. So a row alone, to whose shape nothing has to be
broadcast, would have other bits than among others. Behind a barrier an array is no constant.
Numbers, and arrays of one number, are joined in every shape.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jdet.transform.fixed import inexact

# Of arrays of one number they make another.
_UNIFORM = frozenset("broadcast_in_dim convert_element_type neg reshape squeeze".split())


def hidden(x: Any) -> Any:
    """x, and if it is an array of floats, behind a barrier."""
    aval: Any = jax.typeof(x)
    return lax.optimization_barrier(x) if hasattr(aval, "dtype") and _array(aval) else x


def _array(aval: Any) -> bool:
    return aval.ndim > 0 and inexact(aval)


class Constants:
    """The variables of a jaxpr that no input reaches and XLA may see: of floats, uniform ones."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def kept(self, equation: core.JaxprEqn, results: Sequence[Any]) -> list[Any]:
        """An equation's results, hidden where nothing but constants made them."""
        atoms = equation.invars
        if not all(isinstance(atom, core.Literal) or atom in self.seen for atom in atoms):
            return list(results)
        # What is seen of floats is uniform.
        avals: list[Any] = [atom.aval for atom in atoms]
        uniform = equation.primitive.name in _UNIFORM and all(
            aval.ndim == 0 or inexact(aval) for aval in avals
        )
        made = []
        for variable, x in zip(equation.outvars, results, strict=True):
            aval: Any = variable.aval
            hide = hasattr(aval, "dtype") and _array(aval) and not uniform
            made.append(hidden(x) if hide else x)
            if not hide:
                self.seen.add(variable)
        return made
