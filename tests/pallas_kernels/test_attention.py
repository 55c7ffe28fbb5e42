"""Attention: right against float64, and the same bits however a request is batched and cut.

A request is a set of queries, keys and values at positions 0, 1, ...; the tests form it into
prefills, chunks, decode steps, batches and caches, and compare the queries' results.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdet.compiler import jit
from jdet.pallas_kernels.attention import portable

# Query heads, key heads and head size: SmolLM2-135M, and the proportions of Qwen3.
HEADS = {"9/3 of 64": (9, 3, 64), "8/2 of 128": (8, 2, 128)}
heads_of_both = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
SMOL, QWEN = HEADS.values()


@heads_of_both
def test_right(attend, request_of, implementation, dtype, heads, assert_attends):
    """Rows at the start, middle and end of three splits; weights are rounded to v's dtype."""
    q, k, v = request_of(0, heads, 4, 192, dtype, batch=2)
    positions = [[0, 63, 64, 191], [1, 2, 130, 131]]
    assert_attends(attend(implementation, q, k, v, positions, 64), q, k, v, positions)


@pytest.mark.parametrize("among", ["reference", "portable"])
def test_query_that_sees_nothing_gives_zeros(attend, request_of, dtype, among):
    q, k, v = request_of(0, SMOL, 4, 64, dtype)
    out = attend(among, q, k, v, [3, -1, -1, 40], 16)
    np.testing.assert_array_equal(out.astype(np.float32)[0, 1:3], 0)
    assert (out.astype(np.float32)[0, [0, 3]] != 0).all()
    nothing = attend(among, q, k, v, [-1] * 4, 16)
    np.testing.assert_array_equal(nothing.astype(np.float32), 0)


@pytest.mark.parametrize(("slots", "kv_split"), [(64, 16), (128, 64)])
def test_decode_is_prefill_at_every_position(
    attend, request_of, invariant, dtype, slots, kv_split, assert_same_bits
):
    q, k, v = request_of(0, SMOL, slots, slots, dtype)
    prefill = attend(invariant, q, k, v, range(slots), kv_split)
    for t in range(slots):
        step = attend(invariant, q[:, t : t + 1], k, v, [t], kv_split)
        assert_same_bits(step, prefill[:, t : t + 1], f"position {t}")


@heads_of_both
def test_decode_is_prefill_around_splits_of_256(
    attend, request_of, invariant, dtype, heads, assert_same_bits
):
    """The prefill ends at each of the contexts' lengths as well: its last splits are masked."""
    q, k, v = request_of(0, heads, 514, 768, dtype)
    prefill = attend(invariant, q, k, v, range(514), 256)
    for context in (1, *range(254, 259), *range(510, 515)):
        t = context - 1
        step = attend(invariant, q[:, t : t + 1], k, v, [t], 256)
        assert_same_bits(step, prefill[:, t : t + 1], f"context {context}")
        positions = np.where(np.arange(514) <= t, np.arange(514), -1)
        shorter = attend(invariant, q, k, v, positions, 256)
        assert_same_bits(shorter[:, :context], prefill[:, :context], f"prefill of {context}")


