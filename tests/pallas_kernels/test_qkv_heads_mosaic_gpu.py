"""The heads for Hopper in Mosaic GPU's interpreter: logic on a CPU, not the hardware's bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.qkv_heads import mosaic_gpu, reference

pytestmark = pytest.mark.usefixtures("unoptimized")

EPS = 1e-5
expected = jax.jit(reference.qkv_heads, static_argnames="eps")
# Windows: of 16 heads; of 8 that overlap; of 2 and 1; four threads' worth of one head; long ones.
SIZES = ((17, 8, 64), (9, 3, 64), (3, 1, 128), (2, 2, 96), (4, 1, 256))


def arguments(size: tuple[int, int, int], positions: Any, *, norms: bool) -> dict[str, Any]:
    """Numpy arrays here and from `run`: each operation on one of jax's compiles a program."""
    heads, kv_heads, dim = size
    at = np.asarray(positions, np.int32)
    rng = np.random.default_rng(heads)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.bfloat16)

    angle = np.maximum(at, 0)[..., None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
    qkv = draw(*at.shape, (heads + 2 * kv_heads) * dim)
    qkv[at < 0] = np.nan
    return {
        "qkv": qkv,
        "q_norm": draw(dim) if norms else None,
        "k_norm": draw(dim) if norms else None,
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "positions": at,
    }


def caches(size: tuple[int, int, int], pages: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (2, pages, size[1], length, size[2])
    k, v = np.random.default_rng(1).standard_normal(shape).astype(jnp.bfloat16)
    return k, v


def run(
    args: dict[str, Any],
    cache: tuple[np.ndarray, np.ndarray],
    *,
    schedule: mosaic_gpu.Schedule | None = None,
    **more: Any,
) -> list[np.ndarray]:
    arrays = jax.tree.map(jnp.asarray, {**args, "k_cache": cache[0], "v_cache": cache[1], **more})
    interpret = plgpu.InterpretGPUParams()
    out = mosaic_gpu.qkv_heads(**arrays, eps=EPS, schedule=schedule, interpret=interpret)
    return [np.asarray(x).view(np.uint16) for x in out]


def assert_close(got: np.ndarray, want: Any) -> None:
    """To a rounding of bfloat16 or two: the norm's, and that of the sum."""
    got, want = got.view(jnp.bfloat16).astype(np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", mosaic_gpu.SCHEDULES)
def test_it_is_the_reference(size: tuple[int, int, int], schedule: mosaic_gpu.Schedule) -> None:
    args = arguments(size, [[0, 1], [3, -1]], norms=size != SIZES[1])
    cache = caches(size, 2, 4)
    q, k, v = run(args, cache, schedule=schedule)
    wanted = expected(**args, k_cache=cache[0], v_cache=cache[1], eps=EPS)
    assert_close(q[args["positions"] >= 0], np.asarray(wanted[0])[args["positions"] >= 0])
    assert_close(k, wanted[1])
    assert (v == np.asarray(wanted[2]).view(np.uint16)).all()
    untouched = np.ones((2, 4), bool)
    untouched[0, :2] = untouched[1, 3] = False
    was = np.asarray(cache[0]).view(np.uint16).transpose(0, 2, 1, 3)
    assert (k.transpose(0, 2, 1, 3)[untouched] == was[untouched]).all()


def test_schedules_and_batches_give_the_same_bits() -> None:
    size = (9, 3, 64)
    args = arguments(size, [[4, 5, 6], [1, 2, -1]], norms=True)
    cache = caches(size, 2, 8)
    first, second = (run(args, cache, schedule=s) for s in mosaic_gpu.SCHEDULES)
    real = np.asarray(args["positions"]) >= 0
    assert (first[0][real] == second[0][real]).all()
    for one, other in zip(first[1:], second[1:], strict=True):
        assert (one == other).all()
    tokens = ("qkv", "cos", "sin", "positions")
    alone = {**args, **{name: args[name][:1, 1:2] for name in tokens}}
    q, k, v = run(alone, (cache[0][:1], cache[1][:1]))
    assert (q[0, 0] == first[0][0, 1]).all()
    assert (k[0, :, 5] == first[1][0, :, 5]).all() and (v[0, :, 5] == first[2][0, :, 5]).all()


@pytest.mark.parametrize("schedule", mosaic_gpu.SCHEDULES)
def test_what_has_no_slot_is_not_written(schedule: mosaic_gpu.Schedule) -> None:
    size = (3, 1, 64)
    args = arguments(size, [[3, 4, 5], [-1, -1, -1]], norms=True)
    cache = caches(size, 2, 4)
    _, k, v = run(args, cache, schedule=schedule)
    for after, before in zip((k, v), cache, strict=True):
        was = np.asarray(before).view(np.uint16)
        assert (after[1] == was[1]).all() and (after[0, :, :3] == was[0, :, :3]).all()
        assert (after[0, :, 3] != was[0, :, 3]).any()


@pytest.mark.parametrize("schedule", mosaic_gpu.SCHEDULES)
def test_pages(schedule: mosaic_gpu.Schedule) -> None:
    size = (3, 1, 64)
    args = arguments(size, [[3, 4], [7, 8], [-1, -1], [4, 5]], norms=True)
    table = np.array([[5, 2], [0, 1], [3, 3], [3, -1]], np.int32)
    pages, rows = caches(size, 6, 4), caches(size, 4, 8)
    q, k, v = run(args, pages, page_table=table, schedule=schedule)
    held = run(args, rows, schedule=schedule)
    real = np.asarray(args["positions"]) >= 0
    assert (q[real] == held[0][real]).all()
    for after, before, inside in zip((k, v), pages, held[1:], strict=True):
        expected = np.asarray(before).view(np.uint16).copy()
        for row, position in ((0, 3), (0, 4), (1, 7)):
            expected[table[row, position // 4], :, position % 4] = inside[row, :, position]
        assert (after == expected).all()


def test_float32_norms_beside_bfloat16() -> None:
    """Gemma's 1 + w: as wide values they count, and narrow ones give the bits they gave."""
    size = (2, 1, 64)
    args, cache = arguments(size, [[0, 1]], norms=True), caches(size, 1, 4)
    norms = ("q_norm", "k_norm")

    def heads(change: Any) -> list[np.ndarray]:
        return run({**args, **{name: change(args[name]) for name in norms}}, cache)

    def offset(weight: np.ndarray) -> np.ndarray:
        return 1 + weight.astype(np.float32)

    narrow, widened = heads(lambda w: w), heads(lambda w: w.astype(np.float32))
    wide, rounded = heads(offset), heads(lambda w: offset(w).astype(jnp.bfloat16))
    for one, other in zip(narrow, widened, strict=True):
        assert (one == other).all()
    assert (wide[0] != rounded[0]).any() and (wide[1] != rounded[1]).any()
    given = {**args, **{name: offset(args[name]) for name in norms}}
    wanted = expected(**given, k_cache=cache[0], v_cache=cache[1], eps=EPS)
    for got, want in zip(wide, wanted, strict=True):
        assert_close(got, want)


def test_what_it_cannot_do_is_refused() -> None:
    args = arguments((3, 1, 64), [[0]], norms=True)
    k, v = caches((3, 1, 64), 1, 4)
    with pytest.raises(NotImplementedError, match="norms in bfloat16, float16"):
        run({**args, "q_norm": args["q_norm"].astype(np.float16)}, (k, v))
    with pytest.raises(NotImplementedError, match="got bfloat16, float32, norms in bfloat16"):
        run(args, (k, v.astype(np.float32)))
    with pytest.raises(NotImplementedError, match="multiples of 16 up to 256, got 24"):
        run(arguments((3, 1, 24), [[0]], norms=False), caches((3, 1, 24), 1, 4))
