"""What becomes of an equation: kept, given a twin, warned of, or refused; and why."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jdet.transform import harmless
from jdet.transform.fixed import inexact
from jdet.transform.lowerings import FIXED, check
from jdet.transform.rules import Rules
from jdet.transform.twins import PREFIX

KEEP, TWIN, WARN, REFUSE = "kept", "twin", "warned", "refused"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is done with an equation.

    Attributes:
      action: KEEP, TWIN, WARN or REFUSE.
      why: in words.
      rule: what computes it instead, where a user registered that.
      excluded: the member of `exclude` that it matched.
    """

    action: str
    why: str
    rule: Callable[..., Any] | None = None
    excluded: str = ""


_REGISTERED: dict[str, Callable[..., Any] | None] = {}


def register_rule(primitive: core.Primitive | str, rule: Callable[..., Any] | None) -> None:
    """Tell `batch_invariant` what to do with a primitive that it does not know.

    Args:
      primitive: it, or its name.
      rule: None where no shape can change a result's bits (it is kept), or a function of the
        operands and the parameters that computes the same result in a fixed order; what it
        calls is traced as it stands.

    Raises:
      ValueError: jdet has a rule of its own.
    """
    name = primitive if isinstance(primitive, str) else primitive.name
    if name in FIXED or name in harmless.EXACT or name in harmless.SERIES:
        raise ValueError(f"register_rule: jdet has a rule for {name!r}")
    if rule is not None and not callable(rule):
        raise ValueError(f"register_rule: {rule!r} must be None or a function")
    _REGISTERED[name] = rule


_DRAW = (
    "what an element gets follows its place in the shape drawn; draw with a key of each row's "
    "own: jax.vmap(lambda key: jax.random.normal(key, row_shape))(keys), keys = "
    "jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)"
)


def _excluded(name: str, source: str, exclude: frozenset[str]) -> str:
    if name in exclude:
        return name
    place = source.split(" ")[0]
    for item in exclude:
        if ":" in item and (f"/{place}:".find(f"/{item}:") >= 0):
            return item
    return ""


def _narrow(equation: core.JaxprEqn) -> bool:
    """Makes a 16-bit float."""
    dtypes = [getattr(v.aval, "dtype", None) for v in equation.outvars]
    return any(
        d is not None and jnp.issubdtype(d, jnp.floating) and d.itemsize == 2 for d in dtypes
    )


def _several(equation: core.JaxprEqn) -> bool:
    """Has two float operands or more that are no literals."""
    floats = [
        atom
        for atom in equation.invars
        if not isinstance(atom, core.Literal) and inexact(atom.aval)
    ]
    return len(floats) > 1


def choose(equation: core.JaxprEqn, rules: Rules, source: str) -> Choice:
    """The choice for one equation; by primitive, dtypes and parameters, never by a free extent."""
    name = equation.primitive.name
    if found := _excluded(name, source, rules.exclude):
        return Choice(KEEP, f"excluded by {found!r}", excluded=found)
    if name.startswith(PREFIX):
        return Choice(KEEP, "has a fixed tree")
    if name in _REGISTERED:
        rule = _REGISTERED[name]
        return Choice(KEEP, "registered" if rule is None else "a registered rule", rule)
    if name in FIXED:
        if why := check(equation):
            return Choice(REFUSE, why)
        fixed, why = FIXED[name].applies(equation)
        if fixed:
            return Choice(TWIN, why)
        return Choice(TWIN if name in harmless.SUMMED_BACKWARD else KEEP, why)
    if name in harmless.ROUNDED and _narrow(equation):
        return Choice(TWIN, "rounded once, to 16 bits")
    if name in harmless.SUMMED_BACKWARD:
        return Choice(TWIN, "exact; its derivative sums")
    if name in harmless.PRODUCTS and inexact(equation.outvars[0].aval):
        return Choice(TWIN, "elementwise; no product joins a sum behind it")
    if name in harmless.BROADCASTING and _several(equation):
        return Choice(TWIN, "elementwise; its derivative sums where an operand is broadcast")
    if name in harmless.EXACT:
        return Choice(KEEP, "exact or elementwise")
    if name in harmless.KEYS:
        return Choice(KEEP, "keys")
    if name in harmless.RANDOM:
        if all(getattr(v.aval, "ndim", 0) == 0 for v in equation.outvars):
            return Choice(KEEP, "draws one value")
        return Choice(WARN, _DRAW)
    if name in harmless.COLLECTIVES:
        return Choice(WARN, "the order of a sum over devices, and their number, are its own")
    if name in harmless.LINALG:
        return Choice(WARN, "a library's routine, chosen by shape")
    if name in harmless.OPAQUE:
        return Choice(WARN, "not seen into; check it with jdet.certify.audit")
    return Choice(
        REFUSE,
        "unknown to jdet. If no shape can change its bits, "
        f"jdet.register_rule({name!r}, None) keeps it; otherwise "
        f"jdet.register_rule({name!r}, rule) with rule(*operands, **params) -> results",
    )


def refusal(equation: core.JaxprEqn, choice: Choice, source: str) -> str:
    """The message of an equation that is refused."""
    shapes = ", ".join(atom.aval.str_short() for atom in equation.invars)
    return (
        f"batch_invariant: {equation.primitive.name}({shapes}) at {source}: {choice.why}"
        + (" (strict=True)" if choice.action == WARN else "")
        + f"; exclude=({equation.primitive.name!r},) leaves it alone"
    )
