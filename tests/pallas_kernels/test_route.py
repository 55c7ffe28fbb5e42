"""Routing: the right experts with the right weights, ties by index, and no token sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels import route as module

TOKENS, EXPERTS, K = 65, 16, 4


@pytest.fixture(scope="module")
def logits(normal):
    """65 rows with all kinds of ties, all zeros among them, and logits of which most vanish."""
    x = normal(0, (TOKENS, EXPERTS), np.float32) * 3
    x[1] = 0
    x[2] = np.repeat(x[2, :4], 4)
    x[3, 5:] = x[3, 5]
    x[4] = np.round(x[4])
    x[5, :14] -= 200
    return x


@pytest.fixture(scope="module")
def route(op):
    """route(implementation)(logits, routed), all tokens routed by default; k = 4."""

    def of(implementation, normalise=True):
        run = op("route", implementation)

        def call(logits, routed=None):
            routed = np.ones(len(logits), bool) if routed is None else routed
            return run(logits, routed, k=K, normalise=normalise)

        return call

    return of


def probabilities(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("normalise", [True, False])
def test_right(route, implementation, logits, normalise):
    r = route(implementation, normalise)(logits)
    p = probabilities(logits)
    # In float32 what vanishes are ties at zero: compare where numbers are.
    p[p < 1e-38] = 0
    want = np.sort(np.argsort(-p, axis=-1, kind="stable")[:, :K], axis=-1)
    np.testing.assert_array_equal(r.experts, want)
    weights = np.take_along_axis(p, want, -1)
    if normalise:
        weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(r.weights, weights, rtol=1e-5, atol=1e-37)
    assert r.weights.dtype == jnp.float32


def test_rows_are_the_tokens_sorted_by_expert(route, implementation, logits):
    r = route(implementation)(logits)
    experts, places = np.asarray(r.experts), np.asarray(r.places)
    np.testing.assert_array_equal(r.sizes, np.bincount(experts.reshape(-1), minlength=EXPERTS))
    assert sorted(places.reshape(-1)) == list(range(TOKENS * K))
    by_row = np.empty(TOKENS * K, np.int32)
    by_row[places] = experts
    assert (np.diff(by_row) >= 0).all()
    tokens = np.asarray(r.tokens)
    np.testing.assert_array_equal(tokens[places], np.arange(TOKENS)[:, None].repeat(K, 1))
    assert all((np.diff(tokens[by_row == e]) > 0).all() for e in range(EXPERTS))


def test_tokens_that_are_not_routed_are_in_no_group(
    route, implementation, logits, assert_same_bits
):
    """Whatever their logits are; the others are routed as if these were not there."""
    routed = np.ones(TOKENS, bool)
    routed[[0, 7, 64]] = False
    poisoned = np.where(routed[:, None], logits, np.nan)
    r, clean = route(implementation)(poisoned, routed), route(implementation)(logits)
    assert (np.asarray(r.experts)[~routed] == EXPERTS).all()
    assert (np.asarray(r.weights)[~routed] == 0).all()
    assert np.sum(r.sizes) == routed.sum() * K
    assert (np.asarray(r.places)[~routed] >= routed.sum() * K).all()
    for name in ("experts", "weights"):
        mine, theirs = (np.asarray(getattr(x, name))[routed] for x in (r, clean))
        assert_same_bits(mine, theirs, name)


def test_nan_keeps_to_its_token(route, invariant, logits, assert_same_bits):
    poisoned = logits.copy()
    poisoned[[3, 40], [0, 9]] = np.nan
    clean, r = route(invariant)(logits), route(invariant)(poisoned)
    assert np.isnan(np.asarray(r.weights)[[3, 40]]).all()
    assert (np.asarray(r.experts)[[3, 40]] == np.arange(K)).all()
    keep = np.setdiff1d(np.arange(TOKENS), [3, 40])
    for name in ("experts", "weights"):
        assert_same_bits(
            np.asarray(getattr(r, name))[keep], np.asarray(getattr(clean, name))[keep], name
        )


def test_token_does_not_follow_the_batch(route, invariant, few_rows, logits, assert_rows_alike):
    sizes = [m for m in (*few_rows, 31) if m <= TOKENS]

    def chosen(x):
        r = route(invariant)(x)
        return r.experts, r.weights

    assert_rows_alike(chosen, (logits,), sizes)


@pytest.fixture(scope="module")
def given(normal):
    """What 65 tokens' experts gave, [260, 576], in shuffled rows; weights; places."""
    rng = np.random.default_rng(1)
    y = normal(2, (TOKENS * K, 576), np.float32)
    places = rng.permutation(TOKENS * K).astype(np.int32).reshape(TOKENS, K)
    return y, rng.random((TOKENS, K), np.float32), places


def test_sum_is_rounded_where_it_says(op, invariant, dtype, given, assert_same_bits):
    """Each product, each addition, and the result: numpy rounds at the same places, and only
    there, so no product is joined with an addition."""
    y, weights, places = given
    y = y.astype(dtype)
    total = np.zeros((TOKENS, 576), np.float32)
    for j in range(K):
        product = y[places[:, j]] * weights[:, j, None].astype(dtype)
        total = total + product.astype(np.float32)
    assert_same_bits(op("expert_sum", invariant)(y, weights, places), total.astype(dtype))


def test_sum_is_right(op, implementation, dtype, given):
    y, weights, places = given
    got = np.asarray(op("expert_sum", implementation)(y.astype(dtype), weights, places))
    assert got.dtype == dtype
    want = np.einsum("mkd,mk->md", y[places].astype(np.float64), weights.astype(np.float64))
    eps = float(jnp.finfo(dtype).eps)
    size = np.einsum("mkd,mk->md", abs(y[places]), weights)
    assert (abs(got.astype(np.float64) - want) <= 3 * eps * size).all()


def test_sum_does_not_follow_the_batch(op, invariant, dtype, few_rows, given, assert_rows_alike):
    y, weights, places = given
    y, run = y.astype(dtype), op("expert_sum", invariant)
    sizes = [m for m in (*few_rows, 31) if m <= TOKENS]
    assert_rows_alike(lambda w, at: run(y, w, at), (weights, places), sizes)


def test_norm_is_that_of_the_sum(op, invariant, dtype, given, normal, assert_same_bits):
    y, weights, places = given
    y, residual = y.astype(dtype), normal(3, (TOKENS, 576), dtype)
    weight = normal(4, (576,), dtype)
    got = op("expert_norm", invariant)(y, weights, places, weight, residual, eps=1e-5)
    total = op("expert_sum", invariant)(y, weights, places)
    want = op("rms_norm", invariant)(total, weight, eps=1e-5, residual=residual)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_rows_are_counted_and_sorted_alike(monkeypatch, logits, assert_same_bits):
    """65 tokens of 4 experts are few enough to be counted; prompts are sorted."""
    experts = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :K]).astype(np.int32)
    given = (jnp.asarray(experts), jnp.ones((TOKENS, K)), jnp.arange(TOKENS) % 7 > 0)
    counted = module.routing(*given, EXPERTS)
    monkeypatch.setattr(module, "_FEW", 0)
    again = module.routing(*given, EXPERTS)
    for a, b in zip(jax.tree.leaves(counted), jax.tree.leaves(again), strict=True):
        assert_same_bits(a, b)
