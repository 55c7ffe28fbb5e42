"""The main kernel of the Mosaic GPU attention; its tree and its schedules stand in `mosaic_gpu`.

A team is one producer warpgroup, which only starts copies, and one or two consumers: a tile of
queries each; or, at head_dim 256, one tile, of whose scores each computes all, and of whose o a
band of 128 columns. A block is a team, or two that share nothing but the multiprocessor: one
computes while the other waits. All of a team walk the same items (mosaic_gpu_schedules), so they
agree on slots without a word:

- `full[slot]`, `empty[slot]`: a tile of keys or values, or a band of one, has come, has been used
  by all consumers.
- `q_full`, `q_empty`: the same for a team's queries.
- `turn[consumer]`: of two that walk side by side, the other has its scores of a split: one takes
  exponentials while the other multiplies. Both count every split of the item, used or not.

A consumer arrives with all its threads, each after its own wgmma has ended. What threads
write and wgmma then reads lies behind a `commit_smem`. Results go from registers to memory: no
queries, keys or values have to make room for them.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention.mosaic_gpu_ends import count_ends
from jdet.pallas_kernels.attention.mosaic_gpu_merge import fill, finish, merge
from jdet.pallas_kernels.attention.mosaic_gpu_rows import Rows
from jdet.pallas_kernels.attention.mosaic_gpu_schedules import (
    CHUNK,
    ROWS,
    Schedule,
    Shape,
    splits_of,
    walk_blocks,
    walk_share,
)
from jdet.pallas_kernels.attention.mosaic_gpu_split import Keys, Splits

_TILED = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))


def _union(shape: tuple[int, ...], tiled: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """A buffer as the copy engine sees it (rows of 128 bytes) and as wgmma and registers do."""
    row = plgpu.SwizzleTransform(128)
    if interpret:
        return plgpu.SMEM(tiled, dtype, transforms=_TILED)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(row,)), plgpu.SMEM(tiled, dtype, transforms=_TILED)
    )


def attention_kernel(
    *refs: Any, names: tuple[str, ...], s: Schedule, d: Shape, slots: int, interpret: bool
) -> None:
    """Everything but the fold of a spread grid. The inputs, by name, then the results:

    q, k, v; last: of each tile of queries, its last position; if walked, first: its first one; if
    prefill, rows: the position of each of its rows; if spread over more tiles than it counts
    itself, ends: see `ends_of`; if k and v are pages, table. With a sliding window origin: see
    `origins_of`, from where all positions are then counted; and first in prefill, spread or not.

    o; of a spread grid partial o and sums, left, o, see `Shape.parts`.
    """
    g, *parts_g, o_g = dict(zip(names, refs, strict=False)), *refs[len(names) :]
    q_g = g["q"]
    spread, decode = s.kind == "spread", "rows" not in g
    chunks = d.dim // CHUNK
    consumers, teams = s.consumers(d), s.teams(d)
    group = d.rows // d.queries
    split_slots = 2 * d.tiles * d.bands
    registers = s.registers(d)
    length = q_g.shape[1]
    tiles = pl.cdiv(length, d.queries)
    page_size = g["k"].shape[2] if "table" in g else d.tile
    window = min(page_size, d.tile)  # keys of one copy
    windowed = d.sliding_window is not None
    rows = Rows(d.rows, d.few, interpret)
    across = rows.across

    def scope(
        q_s,
        kv_s,
        full,
        empty,
        q_full,
        q_empty,
        turn: Any = None,
        p_s: Any = None,
        last_s: Any = None,
        ends_s: Any = None,
        counted: Any = None,
    ):
        q_in, q_mma = (q_s, q_s) if interpret else q_s
        wg = lax.axis_index("wg")
        band = wg if d.bands > 1 else 0
        team = lax.rem(wg, teams) if teams > 1 else 0

        def ring(at):
            """The slot of a team's copy number `at`."""
            return team * slots + lax.rem(at, slots)

        last_of = g["last"]
        if spread:
            if "ends" in g:
                ends = g["ends"]
            else:
                last_of, ends = last_s, ends_s

                @pl.when(wg == 0)
                def _():
                    count_ends(g["last"], last_s, ends_s, d=d, interpret=interpret)
                    plgpu.barrier_arrive(counted)

                plgpu.barrier_wait(counted)
            blocks = lax.axis_size("block")
            share = team * blocks + lax.axis_index("block")
            each_item = functools.partial(
                walk_share, share=share, shares=teams * blocks, last=last_of, ends=ends, d=d
            )
        else:
            each_item = functools.partial(walk_blocks, last=g["last"], tiles=tiles, wgs=s.wgs, d=d)

        def q_copies(gmem, smem, row, head, slot, c):
            """Pairs of windows, chunk c of the queries' columns in tile `row` and in `slot`."""
            cols = pl.ds(c * CHUNK, CHUNK)
            if decode:
                return [(gmem.at[row, 0, head, :, cols], smem.at[slot, c, pl.ds(0, d.rows)])]
            batch, start = lax.div(row, tiles), lax.rem(row, tiles) * d.queries
            if not interpret:
                window = gmem.at[batch, pl.ds(start, d.queries), head, :, cols]
                return [(window, smem.at[slot, c])]
            return [
                (
                    gmem.at[batch, start + i, head, :, cols],
                    smem.at[slot, c, pl.ds(i * group, group)],
                )
                for i in range(d.queries)
            ]

        def produce():
            if registers:
                plgpu.set_max_registers(registers[0], action="decrease")

            def tile_copies(src, batch, head, key, cols, low, last, slot):
                """Pairs of windows for columns of the tile of keys or values from `key` on.

                To be called before the slot is waited for: pages are looked up meanwhile.
                """
                if "table" not in g:
                    return [(src.at[batch, head, pl.ds(key, d.tile), cols], kv_s.at[slot])]
                keys = [key + i for i in range(0, d.tile, window)]

                def page_of(at):
                    # Instead of a page after that of the last key, or before that of the first,
                    # it again: nobody looks at it, and the table may hold anything there.
                    at = lax.min(at, last)
                    at = lax.max(at, low) if windowed else at
                    return g["table"][batch, lax.div(at, page_size)]

                pages = [page_of(at) for at in keys]
                return [
                    (
                        src.at[page, head, pl.ds(lax.rem(at, page_size), window), cols],
                        kv_s.at[slot, pl.ds(i * window, window)],
                    )
                    for i, (at, page) in enumerate(zip(keys, pages, strict=True))
                ]

            def item(loads, done, row, head, first, end, last, _):
                @pl.when(loads > 0)
                def _():
                    plgpu.barrier_wait(q_empty.at[team])

                # A tile past the last of its row is another row's, or nothing: never stored.
                for i in range(s.wgs):
                    for c in range(chunks):
                        for src, dst in q_copies(q_g, q_in, row + i, head, team + i, c):
                            plgpu.copy_gmem_to_smem(src, dst, q_full.at[team])

                batch = row if decode else lax.div(row, tiles)
                begin = done * split_slots
                origin, low = 0, None
                if windowed:
                    origin = g["origin"][row]
                    low, last = (x + origin * d.kv_split for x in (first_key(row), last))

                def split_loop(i, _):
                    for j in range(split_slots):
                        at = begin + (i - first) * split_slots + j
                        slot = ring(at)

                        tile, b = divmod(j, d.bands)
                        src = g["k" if tile < d.tiles else "v"]
                        key = (origin + i) * d.kv_split + tile % d.tiles * d.tile
                        cols = pl.ds(b * d.band, d.band)
                        copies = tile_copies(src, batch, head, key, cols, low, last, slot)

                        @pl.when(at >= slots)
                        def _(slot=slot):
                            plgpu.barrier_wait(empty.at[slot])

                        for window_g, window_s in copies:
                            plgpu.copy_gmem_to_smem(window_g, window_s, full.at[slot])

                lax.fori_loop(first, end, split_loop, None)

            loads, splits = each_item(item)

            def drain(at, _):
                plgpu.barrier_wait(empty.at[ring(at)])

            total = splits * split_slots
            lax.fori_loop(lax.max(total - slots, 0), total, drain, None)

            @pl.when(loads > 0)
            def _():
                plgpu.barrier_wait(q_empty.at[team])

        split = Splits(
            d=d,
            rows=rows,
            spread=spread,
            interpret=interpret,
            dtype=q_g.dtype,
            wg=wg,
            band=band,
            ring=ring,
            q=q_mma,
            kv=kv_s,
            full=full,
            empty=empty,
            team=team,
            q_empty=q_empty,
            turn=turn,
            weights=p_s,
        )

        def nothing():
            """What a split is merged into first."""
            return (
                fill((rows.height,), -jnp.inf, rows.row_layout),
                fill((rows.height,), 0.0, rows.row_layout),
                fill((rows.height, d.band), 0.0, rows.layout),
            )

        def merge_splits(begin, end, state, offset, q_slot, keys, used, count=d.tiles):
            """`state` and the splits begin..end; the team has walked `offset` splits before.

            The queries are given back once they have met split `used`.
            """

            def step(i, state):
                at = (offset + i - begin) * split_slots
                part = split(at, q_slot, i * d.kv_split, count, keys, i == used)
                m, total, out = state
                m, total, (out,) = merge(
                    (m, total, [out]), part, rows.fma, rows.fma_row, lambda x: across(x, d.band)
                )
                return m, total, out

            return lax.fori_loop(begin, end, step, state)

        def first_key(row):
            """The first key that a row of the block sees; below 0 if that is key 0."""
            if not windowed:
                return None
            first = last_of if decode else g["first"]
            return first[row] + 1 - d.sliding_window

        def row_limit(row):
            if decode:
                return last_of[row]
            return plgpu.load(g["rows"].at[row], layout=rows.row_layout, optimized=False)

        def consume_walked():
            def item(_0, done, row, head, first, end, high, _1):
                slot = wg if s.wgs > 1 else 0
                tile = lax.rem(row, tiles) + slot
                mine = row + jnp.where(tile < tiles, slot, 0)
                limit, last = row_limit(mine), g["last"][mine]
                whole = lax.min(lax.div(g["first"][mine] + 1, d.kv_split), end)
                # Splits that a row of mine sees, and those that it sees more of than one tile.
                ends = lax.min(splits_of(last, d), end), end
                plgpu.barrier_wait(q_full.at[0])
                used = ends[0] - 1
                pl.when(used < 0)(lambda: plgpu.barrier_arrive(q_empty.at[0]))
                seen_whole = Keys(None, None, high)
                if windowed:
                    keys = Keys(limit, first_key(row), high)
                    # Those that all rows see in full lie between two runs of masked ones.
                    unmasked = last + d.kv_split - d.sliding_window
                    unmasked = lax.clamp(0, lax.div(unmasked, d.kv_split), whole)

                    def run(i, state):
                        begin, stop = (
                            jnp.where(i == 0, x, y) for x, y in ((0, whole), (unmasked, ends[0]))
                        )
                        state = merge_splits(begin, stop, state, done + begin, slot, keys, used)
                        free = jnp.where(i == 0, whole, ends[0])
                        at = done + stop
                        return merge_splits(stop, free, state, at, slot, seen_whole, used)

                    _, total, out = lax.fori_loop(0, 2, run, nothing())
                else:
                    state = nothing()
                    state = merge_splits(0, whole, state, done, slot, seen_whole, used)
                    keys, begin = Keys(limit, None, high), whole
                    for count in sorted({d.tiles, 1}, reverse=True):
                        seen = lax.div(last + d.kv_split - (count - 1) * d.tile, d.kv_split)
                        stop = lax.clamp(begin, seen, ends[0])
                        at = done + begin
                        state = merge_splits(begin, stop, state, at, slot, keys, used, count)
                        begin = stop
                    _, total, out = state

                def pass_over(i, _):
                    if turn is not None:
                        plgpu.barrier_wait(turn.at[wg])
                        plgpu.barrier_arrive(turn.at[1 - wg])
                    for j in range(split_slots):
                        slot = ring((done + i) * split_slots + j)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(empty.at[slot])

                lax.fori_loop(*ends, pass_over, None)
                if not decode:
                    total = jnp.where(limit < 0, 0.0, total)
                out = finish(across(total, d.band), out).astype(o_g.dtype)
                cols = pl.ds(band * d.band, d.band)
                if decode:
                    rows.store(o_g.at[row, 0, head, :, cols], out)
                    return

                @pl.when(tile < tiles)
                def _():
                    batch, start = lax.div(mine, tiles), tile * d.queries
                    window = o_g.at[batch, pl.ds(start, d.queries), head, :, cols]
                    rows.store(window, out, (length - start) * group)

            each_item(item)
            if turn is not None:  # the last that was given is taken
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        def consume_spread():
            parts_o, parts_sums, left = parts_g

            def item(_, done, row, head, first, end, high, splits):
                window, cols = pl.ds(head * d.part_rows, d.rows), pl.ds(band * d.band, d.band)
                keys = Keys(row_limit(row), first_key(row), high)
                alone = first > 0  # what lies before is another team's
                # With more rows there are no registers for it: the fold completes such a head.
                whole = jnp.logical_not(alone) & (end == splits) if d.few else None
                plgpu.barrier_wait(q_full.at[team])

                def segment(i, _):
                    begin = first + i
                    upto = jnp.where(alone, begin + 1, end)
                    m, total, out = merge_splits(
                        begin, upto, nothing(), done + i, team, keys, used=end - 1
                    )

                    def sums():
                        for c, x in enumerate((m, total)):
                            rows.store(parts_sums.at[row, upto - 1, c, window], x, keep=decode)

                    def leave():
                        rows.store(parts_o.at[row, upto - 1, window, cols], out, keep=decode)
                        pl.when(band == 0)(sums) if d.bands > 1 else sums()

                    def complete():
                        y = finish(across(total, d.band), out).astype(o_g.dtype)
                        rows.store(o_g.at[row, window, cols], y)

                    leave() if whole is None else lax.cond(whole, complete, leave)

                lax.fori_loop(0, jnp.where(alone, end - first, 1), segment, None)

                @pl.when(jnp.logical_not(alone) & (band == 0))
                def _():
                    left[row, head] = end - 1 if whole is None else jnp.where(whole, -1, end - 1)

            each_item(item)

        def consume():
            if registers:
                plgpu.set_max_registers(registers[1], action="increase")
            if turn is not None:
                pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            (consume_spread if spread else consume_walked)()

        lax.cond(wg >= teams * consumers, produce, consume)

    shape = (ROWS, CHUNK) if decode else (d.queries, group, CHUNK)
    barrier = plgpu.Barrier
    q_arrivals = s.wgs * chunks * (d.queries if interpret else 1)
    q_slots = teams if spread else s.wgs
    scratch: dict[str, Any] = dict(
        q_s=_union((q_slots, chunks, *shape), (q_slots, chunks, ROWS, CHUNK), q_g.dtype, interpret),
        kv_s=plgpu.SMEM((teams * slots, d.tile, d.band), q_g.dtype, transforms=_TILED),
        full=barrier(num_arrivals=d.tile // window, num_barriers=teams * slots),
        empty=barrier(num_arrivals=consumers, num_barriers=teams * slots),
        q_full=barrier(num_arrivals=q_arrivals, num_barriers=teams),
        q_empty=barrier(num_arrivals=consumers, num_barriers=teams),
    )
    if spread and "ends" not in names:
        tiles_s = plgpu.SMEM(g["last"].shape, jnp.int32)
        scratch |= dict(last_s=tiles_s, ends_s=tiles_s, counted=barrier())
    if s.wgs > 1:
        scratch["turn"] = barrier(num_arrivals=1, num_barriers=s.wgs)
    if interpret:
        scratch["p_s"] = plgpu.SMEM((teams * consumers, ROWS, d.tile), q_g.dtype, transforms=_TILED)
    pl.run_scoped(scope, **scratch, collective_axes="wg")
