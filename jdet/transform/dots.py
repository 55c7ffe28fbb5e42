"""dot_general with a tree that depends on the contracted extent and the dtypes alone.

Tree: the operands as [batch, M, K] and [batch, N, K], K the contracted axes in the order in which
they are named; K cut into `leaves` parts where it divides; products and sums of a part in
float32 (float64 for float64) in the order of the backend's kernel for one class of shapes; the
parts in a balanced tree; one rounding to the result's dtype. Integers are exact in any order.

Schedules:

- CPU, 32 bits or less: one dot for all, as [M, K] x [N, K]. XLA:CPU's YNNPACK picks its kernel,
  and with it the order over K, by N: with the contracted axis minor in both, N padded to a multiple
  of `WIDE` and M to at least `MIN_ROWS` it was one and the same for every shape tried, batched or
  not. So the operand that is cheaper to pad stands on the right. Barriers keep XLA from folding
  the transposes that bring K last into the dot, and so from handing it another layout. 16-bit
  operands are widened first (their products are exact in float32): the 16-bit kernels follow M.
- elsewhere: dots of one fixed tile under `lax.map`, so that no library can see the shape.
- `mosaic_gpu`: the project's kernel, by dtype and K alone; see `uses_kernel`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jdet.pallas_kernels import implementation_of
from jdet.pallas_kernels.trees import balanced_sum
from jdet.transform.fixed import Fixed, alone, inexact, is_float, narrowed, wide
from jdet.transform.rules import Rules

WIDE = 128
MIN_ROWS = 4
TILE = (64, 256)

_HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
# Presets whose sums are in float32 (or float64) and whose products are exact in it.
_OPERANDS = {
    "DEFAULT": None,
    "BF16_BF16_F32": jnp.bfloat16,
    "F16_F16_F32": jnp.float16,
    "F32_F32_F32": None,
    "F64_F64_F64": None,
}


def _preset(precision: Any) -> str | None:
    return precision.name if isinstance(precision, lax.DotAlgorithmPreset) else None


def prepared(x: Array, y: Array, precision: Any) -> tuple[Array, Array]:
    """The operands as the algorithm asked for rounds them."""
    preset = _preset(precision)
    if preset and (operand := _OPERANDS[preset]) is not None:
        return narrowed(x, operand), narrowed(y, operand)
    return x, y


def refuses(equation: core.JaxprEqn) -> str:
    precision = equation.params["precision"]
    preset = _preset(precision)
    if isinstance(precision, lax.DotAlgorithm) or (preset and preset not in _OPERANDS):
        return (
            f"the algorithm {preset or precision} is none that a fixed tree is known for; "
            f"allowed: {', '.join(_OPERANDS)}"
        )
    return ""


def applies(equation: core.JaxprEqn) -> tuple[bool, str]:
    if any(inexact(atom.aval) for atom in (*equation.invars, *equation.outvars)):
        return True, "fixed tree over the contracted extent"
    return False, "integers: exact in any order"


def uses_kernel(implementation: str, dtypes: tuple[Any, Any], k: int, leaves: int) -> bool:
    """Whether the project's Hopper kernel computes it: by dtypes and the contracted extent."""
    halves = dtypes[0] == dtypes[1] and jnp.dtype(dtypes[0]) in _HALVES
    return implementation == "mosaic_gpu" and halves and k > 0 and (k // leaves) % 8 == 0


def _pad(x: Array, rows: int) -> Array:
    """x [B, M, K] with zero rows up to `rows`."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0))) if rows > x.shape[1] else x


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _product(x: Array, y: Array) -> Array:
    return lax.dot_general(
        x,
        y,
        (((2,), (2,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )


def whole(x: Array, y: Array) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] on a CPU, in one dot of padded extents."""
    m, n = x.shape[1], y.shape[1]
    if _up(m, WIDE) * max(n, MIN_ROWS) < max(m, MIN_ROWS) * _up(n, WIDE):
        return whole(y, x).swapaxes(1, 2)
    x, y = _pad(alone(x), max(m, MIN_ROWS)), _pad(alone(y), _up(n, WIDE))
    x, y = lax.optimization_barrier((x, y))
    # One pair is a plain dot to XLA in any case.
    return lax.optimization_barrier(_product(x, y))[:, :m, :n]


def tiled(x: Array, y: Array) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] in dots of one fixed tile under `lax.map`."""
    (b, m, k), n = x.shape, y.shape[1]
    rows, columns = (-(-extent // tile) for extent, tile in zip((m, n), TILE, strict=True))
    xs = _pad(x, rows * TILE[0]).reshape(b * rows, 1, TILE[0], k)
    ys = _pad(y, columns * TILE[1]).reshape(b * columns, 1, TILE[1], k)

    def one(i: Array) -> Array:
        batch, place = i // (rows * columns), i % (rows * columns)
        left = lax.dynamic_index_in_dim(xs, batch * rows + place // columns, keepdims=False)
        right = lax.dynamic_index_in_dim(ys, batch * columns + place % columns, keepdims=False)
        return _product(*lax.optimization_barrier((left, right)))[0]

    out = lax.map(one, jnp.arange(b * rows * columns, dtype=jnp.int32))
    out = out.reshape(b, rows, columns, *TILE).transpose(0, 1, 3, 2, 4)
    return out.reshape(b, rows * TILE[0], columns * TILE[1])[:, :m, :n]


def contract(x: Array, y: Array, platform: str | None, rules: Rules, out: Any) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] of dtype `out`: see the module."""
    (b, m, k), n = x.shape, y.shape[1]
    if 0 in (b, m, n, k):
        return jnp.zeros((b, m, n), out)
    leaves = rules.leaves if k % rules.leaves == 0 else 1
    if platform is None and uses_kernel(rules.implementation, (x.dtype, y.dtype), k, leaves):
        matmul = implementation_of("matmul", "mosaic_gpu")
        pairs = [matmul(x[i], y[i], leaves=leaves, out_dtype=jnp.float32) for i in range(b)]
        return narrowed(jnp.stack(pairs), out)
    dtype = wide(jnp.promote_types(x.dtype, y.dtype))
    if jnp.dtype(out).itemsize > dtype.itemsize and is_float(out):
        dtype = jnp.dtype(out)
    x, y = x.astype(dtype), y.astype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = _parts(x, y, platform, leaves)
        return real.astype(out)
    one = whole if platform == "cpu" and dtype.itemsize <= 4 else tiled
    parts = [
        one(xs, ys) for xs, ys in zip(jnp.split(x, leaves, 2), jnp.split(y, leaves, 2), strict=True)
    ]
    return narrowed(balanced_sum(parts), out)


