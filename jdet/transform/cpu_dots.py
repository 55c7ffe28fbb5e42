"""A dot of 32 bits or less on a CPU: one of XLA's, padded so that its order follows K alone.

XLA:CPU's YNNPACK sums in blocks of K whose length follows from how the right operand [N, K] or [K,
N] is packed, and that from K and N: where N is a multiple of `WIDE`, from K alone. It packs [N, K]
always, [K, N] where M is some ten times a kernel's height (`PACKED_ROWS`); otherwise the blocks
follow M, but see `_unpacked_alike`. So either operand may stand on the right, as it lies in memory,
with its other axis padded to `WIDE`; the one that costs less does. The left one has K last, and
rows by `padded_rows`. Barriers keep XLA from folding a transposition into the dot where the other
layout would not have rows enough. bfloat16 is multiplied as it is, float16 is widened. (The rules
of blocks and packing: ynnpack/subgraph/dot.cc, github.com/google/XNNPACK; measured:
scripts/bench/results/cpu-dot-rows.json.)
"""

import functools

import jax
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jdet.pallas_kernels.matmul.portable import MIN_ROWS, padded_rows
from jdet.transform.matrices import Matrix, pad, product, up

WIDE = 64
PACKED_ROWS = 64
LONG = 1024
# Moving an element of an operand costs about as many multiplications.
_MOVE = 32


@functools.cache
def _unpacked_alike(dtype: DTypeLike) -> bool:
    """Whether a right operand [K, N] has the bits of a packed one where M would not have it packed.

    From K = `LONG` on, its blocks are those of `WIDE` columns whatever M and N are, and so are
    the packed one's if a kernel is `WIDE` wide (AVX-512); or it is packed in any case (bfloat16
    with AMX). One small product tells.
    """
    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        x, w = (rng.standard_normal((1, n, LONG)).astype(dtype) for n in (MIN_ROWS, WIDE))
        packed = jax.jit(functools.partial(product, out=np.float32))(x, w)
        unpacked = jax.jit(functools.partial(product, out=np.float32, k_last=False))
        return bool((packed == unpacked(x, w.swapaxes(1, 2).copy())).all())


def _extents(left: Matrix, right: Matrix) -> tuple[int, int]:
    """The rows and columns of the dot that is made of left x right."""
    k, dtype = left.array.shape[2 if left.k_last else 1], left.array.dtype
    rows = padded_rows(left.free, k, dtype)
    if not right.k_last and not (k >= LONG and _unpacked_alike(dtype)):
        rows = max(rows, PACKED_ROWS)
    return rows, up(right.free, WIDE)


def _cost(left: Matrix, right: Matrix) -> int:
    """Of one column of K, in multiplications."""
    rows, columns = _extents(left, right)
    moved = (0 if left.k_last else left.free) + (right.free if columns > right.free else 0)
    return rows * columns + _MOVE * moved


def whole(x: Matrix, y: Matrix, out: DTypeLike) -> Array:
    """[B, M, K] x [B, N, K] -> [B, M, N] on a CPU, in one dot of padded extents."""
    if _cost(y, x) < _cost(x, y):
        return _whole(y, x, out).swapaxes(1, 2)
    return _whole(x, y, out)


def _whole(left: Matrix, right: Matrix, out: DTypeLike) -> Array:
    rows, columns = _extents(left, right)
    x = _placed(pad(left.rows(), rows))
    y = _placed(pad(right.array, columns, 1 if right.k_last else 2))
    made = lax.optimization_barrier(product(x, y, out, right.k_last))
    return made[:, : left.free, : right.free]


def _placed(x: Array) -> Array:
    """x as it is written, row by row: XLA may not fold a transposition of it into the dot.

    One axis has one layout; behind it the extents are a view. An array whose axes are sharded
    explicitly can have no such axis. Written with its own extents first: where XLA:CPU fuses what
    makes it with the one axis, the loop finds every element's place by divisions.
    """
    x = lax.optimization_barrier(x)
    if any(jax.typeof(x).sharding.spec):
        return x
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)
