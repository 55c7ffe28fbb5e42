"""Dots of operands as they lie and results as they are wanted, without the transpositions between.

`x @ w.T` gives the axes of w other places, and the dot finds them there. With the places they
have in w itself it is the same dot, and nothing has to be moved for it: `jdet.transform.dots`
multiplies operands as they lie in memory, and copies one that a transposition has turned.

An einsum is a dot and often a transposition of its result. XLA has its own dots write any layout;
the result of a kernel has one, and what a kernel computes may be the other product, y by x, with
its free axes in another order (`written_in_place`).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

# Elements of K up to which an operand counts as smaller than the result.
SHORT = 256

type Wanted = Callable[[core.JaxprEqn], bool]


def read_through(jaxpr: core.Jaxpr, wanted: Wanted) -> list[core.JaxprEqn]:
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


def written_in_place(
    equations: Sequence[core.JaxprEqn], outputs: Sequence[Any], wanted: Wanted
) -> list[core.JaxprEqn]:
    """The equations; a `wanted` dot that only a transposition reads writes the turned result.

    Its free axes may need another order first: then an operand is turned instead, where `SHORT`
    says that it is small. No other extent has a say: which operand comes first is part of the tree.
    """
    atoms = [atom for equation in equations for atom in equation.invars] + list(outputs)
    reads = Counter(atom for atom in atoms if not isinstance(atom, core.Literal))
    turns = {
        equation.invars[0]: equation
        for equation in equations
        if equation.primitive.name == "transpose"
        and not isinstance(equation.invars[0], core.Literal)
    }
    made: list[core.JaxprEqn] = []
    done: list[core.JaxprEqn] = []
    for equation in equations:
        if equation.primitive.name == "dot_general" and wanted(equation):
            [result] = equation.outvars
            if result in turns and reads[result] == 1 and (new := _turned(equation, turns[result])):
                done.append(turns[result])
                made += new
                continue
        if not any(equation is other for other in done):
            made.append(equation)
    return made


def _turned(dot: core.JaxprEqn, transposition: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Equations that write what the transposition makes of the dot's result, the dot the last.

    None where the turned result is not that of a dot, or of one with a longer operand to turn.
    """
    contracted, batch = dot.params["dimension_numbers"]
    count, operands = len(batch[0]), list(dot.invars)
    avals: list[Any] = [x.aval for x in operands]
    frees = [
        [axis for axis in range(aval.ndim) if axis not in contracted[i] + batch[i]]
        for i, aval in enumerate(avals)
    ]
    # Of the result, the operand and the axis that each of its free axes comes from.
    sources = [(side, axis) for side in (0, 1) for axis in frees[side]]
    permutation = transposition.params["permutation"]
    leading, rest = permutation[:count], [sources[i - count] for i in permutation[count:]]
    sides = [side for side, _ in rest]
    order = (0, 1) if sides == sorted(sides) else (1, 0)
    if max(leading, default=0) >= max(count, 1) or sides != sorted(sides, reverse=order == (1, 0)):
        return []
    if dot.params["out_sharding"] is not None:
        return []
    made: list[core.JaxprEqn] = []
    for side, aval in enumerate(avals):
        wanted = [axis for of, axis in rest if of == side]
        if wanted == frees[side]:
            continue
        if math.prod(aval.shape[axis] for axis in contracted[side]) > SHORT:
            return []
        axes = list(range(aval.ndim))
        for place, axis in zip(frees[side], wanted, strict=True):
            axes[place] = axis
        turned = core.Var(aval.update(shape=tuple(aval.shape[axis] for axis in axes)))
        params = dict(transposition.params, permutation=tuple(axes))
        made.append(transposition.replace(invars=[operands[side]], outvars=[turned], params=params))
        operands[side] = turned
    numbers = (
        tuple(tuple(contracted[side]) for side in order),
        tuple(tuple(batch[side][i] for i in leading) for side in order),
    )
    params = dict(dot.params, dimension_numbers=numbers)
    if isinstance(dot.params["precision"], tuple):
        params["precision"] = tuple(dot.params["precision"][side] for side in order)
    invars = [operands[side] for side in order]
    return [*made, dot.replace(invars=invars, outvars=transposition.outvars, params=params)]