def _parts(x: Array, y: Array, platform: str | None, leaves: int) -> Array:
    """A complex product of four real ones."""
    rules = Rules(leaves=leaves)
    dtype = x.real.dtype

    def product(a: Array, b: Array) -> Array:
        return contract(a, b, platform, rules, dtype)

    real = product(x.real, y.real) - product(x.imag, y.imag)
    return lax.complex(real, product(x.real, y.imag) + product(x.imag, y.real))


def _matrix(x: Array, batch: Sequence[int], contracted: Sequence[int]) -> tuple[Array, list[int]]:
    """x as [batch, free, contracted], and its free axes."""
    free = [i for i in range(x.ndim) if i not in batch and i not in contracted]
    x = x.transpose(*batch, *free, *contracted)
    sizes = [math.prod(x.shape[: len(batch)])]
    sizes.append(math.prod(x.shape[len(batch) : len(batch) + len(free)]))
    return x.reshape(*sizes, math.prod(x.shape[len(batch) + len(free) :])), free


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    x, y = args
    contracted, batch = params["dimension_numbers"]
    out = params["preferred_element_type"]
    if out is None:
        out = jnp.result_type(x.dtype, y.dtype) if x.dtype == y.dtype else None
    if out is None:
        aval, _ = primitive.abstract_eval(jax.typeof(x), jax.typeof(y), **params)
        out = aval.dtype
    x, y = prepared(x, y, params["precision"])
    shape = [x.shape[i] for i in batch[0]]
    left, left_free = _matrix(x, batch[0], contracted[0])
    right, right_free = _matrix(y, batch[1], contracted[1])
    shape += [x.shape[i] for i in left_free] + [y.shape[i] for i in right_free]
    return contract(left, right, platform, rules, out).reshape(shape)


FIXED = {"dot_general": Fixed(_lower, applies, refuses)}
