"""The engine's promise: under any load, every completion has the bits of its run alone.

"Alone" is the same request in an idle engine without prefix cache. Each test asserts that
the load it means to make was really made.
"""

import dataclasses
import functools
import random
from collections.abc import Callable

import numpy as np
import pytest

import jdet
from jdet.completion import Completion
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine, Handle
from jdet.engine.request import Request
from jdet.engine.scheduler import Plan
from jdet.models.config import DecoderConfig
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams
from jdet.testing import same_completions, small_config

# One shape for nearly all tests: what is compiled is shared.
CONFIG = EngineConfig(
    max_batch_size=8,
    max_tokens_per_step=72,
    max_model_len=512,
    page_size=16,
    num_pages=64,
    chunk_sizes=(16, 64),
    decode_rows=(1, 8),
)


@functools.cache
def model(implementation: str = "portable") -> LanguageModel:
    config = DecoderConfig.from_hf(small_config())
    return jdet.random_model(config, dtype="bfloat16", implementation=implementation)


def engine(
    config: EngineConfig = CONFIG,
    implementation: str = "portable",
    watch: Callable[[Plan], object] = lambda plan: None,
) -> Engine:
    return Engine(model(implementation), config, cache_fill=float("nan"), watch=watch)


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1536, length).tolist()


def greedy(max_tokens: int = 8, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)


def hot(seed: int, max_tokens: int = 8, **kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, max_tokens=max_tokens, **kwargs)


@functools.cache
def alone(
    prompt: tuple[int, ...], params: SamplingParams, implementation: str = "portable"
) -> list[Completion]:
    config = dataclasses.replace(CONFIG, prefix_caching=False)
    idle = engine(config, implementation)
    return idle.generate([list(prompt)], params)


def as_alone(run: Engine, handle: Handle, implementation: str = "portable") -> bool:
    first = handle.requests[0]
    wanted = alone(tuple(first.prompt), first.params, implementation)
    return same_completions(run.completions(handle), wanted)


def run_all(run: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Handle]:
    handles = [run.submit(prompt, params) for prompt, params in requests]
    while run.step():
        pass
    return handles


