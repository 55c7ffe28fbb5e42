"""Generation for people: prompts in, completions out, by an engine of the call's own sizes."""

from collections.abc import Callable, Sequence

from jdet.compiler import check_environment
from jdet.completion import Completion, LanguageModel, encode_prompt, requests_of
from jdet.decoding import bucket
from jdet.engine.config import EngineConfig
from jdet.engine.engine import Engine
from jdet.engine.handle import Handle
from jdet.sampling import SamplingParams, bias_pairs, stop_tokens

OnTokens = Callable[[int, int, list[int]], None]

# Tokens of prompts that a step reads at most: enough to keep a device busy.
_READ_AT_ONCE = 512
_SMALLEST_CHUNK = 16
# Room for stop tokens and biases: enough for all but exotic requests.
_WIDTH = 8

type _Request = tuple[list[int], SamplingParams]


def _requests(
    model: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
) -> list[_Request]:
    """Check everything the user gave, before any work starts."""
    return [
        (encode_prompt(model, prompt, p, f"prompt {index}"), p.with_seed())
        for index, (prompt, p) in enumerate(requests_of(prompts, sampling))
    ]


def _sizes(model: LanguageModel, requests: Sequence[_Request], batch_size: int) -> EngineConfig:
    """As small as will do, in powers of two: calls of like sizes share their programs.

    There are few shapes, for few compiles: generating rows are padded to the batch, and chunks
    of prompts come one by one or as many as fit.
    """
    page = model.ops.contract.kv_split  # a split in one piece: less to gather
    eos = () if model.tokenizer is None else model.tokenizer.eos_token_ids
    rows = min(bucket(sum(p.n for _, p in requests), 1), int(batch_size))
    tokens = [len(ids) + p.max_tokens for ids, p in requests for _ in range(p.n)]
    pages = sorted((-(-count // page) for count in tokens), reverse=True)
    chunks = [min(bucket(max(len(ids) for ids, _ in requests), _SMALLEST_CHUNK), _READ_AT_ONCE)]
    while chunks[0] // 4 >= _SMALLEST_CHUNK:
        chunks.insert(0, chunks[0] // 4)
    return EngineConfig(
        max_batch_size=rows,
        max_tokens_per_step=rows + _READ_AT_ONCE,
        max_model_len=min(bucket(max(tokens), page), model.decoder.config.max_position_embeddings),
        page_size=page,
        num_pages=bucket(sum(pages[:rows]), 1),
        chunk_sizes=tuple(chunks),
        chunk_rows=(1, rows) if rows > 1 else (1,),
        decode_rows=(rows,),
        prefix_caching=False,
        max_logit_bias=bucket(max(len(bias_pairs(p.logit_bias)) for _, p in requests), _WIDTH),
        max_stop_token_ids=bucket(max(len(stop_tokens(p, eos)) for _, p in requests), _WIDTH),
    )


class _NewTokens:
    """Hands over what requests have generated since the last look."""

    def __init__(self, handles: Sequence[Handle], on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens
        self._shown = {request: (h.prompt_index, 0) for h in handles for request in h.requests}

    def look(self) -> None:
        for request, (index, count) in list(self._shown.items()):
            if new := request.token_ids[count:]:
                self._on_tokens(index, request.sample_index, new)
                self._shown[request] = index, count + len(new)
            if request.finish_reason is not None:
                del self._shown[request]


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
    It runs an engine as large as the call needs, the shortest prompts first. How requests are
    batched changes no bit of any of them. What one call compiled serves later ones of like
    sizes.

    Args:
      sampling: one for all, or one a prompt.
      batch_size: requests that run at once, at most.
      on_tokens: called with (prompt_index, sample_index, new token ids) as they come.
      steps_per_call: steps, of a token each, between two calls of `on_tokens`.

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
    if not requests:
        return []
    engine = Engine(model, _sizes(model, requests, batch_size))
    handles = [
        engine.submit(*requests[i], prompt_index=i)
        for i in sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
    ]
    new_tokens = None if on_tokens is None else _NewTokens(handles, on_tokens)
    left, steps = list(handles), 0
    while left:
        engine.step()
        steps += 1
        while left and left[-1].done:
            left.pop()
        if new_tokens is not None and (not left or steps % steps_per_call == 0):
            new_tokens.look()
    handles.sort(key=lambda handle: handle.prompt_index)
    return [c for handle in handles for c in engine.completions(handle)]
