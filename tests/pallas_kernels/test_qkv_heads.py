"""Heads of a projection: right against float64, the same bits in any batch, and each slot right."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

EPS = 1e-5
LONGEST = 700
SIZES = {"smollm2": (9, 3, 64, False), "qwen3": (8, 2, 128, True)}
LENGTHS = (1, 7, 8, 9, 63, 64, 65)


@pytest.fixture(scope="module", params=SIZES.values(), ids=list(SIZES))
def size(request):
    """(query heads, key heads, head size, are there norms)."""
    return request.param


@pytest.fixture(scope="module")
def case(normal):
    """case(size, positions, dtype): all arguments before the caches, by name; NaN in padding."""

    def draw(size, positions, dtype, seed=0):
        heads, kv_heads, dim, norms = size
        positions = np.asarray(positions, np.int32)
        batch, length = positions.shape
        qkv = normal(seed, (batch, length, (heads + 2 * kv_heads) * dim), dtype)
        qkv[positions < 0] = np.nan
        frequency = 1e5 ** (-np.arange(0, dim, 2) / dim)
        angle = np.maximum(positions, 0)[..., None] * frequency
        weights = (1 + normal(2, (2, dim), dtype) / dtype.type(4)) if norms else (None, None)
        return {
            "qkv": qkv,
            "q_norm": weights[0],
            "k_norm": weights[1],
            "cos": np.cos(angle).astype(np.float32),
            "sin": np.sin(angle).astype(np.float32),
            "positions": positions,
        }

    return draw


@pytest.fixture(scope="module")
def caches(normal):
    """caches(size, pages, length, dtype): keys and values of others in every slot."""

    def draw(size, pages, length, dtype):
        _, kv_heads, dim, _ = size
        return {
            f"{side}_cache": normal(3 + i, (pages, kv_heads, length, dim), dtype)
            for i, side in enumerate("kv")
        }

    return draw


@pytest.fixture(scope="module")
def run(op):
    """run(implementation, arguments, caches): q, and the caches after it."""

    def call(implementation, arguments, caches, **more):
        function = op("qkv_heads", implementation)
        return [np.asarray(x) for x in function(**arguments, **caches, **more, eps=EPS)]

    return call


def token_bits(run, implementation, arguments, caches):
    """(q, its keys, its values) of each token, [B, T, ...]."""
    q, k, v = run(implementation, arguments, caches)
    at = arguments["positions"]
    rows = np.arange(len(at))[:, None]
    return q, k[rows, :, at], v[rows, :, at]


def oracle(arguments, heads, kv_heads, dim):
    """(q, k) in float64 with the rounding after the norm, [B, T, heads, D]."""
    qkv = arguments["qkv"]
    x = qkv.reshape(*qkv.shape[:2], -1, dim).astype(np.float64)
    parts = []
    for weight, part in (
        (arguments["q_norm"], x[:, :, :heads]),
        (arguments["k_norm"], x[:, :, heads : heads + kv_heads]),
    ):
        if weight is not None:
            mean = (part**2).mean(-1, keepdims=True)
            part = part / np.sqrt(mean + EPS) * weight.astype(np.float64)
            part = part.astype(qkv.dtype).astype(np.float64)
        # A rotation of complex numbers: pair i is (x[i], x[i + dim / 2]).
        turn = (arguments["cos"].astype(np.float64) + 1j * arguments["sin"])[:, :, None]
        turned = (part[..., : dim // 2] + 1j * part[..., dim // 2 :]) * turn
        parts.append(np.concatenate([turned.real, turned.imag], axis=-1))
    return parts


def test_right(run, implementation, dtype, size, case, caches, assert_same_bits):
    heads, kv_heads, dim, _ = size
    positions = [[0, 1, 2, 3], [255, 256, 257, -1], [5, -1, -1, -1], [-1, -1, -1, -1]]
    arguments, before = case(size, positions, dtype), caches(size, 4, 300, dtype)
    q, k, v = run(implementation, arguments, before)
    real = arguments["positions"] >= 0
    rows, columns = np.nonzero(real)
    slot = arguments["positions"][rows, columns]
    for got, want in zip(
        (q[rows, columns], k[rows, :, slot]), oracle(arguments, heads, kv_heads, dim), strict=True
    ):
        want = want[rows, columns]
        pair = np.linalg.norm(np.stack(np.split(want, 2, axis=-1)), axis=0)
        # The norm's rounding may fall to the other side, and then there is one more.
        tolerance = (16 * np.finfo(np.float32).eps + 1.5 * float(jnp.finfo(dtype).eps)) * pair
        difference = abs(got.astype(np.float64) - want)
        assert (difference <= np.concatenate([tolerance, tolerance], axis=-1)).all()
    values = arguments["qkv"].reshape(4, 4, -1, dim)[:, :, heads + kv_heads :]
    assert_same_bits(v[rows, :, slot], values[rows, columns], "values are copied")
    for name, after in (("k_cache", k), ("v_cache", v)):
        kept = before[name].copy()
        kept[rows, :, slot] = after[rows, :, slot]
        assert_same_bits(after, kept, f"{name}: a slot that no token has")


def test_row_does_not_follow_the_batch(
    run, invariant, dtype, size, few_rows, case, caches, assert_rows_alike
):
    """One token a row, as in decoding."""
    positions = np.arange(300, dtype=np.int32)[:, None] * 7 % 16
    whole = case(size, positions, dtype)

    def batch(qkv, cos, sin, positions):
        arguments = {**whole, "qkv": qkv, "cos": cos, "sin": sin, "positions": positions}
        return tuple(token_bits(run, invariant, arguments, caches(size, len(qkv), 16, dtype)))

    inputs = tuple(whole[name] for name in ("qkv", "cos", "sin", "positions"))
    assert_rows_alike(batch, inputs, few_rows)


def test_negative_control(run, few_rows, case, caches, bits):
    """Plain XLA fails the comparison: it picks the order of a norm's sum by the array's size.

    In float32; the rounding of bfloat16 results hides most of it.
    """
    dtype = np.dtype(np.float32)
    whole = case(SIZES["qwen3"], np.zeros((300, 1)), dtype)

    def q(m):
        part = {name: whole[name][:m] for name in ("qkv", "cos", "sin", "positions")}
        return bits(run("xla", {**whole, **part}, caches(SIZES["qwen3"], m, 4, dtype))[0])

    expected = q(300)
    assert any((q(m) != expected[:m]).any() for m in few_rows)


def test_token_does_not_follow_the_prompt(
    run, invariant, dtype, size, case, caches, assert_same_bits
):
    """In prompts of any length, in pieces, and alone: q, keys and values of each token."""
    cache = caches(size, 1, 72, dtype)
    whole = case(size, np.arange(65)[None], dtype)
    expected = token_bits(run, invariant, whole, cache)
    tokens = ("qkv", "cos", "sin", "positions")
    for length in LENGTHS:
        for first in {0, 65 - length}:
            here = slice(first, first + length)
            part = {**whole, **{name: whole[name][:, here] for name in tokens}}
            for got, want in zip(token_bits(run, invariant, part, cache), expected, strict=True):
                assert_same_bits(got, want[:, here], f"{length} tokens from {first}")


def test_neighbours_and_slots_of_nan(run, invariant, dtype, size, case, caches, assert_same_bits):
    positions = np.full((5, 2), [321, 322], np.int32)
    arguments, cache = case(size, positions, dtype), caches(size, 5, 400, dtype)
    expected = token_bits(run, invariant, arguments, cache)
    among = copy.deepcopy(arguments)
    for name in ("qkv", "cos", "sin"):
        among[name][[0, 1, 2, 4]] = np.nan
    poisoned = {name: np.full_like(side, np.nan) for name, side in cache.items()}
    for got, want in zip(token_bits(run, invariant, among, poisoned), expected, strict=True):
        assert_same_bits(got[3], want[3])


def test_padding_writes_nothing(run, implementation, dtype, size, case, caches, assert_same_bits):
    """Nor does a position behind the cache; and the row's tokens do not see them."""
    cache = caches(size, 3, 16, dtype)
    arguments = case(size, [[14, 15, -1, -1], [-1, -1, -1, -1], [15, 16, 17, -1]], dtype)
    q, k, v = run(implementation, arguments, cache)
    short = {name: arguments[name][:, :2] for name in ("qkv", "cos", "sin", "positions")}
    expected = run(implementation, {**arguments, **short}, cache)
    for got, want in zip((k, v), expected[1:], strict=True):
        assert_same_bits(got, want)
    if implementation != "xla":
        assert_same_bits(q[0, :2], expected[0][0])
    assert_same_bits(k[1], cache["k_cache"][1])
    assert_same_bits(v[2, :, :15], cache["v_cache"][2, :, :15])


