"""The schedule self-test: on this device every schedule of an op gives the same bits.

That they do is observed, not promised by a vendor, so it is looked at again where it is relied
on: quick sizes, each op asked for its schedules. The long form of it, for Hopper cards, is
`scripts/check_gpu*.py`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdet.compiler import compiler_options
from jdet.ops import Ops
from jdet.testing.bits import bit_patterns

# N and K of products: no multiple of a tile, and a K that ends in a part of one.
_N, _K = 1000, 1032
_ROWS = (9, 257)
_FEW_ROWS = (65, 9, 1)


@dataclasses.dataclass(frozen=True)
class OpSchedules:
    """What became of one op.

    Attributes:
      schedules: how many it has here.
      compared: so many of them were compared with the others, in one case or more; the rest was
        not reached in the time.
      cases: those that ran ("9 rows").
      left_out: those that did not, for want of time.
      differ: "case: schedule", those with other bits than the first, or that do not run.
    """

    op: str
    schedules: int
    compared: int
    cases: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    differ: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Group:
    """Functions that must agree on the same inputs, by the names of their schedules."""

    op: str
    case: str
    ways: dict[str, Callable[..., Any]]
    inputs: tuple[Any, ...]


def self_test(model: Any, more: Callable[[bool], bool]) -> list[OpSchedules]:
    """Compare the schedules of every op that the model uses.

    First every op's most telling case, then every schedule, then what else there is.

    Args:
      model: a `jdet.models.load.LanguageModel`.
      more: whether there is time for another group of schedules; asked before each, with whether
        one of them has not been compared yet.
    """
    find = _FINDERS.get(model.ops.implementation)
    groups = list(find(model.config, model.ops)) if find else []
    options = compiler_options(model.ops.implementation)
    ran: dict[str, list[_Group]] = {g.op: [] for g in groups}
    differ: dict[str, list[str]] = {g.op: [] for g in groups}
    left = list(groups)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while left:
            g = min(left, key=lambda g: _turn(g, ran[g.op]))
            if not more(bool(_new(g, ran[g.op]))):
                break
            left.remove(g)
            differ[g.op] += _differ(g, pool, options)
            ran[g.op].append(g)
    return [
        OpSchedules(
            op=op,
            schedules=len({name for g in groups if g.op == op for name in g.ways}),
            compared=len({name for g in ran[op] for name in g.ways}),
            cases=tuple(g.case for g in ran[op]),
            left_out=tuple(g.case for g in left if g.op == op),
            differ=tuple(differ[op]),
        )
        for op in ran
    ]


def _new(group: _Group, ran: Sequence[_Group]) -> set[str]:
    """Its schedules that have not been compared."""
    return set(group.ways) - {name for g in ran for name in g.ways}


def _turn(group: _Group, ran: Sequence[_Group]) -> tuple[bool, bool, int, int]:
    """What goes first: an op that had no turn, then schedules that had none, the most of them."""
    new = len(_new(group, ran))
    return bool(ran), not new, -new, len(ran)


def _differ(group: _Group, pool: ThreadPoolExecutor, options: dict[str, Any]) -> list[str]:
    """The schedules whose bits are not those of the first, and those that do not run."""
    differ: list[str] = []
    compiled: dict[str, Any] = {}

    def told(name: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0][:200]
        differ.append(f"{group.case}: {name} does not run: {type(error).__name__}: {reason}")

    for name, way in group.ways.items():
        try:
            # Traced here, compiled side by side: XLA compiles on one core and without the GIL.
            lowered = jax.jit(way, compiler_options=options).lower(*group.inputs)
        except Exception as error:
            told(name, error)
        else:
            compiled[name] = pool.submit(lowered.compile)
    first = None
    for name, future in compiled.items():
        try:
            out = jax.tree.leaves(jax.device_get(future.result()(*group.inputs)))
        except Exception as error:
            told(name, error)
            continue
        bits = [bit_patterns(x) for x in out]
        first = first or bits
        if any((a != b).any() for a, b in zip(first, bits, strict=True)):
            differ.append(f"{group.case}: {name}")
    return differ


def _normal(seed: int, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> jax.Array:
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32) * scale
    return jnp.asarray(drawn).astype(dtype)


def _attention_inputs(config: Any, length: int, dtype: Any) -> tuple[jax.Array, ...]:
    """q, keys, values and positions of three rows of 512 slots, NaN behind their last keys."""
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    lasts = np.array([length - 1, 256 + length // 2, 511])
    positions = np.maximum(lasts[:, None] - length + 1 + np.arange(length), 0)
    unseen = (np.arange(512) > lasts[:, None])[:, None, :, None]
    k, v = (_normal(i, (3, kv_heads, 512, dim), dtype) for i in (1, 2))
    nan = jnp.array(jnp.nan, dtype)
    q = _normal(0, (3, length, heads, dim), dtype)
    return q, jnp.where(unseen, nan, k), jnp.where(unseen, nan, v), jnp.asarray(positions, np.int32)


def _portable(config: Any, ops: Ops) -> Iterator[_Group]:
    """Those of a CPU; elsewhere `portable` has one schedule an op."""
    from jdet.pallas_kernels.attention import portable as attention
    from jdet.pallas_kernels.grouped_matmul import portable as grouped
    from jdet.pallas_kernels.matmul import portable as matmul

    if jax.default_backend() != "cpu":
        return
    for m in _FEW_ROWS:
        for dtype in (jnp.bfloat16, jnp.float32):
            w = _normal(1, (256, config.hidden_size), dtype)
            tiles = {f"tiled {t}": functools.partial(matmul.dot_tiled, tile=t) for t in (8, 16, 64)}
            ways = {"whole": matmul.dot_whole, **tiles}
            x = _normal(0, (m, config.hidden_size), dtype)
            yield _Group("matmul", f"{jnp.dtype(dtype).name}, {m} rows", ways, (x, w))
    options = dict(
        scale=config.head_dim**-0.5,
        kv_split=min(ops.contract.kv_split, 256),
        sliding_window=config.window(0),
        soft_cap=None,
    )
    for length in (1, 17):
        ways = {
            "whole": lambda q, k, v, at: attention.attention_whole(q, k, v, at, None, **options),
            "tiled": lambda q, k, v, at: attention.attention_tiled(q, k, v, at, None, **options),
        }
        inputs = _attention_inputs(config, length, jnp.bfloat16)
        yield _Group("attention", f"{length} queries a row", ways, inputs)
    if config.num_experts:
        x, w = _normal(0, (60, 256), jnp.bfloat16), _normal(1, (6, 96, 256), jnp.bfloat16)
        sizes = jnp.array([0, 1, 30, 7, 16, 3], jnp.int32)
        ways = {
            f"tiles of {tile}": functools.partial(
                grouped.grouped_tiles, tile=tile, leaves=1, out_dtype=jnp.float32
            )
            for tile in (4, 16, 64)
        }
        yield _Group("grouped_matmul", "6 experts", ways, (x, w, sizes))


def _mosaic_gpu(config: Any, ops: Ops) -> Iterator[_Group]:
    from jdet.pallas_kernels.attention import mosaic_gpu as attention
    from jdet.pallas_kernels.gated_matmul import mosaic_gpu as gated
    from jdet.pallas_kernels.matmul import mosaic_gpu as matmul
    from jdet.pallas_kernels.qkv_heads import mosaic_gpu as heads
    from jdet.pallas_kernels.rms_norm import mosaic_gpu as norm

    def ways(function: Callable[..., Any], schedules: Sequence[Any], **fixed: Any) -> dict:
        return {str(s): functools.partial(function, schedule=s, **fixed) for s in schedules}

    dtype = jnp.bfloat16
    w = _normal(1, (_N, _K), dtype, _K**-0.5)
    for m in _ROWS:
        x = _normal(0, (m, _K), dtype)
        listed = matmul.schedules(m, _N, _K, dtype, out_size=4)
        same = ways(matmul.matmul, listed, out_dtype=jnp.float32)
        yield _Group("matmul", f"{m} rows", same, (x, w))
        if not config.num_experts:
            listed = matmul.schedules(m, _N, _K, dtype, out_size=2, gated=True)
            yield _Group("gated_matmul", f"{m} rows", ways(gated.gated_matmul, listed), (x, w))
    scale, window = config.head_dim**-0.5, config.window(0)
    options = dict(scale=scale, kv_split=ops.contract.kv_split, sliding_window=window)
    for length in (1, 65):
        listed = attention.schedules(length, config.head_dim)
        same = ways(attention.attention, listed, **options)
        inputs = _attention_inputs(config, length, dtype)
        yield _Group("attention", f"{length} queries a row", same, inputs)
    # The heads' width has more schedules: many rows to a block.
    for dim in (config.head_dim, config.hidden_size):
        x, residual = (_normal(i, (_ROWS[-1], dim), dtype) for i in (0, 2))
        same = {
            str(s): lambda x, r, w, s=s: norm.rms_norm(x, w, eps=1e-5, residual=r, schedule=s)
            for s in norm.schedules(_ROWS[-1], dim)
        }
        yield _Group("rms_norm", f"width {dim}", same, (x, residual, _normal(1, (dim,), dtype)))
    kv_heads, dim = config.num_key_value_heads, config.head_dim
    width = (config.num_attention_heads + 2 * kv_heads) * dim
    norms = _normal(3, (2, dim), dtype) if config.qk_norm else (None, None)
    for length in _ROWS:
        angles = np.arange(length)[:, None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
        cos, sin = (jnp.asarray(f(angles), jnp.float32)[None] for f in (np.cos, np.sin))
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        cache = _normal(4, (1, kv_heads, -(-length // 64) * 64, dim), dtype)
        inputs = (_normal(0, (1, length, width), dtype), *norms, cos, sin, positions, cache, cache)
        same = ways(heads.qkv_heads, heads.SCHEDULES, eps=1e-6)
        yield _Group("qkv_heads", f"{length} tokens", same, inputs)
    if config.num_experts:
        yield from _mosaic_gpu_grouped(dtype)
        yield from _mosaic_gpu_route(config)


def _mosaic_gpu_route(config: Any) -> Iterator[_Group]:
    """Kernels and what XLA makes of `portable`, which takes over above their largest batch."""
    from jdet.pallas_kernels.route import mosaic_gpu as kernels
    from jdet.pallas_kernels.route import portable

    rows, experts, k = _ROWS[0], config.num_experts, config.num_experts_per_tok
    if not kernels.has_kernel(rows, experts, k):
        return

    def way(route: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
        # Without the plan of tiles, of which XLA has none here.
        return lambda x, routed: route(x, routed, k=k, normalise=True, **fixed)[:5]

    ways = {str(s): way(kernels.route, schedule=s) for s in kernels.SCHEDULES}
    inputs = (_normal(0, (rows, experts), jnp.float32), jnp.arange(rows) != 4)
    yield _Group("route", f"{rows} rows", {"portable": way(portable.route), **ways}, inputs)


def _mosaic_gpu_grouped(dtype: Any) -> Iterator[_Group]:
    from jdet.pallas_kernels.grouped_gated_matmul import mosaic_gpu as gated
    from jdet.pallas_kernels.grouped_matmul import mosaic_gpu as grouped

    x, w = _normal(0, (60, 520), dtype), _normal(1, (6, 400, 520), dtype, 520**-0.5)
    sizes = jnp.array([0, 1, 30, 7, 16, 3], jnp.int32)
    for name, function, is_gated in (
        ("grouped_matmul", grouped.grouped_matmul, False),
        ("grouped_gated_matmul", gated.grouped_gated_matmul, True),
    ):
        listed = grouped.schedules(out_size=2, gated=is_gated)
        ways = {str(s): functools.partial(function, schedule=s) for s in listed}
        yield _Group(name, "6 experts", ways, (x, w, sizes))


_FINDERS: dict[str, Callable[[Any, Ops], Iterator[_Group]]] = {
    "portable": _portable,
    "mosaic_gpu": _mosaic_gpu,
}
