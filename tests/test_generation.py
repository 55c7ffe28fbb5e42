"""`jdet.generate` and `jdet.score`: what people call."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdet
from jdet.engine.step import programs
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams
from jdet.testing import run_batch, same_bits, small_config


@functools.cache
def model() -> LanguageModel:
    config = DecoderConfig.from_hf(small_config())
    return jdet.random_model(config, dtype="bfloat16", implementation="portable")


def greedy(max_tokens: int = 8, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)


def test_results_come_in_input_order_whatever_the_batch_size() -> None:
    prompts = [[5] * n for n in (9, 1, 30, 4, 2)]
    a = jdet.generate(model(), prompts, greedy())
    b = jdet.generate(model(), prompts, greedy(), batch_size=2)
    assert [c.prompt_token_ids for c in a] == prompts
    assert [c.prompt_index for c in a] == [0, 1, 2, 3, 4]
    assert a == b  # text, ids, log-probs: every field


def test_a_second_call_of_like_sizes_compiles_nothing() -> None:
    m = model()
    jdet.generate(m, [[5] * 9, [6] * 12], greedy(8))
    before = programs(m.ops).compiles
    jdet.generate(m, [[7] * 14, [8] * 3], greedy(11, stop_token_ids=(9,)))
    assert programs(m.ops).compiles == before > 0


def test_a_prompt_read_in_chunks_beside_others_has_the_bits_of_the_core() -> None:
    """601 tokens in chunks of at most 512, which the core reads at once and alone."""
    prompt = np.random.default_rng(1).integers(0, 1536, 601).tolist()
    *_, door = jdet.generate(model(), [[1, 2], [3] * 5, prompt], greedy(6))
    (core,) = run_batch(model(), [(prompt, greedy(6))], max_tokens=6)
    assert same_bits((door.token_ids, np.array(door.logprobs, np.float32)), core)


def test_logprobs_of_the_prompt_and_of_the_most_probable() -> None:
    asked = greedy(6, logprobs=2, prompt_logprobs=1)
    _, c = jdet.generate(model(), [[1, 2], [3, 1, 4, 1, 5]], [greedy(6), asked])
    (scores,) = jdet.score(model(), [c.prompt_token_ids + c.token_ids])
    assert c.prompt_logprobs is not None and c.top_logprobs is not None
    assert c.prompt_logprobs + c.logprobs == scores
    best = [next(iter(top.items())) for top in c.top_logprobs]
    assert best == list(zip(c.token_ids, c.logprobs, strict=True))


def test_n_samples_differ_and_a_seed_repeats_them() -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=8)
    a = jdet.generate(model(), [[1, 2, 3], [1, 2, 3]], sampling)
    assert [(c.prompt_index, c.sample_index) for c in a] == [
        (i, j) for i in (0, 1) for j in range(3)
    ]
    assert len({tuple(c.token_ids) for c in a[:3]}) == 3
    assert [c.token_ids for c in a[:3]] == [c.token_ids for c in a[3:]]
    assert {c.seed for c in a} == {11}


def test_a_drawn_seed_is_reported_and_repeats_the_completion() -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=8)
    (a,), (b,) = (jdet.generate(model(), [[7, 8]], sampling) for _ in range(2))
    assert a.seed != b.seed
    again = SamplingParams(temperature=1.0, max_tokens=8, seed=a.seed)
    assert jdet.generate(model(), [[7, 8]], again) == [a]
    assert jdet.generate(model(), [[7, 8]], greedy())[0].seed is None


def test_a_stop_token_ends_its_row_and_no_other() -> None:
    prompts = [[3] * 5, [4] * 5, [9] * 5]
    free = jdet.generate(model(), prompts, greedy(12))
    stop = free[1].token_ids[4]
    end = free[1].token_ids.index(stop) + 1
    cut = jdet.generate(
        model(), prompts, [greedy(12), greedy(12, stop_token_ids=(stop,)), greedy(12)]
    )
    assert cut[1].token_ids == free[1].token_ids[:end]
    assert cut[1].logprobs == free[1].logprobs[:end]
    assert cut[1].finish_reason == "stop"
    assert (cut[0], cut[2]) == (free[0], free[2])
    assert free[0].finish_reason == "length"


def test_each_row_has_its_own_max_tokens() -> None:
    prompts = [[3] * 5, [4] * 5]
    long = jdet.generate(model(), prompts, greedy(12))
    mixed = jdet.generate(model(), prompts, [greedy(1), greedy(12)])
    assert mixed[0].token_ids == long[0].token_ids[:1]
    assert mixed[1] == long[1]


def test_tokens_stream_in_order_and_completely() -> None:
    seen: dict[tuple[int, int], list[int]] = {}

    def on_tokens(prompt: int, sample: int, ids: list[int]) -> None:
        seen.setdefault((prompt, sample), []).extend(ids)

    sampling = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=11)
    out = jdet.generate(model(), [[1], [2, 3]], sampling, on_tokens=on_tokens, steps_per_call=3)
    assert seen == {(c.prompt_index, c.sample_index): c.token_ids for c in out}
    assert out == jdet.generate(model(), [[1], [2, 3]], sampling, steps_per_call=64)


def test_changed_sampling_recompiles_nothing() -> None:
    m = model()
    step = jdet.jit(
        functools.partial(jdet.generate_tokens, ops=m.ops, max_tokens=4),
        static_argnames=("cache_length",),
    )
    prompts, lengths = np.ones((2, 3), np.int32), np.array([3, 2], np.int32)
    for t, k, p in ((0.0, 0, 1.0), (0.5, 3, 0.9), (2.0, 0, 0.1)):
        params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=4)] * 2
        step(m.decoder, prompts, lengths, jdet.sampling_arrays(params))
    assert step._cache_size() == 1


def test_the_core_runs_under_a_users_own_jit() -> None:
    """The while loop inside another jit, without jdet's door, gives the door's tokens."""
    m = model()

    @functools.partial(jax.jit, compiler_options=jdet.compiler_options())
    def mine(decoder, prompts, lengths, sampling):
        return jdet.generate_tokens(decoder, prompts, lengths, sampling, max_tokens=8, ops=m.ops)

    out = mine(
        m.decoder,
        np.array([[3, 1, 4, 1, 5]], np.int32),
        np.array([5], np.int32),
        jdet.sampling_arrays([greedy()]),
    )
    (door,) = jdet.generate(m, [[3, 1, 4, 1, 5]], greedy())
    assert out.token_ids[0].tolist() == door.token_ids
    assert out.logprobs[0].tolist() == door.logprobs


def test_steps_between_two_looks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, assert_same_bits
) -> None:
    """Rows end in the middle of a look's steps, one by a stop token; what follows is dropped."""
    m = model()
    prompts = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 3, 5, 8, 9]], np.int32)
    lengths = np.array([5, 3, 5], np.int32)

    def sampling(last: int) -> jdet.sampling.SamplingArrays:
        rows = [greedy(4), greedy(11, stop_token_ids=(last,)), greedy(10)]
        return jdet.sampling_arrays(rows)

    def compiled(steps: int) -> tuple[Callable[[int], jdet.decoding.GeneratedTokens], str]:
        monkeypatch.setattr(jdet.decoding, "_STEPS_A_LOOK", {"cpu": steps})
        jitted = jdet.jit(
            functools.partial(jdet.generate_tokens, ops=m.ops, max_tokens=11, cache_fill=jnp.nan)
        )

        program = jitted.lower(m.decoder, prompts, lengths, sampling(0)).compile()

        def run(last: int) -> jdet.decoding.GeneratedTokens:
            return program(m.decoder, prompts, lengths, sampling(last))

        return run, program.as_text()

    (one, short), (eight, long) = compiled(1), compiled(8)
    assert 'known_trip_count":{"n":"8"' in long and 'known_trip_count":{"n":"8"' not in short
    last = int(one(m.config.vocab_size - 1).token_ids[1, 6])
    ended = one(last)
    assert ended.count.tolist()[::2] == [4, 10] and ended.stopped[1]
    for a, b in zip(ended, eight(last), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[]], None, "prompt 0 is empty"),
        ([[1], [1536]], None, r"prompt 1 has token ids outside 0\.\.1535"),
        ([[1] * 2000], SamplingParams(seed=1), "at most 2048"),
        (["text"], None, "no tokenizer"),
        ("text", None, "one string"),
        ([[1], [2]], [SamplingParams()], "1 SamplingParams for 2 prompts"),
        ([[1]], SamplingParams(stop=("x",)), "stop strings need a tokenizer"),
        (
            [[1]],
            SamplingParams(logit_bias={1536: 1}),
            r"logit_bias has token ids outside 0\.\.1535",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(prompts, sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jdet.generate(model(), prompts, sampling)


def test_bad_scores_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        jdet.score(model(), [[1, 2], [1]])
    with pytest.raises(ValueError, match="outside"):
        jdet.score(model(), [[1, 99999]])


def test_a_cache_that_is_too_short_is_refused() -> None:
    m = model()
    with pytest.raises(ValueError, match="cache_length=256; allowed: from 304"):
        jdet.generate_tokens(
            m.decoder,
            jnp.ones((1, 300), jnp.int32),
            jnp.array([300], jnp.int32),
            jdet.sampling_arrays([greedy()]),
            max_tokens=4,
            cache_length=256,
            ops=m.ops,
        )


def test_flags_against_the_promise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_allow_excess_precision=true")
    with pytest.raises(RuntimeError, match="xla_allow_excess_precision"):
        jdet.generate(model(), [[1]], greedy())
