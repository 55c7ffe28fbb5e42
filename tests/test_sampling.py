"""Sampling: parameters are checked, and a row's token is its own whatever stands beside it."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jdet.compiler import jit
from jdet.ops import Ops
from jdet.rng import MAX_SEED, gumbel
from jdet.sampling import Asks, SamplingParams, sample, sampling_arrays

VOCABULARY = 300
draw = jit(
    lambda logits, s, at, asks=None: sample(logits, Ops().log_normalizer(logits), s, at, asks),
    static_argnums=3,
)
noise = jit(functools.partial(gumbel, vocab_size=VOCABULARY))


def logits_of(seed, batch, vocabulary=VOCABULARY):
    """Random logits, spread as a model's."""
    x = np.random.default_rng(seed).standard_normal((batch, vocabulary))
    return (3 * x).astype(np.float32)


def draw_tokens(logits, params, position, asks=None):
    return np.asarray(draw(logits, sampling_arrays(params), position, asks))


def mixed(batch):
    """Parameters of every kind, each row another."""
    kinds = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 1},
    ]
    return [SamplingParams(seed=100 + row, **kinds[row % len(kinds)]) for row in range(batch)]


# Parameters


def untyped(**values: Any) -> SamplingParams:
    """Parameters as they come from JSON or a command line."""
    return SamplingParams(**values)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("n", (0, -1, 1.0, "2", None, True), "integers from 1"),
        ("top_k", (-1, 2.5, "all", False, 2**31), r"integers from 0 to 2\*\*31-1"),
        ("max_tokens", (0, -5, 10.0, None, 2**31), r"integers from 1 to 2\*\*31-1"),
        ("temperature", (-1, -0.1, 1e-37, 9e-5, 10001, "1", None, True), "0, or 1e-4 to 1e4"),
        ("temperature", (float("nan"), float("inf")), "0, or 1e-4 to 1e4"),
        ("top_p", (0, 0.0, -0.5, 1.01, float("nan"), None), "0 < top_p <= 1"),
        ("min_p", (-0.01, 1.5, float("nan"), "0"), "0 <= min_p <= 1"),
        ("seed", (-1, 2**64, 1.0, "7", True), r"integers 0\.\.2\*\*64-1"),
        ("stop", (("",), ("a", ""), (1,), ""), "non-empty strings"),
        (
            "stop_token_ids",
            ((-1,), (1.0,), ("a",), (True,), (3, 2**31)),
            r"token ids from 0 to 2\*\*31-1",
        ),
        ("min_tokens", (-1, 1.0, None), r"integers from 0 to 2\*\*31-1"),
        ("min_tokens", (129,), "0 to max_tokens=128"),
        ("logprobs", (-1, 21, True, 1.0), r"None, integers 0\.\.20"),
        ("prompt_logprobs", (-1, 21, "5"), r"None, integers 0\.\.20"),
        ("logit_bias", ([1, 2], 5), "a mapping from token ids"),
        ("logit_bias", ({-1: 1.0}, {"a": 1.0}, {2**31: 1.0}), r"token ids from 0 to 2\*\*31-1"),
    ],
)
def test_value_outside_its_range(name, values, allowed):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}=.*; allowed: {allowed}$") as error:
            untyped(**{name: value})
        shown = (value,) if name == "stop" and isinstance(value, str) else value
        assert f"{name}={shown!r}" in str(error.value)


def test_values_at_the_ends_of_their_ranges():
    SamplingParams(n=1, temperature=0, top_p=1, top_k=0, min_p=0, seed=0, max_tokens=1)
    SamplingParams(n=9, temperature=1e-4, top_p=1e-6, top_k=10**6, min_p=1, seed=MAX_SEED)
    SamplingParams(temperature=1e4)
    untyped(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(MAX_SEED))


def test_a_bias_lies_within_100_and_is_kept_in_the_order_of_ids():
    for value in (-100.1, 101, float("nan"), "1", None, True):
        with pytest.raises(ValueError, match="logit_bias=.*; allowed: -100 to 100"):
            untyped(logit_bias={5: value})
    params = untyped(logit_bias={7: 1, np.int64(3): -100.0})
    assert params.logit_bias == ((3, -100.0), (7, 1.0))
    assert dataclasses.replace(params, n=1) == params


