"""Dots without the transpositions before and after them, under `jdet.batch_invariant`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

import jdet
from jdet.transform.transpositions import SHORT


def text(f, *args, **options):
    return str(jax.make_jaxpr(jdet.batch_invariant(f, **options))(*args))


def test_a_dot_reads_what_was_turned_for_it_as_it_lies():
    """Copying the weights of `x @ w.T` would cost more than the dot of few rows."""
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    assert "transpose" not in text(lambda x, w: x @ w.T, x, w)
    # Still read by another; and what would come out in another order.
    assert text(lambda x, w: (x @ w.T, w.T), x, w).count("transpose") == 1
    turned = text(lambda x, w: jnp.einsum("tbd,ed->tbe", x.swapaxes(0, 1), w), x[None], w)
    assert turned.count("transpose") == 1
    kept = jdet.batch_invariant(lambda x, w: x @ w.T, exclude=("dot_general",))
    assert "transpose" in str(jax.make_jaxpr(kept)(x, w))


def scores(q, k):
    return jnp.einsum("BTHGD,BSHD->BHGTS", q, k)


def queries_and_keys(batch, queries, keys, dim):
    q = np.ones((batch, queries, 2, 3, dim), np.float32)
    return q, np.ones((batch, keys, 2, dim), np.float32)


def test_a_kernel_writes_a_result_where_it_is_wanted():
    """XLA has its own dots write in any order, and is left that."""
    example = queries_and_keys(2, 5, 7, 16)
    after = re.compile(r"dot_general.*transpose", re.DOTALL)
    assert after.search(text(scores, *example))
    written = text(scores, *example, implementation="mosaic_gpu")
    assert not after.search(written) and written.count("transpose") == 1
    # Read by another too; and an operand too long to be turned.
    matrices = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    kernel = {"implementation": "mosaic_gpu"}
    assert "transpose" not in text(lambda x, w: (x @ w).T, *matrices, **kernel)
    assert "transpose" in text(lambda x, w: ((y := x @ w), y.T), *matrices, **kernel)
    long = queries_and_keys(2, 5, 7, SHORT + 1)
    assert after.search(text(scores, *long, **kernel))


def test_which_operand_comes_first_does_not_follow_other_extents():
    """A float32 product of a kernel is a sum of nine, in an order that is not the turned one's."""

    def order(*extents):
        made = text(scores, *queries_and_keys(*extents), implementation="mosaic_gpu")
        return re.findall(r"dimension_numbers=.*|\] (?:\w+ )*\w+$|permutation=\S+", made, re.M)

    few = order(1, 1, 1, 16)
    assert few
    for extents in ((1, 1, 13, 16), (1, 1, 16, 16), (3, 13, 13, 16), (8, 1, 2048, 16)):
        assert order(*extents) == few, extents


def test_turned_einsums_are_right():
    """Of integers, exact in any order."""
    rng = np.random.default_rng(0)
    turned = 0
    for _ in range(60):
        counts = rng.integers(0, 3, 4)
        names = np.split(np.array(list("abcdefgh"))[: counts.sum()], np.cumsum(counts)[:-1])
        batch, left, right, summed = (list(part) for part in names)
        extents = {name: int(rng.integers(1, 4)) for part in names for name in part}
        sides = [left, right] if rng.random() < 0.5 else [right, left]
        out = [*rng.permutation(batch), *(name for side in sides for name in rng.permutation(side))]
        terms = [rng.permutation(batch + side + summed) for side in (left, right)]
        values = [
            rng.integers(-3, 4, [extents[name] for name in term]).astype(np.float32)
            for term in terms
        ]
        form = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join(out)}"

        f = functools.partial(jnp.einsum, form)

        made = jax.make_jaxpr(jdet.batch_invariant(f, implementation="mosaic_gpu"))(*values)
        turned += str(made) != str(jax.make_jaxpr(jdet.batch_invariant(f))(*values))
        [result] = core.jaxpr_as_fun(made)(*values)
        np.testing.assert_array_equal(result, f(*values), form)
    assert turned > 9
