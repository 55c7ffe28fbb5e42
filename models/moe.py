"""A mixture of experts in an MLP's place."""

from typing import NamedTuple

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jdet.models.config import DecoderConfig
from jdet.models.weights import random_weight
from jdet.ops import Ops
from jdet.pallas_kernels.route import Routing


class ExpertRows(NamedTuple):
    """What experts gave, not yet added: the next norm does that too (`Ops.expert_norm`)."""

    y: Float[Array, "R D"]
    routing: Routing


class Experts(nnx.Module):
    """Top-k gated MLPs of each token, as Qwen3-MoE has them; every expert's weights in one array.

    What a token gets depends on that token alone: the router's choice has no capacity, a row of
    the grouped products has the bits of its product alone, and its experts are added in ascending
    order. The router's logits are float32, not rounded to the model's dtype as transformers
    does: fewer ties to break.
    """

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router = random_weight(rngs, (config.num_experts, hidden), dtype)
        self.gate_up = random_weight(rngs, (config.num_experts, 2 * inner, hidden), dtype)
        self.down = random_weight(rngs, (config.num_experts, hidden, inner), dtype)

    def __call__(
        self, x: Float[Array, "M D"], routed: Bool[Array, " M"], ops: Ops
    ) -> Float[Array, "M D"]:
        """The experts' sum; zeros where a row is not `routed` (padding reads no weights)."""
        return ops.expert_sum(*self.rows(x, routed, ops))

    def rows(self, x: Float[Array, "M D"], routed: Bool[Array, " M"], ops: Ops) -> ExpertRows:
        """The rows that `expert_sum` adds."""
        logits = ops.matmul(x, self.router[...], out_dtype=jnp.float32)
        routing = ops.route(logits, routed, k=self.k, normalise=self.normalise)
        sizes, tiles = routing.sizes, routing.tiles
        inner = ops.grouped_gated_matmul(
            x, self.gate_up[...], sizes, tokens=routing.tokens, tiles=tiles
        )
        y = ops.grouped_matmul(inner, self.down[...], sizes, tiles=tiles, k_sharded=True)
        return ExpertRows(y, routing)
