"""The engine's promise with real weights: a needle among others has the bits of its run alone."""

import functools
import random

import jdet
from jdet.completion import Completion
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams

# Few programs, since each compiles 30 layers: a chunk, a chunk beside decodes, one decode.
CONFIG = EngineConfig(
    max_batch_size=16,
    max_tokens_per_step=80,
    max_model_len=256,
    num_pages=64,
    chunk_sizes=(64,),
    chunk_rows=(1,),
    decode_rows=(1, 16),
    prefix_caching=False,
)
OTHERS = 23


@functools.cache
def smollm2() -> LanguageModel:
    return jdet.load(dtype="bfloat16", implementation="portable")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def needle() -> list[int]:
    """Four chunks of text."""
    tokenizer = smollm2().tokenizer
    assert tokenizer is not None
    text = "There once was a kingdom by the sea, and its queen counted the waves. " * 15
    return tokenizer.encode(text)[:220]


def alone(model: LanguageModel, max_tokens: int) -> Completion:
    (completion,) = Engine(model, CONFIG).generate([needle()], greedy(max_tokens))
    return completion


def among_others(model: LanguageModel, max_tokens: int) -> Completion:
    """Prompts of one to four chunks, the needle's the longest, at a random place; those behind
    it are read while it generates, and are cancelled when it is done."""
    rng = random.Random(4)
    engine = Engine(model, CONFIG, cache_fill=float("nan"))
    lengths = [rng.randint(1, 200) for _ in range(OTHERS)]
    prompts = [[rng.randrange(40_000) for _ in range(n)] for n in lengths]
    prompts.insert(rng.randrange(4, 9), needle())
    sizes = [max_tokens if prompt == needle() else rng.randint(20, 50) for prompt in prompts]
    handles = [engine.submit(p, greedy(n)) for p, n in zip(prompts, sizes, strict=True)]
    (wanted,) = (h for h in handles if h.requests[0].prompt == needle())
    splits = set()
    while not wanted.done:
        assert engine.step()
        splits.add(wanted.requests[0].computed)
    counts = engine.counts
    assert max(lengths) < 220 and len([at for at in splits if 0 < at < 220]) == 3
    assert counts.unfinished_chunks >= 8 and counts.mixed_steps >= 8
    assert 4 <= counts.most_decodes <= 16
    for handle in handles:
        engine.cancel(handle)
    (completion,) = engine.completions(wanted)
    return completion


def test_a_needle_among_others_has_the_solo_bits() -> None:
    got, wanted = among_others(smollm2(), 6), alone(smollm2(), 6)
    assert got.token_ids == wanted.token_ids
    assert got.logprobs == wanted.logprobs and len(got.logprobs) == 6


def test_plain_xla_fails_the_same_comparison() -> None:
    plain = smollm2().with_ops(implementation="xla")
    assert among_others(plain, 3).logprobs != alone(plain, 3).logprobs
