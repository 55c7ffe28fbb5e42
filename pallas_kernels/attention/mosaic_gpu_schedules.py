"""Schedules of the Mosaic GPU attention: what may follow the shape.

Nothing here can change a bit of the result (see `mosaic_gpu`); every schedule that `schedules`
lists is compared with every other, bit for bit, by scripts/check_gpu_attention.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

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
    def part_rows(self) -> int:
        """Rows of a tile in the partial results."""
        return -(-self.rows // 4) * 4

    @property
    def tile(self) -> int:
        return min(self.kv_split, 128)

    def parts(self, tiles: int, splits: int) -> jax.ShapeDtypeStruct:
        """What a spread grid leaves: columns of o in pieces of 32, then m and l, 32 times each.

        A group of splits may reach past the last: there is room for it.
        """
        splits += self.fold_group(tiles) - 1
        rows = self.kv_heads * self.part_rows
        return jax.ShapeDtypeStruct((tiles, splits, self.dim // 32 + 2, rows, 32), jnp.float32)

    def fold_group(self, tiles: int) -> int:
        """Splits that the fold fetches at once: more where many splits meet few blocks."""
        return 4 if tiles * self.kv_heads <= SMS else 1

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


def plan(high: jax.Array, blocks: int, d: Shape) -> tuple[jax.Array, jax.Array]:
    """Equal shares of all (row, head, split) for the blocks of a spread grid; integers only.

    Returns the first item of each row, and each block's first item, last, first row, last row.
    """
    items = (high + d.kv_split) // d.kv_split * d.kv_heads
    rows = jnp.arange(items.shape[0])
    ends = jnp.where(rows <= rows[:, None], items, 0).sum(1, dtype=jnp.int32)
    share = jnp.maximum(-(-ends[-1] // blocks), 1)
    begin = jnp.minimum(jnp.arange(blocks, dtype=jnp.int32) * share, ends[-1])
    stop = jnp.minimum(begin + share, ends[-1])
    first = (ends <= begin[:, None]).sum(1, dtype=jnp.int32)
    last = (ends < stop[:, None]).sum(1, dtype=jnp.int32) + 1
    return ends - items, jnp.stack([begin, stop, first, jnp.minimum(last, items.shape[0])], 1)


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
