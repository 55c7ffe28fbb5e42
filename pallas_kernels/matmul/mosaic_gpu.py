"""Matmul for Hopper in Pallas Mosaic GPU: one tree, many schedules.

y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]), weights stored as checkpoints store
them. bfloat16 or float16 operands.

Tree (what the bits depend on):

- K is cut into `leaves` equal parts. A part is one float32 accumulator of the tensor core,
  fed 16 elements of K at a time, ascending, by `wgmma` with K = 16; a part whose length is
  no multiple of 16 ends in zeros. The order inside the 16 belongs to the hardware.
- The sums of the parts are added in a balanced binary tree of neighbours, in float32.
- Then the bias is added in float32, and the result is rounded once to `out_dtype`.

Nothing else touches an element: no split of K over blocks, no atomics, no second kernel.

Schedules (what the bits do not depend on; `Schedule` in mosaic_gpu_schedules.py): tiles, the
orientation, the pipeline's depth, the number of consumers, clusters, the order of the tiles.
That a row of y has the same bits under every schedule and for every M was measured, not
promised by a vendor: scripts/check_gpu.py repeats the measurement.

- `normal`: x is wgmma's A (M side, 64 rows or more), w its B. Rows of x beyond M are not
  read: the copy engine clips them, and rows of y beyond M are clipped by the store.
- `swapped`: w is A, x is B with 8, 16, 32, ... rows; the accumulator holds y transposed,
  and is transposed back on its way to shared memory (`stmatrix.trans` for 16-bit results).

The kernel: a persistent grid of at most one block an SM walks the tiles of y. A producer
warpgroup keeps a ring of `stages` buffers full: its warp 0 copies tiles of w, its warp 1
tiles of x (`cp.async.bulk.tensor`, completion on one mbarrier a buffer), running ahead over
the ends of tiles, so that one tile's epilogue hides the next one's first loads. One to three
consumer warpgroups each own an accumulator in registers, leave one step's wgmmas in flight
and hand a buffer back when the next step has been issued. In a cluster of `cm x cn` blocks,
a tile of w is fetched once for the `cm` blocks that use it and multicast, a tile of x once
for `cn`.

`matmul_gated` is the same kernel with an elementwise gate of two results in its epilogue: w is
[2 F, K], read as [2, F, K], and a tile of w is bn / 2 rows of each half, one below the other in
shared memory. So one accumulator holds both results of a pair, in one thread; they are rounded
as `matmul` rounds them before the gate sees them.

Ragged edges: every dimension is clipped by the copy engine (zeros in, nothing out), K at the
end of each part because x and w are viewed as [rows, leaves, K / leaves]. For that the
engine has to see an untiled buffer, while wgmma has to see tiles of 8 rows; with 64 columns
of 16 bits (one 128-byte swizzle row) both are the same bytes, so each buffer is a union of
the two views. K / leaves must be a multiple of 8 (16-byte strides); N that is none is
computed in a wider y and cut by XLA.

Budget: shared memory = stages * bk * (bm + bn) * 2 bytes for the ring, and per consumer one
or two buffers of 64 rows by up to 128 bytes (normal) or bm rows by 64 results (swapped) for the
store, under 227 KiB. Registers = bm * bn / (128 * wgs) for an accumulator, times
log2(leaves) + 1 for the partial sums, of 255 / 232 / 152 with 1 / 2 / 3 consumers.
`Schedule.fits` checks both; ptxas reports no spill for a registered schedule, but for 16 bytes
in the 256 x 192 tile that is not gated.

Sources: the PTX manual (wgmma, cp.async.bulk.tensor, mbarrier); JAX's Pallas Mosaic GPU guide
and its Hopper matmul (jax/experimental/pallas/ops/gpu/hopper_matmul_mgpu.py) for the shape of a
persistent warp-specialised kernel; CUTLASS's sm90 pipelines for releasing multicast buffers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.matmul.mosaic_gpu_kernel import Gate, kernel
from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import Schedule, default_schedule, schedules

__all__ = ["Schedule", "default_schedule", "matmul", "matmul_gated", "schedules"]

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "interpret"))
def _matmul(x, w, bias, *, leaves, out_dtype, s, gate, interpret):
    m, k = x.shape
    n = w.shape[0]
    if gate is not None:
        n //= 2
        w = w.reshape(2, n, k)
    if leaves > 1:
        x = x.reshape(m, leaves, k // leaves)
        w = w.reshape(n, leaves, k // leaves)
    lane = 16 // out_dtype.itemsize
    wide = pl.cdiv(n, lane) * lane  # rows of y must start at multiples of 16 bytes
    args = (x, w)
    if bias is not None:
        args += (jnp.pad(bias, (0, -n % (s.bn * s.cn))),)
    clusters = pl.cdiv(m, s.bm * s.cm) * pl.cdiv(wide, s.out_cols * s.cn)
    clustered = s.cm * s.cn > 1
    y = plgpu.kernel(
        functools.partial(kernel, s=s, leaves=leaves, gate=gate, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((m, wide), out_dtype),
        grid=(min(clusters, s.resident),),
        grid_names=("cluster",),
        cluster=(s.cn, s.cm) if clustered else (),
        cluster_names=("cn", "cm") if clustered else (),
        num_threads=s.wgs + 1,
        thread_name="wg",
        kernel_name="jdet_matmul" if gate is None else "jdet_gated_matmul",
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or None,
    )(*args)
    return y[:, :n] if wide > n else y


def check_operands(x: jax.Array, w: jax.Array, leaves: int = 1) -> None:
    """Raise unless x [M, K] and w [N, K] are what the kernel multiplies."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x [M, K] and w [N, K] must share K, got {x.shape} and {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must share a dtype, got {x.dtype} and {w.dtype}")
    k = x.shape[1]
    if leaves < 1 or leaves & (leaves - 1) or k % leaves:
        raise ValueError(f"leaves must be a power of two that divides K = {k}, got {leaves}")
    if x.dtype not in _OPERANDS:
        raise NotImplementedError(f"mosaic_gpu matmul takes bfloat16 or float16, got {x.dtype}")
    if k == 0 or (k // leaves) % 8:
        raise NotImplementedError(
            f"mosaic_gpu matmul needs K / leaves in multiples of 8, got {k} / {leaves}"
        )


def check_result(x: jax.Array, out_dtype: DTypeLike | None) -> Any:
    """The dtype of the result. Raise if it is none that the kernel writes."""
    out = jnp.dtype(out_dtype or x.dtype)
    if out not in (*_OPERANDS, jnp.dtype(jnp.float32)):
        raise NotImplementedError(f"mosaic_gpu matmul cannot write {out}")
    return out


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, N] = x[M, K] @ w[N, K]^T + bias[N]; see the module for the tree.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [N, K], of x's dtype.
      bias: [N], any float dtype; added in float32.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; a 16-bit float or float32.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    check_operands(x, w, leaves)
    (m, k), n = x.shape, w.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape {(n,)} for w {w.shape}, got {bias.shape}")
    out = check_result(x, out_dtype)
    if m == 0 or n == 0:
        return jnp.zeros((m, n), out)
    s = schedule or default_schedule(m, n, k, x.dtype, leaves)
    if s.gated:
        raise ValueError(f"{s} is a schedule of matmul_gated")
    if not s.fits(leaves, out.itemsize):
        raise NotImplementedError(f"{s} has no room for {leaves} leaves and {out} results")
    return _matmul(x, w, bias, leaves=leaves, out_dtype=out, s=s, gate=None, interpret=interpret)


