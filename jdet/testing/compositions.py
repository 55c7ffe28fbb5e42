"""Batches around one request: the same request among other rows, neighbours and padding."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from jdet.compiler import jit
from jdet.completion import LanguageModel
from jdet.decoding import GeneratedTokens, generate_tokens
from jdet.ops import Ops
from jdet.sampling import SamplingParams, sampling_arrays
from jdet.testing.bits import first_difference


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


type Generated = tuple[list[int], NDArray[np.float32]]


def run_batch(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    *,
    max_tokens: int,
    width: int | None = None,
    cache_length: int | None = None,
    cache_fill: float = 0.0,
    poison_padding: bool = False,
) -> list[Generated]:
    """(token ids, log-probs) of each request, run as one batch in this row order.

    Args:
      max_tokens: columns of the result.
      width: columns of the prompt array, the padding (default: the longest prompt).
      cache_length: slots a row (default: as few as fit).
      cache_fill: value of the cache slots nobody has written.
      poison_padding: pad prompts with a token id outside the vocabulary, whose embedding
        is NaN.

    Raises:
      AssertionError: the batch that ran is not the one asked for.
    """
    padding = model.decoder.config.vocab_size if poison_padding else 0
    columns = width or max(len(prompt) for prompt, _ in requests)
    tokens = np.full((len(requests), columns), padding, np.int32)
    for line, (prompt, _) in zip(tokens, requests, strict=True):
        line[: len(prompt)] = prompt
    out = jax.device_get(
        _jitted(model.ops, max_tokens)(
            model.decoder,
            tokens,
            np.array([len(prompt) for prompt, _ in requests], np.int32),
            sampling_arrays([params for _, params in requests]),
            cache_length=cache_length,
            cache_fill=cache_fill,
        )
    )
    assert out.token_ids.shape == (len(requests), max_tokens), "another batch was formed"
    assert (out.count > 0).all(), "a row of the batch did not run"
    return [
        (ids[:count].tolist(), logprobs[:count])
        for ids, logprobs, count in zip(out.token_ids, out.logprobs, out.count, strict=True)
    ]


def run_composition(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: SamplingParams,
    composition: Composition | None = None,
    *,
    max_tokens: int,
    cache_fill: float = 0.0,
    poison_padding: bool = False,
) -> Generated:
    """The request inside a composition (None: alone), by `run_batch`."""
    c = composition or Composition(0)
    requests = list(zip(c.neighbours, c.neighbour_sampling, strict=True))
    requests.insert(c.row, (tuple(prompt), sampling))
    return run_batch(
        model,
        requests,
        max_tokens=max_tokens,
        width=c.width,
        cache_length=c.cache_length,
        cache_fill=cache_fill,
        poison_padding=poison_padding,
    )[c.row]


def same_bits(a: Generated, b: Generated) -> bool:
    """Equal tokens, and log-probs equal as bit patterns (NaN and -0.0 included)."""
    return a[0] == b[0] and a[1].shape == b[1].shape and first_difference(a[1], b[1]) is None
