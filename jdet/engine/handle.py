"""What callers hold of a request: its handle, and its tokens as they come."""

import dataclasses
from typing import Any, NamedTuple

from jdet.completion import LanguageModel, completion_text
from jdet.engine.request import Request
from jdet.text_stream import TextStream


@dataclasses.dataclass(eq=False)
class Handle:
    """What `Engine.submit` gives: the samples of one prompt.

    Attributes:
      request_id: the caller's name for it, or one by order of arrival.
      prompt_index: goes into its completions.
      requests: the state of its samples.
    """

    request_id: str
    prompt_index: int
    requests: tuple[Request, ...]

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(r.finish_reason is not None for r in self.requests)


class Delta(NamedTuple):
    """What a sample has got since the last one; `text` is held back where it may be a stop."""

    sample_index: int
    token_ids: list[int]
    text: str


class DeltaReader:
    """Reads a handle's new tokens, again and again until it is done."""

    def __init__(self, model: LanguageModel, handle: Handle) -> None:
        self._tokenizer = model.tokenizer
        self._open = dict(enumerate(handle.requests))
        self._shown = [0] * len(handle.requests)
        self._texts = [
            None
            if model.tokenizer is None
            else TextStream(model.tokenizer.stream_decoder(), r.params.stop)
            for r in handle.requests
        ]

    @property
    def done(self) -> bool:
        """Whether everything has been read."""
        return not self._open

    def read(self) -> list[Delta]:
        """What is new, by sample."""
        deltas = []
        for i, request in list(self._open.items()):
            text, ids = "", request.token_ids[self._shown[i] :]
            self._shown[i] += len(ids)
            stream = self._texts[i]
            if stream is not None:
                text = stream.push(ids)
            if request.finish_reason is not None:
                del self._open[i]
                if stream is not None:
                    text += stream.finish(text_of(self._tokenizer, request))
            if ids or text:
                deltas.append(Delta(i, ids, text))
        return deltas


def text_of(tokenizer: Any, request: Request) -> str:
    """Its text so far, without the stop string that ended it."""
    return completion_text(tokenizer, request.token_ids, request.params, cut=request.stop_string)
