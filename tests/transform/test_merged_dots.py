"""Dots of one left operand in one launch, and slices that a kernel could not read in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.transform.merged_dots import MOST

kernels = functools.partial(jdet.batch_invariant, implementation="mosaic_gpu")


def text(f, *args):
    return str(jax.make_jaxpr(kernels(f))(*args))


@pytest.fixture(scope="module")
def operands():
    """x, and matrices of 2 x 3, 5 and 6 columns."""
    shapes = (3, 7, 16), (16, 2, 3), (16, 5), (16, 6)
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)


def projections(x, a, b, c):
    q = jnp.einsum("...d,dhe->...he", x, a)
    k = x @ b
    return jnp.tanh(q), k, x @ c + jnp.tanh(x @ c)


def loss(*args):
    return sum(jnp.sum(jnp.sin(y)) for y in projections(*args))


def test_projections_of_one_array_are_made_together(operands):
    made = text(projections, *operands)
    assert made.count("invariant_merged_dots") == 1 and "invariant_dot_general" not in made
    # XLA merges its own.
    portable = jax.make_jaxpr(jdet.batch_invariant(projections, implementation="portable"))
    assert "invariant_merged_dots" not in str(portable(*operands))


def test_no_more_than_a_few_are_together(operands):
    x, _, b, _ = operands
    made = text(lambda x, b: [x @ (i * b) for i in range(2 * MOST + 1)], x, b)
    assert made.count("invariant_merged_dots") == 0  # each is made when its own matrix is
    bs = tuple(i * b for i in range(2 * MOST + 1))
    made = text(lambda x, *bs: [x @ b for b in bs], x, *bs)
    assert made.count("invariant_merged_dots") == 2 and made.count("invariant_dot_general") == 1


@pytest.mark.parametrize(
    "f",
    [
        lambda x, a, b, c: (x @ b, (x + 1) @ c),  # other rows
        lambda x, a, b, c: ((y := x @ b), x @ (c * jnp.sum(y))),  # made from the first
        lambda x, a, b, c: (x @ b, None if (x @ c) is None else 0),  # nobody reads the other
        lambda x, a, b, c: (x @ b, x.swapaxes(1, 2) @ x[..., :2]),  # of a batch, contracted by rows
        lambda x, a, b, c: (x @ b, x.astype(jnp.float16) @ c.astype(jnp.float16)),
    ],
)
def test_others_are_not(operands, f):
    assert "invariant_merged_dots" not in text(f, *operands)


def test_each_is_listed_with_its_line(operands):
    explain = jdet.batch_invariant.explain
    counts = [
        [entry.primitive for entry in explain(projections, implementation=i)(*operands).entries]
        for i in ("portable", "mosaic_gpu")
    ]
    assert sorted(counts[0]) == sorted(counts[1]) and counts[0].count("dot_general") == 4


def test_bits_and_derivatives_are_those_of_the_dots_apart(operands, assert_same_bits):
    def results(f, total):
        tangents = jax.tree.map(jnp.cos, operands)
        yield from f(*operands)
        yield from jax.jvp(f, operands, tangents)[1]
        yield from jax.grad(total, argnums=(1, 2, 3))(*operands)
        yield from jax.vmap(f, in_axes=(1, None, None, None))(*operands)
        yield from jax.vmap(f, in_axes=(None, None, -1, None))(
            *operands[:2], jnp.stack([operands[2], operands[3][:, :5]], -1), operands[3]
        )

    def of(implementation):
        kind = functools.partial(jdet.batch_invariant, implementation=implementation)
        return list(results(kind(projections), kind(loss)))

    for apart, together in zip(of("portable"), of("mosaic_gpu"), strict=True):
        assert_same_bits(together, apart)


def test_no_result_waits_for_a_tangent(operands):
    x, _, b, c = operands
    primal, linear = jax.linearize(lambda x: kernels(projections)(x, *operands[1:]), x)
    assert len(primal) == 3 and "invariant_merged_dots" not in str(jax.make_jaxpr(linear)(x))
    # Tangents are multiplied by the same x.
    tangents = kernels(lambda b, c: jax.jvp(lambda b, c: (x @ b, x @ c), (b, c), (b, c)))
    assert str(jax.make_jaxpr(tangents)(b, c)).count("invariant_merged_dots") == 1
    assert len(jax.linearize(tangents, b, c)[0]) == 2


def test_a_matrix_without_columns(operands, assert_same_bits):
    x, _, b, _ = operands
    empty, made = jax.jit(kernels(lambda x, b: (x @ b[:, :0], x @ b)))(x, b)
    assert empty.shape == (3, 7, 0)
    assert_same_bits(made, jax.jit(jdet.batch_invariant(lambda x, b: x @ b))(x, b))


def test_a_linear_function_is_transposed(operands, assert_same_bits):
    x, _, b, c = operands
    pair = lambda x: (x @ b, x @ c)  # noqa: E731
    cotangents = [(1 + jnp.arange(3 * 7 * n, dtype=jnp.float32)).reshape(3, 7, n) for n in (5, 6)]
    both = [
        jax.linear_transpose(jdet.batch_invariant(pair, implementation=i), x)(tuple(cotangents))
        for i in ("portable", "mosaic_gpu")
    ]
    assert_same_bits(*(of[0] for of in both))


@pytest.mark.parametrize(
    ("cut", "barriers"),
    [
        (lambda w: w[1:], 1),  # begins at 64 bytes
        (lambda w: w[4:], 0),  # at 256
        (lambda w: w[:, 1:], 0),  # no one run of elements
        (lambda w: w[::2], 0),
        (lambda w: jnp.split(w, (1, 4))[1], 1),
        (lambda w: jax.lax.dynamic_slice(w, (2, 0), (3, 16)), 1),
    ],
)
def test_a_slice_that_begins_between_addresses_is_written(cut, barriers):
    w = np.ones((8, 16), np.float32)
    made = text(lambda x, w: x @ cut(w).T, np.ones((2, cut(w).shape[1]), np.float32), w)
    # Whatever enters and leaves stands behind one.
    assert made.count("optimization_barrier") == barriers + 3
