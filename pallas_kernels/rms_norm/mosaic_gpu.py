"""RMSNorm with residual addition in Pallas Mosaic GPU: rows straight through registers.

Tree (a function of D and the dtypes alone):

- s = x + residual in float32, rounded to x's dtype; x itself without a residual.
- A row belongs to `warps * lanes` threads (`shape_of`); each holds vectors of `vector`
  neighbours, `tile` elements apart. The squares are products rounded in float32. A thread adds
  its vectors, ascending, in max(1, 8 // vector) interleaved sums, then these in order, then the
  elements of the vector, ascending. Then lanes are added by XOR shuffles, 1, 2, 4, ... lanes
  away, then four warps as (0 + 1) + (2 + 3).
- y = s * rsqrt(fma(sum, float32(1 / D), eps)) * weight, left to right, each operation rounded
  in float32 (`rsqrt.approx`); one rounding to x's dtype.
- A row whose D suits no such division is continued with zeros to a multiple of 1024.

A reduction never holds more than one row of a thread: Mosaic GPU cuts the interleaved sums by
their number, and the bits would follow it.

Schedules (what the bits do not depend on): a block is one warpgroup. Either it takes one row, and
threads beyond those of the row repeat its work; or every thread has a row, `tiles` times over. The
last blocks then start early enough to end with the last row; what two blocks share is written
twice, alike.

Loads and stores go between registers and global memory, 16 bytes a thread where D allows: there
is nothing to wait for but memory, and no copy engine to set up.

Budget: no shared memory but the 2 KiB of the sum over warps. Registers: the elements of a thread
(at most 128) times `tiles`, in x's dtype until they are squared, in float32 after; and as many
weights. ptxas spills none up to D = 12288 in 16 bits.

On an H100: bits in scripts/bench/results/h100-check-rows.json, times in h100-rows.json.

Sources: Zhang & Sennrich, arXiv:1910.07467; Mosaic GPU's reductions:
jax/experimental/mosaic/gpu/fragmented_array.py.
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

_OPERANDS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
_LARGEST = 16384
_BLOCKS = 264  # two an SM: with fewer rows, each still has a block of its own
_RESIDENT = 132 * 8  # blocks worth keeping in flight before one takes more rows


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The threads of a row: `warps` (1 or 4) of `lanes` lanes, with vectors of `vector`."""

    warps: int
    lanes: int
    vector: int

    @property
    def tile(self) -> int:
        """Elements from one vector of a thread to its next."""
        return self.warps * self.lanes * self.vector

    @property
    def rows(self) -> int:
        """Rows of a warpgroup when every thread has one."""
        return 128 // (self.warps * self.lanes)

    def layout(self, rows: int) -> Any:
        """[rows, D] in registers, for 1 row or `self.rows`."""
        across = self.lanes * self.vector
        spare = 32 // self.lanes
        # Tiled thrice, an array ends in [warps down, across, lanes down, across, 1, vector].
        tiles = ((rows, self.tile), (min(rows, spare), across), (1, self.vector))
        down = (-6, -4) if rows > 1 else (plgpu.Replicated(4), plgpu.Replicated(spare))
        t = mgpu.TiledLayout(
            plgpu.Tiling(tiles),
            (-5 if self.warps > 1 else down[0],),
            (down[1], -3) if spare > 1 else (-3,),
            -1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Rows of a block: `tiles` times `rows`, which is 1 or all that its threads can hold."""

    rows: int
    tiles: int


def shape_of(dim: int) -> tuple[RowShape, int]:
    """The threads of a row of `dim` elements, and the row's length with zeros at its end."""
    if dim >= 1024 and dim % 512 == 0:
        return RowShape(4, 32, 4 if dim % 1024 else 8), dim
    power = dim & -dim  # the largest power of two that divides it
    shapes = [RowShape(1, min(32, power // vector), vector) for vector in (8, 4, 2, 1)]
    for most in (64, 128):
        for shape in shapes:
            if dim <= most * shape.lanes:
                return shape, dim
    return RowShape(4, 32, 8), pl.cdiv(dim, 1024) * 1024


def schedules(m: int, dim: int) -> tuple[Schedule, ...]:
    """Every schedule that can compute [m, dim]: all of them give the same bits."""
    shape, width = shape_of(dim)
    rows = shape.rows
    elements = width // (shape.warps * shape.lanes)
    tiles = [t for t in (1, 2, 4) if t == 1 or t * elements <= 32]
    single = () if rows == 1 else (Schedule(1, 1),)
    return single + tuple(Schedule(rows, t) for t in tiles if m >= rows)


def default_schedule(m: int, dim: int) -> Schedule:
    """The schedule to use for a shape. Speed only."""
    first, *others = schedules(m, dim)
    if m <= _BLOCKS or not others:
        return first
    busy = [s for s in others if m >= s.rows * s.tiles * _RESIDENT]
    return busy[-1] if busy else others[0]


def _experts_added(
    y_g: Any, weights_g: Any, places_g: Any, row: jax.Array, layout: Any, interpret: bool
) -> jax.Array:
    """A row of `expert_sum`, [1, D]."""
    k = places_g.shape[1]
    places = [places_g[row, j] for j in range(k)]
    weights = [weights_g[row, j].astype(y_g.dtype).astype(jnp.float32) for j in range(k)]
    ys = [plgpu.load(y_g.at[pl.ds(at, 1)], layout=layout, optimized=False) for at in places]
    products = []
    for y, weight in zip(ys, weights, strict=True):
        spread = plgpu.layout_cast(jnp.full(y.shape, weight), layout)
        product = exact("mul.rn.f32", layout, interpret, y.astype(jnp.float32), spread)
        products.append(product.astype(y.dtype).astype(jnp.float32))
    return functools.reduce(jnp.add, products).astype(y_g.dtype)


def _kernel(
    *refs: Any,
    dim: int,
    eps: float,
    residual: bool,
    experts: bool,
    s: Schedule,
    shape: RowShape,
    interpret: bool,
) -> None:
    """refs are x, weight, y, and with a residual that and s.

    With experts x are the rows of experts, and their weights and places follow it.
    """
    x_g, *others = refs
    weights_g, places_g = (others.pop(0), others.pop(0)) if experts else (None, None)
    other_g = others.pop(0) if residual else None
    weight_g, y_g, *s_g = others
    layout = shape.layout(s.rows)
    m, width = y_g.shape
    begin = lax.axis_index("block") * (s.rows * s.tiles)
    windows = [pl.ds(lax.min(begin + t * s.rows, m - s.rows), s.rows) for t in range(s.tiles)]

    def read(ref):
        return [plgpu.load(ref.at[w], layout=layout, optimized=False) for w in windows]

    def square(v):
        return exact("mul.rn.f32", layout, interpret, v, v)

    if experts:
        xs = [_experts_added(x_g, weights_g, places_g, begin, layout, interpret)]
    else:
        xs = read(x_g)
    added = read(other_g) if residual else [None] * s.tiles
    weight = plgpu.load(weight_g, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
    weight = lax.broadcast_in_dim(weight, (s.rows, width), (1,))
    for window, x, other in zip(windows, xs, added, strict=True):
        if other is not None:
            x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
            s_g[0].at[window][...] = x
        v = x.astype(jnp.float32)
        # Spread over the row before the mean: Mosaic cannot name instructions on one value.
        total = lax.broadcast_in_dim(jnp.sum(square(v), axis=1), (s.rows, width), (0,))
        mean = exact("fma.rn.f32", layout, interpret, total, 1.0 / dim, eps)
        y_g.at[window][...] = (v * lax.rsqrt(mean) * weight).astype(x.dtype)


# Behind its own jit, so that a model lowers each shape once and not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "s", "interpret"))
def _rms_norm(x, weight, residual, experts, *, eps, s, interpret):
    m, dim = x.shape if residual is None else residual.shape
    shape, width = shape_of(dim)

    def widen(v):
        return v if width == dim else jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - dim)])

    rows = (x,) if residual is None else (x, residual)
    out = jax.ShapeDtypeStruct((m, width), x.dtype)
    args = [widen(v) for v in (*rows, weight)]
    args[1:1] = experts or ()
    results = plgpu.kernel(
        functools.partial(
            _kernel,
            dim=dim,
            eps=eps,
            residual=residual is not None,
            experts=experts is not None,
            s=s,
            shape=shape,
            interpret=bool(interpret),
        ),
        out_type=(out,) * len(rows),
        grid=(pl.cdiv(m, s.rows * s.tiles),),
        grid_names=("block",),
        kernel_name="jdet_rms_norm",
        # Nothing that is read is written: no barriers are wanted around the stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret or None,
    )(*args)
    y, *sums = (r[:, :dim] for r in results)
    return y, sums[0] if sums else x


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    residual: jax.Array | None = None,
    experts: tuple[jax.Array, jax.Array] | None = None,
    schedule: Schedule | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(norm of s, s) with s = x + residual; see the module for the tree.

    Args:
      x: [..., D], bfloat16, float16 or float32.
      weight: [D], of x's dtype or float32.
      residual: as x, or None: then s is x.
      experts: the weights and places of `expert_norm`, whose y is x, [R, D]; residual is [M, D].
      schedule: how to walk the rows; by their number unless given. Never changes the result.
      interpret: private hook of the tests, `plgpu.InterpretGPUParams()` to run on a CPU.

    Raises:
      NotImplementedError: another dtype, D no multiple of 8, or D over 16384.
    """
    dim = x.shape[-1]
    if x.dtype not in _OPERANDS or weight.dtype not in (x.dtype, jnp.float32):
        raise NotImplementedError(
            "mosaic_gpu rms_norm takes bfloat16, float16 or float32, and weights alike or in"
            f" float32; got {x.dtype} and {weight.dtype}"
        )
    if dim % 8 or not 0 < dim <= _LARGEST:
        raise NotImplementedError(
            f"mosaic_gpu rms_norm needs D in multiples of 8 up to {_LARGEST}, got {dim}"
        )
    flat = x.reshape(-1, dim)
    if not flat.shape[0]:
        return x, x
    other = None if residual is None else residual.reshape(-1, dim)
    if experts is None:
        schedule = schedule or default_schedule(flat.shape[0], dim)
    else:
        schedule = schedules(1, dim)[0]
    y, s = _rms_norm(flat, weight, other, experts, eps=eps, s=schedule, interpret=interpret)
    shape = x.shape if experts is None else y.shape
    return y.reshape(shape), s.reshape(shape)
