"""Sliding window and soft cap: right against float64, and the same bits however a request is cut.

Keys outside of a row's windows hold NaN here, and so do the pages that nobody uses.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.pallas_kernels.attention import portable

HEADS = (6, 2, 64)
# A window of one key; windows around a split of 256, shorter and longer ones.
WINDOWS = [{"sliding_window": w} for w in (1, 7, 255, 256, 257, 300)]
CAP = {"soft_cap": 2.0}
BOTH = {"sliding_window": 300, "soft_cap": 50.0}
SMALL = {"sliding_window": 20, "soft_cap": 4.0}


def name(options):
    return ", ".join(f"{key.split('_')[1]} {value}" for key, value in options.items())


def outside(positions, slots, sliding_window=None, soft_cap=None):
    """[B, 1, slots, 1]: the slots that no query of a row sees."""
    at, key = np.asarray(positions)[:, :, None], np.arange(slots)
    seen = (key <= at) & (key > at - (sliding_window or slots))
    return ~seen.any(1)[:, None, :, None]


def poisoned(k, v, positions, options):
    nowhere = outside(positions, k.shape[2], **options)
    return [np.where(nowhere, np.array(np.nan, x.dtype), x) for x in (k, v)]


def test_right(attend, request_of, implementation, assert_attends):
    """Around the ends of three splits; a window may begin in any of them."""
    positions = [[0, 6, 255, 256, 257], [299, 300, 511, 512, 700]]
    q, k, v = request_of(0, HEADS, 5, 768, np.float32, batch=2)
    out = attend(implementation, q, k, v, positions, 256, **BOTH)
    assert_attends(out, q, k, v, positions, **BOTH)


def test_right_in_16_bits(attend, request_of, implementation, assert_attends):
    q, k, v = request_of(0, HEADS, 3, 96, jnp.bfloat16)
    options = {"sliding_window": 40, "soft_cap": 5.0}
    out = attend(implementation, q, k, v, [[10, 50, 90]], 16, **options)
    assert_attends(out, q, k, v, [[10, 50, 90]], **options)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_scores_near_the_cap_and_far_from_it(
    attend, request_of, implementation, assert_attends, size
):
    """All weights alike; some; those of the largest scores, which the cap makes equal."""
    q, k, v = request_of(0, HEADS, 4, 64, np.float32)
    out = attend(implementation, q * np.float32(size), k, v, [3, 20, 40, 63], 16, soft_cap=3.0)
    assert_attends(out, q * np.float32(size), k, v, [3, 20, 40, 63], soft_cap=3.0)


@pytest.mark.parametrize("options", [*WINDOWS, CAP], ids=name)
def test_decode_is_prefill_around_splits_of_256(
    attend, request_of, invariant, assert_attends, assert_same_bits, options
):
    decode_is_prefill(
        attend, request_of, invariant, np.float32, assert_attends, assert_same_bits, options
    )


def test_decode_is_prefill_in_16_bits_and_in_pages(
    attend, request_of, invariant, assert_attends, assert_same_bits, paged
):
    q, k, v, at, steps = decode_is_prefill(
        attend, request_of, invariant, jnp.bfloat16, assert_attends, assert_same_bits, BOTH
    )
    *pages, table = paged(k, v, at, 64)
    out = attend(invariant, q, *pages, at, 256, table, **BOTH)
    assert_same_bits(out, steps)


def decode_is_prefill(
    attend, request_of, invariant, dtype, assert_attends, assert_same_bits, options
):
    """A batch of contexts at and between the ends of splits; NaN outside of each row's window."""
    q, k, v = request_of(0, HEADS, 560, 768, dtype)
    prefill = attend(invariant, q, k, v, range(560), 256, **options)
    t = np.array([0, 5, 6, 7, *range(253, 259), 299, 300, 301, *range(509, 515), 556, 559])
    q, at, k, v = q[0, t][:, None], t[:, None], *(np.repeat(x, len(t), 0) for x in (k, v))
    assert_attends(prefill[0, t][:, None], q, k, v, at, **options)
    k, v = poisoned(k, v, at, options)
    steps = attend(invariant, q, k, v, at, 256, **options)
    assert_same_bits(steps[:, 0], prefill[0, t])
    return q, k, v, at, steps


