"""RMSNorm with residual addition in Pallas Mosaic GPU: one block a row.

Tree: s = x + residual, rounded to x's dtype; the squares of s, in float32, are summed by the
128 threads of one warpgroup: thread t holds the elements of a strided layout that depends on
D alone, adds its own first and then, over the threads, in Mosaic GPU's fixed tree (XOR
shuffles in a warp, the four warps through shared memory). A row is one block whatever the
number of rows, so no schedule can see them. Result: s * rsqrt(sum / D + eps) * weight in
float32, one rounding. (`portable` has another tree: bits are promised within one
implementation.)

Ragged D: columns are copied in chunks of 128 that the copy engine clips; what lies beyond D
reads as zero and is not written. D must be a multiple of 8 (16-byte rows).

Budget: shared memory 4 rows of D rounded up to 128; registers 2 * D / 128 a thread, float32.

Status: runs in interpret mode and compiles for an H100. By itself it has not been checked on
one, so nothing uses it; a whole model that held it, and an unfinished attention kernel, did not
pass there (scripts/bench/results/h100-model-mosaic-failed.json).

Sources: Zhang & Sennrich, arXiv:1910.07467; Mosaic GPU's reductions:
jax/experimental/mosaic/gpu/fragmented_array.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_LANES = 128  # threads of a warpgroup, and columns of one copy
_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def _kernel(*refs: Any, dim: int, eps: float, residual: bool) -> None:
    """One row; refs are x, residual if there is one, weight, y, s."""
    x_g, *residual_g, weight_g, y_g, s_g = refs
    row = lax.axis_index("row")
    chunks = pl.cdiv(dim, _LANES)
    inputs = [(x_g, True), *((r, True) for r in residual_g), (weight_g, False)]

    def scope(loaded, y_s, s_s, barrier):
        def fetch(c, _):
            at = pl.ds(c * _LANES, _LANES)
            for i, (ref, by_row) in enumerate(inputs):
                source = ref.at[row, at] if by_row else ref.at[at]
                plgpu.copy_gmem_to_smem(source, loaded.at[i, at], barrier)

        lax.fori_loop(0, chunks, fetch, None)
        plgpu.barrier_wait(barrier)
        layout = plgpu.Layout.WG_STRIDED((chunks * _LANES,), vec_size=1)
        rows = [plgpu.load(loaded.at[i], layout=layout) for i in range(len(inputs))]
        s = rows[0]
        if residual:
            s = (s.astype(jnp.float32) + rows[1].astype(jnp.float32)).astype(s.dtype)
        v = s.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(v * v) * (1.0 / dim) + eps)
        s_s[...] = s
        y_s[...] = (v * scale * rows[-1].astype(jnp.float32)).astype(s.dtype)
        plgpu.commit_smem()

        def put(c, _):
            at = pl.ds(c * _LANES, _LANES)
            plgpu.copy_smem_to_gmem(y_s.at[at], y_g.at[row, at])
            plgpu.copy_smem_to_gmem(s_s.at[at], s_g.at[row, at])

        lax.fori_loop(0, chunks, put, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    width = chunks * _LANES
    pl.run_scoped(
        scope,
        plgpu.SMEM((len(inputs), width), x_g.dtype),
        plgpu.SMEM((width,), x_g.dtype),
        plgpu.SMEM((width,), x_g.dtype),
        plgpu.Barrier(num_arrivals=len(inputs) * chunks),
    )


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _rms_norm(x, weight, residual, *, eps, interpret):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    rows = (x,) if residual is None else (x, residual)
    return plgpu.kernel(
        functools.partial(_kernel, dim=x.shape[1], eps=eps, residual=residual is not None),
        out_type=(shape, shape),
        grid=(x.shape[0],),
        grid_names=("row",),
        kernel_name="jdet_rms_norm",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or None,
    )(*rows, weight)


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(norm of s, s) with s = x + residual; see the module for the tree.

    Args:
      x: [..., D], bfloat16 or float16.
      weight: [D], of x's dtype.
      residual: as x, or None: then s is x.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      NotImplementedError: another dtype, or D no multiple of 8.
    """
    if x.dtype not in _OPERANDS or weight.dtype != x.dtype:
        raise NotImplementedError(
            f"mosaic_gpu rms_norm takes bfloat16 or float16, got {x.dtype} and {weight.dtype}"
        )
    if x.shape[-1] % 8:
        raise NotImplementedError(
            f"mosaic_gpu rms_norm needs D in multiples of 8, got {x.shape[-1]}"
        )
    flat = x.reshape(-1, x.shape[-1])
    other = None if residual is None else residual.reshape(flat.shape)
    y, s = _rms_norm(flat, weight, other, eps=eps, interpret=interpret)
    return y.reshape(x.shape), s.reshape(x.shape)
