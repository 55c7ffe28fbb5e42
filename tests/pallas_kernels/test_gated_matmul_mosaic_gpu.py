"""The gated Mosaic GPU matmul in Pallas' simulator of a GPU: which rows of w meet, and where.

The simulator has no instructions: the gate is plain jnp there. The bits of the real ones are
compared on a GPU by scripts/check_gpu.py.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.gated_matmul import mosaic_gpu
from jdet.pallas_kernels.matmul.mosaic_gpu import Schedule, default_schedule, matmul, schedules

pytestmark = pytest.mark.usefixtures("unoptimized")

simulator = plgpu.InterpretGPUParams()


def call(x, w, **options):
    """Of numpy arrays, as everywhere here: each operation on one of jax's compiles a program."""
    return np.asarray(mosaic_gpu.gated_matmul(jnp.asarray(x), jnp.asarray(w), **options))


simulated = functools.partial(call, interpret=simulator)

NORMAL = Schedule("normal", 64, 64, stages=3, gated=True)
KINDS = {
    "normal": NORMAL,
    "normal, long steps": Schedule("normal", 64, 96, stages=2, bk=128, gated=True),
    "normal, two consumers, 2 x 2 cluster": Schedule(
        "normal", 128, 64, stages=2, wgs=2, cm=2, cn=2, group=2, gated=True
    ),
    "swapped": Schedule("swapped", 16, 128, stages=3, gated=True),
    "swapped, two consumers over the batch": Schedule(
        "swapped", 16, 128, stages=2, wgs=2, split="n", gated=True
    ),
}
kinds = pytest.mark.parametrize("schedule", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def operands(normal):
    """operands(m, f, k, dtype): x and w."""

    def draw(m, f, k, dtype=jnp.bfloat16):
        return tuple(normal(i, s, dtype) for i, s in enumerate(((m, k), (2 * f, k))))

    return draw


@pytest.fixture(scope="module")
def composed(operands):
    """x, w, and the gate of what the plain matmul makes of them: a tail of 8 in K."""
    x, w = operands(9, 72, 136)
    plain = Schedule("normal", 64, 48, stages=3)
    products = matmul(jnp.asarray(x), jnp.asarray(w), schedule=plain, interpret=simulator)
    gate, up = map(jnp.asarray, np.split(np.asarray(products), 2, axis=1))
    return x, w, mosaic_gpu.silu_mul(gate, up, None, True)


@kinds
def test_gate_of_the_matmul(composed, assert_same_bits, schedule):
    """Ragged: besides K, one row more than eight, and tiles that end beyond F."""
    x, w, want = composed
    assert_same_bits(simulated(x, w, schedule=schedule), want)


@kinds
def test_rows_of_w_meet_their_own_halves(operands, assert_same_bits, schedule):
    """Ruined rows of w ruin their columns and no other; the first of up follows on the gate."""
    f, ruined = 72, np.array([0, 33, 71])
    x, w = operands(3, f, 64)
    clean = simulated(x, w, schedule=schedule)
    keep = np.setdiff1d(np.arange(f), ruined)
    for half in (0, f):
        poisoned = w.copy()
        poisoned[half + ruined] = np.nan
        dirty = simulated(x, poisoned, schedule=schedule)
        assert np.isnan(dirty[:, ruined].astype(np.float32)).all()
        assert_same_bits(dirty[:, keep], clean[:, keep])


def test_row_does_not_follow_the_batch(operands, assert_same_bits):
    x, w = operands(65, 24, 72)
    whole = simulated(x, w, schedule=NORMAL)
    for m in (1, 8, 9, 64):
        assert_same_bits(simulated(x[:m], w, schedule=NORMAL), whole[:m], f"M={m}")


def test_float16_and_width_of_no_multiple_of_eight(operands):
    x, w = operands(5, 37, 64, np.float16)
    y = simulated(x, w)
    assert y.shape == (5, 37) and y.dtype == np.float16
    gate, up = np.split(x.astype(np.float64) @ w.astype(np.float64).T, 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=2e-2, atol=1e-3)


def test_gelu(operands):
    x, w = operands(5, 24, 64, np.float16)
    y = simulated(x, w, activation="gelu_tanh")
    gate, up = np.split(x.astype(np.float64) @ w.astype(np.float64).T, 2, axis=1)
    want = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=2e-2, atol=1e-3)


def test_constants_of_the_formula():
    """The simulator skips the instructions, so their constants are compared here."""
    high, rest = mosaic_gpu._MINUS_LOG2_E, mosaic_gpu._REST
    assert np.float32(high) == high
    assert high + rest == -np.log2(np.e)


def test_nothing_to_do():
    empty = np.zeros((0, 64), jnp.bfloat16)
    assert call(empty, np.ones((8, 64), jnp.bfloat16)).shape == (0, 4)


def test_default_is_registered():
    for m in (1, 8, 33, 64, 65, 128, 200, 256, 257, 1000, 4096, 100_000):
        for n, k in ((8, 64), (3072, 576), (24576, 4096)):
            s = default_schedule(m, n, k, jnp.bfloat16, gated=True)
            assert s.gated and s in schedules(m, n, k, jnp.bfloat16, out_size=2, gated=True)


def test_plain_schedules_are_not_gated_ones():
    every = [schedules(1, 8, 64, jnp.bfloat16, out_size=2, gated=gated) for gated in (False, True)]
    assert [{s.gated for s in some} for some in every] == [{False}, {True}]
    half = jnp.asarray(np.ones((8, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match="no gated schedule"):
        mosaic_gpu.gated_matmul(half, half, schedule=every[0][0])
    with pytest.raises(ValueError, match="a schedule of matmul_gated"):
        matmul(half, half, schedule=every[1][0])


@pytest.mark.parametrize(
    "fields",
    [
        {"bn": 48},
        {"bn": 96, "cm": 4},
        {"wgs": 2, "split": "n"},
        {"kind": "swapped", "bm": 16, "bn": 64},
        {"kind": "swapped", "bm": 16, "bn": 256, "wgs": 2},
    ],
)
def test_halves_that_would_not_meet_are_refused(fields):
    with pytest.raises(ValueError, match="meet in one consumer"):
        Schedule(**({"kind": "normal", "bm": 64, "bn": 64, "stages": 3, "gated": True} | fields))


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        ((2, 64), (8, 72), ValueError, "share K"),
        ((2, 64), (7, 64), ValueError, "gate above up"),
        ((2, 60), (8, 60), NotImplementedError, "multiples of 8"),
    ],
)
def test_what_it_cannot_do_is_said(x, w, error, message):
    with pytest.raises(error, match=message):
        call(np.ones(x, jnp.bfloat16), np.ones(w, jnp.bfloat16))
