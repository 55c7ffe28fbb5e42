"""Matmul in jnp, batch-invariant on any backend.

Tree: that of `reference`; the order inside a leaf is the order of the backend's dot of one
fixed shape (per row: ascending K, in the blocks of the backend's kernel).

Schedules:

- `whole` (CPU): one dot over all rows. With the weights stored `[N, K]` the contracted
  dimension is minor in both operands, and XLA:CPU's YNNPACK then always packs the weights,
  in a layout it chooses without looking at M; the packed layout fixes the order over K, so
  a row's bits are the same for every M >= 2. (With weights stored `[K, N]` it is not so:
  it packs only above some M, and the bits change there; where depends on K (float32: at
  M = 33 for K = 576, at M = 4 for K = 1024 and 1536). Measured for M in 1..256, float32 and
  bfloat16: scripts/bench/results/cpu-dot-classes.json.) One row alone would be a
  matrix-vector product in another order, and on CPUs with AMX some last rows of 16-bit
  operands go to a kernel of another order, so rows are padded: see `padded_rows`.
- `tiled` (any other backend): the rows are cut into tiles of `ROW_TILE`, the last one
  padded with zeros, and `lax.map` runs one dot of one fixed shape over them: no library can
  see M.

On CPU both give the same bits (tests/pallas_kernels/test_matmul.py).
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jdet.pallas_kernels.trees import balanced_sum

MIN_ROWS = 4
ROW_TILE = 64
# What AMX takes at once: rows, and 16-bit elements of K.
_AMX_ROWS, _AMX_K = 16, 32


def padded_rows(rows: int, k: int, dtype: DTypeLike) -> int:
    """The rows that a dot of `rows` is padded to on a CPU: a multiple of 4, or of 16.

    The rows that 16-bit operands leave behind blocks of AMX's 16 may go to a kernel of another
    order: one or two of them where K is a multiple of 32, up to 15 where it is not
    (scripts/bench/results/cpu-dot-rows.json).
    """
    narrow = jnp.dtype(dtype).itemsize == 2 and k % _AMX_K
    multiple = _AMX_ROWS if narrow else MIN_ROWS
    return -(-rows // multiple) * multiple


def dot_rows(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float32[Array, "M N"]:
    """x @ w.T in float32; float32 operands are not narrowed (no TF32)."""
    return lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def dot_whole(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float32[Array, "M N"]:
    """The `whole` schedule: one dot, over `padded_rows`."""
    m, k = x.shape
    return dot_rows(jnp.pad(x, ((0, padded_rows(m, k, x.dtype) - m), (0, 0))), w)[:m]


def dot_tiled(
    x: Float[Array, "M K"], w: Float[Array, "N K"], tile: int = ROW_TILE
) -> Float32[Array, "M N"]:
    """The `tiled` schedule: dots of `tile` rows under `lax.map`."""
    m, k = x.shape
    tiles = -(-m // tile)
    padded = jnp.pad(x, ((0, tiles * tile - m), (0, 0)))
    y = lax.map(lambda rows: dot_rows(rows, w), padded.reshape(tiles, tile, k))
    return y.reshape(tiles * tile, -1)[:m]


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    bias: Float[Array, " N"] | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M N"]:
    """See `reference.matmul`; the schedule follows the platform the program is compiled for."""
    parts = [
        lax.platform_dependent(xs, ws, cpu=dot_whole, default=dot_tiled)
        for xs, ws in zip(jnp.split(x, leaves, axis=1), jnp.split(w, leaves, axis=1), strict=True)
    ]
    y = balanced_sum(parts)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)
