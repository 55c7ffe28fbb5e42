"""The host's side of the device: plans to arrays, without waiting for a result."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jdet.cache import create_cache
from jdet.decoding import Decoder
from jdet.engine.config import EngineConfig
from jdet.engine.request import Request
from jdet.engine.scheduler import Chunk, Plan
from jdet.engine.step import Chunks, DeviceState, Output, Rows, program
from jdet.ops import Ops
from jdet.sampling import SamplingArrays, SamplingParams, sampling_rows


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
        self._leaves, self._tree = jax.tree.flatten(decoder)
        self._program = program(ops)
        slots = config.max_batch_size + 1  # the last one is padding's
        self._state = DeviceState(
            create_cache(
                decoder.config, config.num_pages, config.page_size, decoder.dtype, cache_fill
            ),
            jnp.zeros(slots, jnp.int32),
        )
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
        return self._program.compiles

    def run(self, plan: Plan) -> Output:
        """Send a step. The result's arrays are still being computed."""
        chunks = self._chunks(plan) if plan.chunks else None
        decodes = self._rows(plan.decodes, plan.decode_rows) if plan.decodes else None
        return self._send(chunks, decodes)

    def warm_up(self) -> None:
        """Compile every shape, by steps of padding alone."""
        decode = [(None, rows) for rows in self.config.decode_sizes]
        mixed = [
            (shape, rows)
            for shape in self.config.chunk_shapes
            for rows in (0, self.config.max_batch_size)
        ]
        for shape, rows in (*decode, *mixed):
            chunks = None if shape is None else self._chunks(Plan((), shape, (), 0))
            self._send(chunks, self._rows((), rows) if rows else None)
        jax.block_until_ready(self._state.last_token)

    def _send(self, chunks: Chunks | None, decodes: Rows | None) -> Output:
        sampling = SamplingArrays(**self._on_device)
        self._state, output = self._program(
            self._tree, self._leaves, self._state, sampling, chunks, decodes
        )
        return output

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

    def _rows(self, chunks: Sequence[Chunk], rows: int) -> Rows:
        slots = [self._slot(c.request) for c in chunks]
        slot = np.full(rows, self.config.max_batch_size, np.int32)
        slot[: len(chunks)] = slots

        def column(values: list[int], dtype: type = np.int32) -> NDArray:
            return np.array(values + [0] * (rows - len(values)), dtype)

        return Rows(
            slot=slot,
            start=column([c.start for c in chunks]),
            length=column([c.length for c in chunks]),
            emits=column([c.emits for c in chunks], np.bool_),
            count=column([c.count for c in chunks]),
            top=column([c.request.params.logprobs or 0 for c in chunks]),
            page_table=self._table[slot],
        )

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

    def _chunks(self, plan: Plan) -> Chunks:
        tokens = np.zeros(plan.chunk_shape, np.int32)
        targets = np.full(plan.chunk_shape, -1, np.int32)
        for row, wanted, chunk in zip(tokens, targets, plan.chunks, strict=False):
            r, end = chunk.request, chunk.start + chunk.length
            row[: chunk.length] = r.tokens(chunk.start, end)
            if r.unread_prompt_logprobs:
                following = r.prompt[chunk.start + 1 : end + 1]
                wanted[: len(following)] = following
        return Chunks(
            self._rows(plan.chunks, plan.chunk_shape[0]),
            tokens,
            targets,
        )
