"""Fixed trees: the documented order of additions, and elementwise functions that know no tail."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels import trees

LENGTHS = (*range(1, 41), 1000)
tree_sum, prefix_sums, exp, log, tanh, silu = (
    jit(f)
    for f in (
        *(trees.tree_sum, trees.prefix_sums),
        *(trees.exp, trees.log, trees.tanh, trees.silu),
    )
)


def halving_sum(x):
    """The documented tree of `tree_sum`, in numpy: one float32 addition at a time."""
    while (n := x.shape[-1]) > 1:
        x = np.pad(x, ((0, 0), (0, n % 2)))
        half = x.shape[-1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def ulps(actual, exact):
    """Distance in units of the last place of the exact result, rounded to float32."""
    spacing = np.spacing(abs(exact).astype(np.float32)).astype(np.float64)
    return abs(np.asarray(actual).astype(np.float64) - exact) / spacing


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 9, 31, 64, 100, 255, 256, 257, 576, 1000])
def test_tree_sum_is_the_documented_tree(n, normal, assert_same_bits):
    x = normal(n, (5, n), np.float32)
    assert_same_bits(tree_sum(x), halving_sum(x))


def test_tree_sum_over_a_vocabulary(normal, assert_same_bits):
    x = normal(0, (2, 49152), np.float32)
    assert_same_bits(tree_sum(x), halving_sum(x))


def test_tree_sum_does_not_follow_the_batch(normal, assert_rows_alike):
    assert_rows_alike(tree_sum, (normal(0, (300, 1000), np.float32),), (1, 2, 3, 8, 33, 129))


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
def test_balanced_sum_adds_neighbours(leaves, normal, assert_same_bits):
    parts = list(normal(0, (leaves, 100), np.float32))
    want = {
        1: lambda p: p[0],
        2: lambda p: p[0] + p[1],
        4: lambda p: (p[0] + p[1]) + (p[2] + p[3]),
        8: lambda p: ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])),
    }[leaves](parts)
    assert_same_bits(trees.balanced_sum([jnp.asarray(p) for p in parts]), want)


def test_exp_is_within_two_ulp():
    x = np.concatenate(
        [np.linspace(-87.3, 88, 400_000), np.linspace(-1, 1, 100_000), np.geomspace(1e-38, 1, 999)]
    ).astype(np.float32)
    assert ulps(exp(x), np.exp(x.astype(np.float64))).max() <= 2


def test_exp_at_the_ends():
    x = np.array([0.0, -0.0, -np.inf, -88.0, -1e30, 88.3, 89.0, np.inf, np.nan], np.float32)
    one, also_one, *zeros, large, clipped, also_clipped, nan = np.asarray(exp(x))
    assert one == also_one == 1
    assert zeros == [0, 0, 0]
    assert ulps(large, np.exp(np.float64(x[5]))) <= 2
    assert clipped == also_clipped and 2.2e38 < clipped < 2.5e38
    assert np.isnan(nan)


def test_log_is_within_two_ulp():
    x = np.concatenate(
        [np.linspace(0.5, 2, 400_000), np.geomspace(1.2e-38, 3.4e38, 100_000)]
    ).astype(np.float32)
    assert ulps(log(x), np.log(x.astype(np.float64))).max() <= 2


def test_log_at_the_ends():
    zero, minus_infinity = np.asarray(log(np.array([1.0, 0.0], np.float32)))
    assert zero == 0 and minus_infinity == -np.inf


def test_tanh_is_within_two_ulp():
    x = np.concatenate(
        [np.linspace(-12, 12, 400_000), np.linspace(0.62, 0.63, 9999), np.geomspace(1e-30, 1, 9999)]
    ).astype(np.float32)
    assert ulps(tanh(x), np.tanh(x.astype(np.float64))).max() <= 2


def test_tanh_at_the_ends():
    x = np.array([0.0, -0.0, 50, -50, 3e38, -np.inf, np.inf, np.nan], np.float32)
    *y, nan = np.asarray(tanh(x))
    assert y == [0, 0, 1, -1, 1, -1, 1]
    assert np.isnan(nan)


def test_silu_is_right():
    x = np.linspace(-80, 80, 100_000).astype(np.float32)
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(silu(x), x64 / (1 + np.exp(-x64)), rtol=6e-7)


@pytest.mark.parametrize("function", [exp, log, tanh], ids=["exp", "log", "tanh"])
def test_element_does_not_follow_the_length_of_its_array(function, assert_same_bits):
    """XLA's own exp and log do, on some CPUs: scripts/bench/cpu_dot_classes.py measures it."""
    rng = np.random.default_rng(0)
    low, high = {exp: (-20, 5), log: (1e-3, 50), tanh: (-3, 3)}[function]
    x = rng.uniform(low, high, 1000).astype(np.float32)
    whole = np.asarray(function(x))
    for n in LENGTHS:
        start = (37 * n) % (1001 - n)
        part = slice(start, start + n)
        assert_same_bits(function(x[part]), whole[part], f"length {n}")


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_prefix_sums_are_the_documented_tree(n, normal, assert_same_bits, assert_rows_alike):
    x, distance = normal(0, (9, n), np.float32), 1
    want = x.copy()
    while distance < n:
        want[:, distance:] = want[:, distance:] + want[:, :-distance]
        distance *= 2
    assert_same_bits(prefix_sums(x), want)
    assert_rows_alike(prefix_sums, (x,), (1, 2, 8, 9))
