"""One split of the Mosaic GPU attention, as a consumer walks it: scores, weights, values.

Order: a score is one wgmma accumulator over the head's dimensions, ascending; m is the maximum of
all; weights are 2^(score - m), rounded to the queries' dtype for the product with the values, whose
accumulator takes the tiles of the split in ascending order; l adds the weights of each tile as
`Rows.sum` does, the tiles in ascending order. A tile that no row sees (`count`) is left out: it
would add zeros.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.attention.mosaic_gpu_rows import Rows
from jdet.pallas_kernels.attention.mosaic_gpu_schedules import CHUNK, ROWS, Shape
from jdet.pallas_kernels.exact import exact


class Keys(NamedTuple):
    """The keys that count.

    Attributes:
      limit: the last one of each row, in registers; None where all rows see the splits in full.
      low: the first one that any row sees; None without a window, or where `limit` is.
      last: the last one that any row sees.
    """

    limit: Any
    low: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a consumer computes of a split: called, it gives (m, l, [o]).

    Attributes:
      d, rows, spread, interpret: as in `attention_kernel`.
      dtype: of the queries, and of the weights in the product with the values.
      wg, team, band: the consumer, its team, and its band of o's columns.
      ring: from the number of one of the team's copies to its slot.
      q, kv: shared memory as wgmma sees it.
      full, empty, q_empty, turn: the barriers; see mosaic_gpu_kernel.py.
      weights: shared memory for them, where the simulator's wgmma takes no registers.
    """

    d: Shape
    rows: Rows
    spread: bool
    interpret: bool
    dtype: Any
    wg: Any
    team: Any
    band: Any
    ring: Callable[[Any], Any]
    q: Any
    kv: Any
    full: Any
    empty: Any
    q_empty: Any
    turn: Any
    weights: Any

    def __call__(
        self, at: Any, q_slot: Any, start: Any, count: int, keys: Keys, q_used: Any
    ) -> tuple[Any, Any, list[Any]]:
        """The split whose keys begin at `start`, its copies at number `at`.

        Of its tiles of keys the first `count` are looked at. If `q_used`, q is given back.
        """
        d, rows = self.d, self.rows

        def slot_of(tile, b):
            return self.ring(at + (tile * d.bands + b))

        def wait_for(tile: int) -> None:
            """Of all bands, used or not: phases of a slot are counted by waiting."""
            for b in range(d.bands):
                plgpu.barrier_wait(self.full.at[slot_of(tile, b)])

        def release(tile: int) -> None:
            for b in range(d.bands):
                plgpu.barrier_arrive(self.empty.at[slot_of(tile, b)])

        def pass_over(tiles: Iterable[int]) -> None:
            for tile in tiles:
                wait_for(tile)
                release(tile)

        # Of bands so few fit that the next are wanted before all of them are used.
        early = d.bands > 1
        # In prefill the exponentials of a tile are taken while wgmma weighs those before it.
        beside = not self.spread and not early

        def give_back() -> None:
            pl.when(q_used)(lambda: plgpu.barrier_arrive(self.q_empty.at[self.team]))

        def score(*accs):
            for j, acc in enumerate(accs):
                for b in range(d.bands):
                    plgpu.barrier_wait(self.full.at[slot_of(j, b)])
                    for c in range(d.band // CHUNK):
                        k = self.kv.at[slot_of(j, b), :, pl.ds(c * CHUNK, CHUNK)]
                        q = self.q.at[q_slot, b * (d.band // CHUNK) + c]
                        plgpu.wgmma(acc, q, k.transpose((1, 0)))
                if early:
                    plgpu.wgmma_wait(0)
                    release(j)
            plgpu.wgmma_wait(0)
            scores, taken, m = [], [], None
            if self.spread:  # the copies for the next ones begin the sooner
                taken = [rows.take(acc[...]) for acc in accs]
                for j in range(0 if early else count):
                    release(j)
                give_back()
            for j, acc in enumerate(accs):
                x = taken[j] if self.spread else rows.take(acc[...])
                if not (self.spread or early):
                    release(j)
                if d.cap is not None:
                    x = self._capped(x, d.cap)
                if keys.limit is not None:
                    last = keys.limit - (start + j * d.tile)
                    x = rows.keep_seen(x, last, d.sliding_window)
                scores.append(x)
                if j == count - 1 and self.turn is not None:
                    plgpu.barrier_arrive(self.turn.at[1 - self.wg])
                m = x.max(axis=1) if m is None else jnp.maximum(m, x.max(axis=1))
            return scores, m

        if self.turn is not None:
            plgpu.barrier_wait(self.turn.at[self.wg])
        acc = plgpu.ACC((ROWS, d.tile), jnp.float32)
        scores, m = pl.run_scoped(score, *[acc] * count)
        if not self.spread:
            give_back()
        pass_over(range(count, d.tiles))
        if d.cap is None:
            m = rows.mul_row(m, d.factor)
        base = jnp.where(m == -jnp.inf, 0.0, m)

        def weights(j):
            """Those of tile j, and their sum."""
            minus = rows.across(-base, d.tile)
            x = scores[j]
            x = jnp.exp2(rows.fma(x, d.factor, minus) if d.cap is None else x + minus)
            return rows.give(x.astype(self.dtype)), rows.sum(x)

        p = [weights(j) for j in range(1 if beside else count)]

        if keys.limit is not None:
            for j in range(count):
                slot = slot_of(d.tiles + j, self.band)
                wait_for(d.tiles + j)
                skipped = start + j * d.tile
                low = None if d.sliding_window is None else keys.low - skipped
                self._clear(slot, low, keys.last - skipped)

        def weigh(acc):
            total: Any = None
            for j in range(count):
                slot = slot_of(d.tiles + j, self.band)
                if j == len(p):
                    p.append(weights(j))
                mine, part = p[j]
                total = part if total is None else total + part
                if keys.limit is None:
                    wait_for(d.tiles + j)
                if self.interpret:
                    self.weights.at[self.wg][...] = mine
                    mine = self.weights.at[self.wg]
                plgpu.wgmma(acc, mine, self.kv.at[slot])
                if early:
                    plgpu.wgmma_wait(0)
                    release(d.tiles + j)
            plgpu.wgmma_wait(0)
            return acc[...], total

        out, total = pl.run_scoped(weigh, plgpu.ACC((ROWS, d.band), jnp.float32))
        if not early:
            for j in range(count):
                release(d.tiles + j)
        pass_over(range(d.tiles + count, 2 * d.tiles))
        return m, total, [rows.take(out)]

    def _capped(self, x: Any, cap: float) -> Any:
        """c tanh(score / c) in units of log2 e: c - 2 c / (e^(2 score / c) + 1)."""
        power = jnp.exp2(x * self.d.factor)
        part = exact("rcp.approx.ftz.f32", self.rows.layout, self.interpret, power + 1.0)
        return self.rows.fma(part, -2.0 * cap, cap)

    def _clear(self, slot: Any, low: Any, last: Any) -> None:
        """Zeros the rows of V before `low` and after `last`: they may hold anything.

        Two consumers may do so at once: they write the same bytes, or other columns.
        """
        for r in range(0, self.d.tile, ROWS):
            unseen = last < r + ROWS - 1
            if low is not None:
                unseen |= low > r

            @pl.when(unseen)
            def _(r=r):
                part = self.kv.at[slot, pl.ds(r, ROWS)]
                row = r + plgpu.broadcasted_iota(
                    jnp.int32, (ROWS, self.d.band), 0, layout=plgpu.Layout.WGMMA
                )
                v = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=True)
                seen = row <= last
                if low is not None:
                    seen &= row >= low
                part[...] = jnp.where(seen, v, jnp.zeros_like(v))
                plgpu.commit_smem()
