"""RMSNorm for Hopper in Mosaic GPU's interpreter: logic on a CPU, not the hardware's bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.rms_norm.mosaic_gpu import rms_norm

EPS = 1e-5


def inputs(rows: int, dim: int) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    rng = np.random.default_rng(dim)
    x, residual = (jnp.asarray(rng.standard_normal((rows, dim)), jnp.bfloat16) for _ in "ab")
    return x, residual, jnp.asarray(rng.standard_normal(dim), jnp.bfloat16)


@pytest.mark.parametrize("dim", [64, 128, 200, 576])
def test_it_is_the_norm_of_the_sum(dim: int) -> None:
    x, residual, weight = inputs(3, dim)
    y, s = rms_norm(x, weight, eps=EPS, residual=residual, interpret=plgpu.InterpretGPUParams())
    wide = np.asarray((x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(jnp.bfloat16))
    wide = wide.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    assert (np.asarray(s, np.float64) == wide).all()
    # One rounding to bfloat16: half of 2**-8, relative.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_a_row_does_not_see_its_neighbours() -> None:
    x, residual, weight = inputs(4, 200)
    poisoned = x.at[jnp.array([0, 2])].set(jnp.nan)
    interpret = plgpu.InterpretGPUParams()
    alone, _ = rms_norm(x[1:2], weight, eps=EPS, residual=residual[1:2], interpret=interpret)
    crowd, _ = rms_norm(poisoned, weight, eps=EPS, residual=residual, interpret=interpret)
    assert np.asarray(alone[0]).tobytes() == np.asarray(crowd[1]).tobytes()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="float32"):
        rms_norm(jnp.ones((2, 64)), jnp.ones(64), eps=EPS)
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        rms_norm(jnp.ones((2, 60), jnp.bfloat16), jnp.ones(60, jnp.bfloat16), eps=EPS)
