"""The normalizer for Hopper in Mosaic GPU's interpreter: logic on a CPU, not bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.log_normalizer import LogNormalizer, mosaic_gpu

pytestmark = pytest.mark.usefixtures("unoptimized")


def log_normalizer(x: np.ndarray) -> LogNormalizer:
    return mosaic_gpu.log_normalizer(jnp.asarray(x), interpret=plgpu.InterpretGPUParams())


def logits(rows: int, vocabulary: int) -> np.ndarray:
    return 4 * np.random.default_rng(vocabulary).standard_normal((rows, vocabulary), np.float32)


# Less than a group, whole groups, and a last one that overlaps: by much, by little, oddly.
@pytest.mark.parametrize("vocabulary", [1000, 4096, 8192, 4100, 12284, 9001])
def test_it_is_the_normalizer(vocabulary: int) -> None:
    x = logits(3, vocabulary)
    y = log_normalizer(x)
    x64 = x.astype(np.float64)
    np.testing.assert_array_equal(np.asarray(y.maximum, np.float64), x64.max(-1))
    np.testing.assert_array_equal(y.argmax, x64.argmax(-1))
    want = np.log(np.exp(x64 - x64.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(y.log_sum, want, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [4096, 9001])
def test_a_row_does_not_see_its_neighbours(vocabulary: int) -> None:
    x = logits(4, vocabulary)
    poisoned = x.copy()
    poisoned[[0, 2]] = np.nan
    for alone, crowd in zip(log_normalizer(x[1:2]), log_normalizer(poisoned), strict=True):
        assert np.asarray(alone[0]).tobytes() == np.asarray(crowd[1]).tobytes()


def test_first_of_equals_wherever_it_stands() -> None:
    """In the part that the last two groups share, and at the ends of chunks.

    NaN is left to the device (scripts/check_gpu_rows.py): XLA:CPU's maximum may overlook one.
    """
    places = [(0, 9000), (1023, 1024), (4095, 4096), (4905, 8191), (5000, 5001), (9000,)]
    x = np.zeros((len(places), 9001), np.float32)
    for i, at in enumerate(places):
        x[i, list(at)] = 1
    np.testing.assert_array_equal(log_normalizer(x).argmax, [at[0] for at in places])


def test_chunks_without_a_finite_logit() -> None:
    """They add nothing; a row of nothing else, and one with infinity, give NaN."""
    x = np.full((4, 9001), -np.inf, np.float32)
    x[0, 4500] = 3
    x[1, 0] = 3
    x[2, 7] = np.inf
    y = log_normalizer(x)
    np.testing.assert_array_equal(y.log_sum[:2], [0, 0])
    np.testing.assert_array_equal(y.maximum, [3, 3, np.inf, -np.inf])
    np.testing.assert_array_equal(y.argmax, [4500, 0, 7, 0])
    assert np.isnan(y.log_sum[2]) and np.isnan(y.log_probs(jnp.asarray(x))[3]).all()


def test_shapes_and_what_it_cannot_do() -> None:
    x = logits(6, 4096)
    flat = log_normalizer(x)
    for actual, expected in zip(log_normalizer(x.reshape(2, 3, 4096)), flat, strict=True):
        assert (np.asarray(actual).reshape(6) == np.asarray(expected)).all()
    assert log_normalizer(np.zeros((0, 4096), np.float32)).argmax.shape == (0,)
    with pytest.raises(NotImplementedError, match="takes float32, got bfloat16"):
        log_normalizer(np.zeros((2, 8), jnp.bfloat16))
