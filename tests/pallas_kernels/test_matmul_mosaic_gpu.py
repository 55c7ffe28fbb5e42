"""The Mosaic GPU matmul in Pallas' simulator of a GPU: right, and clipped where it must be.

The bits of the real tensor core are compared on a GPU by scripts/check_gpu.py; here the
copies, barriers, clusters, tails and masks of each kind of schedule are run on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdet.pallas_kernels.matmul import mosaic_gpu
from jdet.pallas_kernels.matmul.mosaic_gpu import Schedule

pytestmark = pytest.mark.usefixtures("unoptimized")


def call(x, w, bias=None, **options):
    """Of numpy arrays, as everywhere here: each operation on one of jax's compiles a program."""
    bias = None if bias is None else jnp.asarray(bias)
    return np.asarray(mosaic_gpu.matmul(jnp.asarray(x), jnp.asarray(w), bias=bias, **options))


simulated = functools.partial(call, interpret=plgpu.InterpretGPUParams())

NORMAL = Schedule("normal", 64, 32, stages=3)
SWAPPED = Schedule("swapped", 16, 64, stages=3)
KINDS = {
    "normal": NORMAL,
    "normal, long steps": Schedule("normal", 64, 48, stages=2, bk=128),
    "normal, two consumers over N": Schedule("normal", 64, 64, stages=2, wgs=2, split="n"),
    "normal, two consumers, 2 x 2 cluster": Schedule(
        "normal", 128, 32, stages=2, wgs=2, cm=2, cn=2, group=2
    ),
    "swapped": SWAPPED,
    "swapped, two consumers, pairs": Schedule("swapped", 16, 128, stages=2, wgs=2, cn=2),
}
kinds = pytest.mark.parametrize("schedule", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def operands(normal):
    """operands(m, n, k, dtype): x, w, bias."""

    def draw(m, n, k, dtype=jnp.bfloat16):
        return tuple(normal(i, s, dtype) for i, s in enumerate(((m, k), (n, k), (n,))))

    return draw


def assert_right(y, x, w, bias=None):
    """Against float64: the error of one float32 sum and of one rounding."""
    x64, w64 = (np.asarray(a).astype(np.float64) for a in (x, w))
    want = x64 @ w64.T + (0 if bias is None else np.asarray(bias).astype(np.float64))
    tolerance = 1e-5 * np.sqrt(x.shape[1]) + float(jnp.finfo(y.dtype).eps) * abs(want)
    assert y.shape == want.shape
    assert (abs(np.asarray(y).astype(np.float64) - want) <= tolerance).all()


@kinds
def test_right_with_ragged_edges(operands, schedule):
    x, w, bias = operands(9, 136, 136)  # a tail of 8 in K, of 8 rows in N, of 1 row in M
    y = simulated(x, w, bias=bias, out_dtype=jnp.float32, schedule=schedule)
    assert y.dtype == jnp.float32
    assert_right(y, x, w, bias)


@kinds
def test_several_products_in_one_launch(operands, assert_same_bits, schedule):
    x, w, _ = operands(9, 200, 136)
    ws = [jnp.asarray(part) for part in np.split(w, (56, 64))]  # of 56, 8 and 136 rows
    fixed = {"schedule": schedule, "interpret": plgpu.InterpretGPUParams()}
    ys = mosaic_gpu.matmuls(jnp.asarray(x), ws, **fixed)
    assert [y.shape[1] for y in ys] == [56, 8, 136]
    for y, part in zip(ys, ws, strict=True):
        assert_same_bits(y, simulated(x, part, schedule=schedule))


def test_one_of_several_without_columns_is_refused(operands):
    x, w, _ = (jnp.asarray(a) for a in operands(9, 8, 136))
    with pytest.raises(ValueError, match=r"each w must have a column.*\[0, 8\]"):
        mosaic_gpu.matmuls(x, [w[:0], w])
    with pytest.raises(ValueError, match="a matrix or more"):
        mosaic_gpu.matmuls(x, [])


K_FIRST = {
    "normal, two squares": Schedule("normal", 64, 128, stages=2),
    "normal, two consumers over N": Schedule("normal", 64, 128, stages=2, wgs=2, split="n"),
    "normal, two consumers over M, pairs": Schedule("normal", 128, 64, stages=2, wgs=2, cm=2),
    "swapped": SWAPPED,
    "swapped, two squares a consumer, pairs": Schedule("swapped", 16, 256, stages=2, wgs=2, cm=2),
    "swapped, two consumers over M": Schedule("swapped", 32, 64, stages=2, wgs=2, split="n"),
}


@pytest.mark.parametrize("schedule", K_FIRST.values(), ids=K_FIRST)
@pytest.mark.parametrize("leaves", [1, 2])
def test_weights_as_models_hold_them(operands, assert_same_bits, schedule, leaves):
    # Whole numbers, exact in any order: the simulator's wgmma is a dot of the CPU's, and without
    # AVX-512 that of 128 rows has other bits than two of 64.
    x, w, bias = (jnp.round(8 * a) for a in operands(9, 136, 272))
    fixed = {"bias": bias, "leaves": leaves, "out_dtype": jnp.float32, "schedule": schedule}
    y = simulated(x, np.ascontiguousarray(w.T), k_last=False, **fixed)
    assert_right(y, x, w, bias)
    assert_same_bits(y, simulated(x, w, **fixed))


def test_weights_as_models_hold_them_of_any_width(operands, assert_same_bits):
    x, w, _ = operands(5, 37, 64)
    y = simulated(x, np.ascontiguousarray(w.T), k_last=False)
    assert_same_bits(y, simulated(x, w))


@pytest.mark.parametrize("schedule", K_FIRST.values(), ids=K_FIRST)
def test_weights_as_models_hold_them_of_any_k(operands, assert_same_bits, schedule):
    x, w, _ = (jnp.round(8 * a) for a in operands(9, 136, 131))
    fixed = {"out_dtype": jnp.float32, "schedule": schedule}
    y = simulated(x, np.ascontiguousarray(w.T), k_last=False, **fixed)
    assert_right(y, x, w, None)
    wide = (jnp.pad(a, ((0, 0), (0, 5))) for a in (x, w))
    assert_same_bits(y, simulated(*wide, **fixed))


PAIRS = K_FIRST["normal, two consumers over M, pairs"]


@pytest.mark.parametrize(
    ("schedule", "leaves", "k_last"),
    [
        (NORMAL, 1, True),
        (SWAPPED, 2, True),
        (SWAPPED, 2, False),
        (PAIRS, 1, True),
        (PAIRS, 1, False),
    ],
    ids=["normal", "swapped", "swapped, [K, N]", "pairs", "pairs, [K, N]"],
)
def test_a_batch(normal, assert_same_bits, schedule, leaves, k_last):
    x, w = normal(0, (3, 9, 144), jnp.bfloat16), normal(1, (3, 72, 144), jnp.bfloat16)
    fixed = {"leaves": leaves, "schedule": schedule}
    held = w if k_last else np.ascontiguousarray(w.swapaxes(1, 2))
    y = simulated(x, held, k_last=k_last, **fixed)
    for i in range(3):
        assert_same_bits(y[i], simulated(x[i], w[i], **fixed), f"entry {i}")


@pytest.mark.parametrize("schedule", [NORMAL, SWAPPED], ids=["normal", "swapped"])
def test_row_does_not_follow_the_batch(operands, assert_same_bits, schedule):
    x, w, _ = operands(65, 24, 136)
    whole = simulated(x, w, schedule=schedule)
    assert_right(whole, x, w)
    for m in (1, 7, 8, 9, 64):
        assert_same_bits(simulated(x[:m], w, schedule=schedule), whole[:m], f"M={m}")


def test_the_last_tiles_end_with_the_matrix(operands, assert_same_bits):
    """Rows 1 to 64 and columns 8 to 39 are a tile; those that two tiles share are written alike."""
    x, w, bias = operands(65, 40, 136)
    y = simulated(x, w, bias, schedule=Schedule("normal", 64, 32, stages=2, cm=2))
    assert_right(y, x, w, bias)
    assert_same_bits(y, simulated(x, w, bias, schedule=SWAPPED))


@pytest.mark.parametrize(
    ("schedule", "leaves"), [(NORMAL, 8), (SWAPPED, 2)], ids=["normal", "swapped"]
)
def test_leaves_with_tails(operands, assert_same_bits, schedule, leaves):
    x, w, _ = operands(3, 24, 8 * 72)  # a leaf of eight is 64 + 8 long, one of two 288
    y = simulated(x, w, leaves=leaves, out_dtype=jnp.float32, schedule=schedule)
    parts = zip(np.split(x, leaves, axis=1), np.split(w, leaves, axis=1), strict=True)
    sums = [simulated(a, b, out_dtype=jnp.float32, schedule=schedule) for a, b in parts]
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    assert_same_bits(y, sums[0])


@pytest.mark.parametrize("schedule", [NORMAL, SWAPPED], ids=["normal", "swapped"])
def test_rows_keep_to_themselves(operands, assert_same_bits, schedule):
    x, w, _ = operands(12, 24, 72)
    poisoned = x.copy()
    poisoned[[0, 5, 11]] = np.nan
    clean, dirty = (simulated(v, w, schedule=schedule) for v in (x, poisoned))
    assert np.isnan(dirty[5].astype(np.float32)).all()
    keep = np.array([1, 2, 3, 4, 6, 7, 8, 9, 10])
    assert_same_bits(dirty[keep], clean[keep])


@pytest.mark.parametrize("k_last", [True, False])
def test_float32_by_exact_products(normal, k_last):
    x, w = normal(0, (9, 136), np.float32), normal(1, (72, 136), np.float32)
    held = w if k_last else np.ascontiguousarray(w.T)
    y = simulated(x, held, k_last=k_last, schedule=K_FIRST["swapped"])
    assert y.dtype == jnp.float32
    assert_right(y, x, w)


def test_float32_has_every_bit_of_its_operands():
    """One product each, whose operands have 24 and 1, and 1 and 24 bits: exact."""
    x = np.zeros((2, 64), np.float32)
    w = np.zeros((8, 64), np.float32)
    x[0, 3], w[0, 3] = 1 + 2**-23, -(2.0**5)
    x[1, 7], w[1, 7] = 2.0**-9, 1.9999999
    y = simulated(x, w, schedule=NORMAL)
    assert y[0, 0] == x[0, 3] * w[0, 3] and y[1, 1] == x[1, 7] * w[1, 7]


def test_float16_and_n_of_no_multiple_of_eight(operands):
    x, w, bias = operands(5, 37, 64, np.float16)
    y = simulated(x, w, bias=bias)
    assert y.dtype == jnp.float16
    assert_right(y, x, w, bias)


def test_nothing_to_do():
    empty = np.zeros((0, 64), jnp.bfloat16)
    assert call(empty, np.ones((8, 64), jnp.bfloat16)).shape == (0, 8)


@pytest.mark.parametrize("k_last", [True, False])
@pytest.mark.parametrize("leaves", [1, 2, 8])
def test_default_is_registered_and_has_room(leaves, k_last):
    for m in (1, 8, 33, 64, 65, 128, 200, 256, 257, 1000, 4096, 100_000):
        for n, k in ((8, 64), (576, 576), (4096, 4096), (151_936, 4096)):
            s = mosaic_gpu.default_schedule(m, n, k, jnp.bfloat16, leaves, k_last=k_last)
            assert s in mosaic_gpu.schedules(m, n, k, jnp.bfloat16, leaves, k_last=k_last)
            assert s.fits(leaves) and (k_last or s.takes_k_first)


def test_a_short_k_takes_wide_tiles_where_there_are_many():
    """Scores of a batch of 32 with 8 heads of keys: a tile's own time weighs more than its rows."""
    assert mosaic_gpu.default_schedule(4, 1024, 128, jnp.bfloat16, batch=256).bn == 192
    assert mosaic_gpu.default_schedule(4, 1024, 128, jnp.bfloat16, batch=8).bn == 64  # one each


def test_few_rows_take_one_wave_of_tall_tiles_and_many_share_w():
    def default(m, n, k):
        return mosaic_gpu.default_schedule(m, n, k, jnp.bfloat16)

    assert {default(m, 4096, 4096).kind for m in (1, 8, 9, 16, 17, 32)} == {"swapped"}
    assert default(8, 10_240, 5120).kind == "normal"  # 160 tiles of 64 rows: two waves
    assert default(8, 1024, 1024).bn == 16  # 16 tiles of 64 rows: too few multiprocessors
    assert {default(m, 4096, 12_288).cm for m in (65, 127, 128)} == {2}


@pytest.mark.parametrize("n", [300, 301, 304])
def test_a_tile_begins_at_multiples_of_16_bytes(n):
    """Of w [K, N] and y: the copy engine takes no other columns (h200-check-matmul-narrow.json)."""
    x, w = jnp.zeros((9, 192), jnp.bfloat16), jnp.zeros((192, n), jnp.bfloat16)
    made = jax.make_jaxpr(
        lambda x, w: mosaic_gpu.matmul(x, w, k_last=False, out_dtype=jnp.float32)
    )(x, w)
    assert "f32[9,304]" in str(made) and "bf16[192,304]" in str(made)
    assert all(s.out_cols % 8 == 0 for s in mosaic_gpu.schedules(9, n, 192, jnp.bfloat16))


def test_every_schedule_states_its_budget():
    every = mosaic_gpu.schedules(1, 8, 64, jnp.bfloat16, out_size=2)
    assert len({str(s) for s in every}) == len(every)
    for s in every:
        assert s.smem_bytes(4) <= 232_448


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "upside down"}, "'normal' or 'swapped'"),
        ({"split": "k"}, "'m' or 'n'"),
        ({"bm": 32}, "multiple of 64"),
        ({"wgs": 2}, "multiple of 64"),
        ({"bn": 264}, "up to 256"),
        ({"cn": 3}, "1, 2 or 4"),
        ({"bn": 40, "cm": 2}, "parts of 8 rows"),
        ({"bk": 96}, "multiple of 64"),
        ({"stages": 1}, "stages"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"kind": "normal", "bm": 64, "bn": 32, "stages": 3} | fields))


