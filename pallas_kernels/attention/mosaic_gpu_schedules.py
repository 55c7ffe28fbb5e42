"""Schedules of the Mosaic GPU attention: what may follow the shape.

Nothing here can change a bit of the result (see `mosaic_gpu`); every schedule that `schedules`
lists is compared with every other, bit for bit, by scripts/check_gpu_attention.py.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 64  # wgmma's M: query rows of a tile
SMS = 132  # of an H100 or H200 SXM
SMEM_BYTES = 232_448  # per block on sm_90


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the tree is walked.

    Attributes:
      kind: 'walked' (a block folds the splits of its rows as it goes) or 'spread' (a block
        computes any split alone; a second kernel folds them).
      wgs: consumer warpgroups of a block, each with 64 rows; 1 or 2, 1 if spread.
      blocks: blocks of a spread grid.
      merge_rows: rows that a block of the second kernel folds.
    """

    kind: str
    wgs: int = 1
    blocks: int = SMS
    merge_rows: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("walked", "spread"):
            raise ValueError(f"kind must be 'walked' or 'spread', got {self.kind!r}")
        if self.wgs not in (1, 2) or (self.kind == "spread" and self.wgs != 1):
            raise ValueError(f"a block has 1 or 2 consumers, 1 if spread: {self}")
        if self.merge_rows % 4:
            raise ValueError(f"merge_rows must be a multiple of 4: {self}")

    def slots(self, d: "Shape") -> int:
        """Tiles of keys or values that fit beside the queries and the results."""
        spread = self.kind == "spread"
        queries = (2 if spread else self.wgs) * ROWS * d.dim * 2
        results = 2 * ROWS * 128 if spread else 0
        return min((SMEM_BYTES - 2048 - queries - results) // (d.tile * d.dim * 2), 8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that both kernels share; `rows` and `queries` are those of one tile."""

    kv_heads: int
    dim: int
    rows: int  # rows of a tile that carry a query
    queries: int  # queries of a tile
    kv_split: int
    factor: float  # scale * log2(e)

    @property
    def tile(self) -> int:
        return min(self.kv_split, 128)

    def parts(self, tiles: int, splits: int) -> jax.ShapeDtypeStruct:
        """What a spread grid leaves: columns of o in pieces of 32, then m and l, 32 times each."""
        shape = (tiles, splits, self.dim // 32 + 2, self.kv_heads * self.rows, 32)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def tiles(self) -> int:
        """Tiles of keys in a split."""
        return self.kv_split // self.tile


def shape_of(
    length: int, group: int, kv_heads: int, dim: int, kv_split: int, scale: float
) -> Shape:
    """A tile is the heads of one query (decode), or those, padded to 2^n, of 64 / 2^n queries."""
    padded = group if length == 1 else 1 << (group - 1).bit_length()
    queries = 1 if length == 1 else ROWS // padded
    factor = scale * math.log2(math.e)
    return Shape(kv_heads, dim, padded * queries, queries, kv_split, factor)


def splits_of(last: jax.Array, d: Shape) -> jax.Array:
    """Splits that hold the keys 0..last."""
    return lax.div(last + d.kv_split, d.kv_split)


# What a block does: body(items before, tile, head, first split, end, last key) for each of its
# items, the splits first..end of one tile and head. Returns how many splits it has walked.


def walk_block(body: Callable[..., None], *, bounds: Any, tiles: int, wgs: int, d: Shape) -> Any:
    """In a kernel: block -> one head of `wgs` neighbouring tiles, all their splits."""
    block = lax.axis_index("block")
    sets = -(-tiles // wgs)
    head, rest = lax.rem(block, d.kv_heads), lax.div(block, d.kv_heads)
    first = (sets - 1 - lax.rem(rest, sets)) * wgs  # the longest first
    row = lax.div(rest, sets) * tiles + first
    last = bounds[row, 1]
    for i in range(1, wgs):
        other = bounds[row + lax.min(i, tiles - 1 - first), 1]
        last = lax.max(last, other)
    zero, splits = jnp.int32(0), splits_of(last, d)
    body(zero, row, head, zero, splits, last)
    return splits


def walk_share(body: Callable[..., None], *, bounds: Any, d: Shape) -> Any:
    """In a kernel: block -> every n-th of all (tile, split, head) that hold a key, n blocks."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")

    def row_loop(row, state):
        before, count = state
        last = bounds[row, 1]
        items = splits_of(last, d) * d.kv_heads
        first = lax.rem(block + blocks - lax.rem(before, blocks), blocks)
        mine = lax.div(lax.max(items - first, 0) + blocks - 1, blocks)

        def item_loop(i, _):
            item = first + i * blocks
            split = lax.div(item, d.kv_heads)
            body(count + i, row, lax.rem(item, d.kv_heads), split, split + 1, last)

        lax.fori_loop(0, mine, item_loop, None)
        return before + items, count + mine

    zero = jnp.int32(0)
    return lax.fori_loop(0, bounds.shape[0], row_loop, (zero, zero))[1]


def schedules(length: int) -> tuple[Schedule, ...]:
    """Registered schedules for `length` queries a row: all of them give the same bits."""
    every = (
        Schedule("spread"),
        Schedule("spread", blocks=37, merge_rows=16),
        Schedule("walked"),
        Schedule("walked", wgs=2),
    )
    return every if length > 1 else every[:3]


def default_schedule(batch: int, length: int, heads: int, kv_heads: int) -> Schedule:
    """The schedule to use for a shape. Speed only."""
    tiles = math.ceil(length * heads / kv_heads / ROWS)
    if length == 1 or batch * tiles * kv_heads < 2 * SMS:
        return Schedule("spread")
    return Schedule("walked", wgs=2)
