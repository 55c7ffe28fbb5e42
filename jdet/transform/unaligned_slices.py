"""Slices that XLA would have a kernel read in place, at an address that the kernel refuses.

XLA:GPU gives a custom call a static slice of whole rows as it lies (one that begins 206,400 bytes
behind its array's begin, but not one at 2,064); a Mosaic GPU kernel takes multiples of 256, and can
end with "Input buffer 2 is not 256-byte aligned" (h200-check-matmul-several.json). Behind a barrier
the slice is written by itself first.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend import core

_ALIGNED = 256


def _starts(equation: core.JaxprEqn) -> list[tuple[int, ...]]:
    """Where each result begins in the first operand; [] where that is no static slice."""
    name, params = equation.primitive.name, equation.params
    if name == "slice":
        return [] if params["strides"] else [params["start_indices"]]
    if name == "split":
        source: Any = equation.invars[0].aval
        axis, begins = params["axis"], [0]
        for size in params["sizes"][:-1]:
            begins.append(begins[-1] + size)
        return [tuple(at if i == axis else 0 for i in range(source.ndim)) for at in begins]
    if name == "dynamic_slice":
        starts = [x.val for x in equation.invars[1:] if isinstance(x, core.Literal)]
        if len(starts) == len(equation.invars) - 1:
            return [tuple(map(int, starts))]
    return []


def _in_place(shape: Sequence[int], part: Sequence[int]) -> bool:
    """Whether a slice of `shape` is one run of elements: one row, or neighbouring whole rows."""
    cut = next((i for i, extent in enumerate(part) if extent > 1), len(part))
    return tuple(shape[cut + 1 :]) == tuple(part[cut + 1 :])


def written(equation: core.JaxprEqn, results: Sequence[Any]) -> list[Any]:
    """The results, behind a barrier where a kernel could not read them in place."""
    made = list(results)
    for i, starts in enumerate(_starts(equation)):
        source: Any = equation.invars[0].aval
        part: Any = equation.outvars[i].aval
        steps = [math.prod(source.shape[axis + 1 :]) for axis in range(source.ndim)]
        offset = sum(at * step for at, step in zip(starts, steps, strict=True))
        misplaced = offset * source.dtype.itemsize % _ALIGNED != 0
        if misplaced and _in_place(source.shape, part.shape):
            made[i] = lax.optimization_barrier(made[i])
    return made