def matmul_gated(
    x: jax.Array,
    w: jax.Array,
    gate: Gate,
    *,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, F] = gate(x @ w[:F]^T, x @ w[F:]^T): `matmul` with a gate in its epilogue.

    The gate sees what `matmul` returns: the same sums, rounded to x's dtype.

    Args:
      x: [M, K], bfloat16 or float16.
      w: [2 F, K], of x's dtype.
      gate: elementwise, of two tiles in registers; a function of a module, since programs are
        cached by it.
      schedule: a gated one; by shape unless given. Never changes the result.
      interpret: as for `matmul`.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    check_operands(x, w)
    (m, k), n = x.shape, w.shape[0]
    if n % 2:
        raise ValueError(f"w must be [2 F, K], gate above up, got {w.shape}")
    if m == 0 or n == 0:
        return jnp.zeros((m, n // 2), x.dtype)
    s = schedule or default_schedule(m, n, k, x.dtype, gated=True)
    if not s.gated:
        raise ValueError(f"{s} is no gated schedule")
    if not s.fits(itemsize=x.dtype.itemsize):
        raise NotImplementedError(f"{s} has no room for {x.dtype} results")
    return _matmul(x, w, None, leaves=1, out_dtype=x.dtype, s=s, gate=gate, interpret=interpret)
