"""The mixture of experts of eqx-zoo (Equinox): eqx_zoo/layers/moe.py, all requests' tokens at once.

Tokens are sorted by expert, multiplied by jax.lax.ragged_dot and added up by a scatter. A whole
model of the package takes one prompt at a time where it has experts (ragged_dot has no rule for
jax.vmap with shared weights), so here a request is one token of the layer.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_zoo.layers import SparseMoE
from foreign_models.example import Example, Images, randomised
from jax.typing import DTypeLike

import jdet

PACKAGE = "eqx-zoo"

SIZES = {
    "tiny": {"dim": 1000, "hidden_dim": 96, "num_experts": 8, "num_experts_per_tok": 3},
    # Qwen3-30B-A3B, with 32 of its 128 experts.
    "real": {"dim": 2048, "hidden_dim": 768, "num_experts": 32, "num_experts_per_tok": 8},
}


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config = SIZES[size]
    made = SparseMoE(**config, norm_topk_prob=True, key=jax.random.key(0))
    arrays, rest = eqx.partition(made, eqx.is_array)
    tokens = Images((config["dim"],))

    def forward(weights: Any, batch: jax.Array) -> jax.Array:
        return eqx.combine(weights, rest)(batch.astype(dtype))

    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=randomised(arrays, jnp.dtype(dtype)),
        requests=tokens.requests,
        extremes=tokens.extremes,
        batch=tokens.batch,
        real=tokens.real,
        pads=(0,),
        timed=(8,),
        about=config,
    )
