"""The host's side of the device: plans to arrays, without waiting for a result."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jdet.cache import create_cache
from jdet.decoding import Decoder
from jdet.engine.config import EngineConfig
from jdet.engine.request import Request
from jdet.engine.scheduler import Chunk, Plan
from jdet.engine.step import Chosen, Chunks, Emits, PromptLogprobs, Rows, programs
from jdet.ops import Ops
from jdet.sampling import Asks, SamplingArrays, SamplingParams, sampling_rows


class Results(NamedTuple):
    """What a plan gives; a row of `chosen` for each of `plan.emits`. Still being computed."""

    chosen: Chosen | None
    prompt_logprobs: PromptLogprobs | None


class Device:
    """Runs plans on the default device (of a resolved config)."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        config: EngineConfig,
        eos_token_ids: Sequence[int],
        cache_fill: float = 0.0,
    ) -> None:
        assert config.num_pages is not None and config.max_model_len is not None
        self.config = config
        self._eos = eos_token_ids
        leaves, tree = jax.tree.flatten(decoder)
        self._decoder = tree, leaves
        self._decoder_shape = decoder.config.hidden_size, decoder.dtype
        self._height = config.max_batch_size + max(rows for rows, _ in config.chunk_shapes)
        self._programs = programs(ops)
        self._sharding = _sharding_of(leaves)
        cache = create_cache(
            decoder.config, config.num_pages, config.page_size, decoder.dtype, cache_fill
        )
        slots = config.max_batch_size + 1  # the last one is padding's
        self._cache, self._last_token = self._placed((cache, jnp.zeros(slots, jnp.int32)))
        greedy = SamplingParams(temperature=0, ignore_eos=True)
        self._sampling = self._sampling_rows([greedy] * slots, [0] * slots)
        self._on_device = {name: jnp.array(rows) for name, rows in self._sampling.items()}
        width = -(-config.max_model_len // config.page_size)
        self._table = np.zeros((slots, width), np.int32)
        # Of each slot, the pages that stand in its row of the table, and how many of them.
        self._pages: list[tuple[list[int] | None, int]] = [(None, 0)] * slots

    @property
    def compiles(self) -> int:
        """Programs compiled so far, by all engines with these ops."""
        return self._programs.compiles

    def run(self, plan: Plan) -> Results:
        """Send a step."""
        chunks = self._chunks(plan) if plan.chunks else None
        decodes = self._rows(plan.decodes, plan.decode_rows) if plan.decodes else None
        targets = self._targets(plan)
        ends, hidden = self._read(chunks, decodes)
        prompt = None
        if (targets >= 0).any():
            prompt = self._programs.report(*self._decoder, hidden, np.maximum(targets, 0))
        chosen = None
        if plan.emits:
            asks = _asks_of([(c.request.params, c.count) for _, c in plan.emits])
            chosen = self._choose(ends, self._emits(plan), asks)
        return Results(chosen, prompt)

    def cached(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of a running request's computed positions, by layer."""
        pages = np.array(request.pages, np.int32)

        def of(layer: jax.Array) -> np.ndarray:
            found = np.asarray(layer[pages]).swapaxes(0, 1)
            return found.reshape(len(found), -1, found.shape[-1])[:, : request.computed]

        cache = self._cache
        return [(of(k), of(v)) for k, v in zip(cache.k, cache.v, strict=True)]

    def warm_up(self, sampling: Sequence[SamplingParams] | None) -> None:
        """Compile the programs that requests with these parameters may meet; None: all.

        It runs steps of padding alone.
        """
        for rows in self.config.decode_sizes:
            ends, _ = self._read(None, self._rows((), rows))
            for asks in _variants(sampling):
                self._choose(ends, self._no_emits(rows), asks)
        for shape in self.config.chunk_shapes:
            chunks = self._chunks(Plan((), shape, (), 0))
            for decodes in (None, self._rows((), self.config.max_batch_size)):
                _, hidden = self._read(chunks, decodes)
            if _reports(sampling):
                self._programs.report(*self._decoder, hidden, np.zeros(shape, np.int32))
        jax.block_until_ready(self._last_token)

    def compile_jobs(self, sampling: Sequence[SamplingParams] | None) -> list[Callable[[], Any]]:
        """The same programs, compiled and not run: a function for each, for threads."""
        dim, dtype = self._decoder_shape
        states = functools.partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=self._sharding)
        tracing = threading.Lock()
        jobs: list[Callable[[], Any]] = []

        def add(function: Any, *args: Any, **static: Any) -> None:
            def compile_() -> None:
                # Python's part one after another, so that the first reach XLA early.
                with tracing:
                    lowered = function.lower(*self._decoder, *args, **static)
                lowered.compile()

            jobs.append(compile_)

        def add_read(*groups: Any) -> None:
            state = self._cache, self._last_token
            add(self._programs.read, *state, *groups, height=self._height)

        for rows in self.config.decode_sizes:
            add_read(None, self._rows((), rows))
            for asks in _variants(sampling):
                state = self._last_token, states((self._height, dim))
                own = SamplingArrays(**self._on_device), self._no_emits(rows)
                add(self._programs.choose, *state, *own, asks=asks)
        for shape in self.config.chunk_shapes:
            chunks = self._chunks(Plan((), shape, (), 0))
            for decodes in (None, self._rows((), self.config.max_batch_size)):
                add_read(chunks, decodes)
            if _reports(sampling):
                add(self._programs.report, states((*shape, dim)), np.zeros(shape, np.int32))
        return jobs

    def _placed(self, tree: Any) -> Any:
        """Where the weights are, for good, if they are: as what the programs give back.

        jit compiles again for an array that is committed to a device and was not before.
        """
        return tree if self._sharding is None else jax.device_put(tree, self._sharding)

    def _read(
        self, chunks: Chunks | None, decodes: Rows | None
    ) -> tuple[jax.Array, jax.Array | None]:
        self._cache, ends, hidden = self._programs.read(
            *self._decoder,
            self._cache,
            self._last_token,
            chunks,
            decodes,
            height=self._height,
        )
        return ends, hidden

    def _choose(self, ends: jax.Array, emits: Emits, asks: Asks) -> Chosen:
        sampling = SamplingArrays(**self._on_device)
        self._last_token, chosen = self._programs.choose(
            *self._decoder, self._last_token, ends, sampling, emits, asks=asks
        )
        return chosen

    def _rows(self, chunks: Sequence[Chunk], rows: int) -> Rows:
        slot = _column([self._slot(c.request) for c in chunks], rows, self.config.max_batch_size)
        return Rows(
            slot=slot,
            start=_column([c.start for c in chunks], rows),
            length=_column([c.length for c in chunks], rows),
            page_table=self._table[slot],
        )

    def _chunks(self, plan: Plan) -> Chunks:
        tokens = np.zeros(plan.chunk_shape, np.int32)
        for row, chunk in zip(tokens, plan.chunks, strict=False):
            end = chunk.start + chunk.length
            row[: chunk.length] = chunk.request.tokens(chunk.start, end)
        return Chunks(self._rows(plan.chunks, plan.chunk_shape[0]), tokens)

    def _targets(self, plan: Plan) -> NDArray[np.int32]:
        """The token behind each position whose log-prob is wanted; -1 elsewhere."""
        targets = np.full(plan.chunk_shape, -1, np.int32)
        for row, chunk in zip(targets, plan.chunks, strict=False):
            if chunk.request.unread_prompt_logprobs:
                end = chunk.start + chunk.length
                following = chunk.request.prompt[chunk.start + 1 : end + 1]
                row[: len(following)] = following
        return targets

    def _emits(self, plan: Plan) -> Emits:
        rows = next(s for s in self.config.decode_sizes if s >= len(plan.emits))
        return Emits(
            row=_column([row for row, _ in plan.emits], rows),
            slot=_column(
                [self._slot(c.request) for _, c in plan.emits], rows, self.config.max_batch_size
            ),
            count=_column([c.count for _, c in plan.emits], rows),
        )

    def _no_emits(self, rows: int) -> Emits:
        """Padding alone."""
        return Emits(*(_column([], rows, p) for p in (0, self.config.max_batch_size, 0)))

    def _slot(self, request: Request) -> int:
        """The request's slot, its rows there brought up to date."""
        slot = request.slot
        assert slot is not None
        pages, filled = self._pages[slot]
        if pages is not request.pages:  # it has just been given the slot
            self._set_sampling(slot, request)
            filled = 0
        if filled < len(request.pages):
            self._table[slot, filled : len(request.pages)] = request.pages[filled:]
        self._pages[slot] = request.pages, len(request.pages)
        return slot

    def _set_sampling(self, slot: int, request: Request) -> None:
        rows = self._sampling_rows([request.params], [request.sample_index])
        for name, own in rows.items():
            row = self._sampling[name][slot : slot + 1]
            if (row != own).any():
                row[...] = own
                # A copy: the device may read the array it is given at any later time.
                self._on_device[name] = jnp.array(self._sampling[name])

    def _sampling_rows(
        self, params: list[SamplingParams], sample_index: list[int]
    ) -> dict[str, NDArray]:
        return sampling_rows(
            params,
            eos_token_ids=self._eos,
            sample_index=sample_index,
            stop_width=self.config.max_stop_token_ids,
            bias_width=self.config.max_logit_bias,
        )


# Greedy rows alone, noise beside them, and truncation beside that. What is rare (adjusted
# logits and top log-probs) counts as one, for fewer programs.
_VARIANTS = [
    Asks(noise, truncation, adjustment)
    for noise, truncation in ((False, False), (True, False), (True, True))
    for adjustment in (False, True)
]


def _asks_of(rows: Sequence[tuple[SamplingParams, int]]) -> Asks:
    """What rows ask for, by their parameters and the place of the token they choose."""
    hot = [p for p, _ in rows if p.temperature > 0]
    return Asks(
        noise=bool(hot),
        truncation=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in hot),
        adjustment=any(n < p.min_tokens or p.logit_bias or p.logprobs for p, n in rows),
    )


