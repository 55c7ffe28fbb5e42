"""What a completion is, and what generating one asks of a model and of a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jdet.decoding import Decoder
from jdet.ops import Ops
from jdet.sampling import SamplingParams, bias_pairs

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
