"""Text as it is generated, with stop strings held back."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class StreamDecoder(Protocol):
    """Token ids to text, one at a time (`jdet.io.tokenizer.StreamDecoder`)."""

    def push(self, token_id: int) -> str: ...


class TextStream:
    """The text of one completion as its tokens come: joined, it is `Completion.text`.

    What may be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._text = ""
        self._shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text that is settled by them."""
        self._text += "".join(self._decoder.push(t) for t in token_ids)
        ends = [self._text.index(s) for s in self._stops if s in self._text]
        return self._show(min(ends) if ends else len(self._text) - self._held_back())

    def finish(self, text: str) -> str:
        """Returns what is left of the completion's text."""
        return text[self._shown :]

    def _held_back(self) -> int:
        longest = max((len(s) - 1 for s in self._stops), default=0)
        lengths = range(min(longest, len(self._text)), 0, -1)
        tails = ((k, self._text[len(self._text) - k :]) for k in lengths)
        return next((k for k, tail in tails if any(s.startswith(tail) for s in self._stops)), 0)

    def _show(self, end: int) -> str:
        new = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
