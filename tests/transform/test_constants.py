"""Constants beside inputs under `jdet.batch_invariant`: XLA joins them for a row alone.

Wherever they come from: the function itself, a call or a loop within it, or whoever calls it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jdet

T, D = 3, 12
RANKS = np.arange(T * D).reshape(T, D)
TURNED = np.ascontiguousarray(RANKS[::-1])
RANDOM = np.random.default_rng(0).standard_normal((3, T, D), np.float32)
CONSTANTS = RANDOM[0], RANDOM[1], RANKS, TURNED


def bodies(x: Any, a: Any, b: Any, ranks: Any, turned: Any) -> dict[str, Any]:
    """Of x [B, T, D] and constants [T, D], what is written in any model."""
    first, second = ranks.astype(x.dtype), turned.astype(x.dtype)
    return {
        "sums": (x - a) + b,
        "products": x * a * b,
        "iota": x + jnp.arange(D, dtype=x.dtype) * 0.1 + b,
        "floats of integers": x * 0.3 + first / 7 + second / 3,
        "masks": jnp.where(ranks > 9, 0.1, 0.7) + x + jnp.where(turned > 20, 1.3, 0.37),
        # XLA's values of functions, when it computes them, are other ones than the program's.
        "functions": x + jnp.exp(first * -0.3) + jnp.log(second + 1),
    }


def summed(x: Any, *constants: Any) -> Any:
    """Of the shape of x, as a loop carries it."""
    return jnp.concatenate([y[..., :2] for y in bodies(x, *constants).values()], -1)


def twice(f: Callable[..., Any], x: Any, *constants: Any) -> Any:
    return lax.scan(lambda h, _: (f(h, *constants), None), x, length=2)[0]


def carried(f: Callable[..., Any], x: Any, *constants: Any) -> Any:
    """A loop that hands the constants on to itself."""
    state = 0, x, tuple(map(jnp.asarray, constants))
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1], *s[2]), s[2]), state)[1]


def returned(f: Callable[..., Any], x: Any, *constants: Any) -> Any:
    """By a call that makes them beside what is no constant."""
    y, made = jax.jit(lambda x: (x * 2, [jnp.asarray(c) for c in constants]))(x)
    return f(y, *made)


def branched(f: Callable[..., Any], x: Any, *constants: Any) -> Any:
    return lax.cond(x[0, 0, 0] < 99, f, lambda x, *_: x * 2, x, *constants)


PLACES: dict[str, Callable[..., Any]] = {
    "in itself": lambda f, x, *constants: f(x, *constants),
    "in a jit of a checkpoint": lambda f, *args: jax.checkpoint(lambda *a: jax.jit(f)(*a))(*args),
    "in a branch of a scan": lambda f, *args: twice(functools.partial(branched, f), *args),
    "in a while": carried,
    "out of a jit": returned,
}


def moved(f: Callable[[Any], Any]) -> set[Any]:
    """Which elements of the last axis have other bits in a row alone than among others."""
    x = np.random.default_rng(1).standard_normal((33, T, D), np.float32)
    alone, among = (np.asarray(jax.jit(f)(x[:n])[0]).view(np.int32) for n in (1, 33))
    return set(np.nonzero(alone != among)[-1] // 2)


@pytest.mark.parametrize("place", PLACES)
def test_constants_are_not_joined(place):
    """The control: plain XLA joins, or computes, each of them."""

    def f(x: Any) -> Any:
        return PLACES[place](summed, x, *CONSTANTS)

    assert not moved(jdet.batch_invariant(f))
    assert len(moved(f)) > 2


def test_constants_of_the_caller():
    """To the transformation they are inputs."""
    fixed = jdet.batch_invariant(summed)
    assert not moved(lambda x: fixed(x, *CONSTANTS))
    assert moved(lambda x: summed(x, *CONSTANTS))


def test_cotangents_that_are_constants():
    def read_thrice(x):
        return x + 0.5, x * 1.5, jnp.sin(x)

    def pulled(transform: Callable[..., Any], x: Any) -> Any:
        results, pull = jax.vjp(transform(read_thrice), x)
        cotangents = (jnp.broadcast_to(c, x.shape) for c in RANDOM)
        return pull(tuple(c for c, _ in zip(cotangents, results, strict=False)))[0]

    assert not moved(functools.partial(pulled, jdet.batch_invariant))
    assert moved(functools.partial(pulled, lambda f: f))


def test_what_a_barrier_hides():
    """Arrays of floats where they are born and what enters and leaves; no masks, no numbers."""

    def f(x):
        seen = jnp.where(jnp.tri(T, D, dtype=bool), x, 0)
        return seen + 0.5 + jnp.arange(D, dtype=x.dtype) * 0.1

    def barriers(jaxpr: Any) -> list[str]:
        found = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "optimization_barrier":
                found += [v.aval.str_short() for v in equation.outvars]
            for value in equation.params.values():
                found += barriers(value) if hasattr(value, "eqns") else []
        return found

    x = jnp.ones((2, T, D))
    made = jax.make_jaxpr(jdet.batch_invariant(f))(x)
    assert barriers(made) == [f"float32[2,{T},{D}]", f"float32[{D}]", f"float32[2,{T},{D}]"]


def test_a_donated_array_is_written_in_place():
    """A barrier is no copy."""
    step = jax.jit(
        jdet.batch_invariant(lambda cache, x: lax.dynamic_update_slice(cache, x, (3, 0))),
        donate_argnums=0,
    )
    cache, x = jax.ShapeDtypeStruct((512, 64), np.float32), np.ones((1, 64), np.float32)
    compiled = step.lower(cache, x).compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == 512 * 64 * 4
    assert analysis.temp_size_in_bytes < 512 * 64
    assert "f32[512,64]{1,0} copy(" not in (compiled.as_text() or "")
