"""The device's step, in jitted programs whose shapes are those of `EngineConfig`.

- `read`: all tokens of the step, chunks of prompts and generating rows, through the decoder,
  which sees each weight once; the paged cache is donated.
- `choose`: the next token of the rows that emit one. The tokens stay on the device for the
  next step, so that the host can send that step before it has seen them. What the rows ask
  for is known to the host, so no branch waits for the device.
- `report`: log-probs of prompts, only where asked for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jdet.cache import KVCache
from jdet.compiler import jit
from jdet.decoding import Decoder, Group, last_states, next_token, round_up
from jdet.ops import Ops
from jdet.pallas_kernels.log_normalizer import LogNormalizer
from jdet.sampling import MAX_TOP_LOGPROBS, Asks, SamplingArrays
from jdet.scoring import LOGIT_ROWS

# The host gives numpy arrays, which jit puts on the device.
Given = Array | np.ndarray


class Rows(NamedTuple):
    """Requests of a step, one a row; padding rows have length 0 and the slot after the last."""

    slot: Int32[Given, " B"]
    start: Int32[Given, " B"]  # position of the row's first token
    length: Int32[Given, " B"]
    page_table: Int32[Given, "B N"]


class Chunks(NamedTuple):
    """Chunks of prompts."""

    rows: Rows
    tokens: Int32[Given, "B C"]


class Emits(NamedTuple):
    """The rows that choose a token: their place among all rows of the step, and their slot."""

    row: Int32[Given, " E"]
    slot: Int32[Given, " E"]
    count: Int32[Given, " E"]  # place of the token in the completion


class TopTokens(NamedTuple):
    """The most probable tokens, best first; ties: the lower id first."""

    token_ids: Int32[Array, "*rows K"]
    logprobs: Float32[Array, "*rows K"]


class Chosen(NamedTuple):
    """The next token of each row of `Emits`; `top` only where `asks.adjustment` counts some row."""

    token: Int32[Array, " E"]
    logprob: Float32[Array, " E"]
    top: TopTokens | None


class PromptLogprobs(NamedTuple):
    """The log-prob of the token behind each position of the chunks."""

    logprob: Float32[Array, "B C"]
    top: TopTokens


def _group(rows: Rows, tokens: Int32[Array, "B T"]) -> Group:
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(at < rows.length[:, None], rows.start[:, None] + at, -1)
    return Group(tokens, positions, jnp.asarray(rows.page_table))


def read(
    decoder: Decoder,
    cache: KVCache,
    last_token: Int32[Array, " slots"],
    chunks: Chunks | None,
    decodes: Rows | None,
    *,
    height: int,
    ops: Ops,
) -> tuple[KVCache, Float[Array, "R D"], Float[Array, "B C D"] | None]:
    """(cache, hidden states of each row's last token, of all tokens of the chunks).

    The rows' are padded to `height`, so that `choose` does not see the step's shape.
    """
    groups, hidden = [], None
    if chunks is not None:
        groups.append(_group(chunks.rows, jnp.asarray(chunks.tokens)))
    if decodes is not None:
        groups.append(_group(decodes, last_token[decodes.slot][:, None]))
    states, cache = decoder(tuple(groups), cache, ops)
    ends = []
    if chunks is not None:
        hidden, *states = states
        ends.append(last_states(hidden, jnp.asarray(chunks.rows.length)))
    ends += [state[:, 0] for state in states]
    rows = jnp.concatenate(ends)
    return cache, jnp.pad(rows, ((0, height - rows.shape[0]), (0, 0))), hidden


def _top(logits: Float32[Array, "R V"], normalizer: LogNormalizer) -> TopTokens:
    # By logits: two of them may round to one log-prob.
    values, ids = lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
    return TopTokens(ids, normalizer.log_probs(values))


def choose(
    decoder: Decoder,
    last_token: Int32[Array, " slots"],
    ends: Float[Array, "R D"],
    sampling: SamplingArrays,
    emits: Emits,
    *,
    asks: Asks,
    ops: Ops,
) -> tuple[Int32[Array, " slots"], Chosen]:
    """The next tokens, also put into their slots; `sampling` has a row for each slot."""
    own = jax.tree.map(lambda x: x[emits.slot], sampling)
    found = next_token(decoder, ends[emits.row], own, jnp.asarray(emits.count), ops=ops, asks=asks)
    best = _top(found.logits, found.normalizer) if asks.adjustment else None
    chosen = Chosen(found.token, found.logprob, best)
    return last_token.at[emits.slot].set(found.token), chosen


def report(
    decoder: Decoder,
    hidden: Float[Array, "B C D"],
    targets: Int32[Given, "B C"],
    *,
    ops: Ops,
) -> PromptLogprobs:
    """As `jdet.scoring.score_tokens`: `LOGIT_ROWS` rows of logits at a time."""
    count = targets.size
    padded = round_up(count, LOGIT_ROWS)
    rows = jnp.pad(hidden.reshape(count, -1), ((0, padded - count), (0, 0)))
    wanted = jnp.pad(targets.reshape(-1), (0, padded - count))

    def some_rows(args: tuple[Array, Array]) -> PromptLogprobs:
        x, target = args
        logits = decoder.logits(x, ops)
        normalizer = ops.log_normalizer(logits)
        logit = jnp.take_along_axis(logits, target[:, None], axis=-1)
        return PromptLogprobs(normalizer.log_probs(logit)[:, 0], _top(logits, normalizer))

    tiles = rows.reshape(-1, LOGIT_ROWS, rows.shape[-1]), wanted.reshape(-1, LOGIT_ROWS)
    return jax.tree.map(
        lambda x: x.reshape(padded, *x.shape[2:])[:count].reshape(*targets.shape, *x.shape[2:]),
        lax.map(some_rows, tiles),
    )


class Programs:
    """The programs, jitted for one set of ops; `compiles` counts the shapes they have met.

    They take the decoder as a tree and its leaves: flattening a module takes milliseconds.
    """

    def __init__(self, ops: Ops) -> None:
        self.compiles = 0
        self._ops = ops
        self.read = self._jit(read, donate_argnums=2, static_argnames=("height",))
        self.choose = self._jit(choose, donate_argnums=2, static_argnames=("asks",))
        self.report = self._jit(report)

    def _jit(self, function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def traced(tree: Any, leaves: list[Array], *args: Any, **static: Any) -> Any:
            self.compiles += 1  # jit runs this line once a shape
            return function(jax.tree.unflatten(tree, leaves), *args, ops=self._ops, **static)

        del traced.__wrapped__  # jit would look for its arguments' names there
        return jit(traced, implementation=self._ops.implementation, static_argnums=0, **kwargs)


@functools.cache
def programs(ops: Ops) -> Programs:
    """One for all engines with the same ops."""
    return Programs(ops)
