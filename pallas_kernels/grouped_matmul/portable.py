"""Grouped matmul in jnp, batch-invariant on any backend.

Tree: that of `matmul` in `portable`; a row's bits are those of its product with its expert's
weights alone.

Schedule: each group is cut into tiles of equally many rows, the last one reaching into the next
group, and a loop as long as there are tiles computes one dot of one fixed shape a step: an
expert nobody was routed to is not read. The tiles are written in ascending order, so that the
rows that a tile computed of the next group, with weights that are not theirs, are overwritten by
their own. On CPU the height of a tile follows R and E, at least what `padded_rows` says (why that
changes no bit: matmul/portable.py); elsewhere it is `ROW_TILE`.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jdet.pallas_kernels.matmul.portable import ROW_TILE, dot_rows, padded_rows
from jdet.pallas_kernels.trees import balanced_sum


def cpu_tile(rows: int, experts: int, k: int, dtype: DTypeLike) -> int:
    """Rows of a tile on CPU: about those of a group of average size, a power of two."""
    tile = padded_rows(1, k, dtype)
    while tile < min(ROW_TILE, rows // experts):
        tile *= 2
    return tile


def grouped_tiles(
    x: Float[Array, "R K"],
    w: Float[Array, "E N K"],
    sizes: Int32[Array, " E"],
    *,
    tile: int,
    leaves: int,
    out_dtype: DTypeLike,
) -> Float[Array, "R N"]:
    """The schedule, in tiles of `tile` rows."""
    rows = x.shape[0]
    ends, tiles = jnp.cumsum(sizes), (sizes + (tile - 1)) // tile
    tile_ends = jnp.cumsum(tiles)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def step(t, y):
        e = jnp.sum(tile_ends <= t)
        row = ends[e] - sizes[e] + (t - tile_ends[e] + tiles[e]) * tile
        xs = lax.dynamic_slice_in_dim(padded, row, tile)
        parts = zip(jnp.split(xs, leaves, 1), jnp.split(w[e], leaves, 1), strict=True)
        part = balanced_sum([dot_rows(*operands) for operands in parts])
        return lax.dynamic_update_slice_in_dim(y, part.astype(out_dtype), row, 0)

    y = lax.fori_loop(0, tile_ends[-1], step, jnp.zeros((rows + tile, w.shape[1]), out_dtype))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], y[:rows], 0)


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "E N K"],
    sizes: Int32[Array, " E"],
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "R N"]:
    """See `reference.grouped_matmul`; the schedule follows the platform it is compiled for."""
    run = functools.partial(grouped_tiles, leaves=leaves, out_dtype=out_dtype or x.dtype)
    tile = cpu_tile(x.shape[0], w.shape[0], x.shape[1] // leaves, x.dtype)
    return lax.platform_dependent(
        x,
        w,
        sizes,
        cpu=functools.partial(run, tile=tile),
        default=functools.partial(run, tile=ROW_TILE),
    )
