"""The preparation of the heads in Pallas Mosaic GPU: one kernel, straight through registers.

Tree (a function of D and the dtypes alone), of a query or key head x with halves l and h:

- Eight threads share a head; each holds vectors of `vector` neighbours of both halves, 8 * vector
  elements apart. The squares are fma(h[i], h[i], l[i] * l[i]), rounded in float32. A thread adds
  its own in Mosaic GPU's fixed order, then the eight are added by XOR shuffles, 1, 2, 4 threads
  away.
- y = x * rsqrt(fma(sum, float32(1 / D), eps)) * weight, left to right, each operation rounded in
  float32 (`rsqrt.approx`), then rounded to x's dtype. Without a weight, y = x.
- fma(l, cos, -(h * sin)) and fma(h, cos, l * sin) in float32, rounded once to x's dtype.
- Values are copied.

A reduction never holds more than one head of a thread: Mosaic GPU cuts a thread's sum by the
number of them, and the bits would follow it.

A block is one warpgroup, 16 heads of one token at a time; with fewer heads, threads repeat the
work of others. The last heads of a kind start early enough to end with its last; what two windows
share is computed and written twice, alike. So all heads of a window have one place in the cache,
and it is a plain strided store. The caches are updated in place: they enter as references.

Schedules (what the bits do not depend on): a block takes a window, or all windows of a token.

Loads and stores go between registers and global memory, 16 bytes a thread where D allows: there
is nothing to wait for but memory, and no copy engine to set up.

Budget: no shared memory; registers for 16 or more heads in 16 bits, and for 16 in float32.

On an H100: bits in scripts/bench/results/h100-check-heads.json; its time by itself is not measured
yet, in a decode step of batch 1 it took 1.8 us (h100-qwen3-8b-first.json).

Sources: those of rms_norm/mosaic_gpu.py and of `reference`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.exact import exact

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_LANES = 8  # threads that share a head
_HEADS = 128 // _LANES  # heads of a warpgroup
_BUSY = 528  # tokens that fill the SMs with one block each


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Does a block take all heads of its token, or one window of them?"""

    whole: bool


SCHEDULES = (Schedule(False), Schedule(True))


def default_schedule(tokens: int) -> Schedule:
    """The schedule to use for a number of tokens. Speed only."""
    return Schedule(tokens >= _BUSY)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """A kind's heads, `first` to `first + count` of the projection, in windows of `size`."""

    first: int
    count: int

    @property
    def size(self) -> int:
        """A power of two, at most 16."""
        return min(_HEADS, 1 << (self.count.bit_length() - 1))

    @property
    def number(self) -> int:
        return pl.cdiv(self.count, self.size)

    def start(self, i: Any) -> Any:
        """The window's first head, counted from the kind's."""
        return lax.min(i * self.size, self.count - self.size)


