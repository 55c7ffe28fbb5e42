"""The input of a batch: one JSON object a line, in OpenAI's batch format or a plain prompt."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from jdet.sampling import SamplingParams

MAX_LINE_BYTES = 16 * 2**20
MAX_SAMPLES = 128  # OpenAI's limit: one line must not fill the memory
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
_SAME_NAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens"),
    *("stop", "stop_token_ids", "ignore_eos", "prompt_logprobs"),
)
# What clients send along and no token depends on.
_IGNORED = ("model", "user", "metadata", "store")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: its number from 1, its bytes (None: too many to keep), their digest, its end."""

    number: int
    content: bytes | None
    digest: bytes
    end: int


def read_lines(file: IO[bytes], max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines that are not blank; none of them is held in memory beyond `max_bytes`."""
    number = 0
    while part := file.readline(max_bytes + 1):
        number += 1
        digest, kept = hashlib.sha256(part.rstrip(b"\r\n")), part
        too_long = len(part) > max_bytes and not part.endswith(b"\n")
        while not part.endswith(b"\n") and (part := file.readline(max_bytes)):
            digest.update(part.rstrip(b"\n"))
        if kept.strip():
            content = None if too_long else kept
            yield Line(number, content, digest.digest(), file.tell())


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What a line asks for: `prompt`, or `messages` for a chat."""

    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    sampling: SamplingParams


def parse(line: Line) -> tuple[str | None, dict[str, Any]]:
    """(custom id, the rest of the object) of a line.

    Raises:
      ValueError: it is too long, or no JSON object.
    """
    if line.content is None:
        raise ValueError(f"the line has more than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line.content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the line is a JSON {type(value).__name__}; allowed: an object")
    custom_id = value.pop("custom_id", None)
    if custom_id is not None and not isinstance(custom_id, str):
        raise ValueError(f"custom_id={custom_id!r}; allowed: a string")
    return custom_id, value


def request_of(value: dict[str, Any], digest: bytes) -> BatchRequest:
    """The request of a line's object. Without a seed it gets one from the line's digest.

    Raises:
      ValueError: an unknown url or parameter, or a value outside its range.
    """
    body, url = value, _CHAT if "messages" in value else _COMPLETION
    if "body" in value:
        body, url = value["body"], value.get("url", _COMPLETION)
        unknown = sorted(set(value) - {"body", "url", "method"})
        if unknown:
            raise ValueError(f"unknown keys beside body: {', '.join(unknown)}")
        if url not in (_CHAT, _COMPLETION):
            raise ValueError(f"url={url!r}; allowed: {_CHAT}, {_COMPLETION}")
        if value.get("method", "POST") != "POST":
            raise ValueError(f"method={value['method']!r}; allowed: POST")
        if not isinstance(body, dict):
            raise ValueError(f"body is a {type(body).__name__}; allowed: an object")
    given = {k: v for k, v in body.items() if v is not None and k not in _IGNORED}
    if given.pop("stream", False):
        raise ValueError("stream=true; a batch has no streams")
    chat = url == _CHAT
    prompt = None if chat else _prompt(given.pop("prompt", None))
    messages = _messages(given.pop("messages", None)) if chat else None
    return BatchRequest(prompt, messages, _sampling(given, digest, chat=chat))


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("prompt must be a string or a list of token ids")


def _messages(value: object) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return value
    raise ValueError("messages must be a list of objects with role and content")


def _sampling(given: dict[str, Any], digest: bytes, *, chat: bool) -> SamplingParams:
    values = {name: given.pop(name) for name in _SAME_NAME if name in given}
    n = values.get("n", 1)
    if isinstance(n, int) and n > MAX_SAMPLES:
        raise ValueError(f"n={n}; allowed in a batch: 1 to {MAX_SAMPLES}")
    if "max_completion_tokens" in given:
        values["max_tokens"] = given.pop("max_completion_tokens")
    if "logit_bias" in given:
        values["logit_bias"] = _logit_bias(given.pop("logit_bias"))
    if chat:
        asked, top = given.pop("logprobs", False), given.pop("top_logprobs", 0)
        if not isinstance(asked, bool):
            raise ValueError(f"logprobs={asked!r}; allowed: true, false")
        if top and not asked:
            raise ValueError(f"top_logprobs={top!r} needs logprobs=true")
        values["logprobs"] = top if asked else None
    elif "logprobs" in given:
        values["logprobs"] = given.pop("logprobs")
    if given:
        raise ValueError(f"unknown parameters: {', '.join(sorted(given))}")
    for name in ("stop", "stop_token_ids"):
        if name in values and not isinstance(values[name], str | list):
            raise ValueError(f"{name}={values[name]!r}; allowed: a list")
    if "seed" not in values and values.get("temperature") != 0:
        values["seed"] = int.from_bytes(digest[:8]) >> 1
    return SamplingParams(**values)


def _logit_bias(value: object) -> dict[int, Any]:
    try:
        if isinstance(value, Mapping):
            return {int(token): bias for token, bias in value.items()}
    except ValueError:
        pass
    raise ValueError("logit_bias must map token ids to numbers")
