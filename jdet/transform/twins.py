"""Twins: primitives with the meaning of jax's and a fixed tree.

The twin of a primitive has its abstract evaluation (shape, dtype, weak type, sharding), and the
derivative, transposition and batching rules of the original, *rewritten*: a rule of the original
is traced and read by the same interpreter that reads the user's function. So a sum that jax's
own rule makes (the transpose of a broadcast, of a gather, of a cumulative sum) becomes a twin
too, and `jax.grad`, `jax.vmap` and `jax.jvp` of a transformed function have fixed trees.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jdet.transform import lowerings
from jdet.transform.rules import Rules

_TWINS: dict[core.Primitive, core.Primitive] = {}
_ORIGINALS: dict[core.Primitive, core.Primitive] = {}

PREFIX = "invariant_"


def original(primitive: core.Primitive) -> core.Primitive:
    """What `primitive` is the twin of, or itself."""
    return _ORIGINALS.get(primitive, primitive)


def twin(primitive: core.Primitive) -> core.Primitive:
    """The twin, made at first use."""
    if primitive not in _TWINS:
        made = _make(primitive)
        _TWINS[primitive], _ORIGINALS[made] = made, primitive
    return _TWINS[primitive]


def _rewritten(rule: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    # Here: the interpreter makes twins.
    from jdet.transform.interpreter import Run, retrace

    def apply(*args: Any) -> Any:
        return retrace(rule, args, Run(rules, quiet=True))

    return apply


@functools.cache
def _eager(made: core.Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(made.bind, **dict(params)))


def _make(primitive: core.Primitive) -> core.Primitive:
    made = core.Primitive(PREFIX + primitive.name)
    made.multiple_results = primitive.multiple_results

    @made.def_impl
    def _impl(*args: Any, **params: Any) -> Any:
        return _eager(made, tuple(sorted(params.items())))(*args)

    @made.def_effectful_abstract_eval
    def _abstract(*avals: Any, rules: Rules, **params: Any) -> Any:
        del rules
        return primitive.abstract_eval(*avals, **params)

    if primitive in ad.primitive_jvps:

        def jvp(primals: Sequence[Any], tangents: Sequence[Any], *, rules: Rules, **params: Any):
            rule = functools.partial(ad.primitive_jvps[primitive], **params)
            return _rewritten(rule, rules)(tuple(primals), tuple(tangents))

        ad.primitive_jvps[made] = jvp

    def transpose(cotangents: Any, *args: Any, rules: Rules, **params: Any) -> list[Any]:
        linear = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]
        avals = [args[i].aval for i in linear]
        made = list(map(ad.Zero, avals))
        given = cotangents if primitive.multiple_results else [cotangents]
        if not all(type(x) is ad.Zero for x in given):

            def rule(cotangents: Any, known: Sequence[Any]) -> Any:
                def bind(*unknown: Any) -> Any:
                    full = list(known)
                    for i, x in zip(linear, unknown, strict=True):
                        full[i] = x
                    return primitive.bind(*full, **params)

                return jax.linear_transpose(bind, *avals)(cotangents)

            given = list(map(ad.instantiate_zeros, given))
            known = [None if i in linear else arg for i, arg in enumerate(args)]
            made = _rewritten(rule, rules)(given if primitive.multiple_results else given[0], known)
        out: list[Any] = [None] * len(args)
        for i, x in zip(linear, made, strict=True):
            out[i] = x
        return out

    ad.primitive_transposes[made] = transpose

    fancy: Any = batching.fancy_primitive_batchers
    usual: Any = batching.primitive_batchers
    if primitive in fancy:

        def fancy_batch(data: Any, args: Any, dims: Any, *, rules: Rules, **params: Any):
            def rule(args: Any) -> Any:
                return fancy[primitive](data, args, dims, **params)

            return _rewritten(rule, rules)(tuple(args))

        fancy[made] = fancy_batch
    elif primitive in usual:

        def batch(args: Any, dims: Any, *, rules: Rules, **params: Any):
            def rule(args: Any) -> Any:
                return usual[primitive](args, dims, **params)

            return _rewritten(rule, rules)(tuple(args))

        usual[made] = batch

    for platform in ("cpu", "cuda", None):
        lower = functools.partial(lowerings.lower, primitive, platform)
        rule = mlir.lower_fun(lower, multiple_results=primitive.multiple_results)
        mlir.register_lowering(made, rule, platform=platform)
    return made


class Policy:
    """A checkpoint policy that sees a twin as its original."""

    def __init__(self, policy: Callable[..., Any]) -> None:
        self.policy = policy

    def __call__(self, primitive: core.Primitive, *args: Any, **params: Any) -> Any:
        first = original(primitive)
        if first is not primitive:
            params = {k: v for k, v in params.items() if k != "rules"}
        return self.policy(first, *args, **params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.policy == other.policy

    def __hash__(self) -> int:
        return hash((Policy, self.policy))

    def __repr__(self) -> str:
        return repr(self.policy)
