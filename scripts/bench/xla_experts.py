"""Plain XLA's ways with a mixture of experts: the baseline, and a count of what is read."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from cudnn_attention import CudnnOps  # pyright: ignore[reportMissingImports]
from jaxtyping import Array

import jdet
from jdet.cache import create_cache
from jdet.decoding import Group
from jdet.models.load import LanguageModel
from jdet.pallas_kernels.route import Routing

GATHER_UP_TO = 64  # rows; above, nearly every expert is read anyway


class ExpertOps(CudnnOps):
    """cuDNN's attention, and experts in the forms that XLA makes most of.

    XLA makes a ragged dot of a product of every row with every expert. Here few rows take their
    experts' weights one by one; more stand in a batch of products, an expert each, with room
    for as many rows as there are tokens.
    """

    def grouped_matmul(self, x: Array, w: Array, sizes: Array, **options: Any) -> Array:
        rows, number = x.shape[0], jnp.arange(x.shape[0])
        ends = jnp.cumsum(sizes)
        expert = jnp.searchsorted(ends, number, side="right")
        if rows <= GATHER_UP_TO:
            y = jnp.einsum("rk,rnk->rn", x, w[expert], preferred_element_type=jnp.float32)
            return y.astype(x.dtype)
        tokens = rows // self.experts_per_token
        starts = ends - sizes
        of_expert = x[jnp.minimum(starts[:, None] + jnp.arange(tokens), rows - 1)]
        y = jnp.einsum("etk,enk->etn", of_expert, w, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)[expert, number - starts[expert]]

    def grouped_gated_matmul(
        self, x: Array, w: Array, sizes: Array, *, tokens: Array, **options: Any
    ) -> Array:
        gate, up = jnp.split(self.grouped_matmul(x[tokens], w, sizes), 2, axis=1)
        return jax.nn.silu(gate) * up

    experts_per_token: ClassVar[int] = 8  # of Qwen3's mixtures


class _CountingOps(jdet.Ops):
    """Notes the sizes of the groups of every layer that is traced."""

    def route(self, *args: Any, **options: Any) -> Routing:
        routing = super().route(*args, **options)
        _sizes.append(routing.sizes)
        return routing


_sizes: list[Array] = []


def experts_read(model: LanguageModel, batch: int, context: int, tokens: Array) -> float:
    """Experts that a decode step reads in a layer, on average; its cache is as the benchmark's."""
    ops = _CountingOps(model.ops.implementation, model.ops.contract)

    def step(decoder, tokens):
        cache = create_cache(model.config, batch, context, decoder.dtype, fill=0.01)
        _sizes.clear()
        positions = jnp.full((batch, 1), context - 1, jnp.int32)
        decoder((Group(tokens[:, None], positions),), cache, ops)
        return jnp.mean(jnp.sum(jnp.stack(_sizes) > 0, axis=1))

    return float(jdet.jit(step, implementation=ops.implementation)(model.decoder, tokens))
