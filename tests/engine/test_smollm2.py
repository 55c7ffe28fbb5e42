"""The engine's promise with real weights: a needle among others has the bits of its run alone."""

import dataclasses
import functools
import random

from flax import nnx

import jdet
from jdet.completion import Completion
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.engine.scheduler import Plan
from jdet.models.decoder import Decoder
from jdet.models.load import LanguageModel
from jdet.sampling import SamplingParams

# Few programs, since each compiles 30 layers: a chunk; eight of them beside all rows that may
# generate; one such row; all of them.
REQUESTS = 64
CONFIG = EngineConfig(
    max_batch_size=REQUESTS,
    max_tokens_per_step=8 * 16 + REQUESTS,
    max_model_len=256,
    num_pages=2 * REQUESTS,
    chunk_sizes=(16,),
    chunk_rows=(1, 8),
    decode_rows=(1, REQUESTS),
    prefix_caching=False,
)


@functools.cache
def smollm2() -> LanguageModel:
    return jdet.load(dtype="bfloat16", implementation="portable")


def first_layers(model: LanguageModel, count: int) -> LanguageModel:
    """The model without its later layers."""
    whole = model.decoder
    config = dataclasses.replace(whole.config, num_hidden_layers=count)
    decoder = Decoder(config, dtype=whole.dtype, rngs=None)
    decoder.layers = nnx.List(whole.layers[:count])
    decoder.embedding, decoder.norm = whole.embedding, whole.norm
    decoder.rope_cos, decoder.rope_sin = whole.rope_cos, whole.rope_sin
    return dataclasses.replace(model, decoder=decoder)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def needle() -> list[int]:
    """Seven chunks of text."""
    tokenizer = smollm2().tokenizer
    assert tokenizer is not None
    text = "There once was a kingdom by the sea, and its queen counted the waves. " * 8
    return tokenizer.encode(text)[:110]


def alone(model: LanguageModel, max_tokens: int) -> Completion:
    (completion,) = Engine(model, CONFIG).generate([needle()], greedy(max_tokens))
    return completion


def among_others(model: LanguageModel, max_tokens: int) -> Completion:
    """The needle's prompt is the longest, its place random; one in eight of the other prompts
    takes several chunks too. All mates still generate when it ends, and are cancelled."""
    # A seed with which two prompts are read to the end: one by itself is a program more.
    rng = random.Random(10)
    lengths = [rng.randint(17, 90) if i % 8 == 0 else rng.randint(1, 16) for i in range(62)]
    rng.shuffle(lengths)
    prompts = [[rng.randrange(40_000) for _ in range(n)] for n in lengths]
    place = rng.randrange(63)
    prompts.insert(place, needle())
    plans: list[Plan] = []
    engine = Engine(model, CONFIG, cache_fill=float("nan"), watch=plans.append)
    # It generates when the others come: chunks alone are one program less.
    first = engine.submit([1], greedy(40))
    engine.step()
    others = [engine.submit(p, greedy(40)) for p in prompts[:place]]
    wanted = engine.submit(prompts[place], greedy(max_tokens))
    others += [engine.submit(p, greedy(40)) for p in prompts[place + 1 :]]
    while not wanted.done:
        assert engine.step()
    (request,) = wanted.requests
    chunks = [c.length for plan in plans for c in plan.chunks if c.request is request]
    beside = [len(p.decodes) for p in plans if any(c.request is request for c in p.decodes)]
    assert chunks == [16] * 6 + [14], "the longest prompt was not split"
    assert max(beside) == REQUESTS, "the batch was not formed"
    assert engine.counts.mixed_steps >= 8 and engine.counts.unfinished_chunks >= 16
    for handle in (first, *others):
        engine.cancel(handle)
    (completion,) = engine.completions(wanted)
    return completion


def test_a_needle_among_64_has_the_solo_bits() -> None:
    got, wanted = among_others(smollm2(), 6), alone(smollm2(), 6)
    assert got.token_ids == wanted.token_ids
    assert got.logprobs == wanted.logprobs and len(got.logprobs) == 6


def test_plain_xla_fails_the_same_comparison() -> None:
    """Its bits move within the first six layers already; the other 24 would only cost time."""
    plain = first_layers(smollm2().with_ops(implementation="xla"), 6)
    assert among_others(plain, 6).logprobs != alone(plain, 6).logprobs
