"""A value for each of its readers, so that its cotangents are summed by a twin.

jax adds the cotangents of a value that several operations read, with a primitive of its own that
no interpreter sees before it is there. XLA computes a sum of 16-bit floats in float32, and where
the sum meets a conversion back in one fusion it drops the rounding between, or does not, as the
fusion happens to be. So a 16-bit value with several readers is fanned out: the sum is then the
fan's transpose, rounded by an operation that XLA does not drop.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jax import Array, lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jdet.transform.elementwise import narrow
from jdet.transform.rules import Rules
from jdet.transform.twins import PREFIX, twin

fan_p = core.Primitive(PREFIX + "fan")
fan_p.multiple_results = True


@fan_p.def_impl
def _impl(x: Array, *, count: int, rules: Rules) -> list[Array]:
    del rules
    return [x] * count


@fan_p.def_abstract_eval
def _abstract(x: Any, *, count: int, rules: Rules) -> list[Any]:
    del rules
    return [x] * count


def _transpose(cotangents: Sequence[Any], x: Any, *, count: int, rules: Rules) -> list[Any]:
    """The sum, in the order of the readers."""
    del count
    given = [c for c in cotangents if type(c) is not ad.Zero]
    if not given:
        return [ad.Zero(x.aval)]
    total = given[0]
    for cotangent in given[1:]:
        total = twin(lax.add_p).bind(total, cotangent, rules=rules)
    return [total]


def _batch(args: Sequence[Array], dims: Sequence[int], **params: Any) -> tuple[Any, Any]:
    return fan_p.bind(*args, **params), list(dims) * params["count"]


def _lower(ctx: Any, x: Any, *, count: int, rules: Rules) -> list[Any]:
    del ctx, rules
    return [x] * count


ad.deflinear2(fan_p, _transpose)
batching.primitive_batchers[fan_p] = _batch
mlir.register_lowering(fan_p, _lower)


def _narrow(aval: Any) -> bool:
    return hasattr(aval, "dtype") and narrow(aval.dtype)


def readers(equations: Sequence[core.JaxprEqn], results: Sequence[Any]) -> Counter[Any]:
    """How often each 16-bit float is read."""
    atoms = [atom for equation in equations for atom in equation.invars]
    atoms += results
    return Counter(a for a in atoms if not isinstance(a, core.Literal) and _narrow(a.aval))


def fanned(x: Any, count: int, rules: Rules) -> Iterator[Any]:
    """x for each of `count` readers."""
    return iter(fan_p.bind(x, count=count, rules=rules))