def test_bias_and_min_tokens_change_their_own_rows_alone():
    logits, position = logits_of(3, 8), jnp.full(8, 2, jnp.int32)
    plain = mixed(8)
    best = int(np.argmax(logits[0]))
    asking = list(plain)
    asking[0] = dataclasses.replace(plain[0], logit_bias={best: -100.0})
    asking[3] = dataclasses.replace(plain[3], logit_bias={11: 100.0})
    asking[7] = dataclasses.replace(
        plain[7], temperature=0, min_tokens=3, stop_token_ids=(int(np.argmax(logits[7])),)
    )
    without = draw_tokens(logits, plain, position)
    with_them = draw_tokens(logits, asking, position)
    others = [1, 2, 4, 5, 6]
    assert (with_them[others] == without[others]).all()
    assert with_them[0] == np.argsort(logits[0])[-2]
    assert with_them[3] == 11
    assert with_them[7] == np.argsort(logits[7])[-2]
    reached = draw_tokens(logits, asking, position + 1)
    assert reached[7] == np.argmax(logits[7])


def test_what_the_caller_knows_of_the_rows_changes_no_token():
    logits, position = logits_of(4, 7), jnp.zeros(7, jnp.int32)
    params = mixed(7)
    tokens = draw_tokens(logits, params, position)
    assert (draw_tokens(logits, params, position, Asks(True, True, True)) == tokens).all()
    greedy = [SamplingParams(temperature=0)] * 7
    for asks in (Asks(False, False, False), Asks(True, False, True)):
        assert (draw_tokens(logits, greedy, position, asks) == np.argmax(logits, -1)).all()


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    "values",
    [
        {"seed": np.int32(5)},
        {"seed": np.uint64(MAX_SEED)},
        {"top_k": LARGEST},
        {"max_tokens": LARGEST},
        {"stop_token_ids": (LARGEST,)},
        {"stop_token_ids": np.array([3, 4])},
    ],
    ids=str,
)
def test_what_passes_the_checks_can_be_packed(values):
    sampling_arrays([untyped(**{"seed": 1, **values})])


def test_numpy_integers_become_python_ones():
    names = ("n", "top_k", "max_tokens", "seed")
    params = untyped(**dict.fromkeys(names, np.int32(2)), stop_token_ids=np.array([3, 4]))
    assert [type(getattr(params, name)) for name in names] == [int] * 4
    assert [type(t) for t in params.stop_token_ids] == [int] * 2
    assert params == SamplingParams(n=2, top_k=2, max_tokens=2, seed=2, stop_token_ids=[3, 4])


def test_greedy_samples_would_all_be_one():
    with pytest.raises(ValueError, match="n=2 with temperature=0 would give 2 equal completions"):
        SamplingParams(n=2, temperature=0)


def test_stop_is_a_string_or_several():
    for given, kept in (("end", ("end",)), (["a", "b"], ("a", "b")), ((), ())):
        assert untyped(stop=given).stop == kept
    assert untyped(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)


def test_a_seed_is_drawn_only_where_noise_needs_one():
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0)):
        assert params.with_seed() is params
    first, second = (SamplingParams().with_seed() for _ in range(2))
    assert first.seed != second.seed
    assert dataclasses.replace(first, seed=None) == SamplingParams()


def test_noise_needs_a_seed():
    with pytest.raises(ValueError, match="seed=None with temperature > 0"):
        sampling_arrays([SamplingParams(temperature=0), SamplingParams()])
    sampling_arrays([SamplingParams(temperature=0)])