def test_pages_hold_what_rows_hold(
    run, implementation, dtype, size, case, caches, assert_same_bits
):
    """Row b's slot s is slot s % 8 of page [b, s // 8], wherever that stands; no page, no write."""
    arguments = case(size, [[6, 7, 8, 9], [23, 24, -1, -1], [31, 32, 33, 34]], dtype)
    rows, pages = caches(size, 3, 32, dtype), caches(size, 20, 8, dtype)
    table = np.array([[17, 3, -1, -1], [2, 9, 0, -1], [5, 6, 7, 19]], np.int32)
    q, k, v = run(implementation, arguments, rows)
    paged = run(implementation, arguments, pages, page_table=table)
    assert_same_bits(paged[0], q)
    for got, held, name in ((paged[1], k, "k_cache"), (paged[2], v, "v_cache")):
        expected = pages[name].copy()
        for row, position in ((0, 6), (0, 7), (0, 8), (0, 9), (1, 23), (2, 31)):
            expected[table[row, position // 8], :, position % 8] = held[row, :, position]
        assert_same_bits(got, expected, name)


def test_runs_twice_alike(run, invariant, dtype, size, case, caches, assert_same_bits):
    arguments = case(size, np.arange(10).reshape(5, 2), dtype)
    cache = caches(size, 5, 16, dtype)
    first, second = (run(invariant, arguments, cache) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)