@pytest.mark.parametrize(
    "chunks",
    [(32, 32), (16,) * 4, (7,) * 9 + (1,), (1, 31, 32), (31, 1, 1, 31)],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_chunks_of_a_prompt(attend, request_of, invariant, dtype, chunks, assert_same_bits):
    """Slots after the chunk hold NaN: the cache is written as far as the chunk's end."""
    assert sum(chunks) == 64
    q, k, v = request_of(0, SMOL, 64, 64, dtype)
    prefill = attend(invariant, q, k, v, range(64), 16)
    start = 0
    for length in chunks:
        end = start + length
        written = (np.arange(64) < end)[:, None]
        ks, vs = (np.where(written, x, np.array(np.nan, dtype)) for x in (k, v))
        chunk = attend(invariant, q[:, start:end], ks, vs, range(start, end), 16)
        assert_same_bits(chunk, prefill[:, start:end], f"chunk {start}..{end}")
        start = end


def test_chunk_that_starts_inside_a_split_of_256(
    attend, request_of, invariant, dtype, assert_same_bits
):
    q, k, v = request_of(0, SMOL, 514, 768, dtype)
    prefill = attend(invariant, q, k, v, range(514), 256)
    for chunk in (slice(0, 257), slice(257, 514), slice(100, 357)):
        out = attend(invariant, q[:, chunk], k, v, range(514)[chunk], 256)
        assert_same_bits(out, prefill[:, chunk], str(chunk))


@pytest.mark.parametrize(
    ("dim", "of"),
    [*((dim, np.float32) for dim in (16, 24, 32, 48, 80, 96, 256)), (24, np.float16)],
)
def test_every_head_dim(attend, request_of, dim, of, assert_same_bits):
    """XLA:CPU's product with values as they lie changes with the number of rows at most dims."""
    q, k, v = request_of(0, (2, 1, dim), 96, 96, of)
    prefill = attend("portable", q, k, v, range(96), 16)
    for chunk in (slice(90, 91), slice(10, 14), slice(0, 40), slice(0, 65)):
        out = attend("portable", q[:, chunk], k, v, range(96)[chunk], 16)
        assert_same_bits(out, prefill[:, chunk], str(chunk))


def test_a_split_of_512(attend, request_of, assert_same_bits):
    """There it changes at 128 columns too, which it does not at 256 keys."""
    q, k, v = request_of(0, (1, 1, 128), 600, 1024, np.float32)
    prefill = attend("portable", q, k, v, range(600), 512)
    for chunk in (slice(599, 600), slice(0, 32), slice(500, 565)):
        out = attend("portable", q[:, chunk], k, v, range(600)[chunk], 512)
        assert_same_bits(out, prefill[:, chunk], str(chunk))


def test_decode_row_does_not_follow_the_batch(
    attend, request_of, invariant, dtype, rows, assert_rows_alike
):
    """One split: everything that a batch could change but the merge."""
    q, k, v = request_of(0, SMOL, 1, 16, dtype, batch=300)
    positions = np.arange(300, dtype=np.int32)[:, None] % 17 - 1
    assert_rows_alike(
        lambda q, k, v, at: attend(invariant, q, k, v, at, 16), (q, k, v, positions), rows
    )


def test_decode_row_over_four_splits_does_not_follow_the_batch(
    attend, request_of, invariant, dtype, assert_rows_alike
):
    """Contexts of 1..64 among each other: short ones walk the splits of the longest."""
    q, k, v = request_of(0, SMOL, 1, 64, dtype, batch=300)
    positions = np.arange(300, dtype=np.int32)[:, None] * 23 % 64
    assert_rows_alike(
        lambda q, k, v, at: attend(invariant, q, k, v, at, 16),
        (q, k, v, positions),
        (1, 5, 33),
    )


def test_query_does_not_follow_the_length_of_the_prefill(
    attend, request_of, invariant, dtype, few_rows, assert_same_bits
):
    q, k, v = request_of(0, SMOL, 300, 512, dtype)
    whole = attend(invariant, q, k, v, range(300), 512)
    for length in few_rows:
        start = (300 - length) * 7 // 11
        stop = start + length
        part = attend(invariant, q[:, start:stop], k, v, range(start, stop), 512)
        assert_same_bits(part, whole[:, start:stop], f"T={length}")


def test_neighbours_with_longer_contexts(attend, request_of, invariant, dtype, assert_same_bits):
    """The same rows, among neighbours that need one, two, three and all four splits."""
    q, k, v = request_of(0, QWEN, 1, 64, dtype, batch=4)
    for context in (1, 15, 16, 17, 40):
        row = context % 4
        alone = [[-1]] * 4
        alone[row] = [context - 1]
        expected = attend(invariant, q, k, v, alone, 16)[row]
        for longest in (16, 17, 33, 64):
            around = [[longest - 1]] * 4
            around[row] = [context - 1]
            out = attend(invariant, q, k, v, around, 16)[row]
            assert_same_bits(out, expected, f"context {context} beside {longest}")


def test_longer_cache(attend, request_of, invariant, dtype, assert_same_bits):
    """A cache of one split has a path of its own, without a merge."""
    q, k, v = request_of(0, SMOL, 16, 128, dtype)
    caches = [attend(invariant, q, k[:, :, :s], v[:, :, :s], range(16), 16) for s in (16, 64, 128)]
    for out in caches[1:]:
        assert_same_bits(out, caches[0])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38], ids=str)