@pytest.mark.parametrize(
    ("x", "w", "kwargs", "error", "message"),
    [
        ((2, 64), (8, 72), {}, ValueError, "share K"),
        ((2, 64), (8, 64), {"k_last": False}, ValueError, "w .K, N. must share K"),
        ((2, 64), (64, 8), {"k_last": False, "schedule": NORMAL}, ValueError, "squares of 64"),
        ((2, 64), (3, 8, 64), {}, ValueError, "x must be"),
        ((2, 2, 64), (3, 8, 64), {}, ValueError, "must share K"),
        ((2, 64), (8, 64), {"leaves": 3}, ValueError, "power of two"),
        ((2, 64), (8, 64), {"leaves": 16}, NotImplementedError, "multiples of 8"),
        ((2, 60), (8, 60), {}, NotImplementedError, "got 60 / 1 of .N, K."),
        ((2, 120), (120, 8), {"k_last": False, "leaves": 2}, NotImplementedError, "/ 2 of .K, N."),
        ((2, 64), (8, 64), {"out_dtype": jnp.int8}, NotImplementedError, "cannot write"),
        ((2, 64), (8, 64), {"bias": np.ones((4,), np.float32)}, ValueError, "bias must have shape"),
    ],
)
def test_what_it_cannot_do_is_said(x, w, kwargs, error, message):
    with pytest.raises(error, match=message):
        call(np.ones(x, jnp.bfloat16), np.ones(w, jnp.bfloat16), **kwargs)


def test_other_dtypes_are_refused():
    half, single = np.ones((8, 64), jnp.bfloat16), np.ones((8, 64), np.float32)
    with pytest.raises(ValueError, match="share a dtype"):
        call(half, single)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16 or float32, got int32"):
        call(half.astype(np.int32), half.astype(np.int32))


def test_a_schedule_without_room_is_refused():
    large = Schedule("normal", 128, 256, stages=4, wgs=2)
    half = np.ones((8, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no room"):
        call(half, half, leaves=2, schedule=large)
