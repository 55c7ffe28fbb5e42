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
SHORT = 8  # rows of a grouped tile that leaves from registers
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
      slots: buffers a consumer rotates over when it stores its tile.
      gated: w is two matrices of one shape, gate above up; a tile's bn rows of w are the
        same bn / 2 rows of both, and their results meet in the consumer's registers.
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
    slots: int = 2
    gated: bool = False

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
        if self.bk % CHUNK or self.stages < 2 or self.slots < 1:
            raise ValueError(f"bk must be a multiple of {CHUNK}, stages >= 2, slots >= 1: {self}")
        if self.gated and not self.can_gate:
            raise ValueError(f"gate and up of one result must meet in one consumer: {self}")

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
    def can_gate(self) -> bool:
        """Whether each consumer can have whole tiles of the gate and the same ones of up."""
        w_side, rows = ("n", 16) if self.kind == "normal" else ("m", 64)
        whole = self.wgs == 1 or self.split != w_side
        return whole and self.bn % (2 * rows) == 0 and self.bn % (16 * self.cm) == 0

    @property
    def takes_k_first(self) -> bool:
        """Whether it can walk w [K, N]: each consumer has whole squares of `CHUNK` of w."""
        w_side = "n" if self.kind == "normal" else "m"
        ways = self.wgs if self.split == w_side else 1
        return self.bn % (CHUNK * ways) == 0 and not self.gated

    @property
    def out_cols(self) -> int:
        """Columns of y in a block's tile."""
        return self.bn // 2 if self.gated else self.bn

    @property
    def out_tile(self) -> tuple[int, int]:
        """The results of one consumer, laid out as its accumulator."""
        rows, cols = self.wg_tile
        if not self.gated:
            return rows, cols
        return (rows, cols // 2) if self.kind == "normal" else (rows // 2, cols)

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
        _, cols = self.out_tile
        if self.kind == "normal":
            return 64, math.gcd(cols, 128 // itemsize)
        return cols if cols <= 64 else math.gcd(cols, 64), 64

    def store_slots(self, itemsize: int) -> int:
        """Buffers of `stage_tile` that a consumer rotates over, no more than it has pieces."""
        pieces = math.prod(self.out_tile) // math.prod(self.stage_tile(itemsize))
        return min(self.slots, pieces)

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
            + (f"-o{self.slots}" if self.slots != 2 else "")
            + ("-gated" if self.gated else "")
        )


def deepest(kind: str, bm: int, bn: int, *, bk: int = 64, most: int = 12, **rest) -> Schedule:
    """The schedule with the deepest pipeline that shared memory allows, float32 results too."""
    stages = most
    while not Schedule(kind, bm, bn, stages, bk, **rest).smem_bytes(4) <= _SMEM_BYTES:
        stages -= 1
    return Schedule(kind, bm, bn, stages, bk, **rest)


# Every schedule that may run. Those of `_CHOICES` are chosen by shape; the others are kept for
# the comparison of bits: another orientation, depth, division or cluster.
_SMALL = {bn: deepest("normal", 64, bn, bk=128) for bn in (32, 48, 64, 96, 128, 192)}
# Of few rows of w, so that more SMs stream some. Wider tiles are the choice above 16 rows of x:
# each of these reads all of x.
_THIN = deepest("normal", 64, 16, bk=256)
# Of few rows of x: half of the SMs, each with more of w on its way, bring w sooner than all.
_FEW = {bm: deepest("swapped", bm, 64, bk=bk) for bm, bk in ((8, 256), (16, 256), (32, 128))}
# Two blocks of 64 rows of x that share each tile of w. A block that reads all 128 reads them from
# shared memory again for each few rows of w, which takes longer than w does to come.
_HALVES = {bn: deepest("normal", 64, bn, bk=128, cm=2) for bn in (32, 48, 64, 96, 128)}
_HALVES[16] = deepest("normal", 64, 16, bk=256, cm=2)
_128X64_HALVES = deepest("normal", 128, 64, wgs=2, cm=2)
_128X64_PAIR = deepest("normal", 128, 64, wgs=2, cn=2, group=8)
_128X80 = deepest("normal", 128, 80, wgs=2, cm=2, cn=2, group=8)
_128X96 = deepest("normal", 128, 96, wgs=2, cm=2, group=8)
_128X128 = deepest("normal", 128, 128, wgs=2, group=8)
_128X128_K128 = deepest("normal", 128, 128, bk=128, wgs=2, group=8)
_128X192 = deepest("normal", 128, 192, wgs=2, group=8)
_128X256 = deepest("normal", 128, 256, wgs=2, group=8)
_128X256_PAIR = deepest("normal", 128, 256, wgs=2, cm=2, group=8)
_256X192 = deepest("normal", 256, 192, wgs=2, group=4, slots=1)

# Elements of w that are streamed in the time (1 us) between a tile's last step and the next one's
# first: most of what a tile of a short K costs (h200-matmul-sweep.json).
_TURN = 16384

_LARGE = (
    (_256X192, 1580),
    (_128X192, 820),
    (_128X128, 555),
    (_128X96, 525),
    (_128X64_PAIR, 524),
)

_OF_UP_TO_16 = (*((_SMALL[bn], bn) for bn in (192, 96, 64, 48, 32)), (_THIN, 16))

# (largest M, ((schedule, cost of one tile), ...)): the choice is the least cost of all waves of
# tiles, the first of equals. Up to M = 128 a tile costs the rows of w it streams and its own
# `_TURN`; above, the clock cycles of 64 elements of K, measured on an H100
# (scripts/bench/matmul.py --sweep) and an H200 (h200-matmul-sweep.json).
_CHOICES = (
    *((bm, ((_FEW[bm], 64), *_OF_UP_TO_16)) for bm in (8, 16)),
    (32, ((_FEW[32], 64), *((_SMALL[bn], bn) for bn in (96, 64, 48, 32)))),
    (64, tuple((_SMALL[bn], bn) for bn in (192, 128, 96, 64, 48, 32))),
    (
        128,
        (
            (_128X128_K128, 128),
            (_128X192, 196),  # behind 128 at Qwen3's head, where an H100 took 5 % longer with it
            *((_HALVES[bn], bn // 2) for bn in (128, 96, 64, 48, 32, 16)),
        ),
    ),
    (
        256,
        (
            (_128X64_HALVES, 430),
            (_128X80, 440),
            (_128X96, 525),
            (_128X128, 555),
            (_128X192, 840),
            (_128X256, 1080),
        ),
    ),
    (1536, ((_128X256, 1060), *_LARGE)),
    (1 << 31, ((_128X256_PAIR, 1060), *_LARGE)),
)
# Of w [K, N], where wgmma takes it in squares of 64: as its M side.
_K_FIRST_SMALL = {
    bm: tuple((deepest("swapped", bm, bn, bk=bk, wgs=bn // 64), bn) for bn in (192, 128, 64))
    for bm, bk in ((8, 128), (16, 128), (32, 128), (64, 128), (128, 64))
}
# Measured on an H100: these are faster as the N side.
_K_FIRST_SMALL |= {bm: (*_K_FIRST_SMALL[bm][:2], (_SMALL[64], 64)) for bm in (8, 16, 32)}
_K_FIRST_SMALL[64] = ((_SMALL[192], 192), *_K_FIRST_SMALL[64][1:])
_K_FIRST_SMALL[128] = (  # halves that share w, before the tile of all rows
    *_K_FIRST_SMALL[128][:2],
    (deepest("swapped", 64, 64, bk=128, cm=2), 64),
    _K_FIRST_SMALL[128][2],
)
_256X128 = deepest("swapped", 256, 128, wgs=2, group=4)
_K_FIRST_LARGE = (
    (deepest("swapped", 192, 256, wgs=2, group=4, slots=1), 1580),
    (deepest("swapped", 192, 128, wgs=2, group=4), 820),
    (deepest("swapped", 128, 192, wgs=3, group=8), 1000),
    (deepest("swapped", 128, 128, wgs=2, group=8), 555),
    (deepest("swapped", 128, 64, group=8), 400),
)
_K_FIRST_CHOICES = (
    *_K_FIRST_SMALL.items(),
    (1536, ((_256X128, 1060), *_K_FIRST_LARGE)),
    (1 << 31, ((deepest("swapped", 256, 128, wgs=2, cm=2, group=4), 1060), *_K_FIRST_LARGE)),
)
_REGISTERED = tuple(
    dict.fromkeys(
        (
            *(s for choices in (_CHOICES, _K_FIRST_CHOICES) for _, of in choices for s, _ in of),
            deepest("normal", 64, 32),
            deepest("normal", 64, 32, bk=256),
            deepest("normal", 64, 64, bk=128, cn=2),
            deepest("normal", 64, 192, wgs=2, split="n"),
            deepest("normal", 256, 128, wgs=2, cn=2, group=4),
            deepest("swapped", 16, 128, bk=128, wgs=2),
            deepest("swapped", 32, 192, wgs=3),
            deepest("swapped", 64, 64, bk=128, cn=2),
            deepest("swapped", 128, 128, wgs=2),
        )
    )
)


def _gated(s: Schedule) -> Schedule:
    return dataclasses.replace(s, gated=True)


_GATED = (
    *(_gated(s) for s in _REGISTERED if s.can_gate),
    deepest("swapped", 16, 128, bk=128, gated=True),
    deepest("swapped", 64, 128, wgs=2, split="n", gated=True),
)
_GATED_CHOICES = tuple(
    (largest, tuple((_gated(s), of_tile) for s, of_tile in choices if s.can_gate))
    for largest, choices in _CHOICES
)


def schedules(
    m: int,
    n: int,
    k: int,
    dtype: DTypeLike,
    leaves: int = 1,
    out_size: int = 4,
    gated: bool = False,
    k_last: bool = True,
) -> tuple[Schedule, ...]:
    """Every registered schedule that can compute [m, k] x [n, k]: all of them give the same bits.

    Not `k_last`: of those, which can walk w [k, n].

    Any tile can walk any shape; registers limit them by `leaves`, and shared memory by the
    size of the result's elements.
    """
    del m, n, k, dtype
    every = (s for s in (_GATED if gated else _REGISTERED) if s.fits(leaves, out_size))
    return tuple(s for s in every if k_last or s.takes_k_first)


def default_schedule(
    m: int,
    n: int,
    k: int,
    dtype: DTypeLike,
    leaves: int = 1,
    gated: bool = False,
    k_last: bool = True,
    batch: int = 1,
) -> Schedule:
    """The schedule to use for a shape, n the rows of w [n, k], columns of [k, n]. Speed only.

    Raises:
      NotImplementedError: no schedule has registers for so many leaves.
    """
    every = schedules(m, n, k, dtype, leaves, gated=gated, k_last=k_last)
    by_m = _GATED_CHOICES if gated else _CHOICES if k_last else _K_FIRST_CHOICES
    choices = next(choices for largest, choices in by_m if m <= largest)

    def cost(s: Schedule, of_tile: int) -> float:
        clusters = batch * -(-m // (s.bm * s.cm)) * -(-n // (s.bn * s.cn))
        waves = -(-clusters // s.resident)
        share = 1.0  # below 1 where tiles leave SMs idle and w comes sooner to the others
        if waves == 1 and s in _FEW.values() and k >= s.bk:
            share = max(0.5, clusters / s.resident)
        turn = _TURN / k if m <= 128 else 0.0
        return waves * (of_tile * share + turn)

    costs = {s: cost(s, of_tile) for s, of_tile in choices if s in every}
    if not costs:
        costs = {s: cost(s, s.bm * s.bn) for s in every}
    if not costs:
        raise NotImplementedError(f"mosaic_gpu matmul has no registers for {leaves} leaves")
    return min(costs, key=costs.__getitem__)