def test_arrays_hold_a_row_each():
    params = [
        SamplingParams(temperature=0, stop_token_ids=(9, 4), max_tokens=3),
        SamplingParams(seed=MAX_SEED, ignore_eos=True, top_k=7, top_p=0.5, min_p=0.25),
        SamplingParams(seed=2**32, stop_token_ids=(2,)),
    ]
    s = sampling_arrays(params, eos_token_ids=(2, 5), sample_index=(0, 1, 2))
    np.testing.assert_array_equal(s.seed, [[0, 0], [2**32 - 1, 2**32 - 1], [1, 0]])
    np.testing.assert_array_equal(s.sample_index, [0, 1, 2])
    np.testing.assert_array_equal(s.max_tokens, [3, 128, 128])
    np.testing.assert_array_equal(s.temperature, [0, 1, 1])
    np.testing.assert_array_equal(s.top_k, [0, 7, 0])
    np.testing.assert_array_equal(s.top_p, [1, 0.5, 1])
    np.testing.assert_array_equal(s.min_p, [0, 0.25, 0])
    ends = [[2, 4, 5, 9], [], [2, 5]]
    np.testing.assert_array_equal(s.stop_token_ids, [e + [-1] * (8 - len(e)) for e in ends])


# The choice of a token


def test_greedy_takes_the_lowest_of_equal_tokens():
    logits = logits_of(0, 4)
    logits[0, [17, 200, 299]] = logits[0].max() + 1
    logits[1] = 0
    logits[2, 299] = 50
    logits[3] = -np.inf
    logits[3, 123] = -1e30
    tokens = draw(logits, sampling_arrays([SamplingParams(temperature=0)] * 4), jnp.arange(4))
    np.testing.assert_array_equal(tokens, [17, 0, 299, 123])


def kept_by(params, scaled):
    """The truncations in plain numpy: token ids that min_p, then top_k, then top_p leave."""
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    p = np.exp(scaled[order].astype(np.float64) - scaled.max())
    keep = [i for i in range(len(order)) if p[i] >= params.min_p]
    keep = keep[: params.top_k or None]
    total, sum_before, kept = p[keep].sum(), 0.0, set()
    for i in keep:
        if params.top_p >= 1 or sum_before < params.top_p * total:
            kept.add(order[i])
        sum_before += p[i]
    return kept


TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCABULARY + 1},
    {"top_p": 1e-6},
    {"top_p": 0.37},
    {"top_p": 0.999},
    {"min_p": 0.013},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.83},
    {"top_k": 20, "top_p": 0.83, "min_p": 0.037},
    {"top_p": 0.71, "min_p": 0.003},
    {},
]


