"""Sampling parameters of a request, and the choice of its next token.

Every row is sampled by its own parameters, carried as arrays: changing a temperature
recompiles nothing, and a row's token does not see its neighbours' parameters.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.pallas_kernels.trees import exp, prefix_sums, tree_sum
from jdet.rng import MAX_SEED, gumbel

_MAX_INT32 = 2**31 - 1
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; names and meanings as in the OpenAI API and vLLM.

    Attributes:
      n: completions of the prompt; each has its own noise (sample index 0..n-1).
      temperature: 0 takes the most probable token (ties: the lowest token id); else 1e-4..1e4.
      top_p: smallest set of most probable tokens with at least this probability; 1 is off.
      top_k: most probable tokens to choose from; 0 is off.
      min_p: drop tokens less probable than min_p times the most probable one; 0 is off.
      seed: 0..2**64-1. None draws one when temperature > 0; the completion reports it.
      max_tokens: tokens to generate at most.
      min_tokens: tokens to generate before anything but max_tokens may end it.
      stop: strings that end the completion; not part of its text.
      stop_token_ids: token ids that end it, besides the tokenizer's end tokens.
      ignore_eos: do not end at the tokenizer's end tokens.
      logit_bias: token id to what is added to its logit, -100..100, before all else that
        chooses a token. Log-probs are those of the model, without it.
      logprobs: most probable tokens to report at each generated one, 0..20; None is off.
      prompt_logprobs: report the prompt's log-probs too, each with so many most probable
        tokens, 0..20; None is off.

    Raises:
      ValueError: a value outside its range; the message names it and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    # These are stored as tuples, the mapping as pairs in the order of token ids.
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, low in (("n", 1), ("top_k", 0), ("max_tokens", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            capped = name != "n"
            if not _is_int(value) or value < low or (capped and value > _MAX_INT32):
                until = " to 2**31-1" if capped else ""
                raise ValueError(f"{name}={value!r}; allowed: integers from {low}{until}")
            object.__setattr__(self, name, int(value))
        # Outside, logits / temperature overflows in float32 or has no digits left.
        _check_number(
            "temperature",
            self.temperature,
            "0, or 1e-4 to 1e4",
            lambda v: v == 0 or 1e-4 <= v <= 1e4,
        )
        _check_number("top_p", self.top_p, "0 < top_p <= 1", lambda v: 0 < v <= 1)
        _check_number("min_p", self.min_p, "0 <= min_p <= 1", lambda v: 0 <= v <= 1)
        if self.seed is not None:
            if not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
                raise ValueError(f"seed={self.seed!r}; allowed: integers 0..2**64-1")
            object.__setattr__(self, "seed", int(self.seed))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={self.stop!r}; allowed: non-empty strings")
        if not all(_is_int(t) and 0 <= t <= _MAX_INT32 for t in self.stop_token_ids):
            raise ValueError(
                f"stop_token_ids={self.stop_token_ids!r}; allowed: token ids from 0 to 2**31-1"
            )
        object.__setattr__(self, "stop_token_ids", tuple(int(t) for t in self.stop_token_ids))
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}; allowed: 0 to max_tokens={self.max_tokens}"
            )
        object.__setattr__(self, "logit_bias", bias_pairs(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and 0 <= value <= MAX_TOP_LOGPROBS):
                raise ValueError(f"{name}={value!r}; allowed: None, integers 0..{MAX_TOP_LOGPROBS}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0 would give {self.n} equal completions; "
                "use n=1 or a temperature above 0"
            )

    def with_seed(self) -> "SamplingParams":
        """Self, or a copy with a drawn seed where noise is needed and none was given."""
        if self.temperature == 0 or self.seed is not None:
            return self
        return dataclasses.replace(self, seed=secrets.randbits(63))


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_number(name: str, value: object, allowed: str, holds: Callable[[Any], bool]) -> None:
    # NaN and infinities lie in no range.
    number = isinstance(value, int | float | np.integer | np.floating)
    if not number or isinstance(value, bool) or not holds(value):
        raise ValueError(f"{name}={value!r}; allowed: {allowed}")


def bias_pairs(
    bias: Mapping[int, float] | Sequence[tuple[int, float]] | None,
) -> tuple[tuple[int, float], ...]:
    """(token id, bias) in the order of ids."""
    try:
        pairs = dict(bias or {})
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={bias!r}; allowed: a mapping from token ids") from None
    if not all(_is_int(token) and 0 <= token <= _MAX_INT32 for token in pairs):
        raise ValueError(f"logit_bias={bias!r}; allowed: token ids from 0 to 2**31-1")
    for value in pairs.values():
        _check_number("logit_bias", value, "-100 to 100", lambda v: abs(v) <= MAX_LOGIT_BIAS)
    return tuple(sorted((int(token), float(value)) for token, value in pairs.items()))


class SamplingArrays(NamedTuple):
    """Sampling parameters of a batch, one row each; a pytree of arrays."""

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    seed: UInt32[Array, "B 2"]
    sample_index: Int32[Array, " B"]
    max_tokens: Int32[Array, " B"]
    min_tokens: Int32[Array, " B"]
    # Token ids that end a row, and those that are biased; both filled up with -1.
    stop_token_ids: Int32[Array, "B E"]
    biased_token_ids: Int32[Array, "B L"]
    logit_bias: Float32[Array, "B L"]


def sampling_rows(
    params: Sequence[SamplingParams],
    *,
    eos_token_ids: Sequence[int] = (),
    sample_index: Sequence[int] | None = None,
    stop_width: int = 8,
    bias_width: int = 8,
) -> dict[str, np.ndarray]:
    """The fields of `SamplingArrays`; rows that ask for more than a width make it wider.

    Raises:
      ValueError: a row with temperature > 0 has no seed.
    """
    for p in params:
        if p.temperature > 0 and p.seed is None:
            raise ValueError("seed=None with temperature > 0; call with_seed() or give a seed")
    stops = [stop_tokens(p, eos_token_ids) for p in params]
    biases = [bias_pairs(p.logit_bias) for p in params]
    stop_width = max(stop_width, *(len(s) for s in stops))
    bias_width = max(bias_width, *(len(b) for b in biases))
    ids = [[token for token, _ in b] + [-1] * (bias_width - len(b)) for b in biases]
    values = [[value for _, value in b] + [0.0] * (bias_width - len(b)) for b in biases]
    seeds = [p.seed or 0 for p in params]
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
        "seed": np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32),
        "sample_index": np.array(sample_index or [0] * len(params), np.int32),
        "max_tokens": np.array([p.max_tokens for p in params], np.int32),
        "min_tokens": np.array([p.min_tokens for p in params], np.int32),
        "stop_token_ids": np.array([s + [-1] * (stop_width - len(s)) for s in stops], np.int32),
        "biased_token_ids": np.array(ids, np.int32),
        "logit_bias": np.array(values, np.float32),
    }


def sampling_arrays(
    params: Sequence[SamplingParams],
    *,
    eos_token_ids: Sequence[int] = (),
    sample_index: Sequence[int] | None = None,
) -> SamplingArrays:
    """Pack one `SamplingParams` a row (its `n` is not looked at; give a row per sample).

    The widths are those of all but exotic requests, so that a stop token more recompiles
    nothing.

    Raises:
      ValueError: a row with temperature > 0 has no seed.
    """
    rows = sampling_rows(params, eos_token_ids=eos_token_ids, sample_index=sample_index)
    return SamplingArrays(**{name: jnp.asarray(values) for name, values in rows.items()})


def stop_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens that end a completion, ascending."""
    return sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})


