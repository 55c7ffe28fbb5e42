"""RMSNorm for Hopper in Mosaic GPU's interpreter: logic on a CPU, not the hardware's bits."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jdet
from jdet.pallas_kernels.expert_norm.mosaic_gpu import expert_norm
from jdet.pallas_kernels.expert_sum.portable import expert_sum
from jdet.pallas_kernels.rms_norm.mosaic_gpu import (
    default_schedule,
    rms_norm,
    schedules,
    shape_of,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

EPS = 1e-5


def inputs(rows: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numpy arrays here and from `simulated`: each operation on one of jax's compiles a program."""
    rng = np.random.default_rng(dim)
    x, residual = (rng.standard_normal((rows, dim)).astype(jnp.bfloat16) for _ in "ab")
    return x, residual, rng.standard_normal(dim).astype(jnp.bfloat16)


def simulated(
    x: np.ndarray, weight: np.ndarray, residual: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    y, s = rms_norm(
        jnp.asarray(x),
        jnp.asarray(weight),
        eps=EPS,
        residual=None if residual is None else jnp.asarray(residual),
        interpret=plgpu.InterpretGPUParams(),
        **options,
    )
    return np.asarray(y), np.asarray(s)


# One warp's lanes, several rows a warp, a warp a row, elements one by one, zeros at the end.
@pytest.mark.parametrize("dim", [64, 128, 200, 576, 1032, 4096])
@pytest.mark.parametrize("with_residual", [True, False])
def test_it_is_the_norm_of_the_sum(dim: int, with_residual: bool) -> None:
    x, residual, weight = inputs(17, dim)
    other = residual if with_residual else None
    y, s = simulated(x, weight, other)
    wide = x.astype(np.float32) + (residual.astype(np.float32) if with_residual else 0)
    wide = wide.astype(jnp.bfloat16).astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)
    assert (s.astype(np.float64) == wide).all()
    # One rounding to bfloat16: half of 2**-8, relative.
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dim", [200, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sum_of_experts_is_added_first(dim: int, dtype: str) -> None:
    """The bits of the norm after `portable`'s sum; rows of no token hold NaN."""
    rows, _, weight = (a.astype(dtype) for a in inputs(17, dim))
    rows[[3, 8]] = np.nan
    rng = np.random.default_rng(0)
    places = rng.permutation(np.setdiff1d(np.arange(17), [3, 8])).astype(np.int32).reshape(5, 3)
    weights = rng.random((5, 3), np.float32)
    residual = rng.standard_normal((5, dim)).astype(dtype)
    given = [jnp.asarray(a) for a in (rows, weights, places)]
    given += [jnp.asarray(weight), jnp.asarray(residual)]
    got = expert_norm(*given, eps=EPS, interpret=plgpu.InterpretGPUParams())
    want = simulated(np.asarray(jdet.jit(expert_sum)(*given[:3])), weight, residual)
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(b.astype(np.float32)).all()
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, b.tobytes())


@pytest.mark.parametrize("dim", [64, 576])
def test_every_schedule_reaches_every_row(dim: int) -> None:
    """Rows beyond a whole number of blocks included; the last blocks overlap."""
    x, residual, weight = inputs(75, dim)
    results = [simulated(x, weight, residual, schedule=s) for s in schedules(75, dim)]
    assert len(results) > 1
    for y, s in results[1:]:
        assert y.tobytes() == results[0][0].tobytes()
        assert s.tobytes() == results[0][1].tobytes()


def test_a_row_does_not_see_its_neighbours() -> None:
    x, residual, weight = inputs(4, 200)
    alone, _ = simulated(x[1:2], weight, residual[1:2])
    x[[0, 2]] = np.nan
    crowd, _ = simulated(x, weight, residual)
    assert alone[0].tobytes() == crowd[1].tobytes()


@pytest.mark.parametrize("dim", [200, 640])
def test_float32_weights_beside_bfloat16(dim: int) -> None:
    """Gemma's 1 + w: the product is that of float32, rounded once."""
    x, _, weight = inputs(17, dim)
    wide = 1 + weight.astype(np.float32)
    y, s = simulated(x, wide)
    exact, _ = simulated(x.astype(np.float32), wide)
    rounded, _ = simulated(x, wide.astype(jnp.bfloat16))
    assert y.dtype == s.dtype == jnp.bfloat16
    assert y.tobytes() == exact.astype(jnp.bfloat16).tobytes()
    assert y.tobytes() != rounded.tobytes()


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
