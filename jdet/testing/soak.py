"""A random load on an engine, each request compared with its run alone."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

from jdet.completion import Completion, LanguageModel
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine, Handle
from jdet.engine.scheduler import Counts
from jdet.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Soak:
    """What a soak found.

    Attributes:
      requests: how many were sent, cancelled ones included.
      cancelled: how many of them were cancelled before their end.
      mismatches: those whose bits are not those of their run alone.
      counts: what the engine under load did.
    """

    requests: int
    cancelled: int
    mismatches: list[int]
    counts: Counts


def same_completions(a: Sequence[Completion], b: Sequence[Completion]) -> bool:
    """Equal in every field but the prompt's index; floats to the last bit, -0.0 and NaN too."""

    def bits(completions: Sequence[Completion]) -> list[str]:
        return [repr(dataclasses.replace(c, prompt_index=0)) for c in completions]

    return bits(a) == bits(b)


def random_request(
    rng: random.Random, *, vocab_size: int, longest: int, max_tokens: int
) -> tuple[list[int], SamplingParams]:
    """A prompt, perhaps one that begins like others, and parameters of any kind."""
    family = random.Random(rng.randrange(4))
    shared = [family.randrange(vocab_size) for _ in range(rng.choice([0, 0, longest // 2]))]
    own = [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest - len(shared)))]
    hot = rng.random() < 0.7
    tokens = rng.randint(1, max_tokens)
    chosen = [rng.randrange(vocab_size) for _ in range(3)]
    return shared + own, SamplingParams(
        n=rng.choice([1, 1, 1, 3]) if hot else 1,
        temperature=rng.choice([0.5, 1.0, 1.7]) if hot else 0,
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 1, 20]),
        min_p=rng.choice([0.0, 0.05]),
        seed=rng.getrandbits(63),
        max_tokens=tokens,
        min_tokens=rng.choice([0, 0, tokens // 2]),
        stop_token_ids=rng.choice([(), tuple(chosen)]),
        logit_bias=rng.choice([None, {chosen[0]: 2.5, chosen[1]: -100.0}]),
        logprobs=rng.choice([None, None, 0, 5]),
        prompt_logprobs=rng.choice([None, None, None, None, 2]),
    )


def soak(
    model: LanguageModel,
    config: EngineConfig,
    *,
    requests: int,
    seed: int = 0,
    longest: int = 120,
    max_tokens: int = 24,
    every: float = 0.25,
    seconds: float = float("inf"),
    done: Callable[[int], object] = lambda count: None,
) -> Soak:
    """Send `requests` random requests at random times, cancel some, compare all.

    Args:
      longest, max_tokens: of prompts and completions.
      every: requests that arrive a step, on average; they come in bursts too.
      seconds: after them no more are sent.
      done: called with the number of requests compared since it was last called.
    """
    rng = random.Random(seed)
    vocab_size = model.decoder.config.vocab_size
    engine = Engine(model, config, cache_fill=float("nan"))
    alone = Engine(
        model, dataclasses.replace(config, prefix_caching=False), cache_fill=float("nan")
    )
    sent = cancelled = 0
    running: list[tuple[int, Handle]] = []
    mismatches: list[int] = []
    end = time.monotonic() + seconds
    while (sent < requests and time.monotonic() < end) or running:
        arriving = rng.choice([0, 0, 0, 1, 1, 6]) if rng.random() < every else 0
        for _ in range(min(arriving, requests - sent)):
            prompt, params = random_request(
                rng, vocab_size=vocab_size, longest=longest, max_tokens=max_tokens
            )
            running.append((sent, engine.submit(prompt, params)))
            sent += 1
        if running and rng.random() < 0.01:
            engine.cancel(rng.choice(running)[1])
            cancelled += 1
        engine.step()
        for index, handle in [r for r in running if r[1].done]:
            running.remove((index, handle))
            if not _as_alone(engine.completions(handle), handle, alone):
                mismatches.append(index)
            done(1)
    return Soak(sent, cancelled, mismatches, engine.counts)


def _as_alone(completions: list[Completion], handle: Handle, engine: Engine) -> bool:
    first = handle.requests[0]
    wanted = engine.generate([list(first.prompt)], first.params, progress=False)
    for i, got in enumerate(completions):
        if got.finish_reason == "cancelled":
            wanted[i] = _cut(wanted[i], got)
    return same_completions(completions, wanted)


def _cut(whole: Completion, got: Completion) -> Completion:
    """The run alone, as far as the cancelled one went."""
    count = len(got.token_ids)

    def prompt_part(values: list | None, own: list | None) -> list | None:
        return None if values is None or own is None else values[: len(own)]

    return dataclasses.replace(
        whole,
        token_ids=whole.token_ids[:count],
        logprobs=whole.logprobs[:count],
        top_logprobs=whole.top_logprobs and whole.top_logprobs[:count],
        prompt_logprobs=prompt_part(whole.prompt_logprobs, got.prompt_logprobs),
        prompt_top_logprobs=prompt_part(whole.prompt_top_logprobs, got.prompt_top_logprobs),
        text=got.text,
        finish_reason="cancelled",
    )
