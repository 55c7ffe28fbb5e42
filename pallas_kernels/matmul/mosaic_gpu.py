"""Matmul for Hopper in Pallas Mosaic GPU: one tree, many schedules.

y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]), weights stored as checkpoints store
them, or [K, N] as models of `x @ w` hold them (`k_last=False`). bfloat16, float16 or float32
operands.

Tree (what the bits depend on):

- K is cut into `leaves` equal parts. A part is one float32 accumulator of the tensor core,
  fed 16 elements of K at a time, ascending, by `wgmma` with K = 16; a part whose length is
  no multiple of 16 ends in zeros. The order inside the 16 belongs to the hardware.
- The sums of the parts are added in a balanced binary tree of neighbours, in float32.
- Of float32 operands a number is the sum of three bfloat16 ones, the last 8, the middle and the
  first 8 bits of its significand, and a part adds up nine products over its K, each exact: those
  of x's last bits by w's last, middle and first, then of its middle bits, then of its first. (So
  an infinite operand makes its rows or columns NaN.)
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

A w [K, N] is copied as it lies, in squares of 64 by 64, which wgmma reads transposed: the same
steps of K, the same bits. A square is 64 rows of wgmma's M side, so `swapped` is what such a w
takes at every M, with up to 256 rows of x as the N side; `normal` walks it 64 columns an
instruction. With a batch, [B, M, K] x [B, N, K], the walk goes over the tiles of all entries.

`matmul_gated` is the same kernel with an elementwise gate of two results in its epilogue: w is
[2 F, K], read as [2, F, K], and a tile of w is bn / 2 rows of each half, one below the other in
shared memory. So one accumulator holds both results of a pair, in one thread; they are rounded
as `matmul` rounds them before the gate sees them.

Ragged edges: the last tiles of M and N end with the last row and column, over those of the tile
before; what is smaller than a tile, and K, is clipped by the copy engine (zeros in, nothing out), K
at the end of each part because x and w are viewed as [rows, leaves, K / leaves]. For that the
engine has to see an untiled buffer, while wgmma has to see tiles of 8 rows; with 64 columns
of 16 bits (one 128-byte swizzle row) both are the same bytes, so each buffer is a union of
the two views. K / leaves must be a multiple of 8 (16-byte strides), but for one leaf of a w
[K, N]: there XLA continues x by zeros, and the engine w. N that is no multiple of 8 is computed
in a wider y and cut by XLA, from a w [K, N] that XLA has padded.

Budget: shared memory = stages * bk * (bm + bn) * 2 bytes for the ring, and per consumer one
or two buffers of 64 rows by up to 128 bytes (normal) or up to 64 rows by 64 results (swapped) for
the store, under 227 KiB. Registers = bm * bn / (128 * wgs) for an accumulator, times
log2(leaves) + 1 for the partial sums, of 255 / 232 / 152 with 1 / 2 / 3 consumers.
`Schedule.fits` checks both; ptxas reports no spill for a registered schedule, but for 16 bytes
in the 256 x 192 tile that is not gated.

Sources: the PTX manual (wgmma, cp.async.bulk.tensor, mbarrier); JAX's Pallas Mosaic GPU guide
and its Hopper matmul (jax/experimental/pallas/ops/gpu/hopper_matmul_mgpu.py) for the shape of a
persistent warp-specialised kernel; CUTLASS's sm90 pipelines for releasing multicast buffers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jdet.pallas_kernels.matmul.mosaic_gpu_kernel import Gate, kernel
from jdet.pallas_kernels.matmul.mosaic_gpu_schedules import Schedule, default_schedule, schedules

__all__ = ["Schedule", "default_schedule", "matmul", "matmul_gated", "matmuls", "schedules"]

_HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_FLOATS = (*_HALVES, jnp.dtype(jnp.float32))
_PARTS = 3  # bfloat16 numbers that add up to a float32 one


def _parts(x: jax.Array) -> jax.Array:
    """[3, ...] bfloat16 of float32, the smallest first; their sum is x."""
    parts = []
    for _ in range(_PARTS):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        first = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(first.astype(jnp.bfloat16))
        x = x - first
    return jnp.stack(parts[::-1])


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(
    jax.jit, static_argnames=("leaves", "out_dtype", "s", "gate", "k_last", "interpret")
)
def _matmul(x, ws, bias, *, leaves, out_dtype, s, gate, k_last, interpret):
    if rest := -x.shape[-1] % 8:  # of a w [K, N], whose rows beyond K the copy engine makes zeros
        x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, rest)))
    *batch, m, k = x.shape
    lead, cut = (*batch,), (leaves, k // leaves)
    widths = [w.shape[-2 if k_last else -1] // (1 if gate is None else 2) for w in ws]
    # Rows of y must begin at multiples of 16 bytes, and so must a tile's columns of y and w [K, N].
    wides = [n + -n % 8 for n in widths]
    if x.dtype == jnp.float32:
        x, ws, lead = _parts(x), [_parts(w) for w in ws], (_PARTS, *batch)
    if leaves > 1:
        x = x.reshape(*lead, m, *cut)
    args = [x]
    for w, n, wide in zip(ws, widths, wides, strict=True):
        if gate is not None:
            w = w.reshape(2, n, k)
        if not k_last and wide > n:
            w = jnp.pad(w, (*[(0, 0)] * (w.ndim - 1), (0, wide - n)))
        if leaves > 1:
            w = w.reshape(*lead, *((n, *cut) if k_last else (*cut, w.shape[-1])))
        args.append(w)
    if bias is not None:
        args.append(jnp.pad(bias, (0, -widths[0] % (s.bn * s.cn))))
    columns = sum(pl.cdiv(wide, s.out_cols * s.cn) for wide in wides)
    clusters = math.prod(batch) * pl.cdiv(m, s.bm * s.cm) * columns
    clustered = s.cm * s.cn > 1
    ys = plgpu.kernel(
        functools.partial(
            kernel,
            s=s,
            leaves=leaves,
            gate=gate,
            k_last=k_last,
            parts=_PARTS if len(lead) > len(batch) else 1,
            products=len(ws),
            interpret=bool(interpret),
        ),
        out_type=[jax.ShapeDtypeStruct((*batch, m, wide), out_dtype) for wide in wides],
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
    return tuple(y[..., :n] if y.shape[-1] > n else y for y, n in zip(ys, widths, strict=True))


def check_operands(
    x: jax.Array,
    w: jax.Array,
    leaves: int = 1,
    *,
    k_last: bool = True,
    ranks: tuple[int, ...] = (2,),
    dtypes: tuple[Any, ...] = _HALVES,
) -> None:
    """Raise unless x [M, K] and w [N, K], or [K, N], are what the kernel multiplies."""
    form = "[N, K]" if k_last else "[K, N]"
    if not x.ndim == w.ndim in ranks:
        raise ValueError(f"x must be [M, K] and w {form}, got {x.shape} and {w.shape}")
    if x.shape[:-2] != w.shape[:-2] or x.shape[-1] != w.shape[-1 if k_last else -2]:
        raise ValueError(f"x [M, K] and w {form} must share K, got {x.shape} and {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must share a dtype, got {x.dtype} and {w.dtype}")
    k = x.shape[-1]
    if leaves < 1 or leaves & (leaves - 1) or k % leaves:
        raise ValueError(f"leaves must be a power of two that divides K = {k}, got {leaves}")
    if x.dtype not in dtypes:
        names = " or ".join(d.name for d in dtypes)
        raise NotImplementedError(f"mosaic_gpu multiplies {names}, got {x.dtype}")
    if k == 0 or ((k // leaves) % 8 and (k_last or leaves > 1)):
        raise NotImplementedError(
            "mosaic_gpu matmul needs K / leaves in multiples of 8, or one leaf of a w [K, N], got "
            f"{k} / {leaves} of {form}"
        )


def check_result(x: jax.Array, out_dtype: DTypeLike | None) -> Any:
    """The dtype of the result. Raise if it is none that the kernel writes."""
    out = jnp.dtype(out_dtype or x.dtype)
    if out not in _FLOATS:
        raise NotImplementedError(f"mosaic_gpu matmul cannot write {out}")
    return out


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    k_last: bool = True,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[M, N] = x[M, K] @ w[N, K]^T + bias[N]; see the module for the tree.

    Args:
      x: [M, K], or [B, M, K], bfloat16, float16 or float32.
      w: [N, K], of x's dtype, with a batch if x has one.
      bias: [N], any float dtype; added in float32.
      leaves: a power of two of equal parts of K, summed apart and added in a balanced tree.
      out_dtype: x's dtype unless given; a 16-bit float or float32.
      k_last: false if w is [K, N]. The bits are those of its transpose.
      schedule: how to walk the tree; by shape unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      ValueError: shapes or dtypes that do not go together.
      NotImplementedError: this backend cannot compute them; the message says which part.
    """
    fixed = {"leaves": leaves, "out_dtype": out_dtype, "k_last": k_last}
    return _matmuls(x, (w,), bias, **fixed, schedule=schedule, interpret=interpret)[0]


