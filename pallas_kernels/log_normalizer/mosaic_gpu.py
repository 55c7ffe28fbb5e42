"""The normalizer of logits in Pallas Mosaic GPU: chunks of a row side by side, then one merge.

Tree (a function of V alone), for float32 logits:

- A row is cut into groups of 4 chunks of 1024 logits, from its start; the last group ends with
  the row, and what the group before it also holds counts as -inf. A V under 4096 is continued
  with -inf.
- A chunk belongs to one warp: m is its maximum, its sum that of ex2.approx((x - m) * float32(log2
  e)), each operation rounded. A lane holds vectors of v neighbours, 32 v apart (v = 4, or 2, or
  1, the largest that divides V); it adds its vectors, ascending, in 8 / v interleaved sums, then
  these in order, then the elements of the vector, ascending; then lanes are added by XOR
  shuffles, 1, 2, 4, 8 and 16 lanes away.
- The row's maximum M is exact in any order. The chunks' sums times ex2.approx((m - M) * log2 e),
  rounded, are added by one warpgroup over the row's chunks: its threads hold vectors of 1, 2 or 4
  neighbours, and add as above, then four warps as (0 + 1) + (2 + 3).
- log_sum is the logarithm of that sum (libdevice's logf, 1 ulp).

A chunk without a finite logit, or without any, sums to 0 and drops out. NaN, or a plus
infinity, makes the row's log_sum NaN, as in the reference.

The argmax is the first element of the first chunk that equals M (or is NaN): the merge reads
that one chunk again.

Schedule: there is but one. A block of the first kernel is a warpgroup and takes a group, so that
one row of 151936 logits keeps 38 blocks busy; no barrier, no shared memory, 8 loads of 16 bytes
in flight a thread. A block of the second takes a row. A row's program does not know the number
of rows.

Budget: registers: 32 logits a thread; ptxas uses 46 (71 where V is odd), so that 7 or more blocks
share an SM, and spills none. Shared memory: 2 KiB for the reductions of the merge.

On an H100: bits in scripts/bench/results/h100-check-rows.json, times in h100-rows.json.

Sources: Milakov & Gimelshein, arXiv:1805.02867 (online softmax); Mosaic GPU's reductions:
jax/experimental/mosaic/gpu/fragmented_array.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.compat import store
from jdet.pallas_kernels.exact import exact
from jdet.pallas_kernels.log_normalizer import LogNormalizer

_CHUNK = 1024  # logits of a warp
_WARPS = 4
_GROUP = _WARPS * _CHUNK
_LOG2_E = math.log2(math.e)


def _vector(size: int) -> int:
    """Float32 elements a thread can move at once where windows begin at multiples of `size`."""
    return math.gcd(size, 4)


def _chunk_layout(vector: int) -> Any:
    """[4, _CHUNK] in registers, a warp a row."""
    t = mgpu.TiledLayout(
        plgpu.Tiling(((_WARPS, 32 * vector), (1, 32 * vector), (1, vector))),
        (-6,),
        (-3,),
        -1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


def _finite(maximum: jax.Array) -> jax.Array:
    """What to subtract: not minus infinity, from which nothing can be subtracted."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def _group(logits_g: Any, maximum_g: Any, sum_g: Any, *, groups: int, interpret: bool) -> None:
    """Maximum and sum of the 4 chunks of one group."""
    block = lax.axis_index("block")
    row = lax.div(block, groups)
    group = block - row * groups
    size = logits_g.shape[1]
    layout = _chunk_layout(_vector(size))
    start = lax.min(group * _GROUP, size - _GROUP)
    window = logits_g.at[row, pl.ds(start, _GROUP)]
    if interpret:  # the simulator reshapes no window
        x = window[...].reshape(_WARPS, _CHUNK)
    else:
        x = plgpu.load(window.reshape(_WARPS, _CHUNK), layout=layout, optimized=False)
    if size % _GROUP:
        place = [plgpu.broadcasted_iota(jnp.int32, x.shape, i, layout=layout) for i in (0, 1)]
        x = jnp.where(start + place[0] * _CHUNK + place[1] >= group * _GROUP, x, -jnp.inf)
    maximum = jnp.max(x, axis=1)
    below = x - lax.broadcast_in_dim(_finite(maximum), x.shape, (0,))
    total = jnp.sum(jnp.exp2(below * _LOG2_E), axis=1)
    chunks = pl.ds(group * _WARPS, _WARPS)
    store(maximum_g.at[row, chunks], maximum)
    store(sum_g.at[row, chunks], total)


