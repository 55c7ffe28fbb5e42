"""Generation for people: prompts in, completions out (`decoding` is the jitted core)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jdet.compiler import check_environment, jit
from jdet.decoding import Decoder, DecodeState, decode, prefill, round_up
from jdet.ops import Ops
from jdet.sampling import SamplingParams, bias_pairs, sampling_arrays

type TopLogprobs = dict[int, float]


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder with its tokenizer and ops (`jdet.models.load.LanguageModel`)."""

    @property
    def decoder(self) -> Decoder: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def ops(self) -> Ops: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
      prompt_index: the prompt's place in the list given to `generate`.
      sample_index: 0..n-1.
      token_ids, logprobs: the generated tokens (an end token included) and the model's
        log-probability of each, float32, before temperature and truncation.
      finish_reason: "stop" (end token, stop token or stop string) or "length".
      seed: the seed of its noise; None at temperature 0.
      fingerprint: of the contract and implementation that made the bits.
      top_logprobs: at each generated token the most probable ones, best first, where
        `SamplingParams.logprobs` asks for them.
      prompt_logprobs, prompt_top_logprobs: of the prompt's tokens from the second on, as
        `score` gives them, where `SamplingParams.prompt_logprobs` asks for them.
    """

    prompt_index: int
    sample_index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str
    seed: int | None
    fingerprint: str
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[TopLogprobs] | None = None


def bucket(value: int, smallest: int) -> int:
    """The next power of two: few shapes, few compiles."""
    size = smallest
    while size < value:
        size *= 2
    return size


@functools.cache
def _jitted(ops: Ops) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
    first = jit(
        functools.partial(prefill, ops=ops),
        implementation=ops.implementation,
        static_argnames=("max_tokens", "cache_length"),
    )
    more = jit(
        functools.partial(decode, ops=ops),
        implementation=ops.implementation,
        donate_argnames=("state",),
    )
    return first, more


@dataclasses.dataclass
class _Request:
    prompt_index: int
    sample_index: int
    prompt: list[int]
    params: SamplingParams
    shown: int = 0


def encode_prompt(
    model: LanguageModel, prompt: str | Sequence[int], params: SamplingParams, name: str = "prompt"
) -> list[int]:
    """The prompt's token ids, once it and its parameters are known to fit the model.

    Raises:
      ValueError: they do not; the message begins with `name`.
    """
    limit, vocab = model.decoder.config.max_position_embeddings, model.decoder.config.vocab_size
    if isinstance(prompt, str) and model.tokenizer is None:
        raise ValueError(f"{name} is text and the model has no tokenizer; give ids")
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise ValueError(f"{name} is empty; allowed: at least one token")
    if not all(0 <= t < vocab for t in ids):
        raise ValueError(f"{name} has token ids outside 0..{vocab - 1}")
    if len(ids) + params.max_tokens > limit:
        raise ValueError(
            f"{name} has {len(ids)} tokens, and max_tokens={params.max_tokens}; "
            f"together at most {limit}, the model's context length"
        )
    if params.stop and model.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and the model has none")
    if any(token >= vocab for token, _ in bias_pairs(params.logit_bias)):
        raise ValueError(f"logit_bias has token ids outside 0..{vocab - 1}")
    return ids


def requests_of(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
) -> list[tuple[str | Sequence[int], SamplingParams]]:
    """Pairs of a prompt and its parameters.

    Raises:
      ValueError: one string for a list of them; lists of different lengths.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; allowed: a list of strings or of token ids")
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise ValueError(f"{len(params)} SamplingParams for {len(prompts)} prompts")
    return list(zip(prompts, params, strict=True))


def _requests(
    model: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
) -> list[_Request]:
    """Check everything the user gave, before any work starts."""
    requests = []
    for index, (prompt, p) in enumerate(requests_of(prompts, sampling)):
        if p.logprobs is not None or p.prompt_logprobs is not None:
            raise ValueError(
                f"prompt {index} asks for logprobs or prompt_logprobs, which jdet.Engine gives"
            )
        ids = encode_prompt(model, prompt, p, f"prompt {index}")
        seeded = p.with_seed()
        requests += [_Request(index, i, ids, seeded) for i in range(p.n)]
    return requests