def matmuls(
    x: jax.Array,
    ws: Sequence[jax.Array],
    *,
    leaves: int = 1,
    out_dtype: DTypeLike | None = None,
    k_last: bool = True,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """`matmul` of one x by each of several w, of any numbers of columns, in one launch.

    The bits are those of `matmul`. Arguments and errors as there.
    """
    if not ws:
        raise ValueError("matmuls: ws must hold a matrix or more, got none")
    fixed = {"leaves": leaves, "out_dtype": out_dtype, "k_last": k_last}
    return _matmuls(x, tuple(ws), None, **fixed, schedule=schedule, interpret=interpret)


def _matmuls(x, ws, bias, *, leaves, out_dtype, k_last, schedule, interpret):
    for w in ws:
        check_operands(x, w, leaves, k_last=k_last, ranks=(2, 3), dtypes=_FLOATS)
    (*batch, m, k), widths = x.shape, [w.shape[-2 if k_last else -1] for w in ws]
    if bias is not None and bias.shape != (widths[0],):
        raise ValueError(
            f"bias must have shape {(widths[0],)} for w {ws[0].shape}, got {bias.shape}"
        )
    out = check_result(x, out_dtype)
    if 0 in (*batch, m, *widths):
        if any(widths) and 0 not in (*batch, m):
            raise ValueError(f"matmuls: each w must have a column, or none has one, got {widths}")
        return tuple(jnp.zeros((*batch, m, n), out) for n in widths)
    s = schedule or default_schedule(
        m, sum(widths), k, x.dtype, leaves, k_last=k_last, batch=math.prod(batch)
    )
    if s.gated:
        raise ValueError(f"{s} is a schedule of matmul_gated")
    if not (k_last or s.takes_k_first):
        raise ValueError(f"{s} does not cut w [K, N] in squares of 64")
    if not s.fits(leaves, out.itemsize):
        raise NotImplementedError(f"{s} has no room for {leaves} leaves and {out} results")
    fixed = {"leaves": leaves, "out_dtype": out, "s": s, "k_last": k_last}
    return _matmul(x, ws, bias, **fixed, gate=None, interpret=interpret)


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
    fixed = {"leaves": 1, "out_dtype": x.dtype, "s": s, "k_last": True}
    return _matmul(x, (w,), None, **fixed, gate=gate, interpret=interpret)[0]