def test_pages_before_the_window_are_anybodys(
    attend, request_of, paged, invariant, assert_same_bits
):
    """Entries of the table before the window point anywhere, as those after the last key do."""
    positions = [[*range(40, 50)], [*range(100, 110)], [0, *[-1] * 9]]
    q, k, v = request_of(0, HEADS, 10, 128, np.float32, batch=3)
    whole = attend(invariant, q, k, v, positions, 32, **SMALL)
    *pages, table = paged(*poisoned(k, v, positions, SMALL), positions, 16)
    table[0, 0], table[1, :5] = 10**6, (-1, -(2**31), 10**6, table[0, 1], 2**31 - 1)
    out = attend(invariant, q, *pages, positions, 32, table, **SMALL)
    assert_same_bits(out[:2], whole[:2])
    assert_same_bits(out[2, :1], whole[2, :1])


def test_window_as_long_as_the_context_changes_no_bit(
    attend, request_of, invariant, assert_same_bits
):
    q, k, v = request_of(0, HEADS, 70, 96, np.float32)
    plain = attend(invariant, q, k, v, range(70), 16)
    for window, same in ((70, True), (69, False)):
        out = attend(invariant, q, k, v, range(70), 16, sliding_window=window)
        assert_same_bits(out[:, :69], plain[:, :69])
        assert (out == plain).all() == same


def test_chunks_of_a_prompt(attend, request_of, invariant, assert_same_bits):
    """Slots after a chunk, and before its windows, hold NaN."""
    q, k, v = request_of(0, HEADS, 64, 64, jnp.bfloat16)
    prefill = attend(invariant, q, k, v, range(64), 16, **SMALL)
    start = 0
    for length in (1, 31, 1, 31):
        at = [range(start, start + length)]
        chunk = attend(invariant, q[:, at[0]], *poisoned(k, v, at, SMALL), at, 16, **SMALL)
        assert_same_bits(chunk, prefill[:, at[0]], f"chunk {at}")
        start += length
    assert start == 64


def test_row_does_not_follow_the_batch(attend, request_of, invariant, assert_rows_alike):
    """The first and the last split that are walked are those of the neighbours."""
    q, k, v = request_of(0, HEADS, 1, 64, np.float32, batch=65)
    positions = np.arange(65, dtype=np.int32)[:, None] * 23 % 65 - 1
    k, v = poisoned(k, v, positions, SMALL)
    assert_rows_alike(
        lambda q, k, v, at: attend(invariant, q, k, v, at, 16, **SMALL),
        (q, k, v, positions),
        (1, 33),
    )


def test_schedules_agree(request_of, dtype, assert_same_bits):
    static = ("scale", "kv_split", *SMALL)
    schedules = portable.attention_whole, portable.attention_tiled
    q, k, v = request_of(0, HEADS, 33, 64, dtype, batch=2)
    at = (np.arange(33) + np.array([[0], [23]])).astype(np.int32)
    whole, tiled = (
        jit(f, static_argnames=static)(q, k, v, at, scale=0.125, kv_split=16, **SMALL)
        for f in schedules
    )
    assert_same_bits(tiled, whole)


def test_splits_before_every_window_are_not_computed(monkeypatch, request_of):
    """Windows of 17 keys in splits of 16."""
    seen, split = collections.Counter(), portable._split

    def counted(*args):
        jax.debug.callback(lambda: seen.update(splits=1))
        return split(*args)

    monkeypatch.setattr(portable, "_split", counted)
    q, k, v = request_of(0, HEADS, 1, 64, np.float32, batch=2)
    options = dict(scale=1.0, kv_split=16, sliding_window=17)
    windowed = jit(functools.partial(portable.attention_whole, **options))
    for positions, splits in (([63, -1], 2), ([47, 63], 3), ([63, 5], 4), ([-1, -1], 0)):
        seen.clear()
        windowed(q, k, v, np.array(positions, np.int32)[:, None]).block_until_ready()
        jax.effects_barrier()
        assert seen["splits"] == splits, positions


def test_negative_control(attend, request_of, bits):
    """Plain XLA fails the comparison of decode with prefill."""
    q, k, v = request_of(0, HEADS, 64, 64, np.float32)
    prefill = bits(attend("xla", q, k, v, range(64), 16, **SMALL))
    steps = [bits(attend("xla", q[:, t : t + 1], k, v, [t], 16, **SMALL)) for t in range(64)]
    assert any((step != prefill[:, t : t + 1]).any() for t, step in enumerate(steps))
