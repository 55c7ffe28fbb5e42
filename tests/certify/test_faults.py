"""Planted faults, each a bug that some inference engine has had, named by an instrument.

What they are: `assert_batch_invariant` must fail with the fault, `bisect` name its operation, and
both be silent on the same code without it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.certify import BatchVariance, assert_batch_invariant, audit, bisect

OPTIONS = jdet.compiler_options()
OPS = jdet.Ops("portable")
RNG = np.random.default_rng(0)
ROWS, WIDTH, KEYS = 3, 16, 24
X = jnp.asarray(RNG.standard_normal((ROWS, WIDTH)), jnp.float32)
SCORES = jnp.asarray(RNG.standard_normal((ROWS, KEYS)), jnp.float32)
LENGTHS = jnp.array([7, KEYS, 20])


@dataclasses.dataclass(frozen=True)
class Fault:
    """A function with the fault in it, one without, and what `bisect` must say."""

    name: str
    broken: Callable[..., Any]
    sound: Callable[..., Any]
    args: tuple[Any, ...]
    kind: str
    primitive: str
    batch_axes: Any = 0
    sizes: tuple[int, ...] = (1, 8)


def tree_sum(x: jax.Array) -> jax.Array:
    """A balanced tree of additions over the last axis, a power of two wide."""
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def in_tiles(values: jax.Array, tile: int) -> jax.Array:
    """Tiles summed as trees of their own order, tile after tile."""
    total = jnp.zeros(values.shape[:-1], values.dtype)
    for start in range(0, values.shape[-1], tile):
        part = values[..., start : start + tile]
        total = total + sum((part[..., i] for i in range(1, tile)), part[..., 0])
    return total


def masked(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(scores.shape[1]) < lengths[:, None], scores, 0)


def tile_by_longest(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    values = masked(scores, lengths)
    long = jnp.max(lengths) > 8
    return jax.lax.cond(long, lambda v: in_tiles(v, 8), lambda v: in_tiles(v, 4), values)


def terms(x: jax.Array) -> jax.Array:
    """Many sums a row: of one sum, two orders may give the same bits."""
    return x[:, None, :] * x[:, :, None]


def norm_by_rows(x: jax.Array) -> jax.Array:
    sums = in_tiles(terms(x), 8) if x.shape[0] >= 256 else tree_sum(terms(x))
    return x * jax.lax.rsqrt(jnp.abs(sums))


def noise(seed: jax.Array) -> jax.Array:
    """Of a request's own seed and the token: a few steps of a hash."""
    bits = jnp.arange(WIDTH, dtype=jnp.uint32) * jnp.uint32(40503)
    bits += seed.astype(jnp.uint32) * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def noise_by_rank(x: jax.Array, seeds: jax.Array, top_k: jax.Array) -> jax.Array:
    drawn = jax.vmap(noise)(seeds)
    # One mate that asks for top-k has the whole batch sorted.
    ranks = jnp.argsort(jnp.argsort(-x, -1), -1)
    by_rank = jnp.take_along_axis(drawn, ranks, -1)
    return x + jnp.where(jnp.any(top_k > 0), by_rank, drawn)


def noise_by_token(x: jax.Array, seeds: jax.Array, top_k: jax.Array) -> jax.Array:
    return x + jax.vmap(noise)(seeds)


def key_of_batch(x: jax.Array) -> jax.Array:
    return x + jax.random.gumbel(jax.random.key(7), x.shape)


def split_k(x: jax.Array) -> jax.Array:
    parts = 8 if x.shape[0] < 4 else 2
    return tree_sum(in_tiles(terms(x).reshape(len(x), WIDTH, parts, -1), 2))


def scale_of_batch(x: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.abs(x)) / 127
    return jnp.round(x / scale) * scale