def _merge(
    logits_g: Any,
    maximums_g: Any,
    sums_g: Any,
    maximum_g: Any,
    log_sum_g: Any,
    argmax_g: Any,
    *,
    chunks: int,
    interpret: bool,
) -> None:
    """One row from its chunks."""
    row = lax.axis_index("row")
    width, size = maximums_g.shape[1], logits_g.shape[1]
    layout = plgpu.Layout.WG_STRIDED((width,), _vector(width // 128))
    chunk = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
    maximums = plgpu.load(maximums_g.at[row], layout=layout, optimized=False)
    sums = plgpu.load(sums_g.at[row], layout=layout, optimized=False)
    maximums = jnp.where(chunk < chunks, maximums, -jnp.inf)
    sums = jnp.where(chunk < chunks, sums, 0.0)
    maximum = jnp.max(maximums)
    weights = jnp.exp2((maximums - _finite(maximum)) * _LOG2_E)
    total = jnp.sum(exact("mul.rn.f32", layout, interpret, sums, weights))
    maximum_g[row] = maximum
    log_sum_g[row] = jnp.log(total)

    def first(x, place, none):
        return jnp.min(jnp.where((x == maximum) | (x != x), place, none))

    # The logits that the last group has from the one before cannot be first: it has them too.
    found = first(maximums, chunk, width)
    group = lax.div(found, _WARPS)
    start = lax.min(group * _GROUP, size - _GROUP) + (found - group * _WARPS) * _CHUNK
    layout = plgpu.Layout.WG_STRIDED((_CHUNK,), _vector(size))
    x = plgpu.load(logits_g.at[row, pl.ds(start, _CHUNK)], layout=layout, optimized=False)
    place = plgpu.broadcasted_iota(jnp.int32, (_CHUNK,), 0, layout=layout)
    argmax_g[row] = start + first(x, place, _CHUNK)


# Behind its own jit, so that a program lowers each shape once.
@functools.partial(jax.jit, static_argnames=("interpret",))
def _log_normalizer(logits, *, interpret):
    rows, size = logits.shape
    logits = jnp.pad(logits, ((0, 0), (0, max(0, _GROUP - size))), constant_values=-jnp.inf)
    groups = pl.cdiv(logits.shape[1], _GROUP)
    chunks = groups * _WARPS
    of_chunk = jax.ShapeDtypeStruct((rows, pl.cdiv(chunks, 128) * 128), jnp.float32)
    of_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    # Nothing that is read is written: no barriers are wanted around the stores.
    params = functools.partial(plgpu.CompilerParams, unsafe_no_auto_barriers=True)
    maximums, sums = plgpu.kernel(
        functools.partial(_group, groups=groups, interpret=bool(interpret)),
        out_type=(of_chunk, of_chunk),
        grid=(rows * groups,),
        grid_names=("block",),
        kernel_name="jdet_log_normalizer",
        compiler_params=params(approx_math=True),
        interpret=interpret or None,
    )(logits)
    return plgpu.kernel(
        functools.partial(_merge, chunks=chunks, interpret=bool(interpret)),
        out_type=(of_row, of_row, jax.ShapeDtypeStruct((rows,), jnp.int32)),
        grid=(rows,),
        grid_names=("row",),
        kernel_name="jdet_log_normalizer_merge",
        compiler_params=params(),
        interpret=interpret or None,
    )(logits, maximums, sums)


def log_normalizer(logits: jax.Array, *, interpret: Any = False) -> LogNormalizer:
    """Maximum, log-sum and argmax of each row of logits; see the module for the tree.

    Args:
      logits: [..., V], float32.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      NotImplementedError: another dtype.
    """
    if logits.dtype != jnp.float32:
        raise NotImplementedError(f"mosaic_gpu log_normalizer takes float32, got {logits.dtype}")
    *lead, size = logits.shape
    flat = logits.reshape(-1, size)
    if not flat.shape[0]:
        nothing = jnp.zeros(lead, jnp.float32)
        return LogNormalizer(nothing, nothing, nothing.astype(jnp.int32))
    results = _log_normalizer(flat, interpret=interpret)
    return LogNormalizer(*(r.reshape(lead) for r in results))
