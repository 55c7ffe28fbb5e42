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
from jdet.sampling import SamplingParams, sampling_arrays


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


def _requests(
    model: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
) -> list[_Request]:
    """Check everything the user gave, before any work starts."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; allowed: a list of strings or of token ids")
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise ValueError(f"{len(params)} SamplingParams for {len(prompts)} prompts")
    limit, vocab = model.decoder.config.max_position_embeddings, model.decoder.config.vocab_size
    requests = []
    for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        if isinstance(prompt, str) and model.tokenizer is None:
            raise ValueError(f"prompt {index} is text and the model has no tokenizer; give ids")
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError(f"prompt {index} is empty; allowed: at least one token")
        if not all(0 <= t < vocab for t in ids):
            raise ValueError(f"prompt {index} has token ids outside 0..{vocab - 1}")
        if len(ids) + p.max_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, and max_tokens={p.max_tokens}; "
                f"together at most {limit}, the model's context length"
            )
        if p.stop and model.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the model has none")
        seeded = p.with_seed()
        requests += [_Request(index, i, ids, seeded) for i in range(p.n)]
    return requests


def _stop_string_end(model: LanguageModel, ids: list[int], stops: Sequence[str]) -> int | None:
    """How many of `ids` until the first stop string is complete; None while there is none."""
    if not stops or not any(s in model.tokenizer.decode(ids) for s in stops):
        return None
    return next(
        i + 1
        for i in range(len(ids))
        if any(s in model.tokenizer.decode(ids[: i + 1]) for s in stops)
    )


def _finish(
    model: LanguageModel, request: _Request, ids: list[int], logprobs: list[float], stopped: bool
) -> Completion:
    end = _stop_string_end(model, ids, request.params.stop)
    if end is not None:
        ids, logprobs, stopped = ids[:end], logprobs[:end], True
    text = model.tokenizer.decode(ids) if model.tokenizer is not None else ""
    if end is not None:
        text = text[: min(text.index(s) for s in request.params.stop if s in text)]
    return Completion(
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        prompt_token_ids=request.prompt,
        token_ids=ids,
        text=text,
        logprobs=logprobs,
        finish_reason="stop" if stopped else "length",
        seed=request.params.seed,
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
            cut = _stop_string_end(model, own, request.params.stop)
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