def test_what_unwritten_slots_and_padded_queries_hold(
    attend, request_of, invariant, dtype, garbage, assert_same_bits
):
    """Two prompts of 5 and 21 tokens in a prefill of 32: padding in queries, keys, values."""
    q, k, v = request_of(0, SMOL, 32, 64, dtype, batch=2)
    lengths = np.array([5, 21])[:, None]
    real, written = np.arange(32) < lengths, np.arange(64) < lengths
    positions = np.where(real, np.arange(32), -1)
    clean = attend(invariant, q, k, v, positions, 16)

    def spoil(x, good):
        return np.where(good, x, np.array(garbage, dtype))

    out = attend(
        invariant,
        spoil(q, real[:, :, None, None]),
        spoil(k, written[:, None, :, None]),
        spoil(v, written[:, None, :, None]),
        positions,
        16,
    )
    for row, length in enumerate((5, 21)):
        assert_same_bits(out[row, :length], clean[row, :length])


def test_schedules_agree(request_of, dtype, assert_same_bits):
    schedules = [
        jit(f, static_argnames=("scale", "kv_split"))
        for f in (portable.attention_whole, portable.attention_tiled)
    ]
    for batch, length, slots in ((2, 33, 64), (5, 1, 16)):
        q, k, v = request_of(0, SMOL, length, slots, dtype, batch)
        positions = np.arange(length) + np.arange(batch)[:, None] * 7 % (slots - length)
        at = positions.astype(np.int32)
        whole, tiled = (f(q, k, v, at, scale=0.125, kv_split=16) for f in schedules)
        assert_same_bits(tiled, whole, f"B={batch}, T={length}")


# Rows of queries at positions; the pages of every size end inside of them, at them, and never.
PAGED = {
    "decode": [[0], [15], [16], [255], [256], [-1], [600]],
    "prefill": [[*range(70)], [*range(33), *[-1] * 37]],
    "chunk": [[*range(250, 290)], [*range(10), *[-1] * 30], [*range(500, 540)]],
}
pages_of_all_sizes = pytest.mark.parametrize("page_size", [16, 64, 256])


@pages_of_all_sizes
@pytest.mark.parametrize("kind", PAGED)
def test_pages_give_the_bits_of_a_contiguous_cache(
    attend, request_of, paged, invariant, dtype, page_size, kind, assert_same_bits
):
    positions = PAGED[kind]
    q, k, v = request_of(0, SMOL, len(positions[0]), 768, dtype, batch=len(positions))
    whole = attend(invariant, q, k, v, positions, 256)
    *pages, table = paged(k, v, positions, page_size)
    assert_same_bits(attend(invariant, q, *pages, positions, 256, table), whole)


def test_schedules_agree_on_pages(request_of, paged, dtype, assert_same_bits):
    """In pages of 32 a split of 64 is gathered; the table ends inside of the last one."""
    positions = np.array([[*range(60, 90)], [*range(30)]], np.int32)
    q, k, v = request_of(0, SMOL, 30, 96, dtype, batch=2)
    *pages, table = paged(k, v, positions, 32)
    whole, tiled = (
        jit(f, static_argnames=("scale", "kv_split"))(
            q, *pages, positions, table, scale=0.125, kv_split=64
        )
        for f in (portable.attention_whole, portable.attention_tiled)
    )
    assert_same_bits(tiled, whole)


def test_pages_are_right(attend, request_of, paged, implementation, dtype, assert_attends):
    """Plain XLA and the reference as well, whatever lies in pages that nobody uses."""
    positions = [[0, 63, 64, 191], [1, 2, 130, 131]]
    q, k, v = request_of(0, SMOL, 4, 192, dtype, batch=2)
    *pages, table = paged(k, v, positions, 16)
    out = attend(implementation, q, *pages, positions, 64, table)
    assert_attends(out, q, k, v, positions)


