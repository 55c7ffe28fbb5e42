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

CHUNK = 64  # 16-bit elements in one 128-byte swizzle row
ROWS = 64  # wgmma's M: query rows of a tile
SMS = 132  # of an H100 or H200 SXM
# Of a spread grid: shares of contexts of 2^n keys end where heads do, and 128 reach all the memory.
BLOCKS = 128
SMEM_BYTES = 232_448  # per block on sm_90
FOLD_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the tree is walked.

    Attributes:
      kind: 'walked' (a block folds all splits of its rows) or 'spread' (a team takes a share of
        all splits; a second kernel folds the heads that several teams met).
      wgs: tiles of 64 rows that a block walks side by side; 1 or 2, 1 if spread.
      blocks: blocks of a spread grid.
      merge_columns: columns of o that a block of the second kernel folds, of head_dim at most.
      fetch: splits that it fetches at once, of those that fit the cache at most.
    """

    kind: str
    wgs: int = 1
    blocks: int = BLOCKS
    merge_columns: int = 128
    fetch: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("walked", "spread"):
            raise ValueError(f"kind must be 'walked' or 'spread', got {self.kind!r}")
        if self.wgs not in (1, 2) or (self.kind == "spread" and self.wgs != 1):
            raise ValueError(f"a block has 1 or 2 consumers, 1 if spread: {self}")
        if self.merge_columns not in (32, 64, 128):
            raise ValueError(f"merge_columns must be 32, 64 or 128: {self}")
        if self.blocks < 1 or self.fetch < 1:
            raise ValueError(f"blocks and fetch must be positive: {self}")

    def teams(self, d: "Shape") -> int:
        """Producers of a block, each with consumers, slots and, if spread, a share of its own."""
        return 2 if self.kind == "spread" and d.few and d.bands == 1 else 1

    def consumers(self, d: "Shape") -> int:
        """Warpgroups of a team that compute."""
        return self.wgs * d.bands

    def warpgroups(self, d: "Shape") -> int:
        return self.teams(d) * (self.consumers(d) + 1)

    def registers(self, d: "Shape") -> tuple[int, int] | None:
        """Of a thread that copies and of one that computes; None for as many as there are."""
        return {3: (24, 240), 4: (40, 216)}.get(self.warpgroups(d))

    def shares(self, d: "Shape") -> int:
        return self.blocks * self.teams(d)

    def slots(self, d: "Shape") -> int:
        """Bands of tiles of keys or values that fit beside a team's queries."""
        queries = self.wgs * ROWS * d.dim * 2
        room = (SMEM_BYTES - 2048) // self.teams(d) - queries
        return min(room // (d.tile * d.band * 2), 8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that both kernels share; `rows` and `queries` are those of one tile."""

    kv_heads: int
    dim: int
    rows: int  # rows of a tile that carry a query
    queries: int  # queries of a tile
    kv_split: int
    factor: float  # scale * log2(e); with a cap c, 2 * scale / c * log2(e)
    cap: float | None = None  # c * log2(e)
    sliding_window: int | None = None

    @property
    def few(self) -> bool:
        """Half of a thread's registers of a tile hold no row that carries a query."""
        return self.rows <= ROWS // 8

    @property
    def part_rows(self) -> int:
        """Rows of a tile in the partial results: a block of the fold takes FOLD_ROWS."""
        return -(-self.rows // FOLD_ROWS) * FOLD_ROWS

    @property
    def tile(self) -> int:
        """Keys of a tile."""
        return min(self.kv_split, 128)

    @property
    def bands(self) -> int:
        """Parts of head_dim, and consumers that share a tile of queries: one has a band of o."""
        return max(1, self.dim // 128)

    @property
    def band(self) -> int:
        """Columns of a band."""
        return self.dim // self.bands

    def most_splits(self, slots: int) -> int:
        """Splits that a tile of queries can need, of a cache of `slots`."""
        every = -(-slots // self.kv_split)
        if self.sliding_window is None:
            return every
        keys = self.sliding_window + self.queries - 1
        return min(every, -(-(keys - 1) // self.kv_split) + 1)

    def parts(self, tiles: int, splits: int, fetch: int, dtype: Any) -> tuple[Any, ...]:
        """What a spread grid leaves for the fold, and results.

        o, then m and l, of splits; for each head the first of them, or -1 if it needs no fold.
        The last fetch of the fold may reach past the last split: there is room for it.
        """
        rows, splits = self.kv_heads * self.part_rows, splits + fetch - 1
        return (
            jax.ShapeDtypeStruct((tiles, splits, rows, self.dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles, splits, 2, rows), jnp.float32),
            jax.ShapeDtypeStruct((tiles, self.kv_heads), jnp.int32),
            jax.ShapeDtypeStruct((tiles, rows, self.dim), dtype),
        )

    @property
    def tiles(self) -> int:
        """Tiles of keys in a split."""
        return self.kv_split // self.tile


def shape_of(
    length: int,
    group: int,
    kv_heads: int,
    dim: int,
    kv_split: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Shape:
    """A tile is the heads of one query (decode), or those, padded to 2^n, of 64 / 2^n queries."""
    padded = group if length == 1 else 1 << (group - 1).bit_length()
    queries = 1 if length == 1 else ROWS // padded
    factor, cap = scale * math.log2(math.e), None
    if soft_cap is not None:
        factor, cap = 2 * factor / soft_cap, soft_cap * math.log2(math.e)
    return Shape(kv_heads, dim, padded * queries, queries, kv_split, factor, cap, sliding_window)


def origins_of(first: jax.Array, tiles: int, wgs: int, d: Shape) -> jax.Array:
    """For each tile, the first split that its block needs.

    `first` is the first position of each tile, -1 if it has none; a row of the batch has `tiles`
    of them. A block's first tile has the earliest window.
    """
    assert d.sliding_window is not None
    begin = jnp.maximum(first - (d.sliding_window - 1), 0) // d.kv_split
    tile = jnp.arange(first.shape[0])
    return begin[tile - tile % tiles % wgs]


def splits_of(last: jax.Array, d: Shape) -> jax.Array:
    """Splits that hold the keys 0..last."""
    return lax.div(last + d.kv_split, d.kv_split)


def ends_of(last: jax.Array, d: Shape) -> jax.Array:
    """For each tile, how many of all (tile, head, split) come before its end."""
    tiles = jnp.arange(last.shape[0])
    before = tiles <= tiles[:, None]
    return jnp.where(before, splits_of(last, d) * d.kv_heads, 0).sum(1, dtype=jnp.int32)


def share_of(ends: Any, shares: int) -> jax.Array:
    """In a kernel: how many of all (tile, head, split) are a share of a spread grid."""
    return lax.max(lax.div(ends[ends.shape[0] - 1] + shares - 1, shares), 1)


def _count_up_to(ends: Any, value: jax.Array) -> jax.Array:
    """In a kernel: how many of the ascending `ends` are at most `value`."""
    size, count = ends.shape[0], jnp.int32(0)
    for bit in reversed(range(size.bit_length())):
        more = count + (1 << bit)
        found = (more <= size) & (ends[lax.min(more, size) - 1] <= value)
        count = jnp.where(found, more, count)
    return count


# What a team does: body(loads before, splits before, tile, head, first split, end, last key, splits
# of the tile) for each head that it meets, and the splits first..end of it. Returns both counts.


def walk_blocks(body: Callable[..., None], *, last: Any, tiles: int, wgs: int, d: Shape) -> Any:
    """In a kernel: one head of `wgs` neighbouring tiles with all their splits, and the next such.

    The longest first; back and forth over the blocks, so that those with the longest of one round
    have the shortest of the next.
    """
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    sets, batch = -(-tiles // wgs), last.shape[0] // tiles
    items = batch * sets * d.kv_heads

    def item_of(i):
        return i * blocks + jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)

    def step(i, done):
        item = item_of(i)
        head, rest = lax.rem(item, d.kv_heads), lax.div(item, d.kv_heads)
        first = (sets - 1 - lax.div(rest, batch)) * wgs
        row = lax.rem(rest, batch) * tiles + first
        high = last[row]
        for j in range(1, wgs):
            other = last[row + lax.min(j, tiles - 1 - first)]
            high = lax.max(high, other)
        splits = splits_of(high, d)
        body(i, done, row, head, jnp.int32(0), splits, high, splits)
        return done + splits

    rounds = items // blocks
    count = rounds + (item_of(jnp.int32(rounds)) < items).astype(jnp.int32)
    return count, lax.fori_loop(0, count, step, jnp.int32(0))


def walk_share(
    body: Callable[..., None], *, share: Any, shares: int, last: Any, ends: Any, d: Shape
) -> Any:
    """In a kernel: one of the shares of all (tile, head, split)."""
    size, total = share_of(ends, shares), ends[ends.shape[0] - 1]
    begin = lax.min(share * size, total)
    stop = lax.min(begin + size, total)

    def row_loop(row, state):
        offset = jnp.where(row > 0, ends[lax.max(row - 1, 0)], 0)
        items = ends[row] - offset
        splits = lax.div(items, d.kv_heads)
        low = lax.max(begin - offset, 0)
        high = lax.min(stop - offset, items)
        per_head = lax.max(splits, 1)

        def head_loop(head, state):
            loads, done = state
            first = lax.max(low - head * splits, 0)
            end = lax.min(high - head * splits, splits)
            body(loads, done, row, head, first, end, last[row], splits)
            return loads + 1, done + end - first

        heads = lax.div(low, per_head), lax.div(high + per_head - 1, per_head)
        return lax.fori_loop(*heads, head_loop, state)

    zero = jnp.int32(0)
    rows = _count_up_to(ends, begin), _count_up_to(ends, stop - 1) + 1
    return lax.fori_loop(*rows, row_loop, (zero, zero))


# Of the second kernel, for few heads with many splits to fetch, and for many heads.
_FEW = Schedule("spread", merge_columns=32, fetch=16)
_MANY = Schedule("spread")


def schedules(length: int, dim: int) -> tuple[Schedule, ...]:
    """Registered schedules for `length` queries a row: all of them give the same bits."""
    spread = (_FEW, _MANY, Schedule("spread", blocks=37, fetch=1))
    walked = (Schedule("walked"), Schedule("walked", wgs=2))
    return (*spread, *walked[: 2 if length > 1 and dim <= 128 else 1])


def default_schedule(batch: int, length: int, heads: int, kv_heads: int, dim: int) -> Schedule:
    """The schedule to use for a shape. Speed only."""
    tiles = batch * math.ceil(length * heads / kv_heads / ROWS)
    wgs = 2 if dim <= 128 else 1
    if length > 1 and tiles * kv_heads >= wgs * SMS:
        return Schedule("walked", wgs=wgs)
    rows = ROWS if length > 1 else heads // kv_heads
    return _FEW if tiles * kv_heads * -(-rows // FOLD_ROWS) <= SMS else _MANY
