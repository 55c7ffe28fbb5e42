"""Elementwise functions with one routine for every element of an array.

XLA:CPU hands exp, log and atan to a vector routine for the bulk of an array and to another for
its tail, and the two differ in the last bit (scripts/bench/results/cpu-dot-classes.json). The
forms here are of correctly rounded operations. Elsewhere, and in float64, the originals stay.

16-bit floats are computed in float32 and rounded once, by an operation that XLA does not drop;
not where the card rounds to 16 bits itself (`harmless.INSTRUCTIONS`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.pallas_kernels import trees
from jdet.transform.fixed import Fixed, alone, inexact, is_float, narrowed
from jdet.transform.rules import Rules

_E44 = 1.2851600114359308e19
_LN2 = 0.6931471805599453
# Minimax coefficients of atanf in the Cephes library (S. Moshier, netlib.org/cephes).
_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)


def exp(x: Array) -> Array:
    """e**x; float32 within 3 ulp, 0 below -87.3 (no denormals). Other dtypes: XLA's."""
    if x.dtype != jnp.float32:
        return lax.exp(x)
    high = x > 88
    y = trees.exp(jnp.where(high, x - 44, x))
    y = jnp.where(high, y * jnp.float32(_E44), y)
    return jnp.where(x != x, x, y)


def log(x: Array) -> Array:
    """ln(x); float32 within 2 ulp, denormals count as 0 does. Other dtypes: XLA's."""
    if x.dtype != jnp.float32:
        return lax.log(x)
    y = trees.log(x)
    y = jnp.where(x == jnp.inf, x, y)
    y = jnp.where(x < jnp.finfo(jnp.float32).tiny, -jnp.inf, y)
    return jnp.where((x < 0) | (x != x), jnp.nan, y)


def tanh(x: Array) -> Array:
    """tanh(x); float32 within 2 ulp. Other dtypes: XLA's."""
    return trees.tanh(x) if x.dtype == jnp.float32 else lax.tanh(x)


def logistic(x: Array) -> Array:
    """1 / (1 + e**-x)."""
    if not is_float(x.dtype):
        return lax.logistic(x)
    one = jnp.ones((), x.dtype)
    return one / (one + exp(-x))


def atan(x: Array) -> Array:
    """atan(x); float32 within 3 ulp: reduced to [-tan(pi / 8), tan(pi / 8)]. Else XLA's."""
    if x.dtype != jnp.float32:
        return lax.atan(x)
    size = jnp.abs(x)
    far, near = size > 2.414213562373095, size > 0.4142135623730950
    one = jnp.float32(1)
    top = jnp.where(far, -one, jnp.where(near, size - one, size))
    bottom = jnp.where(far, size, jnp.where(near, size + one, one))
    start = jnp.where(far, jnp.float32(jnp.pi / 2), jnp.where(near, jnp.float32(jnp.pi / 4), 0))
    r = top / bottom
    square = r * r
    y = jnp.full_like(square, _ATAN[0])
    for c in _ATAN[1:]:
        y = y * square + jnp.float32(c)
    y = start + (y * square * r + r)
    return jnp.where(jnp.signbit(x), -y, y)


_FORMS: dict[str, Callable[[Array], Array]] = {
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "logistic": logistic,
    "atan": atan,
}


def narrow(dtype: Any) -> bool:
    """Whether it is a 16-bit float."""
    return is_float(dtype) and jnp.dtype(dtype).itemsize == 2


def convert(primitive: core.Primitive, x: Array, params: dict[str, Any]) -> Array:
    """convert_element_type with a rounding that stays."""
    out = jnp.dtype(params["new_dtype"])
    if x.dtype != out and narrow(out):
        wide = is_float(x.dtype) and not narrow(x.dtype)
        return narrowed(x if wide else x.astype(jnp.float32), out)
    return primitive.bind(x, **params)


def rounded(primitive: core.Primitive, args: Sequence[Array], params: dict[str, Any]) -> Array:
    """A 16-bit operation computed in float32."""
    aval, _ = primitive.abstract_eval(*map(jax.typeof, args), **params)
    wider = [x.astype(jnp.float32) if narrow(x.dtype) else x for x in args]
    return narrowed(primitive.bind(*wider, **params), aval.dtype)


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    del rules
    [x] = args
    wider = x.astype(jnp.float32) if narrow(x.dtype) else x
    form = _FORMS[primitive.name]
    made = form(wider) if platform == "cpu" else primitive.bind(wider, **params)
    return narrowed(made, x.dtype)


def _applies(equation: core.JaxprEqn) -> tuple[bool, str]:
    aval: Any = equation.invars[0].aval
    if is_float(aval.dtype):
        return True, "one routine for every element"
    return False, "elementwise"


def _divide(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    """x / y by a division.

    By a constant, or by what is broadcast, XLA would multiply by the reciprocal, which is another
    number; and what is broadcast, or constant, follows from which extents are 1. A divisor that
    depends on x is neither.
    """
    del rules
    x, y = args
    if is_float(y.dtype):
        y = jnp.where(x != x, jnp.asarray(jnp.nan, y.dtype), y)
    if narrow(x.dtype):
        return rounded(primitive, (x, y), params)
    return alone(primitive.bind(x, y, **params), platform)


def _divides(equation: core.JaxprEqn) -> tuple[bool, str]:
    if inexact(equation.outvars[0].aval):
        return True, "elementwise; no product with a reciprocal"
    return False, "elementwise"


FIXED = {name: Fixed(_lower, _applies) for name in _FORMS} | {"div": Fixed(_divide, _divides)}
