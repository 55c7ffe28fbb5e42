"""The Pallas TPU grouped matmuls, interpreted: a row has its expert's bits, whatever the sizes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.pallas_kernels.gated_matmul.mosaic_tpu import gated_matmul
from jdet.pallas_kernels.grouped_gated_matmul import mosaic_tpu as gated
from jdet.pallas_kernels.grouped_matmul import mosaic_tpu
from jdet.pallas_kernels.grouped_matmul.mosaic_tpu import Schedule, plan
from jdet.pallas_kernels.matmul.mosaic_tpu import matmul

pytestmark = pytest.mark.usefixtures("unoptimized")

ROWS, EXPERTS = 70, 5
SIZES = (
    (10, 0, 25, 30, 0),  # unused experts, rows after the last group
    (0, 0, 70, 0, 0),
    (1, 2, 3, 4, 5),  # several in a tile
    (0, 0, 0, 0, 0),
    (33, 0, 0, 0, 37),
    (16, 16, 16, 16, 6),  # ends of groups are ends of tiles
)


@pytest.fixture(scope="module")
def operands(normal):
    """operands(dtype): x and w, for two experts' halves of 72 or one of 144 columns."""

    def draw(dtype):
        shapes = ((ROWS, 136), (EXPERTS, 144, 136))
        return tuple(jnp.asarray(normal(i, s, dtype)) for i, s in enumerate(shapes))

    return draw


def poisoned(x, sizes):
    return x.at[sum(sizes) :].set(jnp.nan), jnp.array(sizes, jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "schedule"), [("float32", None), ("bfloat16", Schedule(16, 128))], ids=str
)
def test_row_has_the_bits_of_its_expert(operands, assert_same_bits, dtype, schedule):
    x, w = operands(jnp.dtype(dtype))
    alone = [matmul(x, w[e], leaves=2, interpret=True) for e in range(EXPERTS)]
    gated_alone = [gated_matmul(x, w[e], interpret=True) for e in range(EXPERTS)]
    for sizes in SIZES:
        expert = np.repeat(np.arange(EXPERTS), sizes)
        args = poisoned(x, sizes)
        run = functools.partial(mosaic_tpu.grouped_matmul, leaves=2)
        for f, want in ((run, alone), (gated.grouped_gated_matmul, gated_alone)):
            got = np.asarray(f(args[0], w, args[1], schedule=schedule, interpret=True))
            rows = [np.asarray(want[e])[r] for r, e in enumerate(expert)]
            assert_same_bits(got[: len(rows)], np.array(rows, got.dtype).reshape(-1, got.shape[1]))
            np.testing.assert_array_equal(got[len(rows) :].astype(np.float32), 0)


def test_simulated(operands, simulated_tpu, assert_same_bits):
    x, w = operands(jnp.bfloat16)
    x, sizes = poisoned(x, SIZES[0])
    w = w.at[1].set(jnp.nan)  # an expert without rows is not read
    got = simulated_tpu(mosaic_tpu.grouped_matmul, x, w, sizes, schedule=Schedule(16, 128))
    assert_same_bits(got, mosaic_tpu.grouped_matmul(x, w, sizes, interpret=True))
    assert not jnp.isnan(got).any()


@pytest.mark.parametrize("height", [8, 32, ROWS])
def test_plan_visits_every_row_of_a_group_once_and_every_tile(height):
    for sizes in SIZES:
        tile, expert, first, end = np.asarray(plan(jnp.array(sizes, jnp.int32), ROWS, height))
        assert (np.diff(tile) >= 0).all() and set(tile) == set(range(-(-ROWS // height)))
        owner = np.full(ROWS, -1)
        for t, e, a, b in zip(tile, expert, first, end, strict=True):
            rows = np.arange(max(a, t * height), min(b, (t + 1) * height))
            assert (owner[rows] == -1).all()
            owner[rows] = e
        np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(np.arange(EXPERTS), sizes))
        assert (owner[sum(sizes) :] == -1).all()
