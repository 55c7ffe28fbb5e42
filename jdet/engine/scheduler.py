"""Which requests the next step computes. Plain decisions: no array, no clock, no bit.

Requests are served in the order of arrival. Those that generate go on in every step; what is
left of the step's budget reads prompts, in chunks of any length, which the contract makes
invisible. When pages run out the youngest running request gives its pages back and waits;
later its prompt and the tokens it has generated are read again, with the same bits.

Nothing can wait for ever: `EngineConfig` fits the longest request into an empty cache, the
oldest running request never gives its pages back to another, and a request that waits is
admitted at the latest when nothing runs.
"""

import bisect
import dataclasses

from jdet.engine.config import EngineConfig
from jdet.engine.pages import PagePool
from jdet.engine.request import Request


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Positions start..start+length-1 of a request, to be read in one step.

    `emits`: they are the last known ones, so the step chooses the next token.
    """

    request: Request
    start: int
    length: int
    emits: bool

    @property
    def count(self) -> int:
        """The place in the completion of the token after it."""
        return self.start + self.length - len(self.request.prompt)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
      chunks: of prompts, one a request.
      chunk_shape: (rows, length) they are padded to; (0, 0) without chunks.
      decodes: chunks of one token, which is on the device and perhaps not known here yet.
      decode_rows: rows they are padded to; 0 without.
    """

    chunks: tuple[Chunk, ...]
    chunk_shape: tuple[int, int]
    decodes: tuple[Chunk, ...]
    decode_rows: int

    @property
    def emits(self) -> list[tuple[int, Chunk]]:
        """(row, chunk) of what chooses a token; the decodes' rows follow the padded chunks'."""
        rows = (*enumerate(self.chunks), *enumerate(self.decodes, self.chunk_shape[0]))
        return [(row, chunk) for row, chunk in rows if chunk.emits]


@dataclasses.dataclass
class Counts:
    """What has happened so far; tests ask it whether what they compose occurred."""

    preemptions: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    unfinished_chunks: int = 0
    mixed_steps: int = 0
    most_decodes: int = 0