def scale_of_row(x: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    return jnp.round(x / scale) * scale


def padding_in_group(x: jax.Array) -> jax.Array:
    """Groups of four rows, filled up with what the buffer held."""
    filled = jnp.pad(x, ((0, -len(x) % 4), (0, 0)), constant_values=77.0)
    groups = filled.reshape(-1, 4, WIDTH)
    scaled = groups / jnp.max(jnp.abs(groups), (1, 2), keepdims=True)
    return scaled.reshape(-1, WIDTH)[: len(x)]


def scatter_combine(x: jax.Array, expert: jax.Array) -> jax.Array:
    """A token's expert outputs, added in the order of how much each expert has to do."""
    load = jnp.bincount(expert.reshape(-1), length=4)
    order = jnp.argsort(load[expert], axis=-1)
    weights = jnp.array([1.0, 0.3, 1e-4, 7.0])[expert]
    outputs = jnp.take_along_axis(weights, order, -1)[..., None] * x[:, None] ** 3
    rows = jnp.repeat(jnp.arange(len(x)), 4)
    return jnp.zeros_like(x).at[rows].add(outputs.reshape(-1, WIDTH))


def fixed_combine(x: jax.Array, expert: jax.Array) -> jax.Array:
    weights = jnp.array([1.0, 0.3, 1e-4, 7.0])[expert]
    return in_tiles((weights[..., None] * x[:, None] ** 3).swapaxes(1, 2), 4)


def ring_sum(parts: jax.Array) -> jax.Array:
    """A device's part after the other, as a ring passes them on."""
    total = parts[:, 0]
    for i in range(1, parts.shape[1]):
        total = total + parts[:, i]
    return total


def all_reduce_by_size(parts: jax.Array) -> jax.Array:
    if parts.nbytes <= 2048:  # "one shot for short messages"
        return (parts[:, 0] + parts[:, 1]) + (parts[:, 2] + parts[:, 3])
    return ring_sum(parts)


def prefix_by_cascade(scores: jax.Array, cached: jax.Array) -> jax.Array:
    """Where some row has its prefix in the cache, all rows take the kernel for shared prefixes."""
    shared = jnp.any(cached > 0)
    return jax.lax.cond(shared, lambda v: in_tiles(v, 8), lambda v: in_tiles(v, 4), scores)


def excess_precision(x: jax.Array) -> jax.Array:
    """Rounded to bfloat16 between two kernels, but where few rows let them be one."""
    squares = terms(x)
    if len(x) >= 4:
        squares = squares.astype(jnp.bfloat16).astype(jnp.float32)
    return in_tiles(squares, 8)


def rounded(x: jax.Array) -> jax.Array:
    return in_tiles(terms(x).astype(jnp.bfloat16).astype(jnp.float32), 8)


def ties(x: jax.Array) -> jax.Array:
    coarse = jnp.round(x)
    if len(x) >= 4:  # "a faster one for many rows": of equal ones the last
        return WIDTH - 1 - jnp.argsort(coarse[:, ::-1], -1, descending=True)[:, :4]
    return jax.lax.top_k(coarse, 4)[1]


FAULTS = (
    Fault(
        "attention tile by the longest neighbour",
        tile_by_longest,
        lambda s, n: in_tiles(masked(s, n), 8),
        (SCORES, LENGTHS),
        "mixing",
        "reduce_max",
    ),
    Fault(
        "norm geometry changes at 256 rows",
        norm_by_rows,
        lambda x: x * jax.lax.rsqrt(jnp.abs(tree_sum(terms(x)))),
        (X,),
        "program",
        "",
        sizes=(2, 256),
    ),
    Fault(
        "noise by sorted rank where a mate asks for top-k",
        noise_by_rank,
        noise_by_token,
        (X, jnp.arange(ROWS), jnp.array([0, 40, 0])),
        "mixing",
        "reduce_or",
    ),
    Fault(
        "one key for the batch",
        key_of_batch,
        lambda x: x + noise(jnp.array(3)),
        (X,),
        "made",
        "random_bits",
    ),
    Fault(
        "split-K by the number of rows", split_k, lambda x: in_tiles(terms(x), 8), (X,), "recut", ""
    ),
    Fault(
        "activation scale of the batch", scale_of_batch, scale_of_row, (X,), "mixing", "reduce_max"
    ),
    Fault(
        "padding leaks into a group",
        padding_in_group,
        lambda x: x / jnp.max(jnp.abs(x), -1, keepdims=True),
        (X,),
        "mixing",
        "reduce_max",
    ),
    Fault(
        "scatter-add combine in the order of the load",
        scatter_combine,
        fixed_combine,
        (X, jnp.asarray(np.stack([RNG.permutation(4) for _ in range(ROWS)]))),
        "mixing",
        "scatter-add",
    ),
    Fault(
        "all-reduce by the message's size",
        all_reduce_by_size,
        ring_sum,
        (jnp.asarray(RNG.standard_normal((ROWS, 4, 64)), jnp.float32),),
        "program",
        "add",
    ),
    Fault(
        "a mate's hit of the prefix cache takes another path",
        prefix_by_cascade,
        lambda scores, cached: in_tiles(scores, 8),
        (SCORES, jnp.array([0, 16, 0])),
        "mixing",
        "reduce_or",
    ),
    Fault("excess precision", excess_precision, rounded, (X,), "program", "convert_element_type"),
    Fault("ties of top-k", ties, lambda x: jax.lax.top_k(jnp.round(x), 4)[1], (X,), "program", ""),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_planted_fault_is_caught_and_named(fault: Fault) -> None:
    with pytest.raises(BatchVariance) as caught:
        assert_batch_invariant(
            fault.broken,
            fault.args,
            batch_axes=fault.batch_axes,
            sizes=fault.sizes,
            compiler_options=OPTIONS,
        )
    error = caught.value
    found = bisect(
        fault.broken,
        error.alone,
        error.batch,
        0,
        error.row,
        batch_axes=fault.batch_axes,
        compiler_options=OPTIONS,
    )
    assert found.kind == fault.kind, str(found)
    assert fault.primitive in found.primitive, str(found)
    named = " ".join((found.source, *found.unread, found.reaches))
    assert f"({fault.broken.__name__}" in named or "(in_tiles" in named, str(found)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_without_it_there_is_no_alarm(fault: Fault) -> None:
    assert_batch_invariant(
        fault.sound,
        fault.args,
        batch_axes=fault.batch_axes,
        sizes=fault.sizes,
        compiler_options=OPTIONS,
    )


@pytest.mark.parametrize(
    ("broken", "args", "kind", "op"),
    [
        (scale_of_batch, (X,), "batch", "reduce_max"),
        (scatter_combine, (X, jnp.zeros((ROWS, 4), jnp.int32)), "scatter", "scatter-add"),
        (tile_by_longest, (SCORES, LENGTHS), "batch", "reduce_max"),
    ],
)
def test_the_audit_sees_it_without_running(
    broken: Callable[..., Any], args: tuple[Any, ...], kind: str, op: str
) -> None:
    def arguments(n: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x in args]

    found = audit(broken, arguments, (2, 8), compiler_options=OPTIONS)
    assert (kind, op) in [(f.kind, f.op) for f in found.findings], str(found)
