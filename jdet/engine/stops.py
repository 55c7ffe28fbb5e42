"""Stop strings of one request, looked for token by token."""

from typing import Any

from jdet.sampling import SamplingParams


class StopStrings:
    """Says when a stop string may have become complete.

    It looks at the last characters alone, so its work does not grow with the completion;
    `jdet.completion.stop_string_end` then says whether and where.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._stops = tuple(params.stop)
        self._longest = max(len(s) for s in self._stops)
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Take the next token."""
        text = self._tail + self._decoder.push(token_id)
        self._tail = text[len(text) - min(len(text), self._longest - 1) :]
        return any(s in text for s in self._stops)
