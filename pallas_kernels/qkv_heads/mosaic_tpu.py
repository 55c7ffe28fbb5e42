"""The preparation of the heads for TPU: norm and rotation in one Pallas kernel.

Tree (a function of D and the dtypes alone), of a query or key head x: the squares, in float32,
are added as `tpu.lane_sum` adds a row of D: with D = 256 the second half to the first, then
elements D / 2, ..., 1 apart. y = x * rsqrt(sum * float32(1 / D) + eps) * weight, left to right in
float32, rounded to x's dtype; without a weight y = x. Then y * cos + y' * sin in float32, y' the
other half's element and sin negated for the first half, rounded once. Values are copied.

The kernel reads the projection as it lies, [tokens, width], in columns of 128 lanes: one head, two
heads of 64, or half a head. XLA writes keys and values to their slots: a scatter, which moves bits
and adds nothing, of rows of D into the cache seen as one matrix. With windows over the heads, as
`portable` has it, XLA would lay the cache out anew, and copy all of it, around each attention.

Schedule (what the bits do not depend on): the number of tokens in a block.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdet.pallas_kernels.qkv_heads.reference import slots
from jdet.pallas_kernels.tpu import (
    LANES,
    check_dtypes,
    compiler_params,
    lane_index,
    lane_sum,
    round_up,
)

_DIMS = (64, 128, 256)
_TOKENS = 32  # of a block, at most


def _partner(x: jax.Array, distance: int) -> jax.Array:
    """Of each lane of a column, the one `distance`, a power of two, away within its pair."""
    after = pltpu.roll(x, LANES - distance, 1)
    if 2 * distance == LANES:
        return after
    before = pltpu.roll(x, distance, 1)
    return jnp.where(lane_index(x.shape) & distance == 0, after, before)


def _head_sums(columns: list[jax.Array], dim: int) -> jax.Array:
    """The sum of each head's elements, in each of its lanes: a head, or two of 64."""
    if dim >= LANES:
        return lane_sum(jnp.concatenate(columns, axis=1))
    (x,) = columns
    for distance in (32, 16, 8, 4, 2, 1):
        x = x + _partner(x, distance)
    return x