def _layout(heads: int, half: int) -> Any:
    """[heads, D / 2] in the registers of a warpgroup, for a power of two of at most 16 heads."""
    vector = min(8, half // _LANES & -(half // _LANES))
    rows = min(heads, 4)  # of a warp
    warps, spare = heads // rows, plgpu.Replicated
    # Tiled thrice, an array ends in [warps down, 1, rows down, lanes across, 1, vector].
    tiles = ((heads, _LANES * vector), (rows, _LANES * vector), (1, vector))
    t = mgpu.TiledLayout(
        plgpu.Tiling(tiles),
        {4: (-6,), 2: (-6, spare(2)), 1: (spare(4),)}[warps],
        {4: (-4, -3), 2: (-4, spare(2), -3), 1: (spare(4), -3)}[rows],
        -1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


def _kernel(
    *refs: Any,
    heads: int,
    length: int,
    eps: float,
    normed: tuple[bool, bool],
    paged: bool,
    s: Schedule,
    interpret: bool,
) -> None:
    """refs are qkv, cos, sin, positions, the norms' weights, page table, caches; q."""
    x_g, cos_g, sin_g, positions_g, *optional, k_g, v_g, q_g = refs
    q_norm_g = optional.pop(0) if normed[0] else None
    k_norm_g = optional.pop(0) if normed[1] else None
    pages, kv_heads, size, dim = k_g.shape
    half = dim // 2
    halves = (pl.ds(0, half), pl.ds(half, half))
    q, k, v = (_Windows(*w) for w in ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)))
    block = lax.axis_index("block")
    windows = 1 if s.whole else q.number + k.number
    token, part = lax.div(block, windows), lax.rem(block, windows)
    row, position = lax.div(token, length), positions_g[token]

    def read(w, start):
        """Both halves of a window's heads, as they are."""
        layout, at = _layout(w.size, half), pl.ds(w.first + start, w.size)
        return [plgpu.load(x_g.at[token, at, c], layout=layout, optimized=False) for c in halves]

    def turn(w, raw, norm_g):
        """The heads of a window normalised and rotated."""
        layout, dtype = _layout(w.size, half), x_g.dtype
        fma = functools.partial(exact, "fma.rn.f32", layout, interpret)

        def spread(vector, axis):
            return lax.broadcast_in_dim(vector, (w.size, half), (axis,))

        def shared(ref):
            """What all heads share, in float32."""
            vector = plgpu.load(ref, layout=layout.reduce(0), optimized=False)
            return spread(vector.astype(jnp.float32), 1)

        low, high = (x.astype(jnp.float32) for x in raw)
        cos, sin = shared(cos_g.at[token]), shared(sin_g.at[token])
        if norm_g is not None:
            weights = [shared(norm_g.at[c]) for c in halves]
            total = spread(jnp.sum(fma(high, high, low * low), axis=1), 0)
            scale = lax.rsqrt(fma(total, 1.0 / dim, eps))
            low, high = (
                (x * scale * weight).astype(dtype).astype(jnp.float32)
                for x, weight in zip((low, high), weights, strict=True)
            )
        turned = fma(low, cos, -(high * sin)), fma(high, cos, low * sin)
        return [x.astype(dtype) for x in turned]

    def write(ref, at, values):
        for c, value in zip(halves, values, strict=True):
            ref.at[(*at, c)][...] = value

    def place():
        """(is there a slot for the token, its page, the slot in the page)."""
        if not paged:
            return (position >= 0) & (position < size), row, position
        (table_g,) = optional
        inside = (position >= 0) & (position < table_g.shape[1] * size)
        at = jnp.where(inside, position, 0)
        page = table_g[row, lax.div(at, size)]
        return inside & (page >= 0) & (page < pages), page, lax.rem(at, size)

    def put_q(start, raw):
        write(q_g, (token, pl.ds(start, q.size)), turn(q, raw, q_norm_g))

    def put_kv(start, raw_k, raw_v):
        written, page, slot = place()
        turned = turn(k, raw_k, k_norm_g)

        @pl.when(written)
        def _():
            for ref, values in ((k_g, turned), (v_g, raw_v)):
                write(ref, (page, pl.ds(start, k.size), slot), values)

    if s.whole:
        q_starts, kv_starts = ([w.start(i) for i in range(w.number)] for w in (q, k))
        # Loads before stores: a compiler cannot tell that no store changes what is read.
        q_raw = [read(q, start) for start in q_starts]
        kv_raw = [(read(k, start), read(v, start)) for start in kv_starts]
        for start, raw in zip(q_starts, q_raw, strict=True):
            put_q(start, raw)
        for start, raw in zip(kv_starts, kv_raw, strict=True):
            put_kv(start, *raw)
        return

    @pl.when(part < q.number)
    def _():
        start = q.start(part)
        put_q(start, read(q, start))

    @pl.when(part >= q.number)
    def _():
        start = k.start(part - q.number)
        put_kv(start, read(k, start), read(v, start))


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "s", "interpret"))
def _qkv_heads(
    qkv, q_norm, k_norm, cos, sin, positions, k_cache, v_cache, page_table, *, eps, s, interpret
):
    batch, length, width = qkv.shape
    _, kv_heads, _, dim = k_cache.shape
    tokens, total = batch * length, width // dim
    heads = total - 2 * kv_heads
    windows = 1 if s.whole else _Windows(0, heads).number + _Windows(0, kv_heads).number
    optional = [x for x in (q_norm, k_norm, page_table) if x is not None]
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    kernel: Any = pl.kernel(
        functools.partial(
            _kernel,
            heads=heads,
            length=length,
            eps=eps,
            normed=(q_norm is not None, k_norm is not None),
            paged=page_table is not None,
            s=s,
            interpret=bool(interpret),
        ),
        out_type=jax.ShapeDtypeStruct((tokens, heads, dim), qkv.dtype),
        # Not `plgpu.kernel`, whose vmap rule takes no references.
        mesh=plgpu.Mesh(grid=(tokens * windows,), grid_names=("block",)),
        name="jdet_qkv_heads",
        # Nothing that is read is written: no barriers are wanted around the stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    q = kernel(
        qkv.reshape(tokens, total, dim),
        cos.reshape(tokens, dim // 2),
        sin.reshape(tokens, dim // 2),
        positions.reshape(tokens),
        *optional,
        k_ref,
        v_ref,
    )
    return q.reshape(batch, length, heads, dim), jax.freeze(k_ref), jax.freeze(v_ref)


def qkv_heads(
    qkv: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    eps: float,
    page_table: jax.Array | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.qkv_heads` for the op and the module for its tree.

    Args:
      qkv, k_cache, v_cache: bfloat16 or float16, all alike. A cache that is donated, or dead
        after the call, is updated in place.
      q_norm, k_norm: of that dtype, or float32.
      cos, sin: float32.
      positions, page_table: int32.
      schedule: how to walk the heads; by the number of tokens unless given. Never changes the
        result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      NotImplementedError: other dtypes, or D no multiple of 16 from 16 to 256.
    """
    dim = k_cache.shape[3]
    heads = {x.dtype for x in (qkv, k_cache, v_cache)}
    norms = {x.dtype for x in (q_norm, k_norm) if x is not None}
    if not (
        len(heads) == 1
        and heads < set(_OPERANDS)
        and norms <= heads | {jnp.dtype(jnp.float32)}
        and cos.dtype == sin.dtype == jnp.float32
    ):
        raise NotImplementedError(
            "mosaic_gpu qkv_heads takes bfloat16 or float16, all alike, norms alike or in float32,"
            f" and float32 angles; got {', '.join(sorted(map(str, heads)))}, norms in"
            f" {', '.join(sorted(map(str, norms))) or 'nothing'}, and {cos.dtype}, {sin.dtype}"
        )
    if dim % 16 or not 0 < dim <= 256:
        raise NotImplementedError(
            f"mosaic_gpu qkv_heads needs D in multiples of 16 up to 256, got {dim}"
        )
    s = schedule or default_schedule(positions.size)
    return _qkv_heads(
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        page_table,
        eps=eps,
        s=s,
        interpret=interpret,
    )
