"""What the suites of the ops share: which implementations they run over, and bits.

Every suite runs RIGHT over `implementation` and INVARIANT over `invariant`; a new
implementation that runs on the machine of the tests joins by its name in these lists.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jdet.compiler import jit
from jdet.pallas_kernels import implementation_of

ON_ANY_CPU = ("reference", "portable", "xla")
INVARIANT = ("portable",)
# Batch sizes at which kernels like to change: powers of two, their neighbours, and odd ones.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
# A few of each kind, where a compile is dear.
FEW_ROWS = (1, 2, 5, 8, 17, 32, 33, 65, 129, 300)

_STATIC = {
    "embed": ("scale",),
    "expert_norm": ("eps",),
    "gated_matmul": ("activation",),
    "grouped_matmul": ("leaves", "out_dtype"),
    "matmul": ("leaves", "out_dtype"),
    "qkv_heads": ("eps",),
    "rms_norm": ("eps",),
    "route": ("k", "normalise"),
    "soft_cap": ("cap",),
    "attention": ("scale", "kv_split", "sliding_window", "soft_cap"),
}


@pytest.fixture(scope="session", params=ON_ANY_CPU)
def implementation(request):
    """Each implementation that any CPU runs."""
    return request.param


@pytest.fixture(scope="session", params=INVARIANT)
def invariant(request):
    """Each of them that promises the same bits in any batch."""
    return request.param


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def dtype(request):
    """Each dtype of weights and activations."""
    return jnp.dtype(request.param)


@pytest.fixture(scope="session")
def rows():
    """All batch sizes."""
    return ROWS


@pytest.fixture(scope="session")
def few_rows():
    """A few of them."""
    return FEW_ROWS


@pytest.fixture(scope="session")
def op():
    """op(name, implementation) under the library's XLA options, compiled once a shape."""

    @functools.cache
    def jitted(name, implementation):
        function = implementation_of(name, implementation)
        return jit(function, implementation=implementation, static_argnames=_STATIC.get(name, ()))

    return jitted


@pytest.fixture(scope="session")
def bits():
    """bits(array): its elements as integers, so that 0.0 is not -0.0 and NaN is itself."""

    def as_integers(x):
        x = np.asarray(x)
        return x.view({2: np.uint16, 4: np.int32}[x.dtype.itemsize])

    return as_integers


@pytest.fixture(scope="session")
def assert_same_bits(bits):
    """Compare two arrays by shape, dtype and integers."""

    def check(actual, expected, message=""):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), message
        np.testing.assert_array_equal(bits(actual), bits(expected), err_msg=message)

    return check


@pytest.fixture(scope="session")
def normal():
    """normal(seed, shape, dtype): standard normal numbers, rounded to dtype.

    A numpy array: to slice one of jax's compiles a program a shape.
    """

    def draw(seed, shape, dtype):
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

    return draw


@pytest.fixture(scope="session")
def paged():
    """paged(k, v, positions, page_size, shared=0): the same keys and values in shuffled pages.

    Rows share their first `shared` pages, which hold row 0's. NaN lies in every slot after a
    row's last key and in spare pages; entries of the table after it point anywhere.
    """

    def lay_out(k, v, positions, page_size, shared=0):
        k, v = np.asarray(k), np.asarray(v)
        batch, heads, _, dim = k.shape
        last = np.asarray(positions).max(1)
        used = last // page_size + 1
        width = used.max() + 2
        rng = np.random.default_rng(page_size)
        count = batch * width + 3
        table = rng.permutation(count)[: batch * width].astype(np.int32).reshape(batch, width)
        table[:, :shared] = table[0, :shared]
        pages = np.full((2, count, heads, page_size, dim), np.nan, k.dtype)
        for row, i in np.ndindex(batch, width):
            stop = min((i + 1) * page_size, last[row] + 1)
            for side, cache in zip(pages, (k, v), strict=True):
                if i < used[row] and not (row and i < shared):
                    part = cache[row, :, i * page_size : stop]
                    side[table[row, i], :, : part.shape[1]] = part
        for row in range(batch):
            anything = (-1, -(2**31), 2**31 - 1, count, table[0, 0], table[-1, -1])
            table[row, used[row] :] = rng.choice(anything, width - used[row])
        return *pages, table

    return lay_out


