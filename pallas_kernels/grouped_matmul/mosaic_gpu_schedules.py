"""Schedules of the Mosaic GPU grouped matmul: what may follow R, E and N, and no bit follows.

A tile of `matmul`, `normal` and without clusters, and how many rows of one group it takes. Every
pair that `schedules` lists is compared with every other, bit for bit, by
scripts/check_gpu_grouped.py.
"""

import dataclasses
import math

from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import SHORT, Schedule, deepest


@dataclasses.dataclass(frozen=True)
class GroupedSchedule:
    """How one grouped matmul is walked.

    Attributes:
      tile: `matmul`'s schedule of a tile.
      height: the most rows of x in a tile: a power of two from 8 to the tile's.
    """

    tile: Schedule
    height: int

    def __post_init__(self) -> None:
        s, height = self.tile, self.height
        if s.kind != "normal" or s.cm * s.cn > 1:
            raise ValueError(f"grouped tiles are normal and stand alone: {s}")
        if not 8 <= height <= s.bm or height & (height - 1):
            raise ValueError(f"height={height}; allowed: powers of two from 8 to {s.bm}")

    def fits(self, leaves: int, out_size: int) -> bool:
        """Whether there is room, and any number of rows can leave shared memory.

        Copies start at addresses of 128 bytes. The last, of one row, follows an even number of
        rows: these have 64 bytes at least. Short tiles leave from registers.
        """
        columns = self.tile.stage_tile(out_size)[1]
        copied = self.short or columns * out_size >= 64
        return self.tile.fits(leaves, out_size) and copied

    @property
    def short(self) -> bool:
        """Whether results leave from registers, and rows of x may be named by `tokens`."""
        return self.height == SHORT

    def __str__(self) -> str:
        return f"{self.tile}-h{self.height}"


_WIDTHS = (192, 128, 96, 64, 32)
_SMALL = {bn: deepest("normal", 64, bn, bk=128) for bn in _WIDTHS}
# The cost of a tile in clock cycles for 64 elements of K, as in matmul's schedules.
_LARGE = (
    (deepest("normal", 128, 256, wgs=2), 1060),
    (deepest("normal", 128, 192, wgs=2), 820),
    (deepest("normal", 128, 128, wgs=2), 555),
)
_HEIGHTS = (8, 16, 32, 64)
_RESIDENT = 132
_TILE_END = 4  # in rows of w


def _gated(s: Schedule, gated: bool) -> Schedule:
    return dataclasses.replace(s, gated=gated)


def schedules(leaves: int = 1, out_size: int = 4, gated: bool = False) -> list[GroupedSchedule]:
    """Every registered schedule that has room for `leaves` and results of `out_size` bytes."""
    pairs = [(s, height) for s in _SMALL.values() for height in _HEIGHTS]
    pairs += [(s, height) for s, _ in _LARGE for height in (64, 128)]
    every = [GroupedSchedule(_gated(s, gated), h) for s, h in pairs if s.can_gate or not gated]
    return [s for s in every if s.fits(leaves, out_size)]


def tile_height(rows: int, experts: int) -> int:
    """The height of the default schedule's tiles: twice a group of average size, 128 at most."""
    average = -(-rows // min(rows, experts))
    if average > 64:
        return 128
    return next((h for h in _HEIGHTS if h >= 2 * average), 64) if average > 1 else 8


def plan_size(rows: int, experts: int, height: int) -> int:
    """Tiles of `height` rows that suffice for any sizes of groups and the rows of no group.

    No two heights have the same number and other tiles: then there are fewer rows than either.
    """
    return rows // height + min(rows, experts + 1)


def default_schedule(
    rows: int, experts: int, n: int, leaves: int = 1, out_size: int = 2, gated: bool = False
) -> GroupedSchedule:
    """The schedule for R rows over E experts, n rows of w each. Speed only.

    As many experts are read as if each row drew one at random. Up to 64 rows in a group of average
    size, tiles are 64 rows high and of them as many are read as twice the average; a tile costs
    the rows of w and x that it streams and its end, and half of one is waited for at last (chosen
    by scripts/bench/results/h200-short-tiles.json). Above, whole waves of tiles cost what the
    tensor cores take.

    Raises:
      NotImplementedError: no schedule has registers for so many leaves.
    """
    touched = experts * (1 - (1 - 1 / experts) ** rows)
    average = -(-rows // min(rows, experts))
    few, height = average <= 64, tile_height(rows, experts)
    large = {_gated(s, gated): cost for s, cost in _LARGE if s.can_gate or not gated}
    costs = {}
    for choice in schedules(leaves, out_size, gated):
        s = choice.tile
        if choice.height == height and (s not in large) == few:
            waves = touched * -(-average // height) * -(-n // s.bn) / _RESIDENT
            if few:
                costs[choice] = (max(waves, 1.0) + 0.5) * (s.bn + height + _TILE_END)
            else:
                costs[choice] = math.ceil(waves) * large[s]
    if not costs:
        for choice in schedules(leaves, out_size, gated):
            costs[choice] = abs(choice.height - height)
    if not costs:
        raise NotImplementedError(f"mosaic_gpu grouped_matmul has no registers for {leaves} leaves")
    return min(costs, key=costs.__getitem__)
