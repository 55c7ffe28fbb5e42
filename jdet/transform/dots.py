"""dot_general with a tree that depends on the contracted extent and the dtypes alone.

Tree: the operands as matrices, K the contracted axes in the order in which they are named; K cut
into `leaves` parts where it divides; products and sums of a part in float32 (float64 for float64)
in the order of the backend's kernel for one class of shapes; the parts in a balanced tree; one
rounding to the result's dtype. Integers are exact in any order.

Schedules:

- CPU, 32 bits or less: one dot for all, see `cpu_dots`.
- elsewhere: dots of one fixed tile under `lax.map`, so that no library can see the shape.
- `mosaic_gpu`: the project's kernel, by dtype and K alone; see `uses_kernel`. One call for a
  batch, or for several y of few rows (`merged_dots`), y as it lies; of float32, the exact products
  of its bfloat16 parts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike

from jdet.pallas_kernels.trees import balanced_sum
from jdet.transform.cpu_dots import whole
from jdet.transform.fixed import Fixed, inexact, is_float, narrowed, wide
from jdet.transform.matrices import Matrix, matrix_of, pad, product, up
from jdet.transform.rules import Rules

TILE = (64, 256)
# Rows up to which several products of them are one launch: timed at 1 and 32 only
# (h200-transform-decode-3.json). Of more the launches stay apart, as they were timed.
MERGED_ROWS = 256

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


def uses_kernel(implementation: str, dtype: DTypeLike, k: int, leaves: int) -> bool:
    """Whether the project's Hopper kernel computes it: by the sums' dtype and K."""
    # By themselves the rows of a matrix are continued by zeros, the parts of a row are not.
    aligned = leaves == 1 or (k // leaves) % 8 == 0
    return implementation == "mosaic_gpu" and dtype == jnp.float32 and aligned


def tiled(x: Array, y: Array) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] in dots of one fixed tile under `lax.map`."""
    (b, m, k), n = x.shape, y.shape[1]
    rows, columns = (-(-extent // tile) for extent, tile in zip((m, n), TILE, strict=True))
    xs = pad(x, rows * TILE[0]).reshape(b * rows, 1, TILE[0], k)
    ys = pad(y, columns * TILE[1]).reshape(b * columns, 1, TILE[1], k)

    def one(i: Array) -> Array:
        batch, place = i // (rows * columns), i % (rows * columns)
        left = lax.dynamic_index_in_dim(xs, batch * rows + place // columns, keepdims=False)
        right = lax.dynamic_index_in_dim(ys, batch * columns + place % columns, keepdims=False)
        left, right = lax.optimization_barrier((left, right))
        return product(left, right, x.dtype)[0]

    out = lax.map(one, jnp.arange(b * rows * columns, dtype=jnp.int32))
    out = out.reshape(b, rows, columns, *TILE).transpose(0, 1, 3, 2, 4)
    return out.reshape(b, rows * TILE[0], columns * TILE[1])[:, :m, :n]


def _by_kernel(x: Matrix, ys: Sequence[Matrix], leaves: int, out: Any) -> list[Array]:
    """[B, M, K] x each [B, N, K] -> [B, M, N] on a Hopper GPU; only x need be moved to have K last.

    Several y lie alike, with K last only where x has it so.
    """
    # Here: it imports Pallas.
    from jdet.pallas_kernels.matmul.mosaic_gpu import matmuls

    if ys[0].k_last and not x.k_last:
        return [_by_kernel(y, [x], leaves, out)[0].swapaxes(1, 2) for y in ys]
    if x.array.dtype != ys[0].array.dtype or x.array.dtype not in _HALVES:
        x, *ys = (matrix.map(lambda a: a.astype(jnp.float32)) for matrix in (x, *ys))
    k_last, rows, columns = ys[0].k_last, x.rows(), [y.array for y in ys]
    if k_last:
        rows, *columns = (pad(a, up(a.shape[2], 8), 2) for a in (rows, *columns))
    written = out if is_float(out) and jnp.dtype(out).itemsize in (2, 4) else jnp.float32
    made = matmuls(rows, columns, k_last=k_last, leaves=leaves, out_dtype=written)
    return [narrowed(y, out) for y in made]


def contract(x: Matrix, y: Matrix, platform: str | None, rules: Rules, out: Any) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] of dtype `out`: see the module."""
    return contract_each(x, [y], platform, rules, out)[0]


def contract_each(
    x: Matrix, ys: Sequence[Matrix], platform: str | None, rules: Rules, out: Any
) -> list[Array]:
    """`contract` of x with each of `ys`, which have one dtype."""
    b, k = x.array.shape[0], x.array.shape[2 if x.k_last else 1]
    empty = [0 in (b, x.free, k, y.free) for y in ys]
    if any(empty):
        if len(ys) > 1:
            return [contract(x, y, platform, rules, out) for y in ys]
        return [jnp.zeros((b, x.free, ys[0].free), out)]
    leaves = rules.leaves if k % rules.leaves == 0 else 1
    dtypes = x.array.dtype, ys[0].array.dtype
    dtype = wide(jnp.promote_types(*dtypes))
    if jnp.dtype(out).itemsize > dtype.itemsize and is_float(out):
        dtype = jnp.dtype(out)
    if platform == "cuda" and uses_kernel(rules.implementation, dtype, k, leaves):
        merged = len({y.k_last for y in ys}) == 1 and x.free <= MERGED_ROWS
        launches = [ys] if merged else [[y] for y in ys]
        return [made for of in launches for made in _by_kernel(x, of, leaves, out)]
    return [_by_dots(x, y, platform, leaves, dtype, out) for y in ys]


def _by_dots(
    x: Matrix, y: Matrix, platform: str | None, leaves: int, dtype: Any, out: Any
) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] by XLA's dots, with sums of `dtype`."""
    dtypes = {x.array.dtype, y.array.dtype}
    in_halves = platform == "cpu" and dtypes == {jnp.dtype(jnp.bfloat16)} and dtype.itemsize == 4
    if not in_halves:
        x, y = (matrix.map(lambda a: a.astype(dtype)) for matrix in (x, y))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return _parts(x, y, platform, leaves).astype(out)
    pairs = zip(x.split(leaves), y.split(leaves), strict=True)
    if platform == "cpu" and dtype.itemsize <= 4:
        parts = [whole(xs, ys, dtype) for xs, ys in pairs]
    else:
        parts = [tiled(xs.rows(), ys.rows()) for xs, ys in pairs]
    return narrowed(balanced_sum(parts), out)


def _parts(x: Matrix, y: Matrix, platform: str | None, leaves: int) -> Array:
    """A complex product of four real ones."""
    rules = Rules(leaves=leaves)
    dtype = x.array.real.dtype

    def part(f: Callable[[Array], Array], g: Callable[[Array], Array]) -> Array:
        return contract(x.map(f), y.map(g), platform, rules, dtype)

    real = part(jnp.real, jnp.real) - part(jnp.imag, jnp.imag)
    return lax.complex(real, part(jnp.real, jnp.imag) + part(jnp.imag, jnp.real))


def product_of(
    x: Array, y: Array, platform: str | None, params: dict[str, Any]
) -> tuple[Matrix, Matrix, Any, list[int]]:
    """Of a dot: its operands as matrices, its result's dtype and shape."""
    contracted, batch = params["dimension_numbers"]
    if platform == "cuda":  # as x holds them, so that a weight of several such axes is not moved
        order = np.argsort(contracted[0])
        contracted = tuple(tuple(axes[i] for i in order) for axes in contracted)
    out = params["preferred_element_type"]
    if out is None:
        out = jnp.result_type(x.dtype, y.dtype) if x.dtype == y.dtype else None
    if out is None:
        aval, _ = lax.dot_general_p.abstract_eval(jax.typeof(x), jax.typeof(y), **params)
        out = aval.dtype
    x, y = prepared(x, y, params["precision"])
    shape = [x.shape[i] for i in batch[0]]
    left, left_free = matrix_of(x, batch[0], contracted[0])
    right, right_free = matrix_of(y, batch[1], contracted[1])
    shape += [x.shape[i] for i in left_free] + [y.shape[i] for i in right_free]
    return left, right, out, shape


def _lower(
    primitive: core.Primitive,
    platform: str | None,
    rules: Rules,
    args: Sequence[Array],
    params: dict[str, Any],
) -> Array:
    del primitive
    x, y = args
    left, right, out, shape = product_of(x, y, platform, params)
    return contract(left, right, platform, rules, out).reshape(shape)


FIXED = {"dot_general": Fixed(_lower, applies, refuses)}
