"""Schedules of the Mosaic GPU matmul: what may follow the shape.

Nothing here can change a bit of the result (see `mosaic_gpu`): a `Schedule`
says how the one tree is walked, not what it is. Every schedule that
`schedules` lists is compared with every other, bit for bit, by
`scripts/check_gpu.py`.
"""

import dataclasses
import math

from jax.typing import DTypeLike

# Clusters of 1, 2 and 4 blocks that run at once on the 132 SMs of an H100 or H200 SXM. Pairs of
# SMs always fit; of 33 clusters of 4 some wait, since a cluster may not span two GPCs. Speed only.
_RESIDENT = {1: 132, 2: 66, 4: 30}
CHUNK = 64  # 16-bit elements in one 128-byte swizzle row: the unit of K
PRODUCER_REGISTERS = 40
_SMEM_BYTES = 232_448  # per block on sm_90
_SPARE_REGISTERS = 40  # addresses, descriptors, loop state beside the accumulators


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How one matmul is walked.

    Attributes:
      kind: 'normal' (the batch is wgmma's M side, padded to 64 rows by the copy
        engine) or 'swapped' (the weights are, and the batch is the N side).
      bm, bn: rows of x and rows of w in a block's tile.
      stages: depth of the pipeline, in steps of `bk` elements of K.
      bk: elements of K a step, a multiple of 64.
      wgs: consumer warpgroups of a block; one producer warpgroup is added.
      split: the side of the wgmma that the consumers divide, 'm' or 'n'.
      cm, cn: blocks of a cluster along M (they share w) and along N (they share x).
      group: tiles along M that are walked before N moves on (reuse in L2).
    """

    kind: str
    bm: int
    bn: int
    stages: int
    bk: int = 64
    wgs: int = 1
    split: str = "m"
    cm: int = 1
    cn: int = 1
    group: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "swapped"):
            raise ValueError(f"kind must be 'normal' or 'swapped', got {self.kind!r}")
        if self.split not in ("m", "n"):
            raise ValueError(f"split must be 'm' or 'n', got {self.split!r}")
        rows, cols = self.mma_tile
        ways = (self.wgs, 1) if self.split == "m" else (1, self.wgs)
        if rows % (64 * ways[0]) or cols % (8 * ways[1]) or not 8 <= cols // ways[1] <= 256:
            raise ValueError(
                f"a warpgroup's tile must be a multiple of 64 by a multiple of 8 up to 256,"
                f" got {rows} x {cols} over {ways} from {self}"
            )
        if self.cm * self.cn not in _RESIDENT:
            raise ValueError(f"clusters have 1, 2 or 4 blocks: {self}")
        if self.bm % (8 * self.cn) or self.bn % (8 * self.cm):
            raise ValueError(f"a cluster must cut the tiles in parts of 8 rows: {self}")
        if max(self.bm, self.bn) > 256:
            raise ValueError(f"the copy engine moves at most 256 rows: {self}")
        if self.bk % CHUNK or self.stages < 2:
            raise ValueError(f"bk must be a multiple of {CHUNK} and stages >= 2: {self}")

    @property
    def mma_tile(self) -> tuple[int, int]:
        """The block's tile as the wgmma sees it."""
        return (self.bm, self.bn) if self.kind == "normal" else (self.bn, self.bm)

    @property
    def wg_tile(self) -> tuple[int, int]:
        """The accumulator of one consumer."""
        rows, cols = self.mma_tile
        return (rows // self.wgs, cols) if self.split == "m" else (rows, cols // self.wgs)

    @property
    def consumer_registers(self) -> int:
        """Registers a thread of a consumer may use."""
        return 255 if self.wgs == 1 else (512 - PRODUCER_REGISTERS) // self.wgs // 8 * 8

    @property
    def resident(self) -> int:
        """Clusters in the grid: no more than run at once, for they walk the tiles in step."""
        return _RESIDENT[self.cm * self.cn]

    def stage_tile(self, itemsize: int) -> tuple[int, int]:
        """Rows and columns of y in one store, for results of `itemsize` bytes."""
        _, cols = self.wg_tile
        return (64, math.gcd(cols, 128 // itemsize)) if self.kind == "normal" else (cols, 64)

    def store_slots(self, itemsize: int) -> int:
        """Buffers of `stage_tile` that a consumer rotates over."""
        rows, cols = self.stage_tile(itemsize)
        return 1 if rows * cols == math.prod(self.wg_tile) else 2

    def smem_bytes(self, itemsize: int) -> int:
        """Shared memory of a block for results of `itemsize` bytes."""
        ring = self.stages * self.bk * (self.bm + self.bn) * 2
        out = self.wgs * self.store_slots(itemsize) * math.prod(self.stage_tile(itemsize))
        return ring + -(-out * itemsize // 1024) * 1024 + 1024  # barriers in the last KiB

    def fits(self, leaves: int = 1, itemsize: int = 4) -> bool:
        """Whether shared memory and registers suffice for `leaves` and the result's size."""
        live = math.prod(self.wg_tile) // 128 * leaves.bit_length()
        return (
            self.smem_bytes(itemsize) <= _SMEM_BYTES
            and live + _SPARE_REGISTERS <= self.consumer_registers
        )

    def __str__(self) -> str:
        shape = f"{self.bm}x{self.bn}x{self.bk}"
        return (
            f"{self.kind}-{shape}-s{self.stages}-w{self.wgs}{self.split}"
            f"-c{self.cm}{self.cn}-g{self.group}"
        )


def _deep(kind: str, bm: int, bn: int, *, bk: int = 64, most: int = 12, **rest) -> Schedule:
    """The schedule with the deepest pipeline that shared memory allows, float32 results too."""
    stages = most
    while not Schedule(kind, bm, bn, stages, bk, **rest).smem_bytes(4) <= _SMEM_BYTES:
        stages -= 1
    return Schedule(kind, bm, bn, stages, bk, **rest)


# Every schedule that may run. Decode tiles first (one row of tiles over M), then prefill's.
_REGISTERED = (
    _deep("normal", 64, 32),
    _deep("normal", 64, 32, bk=128),
    _deep("normal", 64, 32, bk=256),
    _deep("normal", 64, 32, bk=128, cn=2),
    _deep("normal", 64, 48),
    _deep("normal", 64, 48, bk=128),
    _deep("normal", 64, 48, bk=128, cn=2),
    _deep("normal", 64, 64, bk=128),
    _deep("normal", 64, 64, bk=128, cn=2),
    _deep("normal", 64, 96, bk=128),
    _deep("normal", 64, 96, bk=128, cn=2),
    _deep("normal", 64, 128, bk=128),
    _deep("normal", 64, 128, bk=128, cn=2),
    _deep("normal", 64, 192, bk=128),
    _deep("normal", 64, 192, wgs=2, split="n"),
    _deep("swapped", 8, 64, bk=128),
    _deep("swapped", 8, 64, bk=256),
    _deep("swapped", 16, 64, bk=128),
    _deep("swapped", 16, 128, bk=128, wgs=2),
    _deep("swapped", 32, 64, bk=128),
    _deep("swapped", 32, 192, wgs=3),
    _deep("swapped", 64, 64, bk=128),
    _deep("swapped", 64, 128, bk=128, wgs=2),
    _deep("normal", 128, 32, wgs=2, cn=2),
    _deep("normal", 128, 32, bk=128, wgs=2, cn=2),
    _deep("normal", 128, 48, wgs=2, cn=2),
    _deep("normal", 128, 48, bk=128, wgs=2, cn=2),
    _deep("normal", 128, 64, wgs=2, cn=2, group=8),
    _deep("normal", 128, 64, bk=128, wgs=2, cn=2, group=8),
    _deep("normal", 128, 80, wgs=2, cm=2, cn=2, group=8),
    _deep("normal", 128, 96, wgs=2, cn=2, group=8),
    _deep("normal", 128, 96, bk=128, wgs=2, cn=2, group=8),
    _deep("normal", 128, 96, wgs=2, cm=2, group=8),
    _deep("normal", 128, 96, wgs=2, cm=2, cn=2, group=8),
    _deep("normal", 128, 128, wgs=2, group=8),
    _deep("normal", 128, 128, wgs=2, cn=2, group=8),
    _deep("normal", 128, 128, wgs=2, cm=2, group=8),
    _deep("normal", 128, 128, bk=128, wgs=2, group=8),
    _deep("normal", 128, 192, wgs=2, group=8),
    _deep("normal", 128, 192, wgs=2, cn=2, group=8),
    _deep("normal", 128, 192, wgs=2, cm=2, group=8),
    _deep("normal", 128, 256, wgs=2, group=8),
    _deep("normal", 128, 256, wgs=2, group=16),
    _deep("normal", 128, 256, wgs=2, cm=2, group=4),
    _deep("normal", 128, 256, wgs=2, cm=2, group=8),
    _deep("normal", 256, 96, wgs=2, cn=2, group=8),
    _deep("normal", 256, 128, wgs=2, group=4),
    _deep("normal", 256, 128, wgs=2, cn=2, group=4),
    _deep("normal", 256, 192, wgs=2, group=4),
    _deep("normal", 256, 192, wgs=2, cn=2, group=4),
)


def schedules(
    m: int, n: int, k: int, dtype: DTypeLike, leaves: int = 1, out_size: int = 4
) -> tuple[Schedule, ...]:
    """Every registered schedule that can compute [m, k] x [n, k]: all of them give the same bits.

    Any tile can walk any shape; registers limit them by `leaves`, and shared memory by the
    size of the result's elements.
    """
    del m, n, k, dtype
    return tuple(s for s in _REGISTERED if s.fits(leaves, out_size))


def default_schedule(m: int, n: int, k: int, dtype: DTypeLike, leaves: int = 1) -> Schedule:
    """The schedule to use for a shape. Speed only."""
    del dtype, k
    fit = [s for s in _REGISTERED if s.fits(leaves)]
    bm = 64 if m <= 64 else 128
    rows = [s for s in fit if s.kind == "normal" and (s.bm == bm or s.bm > 128 < m)]

    def cost(s):
        tiles = math.ceil(m / (s.bm * s.cm)) * math.ceil(n / (s.bn * s.cn))
        waves = math.ceil(tiles / s.resident)
        return waves * s.bn * s.bm, -s.bn

    return min(rows, key=cost)
