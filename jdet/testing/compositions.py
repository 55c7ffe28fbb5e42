"""Batches around one request: the same request among other rows, neighbours and padding."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdet.compiler import jit
from jdet.generation import GeneratedTokens, LanguageModel, generate_tokens
from jdet.ops import Ops
from jdet.sampling import SamplingParams, sampling_arrays


@dataclasses.dataclass(frozen=True)
class Composition:
    """One batch: where the request stands and what stands around it.

    Attributes:
      row: the request's row.
      neighbours: the other rows' prompts, in row order.
      neighbour_sampling: their parameters.
      width: columns of the prompt array (the padding).
      cache_length: slots a row.
    """

    row: int
    neighbours: tuple[tuple[int, ...], ...] = ()
    neighbour_sampling: tuple[SamplingParams, ...] = ()
    width: int | None = None
    cache_length: int | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.neighbours) + 1


def compose(
    seed: int,
    *,
    batch_size: int,
    row: int,
    vocab_size: int,
    max_length: int,
    max_tokens: int,
    width: int | None = None,
    cache_length: int | None = None,
) -> Composition:
    """A composition with random neighbours: lengths 1..max_length, all kinds of sampling."""
    rng = np.random.default_rng(seed)
    neighbours, sampling = [], []
    for _ in range(batch_size - 1):
        length = int(rng.integers(1, max_length + 1))
        neighbours.append(tuple(rng.integers(0, vocab_size, length).tolist()))
        sampling.append(
            SamplingParams(
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                top_p=float(rng.choice([1.0, 0.9])),
                top_k=int(rng.choice([0, 1, 40])),
                min_p=float(rng.choice([0.0, 0.05])),
                seed=int(rng.integers(0, 2**40)),
                max_tokens=int(rng.integers(1, max_tokens + 1)),
            )
        )
    return Composition(row, tuple(neighbours), tuple(sampling), width, cache_length)


@functools.cache
def _jitted(ops: Ops, max_tokens: int) -> Callable[..., GeneratedTokens]:
    return jit(
        functools.partial(generate_tokens, ops=ops, max_tokens=max_tokens),
        implementation=ops.implementation,
        static_argnames=("cache_length",),
    )


def run_composition(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingParams,
    composition: Composition | None = None,
    *,
    max_tokens: int,
    cache_fill: float = 0.0,
    poison_padding: bool = False,
) -> tuple[list[int], Any]:
    """(token ids, log-probs as float32 array) of the request in a batch; alone without one.

    Args:
      cache_fill: value of the cache slots nobody has written.
      poison_padding: pad prompts with a token id outside the vocabulary, whose embedding
        is NaN.

    Raises:
      AssertionError: the batch that ran is not the one asked for.
    """
    c = composition or Composition(0)
    prompts = [*c.neighbours[: c.row], tuple(prompt), *c.neighbours[c.row :]]
    params = [*c.neighbour_sampling[: c.row], sampling, *c.neighbour_sampling[c.row :]]
    width = c.width or max(len(p) for p in prompts)
    padding = model.decoder.config.vocab_size if poison_padding else 0
    tokens = np.full((len(prompts), width), padding, np.int32)
    for line, p in zip(tokens, prompts, strict=True):
        line[: len(p)] = p
    lengths = np.array([len(p) for p in prompts], np.int32)
    out = jax.device_get(
        _jitted(model.ops, max_tokens)(
            model.decoder,
            tokens,
            lengths,
            sampling_arrays(params),
            cache_length=c.cache_length,
            cache_fill=cache_fill,
        )
    )
    assert out.token_ids.shape == (c.batch_size, max_tokens), "another batch was formed"
    assert (out.count > 0).all(), "a row of the batch did not run"
    count = int(out.count[c.row])
    return out.token_ids[c.row, :count].tolist(), out.logprobs[c.row, :count]
