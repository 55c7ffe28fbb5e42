"""Gemma 3 of Google DeepMind's gemma library (Flax Linen): gemma/gm/nn/_transformer.py.

Its layers slide a window over the prompt, but every sixth; queries and keys are normalised.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from foreign_models.example import Example, Tokens, randomised, spoiled
from gemma import gm
from jax.typing import DTypeLike

import jdet

PACKAGE = "gemma"


def config_of(size: str) -> tuple[Any, int]:
    """A config of the library's, and the real tokens of a prompt."""
    full = gm.nn.Gemma3_270M.config
    if size == "real":
        return dataclasses.replace(full, attention_types=full.attention_types[4:6]), 13
    tiny = dataclasses.replace(
        full,
        num_embed=300,
        embed_dim=192,
        hidden_dim=576,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        sliding_window_size=5,
        attention_types=full.attention_types[4:6],
    )
    return tiny, 13


def build(size: str, dtype: DTypeLike, **options: Any) -> Example:
    config, length = config_of(size)
    model = gm.nn.Transformer(config=config, dtype=jnp.dtype(dtype))
    tokens = Tokens(config.num_embed, length)

    def forward(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        out = model.apply(
            weights,
            batch["tokens"],
            positions=batch["positions"],
            attention_mask=batch["mask"],
        )
        return out.logits

    weights = randomised(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)), dtype)
    embedder = weights["params"]["embedder"]
    embedder["input_embedding"] = spoiled(embedder["input_embedding"])
    return Example(
        plain=jax.jit(forward),
        invariant=jax.jit(jdet.batch_invariant(forward, **options)),
        weights=weights,
        requests=tokens.requests,
        extremes=tokens.extremes,
        batch=tokens.batch,
        real=tokens.real,
        pads=(3, 0, 7, 20),
        timed=(8,),
        about={
            "layers": len(config.attention_types),
            "vocabulary": config.num_embed,
            "width": config.embed_dim,
            "hidden": config.hidden_dim,
            "heads": config.num_heads,
            "kv heads": config.num_kv_heads,
            "head width": config.head_dim,
            "window": config.sliding_window_size,
            "tokens": length,
        },
    )