class Scheduler:
    """Waiting and running requests, and the pages of the cache (of a resolved config)."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_pages is not None
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.counts = Counts()
        self.waiting: list[Request] = []  # both in order of arrival
        self.running: list[Request] = []
        self._free_slots = list(reversed(range(config.max_batch_size)))

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        bisect.insort(self.waiting, request, key=_arrival)

    def finish(self, request: Request, reason: str) -> None:
        """End a request, wherever it is; a step in flight may still compute it."""
        request.finish_reason = reason
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._stop_running(request)

    def schedule(self) -> Plan | None:
        """The next step, counted as sent; None where there is nothing to compute."""
        preemptions = self.counts.preemptions
        decodes = self._decodes()
        # What was just preempted must not take back the pages it gave.
        if preemptions == self.counts.preemptions:
            while self.waiting and self._admit(self.waiting[0]):
                self.running.append(self.waiting.pop(0))
                self.running.sort(key=_arrival)
        chunks, shape = self._chunks(self.config.max_tokens_per_step - len(decodes))
        if not decodes and not chunks:
            return None
        for chunk in (*decodes, *chunks):
            self._send(chunk)
        self.counts.prompt_tokens += sum(c.length for c in chunks)
        self.counts.decode_tokens += len(decodes)
        self.counts.mixed_steps += bool(chunks and decodes)
        self.counts.most_decodes = max(self.counts.most_decodes, len(decodes))
        # Beside chunks, whose shapes are many, generating rows have one shape.
        rows = self.config.max_batch_size if chunks else _fit(self.config.decode_sizes, decodes)
        return Plan(chunks, shape, decodes, rows if decodes else 0)

    def seen(self, request: Request) -> None:
        """Give names to the pages that are full of known tokens."""
        if not self.config.prefix_caching or request.slot is None:
            return
        full = min(request.computed, request.known) // self.config.page_size
        keys = request.page_keys(self.config.page_size, full)
        for page, key in zip(request.pages, keys, strict=False):
            self.pool.name(page, key)

    def _decodes(self) -> tuple[Chunk, ...]:
        chosen = []
        for request in list(self.running):
            # A victim of an older request is not running any more.
            if request.slot is None or not request.generating:
                continue
            if request.chosen < request.params.max_tokens and self._grow(request):
                chosen.append(Chunk(request, request.computed, 1, emits=True))
        return tuple(chosen)

    def _grow(self, request: Request) -> bool:
        """A page for the request's next position; False where it had to give way itself."""
        while request.computed == len(request.pages) * self.config.page_size:
            page = self.pool.allocate()
            if page is not None:
                request.pages.append(page)
            else:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
        return True

    def _preempt(self, request: Request) -> None:
        self.counts.preemptions += 1
        self._stop_running(request)
        self.add(request)

    def _stop_running(self, request: Request) -> None:
        assert request.slot is not None
        self.running.remove(request)
        self.pool.release(request.pages)
        self._free_slots.append(request.slot)
        request.slot, request.pages = None, []
        request.computed, request.generating = 0, False

    def _admit(self, request: Request) -> bool:
        """Give the request a slot and pages for all its known tokens, or nothing at all."""
        # A token still in flight must be known before the prompt is read again.
        if not self._free_slots or request.pending:
            return False
        size = self.config.page_size
        found = self._reusable(request)
        for page in found:
            self.pool.hold(page)
        # One more token than is known, unless nothing runs that could give way.
        tokens = request.known + bool(self.running)
        needed = -(-tokens // size) - len(found)
        if needed > self.pool.available:
            self.pool.release(found)
            return False
        new = [self.pool.allocate() for _ in range(-(-request.known // size) - len(found))]
        request.pages = found + [page for page in new if page is not None]
        request.computed = len(found) * size
        request.slot = self._free_slots.pop()
        self.counts.reused_tokens += request.computed
        return True

    def _reusable(self, request: Request) -> list[int]:
        """Pages that hold the request's first tokens already."""
        if not self.config.prefix_caching:
            return []
        size = self.config.page_size
        # The last token is always computed: its logits are wanted. So is what has its
        # prompt log-probs still to be reported.
        limit = request.known - 1
        if request.unread_prompt_logprobs:
            limit = min(limit, len(request.prompt_logprobs))
        found: list[int] = []
        for i in range(limit // size):
            page = self.pool.find(request.page_keys(size, i + 1)[i])
            if page is None:
                break
            found.append(page)
        return found

    def _chunks(self, budget: int) -> tuple[tuple[Chunk, ...], tuple[int, int]]:
        """The oldest unread prompt sets the length; as many others as fit go along."""
        unread = [r for r in self.running if not r.generating]
        if not unread:
            return (), (0, 0)
        sizes = {size for _, size in self.config.chunk_shapes if size <= budget}
        left = unread[0].known - unread[0].computed
        length = min((s for s in sizes if s >= left), default=max(sizes))
        heights = [
            rows
            for rows, size in self.config.chunk_shapes
            if size == length and rows * size <= budget
        ]
        rows = next((h for h in heights if h >= len(unread)), heights[-1])
        chunks = []
        for request in unread[:rows]:
            left = request.known - request.computed
            chunks.append(Chunk(request, request.computed, min(left, length), emits=left <= length))
        return tuple(chunks), (rows, length)

    def _send(self, chunk: Chunk) -> None:
        request = chunk.request
        self.counts.unfinished_chunks += not request.generating and not chunk.emits
        request.computed = chunk.start + chunk.length
        if chunk.emits:
            request.generating = True
            request.pending += 1


def _arrival(request: Request) -> int:
    return request.arrival


def _fit(sizes: tuple[int, ...], rows: tuple[Chunk, ...]) -> int:
    return next(size for size in sizes if size >= len(rows))
