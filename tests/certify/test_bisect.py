"""bisect: the first operation that differs, alone or in its program, wherever it stands."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.certify import bisect

WIDTH = 256
RNG = np.random.default_rng(0)
BATCH = jnp.asarray(RNG.standard_normal((8, WIDTH)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((WIDTH, WIDTH)) / 16, jnp.float32)
ROW = 3


def between(fn: Callable[..., Any], x: jax.Array = BATCH, w: jax.Array = W, **kwargs: Any):
    """Row 3 alone and among the others."""
    return bisect(fn, (x[ROW : ROW + 1], w), (x, w), 0, ROW, batch_axes=(0, None), **kwargs)


def mlp(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.nn.silu(jax.nn.relu(x * 2) @ w)


def looped(x: jax.Array, w: jax.Array) -> jax.Array:
    def body(h: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return h * 0.5 + h @ w, None

    return jax.lax.scan(body, x, None, length=3)[0]


def while_looped(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def branched(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(w[0, 0] > 9, lambda v: v, lambda v: v @ w, x)


@jax.custom_vjp
def custom(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


custom.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, None))


def wrapped(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda v: jax.jit(custom)(v + 1, w))(x)


@pytest.mark.parametrize(
    ("fn", "path"),
    [
        (mlp, ()),
        (looped, ("scan[0]",)),
        (while_looped, ("while[0]",)),
        (branched, ("cond[0]",)),
        (wrapped, ()),
    ],
)
def test_a_product_is_found(fn: Callable[..., Any], path: tuple[str, ...]) -> None:
    found = between(fn)
    assert (found.kind, found.primitive) == ("operation", "dot_general"), str(found)
    assert found.shapes == ((1, WIDTH), (8, WIDTH)) and found.dtype == "float32"
    assert found.source.startswith(__file__) and found.in_program == "differs"
    assert [p.split(" ")[0] for p in found.path] == list(path)
    assert found.difference is not None and found.difference.max_ulps >= 1
    assert 0 < found.difference.share <= 1
    assert "run alone" not in str(found) and "runs alone, on equal inputs" in str(found)


def test_with_jdet_ops_nothing_is_found() -> None:
    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(jdet.Ops("portable").matmul(x, w))

    assert between(ours, compiler_options=jdet.compiler_options()).kind == "none"
    assert str(between(lambda x, w: x * 2 + w[0])) == "the rows agree in every bit"


def test_only_in_the_compiled_program() -> None:
    """At one row XLA takes a product in float32 and drops the rounding to bfloat16."""

    def rounded(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w).astype(jnp.float32) * 3

    x, w = BATCH.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    # In float32 products of bfloat16 numbers of few bits are exact: no order can show.
    x, w = jnp.round(x * 4) / 4, jnp.round(w * 64) / 64
    found = between(rounded, x, w)
    assert (found.kind, found.primitive) == ("fusion", "convert_element_type"), str(found)
    assert found.source.startswith(__file__)
    assert found.in_program == "differs"
    assert "fusion context" in str(found)
    assert between(rounded, x, w, compiler_options={"xla_allow_excess_precision": False}).kind == (
        "none"
    )


def test_rows_are_followed_through_merges_padding_and_cuts() -> None:
    def tokens(x: jax.Array, w: jax.Array) -> jax.Array:
        merged = x.reshape(-1, WIDTH)  # rows and positions in one axis
        padded = jnp.pad(merged, ((0, 7), (0, 0)))
        rounded = (padded * 3)[: len(merged)].reshape(x.shape)
        first = rounded.transpose(1, 0, 2)[0] + 1
        return first @ w

    found = between(tokens, jnp.stack([BATCH, BATCH + 1], 1))
    assert (found.kind, found.primitive) == ("operation", "dot_general")
    assert found.skipped == () and found.unread == ()


def tiles_of(x: jax.Array) -> jax.Array:
    """Four rows to a tile, the last one padded: the rows stand on two axes."""
    return jnp.pad(x, ((0, -len(x) % 4), (0, 0))).reshape(-1, 4, WIDTH)


def tile_maximum(x: jax.Array, w: jax.Array) -> jax.Array:
    tiles = tiles_of(x + 1)
    return (tiles * jnp.max(tiles, (1, 2), keepdims=True)).reshape(-1, WIDTH)[: len(x)]


def tile_product(x: jax.Array, w: jax.Array) -> jax.Array:
    tiles = tiles_of(x)
    # Through a product over tiles, with which nothing is wrong, and axes that change places.
    same = (tiles.transpose(2, 0, 1) * 2 / 2).transpose(1, 2, 0)
    return jnp.tanh(same.reshape(-1, WIDTH)[: len(x)]) @ w


@pytest.mark.parametrize("rows", [4, 7, 8])
@pytest.mark.parametrize(
    ("fn", "kind", "primitive"),
    [(tile_maximum, "mixing", "reduce_max"), (tile_product, "operation", "dot_general")],
)
def test_rows_on_two_axes_are_followed(
    fn: Callable[..., Any], kind: str, primitive: str, rows: int
) -> None:
    found = between(fn, BATCH[:rows])
    assert (found.kind, found.primitive) == (kind, primitive), str(found)
    assert found.unread == () and found.skipped == ()
    assert kind != "mixing" or found.reaches.startswith("mul at ")


def test_rows_that_cannot_be_followed_are_reported() -> None:
    def tiled(x: jax.Array, w: jax.Array) -> jax.Array:
        tiles = jax.lax.map(lambda tile: tile * jnp.max(tile), tiles_of(x))
        return (tiles + 1).reshape(-1, WIDTH)[: len(x)]

    found = between(tiled)
    assert found.kind == "between", str(found)
    assert any(s.startswith("scan at ") for s in found.unread), found.unread
    assert set(found.unread) <= set(found.skipped)


def test_a_difference_that_reaches_no_result_is_not_the_one() -> None:
    def gathered(x: jax.Array, w: jax.Array) -> jax.Array:
        unused = jnp.max(x) * 0  # differs in no result
        chosen = x[jnp.arange(len(x)), jnp.argmax(w[: len(x)] * 0, -1)]  # rows by their numbers
        return (x + unused) @ w + chosen[:, None]

    found = between(gathered)
    assert (found.kind, found.primitive) == ("operation", "dot_general"), str(found)


def test_equal_batch_sizes_and_other_axes() -> None:
    a = BATCH.T
    b = jnp.roll(a, 2, axis=1) * jnp.where(jnp.arange(8) == ROW + 2, 1.0, 9.0)

    def mixed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x / jnp.abs(x).sum()
        return y, y.sum()

    found = bisect(mixed, (a,), (b,), ROW, ROW + 2, batch_axes=1, out_axes=(1, None))
    assert (found.kind, found.primitive) == ("mixing", "reduce_sum")
    assert found.reaches.startswith("div at ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row_a": 1}, "row_a=1 is not in a batch of 1 rows"),
        ({"row_b": 4}, "array 0 of the arguments: the row differs, first at index"),
        ({"args_b": (BATCH, W + 1)}, "array 1 of the arguments: what all rows share differs"),
        ({"out_axes": 1}, "does not hold the batch's 1 rows"),
        ({"fn": lambda x, w: np.asarray(x)}, "cannot be traced: TracerArrayConversionError"),
        ({"batch_axes": (None, None)}, "args_a: no batch axis"),
        (
            {"fn": functools.partial(jax.jit(lambda x, w, n: x * n, static_argnames="n"), n=2)},
            None,
        ),
    ],
)
def test_bad_input(change: dict[str, Any], said: str | None) -> None:
    given = {
        "fn": mlp,
        "args_a": (BATCH[ROW : ROW + 1], W),
        "args_b": (BATCH, W),
        "row_a": 0,
        "row_b": ROW,
        "batch_axes": (0, None),
    }
    if said is None:
        assert bisect(**{**given, **change}).kind == "none"
        return
    with pytest.raises(ValueError, match=said):
        bisect(**{**given, **change})