def stop_string_end(tokenizer: Any, ids: list[int], params: SamplingParams) -> int | None:
    """How many of `ids` until the first stop string is complete; None while there is none.

    One that is complete within the first `min_tokens` is passed over.
    """
    if not params.stop:
        return None
    text = tokenizer.decode(ids)
    if not any(s in text for s in params.stop):
        return None
    held = tokenizer.decode(ids[: params.min_tokens])
    for i in range(params.min_tokens, len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        if _stop_string_start(text, len(held), params.stop) is not None:
            return i + 1
    return None


def _stop_string_start(text: str, held: int, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins that ends behind the first `held` characters."""
    starts = (text.find(s, max(0, held - len(s) + 1)) for s in stops)
    return min((start for start in starts if start >= 0), default=None)


def completion_text(tokenizer: Any, ids: list[int], params: SamplingParams, *, cut: bool) -> str:
    """The text of `ids`; `cut`: they end with a stop string, which is left out."""
    if tokenizer is None:
        return ""
    text = tokenizer.decode(ids)
    if not cut:
        return text
    held = tokenizer.decode(ids[: params.min_tokens])
    return text[: _stop_string_start(text, len(held), params.stop)]


def _finish(
    model: LanguageModel, request: _Request, ids: list[int], logprobs: list[float], stopped: bool
) -> Completion:
    params = request.params
    end = stop_string_end(model.tokenizer, ids, params)
    ids, logprobs = ids[:end], logprobs[:end]
    return Completion(
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        prompt_token_ids=request.prompt,
        token_ids=ids,
        text=completion_text(model.tokenizer, ids, params, cut=end is not None),
        logprobs=logprobs,
        finish_reason="stop" if stopped or end is not None else "length",
        seed=params.seed,
        fingerprint=model.ops.fingerprint,
    )


OnTokens = Callable[[int, int, list[int]], None]


def _run_batch(
    model: LanguageModel, batch: list[_Request], on_tokens: OnTokens | None, steps: int
) -> list[Completion]:
    kv_split = model.ops.contract.kv_split
    width = bucket(max(len(r.prompt) for r in batch), 16)
    room = bucket(max(r.params.max_tokens for r in batch), 16)
    rows = batch + [batch[0]] * (bucket(len(batch), 1) - len(batch))
    prompts = np.zeros((len(rows), width), np.int32)
    for row, request in zip(prompts, rows, strict=True):
        row[: len(request.prompt)] = request.prompt
    lengths = np.array([len(r.prompt) for r in rows], np.int32)
    eos = () if model.tokenizer is None else model.tokenizer.eos_token_ids
    sampling = sampling_arrays(
        [r.params for r in rows],
        eos_token_ids=eos,
        sample_index=[r.sample_index for r in rows],
    )
    first, more = _jitted(model.ops)
    state = first(
        model.decoder,
        prompts,
        lengths,
        sampling,
        max_tokens=room,
        cache_length=round_up(width + room, kv_split),
    )
    while True:
        ids, logprobs, count, stopped = jax.device_get(
            (state.token_ids, state.logprobs, state.count, state.stopped)
        )
        active = False
        for i, request in enumerate(batch):
            own = ids[i, : count[i]].tolist()
            cut = stop_string_end(model.tokenizer, own, request.params)
            if on_tokens is not None:
                on_tokens(request.prompt_index, request.sample_index, own[request.shown : cut])
            request.shown = len(own) if cut is None else cut
            active |= cut is None and not stopped[i] and count[i] < request.params.max_tokens
        if not active:
            break
        state = more(model.decoder, state, sampling, steps)
    return [
        _finish(
            model,
            r,
            ids[i, : count[i]].tolist(),
            logprobs[i, : count[i]].tolist(),
            bool(stopped[i]),
        )
        for i, r in enumerate(batch)
    ]


def generate(
    model: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    batch_size: int = 32,
    on_tokens: OnTokens | None = None,
    steps_per_call: int = 16,
) -> list[Completion]:
    """Complete prompts; `prompt_index`, then `sample_index` ascending: input order.

    Text prompts are tokenised as they are (use `model.tokenizer.chat_prompt` for a chat).
    How requests are batched changes no bit of any of them: they are sorted by length, cut
    into batches of `batch_size`, and padded to a few shapes so that little is compiled.

    Args:
      sampling: one for all, or one a prompt.
      batch_size: rows a batch at most.
      on_tokens: called with (prompt_index, sample_index, new token ids) as they come.
      steps_per_call: tokens between two looks at stop strings and `on_tokens`.

    Raises:
      ValueError: an empty prompt, one over the context length, a token id outside the
        vocabulary, a parameter outside its range.
      EnvironmentRefused: XLA_FLAGS holds a flag against the promise.
    """
    if batch_size < 1 or steps_per_call < 1:
        raise ValueError(
            f"batch_size={batch_size}, steps_per_call={steps_per_call}; allowed: from 1"
        )
    if model.ops.implementation != "xla":
        check_environment()
    requests = _requests(model, prompts, sampling or SamplingParams())
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    done: dict[int, Completion] = {}
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        batch = [requests[i] for i in chosen]
        done.update(zip(chosen, _run_batch(model, batch, on_tokens, steps_per_call), strict=True))
    return [done[i] for i in range(len(requests))]