@pytest.fixture(scope="session")
def request_of(normal):
    """request_of(seed, heads, T, S, dtype, B): (q, k, v) of B requests, as long as the cache."""

    def draw(seed, heads, queries, slots, dtype, batch=1):
        h, n, d = heads
        return (
            normal(seed, (batch, queries, h, d), dtype),
            normal(seed + 1, (batch, n, slots, d), dtype),
            normal(seed + 2, (batch, n, slots, d), dtype),
        )

    return draw


@pytest.fixture(scope="session")
def attend(op):
    """attend(implementation, q, k, v, positions, kv_split): positions a list, [T] or [B, T]."""

    def call(implementation, q, k, v, positions, kv_split, page_table=None, **options):
        at = np.broadcast_to(np.asarray(positions, np.int32), q.shape[:2])
        function = op("attention", implementation)
        options = {"scale": q.shape[-1] ** -0.5, "kv_split": kv_split, **options}
        out = function(q, k, v, at, page_table=page_table, **options)
        assert out.shape == q.shape and out.dtype == q.dtype, "another batch was formed"
        return np.asarray(out)

    return call


@pytest.fixture(scope="session")
def assert_attends():
    """assert_attends(out, q, k, v, positions, sliding_window=, soft_cap=): right against float64.

    To the roundings of the sums, of the weights (to v's dtype), of the scores and of the result.
    """

    def check(out, q, k, v, positions, sliding_window=None, soft_cap=None):
        q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
        batch, length, heads, dim = q.shape
        group = heads // k.shape[1]
        positions = np.broadcast_to(positions, (batch, length))
        want, size = np.zeros_like(q), np.zeros_like(q)  # size: the mean of |v| under the weights
        for b, t, h in np.ndindex(batch, length, heads):
            end = positions[b][t] + 1
            seen = slice(0 if sliding_window is None else max(0, end - sliding_window), end)
            score = k[b, h // group, seen] @ q[b, t, h] * dim**-0.5
            if soft_cap is not None:
                score = soft_cap * np.tanh(score / soft_cap)
            if score.size:
                p = np.exp(score - score.max())
                p /= p.sum()
                want[b, t, h] = p @ v[b, h // group, seen]
                size[b, t, h] = p @ abs(v[b, h // group, seen])
        single, own = np.finfo(np.float32).eps, float(jnp.finfo(out.dtype).eps)
        # Of the scores (their size is about 4), and of p.
        sums = 4 * np.sqrt(dim) + np.sqrt(np.max(positions) + 1) + 4 * (soft_cap or 0)
        tolerance = (sums * single + own / 2) * size + own * abs(want)
        error = abs(out.astype(np.float64) - want)
        assert (error <= tolerance).all(), (error / tolerance).max()

    return check


@pytest.fixture(scope="session")
def assert_rows_alike(assert_same_bits):
    """Run f over batches of the given sizes, each drawn from another place of the largest.

    f maps [M, ...] arrays to an array, or a tuple of arrays, of M rows. Row i of a batch of
    m is row (i + shift) % M of the largest, M, so that size, place and neighbours all change.
    """

    def check(f, inputs, sizes):
        largest = inputs[0].shape[0]
        whole = _tuple(f(*inputs))
        for m in sizes:
            pick = (np.arange(m) + 37 * m + 11) % largest
            batch = _tuple(f(*(x[pick] for x in inputs)))
            for actual, expected in zip(batch, whole, strict=True):
                assert actual.shape == (m, *expected.shape[1:]), "another batch was formed"
                assert_same_bits(actual, np.asarray(expected)[pick], f"M={m}")

    return check


@pytest.fixture(scope="module")
def unoptimized():
    """Programs of this file compile without most of LLVM's passes, in two thirds of the time.

    For files of simulated kernels, which test the kernels and no code of a CPU, and whose programs
    no other file runs.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def simulated_tpu():
    """simulated_tpu(f, *args, seed=0): f in Pallas' simulator of a TPU, which must find no race.

    Memory that nobody has written holds NaN, and the order of parallel grid dimensions is drawn.
    f takes `interpret`.
    """

    def run(f, *args, seed=0, **kwargs):
        params = pltpu.InterpretParams(detect_races=True, random_seed=seed)
        try:
            out = jax.block_until_ready(f(*args, interpret=params, **kwargs))
            races: Any = interpret_pallas_call.races  # jax 0.11.2 tells of a race nowhere else
            assert not races.races_found
        finally:
            pltpu.reset_tpu_interpret_mode_state()
        return out

    return run


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
