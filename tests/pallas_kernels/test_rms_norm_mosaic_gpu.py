"""RMSNorm for Hopper in Mosaic GPU's interpreter: logic on a CPU, not the hardware's bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.rms_norm.mosaic_gpu import (
    default_schedule,
    rms_norm,
    schedules,
    shape_of,
)

EPS = 1e-5


def inputs(rows: int, dim: int) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    rng = np.random.default_rng(dim)
    x, residual = (jnp.asarray(rng.standard_normal((rows, dim)), jnp.bfloat16) for _ in "ab")
    return x, residual, jnp.asarray(rng.standard_normal(dim), jnp.bfloat16)


# One warp's lanes, several rows a warp, a warp a row, elements one by one, zeros at the end.
@pytest.mark.parametrize("dim", [64, 128, 200, 576, 1032, 4096])
@pytest.mark.parametrize("with_residual", [True, False])
def test_it_is_the_norm_of_the_sum(dim: int, with_residual: bool) -> None:
    x, residual, weight = inputs(17, dim)
    other = residual if with_residual else None
    y, s = rms_norm(x, weight, eps=EPS, residual=other, interpret=plgpu.InterpretGPUParams())
    wide = np.asarray(x, np.float32) + (np.asarray(residual, np.float32) if with_residual else 0)
    wide = np.asarray(jnp.asarray(wide).astype(jnp.bfloat16), np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    assert (np.asarray(s, np.float64) == wide).all()
    # One rounding to bfloat16: half of 2**-8, relative.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 576])
def test_every_schedule_reaches_every_row(dim: int) -> None:
    """Rows beyond a whole number of blocks included; the last blocks overlap."""
    x, residual, weight = inputs(75, dim)
    results = [
        rms_norm(
            x,
            weight,
            eps=EPS,
            residual=residual,
            schedule=s,
            interpret=plgpu.InterpretGPUParams(),
        )
        for s in schedules(75, dim)
    ]
    assert len(results) > 1
    for y, s in results[1:]:
        assert np.asarray(y).tobytes() == np.asarray(results[0][0]).tobytes()
        assert np.asarray(s).tobytes() == np.asarray(results[0][1]).tobytes()


def test_a_row_does_not_see_its_neighbours() -> None:
    x, residual, weight = inputs(4, 200)
    poisoned = x.at[jnp.array([0, 2])].set(jnp.nan)
    interpret = plgpu.InterpretGPUParams()
    alone, _ = rms_norm(x[1:2], weight, eps=EPS, residual=residual[1:2], interpret=interpret)
    crowd, _ = rms_norm(poisoned, weight, eps=EPS, residual=residual, interpret=interpret)
    assert np.asarray(alone[0]).tobytes() == np.asarray(crowd[1]).tobytes()


@pytest.mark.parametrize("dim", [200, 640])
def test_float32_weights_beside_bfloat16(dim: int) -> None:
    """Gemma's 1 + w: the product is that of float32, rounded once."""
    x, _, weight = inputs(17, dim)
    wide, interpret = 1 + weight.astype(jnp.float32), plgpu.InterpretGPUParams()
    y, s = rms_norm(x, wide, eps=EPS, interpret=interpret)
    exact, _ = rms_norm(x.astype(jnp.float32), wide, eps=EPS, interpret=interpret)
    rounded, _ = rms_norm(x, wide.astype(jnp.bfloat16), eps=EPS, interpret=interpret)
    assert y.dtype == s.dtype == jnp.bfloat16
    assert np.asarray(y).tobytes() == np.asarray(exact.astype(jnp.bfloat16)).tobytes()
    assert np.asarray(y).tobytes() != np.asarray(rounded).tobytes()


def test_a_row_is_divided_by_its_width_alone() -> None:
    """Every thread holds as many elements, and few enough; only the schedule asks the batch."""
    for dim in range(8, 16385, 8):
        shape, width = shape_of(dim)
        assert dim <= width and width % shape.tile == 0
        assert width // (shape.warps * shape.lanes) <= 128
        for m in (1, 5, 128, 300, 10**6):
            found = schedules(m, dim)
            assert default_schedule(m, dim) in found
            assert all(s.rows in (1, shape.rows) and s.rows <= m for s in found)


def test_no_rows() -> None:
    y, s = rms_norm(jnp.zeros((0, 64), jnp.bfloat16), jnp.ones(64, jnp.bfloat16), eps=EPS)
    assert y.shape == s.shape == (0, 64)


def test_what_it_cannot_do_is_refused() -> None:
    for x, weight in (("float32", "bfloat16"), ("bfloat16", "float16")):
        with pytest.raises(NotImplementedError, match=f"got {x} and {weight}"):
            rms_norm(jnp.ones((2, 64), x), jnp.ones(64, weight), eps=EPS)
    for dim in (60, 16392):
        with pytest.raises(NotImplementedError, match="multiples of 8 up to 16384"):
            rms_norm(jnp.ones((2, dim), jnp.bfloat16), jnp.ones(dim, jnp.bfloat16), eps=EPS)
