"""Tokens and text as they come, to one caller and to many tasks."""

import asyncio
import functools
from typing import Any, NamedTuple

import pytest

import jdet
from jdet import AsyncEngine, Engine, EngineConfig, SamplingParams
from jdet.engine.handle import Delta
from jdet.models.config import DecoderConfig
from jdet.models.decoder import Decoder
from jdet.ops import Ops
from jdet.testing import same_completions, tiny_config

CONFIG = EngineConfig(
    max_batch_size=4, max_tokens_per_step=36, max_model_len=256, num_pages=16, chunk_sizes=(32,)
)


class Letters:
    """A tokenizer of single characters."""

    eos_token_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)

    def stream_decoder(self) -> "Letters":
        return self

    def push(self, token_id: int) -> str:
        return chr(token_id)


class Model(NamedTuple):
    """What generation asks of a model."""

    decoder: Decoder
    tokenizer: Letters
    ops: Ops


@functools.cache
def model() -> Model:
    config = DecoderConfig.from_hf(tiny_config())
    model = jdet.random_model(config, dtype="float32", implementation="portable")
    return Model(model.decoder, Letters(), model.ops)


def hot(seed: int, max_tokens: int = 20, **kwargs) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True, **kwargs
    )


@functools.cache
def alone(prompt: str, params: SamplingParams) -> list[jdet.Completion]:
    return Engine(model(), CONFIG).generate([prompt], params)


def joined(deltas: list[Delta], sample: int) -> tuple[list[int], str]:
    own = [d for d in deltas if d.sample_index == sample]
    return [t for d in own for t in d.token_ids], "".join(d.text for d in own)


def test_deltas_joined_are_the_completions_while_others_go_on() -> None:
    engine = Engine(model(), CONFIG)
    other = engine.submit("others", hot(5))
    handle = engine.submit("hello", hot(1, n=2))
    deltas = list(engine.stream(handle))
    assert len(deltas) > 10
    for c in engine.completions(handle):
        assert joined(deltas, c.sample_index) == (c.token_ids, c.text)
    assert same_completions(engine.completions(handle), alone("hello", hot(1, n=2)))
    assert list(engine.stream(handle)) != []  # once more, all of it
    list(engine.stream(other))
    assert same_completions(engine.completions(other), alone("others", hot(5)))


def test_a_stop_string_ends_the_text_before_it_as_in_generate() -> None:
    text = alone("hello", hot(1))[0].text
    stop = text[4:7]
    params = hot(1, stop=("never there", stop))
    engine = Engine(model(), CONFIG)
    handle = engine.submit("hello", params)
    deltas = list(engine.stream(handle))
    (c,) = engine.completions(handle)
    assert c.text == text[: text.index(stop)] == joined(deltas, 0)[1]
    assert c.finish_reason == "stop" and len(c.logprobs) == text.index(stop) + 3
    assert same_completions([c], jdet.generate(model(), ["hello"], params))


def test_a_stop_string_within_min_tokens_is_passed_over() -> None:
    text = alone("hello", hot(1))[0].text
    params = hot(1, stop=text[4:7], min_tokens=8)
    (c,) = alone("hello", params)
    assert len(c.token_ids) > 8 and c.text.startswith(text[:8])
    assert same_completions([c], jdet.generate(model(), ["hello"], params))


def test_a_handle_that_is_not_done_has_no_completions() -> None:
    engine = Engine(model(), CONFIG)
    handle = engine.submit("hello", hot(1), "mine")
    with pytest.raises(ValueError, match="mine is not done"):
        engine.completions(handle)


def test_tasks_share_the_engine_and_get_the_solo_bits() -> None:
    async def one(engine: AsyncEngine, name: str, params: SamplingParams) -> tuple:
        deltas = [d async for d in engine.stream(name, params)]
        return joined(deltas, 0)

    async def leave(engine: AsyncEngine) -> None:
        async for _ in engine.stream("leaves early", hot(9, 200)):
            break

    async def main() -> None:
        inner = Engine(model(), CONFIG)
        async with AsyncEngine(inner) as engine:
            names = [f"task {i}" for i in range(6)]
            streams: list[Any] = [one(engine, n, hot(i)) for i, n in enumerate(names)]
            whole = [engine.generate(n, hot(i)) for i, n in enumerate(names)]
            cancelled = asyncio.create_task(engine.generate("cancelled", hot(7, 200)))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            results: list[Any] = await asyncio.gather(*streams, *whole, leave(engine))
            with pytest.raises(ValueError, match="is empty"):
                await engine.generate([])
        assert cancelled.cancelled() or cancelled.cancelling()
        assert inner.counts.most_decodes == 4
        for i, name in enumerate(names):
            (want,) = alone(name, hot(i))
            assert results[i] == (want.token_ids, want.text)
            assert same_completions(results[6 + i], [want])

    asyncio.run(main())
