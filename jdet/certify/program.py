"""A traced function as a flat list of steps, each of which can be run alone.

Calls (jit, remat, custom derivatives) are inlined; loops, branches and kernels stay whole, as one
step. Two traces of one function have equal value numbers as far as they are one program.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive: values are numbers, given out in program order.

    Attributes:
      primitive: its name, "dot_general".
      inputs: numbers of the values it reads.
      outputs: numbers of the values it makes.
      shapes: of the outputs.
      dtypes: of the outputs.
      source: "file.py:12:4 (function)" of the line that asked for it.
      equation: the jaxpr's.
    """

    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    source: str
    equation: core.JaxprEqn

    def bind(self, *inputs: Any) -> list[Any]:
        """The outputs, in the trace or on the device that is current."""
        primitive = self.equation.primitive
        with self.equation.ctx.manager:
            outputs = primitive.bind(*inputs, **primitive.get_bind_params(self.equation.params))
        return list(outputs) if primitive.multiple_results else [outputs]

    @property
    def params(self) -> dict[str, Any]:
        """The equation's."""
        return self.equation.params


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in order.

    Attributes:
      inputs, outputs: numbers of values.
      constants: the values of those that are neither inputs nor results of a step.
      shapes: of every value.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    constants: dict[int, Any]
    shapes: dict[int, tuple[int, ...]]

    def run(self, arguments: Sequence[Any]) -> dict[int, Any]:
        """Every value, by number; under a trace, all of them in one program."""
        values = {**self.constants, **dict(zip(self.inputs, arguments, strict=True))}
        for step in self.steps:
            made = step.bind(*(values[i] for i in step.inputs))
            values.update(zip(step.outputs, made, strict=True))
        return values


def flatten(jaxpr: core.ClosedJaxpr) -> Program:
    """The program of a jaxpr, calls inlined."""
    numbers = itertools.count()
    steps: list[Step] = []
    constants: dict[int, Any] = {}
    shapes: dict[int, tuple[int, ...]] = {}

    def number(shape: Sequence[int]) -> int:
        new = next(numbers)
        shapes[new] = tuple(shape)
        return new

    def constant(value: Any) -> int:
        new = number(jax.numpy.shape(value))
        constants[new] = value
        return new

    def walk(jaxpr: core.ClosedJaxpr, inputs: Sequence[int], caller: str) -> list[int]:
        known = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
            known[var] = constant(value)

        def read(atom: Any) -> int:
            return constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            inner = _inner(equation)
            # Inside jax's own functions no frame is the user's: then it is the caller's.
            source = _source(equation) or caller
            if inner is None:
                results = [number(_shape(var.aval)) for var in equation.outvars]
                steps.append(_step(equation, arguments, results, source))
            else:
                results = walk(inner, arguments, source)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    inputs = tuple(number(_shape(var.aval)) for var in jaxpr.jaxpr.invars)
    outputs = tuple(walk(jaxpr, inputs, ""))
    return Program(inputs, outputs, _needed(steps, outputs), constants, shapes)


def _needed(steps: Sequence[Step], outputs: Sequence[int]) -> tuple[Step, ...]:
    """Without the steps whose results nobody reads, which XLA drops too."""
    read, kept = set(outputs), []
    for step in reversed(steps):
        if step.equation.effects or not read.isdisjoint(step.outputs):
            read.update(step.inputs)
            kept.append(step)
    return tuple(reversed(kept))


def _source(equation: core.JaxprEqn) -> str:
    return source_info_util.summarize(equation.source_info)


def _step(
    equation: core.JaxprEqn, inputs: Sequence[int], outputs: Sequence[int], source: str
) -> Step:
    return Step(
        primitive=equation.primitive.name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        shapes=tuple(_shape(var.aval) for var in equation.outvars),
        dtypes=tuple(str(getattr(var.aval, "dtype", "?")) for var in equation.outvars),
        source=source,
        equation=equation,
    )


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(getattr(aval, "shape", ()))


def _inner(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    if equation.primitive.name not in _CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return closed(equation.params[name])
    return None


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr with its constants, also where a primitive keeps one without any."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def trace(fn: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Program, Any]:
    """(the program of fn(*arguments), its result's shapes); shapes do for arguments.

    Raises:
      ValueError: fn cannot be traced (jax's reason is in the message), or has static arguments.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    try:
        traced = jitted.trace(*arguments)  # pyright: ignore[reportFunctionMemberAccess]
    except Exception as error:
        reason = str(error).partition("\n")[0]
        name = getattr(fn, "__name__", repr(fn))
        raise ValueError(f"{name} cannot be traced: {type(error).__name__}: {reason}") from error
    program = flatten(traced.jaxpr)
    given = len(jax.tree.leaves(arguments))
    if len(program.inputs) != given:
        raise ValueError(
            f"{given} arrays were given where the traced function takes {len(program.inputs)}; "
            "bind static arguments with functools.partial"
        )
    return program, traced.out_info


def align(one: Program, two: Program) -> list[tuple[Step | None, Step | None]]:
    """The steps of both in order, side by side where they are the same operation.

    The same: one primitive from one source line. A step without its like stands alone (a cut
    that one batch size needs and another does not, or another branch of the user's code).
    """
    a, b = ([(s.primitive, s.source) for s in p.steps] for p in (one, two))
    pairs: list[tuple[Step | None, Step | None]] = []
    # The common beginning first: programs that do not part cost no search.
    start = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    pairs += zip(one.steps[:start], two.steps[:start], strict=True)
    matcher = difflib.SequenceMatcher(None, a[start:], b[start:], autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        first, second = one.steps[start + i : start + i_end], two.steps[start + j : start + j_end]
        if kind == "equal":
            pairs += zip(first, second, strict=True)
        else:
            pairs += [(s, None) for s in first] + [(None, s) for s in second]
    return pairs
