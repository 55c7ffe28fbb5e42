"""The device's step: chunks of prompts and generating rows in one jitted program.

Its shapes are those of `EngineConfig`, its cache is donated, and the tokens it chooses stay on
the device for the next step, so that the host can send that step before it has seen them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jdet.cache import KVCache
from jdet.compiler import jit
from jdet.decoding import Decoder, round_up
from jdet.ops import Ops
from jdet.sampling import MAX_TOP_LOGPROBS, SamplingArrays, sample
from jdet.scoring import LOGIT_ROWS

# The host gives numpy arrays, which jit puts on the device.
Given = Array | np.ndarray


class Rows(NamedTuple):
    """Requests of a step, one a row; padding rows have length 0 and the slot after the last."""

    slot: Int32[Given, " B"]
    start: Int32[Given, " B"]  # position of the row's first token
    length: Int32[Given, " B"]
    emits: Bool[Given, " B"]  # its last token is the last known: choose the next one
    count: Int32[Given, " B"]  # place of that next token in the completion
    top: Int32[Given, " B"]  # most probable tokens asked for
    page_table: Int32[Given, "B N"]


class Chunks(NamedTuple):
    """Chunks of prompts; `targets`: the next token where a prompt log-prob is wanted, else -1."""

    rows: Rows
    tokens: Int32[Given, "B C"]
    targets: Int32[Given, "B C"]


class DeviceState(NamedTuple):
    """What stays on the device from step to step; donated."""

    cache: KVCache  # pages
    last_token: Int32[Array, " slots"]


class TopTokens(NamedTuple):
    """The most probable tokens, best first; ties: the lower id first."""

    token_ids: Int32[Array, "*rows K"]
    logprobs: Float32[Array, "*rows K"]


class Output(NamedTuple):
    """What a step chose, a row for each row of the chunks, then of the decodes."""

    token: Int32[Array, " R"]
    logprob: Float32[Array, " R"]
    top: TopTokens
    prompt_logprobs: Float32[Array, "B C"]
    prompt_top: TopTokens


def _positions(rows: Rows, width: int) -> Int32[Array, "B T"]:
    at = jnp.arange(width, dtype=jnp.int32)
    return jnp.where(at < rows.length[:, None], rows.start[:, None] + at, -1)


def _top(logits: Float32[Array, "R V"], logprobs: Float32[Array, "R V"]) -> TopTokens:
    # By logits: two of them may round to one log-prob.
    _, ids = lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
    return TopTokens(ids, jnp.take_along_axis(logprobs, ids, axis=-1))


def _no_top(rows: int, vocab_size: int) -> TopTokens:
    shape = (rows, min(MAX_TOP_LOGPROBS, vocab_size))
    return TopTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def _run_group(
    decoder: Decoder, cache: KVCache, tokens: Array, rows: Rows, ops: Ops
) -> tuple[Float[Array, "B T D"], KVCache]:
    positions = _positions(rows, tokens.shape[1])
    pages, heads, size, dim = cache.k[0].shape
    table = rows.page_table
    length = round_up(table.shape[1] * size + tokens.shape[1], ops.contract.kv_split)

    def gather(side: Array) -> Array:
        own = side[table].transpose(0, 2, 1, 3, 4)
        own = own.reshape(table.shape[0], heads, table.shape[1] * size, dim)
        return jnp.pad(own, ((0, 0), (0, 0), (0, length - own.shape[2]), (0, 0)))

    own = KVCache(tuple(map(gather, cache.k)), tuple(map(gather, cache.v)))
    hidden, own = decoder(tokens, positions, own, ops)
    row = jnp.arange(table.shape[0])[:, None]
    at = jnp.maximum(positions, 0)
    page = jnp.where(positions >= 0, table[row, at // size], pages)

    def scatter(side: Array, new: Array) -> Array:
        return side.at[page, :, at % size].set(new[row, :, at], mode="drop")

    return hidden, KVCache(tuple(map(scatter, cache.k, own.k)), tuple(map(scatter, cache.v, own.v)))


def _prompt_logprobs(
    decoder: Decoder, hidden: Float[Array, "B C D"], targets: Int32[Array, "B C"], ops: Ops
) -> tuple[Float32[Array, "B C"], TopTokens]:
    """As `jdet.scoring.score_tokens`: `LOGIT_ROWS` rows of logits at a time."""
    count = targets.size
    padded = round_up(count, LOGIT_ROWS)
    rows = jnp.pad(hidden.reshape(count, -1), ((0, padded - count), (0, 0)))
    wanted = jnp.pad(targets.reshape(-1), (0, padded - count))

    def some_rows(args: tuple[Array, Array]) -> tuple[Array, TopTokens]:
        x, target = args
        logits = decoder.logits(x, ops)
        logprobs = ops.log_softmax(logits)
        own = jnp.take_along_axis(logprobs, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        return own, _top(logits, logprobs)

    tiles = rows.reshape(-1, LOGIT_ROWS, rows.shape[-1]), wanted.reshape(-1, LOGIT_ROWS)
    own, top = lax.map(some_rows, tiles)
    return jax.tree.map(
        lambda x: x.reshape(padded, *x.shape[2:])[:count].reshape(*targets.shape, *x.shape[2:]),
        (own, top),
    )


def step(
    decoder: Decoder,
    state: DeviceState,
    sampling: SamplingArrays,
    chunks: Chunks | None,
    decodes: Rows | None,
    *,
    ops: Ops,
) -> tuple[DeviceState, Output]:
    """Read the rows' tokens and choose the next token of those that emit.

    `sampling` and `state.last_token` have a row for each slot and one for padding.
    """
    cache, padding = state.cache, state.last_token.shape[0] - 1
    ends, rows, hidden = [], [], jnp.zeros(())
    if chunks is not None:
        hidden, cache = _run_group(decoder, cache, jnp.asarray(chunks.tokens), chunks.rows, ops)
        last = jnp.maximum(chunks.rows.length - 1, 0)[:, None, None]
        ends.append(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
        rows.append(chunks.rows)
    if decodes is not None:
        own, cache = _run_group(
            decoder, cache, state.last_token[decodes.slot][:, None], decodes, ops
        )
        ends.append(own[:, 0])
        rows.append(decodes)
    emits = jnp.concatenate([r.emits for r in rows])
    # A row that does not emit is sampled like padding, at no cost.
    slot = jnp.where(emits, jnp.concatenate([r.slot for r in rows]), padding)
    logits = decoder.logits(jnp.concatenate(ends), ops)
    logprobs = ops.log_softmax(logits)
    own_sampling = jax.tree.map(lambda x: x[slot], sampling)
    token = sample(logits, own_sampling, jnp.concatenate([r.count for r in rows]))
    top = lax.cond(
        jnp.concatenate([r.top for r in rows]).any(),
        lambda: _top(logits, logprobs),
        lambda: _no_top(*logits.shape),
    )
    prompt_logprobs, prompt_top = jnp.zeros((0, 0)), _no_top(0, logits.shape[1])
    if chunks is not None:
        shape = chunks.targets.shape
        zeros = _no_top(chunks.targets.size, logits.shape[1])
        prompt_logprobs, prompt_top = lax.cond(
            (chunks.targets >= 0).any(),
            lambda: _prompt_logprobs(decoder, hidden, jnp.asarray(chunks.targets), ops),
            lambda: (
                jnp.zeros(shape, jnp.float32),
                jax.tree.map(lambda x: x.reshape(*shape, -1), zeros),
            ),
        )
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    state = DeviceState(cache, state.last_token.at[slot].set(token))
    return state, Output(token, logprob, top, prompt_logprobs, prompt_top)


class Program:
    """`step`, jitted for one set of ops; `compiles` counts the shapes it has met."""

    def __init__(self, ops: Ops) -> None:
        self.compiles = 0
        self._ops = ops
        self._step = jit(
            self._traced,
            implementation=ops.implementation,
            static_argnums=0,
            donate_argnums=2,
        )

    def _traced(self, tree: Any, leaves: list[Array], *args: Any) -> tuple[DeviceState, Output]:
        self.compiles += 1  # jit runs this line once a shape
        return step(jax.tree.unflatten(tree, leaves), *args, ops=self._ops)

    def __call__(
        self, tree: Any, leaves: list[Array], state: DeviceState, *args: Any
    ) -> tuple[DeviceState, Output]:
        """`step` with the decoder as leaves and tree: flattening a module takes milliseconds."""
        return self._step(tree, leaves, state, *args)


@functools.cache
def program(ops: Ops) -> Program:
    """One for all engines with the same ops."""
    return Program(ops)
