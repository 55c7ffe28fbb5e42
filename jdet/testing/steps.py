"""A model's step as a function and the shapes it takes: to be compiled where no weights are."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jdet.cache import KVCache, create_cache
from jdet.decoding import Decoder, Group, last_states, next_token, round_up
from jdet.ops import Ops
from jdet.sampling import Asks, SamplingArrays, SamplingParams, sampling_arrays

_GREEDY = Asks(noise=False, truncation=False, adjustment=False)


class Stepped(NamedTuple):
    """What a step gives."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    cache: KVCache


def step(
    decoder: Decoder,
    group: Group,
    cache: KVCache,
    lengths: Int32[Array, " B"],
    sampling: SamplingArrays,
    *,
    ops: Ops,
) -> Stepped:
    """Read `group` and choose the next token of each row, its most probable one.

    One token a row is a decode step, more are a prefill; `lengths` are those of the rows. It is
    what the engine's programs do where no row asks for noise.
    """
    (hidden,), cache = decoder((group,), cache, ops)
    states = last_states(hidden, lengths)
    found = next_token(decoder, states, sampling, jnp.zeros_like(lengths), ops=ops, asks=_GREEDY)
    return Stepped(found.token, found.logprob, cache)


def step_shapes(
    decoder: Decoder,
    ops: Ops,
    *,
    batch: int,
    length: int = 1,
    context: int | None = None,
    page_size: int | None = None,
) -> tuple[Callable[..., Stepped], tuple[Any, ...]]:
    """(`step` on `ops`, the shapes of its arguments), of `length` tokens in each of `batch` rows.

    Args:
      decoder: of shapes or arrays (`nnx.eval_shape` makes one without weights).
      context: slots of a row's cache (default: what the tokens need).
      page_size: of a paged cache, which then has a page table; None: a contiguous one.
    """
    slots = round_up(context or length, ops.contract.kv_split)

    def operands() -> tuple[Any, ...]:
        tokens = jnp.zeros((batch, length), jnp.int32)
        if page_size is None:
            table, cache = None, create_cache(decoder.config, batch, slots, decoder.dtype)
        else:
            pages = slots // page_size
            table = jnp.zeros((batch, pages), jnp.int32)
            cache = create_cache(decoder.config, batch * pages, page_size, decoder.dtype)
        sampling = sampling_arrays([SamplingParams(temperature=0)] * batch)
        return Group(tokens, tokens, table), cache, jnp.zeros(batch, jnp.int32), sampling

    return functools.partial(step, ops=ops), (decoder, *jax.eval_shape(operands))
