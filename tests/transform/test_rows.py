"""A row's bits under `jdet.batch_invariant` at many batch sizes, and that plain jax moves them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from jax import lax

import jdet
from jdet.testing.programs import RandomProgram, random_program
from jdet.transform import reductions

SIZES = (1, 2, 7, 9, 33, 65)
T, D = 5, 96


@functools.cache
def weights(*shape: int) -> Any:
    return np.random.default_rng(shape).standard_normal(shape, np.float32) / np.sqrt(shape[0])


@jax.custom_jvp
def log_cosh(x):
    return x + jax.nn.softplus(-2.0 * x)


log_cosh.defjvp(lambda p, t: (log_cosh(*p), jnp.tanh(p[0]) * t[0]))


@jax.custom_vjp
def normed(x):
    return x / (x * x).sum(-1, keepdims=True)


normed.defvjp(lambda x: (normed(x), x), lambda x, g: (g / (x * x).sum(-1, keepdims=True),))


def scan_cell(h, x):
    h = jnp.tanh(h @ weights(D, D) + x)
    return h, h.sum(-1)


def rope(x):
    """Two products that meet in a sum: LLVM joins one of them with it."""
    half = D // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    angle = jnp.arange(D, dtype=jnp.float32) * 0.1
    return jnp.repeat(normed(x) * jnp.cos(angle) + normed(turned) * jnp.sin(angle), 2, axis=1)


# Of x [B, T, D], each row of the result from that row alone.
PROGRAMS = {
    "dot, batch on the left": lambda x: x @ weights(D, 40),
    "dot, batch on the right": lambda x: jnp.einsum("ed,btd->bet", weights(40, D), x),
    "dot, batch in a batch dimension": lambda x: jnp.einsum("btd,bsd->bts", x, x),
    "dot, one column": lambda x: x @ weights(D),
    "dot of vmap": jax.vmap(lambda row: weights(1000, D) @ row[0]),
    "dot, weights turned": lambda x: x @ weights(40, D).T,
    "dot, weights turned twice": lambda x: x @ jnp.transpose(weights(40, D).T.T),
    "dot, rows turned": lambda x: jnp.einsum("bdt,de->bte", x.swapaxes(1, 2), weights(40, D).T),
    "dot, K past 1024": lambda x: jnp.tile(x, (1, 1, 12)) @ weights(12 * D, 40),
    "einsum over two axes": lambda x: jnp.einsum("btd,tde->be", x, weights(T, D, 7)),
    "sums": lambda x: x.sum(-1) + x.mean((1, 2))[:, None] - x.std(-1),
    "softmax": lambda x: jax.nn.log_softmax(x, -1) + jax.nn.softmax(x, 1),
    "cumulative": lambda x: jnp.cumsum(x, -1) + lax.cumlogsumexp(x, axis=1),
    "conv": lambda x: lax.conv_general_dilated(
        x, weights(3, D, 8), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "depthwise conv": lambda x: lax.conv_general_dilated(
        x,
        weights(3, 1, D),
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=D,
    ),
    "scatter": jax.vmap(lambda row: jnp.zeros((3, D)).at[jnp.array([0, 1, 1, 2, 1])].add(row)),
    "sort, top_k and argmax": lambda x: (
        lax.top_k(jnp.sort(x, axis=1), 3)[0] + x.argmax(-1)[..., None].astype(x.dtype)
    ),
    # By the reciprocal, where the divisor is constant or broadcast: by the shapes, to plain XLA.
    "divisions": lambda x: x[:, :1] / lax.optimization_barrier(jnp.arange(1, D + 1.0)),
    "scan": lambda x: lax.scan(scan_cell, x[:, 0], x.swapaxes(0, 1))[1].T,
    "while": lambda x: lax.fori_loop(0, 2, lambda i, y: jnp.sin(y @ weights(D, D)), x),
    "cond and jit": lambda x: lax.cond(True, jax.jit(lambda y: y @ weights(D, D)), jnp.exp, x),
    "checkpoint": jax.checkpoint(lambda x: jax.nn.gelu(x @ weights(D, D)).sum(-1)),
    "custom derivatives": lambda x: log_cosh(x) + normed(x),
    "attention": lambda x: jax.nn.dot_product_attention(*[x[:, :, None]] * 3),
    "rope": rope,
    "bfloat16": lambda x: (x.astype(jnp.bfloat16) @ weights(D, 40).astype(jnp.bfloat16)).sum(-1),
    # AMX takes 32 of K at once.
    "bfloat16, a rest of K": lambda x: (
        x[..., :48].astype(jnp.bfloat16) @ weights(48, 40).astype(jnp.bfloat16)
    ).astype(jnp.float32),
}


def rows(size: int) -> np.ndarray:
    """Row 0 is the same for every size."""
    made = [np.random.default_rng(i).standard_normal((T, D), np.float32) for i in range(size)]
    return np.stack(made)


def patterns(f, place=lambda size: size // 2) -> int:
    """How many bit patterns row 0 has over the batch sizes, among other rows."""
    found = set()
    for size in SIZES:
        x = rows(size)
        at = place(size)
        x[[0, at]] = x[[at, 0]]
        found.add(np.asarray(f(x)[at]).tobytes())
    return len(found)


def gradient(f):
    """Of a scalar of each row, by that row: a square's, since XLA's own tanh follows the shape."""
    return lambda x: jax.grad(lambda x: jnp.square(f(x).astype(jnp.float32)).sum())(x)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_row_keeps_its_bits(name):
    f = PROGRAMS[name]
    fixed = jax.jit(jdet.batch_invariant(f))
    assert patterns(fixed) == 1
    made, plain = fixed(rows(3)), jax.jit(f)(rows(3))
    assert (made.dtype, made.shape, made.weak_type) == (plain.dtype, plain.shape, plain.weak_type)
    rough = plain.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(made, np.float32),
        np.asarray(plain, np.float32),
        rtol=2**-6 if rough else 1e-4,
        atol=0.1 if rough else 1e-4,
    )


SUMMED = ("dot, batch on the right", "softmax", "conv", "scatter", "scan", "custom derivatives")


@pytest.mark.parametrize("name", SUMMED)
def test_a_gradient_keeps_its_bits(name):
    """Taken outside of the transformation, and inside; the two have the same bits."""
    f = PROGRAMS[name]
    outside = jax.jit(gradient(jdet.batch_invariant(f)))
    inside = jax.jit(jdet.batch_invariant(gradient(f)))
    assert patterns(outside) == patterns(inside) == 1
    x = rows(3)
    np.testing.assert_allclose(outside(x), jax.jit(gradient(f))(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outside(x), inside(x), rtol=1e-3, atol=1e-4)


def test_vmap_and_jvp_outside():
    row = jdet.batch_invariant(lambda x: jax.nn.softmax(x @ weights(D, 40), -1).sum(0))
    assert patterns(jax.jit(jax.vmap(row))) == 1
    assert patterns(jax.jit(lambda x: jax.vmap(lambda r: jax.jvp(row, (r,), (r,))[1])(x))) == 1


def test_padding_behind_the_last_element_changes_nothing():
    """Sums by absolute places: masked keys of another bucket."""

    def attend(x, bucket):
        x = jnp.pad(x, ((0, 0), (0, bucket - T), (0, 0)))
        scores = jnp.einsum("bqd,bkd->bqk", x[:, :T], x)
        scores = jnp.where(jnp.arange(bucket) < T, scores, -jnp.inf)
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, -1), x)

    f = jax.jit(jdet.batch_invariant(attend), static_argnums=1)
    found = {np.asarray(f(rows(3), bucket)).tobytes() for bucket in (T, 8, 16, 17, 40)}
    assert len(found) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_writing_partial_sums_changes_nothing(axis):
    """On a GPU arrays of more than 2**20 elements are written on the way; the tree is one."""
    x = np.random.default_rng(0).standard_normal((1100, 1021), np.float32)
    sums = {}
    for platform in ("cpu", "cuda"):
        for rows in (3, 1100):
            part = np.moveaxis(x[:rows], 1, axis)
            f = jax.jit(lambda x, p=platform: reductions.reduce_axes(x, (axis,), "sum", p))
            sums[platform, rows] = np.asarray(f(part))
            wrote = "f32[70401]" in (f.lower(part).compile().as_text() or "")
            assert wrote == (platform == "cuda" and rows == 1100)
    assert len({made[:3].tobytes() for made in sums.values()}) == 1
    np.testing.assert_array_equal(sums["cpu", 1100], sums["cuda", 1100])


def test_nan_in_other_rows_stays_there():
    x = rows(9)
    x[1:] = np.nan
    for name in ("dot, batch on the right", "conv", "scatter", "attention"):
        f = jax.jit(jdet.batch_invariant(PROGRAMS[name]))
        assert np.asarray(f(x)[0]).tobytes() == np.asarray(f(rows(1))[0]).tobytes()


def test_negative_control():
    """Plain jax moves bits of most of these programs, and of their gradients."""
    moved = [name for name, f in PROGRAMS.items() if patterns(jax.jit(f)) > 1]
    assert len(moved) >= len(PROGRAMS) // 2, moved
    assert any(patterns(jax.jit(gradient(PROGRAMS[name]))) > 1 for name in SUMMED)


def same_row(f: Any, program: RandomProgram) -> bool:
    found = {np.asarray(f(program.rows(0, size))[0]).tobytes() for size in (1, 2, 9, 33)}
    return len(found) == 1


@settings(max_examples=6, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_random_programs(data):
    """A share of scripts/check_transform.py, which draws 500 and their gradients."""
    program = random_program(lambda options: data.draw(st.sampled_from(options)), 0)
    note(str(program))
    assert same_row(jax.jit(program.under(jdet.batch_invariant)), program)


# Of programs that once moved, what was drawn.
MOVED = {
    # A sum of cotangents, which jax adds itself, kept more bits where XLA fused it.
    109: """bfloat16 2 24 5 _control scan _dense 3 vmap _window dilated 4 16 _dense 3 flat
        _control checkpoint""",
    # A division by a constant became a product, and that product a part of an FMA.
    138: """float32 7 24 4 _norm log_softmax _norm layer _attention einsum 2 _attention sdpa 3""",
}


@pytest.mark.parametrize("seed", MOVED)
def test_programs_that_moved(seed):
    drawn = iter(MOVED[seed].split())

    def pick(options: Any) -> Any:
        name = next(drawn, "()")
        return next(o for o in options if getattr(o, "__name__", str(o)) == name)

    program = random_program(pick, seed)
    fixed = jdet.batch_invariant(program)
    assert same_row(jax.jit(lambda x: jax.vjp(fixed, x)[1](jnp.sin(fixed(x)))[0]), program)


def test_a_reduction_of_the_users_own():
    """Its start counts once, whatever the extent."""

    def joined(x):
        return lax.reduce(x, np.float32(3), lambda a, b: a + b + a * b * 0, (1,))

    x = rows(3)[:, 0, :7]
    made = jax.jit(jdet.batch_invariant(joined))(x)
    np.testing.assert_allclose(made, 3 + x.sum(1), rtol=1e-5)