def _sharding_of(leaves: Sequence[jax.Array]) -> jax.sharding.Sharding | None:
    """The one device that all are committed to; None where there is no such one."""
    shardings = {leaf.sharding for leaf in leaves if leaf.committed}
    alike = len(shardings) == 1 and all(leaf.committed for leaf in leaves)
    [sharding] = shardings if alike else [None]
    return sharding if sharding is not None and sharding.num_devices == 1 else None


def _variants(sampling: Sequence[SamplingParams] | None) -> list[Asks]:
    """What any of these requests may ask for together; None: everything."""
    if sampling is None:
        return _VARIANTS
    # Of its first token, which `min_tokens` adjusts, and of its last.
    rows = [(p, n) for p in sampling for n in (0, p.max_tokens)]
    found = {_asks_of([row]) for row in rows}
    while True:
        both = {Asks(*map(max, a, b)) for a in found for b in found}
        if both == found:
            return [asks for asks in _VARIANTS if asks in found]
        found = both


def _reports(sampling: Sequence[SamplingParams] | None) -> bool:
    return sampling is None or any(p.prompt_logprobs is not None for p in sampling)


def _column(values: list[int], rows: int, padding: int = 0) -> NDArray[np.int32]:
    return np.array(values + [padding] * (rows - len(values)), np.int32)
