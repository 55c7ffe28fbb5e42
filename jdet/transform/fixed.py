"""The entry of one primitive in the tables of twins, and arithmetic that they share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike

from jdet.transform.rules import Rules


def _always(equation: core.JaxprEqn) -> tuple[bool, str]:
    del equation
    return True, "fixed tree"


def _never(equation: core.JaxprEqn) -> str:
    del equation
    return ""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """How a primitive gets its fixed tree.

    Attributes:
      lower: (primitive, platform, rules, operands, parameters) -> results; the platform is "cpu",
        "cuda", or None for any other.
      applies: (whether this equation needs a twin, why).
      refuses: why this equation cannot have one; "" where it can.
    """

    lower: Callable[[core.Primitive, str | None, Rules, Sequence[Array], dict[str, Any]], Any]
    applies: Callable[[core.JaxprEqn], tuple[bool, str]] = _always
    refuses: Callable[[core.JaxprEqn], str] = _never


def inexact(x: Any) -> bool:
    """Whether x (an array, an abstract value) holds floats or complex numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def of_floats(why: str) -> Callable[[core.JaxprEqn], tuple[bool, str]]:
    """Applies where the first operand is inexact: integers are exact in any order."""

    def applies(equation: core.JaxprEqn) -> tuple[bool, str]:
        if any(inexact(atom.aval) for atom in equation.invars):
            return True, why
        return False, "integers: exact in any order"

    return applies


def wide(dtype: DTypeLike) -> Any:
    """The dtype that sums of `dtype` are computed in: 16-bit and 8-bit floats in float32."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if is_float(dtype) and dtype.itemsize < 4 else dtype


def is_float(dtype: DTypeLike) -> bool:
    """Whether it is a real floating dtype."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def narrowed(x: Array, dtype: DTypeLike) -> Array:
    """x rounded to `dtype` by an operation that XLA does not drop, excess precision or not.

    To float16 by what ends a fusion: a chain of its `reduce_precision`s in one takes LLVM's loop
    vectorizer a time exponential in its length.
    """
    if is_float(dtype) and is_float(x.dtype) and jnp.dtype(dtype).itemsize == 2 < x.dtype.itemsize:
        if dtype == jnp.float16:
            return lax.optimization_barrier(x.astype(dtype))
        info = jnp.finfo(dtype)
        x = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return x.astype(dtype)


def alone(x: Array, platform: str | None) -> Array:
    """x, whose last product no compiler may contract into a following sum (an FMA).

    Nothing is needed for XLA on NVIDIA cards, which names the rounding of every instruction
    (`mul.rn`, `add.rn`: tests/gpu_compile/test_transform.py).
    """
    if platform == "cuda" or not is_float(x.dtype):
        return x
    return jnp.where(x != x, jnp.asarray(jnp.nan, x.dtype), x)
