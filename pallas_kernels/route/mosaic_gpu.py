"""Routing for Hopper in Pallas Mosaic GPU: a warp chooses for a row, a warpgroup places experts.

Tree: that of `reference`, with the bits that XLA gives `portable` on the same card. Products are
named instructions (`exact`), quotients and sums are rounded to nearest, the exponential is that of
`trees`. A lane holds experts 32 apart and adds them by halves; then lanes are added by XOR
shuffles. Lane l holds expert l with its five bits reversed, so that Mosaic GPU's order, 1, 2, 4, 8
and 16 lanes away, is that of halves. Everything else is maxima, comparisons and integers, exact in
any order.

Choosing (`_choose`, 4 rows a warpgroup, a warp each; of fewer rows all warps take the same): k
times the largest bits that are left, and of them the first expert, by `redux`. What it leaves for
placing is a row of slots, one an expert: j + 1 for the j-th chosen, 0 for others, and -1 - e all
over a row that is not routed.

Placing (`_place`, a thread an expert): counts of the slots of a column, prefix sums of them over
the experts and of the tiles that they need; then each thread walks down its column and writes where
its rows stand, and whose they are. Also the plan of the grouped matmuls' tiles, which would be
three more kernels (`grouped_matmul.mosaic_gpu.plan`).

Schedules (what the bits do not depend on): up to 8 rows one block does both, slots in shared
memory (`apart` false); above, two kernels, the first in blocks of 4 rows, the second in blocks that
all count, and place 8 tokens each. Above 256 rows of 128 experts, or where E is no
power of two from 128 to 512 or k none up to 32, XLA compiles `portable`: the same bits in more
kernels.

Budget: shared memory for 4 (M + 4) E bytes, 6 KiB of 8 rows of 128 experts. Registers for a few
arrays of E / 32 values a row; ptxas spills none (tests/gpu_compile).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels import trees
from jdet.pallas_kernels.exact import exact
from jdet.pallas_kernels.grouped_matmul.mosaic_gpu_schedules import plan_size, tile_height
from jdet.pallas_kernels.route import Routing, portable

_LANES = 32
_MOST = 256 * 128  # logits
_TOGETHER = 8  # rows that one block chooses for and places
_TOKENS = 8  # that a block of several places
_NAN = 0x7FFFFFFF  # what a division gives
_UNROLL = 16  # rows of slots on their way
_OFF = 1 << 16  # in counts of tokens: one that is not routed


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Are rows chosen for and placed in kernels apart?"""

    apart: bool


SCHEDULES = (Schedule(False), Schedule(True))


def default_schedule(m: int) -> Schedule:
    """The schedule to use for a number of rows. Speed only."""
    return Schedule(m > _TOGETHER)


def has_kernel(m: int, experts: int, k: int) -> bool:
    """Whether the kernels take this shape, rather than XLA."""
    powers = not (experts & (experts - 1) or k & (k - 1))
    return powers and 128 <= experts <= 512 and 0 < k <= _LANES and 0 < m * experts <= _MOST