@pytest.mark.parametrize("content", ["random", "tied", "flat", "banned"])
def test_truncations_are_those_of_plain_numpy(content):
    """A row's noise is known, so the token that must win is, whatever was cut away.

    Ties are cut by token id: the lower one stays.
    """
    batch = 8 * len(TRUNCATIONS)
    logits = logits_of(1, batch)
    if content == "tied":
        logits = np.round(logits)
    elif content == "flat":
        # 256 equal tokens and 44 that cannot be: thresholds in exact binary fractions.
        logits = np.where(np.arange(VOCABULARY) < 256, np.float32(1), np.float32(-200))
        logits = np.tile(logits, (batch, 1))
    elif content == "banned":
        logits[:, ::2] = -np.inf
    params = [
        SamplingParams(seed=row, temperature=(0.6, 1.0, 1.7)[row % 3], **TRUNCATIONS[row // 8])
        for row in range(batch)
    ]
    s = sampling_arrays(params)
    position = np.arange(batch, dtype=np.int32)
    tokens = np.asarray(draw(logits, s, position))
    gumbels = np.asarray(noise(s.seed, s.sample_index, position))
    for row, p in enumerate(params):
        scaled = (logits[row] - logits[row].max()) / np.float32(p.temperature)
        kept = kept_by(p, scaled)
        noisy = [x if t in kept else -np.inf for t, x in enumerate(scaled + gumbels[row])]
        assert tokens[row] == np.argmax(noisy), p


@pytest.mark.parametrize("scale", [1, 1.6e37, -1.6e37])
@pytest.mark.parametrize(
    "values",
    [{"temperature": 1e-4}, {"top_p": 1e-37}, {"top_p": 1e-46}, {"min_p": 1, "top_p": 1e-46}],
    ids=str,
)
def test_smallest_values_take_the_most_probable_token(values, scale):
    """Of logits near float32's largest, too: divided by 1e-4 those would all be infinite."""
    logits = np.array([[0, 12, 9, 20, 5]], np.float32) * np.float32(scale)
    s = sampling_arrays([SamplingParams(seed=1, **values)])
    [token] = draw(logits, s, np.zeros(1, np.int32))
    assert token == np.argmax(logits)


@pytest.mark.parametrize("batch", [1, 2, 8, 33])
def test_token_follows_neither_batch_nor_neighbours(batch):
    """Each row among rows with all kinds of parameters, and among greedy rows only.

    The second batch skips what the first does (the noise, the sort) in all rows but one.
    """
    logits, params = logits_of(2, 65), mixed(65)
    position = np.arange(65, dtype=np.int32) * 3
    whole = np.asarray(draw(logits, sampling_arrays(params), position))
    pick = (np.arange(batch) + 5 * batch) % 65
    tokens = draw(logits[pick], sampling_arrays([params[i] for i in pick]), position[pick])
    assert tokens.shape == (batch,)
    np.testing.assert_array_equal(tokens, whole[pick])
    greedy = SamplingParams(temperature=0)
    for row, i in list(enumerate(pick))[:7]:
        around = [greedy] * batch
        around[row] = params[i]
        alone = draw(logits[pick], sampling_arrays(around), position[pick])
        assert alone[row] == whole[i], params[i]


def test_neighbours_of_nan():
    logits, params = logits_of(3, 33), mixed(33)
    position = np.arange(33, dtype=np.int32)
    expected = np.asarray(draw(logits, sampling_arrays(params), position))
    for row in range(7):
        among = np.full_like(logits, np.nan)
        among[row] = logits[row]
        assert draw(among, sampling_arrays(params), position)[row] == expected[row]


def test_other_parameters_do_not_recompile():
    logits, position = logits_of(4, 6), np.zeros(6, np.int32)
    programs = []
    for params in (
        [SamplingParams(temperature=0)] * 6,
        [SamplingParams(temperature=0.5, seed=1, stop_token_ids=(1, 2, 3))] * 6,
        mixed(6),
    ):
        draw(logits, sampling_arrays(params, eos_token_ids=(0,)), position)
        programs.append(draw._cache_size())
    assert programs == programs[:1] * 3
    draw(logits[:5], sampling_arrays(mixed(5)), position[:5])
    assert draw._cache_size() == programs[0] + 1


def sequences(params, sample_index=0, steps=64):
    """The tokens of one request at positions 0.., on logits that leave the choice open."""
    s = sampling_arrays([params] * steps, sample_index=[sample_index] * steps)
    flat = np.zeros((steps, VOCABULARY), np.float32)
    return np.asarray(draw(flat, s, np.arange(steps, dtype=np.int32)))


def test_same_seed_same_tokens():
    params = SamplingParams(seed=11)
    np.testing.assert_array_equal(sequences(params), sequences(params))


def test_samples_and_seeds_differ():
    seeds = (0, 1, 2**32 - 1, 2**32, 2**63, MAX_SEED - 1, MAX_SEED)
    rows = [sequences(SamplingParams(seed=s), i) for s in seeds for i in range(3)]
    assert len({tuple(r) for r in rows}) == len(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature):
    """Chi-square over 20,000 positions of one request; 24.3 is passed by chance in 1 of 1000."""
    positions = 20_000
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0], np.float32)
    s = sampling_arrays([SamplingParams(seed=5, temperature=temperature)])
    s = s._replace(**{f: np.repeat(getattr(s, f), positions, axis=0) for f in s._fields})
    tokens = draw(np.tile(logits, (positions, 1)), s, np.arange(positions, dtype=np.int32))
    expected = np.exp(logits.astype(np.float64) / temperature)
    expected *= positions / expected.sum()
    counts = np.bincount(np.asarray(tokens), minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3