@pages_of_all_sizes
def test_rows_that_share_pages(
    attend, request_of, paged, invariant, dtype, page_size, assert_same_bits
):
    """A prompt of 256 tokens in one place for three rows that go on differently."""
    positions = [[300], [256], [600]]
    q, k, v = request_of(0, SMOL, 1, 768, dtype, batch=3)
    k[:, :, :256], v[:, :, :256] = k[:1, :, :256], v[:1, :, :256]
    whole = attend(invariant, q, k, v, positions, 256)
    *pages, table = paged(k, v, positions, page_size, shared=256 // page_size)
    assert_same_bits(attend(invariant, q, *pages, positions, 256, table), whole)


def test_prompt_written_into_pages_in_chunks(
    attend, request_of, invariant, dtype, assert_same_bits
):
    q, k, v = request_of(0, SMOL, 48, 48, dtype)
    whole = attend(invariant, q, k, v, range(48), 16)
    pages = [np.full((5, 3, 16, 64), np.nan, dtype) for _ in "kv"]
    table = np.array([[4, 0, 3]], np.int32)
    for start in range(0, 48, 20):
        at = np.arange(start, start + 20)[None]
        at = np.where(at < 48, at, -1).astype(np.int32)
        for t in at[0][at[0] >= 0]:
            for side, new in zip(pages, (k, v), strict=True):
                side[table[0, t // 16], :, t % 16] = np.asarray(new[0, :, t])
        out = attend(invariant, q[:, at[0]], *pages, at, 16, table)
        real = at[0] >= 0
        assert_same_bits(out[:, real], whole[:, at[0, real]], f"chunk from {start}")


def test_keys_in_the_order_of_their_pages_places_are_other_bits(
    attend, request_of, paged, implementation, assert_attends
):
    """The control of shuffled pages. Plain XLA gathers them too, so places alone move none of its
    bits; a sum that followed them would: the same keys, walked as they lie."""
    positions = [[255]]
    q, k, v = request_of(0, SMOL, 1, 256, jnp.float32)
    *pages, table = paged(k, v, positions, 16)
    own, as_they_lie = (
        attend(implementation, q, *pages, positions, 256, pages_of)
        for pages_of in (table[:, :16], np.sort(table[:, :16]))
    )
    assert_attends(as_they_lie, q, k, v, positions)
    assert (own != as_they_lie).any()


@pytest.mark.parametrize(
    ("size", "message"),
    [(24, "pages of 24 slots; must be a multiple of 16"), (128, "pages of 128 .* kv_split=64")],
)
def test_pages_that_do_not_fit(attend, request_of, size, message):
    q, k, v = request_of(0, SMOL, 1, size, jnp.float32, batch=2)
    with pytest.raises(ValueError, match=message):
        attend("portable", q, k, v, [3], 64, np.zeros((2, 1), np.int32))


def test_split_is_part_of_the_contract(attend, request_of, invariant):
    """Other splits, other bits: were it not so, the tests above would compare nothing."""
    q, k, v = request_of(0, SMOL, 64, 64, jnp.float32)
    fine, coarse = (attend(invariant, q, k, v, range(64), s) for s in (16, 64))
    assert (fine != coarse).any()


def test_negative_control(attend, request_of, bits):
    """Plain XLA fails the comparison of decode with prefill."""
    q, k, v = request_of(0, SMOL, 64, 64, jnp.float32)
    prefill = bits(attend("xla", q, k, v, range(64), 16))
    steps = [bits(attend("xla", q[:, t : t + 1], k, v, [t], 16)) for t in range(64)]
    assert any((step != prefill[:, t : t + 1]).any() for t, step in enumerate(steps))


def test_neighbours_of_nan(attend, request_of, invariant, dtype, assert_same_bits):
    q, k, v = request_of(0, SMOL, 1, 64, dtype, batch=5)
    expected = attend(invariant, q, k, v, [50], 16)
    own = (np.arange(5) == 3)[:, None, None, None]
    among = (np.where(own, x, np.array(np.nan, dtype)) for x in (q, k, v))
    out = attend(invariant, *among, [50], 16)
    assert_same_bits(out[3], expected[3])
    assert np.isnan(out.astype(np.float32)[[0, 1, 2, 4]]).all()


def test_runs_twice_alike(attend, request_of, invariant, dtype, assert_same_bits):
    q, k, v = request_of(0, SMOL, 64, 64, dtype)
    first, second = (attend(invariant, q, k, v, range(64), 16) for _ in range(2))
    assert_same_bits(first, second)


@settings(max_examples=40)
@given(
    batch=st.sampled_from([5, 33]),
    place=st.floats(0, 1, exclude_max=True),
    position=st.integers(0, 63),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-12, 3),
)
def test_any_batch_any_row_any_content(
    attend, request_of, invariant, assert_same_bits, batch, place, position, seed, exponent
):
    """Large scores make single keys win, small ones make all alike."""
    rng = np.random.default_rng(seed)
    row = int(place * batch)
    q, k, v = request_of(seed, SMOL, 1, 64, jnp.float32, batch)
    q = q * np.float32(2.0**exponent)
    positions = rng.integers(-1, 64, (batch, 1))
    positions[row] = position
    among = attend(invariant, q, k, v, positions, 16)
    alone = attend(invariant, *(x[row : row + 1] for x in (q, k, v)), [position], 16)
    assert_same_bits(among[row], alone[0])