def mixed_load() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 330 tokens (two splits), every kind of sampling."""
    rng = random.Random(5)
    lengths = [1, 2, 15, 16, 17, 40, 64, 65, 120, 250, 257, 330]
    kinds = [
        greedy(12),
        hot(1, 6),
        hot(2, 9, top_p=0.9, top_k=40),
        greedy(5, logprobs=3),
        hot(3, 10, min_p=0.05, logit_bias={7: 4.0, 9: -100.0}),
        hot(4, 7, prompt_logprobs=1),
    ]
    load = [(prompt_of(n, n), kinds[i % len(kinds)]) for i, n in enumerate(lengths)]
    rng.shuffle(load)
    return load


# Loads: each runs on an implementation, asserts that it was what it means to be, and gives its
# engines with the handles that are compared with their runs alone.
Run = list[tuple[Engine, Handle]]


def generating(plans: list[Plan]) -> list[list[Request]]:
    """The requests of each step that generate."""
    return [[chunk.request for chunk in plan.decodes] for plan in plans]


def mixed(implementation: str) -> Run:
    plans: list[Plan] = []
    run = engine(implementation=implementation, watch=plans.append)
    handles = run_all(run, mixed_load())
    kinds = [{r.params for r in mates} for mates in generating(plans)]
    assert max(map(len, kinds)) >= 4, "mates had the same sampling parameters"
    assert run.counts.mixed_steps >= 5
    assert run.counts.unfinished_chunks >= 10
    assert run.counts.most_decodes >= 4
    return [(run, h) for h in handles]


def a_prompt_of_many_chunks(implementation: str) -> Run:
    lengths = [*range(3, 11), 90, 100, 110, 130, 300, 330]
    random.Random(1).shuffle(lengths)
    run = engine(implementation=implementation)
    handles = [run.submit(prompt_of(n, n), greedy(4)) for n in lengths]
    longest = max(handles, key=lambda h: len(h.requests[0].prompt)).requests[0]
    seen = set()
    while run.step():
        seen.add(longest.computed)
    assert len([at for at in seen if 0 < at < 330]) >= 5, "the longest prompt was not split"
    assert run.counts.mixed_steps >= 3
    return [(run, h) for h in handles]


def two_needles_among_96(implementation: str) -> Run:
    config = dataclasses.replace(
        CONFIG,
        max_batch_size=96,
        max_tokens_per_step=96 + 8 * 16,
        num_pages=512,
        chunk_sizes=(16,),
        chunk_rows=(1, 8),
        decode_rows=(96,),
    )
    plans: list[Plan] = []
    run = engine(config, implementation, plans.append)
    rng = random.Random(3)
    needles = [(prompt_of(40, 40), hot(9, 16, logprobs=2)), (prompt_of(41, 70), greedy(16))]
    load = [(prompt_of(i, rng.randint(1, 16)), hot(i, rng.randint(20, 30))) for i in range(94)]
    at = sorted(rng.sample(range(96), 2))
    for place, needle in zip(at, needles, strict=True):
        load.insert(place, needle)
    handles = run_all(run, load)
    for place in at:
        (needle,) = handles[place].requests
        beside = [len(mates) for mates in generating(plans) if needle in mates]
        assert max(beside) >= 64 and len(beside) == 15, "the batch was not formed"
    return [(run, handles[place]) for place in at]


def cold_cold_and_warm_prefixes(implementation: str) -> Run:
    shared = prompt_of(1, 270)
    load = [(shared[:n] + prompt_of(n, 3), greedy(6)) for n in (1, 31, 160, 257, 270)]
    first, second = (engine(implementation=implementation) for _ in range(2))
    cold = [run_all(e, [r])[0] for r in load for e in (first,)]
    reused = first.counts.reused_tokens
    again = run_all(second, load[::-1])[::-1]
    warm = run_all(first, load)
    assert first.counts.reused_tokens - reused >= 160 + 256 + 256
    return [(first, h) for h in cold + warm] + [(second, h) for h in again]


def preempted(implementation: str) -> Run:
    run = engine(dataclasses.replace(CONFIG, prefix_caching=False), implementation)
    load = [(prompt_of(i, 100), hot(i, 90, logprobs=1)) for i in range(8)]
    handles = run_all(run, load)  # 1520 tokens in a cache of 1024
    assert run.counts.preemptions >= 2
    assert run.counts.prompt_tokens > 8 * 100
    return [(run, h) for h in handles]


def pages_in_turns(implementation: str) -> Run:
    """Requests take pages from shuffled pools, four in turns and one by itself.

    Of this load plain XLA fails the four, for their batch: it gathers pages before it sums, so
    that places alone change no bit there either. What would if sums followed the places is in
    tests/pallas_kernels/test_attention.py.
    """
    by_itself = [(prompt_of(257, 257), greedy(12))]
    in_turns = [(prompt_of(n, n), hot(n, 40)) for n in (20, 90, 150, 250)]
    found = []
    for load in (by_itself, in_turns):
        run = engine(implementation=implementation)
        random.Random(2).shuffle(run._scheduler.pool._free)
        handles = [run.submit(prompt, params) for prompt, params in load]
        tables: dict[Handle, list[int]] = {}
        while run.step():
            tables |= {h: list(h.requests[0].pages) for h in handles if h.requests[0].pages}
        for pages in tables.values():
            apart = sum(b != a + 1 for a, b in zip(pages, pages[1:], strict=False))
            assert apart > len(pages) // 2 >= 2, "the pages lie in order"
        assert len(tables) == len(load) and run.counts.preemptions == 0
        found += [(run, h) for h in handles]
    return found


def bursts_around_a_request(implementation: str) -> Run:
    run = engine(implementation=implementation)
    long = run.submit(prompt_of(1, 20), greedy(90))
    others, heights = [], set()
    for burst in range(6):
        others += [run.submit(prompt_of(n, n), hot(n, 4)) for n in range(burst + 1, burst + 8)]
        while any(not h.done for h in others):
            run.step()
            heights.add(len(run._scheduler.running))
        assert not long.done
    assert len(heights) >= 3 and 8 in heights and run.counts.mixed_steps >= 6
    while run.step():
        pass
    return [(run, h) for h in (long, *others)]


def samples_of_one_prompt(implementation: str) -> Run:
    run = engine(implementation=implementation)
    handles = run_all(run, [(prompt_of(3, 33), hot(11, 6, n=4)), (prompt_of(4, 20), greedy(9))])
    assert run.counts.most_decodes == 5
    samples = run.completions(handles[0])
    assert [c.sample_index for c in samples] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in samples}) == 4
    return [(run, h) for h in handles]


def mates_are_cancelled(implementation: str) -> Run:
    run = engine(implementation=implementation)
    kept = [run.submit(prompt_of(i, 30), hot(i, 30)) for i in range(3)]
    reading = run.submit(prompt_of(8, 330), greedy(30))
    for _ in range(6):
        run.step()
    generating = run.submit(prompt_of(9, 5), greedy(60))
    waiting = [run.submit(prompt_of(i, 9), greedy(60)) for i in range(10, 16)]
    assert 0 < reading.requests[0].computed < 330
    run.cancel(reading)
    while not generating.requests[0].token_ids:
        run.step()
    for handle in (generating, *waiting):
        run.cancel(handle)
        run.cancel(handle)  # a second time: nothing happens
    while run.step():
        pass
    assert [c.finish_reason for c in run.completions(generating)] == ["cancelled"]
    assert run._scheduler.pool.available == CONFIG.num_pages
    return [(run, h) for h in kept]


LOADS = (
    *(mixed, a_prompt_of_many_chunks, two_needles_among_96, cold_cold_and_warm_prefixes),
    *(preempted, pages_in_turns, bursts_around_a_request, samples_of_one_prompt),
    mates_are_cancelled,
)
each_load = pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)


@each_load
def test_a_load_gives_the_solo_bits(load: Callable[[str], Run]) -> None:
    assert all(as_alone(run, handle) for run, handle in load("portable"))


@each_load
def test_plain_xla_fails_the_same_comparison(load: Callable[[str], Run]) -> None:
    assert not all(as_alone(run, handle, "xla") for run, handle in load("xla"))


def test_the_engine_gives_the_bits_of_generate_and_score() -> None:
    """One call of each for all kinds of requests: every other size compiles anew."""
    first = alone(tuple(prompt_of(5, 9)), greedy(6))[0].token_ids[0]
    load = [
        (prompt_of(258, 258), greedy(12)),
        (prompt_of(30, 30), hot(1, 12, top_p=0.9)),
        (prompt_of(3, 33), hot(11, 6, n=4)),
        (prompt_of(5, 9), greedy(6, logit_bias={77: 100})),
        (prompt_of(5, 9), greedy(6, stop_token_ids=(first,), min_tokens=3)),
    ]
    prompts, params = [p for p, _ in load], [p for _, p in load]
    asked = [dataclasses.replace(p, prompt_logprobs=0) for p in params]
    completions = engine().generate(prompts, asked)
    for got, want in zip(completions, jdet.generate(model(), prompts, params), strict=True):
        assert (got.prompt_index, got.sample_index) == (want.prompt_index, want.sample_index)
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    whole = [c.prompt_token_ids + c.token_ids for c in completions]
    for got, scores in zip(completions, jdet.score(model(), whole), strict=True):
        assert got.prompt_logprobs is not None
        assert got.prompt_logprobs + got.logprobs == scores


def test_a_cancelled_request_keeps_the_beginning_of_its_run_alone() -> None:
    run = engine()
    handle = run.submit(prompt_of(9, 5), greedy(60))
    for _ in range(9):
        run.step()
    run.cancel(handle)
    whole = alone(tuple(prompt_of(9, 5)), greedy(60))[0]
    (partial,) = run.completions(handle)
    assert partial.finish_reason == "cancelled"
    assert partial.logprobs == whole.logprobs[: len(partial.token_ids)] != []


def test_top_logprobs_hold_the_chosen_tokens_bits() -> None:
    (c,) = alone(tuple(prompt_of(5, 9)), greedy(6, logprobs=5, prompt_logprobs=3))
    assert c.top_logprobs is not None and c.prompt_top_logprobs is not None
    assert [len(top) for top in c.top_logprobs] == [5] * 6
    assert [len(top) for top in c.prompt_top_logprobs] == [3] * 8
    for token, logprob, top in zip(c.token_ids, c.logprobs, c.top_logprobs, strict=True):
        assert next(iter(top.items())) == (token, logprob)
        assert list(top.values()) == sorted(top.values(), reverse=True)
    plain = alone(tuple(prompt_of(5, 9)), greedy(6))[0]
    assert plain.logprobs == c.logprobs and plain.top_logprobs is None


def test_bias_and_min_tokens_choose() -> None:
    prompt = prompt_of(5, 9)
    free = alone(tuple(prompt), greedy(6))[0]
    first = free.token_ids[0]
    forced, banned, stopped, held = (
        alone(tuple(prompt), p)[0]
        for p in (
            greedy(6, logit_bias={77: 100}),
            greedy(6, logit_bias={first: -100}),
            greedy(6, stop_token_ids=(first,)),
            greedy(6, stop_token_ids=(first,), min_tokens=3),
        )
    )
    assert forced.token_ids == [77] * 6
    assert first not in banned.token_ids
    assert stopped.token_ids == [first] and stopped.finish_reason == "stop"
    assert len(held.token_ids) > 3 and first not in held.token_ids[:3]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], None, "request-1 is empty"),
        ([1536], None, "token ids outside"),
        ([1] * 500, greedy(13), "together at most 512"),
        ("text", None, "no tokenizer"),
        ([1], greedy(logit_bias={1536: 1.0}), "logit_bias has token ids outside"),
        ([1], greedy(logit_bias={i: 1.0 for i in range(301)}), "301 logit_bias; allowed: up to"),
        ([1], greedy(stop_token_ids=range(33)), "33 stop_token_ids; allowed: up to 32"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(prompt, sampling, message) -> None:
    run = engine()
    other = run.submit(prompt_of(5, 9), greedy(6))
    with pytest.raises(ValueError, match=message):
        run.submit(prompt, sampling)
    while run.step():
        pass
    assert as_alone(run, other)


def test_generate_refuses_before_it_begins() -> None:
    run = engine()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run.generate([[1], []], greedy())
    assert not run.busy
