"""Scoring: the log-probabilities of given tokens, bit-equal to those generation reported."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from jdet.cache import create_cache
from jdet.compiler import check_environment, jit
from jdet.completion import LanguageModel
from jdet.decoding import Decoder, Group, bucket, prompt_positions, round_up
from jdet.ops import Ops

# Rows whose logits are held at a time: [rows, vocabulary] float32.
LOGIT_ROWS = 128


def score_tokens(
    decoder: Decoder, tokens: Int32[Array, "B T"], lengths: Int32[Array, " B"], *, ops: Ops
) -> Float32[Array, "B T"]:
    """log p(tokens[b, t] | tokens[b, :t]); 0 at t = 0. Right-padded rows, to be jitted.

    One forward pass over the whole sequence. The logits are computed `LOGIT_ROWS` rows at a
    time, so that memory does not grow with the batch.
    """
    batch, length = tokens.shape
    cache_length = round_up(length, ops.contract.kv_split)
    cache = create_cache(decoder.config, batch, cache_length, decoder.dtype)
    (hidden,), _ = decoder((Group(tokens, prompt_positions(tokens, lengths)),), cache, ops)
    # Position t is predicted from the hidden state at t - 1.
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = tokens[:, 1:].reshape(-1)
    count = rows.shape[0]
    padded = round_up(count, LOGIT_ROWS)
    rows = jnp.pad(rows, ((0, padded - count), (0, 0))).reshape(-1, LOGIT_ROWS, rows.shape[-1])
    targets = jnp.pad(targets, (0, padded - count)).reshape(-1, LOGIT_ROWS)

    def some_rows(args: tuple[Array, Array]) -> Float32[Array, " rows"]:
        x, wanted = args
        logits = decoder.logits(x, ops)
        logit = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
        return ops.log_normalizer(logits).log_probs(logit)[:, 0]

    scores = lax.map(some_rows, (rows, targets)).reshape(-1)[:count]
    return jnp.pad(scores.reshape(batch, length - 1), ((0, 0), (1, 0)))


@functools.cache
def _jitted(ops: Ops) -> Callable[..., Float32[Array, "B T"]]:
    return jit(functools.partial(score_tokens, ops=ops), implementation=ops.implementation)


def score(
    model: LanguageModel, tokens: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[list[float]]:
    """Log-probabilities of each sequence's tokens from its second on, given those before.

    For `prompt + completion` the last len(completion) values are, bit for bit, the
    `logprobs` that `generate` gave. Input order; float32 values.

    Raises:
      ValueError: a sequence of fewer than two tokens, over the context length, or with a
        token id outside the vocabulary.
      EnvironmentRefused: XLA_FLAGS holds a flag against the promise.
    """
    config = model.decoder.config
    for i, ids in enumerate(tokens):
        if not 2 <= len(ids) <= config.max_position_embeddings:
            raise ValueError(
                f"sequence {i} has {len(ids)} tokens; allowed: 2..{config.max_position_embeddings}"
            )
        if not all(0 <= t < config.vocab_size for t in ids):
            raise ValueError(f"sequence {i} has token ids outside 0..{config.vocab_size - 1}")
    if model.ops.implementation != "xla":
        check_environment()
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    scores: dict[int, list[float]] = {}
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        padded = np.zeros(
            (bucket(len(chosen), 1), bucket(max(len(tokens[i]) for i in chosen), 16)), np.int32
        )
        for row, i in zip(padded, chosen, strict=False):
            row[: len(tokens[i])] = tokens[i]
        lengths = np.ones(len(padded), np.int32)
        lengths[: len(chosen)] = [len(tokens[i]) for i in chosen]
        values = np.asarray(_jitted(model.ops)(model.decoder, padded, lengths))
        for row, i in zip(values, chosen, strict=False):
            scores[i] = row[1 : len(tokens[i])].tolist()
    return [scores[i] for i in range(len(tokens))]