def _kernel(*refs: Any, dim: int, q_width: int, eps: float, normed: tuple[bool, bool]) -> None:
    """refs are qkv, cos, sin, perhaps the norms' weights, all but qkv 128 or D wide; the heads."""
    x_ref, cos_ref, sin_ref, *weight_refs, out_ref = refs
    q_weight = weight_refs.pop(0) if normed[0] else None
    k_weight = weight_refs.pop(0) if normed[1] else None
    width = max(dim, LANES)  # lanes of one step: a head, or two
    cuts = range(0, width, LANES)

    def normalise(columns, weight_ref):
        if weight_ref is None:
            return columns
        # The maximum, exact, keeps the product from being contracted into the first addition.
        total = _head_sums([jnp.maximum(x * x, 0.0) for x in columns], dim)
        scale = lax.rsqrt(total * jnp.float32(1.0 / dim) + jnp.float32(eps))
        weight = weight_ref[...].astype(jnp.float32)
        scaled = [x * scale * weight[:, i : i + LANES] for x, i in zip(columns, cuts, strict=True)]
        return [x.astype(x_ref.dtype).astype(jnp.float32) for x in scaled]

    for start in range(0, x_ref.shape[1], width):
        columns = [x_ref[:, start + i : start + i + LANES].astype(jnp.float32) for i in cuts]
        if start + width <= q_width:
            columns = normalise(columns, q_weight)
        elif start >= q_width:
            columns = normalise(columns, k_weight)
        else:  # the last query head of 64 and the first key head
            mine = lane_index(columns[0].shape) < q_width - start
            sides = normalise(columns, q_weight), normalise(columns, k_weight)
            columns = [jnp.where(mine, q, k) for q, k in zip(*sides, strict=True)]
        if dim > LANES:
            others = columns[::-1]
        else:
            others = [_partner(columns[0], dim // 2)]
        for i, x, y in zip(cuts, columns, others, strict=True):
            turned = x * cos_ref[:, i : i + LANES] + y * sin_ref[:, i : i + LANES]
            out_ref[:, start + i : start + i + LANES] = turned.astype(out_ref.dtype)


def _write(
    cache: jax.Array, heads: jax.Array, positions: jax.Array, page_table: jax.Array | None
) -> jax.Array:
    """cache [P, Hkv, S, D] with heads [B, T, Hkv, D] in the slots of their positions."""
    pages, kv_heads, size, dim = cache.shape
    page, slot = (x[..., None] for x in slots(positions, cache, page_table))
    row = (page * kv_heads + jnp.arange(kv_heads)) * size + slot
    # Places beyond the last, all different, for what is written nowhere.
    beyond = cache.size // dim + jnp.arange(row.size).reshape(row.shape)
    row = jnp.where((page < pages) & (slot < size), row, beyond)
    flat = cache.reshape(-1, dim).at[row.reshape(-1)]
    new = flat.set(heads.reshape(-1, dim), mode="drop", unique_indices=True)
    return new.reshape(cache.shape)


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "block_tokens", "interpret"))
def _qkv_heads(
    qkv, q_norm, k_norm, cos, sin, positions, caches, page_table, *, eps, block_tokens, interpret
):
    batch, length, full = qkv.shape
    _, kv_heads, _, dim = caches[0].shape
    tokens, kv_width = batch * length, kv_heads * dim
    turned_width = full - kv_width
    width, repeats = max(dim, LANES), max(1, LANES // dim)

    def per_lane(x):
        return jnp.tile(x, (1, repeats))

    # One head's angles: every layer has these, and XLA computes them once.
    cos, sin = (x.reshape(tokens, dim // 2) for x in (cos, sin))
    cos, sin = (per_lane(jnp.concatenate(x, axis=1)) for x in ((cos, cos), (-sin, sin)))
    weights = [per_lane(w.reshape(1, dim)) for w in (q_norm, k_norm) if w is not None]
    flat = qkv.reshape(tokens, full)

    def block(columns):
        return pl.BlockSpec((block_tokens, columns), lambda i: (i, 0))

    turned = pl.pallas_call(
        functools.partial(
            _kernel,
            dim=dim,
            q_width=turned_width - kv_width,
            eps=eps,
            normed=(q_norm is not None, k_norm is not None),
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, turned_width), qkv.dtype),
        grid=(pl.cdiv(tokens, block_tokens),),
        in_specs=[
            block(round_up(turned_width, width)),
            block(width),
            block(width),
            *[pl.BlockSpec((1, width), lambda i: (0, 0))] * len(weights),
        ],
        out_specs=block(round_up(turned_width, width)),
        compiler_params=compiler_params("parallel"),
        cost_estimate=pl.CostEstimate(
            flops=8 * tokens * turned_width,
            transcendentals=0,
            bytes_accessed=2 * tokens * turned_width * qkv.dtype.itemsize,
        ),
        name="jdet_qkv_heads",
        interpret=interpret,
    )(flat, cos, sin, *weights)
    q, k = jnp.split(turned, [turned_width - kv_width], axis=1)
    q, k, v = (x.reshape(batch, length, -1, dim) for x in (q, k, flat[:, turned_width:]))
    k_cache, v_cache = (
        _write(cache, new, positions, page_table) for cache, new in zip(caches, (k, v), strict=True)
    )
    return q, k_cache, v_cache


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
    block_tokens: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.qkv_heads` for the op and the module for its tree.

    Args:
      qkv, k_cache, v_cache: bfloat16 or float32, all alike.
      q_norm, k_norm: any float dtype.
      cos, sin: float32.
      positions, page_table: int32.
      block_tokens: the schedule, all tokens or a multiple of 16; by shape unless given. Never
        changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      NotImplementedError: other dtypes, or D none of 64, 128 and 256.
    """
    check_dtypes("qkv_heads", qkv, k_cache, v_cache)
    dim = k_cache.shape[3]
    if dim not in _DIMS:
        raise NotImplementedError(f"mosaic_tpu qkv_heads needs D of 64, 128 or 256, got {dim}")
    return _qkv_heads(
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        (k_cache, v_cache),
        page_table,
        eps=eps,
        block_tokens=block_tokens or min(positions.size, _TOKENS),
        interpret=interpret,
    )