def _adjusted(
    logits: Float32[Array, "B V"], s: SamplingArrays, position: Int32[Array, " B"]
) -> Float32[Array, "B V"]:
    """Logits with logit_bias, and none left for end tokens before min_tokens."""
    row = jnp.arange(logits.shape[0])[:, None]
    # -1 would count from the end; past the end it is dropped.
    past = logits.shape[1]
    biased = jnp.where(s.biased_token_ids < 0, past, s.biased_token_ids)
    # Read, added and put back: a scatter that adds may do so in any order.
    own = logits.at[row, biased].get(mode="fill", fill_value=0)
    logits = logits.at[row, biased].set(own + s.logit_bias, mode="drop")
    held = (position < s.min_tokens)[:, None] & (s.stop_token_ids >= 0)
    return logits.at[row, jnp.where(held, s.stop_token_ids, past)].set(-jnp.inf, mode="drop")


def _kept(scaled: Float32[Array, "B V"], s: SamplingArrays) -> Bool[Array, "B V"]:
    """The tokens that min_p, then top_k, then top_p leave; ties: the lower id is first."""
    order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    p = exp(ranked - ranked[:, :1])  # relative to the most probable token
    keep = p >= s.min_p[:, None]
    keep &= (s.top_k[:, None] == 0) | (rank < s.top_k[:, None])
    p = jnp.where(keep, p, 0)
    before = prefix_sums(p) - p
    keep &= (s.top_p[:, None] >= 1) | (before < s.top_p[:, None] * tree_sum(p)[:, None])
    keep |= rank == 0  # whatever underflows: a top_p of 1e-46 is 0 in float32
    rank_of_token = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(keep, rank_of_token, axis=-1)


