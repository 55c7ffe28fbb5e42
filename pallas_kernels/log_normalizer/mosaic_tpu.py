"""The normalizer of logits for TPU in Pallas: a row is read once, chunk by chunk, in order.

Tree (a function of V alone), for float32 logits:

- A row is cut into chunks of 16384 logits, from its start; the last one is continued with -inf.
- A chunk alone: m its maximum, l the sum of exp(x - m), in the tree of `tpu.across_lanes`: the
  128 columns of 128 lanes, the second half to the first, then lanes 64, 32, ..., 1 apart.
  Without a finite logit m is not subtracted, and l is 0.
- Chunks are merged in ascending order, starting from (-inf, 0): M = max(m, m'),
  l exp(m - M) + l' exp(m' - M).
- log_sum is log(l).

A NaN makes maximum and log_sum NaN, and is what argmax counts as the maximum; plus infinity
makes log_sum NaN. The maximum and the argmax, the first index of it, are exact in any order.

Schedule (what the bits do not depend on): the number of rows in a block.

Budget: VMEM = two buffers of a block of rows x 64 KiB, under 8 MiB.

No TPU has run this kernel: it was interpreted, and compiled for v5e, v5p, v6e and tpu7x.

Sources: Milakov & Gimelshein, arXiv:1805.02867 (online softmax).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.tpu import across_lanes, compiler_params, lane_index, lane_sum

_CHUNK = 16384  # logits
_ROWS = 32  # of a block, at most
_NONE = jnp.iinfo(jnp.int32).max


def _finite(maximum: jax.Array) -> jax.Array:
    """What to subtract: not minus infinity, from which nothing can be subtracted."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def _kernel(x_ref, maximum_ref, log_sum_ref, argmax_ref, m_ref, l_ref, at_ref, nan_ref, *, size):
    """The last four, [rows, 1], hold what the chunks so far gave; nan is 1 once one was met."""
    chunk = pl.program_id(1)

    @pl.when(chunk == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        at_ref[...] = jnp.zeros_like(at_ref)
        nan_ref[...] = jnp.zeros_like(nan_ref)

    x = x_ref[...]
    place = chunk * _CHUNK + lane_index(x.shape)
    if size % _CHUNK:
        x = jnp.where(place < size, x, -jnp.inf)
    is_nan = x != x
    numbers = jnp.where(is_nan, -jnp.inf, x)
    m = across_lanes(numbers, jnp.maximum, -jnp.inf)
    total = lane_sum(jnp.exp(numbers - _finite(m)))
    first = across_lanes(jnp.where(numbers == m, place, _NONE), jnp.minimum, _NONE)
    first_nan = across_lanes(jnp.where(is_nan, place, _NONE), jnp.minimum, _NONE)

    before, had_nan, has_nan = m_ref[...], nan_ref[...] > 0, first_nan < _NONE
    both = jnp.maximum(before, m)
    base = _finite(both)
    l_ref[...] = l_ref[...] * jnp.exp(before - base) + total * jnp.exp(m - base)
    at = jnp.where(m > before, first, at_ref[...])
    at_ref[...] = jnp.where(had_nan, at_ref[...], jnp.where(has_nan, first_nan, at))
    m_ref[...] = both
    nan_ref[...] = jnp.where(had_nan | has_nan, 1, 0)

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        nan = nan_ref[...] > 0
        maximum_ref[...] = jnp.where(nan, jnp.nan, m_ref[...])
        log_sum_ref[...] = jnp.where(nan, jnp.nan, jnp.log(l_ref[...]))
        argmax_ref[...] = at_ref[...]


# Behind its own jit, so that a program lowers each shape once.
@functools.partial(jax.jit, static_argnames=("block_rows", "interpret"))
def _log_normalizer(logits, *, block_rows, interpret):
    rows, size = logits.shape
    column = pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0))
    state = pltpu.VMEM((block_rows, 1), jnp.float32)
    counts = pltpu.VMEM((block_rows, 1), jnp.int32)
    numbers = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, size=size),
        out_shape=(numbers, numbers, jax.ShapeDtypeStruct((rows, 1), jnp.int32)),
        grid=(pl.cdiv(rows, block_rows), pl.cdiv(size, _CHUNK)),
        in_specs=[pl.BlockSpec((block_rows, _CHUNK), lambda i, j: (i, j))],
        out_specs=(column,) * 3,
        scratch_shapes=[state, state, counts, counts],
        compiler_params=compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=8 * logits.size, transcendentals=logits.size, bytes_accessed=4 * logits.size
        ),
        name="jdet_log_normalizer",
        interpret=interpret,
    )(logits)


def log_normalizer(
    logits: jax.Array, *, block_rows: int | None = None, interpret: Any = False
) -> LogNormalizer:
    """Maximum, log-sum and argmax of each row of logits; see the module for the tree.

    Args:
      logits: [..., V], float32.
      block_rows: the schedule, all rows or a multiple of 8; by shape unless given. Never
        changes the result.
      interpret: private hook of the tests, `pltpu.InterpretParams()` or True to run on a CPU.

    Raises:
      NotImplementedError: another dtype.
    """
    if logits.dtype != jnp.float32:
        raise NotImplementedError(f"mosaic_tpu log_normalizer takes float32, got {logits.dtype}")
    *lead, size = logits.shape
    flat = logits.reshape(-1, size)
    if not flat.shape[0]:
        nothing = jnp.zeros(lead, jnp.float32)
        return LogNormalizer(nothing, nothing, nothing.astype(jnp.int32))
    block_rows = block_rows or min(flat.shape[0], _ROWS)
    results = _log_normalizer(flat, block_rows=block_rows, interpret=interpret)
    return LogNormalizer(*(r.reshape(lead) for r in results))
