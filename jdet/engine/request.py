"""One sample of one prompt, from its arrival to its end."""

import dataclasses
from collections.abc import Sequence

from jdet.completion import TopLogprobs
from jdet.engine.pages import page_key
from jdet.sampling import SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """The state of a request; the scheduler and the engine write it.

    Attributes:
      arrival: the order of arrival: earlier requests are served first.
      stop_token_ids: the tokens that end it.
      token_ids, logprobs: what it has generated, as far as the host has seen it.
      top_logprobs: the `params.logprobs` most probable tokens at each of them.
      prompt_logprobs, prompt_top_logprobs: the same of the prompt's tokens from the second
        on, as far as they are known; only where `params.prompt_logprobs` asks for them.
      slot: its row of the device's per-request arrays, while it runs.
      pages: its pages of the cache, in order of position.
      computed: positions whose keys and values are in the cache, by the steps sent so far.
      generating: its prompt has been read by the steps sent so far.
      pending: tokens chosen by steps that were sent and not seen yet.
      finish_reason: "stop", "length" or "cancelled"; None until its end.
      stop_string: its tokens end with a stop string, which its text leaves out.
    """

    arrival: int
    prompt: Sequence[int]
    params: SamplingParams
    sample_index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[TopLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs] = dataclasses.field(default_factory=list)
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    generating: bool = False
    pending: int = 0
    finish_reason: str | None = None
    stop_string: bool = False
    _keys: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens whose ids the host has: the prompt's and those generated."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def chosen(self) -> int:
        """Tokens of the completion that the steps sent so far choose."""
        return len(self.token_ids) + self.pending

    @property
    def unread_prompt_logprobs(self) -> bool:
        """Whether prompt log-probs are asked for and not all known."""
        asked = self.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.prompt) - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Known ids at the positions start..end-1."""
        length = len(self.prompt)
        if end <= length:
            return list(self.prompt[start:end])
        return [*self.prompt[start:], *self.token_ids[max(0, start - length) : end - length]]

    def page_keys(self, page_size: int, count: int) -> list[bytes]:
        """Keys of the first `count` pages, all of them full of known tokens."""
        for i in range(len(self._keys), count):
            parent = self._keys[-1] if self._keys else b""
            own = self.tokens(i * page_size, (i + 1) * page_size)
            self._keys.append(page_key(parent, own))
        return self._keys[:count]