class Asks(NamedTuple):
    """What some row of a batch asks for: known (bool) while tracing, or found by the device."""

    noise: bool | Bool[Array, ""]
    truncation: bool | Bool[Array, ""]
    adjustment: bool | Bool[Array, ""]  # logit_bias, or min_tokens not reached yet


def asks_of(s: SamplingArrays, position: Int32[Array, " B"]) -> Asks:
    """What the rows ask for at these positions."""
    hot = s.temperature > 0
    return Asks(
        noise=hot.any(),
        truncation=_truncated(s).any(),
        adjustment=((position < s.min_tokens) | (s.biased_token_ids >= 0).any(axis=-1)).any(),
    )


def _truncated(s: SamplingArrays) -> Bool[Array, " B"]:
    return (s.temperature > 0) & ((s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0))


def _where_asked[T](
    asked: bool | Bool[Array, ""], run: Callable[[], T], skip: Callable[[], T]
) -> T:
    if isinstance(asked, bool):
        return run() if asked else skip()
    return lax.cond(asked, run, skip)


def sample(
    logits: Float32[Array, "B V"],
    normalizer: LogNormalizer,
    s: SamplingArrays,
    position: Int32[Array, " B"],
    asks: Asks | None = None,
) -> Int32[Array, " B"]:
    """The next token of each row; `position` counts the row's own completion from 0.

    `normalizer` is that of the logits: its argmax is the token of temperature 0
    where nothing is biased.

    temperature > 0 takes the maximum of logits / temperature + Gumbel noise over the tokens
    that min_p, top_k and top_p leave (Gumbel-max trick); noise is that of `rng.gumbel`, by
    token id. Biases, sorting and noise run only when a row of the batch asks for them, and
    change nothing in the rows that do not. `asks` says so where the caller knows; it may ask
    for more than the rows do.
    """
    asks = asks_of(s, position) if asks is None else asks

    def adjusted() -> tuple[Array, Array, Array]:
        x = _adjusted(logits, s, position)
        return x, x.max(axis=-1), jnp.argmax(x, axis=-1).astype(jnp.int32)

    logits, maximum, greedy = _where_asked(
        asks.adjustment, adjusted, lambda: (logits, normalizer.maximum, normalizer.argmax)
    )

    def draw() -> Int32[Array, " B"]:
        hot = s.temperature > 0
        # From the row's maximum down, so that a low temperature makes no infinity of it.
        below = logits - maximum[:, None]
        scaled = below / jnp.where(hot, s.temperature, 1)[:, None]
        keep = _where_asked(
            asks.truncation,
            lambda: _kept(scaled, s) | ~_truncated(s)[:, None],
            lambda: jnp.ones(scaled.shape, bool),
        )
        noisy = scaled + gumbel(s.seed, s.sample_index, position, logits.shape[-1])
        drawn = jnp.argmax(jnp.where(keep, noisy, -jnp.inf), axis=-1).astype(jnp.int32)
        return jnp.where(hot, drawn, greedy)

    return _where_asked(asks.noise, draw, lambda: greedy)
