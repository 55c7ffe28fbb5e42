"""The decode loop: prefill, step and `generate_tokens`, pure functions to be jitted."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.cache import CacheShape, KVCache, create_cache
from jdet.ops import Ops
from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.sampling import Asks, SamplingArrays, sample

NO_TOKEN = -1

# Decode steps between two looks at whether a row still runs. The host of a GPU waits for what it
# looks at, and the device then for the host (0.1 to 0.2 ms, h200-decode-looks.json); elsewhere a
# look costs nothing.
_STEPS_A_LOOK = {"cuda": 8}


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def bucket(value: int, smallest: int) -> int:
    """The next power of two: few shapes, few compiles."""
    size = smallest
    while size < value:
        size *= 2
    return size


@runtime_checkable
class DecoderConfig(CacheShape, Protocol):
    """What generation asks of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class Group(NamedTuple):
    """Rows with equally many tokens each, at consecutive positions; padding, at the end, has -1.

    Without a page table the rows are those of a contiguous cache, and the only group.
    """

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    page_table: Int32[Array, "B N"] | None = None


@runtime_checkable
class Decoder(Protocol):
    """What generation asks of a model (`jdet.models.decoder.Decoder` is one)."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def dtype(self) -> Any: ...

    def __call__(
        self, groups: tuple[Group, ...], cache: KVCache, ops: Ops
    ) -> tuple[tuple[Float[Array, "B T D"], ...], KVCache]: ...

    def logits(self, hidden: Float[Array, "*rows D"], ops: Ops) -> Float32[Array, "*rows V"]: ...


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


class NextToken(NamedTuple):
    """A token of each row, its log-prob, and what they were chosen from."""

    token: Int32[Array, " R"]
    logprob: Float32[Array, " R"]
    logits: Float32[Array, "R V"]
    normalizer: LogNormalizer


def last_states(hidden: Float[Array, "B T D"], lengths: Int32[Array, " B"]) -> Float[Array, "B D"]:
    """The hidden state of each row's last token; of a row without tokens, the first."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def next_token(
    decoder: Decoder,
    states: Float[Array, "R D"],
    sampling: SamplingArrays,
    position: Int32[Array, " R"],
    *,
    ops: Ops,
    asks: Asks | None = None,
) -> NextToken:
    """The one way from hidden states to tokens, here and in the engine; see `sampling.sample`."""
    logits = decoder.logits(states, ops)
    normalizer = ops.log_normalizer(logits)
    token = sample(logits, normalizer, sampling, position, asks)
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return NextToken(token, normalizer.log_probs(logit)[:, 0], logits, normalizer)


def _emit(
    decoder: Decoder,
    state: DecodeState,
    hidden: Float[Array, "B D"],
    sampling: SamplingArrays,
    ops: Ops,
    live: Bool[Array, ""] | bool = True,
) -> DecodeState:
    """Choose and record one token in the rows that run; the others keep what they have, and all
    do in a step that is not `live`.
    """
    runs = _running(state, sampling) & live
    token, logprob, _, _ = next_token(decoder, hidden, sampling, state.count, ops=ops)
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
    cache_fill: ArrayLike = 0.0,
) -> DecodeState:
    """Read right-padded prompts and choose each row's first token.

    `max_tokens` (room for generated tokens) and `cache_length` are static: they are shapes,
    and no result depends on them. `cache_fill` poisons the cache's unused slots in tests.
    """
    batch = prompts.shape[0]
    cache = create_cache(decoder.config, batch, cache_length, decoder.dtype, cache_fill)
    group = Group(prompts, prompt_positions(prompts, prompt_lengths))
    (hidden,), cache = decoder((group,), cache, ops)
    state = DecodeState(
        cache=cache,
        prompt_lengths=prompt_lengths,
        last_token=jnp.zeros(batch, jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        token_ids=jnp.full((batch, max_tokens), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
    )
    return _emit(decoder, state, last_states(hidden, prompt_lengths), sampling, ops)


def decode(
    decoder: Decoder,
    state: DecodeState,
    sampling: SamplingArrays,
    steps: Int32[Array, ""] | int,
    *,
    ops: Ops,
) -> DecodeState:
    """Up to `steps` more tokens a row, in a `lax.while_loop` that ends when no row runs.

    A row that has ended is computed on, and what it computes is dropped: rows never mix. On a GPU
    the loop takes `_STEPS_A_LOOK` steps between two looks, and those after the end are dropped too.
    """

    def step(_: Array, carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        done, state = carry
        # The last token stands behind the prompt and the count - 1 tokens before it.
        position = (state.prompt_lengths + state.count - 1)[:, None]
        (hidden,), cache = decoder((Group(state.last_token[:, None], position),), state.cache, ops)
        state = state._replace(cache=cache)
        return done + 1, _emit(decoder, state, hidden[:, 0], sampling, ops, done < steps)

    steps_a_look = lax.platform_dependent(
        default=lambda: jnp.int32(1),
        **{platform: lambda n=n: jnp.int32(n) for platform, n in _STEPS_A_LOOK.items()},
    )
    _, state = lax.while_loop(
        lambda carry: (carry[0] < steps) & _running(carry[1], sampling).any(),
        lambda carry: lax.fori_loop(0, steps_a_look, step, carry),
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
    cache_fill: ArrayLike = 0.0,
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
    cache_length = cache_length or round_up(needed, ops.contract.kv_split)
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
