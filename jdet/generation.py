"""Generation: the jitted loop (`generate_tokens`) and the door for people (`generate`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.cache import CacheShape, KVCache, create_cache
from jdet.compiler import check_environment, jit
from jdet.ops import Ops
from jdet.sampling import SamplingArrays, SamplingParams, sample, sampling_arrays

NO_TOKEN = -1


@runtime_checkable
class DecoderConfig(CacheShape, Protocol):
    """What generation asks of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@runtime_checkable
class Decoder(Protocol):
    """What generation asks of a model (`jdet.models.decoder.Decoder` is one)."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def dtype(self) -> Any: ...

    def __call__(
        self, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], cache: KVCache, ops: Ops
    ) -> tuple[Float[Array, "B T D"], KVCache]: ...

    def logits(self, hidden: Float[Array, "*rows D"], ops: Ops) -> Float32[Array, "*rows V"]: ...


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder with its tokenizer and ops (`jdet.models.load.LanguageModel`)."""

    @property
    def decoder(self) -> Decoder: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def ops(self) -> Ops: ...


class DecodeState(NamedTuple):
    """Everything a batch of running requests is, on the device; a donated pytree."""

    cache: KVCache
    prompt_lengths: Int32[Array, " B"]
    last_token: Int32[Array, " B"]
    count: Int32[Array, " B"]  # tokens generated so far
    stopped: Bool[Array, " B"]  # by a stop token
    token_ids: Int32[Array, "B N"]  # NO_TOKEN after the end
    logprobs: Float32[Array, "B N"]


def _running(state: DecodeState, sampling: SamplingArrays) -> Bool[Array, " B"]:
    return ~state.stopped & (state.count < sampling.max_tokens)


def _emit(
    state: DecodeState, logits: Float32[Array, "B V"], sampling: SamplingArrays, ops: Ops
) -> DecodeState:
    """Choose and record one token in the rows that run; the others keep what they have."""
    runs = _running(state, sampling)
    token = sample(logits, sampling, state.count)
    logprob = jnp.take_along_axis(ops.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    column = jnp.arange(state.token_ids.shape[1])
    here = runs[:, None] & (column == state.count[:, None])
    hit = (token[:, None] == sampling.stop_token_ids).any(-1)
    return state._replace(
        last_token=jnp.where(runs, token, state.last_token),
        count=state.count + runs.astype(jnp.int32),
        stopped=state.stopped | (runs & hit),
        token_ids=jnp.where(here, token[:, None], state.token_ids),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
    )


def prompt_positions(
    prompts: Int32[Array, "B P"], lengths: Int32[Array, " B"]
) -> Int32[Array, "B P"]:
    """0, 1, ... in each row, and -1 in its padding."""
    at = jnp.arange(prompts.shape[1], dtype=jnp.int32)
    return jnp.where(at < lengths[:, None], at, -1)


def prefill(
    decoder: Decoder,
    prompts: Int32[Array, "B P"],
    prompt_lengths: Int32[Array, " B"],
    sampling: SamplingArrays,
    *,
    max_tokens: int,
    cache_length: int,
    ops: Ops,
    cache_fill: float = 0.0,
) -> DecodeState:
    """Read right-padded prompts and choose each row's first token.

    `max_tokens` (room for generated tokens) and `cache_length` are static: they are shapes,
    and no result depends on them. `cache_fill` poisons the cache's unused slots in tests.
    """
    batch = prompts.shape[0]
    cache = create_cache(decoder.config, batch, cache_length, decoder.dtype, cache_fill)
    hidden, cache = decoder(prompts, prompt_positions(prompts, prompt_lengths), cache, ops)
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    state = DecodeState(
        cache=cache,
        prompt_lengths=prompt_lengths,
        last_token=jnp.zeros(batch, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        token_ids=jnp.full((batch, max_tokens), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
    )
    return _emit(state, decoder.logits(last, ops), sampling, ops)


def decode(
    decoder: Decoder,
    state: DecodeState,
    sampling: SamplingArrays,
    steps: Int32[Array, ""] | int,
    *,
    ops: Ops,
) -> DecodeState:
    """Up to `steps` more tokens a row, in a `lax.while_loop` that ends when no row runs.

    A row that has ended is computed on, and what it computes is dropped: rows never mix.
    """

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        done, state = carry
        # The last token stands behind the prompt and the count - 1 tokens before it.
        position = (state.prompt_lengths + state.count - 1)[:, None]
        hidden, cache = decoder(state.last_token[:, None], position, state.cache, ops)
        logits = decoder.logits(hidden[:, 0], ops)
        return done + 1, _emit(state._replace(cache=cache), logits, sampling, ops)

    _, state = lax.while_loop(
        lambda carry: (carry[0] < steps) & _running(carry[1], sampling).any(),
        step,
        (jnp.int32(0), state),
    )
    return state


class GeneratedTokens(NamedTuple):
    """What `generate_tokens` returns."""

    token_ids: Int32[Array, "B N"]  # NO_TOKEN after a row's end
    logprobs: Float32[Array, "B N"]  # 0 after a row's end
    count: Int32[Array, " B"]
    stopped: Bool[Array, " B"]  # ended by a stop token (else by its max_tokens)


def generate_tokens(
    decoder: Decoder,
    prompts: Int32[Array, "B P"],
    prompt_lengths: Int32[Array, " B"],
    sampling: SamplingArrays,
    *,
    max_tokens: int,
    ops: Ops,
    cache_length: int | None = None,
    cache_fill: float = 0.0,
) -> GeneratedTokens:
    """Generate for right-padded prompts: arrays in, arrays out, to be put under `jax.jit`.

    Jit it with `jdet.jit` (or `jax.jit` with `compiler_options=jdet.compiler_options()`),
    with `max_tokens`, `ops` and `cache_length` static. Log-probs are those of the model,
    before temperature and truncation, so `score` gives the same bits.

    Args:
      max_tokens: width of the result; a row ends at the lesser of this and its own
        `sampling.max_tokens`.
      cache_length: slots a row, at least P + max_tokens, a multiple of the contract's
        kv_split (default: the smallest such). Changes no bit.
      cache_fill: the value of unused slots; tests poison them with NaN.

    Raises:
      ValueError: shapes that do not fit.
    """
    needed = prompts.shape[1] + max_tokens
    cache_length = cache_length or _round_up(needed, ops.contract.kv_split)
    if cache_length < needed:
        raise ValueError(
            f"cache_length={cache_length}; allowed: from {needed} (P={prompts.shape[1]} "
            f"+ max_tokens={max_tokens})"
        )
    sampling = sampling._replace(max_tokens=jnp.minimum(sampling.max_tokens, max_tokens))
    state = prefill(
        decoder,
        prompts,
        prompt_lengths,
        sampling,
        max_tokens=max_tokens,
        cache_length=cache_length,
        ops=ops,
        cache_fill=cache_fill,
    )
    state = decode(decoder, state, sampling, max_tokens, ops=ops)
    return GeneratedTokens(state.token_ids, state.logprobs, state.count, state.stopped)


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _bucket(value: int, smallest: int) -> int:
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
    width = _bucket(max(len(r.prompt) for r in batch), 16)
    room = _bucket(max(r.params.max_tokens for r in batch), 16)
    rows = batch + [batch[0]] * (_bucket(len(batch), 1) - len(batch))
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
        cache_length=_round_up(width + room, kv_split),
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
