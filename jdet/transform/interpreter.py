"""Reads a jaxpr and binds it again, with twins in the place of what sums.

A jaxpr inside an equation (jit, scan, while, cond, checkpoint) is rewritten once and remembered,
so that a function called twice is still one function. Custom derivatives keep the user's rules:
they are traced when jax asks for them, and rewritten then.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.tree_util import tree_flatten, tree_unflatten

from jdet.compat import (
    equation_context,
    shard_map_of,
    source_of,
    trace_jaxpr,
    wrap_function,
)
from jdet.transform.choices import REFUSE, TWIN, WARN, Choice, choose, refusal
from jdet.transform.constants import INSIDE, Constants, fenced, seen_inside
from jdet.transform.fans import fanned, readers
from jdet.transform.merged_dots import member, mergeable, merged_dots_p
from jdet.transform.rules import Rules
from jdet.transform.transpositions import read_through, written_in_place
from jdet.transform.twins import Policy, original, twin
from jdet.transform.unaligned_slices import written


@dataclasses.dataclass(frozen=True)
class Entry:
    """One equation as it was read.

    Attributes:
      primitive: its name.
      shapes: of its inputs.
      choice: what was done and why.
      source: "file.py:12:4 (function)".
      path: the calls, loops and branches it stands in.
    """

    primitive: str
    shapes: tuple[str, ...]
    choice: Choice
    source: str
    path: tuple[str, ...]


@dataclasses.dataclass
class Run:
    """One transformation under way.

    Attributes:
      rules: what was asked.
      strict: refuse what would be warned of.
      quiet: a derived rule is read: nothing is recorded, warned of or refused but the unknown.
      entries: what was read so far.
      used: members of `rules.exclude` that matched.
      path: the calls, loops and branches that are read.
      source: of the innermost of them, for equations of jax's own that have none.
    """

    rules: Rules
    strict: bool = False
    quiet: bool = False
    entries: list[Entry] = dataclasses.field(default_factory=list)
    used: set[str] = dataclasses.field(default_factory=set)
    path: tuple[str, ...] = ()
    source: str = ""


def _is_array(leaf: Any) -> bool:
    # Python's numbers stay what they are: an axis, a flag, a batching rule's dimension.
    if isinstance(leaf, (int, float, complex, str)) or leaf is None:
        return False
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def retrace(
    function: Callable[..., Any],
    args: Sequence[Any],
    run: Run,
    fence: Callable[[list[Any]], list[Any]] = list,
) -> Any:
    """`function(*args)`, traced and bound again with twins; what is no array is static.

    `fence` is what the arrays pass that enter and leave.
    """
    leaves, tree = tree_flatten(list(args), is_leaf=_opaque)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    store: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        full = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            full[place] = array
        results, out_tree = tree_flatten(function(*tree_unflatten(tree, full)), is_leaf=_opaque)
        out = [_is_array(leaf) for leaf in results]
        fixed = [None if array else leaf for leaf, array in zip(results, out, strict=True)]
        store[:] = [out_tree, out, fixed]
        return [leaf for leaf, array in zip(results, out, strict=True) if array]

    jaxpr = trace_jaxpr(flat, [jax.typeof(leaves[i]) for i in places])
    out_tree, out, fixed = store
    made = iter(fence(evaluate(jaxpr, fence([leaves[i] for i in places]), run)))
    return tree_unflatten(
        out_tree, [next(made) if array else leaf for array, leaf in zip(out, fixed, strict=True)]
    )


def _opaque(leaf: Any) -> bool:
    # Zero, SymbolicZero and UndefinedPrimal are trees to some versions and leaves to others.
    return type(leaf).__name__ in ("Zero", "SymbolicZero", "UndefinedPrimal") or leaf is None


def evaluate(
    jaxpr: core.Jaxpr, args: Sequence[Any], run: Run, seen: Sequence[bool] | None = None
) -> list[Any]:
    """The outputs of a closed jaxpr on `args`; `seen` are constants in the eyes of XLA."""
    constants = Constants(jaxpr, seen or [False] * len(args))
    values: dict[Any, Any] = {}
    copies: dict[Any, Iterator[Any]] = {}

    def is_ours(dot: core.JaxprEqn) -> bool:
        return _choice(dot, run)[0].action == TWIN

    equations, merged = read_through(jaxpr, is_ours), {}
    if run.rules.implementation == "mosaic_gpu":
        equations = written_in_place(equations, jaxpr.outvars, is_ours)
        merged = {} if run.quiet else mergeable(equations, jaxpr.outvars, is_ours)
    counts = readers(equations, jaxpr.outvars)

    def define(variables: Sequence[Any], made: Sequence[Any]) -> None:
        for variable, value in zip(variables, made, strict=True):
            if variable in constants.born:
                value = lax.optimization_barrier(value)
            values[variable] = value
            if counts[variable] > 1:
                copies[variable] = fanned(value, counts[variable], run.rules)

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        return next(copies[atom]) if atom in copies else values[atom]

    define(jaxpr.constvars, jaxpr.consts)
    define(jaxpr.invars, args)

    done: set[int] = set()
    for place, equation in enumerate(equations):
        if id(equation) in done:
            continue
        with equation_context(equation):
            if place in merged:
                family = merged[place]
                done.update(map(id, family))
                results = _bind_merged(family, [[read(a) for a in e.invars] for e in family], run)
                define([variable for e in family for variable in e.outvars], results)
                continue
            operands = [read(atom) for atom in equation.invars]
            results = _bind(equation, operands, run, constants.of(equation))
            if not equation.primitive.multiple_results:
                results = [results]
            if run.rules.implementation == "mosaic_gpu":
                results = written(equation, results)
            define(equation.outvars, results)
    return [read(atom) for atom in jaxpr.outvars]


def _choice(equation: core.JaxprEqn, run: Run) -> tuple[Choice, str]:
    """What is done with it, and its line."""
    own = source_of(equation)  # which takes long: once an equation
    return choose(equation, run.rules, own or run.source), own


def _record(equation: core.JaxprEqn, choice: Choice, own: str, run: Run) -> None:
    if not run.quiet:
        name = original(equation.primitive).name
        shapes = tuple(str(atom.aval.str_short()) for atom in equation.invars)
        run.entries.append(Entry(name, shapes, choice, own, run.path))


def _bind_merged(family: list[core.JaxprEqn], args: list[list[Any]], run: Run) -> list[Any]:
    """The results of dots of one left operand."""
    for equation in family:
        _record(equation, *_choice(equation, run), run)
    (x, _), *_ = args
    members = tuple(map(member, family))
    return twin(merged_dots_p).bind(x, *(y for _, y in args), rules=run.rules, members=members)


def _bind(equation: core.JaxprEqn, args: list[Any], run: Run, seen: Sequence[bool]) -> Any:
    primitive, name = equation.primitive, equation.primitive.name
    params = equation.params
    choice, own = _choice(equation, run)
    if choice.excluded:
        run.used.add(choice.excluded)
    elif name in _INSIDE:
        return _INSIDE[name](equation, args, run, seen)
    _record(equation, choice, own, run)
    if choice.action == REFUSE or (choice.action == WARN and run.strict and not run.quiet):
        raise NotImplementedError(refusal(equation, choice, own or run.source))
    if choice.action == TWIN:
        return twin(primitive).bind(*args, rules=run.rules, **params)
    if choice.rule is not None:
        return choice.rule(*args, **params)
    return primitive.bind(*args, **primitive.get_bind_params(params))


# (rewritten, entries, used), by the jaxpr and the rules.
_REWRITTEN: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()


def rewritten(
    jaxpr: core.Jaxpr, run: Run, equation: core.JaxprEqn, seen: Sequence[bool]
) -> core.Jaxpr:
    """The closed jaxpr of an equation rewritten, once for each set of rules.

    `seen`: which operands of the equation are constants that XLA may see.
    """
    inputs = seen_inside(equation, jaxpr, seen)
    label, source = _label(equation), source_of(equation) or run.source
    known = _REWRITTEN.setdefault(jaxpr, {})
    # One that is called from several lines is one function, unless a line may be excluded.
    place = source if any(":" in item for item in run.rules.exclude) else ""
    key = run.rules, run.strict, run.quiet, place, inputs
    if key not in known:
        inner = Run(run.rules, run.strict, run.quiet, source=source)

        def again(*args: Any) -> list[Any]:
            return evaluate(jaxpr, args, inner, inputs)

        made = trace_jaxpr(again, jaxpr.in_avals, like=jaxpr)
        known[key] = made, tuple(inner.entries), frozenset(inner.used)
    made, entries, used = known[key]
    path = (*run.path, label)
    for e in entries:
        here = dataclasses.replace(e, path=(*path, *e.path), source=e.source or source)
        run.entries.append(here)
    run.used |= used
    return made


def _label(equation: core.JaxprEqn) -> str:
    name = equation.params.get("name")
    return f"{equation.primitive.name} {name}" if name else equation.primitive.name


def _inside(equation: core.JaxprEqn, args: list[Any], run: Run, seen: Sequence[bool]) -> Any:
    """Rewrites every jaxpr among the parameters."""

    def new(value: Any) -> Any:
        if isinstance(value, core.Jaxpr):
            return rewritten(value, run, equation, seen)
        if isinstance(value, tuple) and any(isinstance(v, core.Jaxpr) for v in value):
            return tuple(map(new, value))
        return value

    params = {name: new(value) for name, value in equation.params.items()}
    primitive = equation.primitive
    return primitive.bind(*args, **primitive.get_bind_params(params))


def _shard_map(equation: core.JaxprEqn, args: list[Any], run: Run, seen: Sequence[bool]) -> Any:
    """By jax's own function, under which the names of the mesh's axes are known."""
    source = source_of(equation) or run.source
    inner = dataclasses.replace(run, path=(*run.path, _label(equation)), source=source)

    def body(*shards: Any) -> tuple[Any, ...]:
        return tuple(evaluate(equation.params["jaxpr"], shards, inner, seen))

    return jax.jit(shard_map_of(equation, body))(*args)


def _checkpoint(equation: core.JaxprEqn, args: list[Any], run: Run, seen: Sequence[bool]) -> Any:
    params = dict(equation.params, jaxpr=rewritten(equation.params["jaxpr"], run, equation, seen))
    if params["policy"] is not None and not isinstance(params["policy"], Policy):
        params["policy"] = Policy(params["policy"])
    return equation.primitive.bind(*args, **equation.primitive.get_bind_params(params))


def _custom(equation: core.JaxprEqn, args: list[Any], run: Run, seen: Sequence[bool]) -> Any:
    """custom_jvp and custom_vjp: the function is rewritten now, its rules when they are used."""
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    jaxpr = rewritten(equation.params["call_jaxpr"], run, equation, seen)
    quiet = Run(run.rules, quiet=True)
    fence = functools.partial(fenced, floats=False)  # those are hidden where they were made
    _, *derived = params.pop("subfuns")

    def later(rule: Any) -> Any:
        def apply(*args: Any) -> Any:
            return retrace(rule.call_wrapped, args, quiet, fence)

        return wrap_function(apply, like=rule)

    function = wrap_function(core.jaxpr_as_fun(jaxpr), like=jaxpr)
    subfuns = (function, *map(later, derived))
    return primitive.bind(*args, subfuns=subfuns, **params)


_INSIDE = {
    **dict.fromkeys(INSIDE, _inside),
    "shard_map": _shard_map,
    **dict.fromkeys(("remat2", "checkpoint"), _checkpoint),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _custom),
}
