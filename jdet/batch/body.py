"""The result of a line, as OpenAI's API words it; times are left out, ids come from the line."""

from collections.abc import Sequence
from typing import Any

from jdet.completion import Completion, TopLogprobs


def success(
    name: str,
    custom_id: str | None,
    model: str,
    completions: Sequence[Completion],
    tokenizer: Any,
    *,
    chat: bool,
) -> dict[str, Any]:
    """The output object of a line whose request has run."""
    prompt = len(completions[0].prompt_token_ids)
    generated = sum(len(c.token_ids) for c in completions)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "model": model,
        "choices": [_choice(c, tokenizer, chat=chat) for c in completions],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
        "system_fingerprint": completions[0].fingerprint,
    }
    response = {"status_code": 200, "request_id": name, "body": body}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None}


def failure(name: str, custom_id: str | None, message: str) -> dict[str, Any]:
    """The output object of a line that could not be served."""
    error = {"code": "invalid_request", "message": message}
    return {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": error}


def _choice(c: Completion, tokenizer: Any, *, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": c.sample_index, "finish_reason": c.finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": c.text}
    else:
        choice["text"] = c.text
        choice["token_ids"] = c.token_ids
    choice["seed"] = c.seed
    choice["logprobs"] = None
    if c.top_logprobs is not None:
        logprobs = _chat_logprobs if chat else _completion_logprobs
        choice["logprobs"] = logprobs(c, c.top_logprobs, tokenizer)
    if c.prompt_logprobs is not None and c.prompt_top_logprobs is not None:
        choice["prompt_logprobs"] = [
            {"logprob": value, "top": _by_id(top)}
            for value, top in zip(c.prompt_logprobs, c.prompt_top_logprobs, strict=True)
        ]
    return choice


def _by_id(top: TopLogprobs) -> dict[str, float]:
    return {str(token): value for token, value in top.items()}


def _piece(tokenizer: Any, token: int) -> str:
    return f"token_id:{token}" if tokenizer is None else tokenizer.decode([token], False)


def _completion_logprobs(
    c: Completion, tops: Sequence[TopLogprobs], tokenizer: Any
) -> dict[str, Any]:
    return {
        "tokens": [_piece(tokenizer, t) for t in c.token_ids],
        "token_logprobs": c.logprobs,
        # By token id: the texts of two tokens may be equal.
        "top_logprobs": [_by_id(top) for top in tops],
    }


def _chat_logprobs(c: Completion, tops: Sequence[TopLogprobs], tokenizer: Any) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": _piece(tokenizer, token), "token_id": token, "logprob": value}

    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*pair) for pair in top.items()]}
            for token, value, top in zip(c.token_ids, c.logprobs, tops, strict=True)
        ]
    }