def _row_layout(rows: int) -> Any:
    """[rows, columns] in registers: a warp each 4th row, or all warps the same one."""
    tiles = ((min(rows, 4), _LANES), *((1, _LANES >> i) for i in range(1, 6)))
    # Tiled so, an array ends in [warps, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 1]: the bits of a column.
    t = mgpu.TiledLayout(
        plgpu.Tiling(tiles),
        (-12,) if rows > 1 else (plgpu.Replicated(4),),
        (-3, -5, -7, -9, -11),
        -1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


def _scatter(ref: Any, at: jax.Array, value: jax.Array, layout: Any, interpret: bool) -> None:
    """ref[at] = value where `at` is not negative; `ref` is one row of 4-byte elements."""
    if interpret:
        places, values = at.reshape(-1), value.reshape(-1)

        def put(i, _):
            @pl.when(places[i] >= 0)
            def _():
                ref[places[i]] = values[i]

        lax.fori_loop(0, places.size, put, None)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def put_all(ctx, *operands):
        del ctx
        ref, at, value = operands
        base, i32 = mgpu_utils.memref_ptr(ref), at.mlir_dtype
        code = (
            "{ .reg .pred p; .reg .b64 a; setp.ge.s32 p, $1, 0; mad.wide.s32 a, $1, 4, $0;"
            " @p st.global.b32 [a], $2; }"
        )
        for registers in zip(at.registers.flat, value.registers.flat, strict=True):
            i, v = (mgpu_utils.bitcast(r, i32) for r in registers)
            mgpu_utils.inline_ptx(code, base, i, v, has_side_effects=True)

    put_all(ref, at, value)


def _floor(x: jax.Array) -> jax.Array:
    """Of numbers that an int32 can hold; Mosaic has no other."""
    whole = x.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(whole > x, whole - 1.0, whole)


def _row_sum(x: jax.Array, interpret: bool) -> jax.Array:
    """`trees.tree_sum` of each row."""
    if interpret:  # whose own sums are XLA's
        return trees.tree_sum(x)
    while x.shape[1] > _LANES:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return jnp.sum(x, axis=1)


def _choose(
    refs: tuple[Any, ...], start: Any, *, rows: int, k: int, normalise: bool, interpret: bool
) -> None:
    """The experts of rows start .. start + rows - 1: themselves, their weights, their slots."""
    logits_g, routed_g, experts_g, weights_g, slots = refs
    layout, window, count = _row_layout(rows), pl.ds(start, rows), logits_g.shape[1]

    def spread(x, columns=count):
        return lax.broadcast_in_dim(x, (rows, columns), (0,))

    def number(axis, columns):
        return plgpu.broadcasted_iota(jnp.int32, (rows, columns), axis, layout=layout)

    def divided(x, y, columns):
        return exact("div.full.f32", layout, interpret, x, spread(y, columns))

    times = functools.partial(exact, "mul.rn.f32", layout, interpret)
    x = plgpu.load(logits_g.at[window], layout=layout, optimized=False)
    e = trees.exp(x - spread(jnp.max(x, axis=1)), times, _floor)
    p = divided(e, _row_sum(e, interpret), count)
    # Probabilities are not negative, so their bits order as they do; NaN comes last.
    left = jnp.where(p != p, -1, lax.bitcast_convert_type(p, jnp.int32))
    expert, lane = number(1, count), number(1, _LANES)
    from_end = count - expert
    chosen, values, slot = [], [], jnp.zeros_like(expert)
    mine, weights, rank = (jnp.zeros_like(lane) for _ in range(3))
    for i in range(k):
        value = jnp.max(left, axis=1)
        # The first is found as the last from the end: there is an instruction for maxima alone.
        first = count - jnp.max(jnp.where(left == spread(value), from_end, 0), axis=1)
        left = jnp.where(expert == spread(first), -2, left)
        chosen.append(spread(first, _LANES))
        values.append(spread(jnp.where(value < 0, _NAN, value), _LANES))
        slot += jnp.where(expert < spread(first), 0, 1)
        mine = jnp.where(lane == i, chosen[i], mine)
        weights = jnp.where(lane == i, values[i], weights)
    slot = jnp.where(left == -2, slot, 0)
    for other in chosen:
        rank += jnp.where(other < mine, 1, 0)
    if normalise:
        in_order = jnp.zeros_like(lane)
        for i, value in enumerate(values):
            there = spread(jnp.max(jnp.where(lane == i, rank, 0), axis=1), _LANES)
            in_order = jnp.where(lane == there, value, in_order)
        total = _row_sum(lax.bitcast_convert_type(in_order, jnp.float32), interpret)
    weights = lax.bitcast_convert_type(weights, jnp.float32)
    if normalise:
        weights = divided(weights, total, _LANES)
    routed = plgpu.load(routed_g.at[window], layout=layout.reduce(1), optimized=False)
    slots.at[window][...] = jnp.where(spread(routed) > 0, slot, -1 - expert)
    routed = spread(routed, _LANES) > 0
    at = jnp.where(lane < k, (start + number(0, _LANES)) * k + rank, -1)
    _scatter(experts_g, at, jnp.where(routed, mine, count), layout, interpret)
    _scatter(weights_g, at, jnp.where(routed, weights, 0.0), layout, interpret)


def _loop(count: int, unroll: int, step: Any, state: Any) -> Any:
    """`step(i, state)` for i = 0 .. count - 1, some at a time so that loads do not wait."""

    def some(i, state):
        for j in range(unroll):
            state = step(i * unroll + j, state)
        return state

    whole = count // unroll
    state = lax.fori_loop(0, whole, some, state) if whole else state
    for i in range(whole * unroll, count):
        state = step(jnp.int32(i), state)
    return state


def _running(x: jax.Array, sums_s: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Sums of the first 1, 2, ... elements, integers in a thread each; and the sum of all."""
    size, half = x.shape[0], 0
    for buffer in range(2):
        sums_s.at[buffer, pl.ds(0, size)][...] = jnp.zeros_like(x)
    distance = 1
    while distance <= size:
        # What is overwritten was read before the last barrier.
        sums_s.at[half, pl.ds(size, size)][...] = x
        plgpu.commit_smem()
        if distance < size:
            before = sums_s.at[half, pl.ds(size - distance, size)]
            x = x + plgpu.load(before, layout=layout, optimized=False)
            half = 1 - half
        distance *= 2
    return x, sums_s[half, 2 * size - 1]


def _place(
    slots: Any,
    tokens_g: Any,
    places_g: Any,
    sizes_g: Any,
    tiles_g: Any,
    sums_s: Any,
    *,
    tokens: int,
    k: int,
    height: int,
    interpret: bool,
) -> None:
    """The rows of the experts of `tokens` tokens; in the first block, also sizes and tiles."""
    (m, count), (rows,) = slots.shape, tokens_g.shape
    layout = plgpu.Layout.WG_STRIDED((count,), 1)
    expert = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    zero = plgpu.layout_cast(jnp.zeros((count,), jnp.int32), layout)
    block = lax.axis_index("block")
    first = lax.min(block * tokens, m - tokens)

    def column(i):
        """A token's slots; 1 where it has rows here, _OFF where it is not routed."""
        slot = plgpu.load(slots.at[i], layout=layout, optimized=False)
        return slot, jnp.where(slot > 0, 1, jnp.where(slot < 0, _OFF, 0))

    def add(i, sums):
        """Counts of all tokens, and of those before the block's."""
        one = column(i)[1]
        return sums[0] + one, sums[1] + one * (i < first).astype(jnp.int32)

    sums, before = _loop(m, _UNROLL, add, (zero, zero))
    size = sums & (_OFF - 1)
    shift = height.bit_length() - 1
    of_group = (size + (height - 1)) >> shift  # tiles
    ends, total = _running(size | (of_group << 16), sums_s, layout)
    begin, tile = (ends & 0xFFFF) - size, (ends >> 16) - of_group
    used, real = total & 0xFFFF, total >> 16

    @pl.when(block == 0)
    def _():
        sizes_g[...] = size

        def put(at, *values):
            for i, value in enumerate(values):
                _scatter(tiles_g, at + jnp.where(at < 0, 0, i), value, layout, interpret)

        every = real + ((rows - used + (height - 1)) >> shift)
        put(jnp.where(expert == 0, 0, -1), zero + real, zero + every, zero)

        def tiles(i, _):
            done = i * height
            at = jnp.where(i < of_group, 3 * (1 + tile + i), -1)
            put(at, begin + done, lax.min(size - done, zero + height), expert)

        lax.fori_loop(0, pl.cdiv(m, height), tiles, None)
        for i in range(0, pl.cdiv(rows, height), count):
            done = (expert + i) * height + used
            at = jnp.where(done < rows, 3 * (1 + real + expert + i), -1)
            put(at, done, lax.min(rows - done, zero + height), zero + count)

    def place(i, sums):
        here_before, off_before = sums
        slot, one = column(first + i)
        here, off = one & (_OFF - 1), one >> 16
        at = jnp.where(off > 0, off_before + expert, here_before)
        j = jnp.where(off > 0, expert, slot - 1)
        mine = (j >= 0) & (j < k)
        _scatter(places_g, jnp.where(mine, (first + i) * k + j, -1), at, layout, interpret)
        _scatter(tokens_g, jnp.where(mine, at, -1), zero + (first + i), layout, interpret)
        return here_before + here, off_before + off * k

    _loop(tokens, 4, place, (begin + (before & (_OFF - 1)), used + (before >> 16) * k))


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("k", "normalise", "s", "interpret"))
def _route(logits, routed, *, k, normalise, s, interpret):
    m, count = logits.shape
    rows = next(r for r in (8, 4, 1) if r <= m and (r <= 4 or not s.apart))
    windows = pl.cdiv(m, rows)
    height = tile_height(m * k, count)
    of_row = functools.partial(jax.ShapeDtypeStruct, (m * k,))
    slots = jax.ShapeDtypeStruct((m, count), jnp.int32)
    placed = (
        of_row(jnp.int32),
        of_row(jnp.int32),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        jax.ShapeDtypeStruct((3 * (1 + plan_size(m * k, count, height)),), jnp.int32),
    )
    sums_s = plgpu.SMEM((2, 2 * count), jnp.int32)
    choose = functools.partial(
        _choose, rows=rows, k=k, normalise=normalise, interpret=bool(interpret)
    )
    place: Any = functools.partial(_place, k=k, height=height, interpret=bool(interpret))

    def together(logits_g, routed_g, experts_g, weights_g, *others):
        *placed_g, slots_s, sums_s = others
        refs = (logits_g, routed_g, experts_g, weights_g, slots_s)
        _loop(windows, 1, lambda i, _: choose(refs, lax.min(i * rows, m - rows)), None)
        plgpu.commit_smem()
        place(slots_s, *placed_g, sums_s, tokens=m)

    def choose_some(*refs):
        choose(refs, lax.min(lax.axis_index("block") * rows, m - rows))

    def call(kernel, name, out_type, grid, *scratch):
        return plgpu.kernel(
            kernel,
            out_type=out_type,
            grid=(grid,),
            grid_names=("block",),
            scratch_types=scratch,
            kernel_name=name,
            # Barriers stand where shared memory is read; what goes to global memory is not.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            interpret=interpret or None,
        )

    chosen = (of_row(jnp.int32), of_row(jnp.float32))
    if s.apart:
        run = call(choose_some, "jdet_route", (*chosen, slots), windows)
        experts, weights, slots = run(logits, routed)
        tokens = min(m, _TOKENS)
        run = call(
            functools.partial(place, tokens=tokens),
            "jdet_route_places",
            placed,
            pl.cdiv(m, tokens),
            sums_s,
        )
        placed = run(slots)
    else:
        slots_s = plgpu.SMEM((m, count), jnp.int32)
        run = call(together, "jdet_route", (*chosen, *placed), 1, slots_s, sums_s)
        experts, weights, *placed = run(logits, routed)
    tokens, places, sizes, tiles = placed
    shape = (m, k)
    return Routing(
        experts.reshape(shape),
        weights.reshape(shape),
        tokens,
        places.reshape(shape),
        sizes,
        tiles.reshape(-1, 3),
    )


def route(
    logits: jax.Array,
    routed: jax.Array,
    *,
    k: int,
    normalise: bool,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> Routing:
    """See `reference.route` for the op and the module for its tree.

    Args:
      logits: [M, E], a float that float32 holds.
      routed: bool [M].
      schedule: how many kernels; by M unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.
    """
    m, count = logits.shape
    if not has_kernel(m, count, k):
        return portable.route(logits, routed, k=k, normalise=normalise)
    return _route(
        logits.astype(jnp.float32),
        routed.astype(jnp.int32),
        k=k,
        normalise=normalise,
        s=schedule or default_schedule(m),
        interpret=interpret,
    )
